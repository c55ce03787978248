"""Engine directories: published whole, readable by others, and restored after a crash or a signal."""

from __future__ import annotations

import dataclasses
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from export import manifest_writer
from export.manifest_writer import atomic_directory, prompt_of, sha256_of_weights, write_atomically
from tests.conftest import FID, FIDO, random_reader


@pytest.fixture
def umask_022() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_container_user_can_read_what_is_published(tmp_path: Path, umask_022: None):
    with atomic_directory(tmp_path / "engines") as tmp_dir:
        (tmp_dir / "file").write_text("x")
    assert mode(tmp_path / "engines") == 0o755 and mode(tmp_path / "engines" / "file") == 0o644
    write_atomically(tmp_path / "stamp", b"x")
    assert mode(tmp_path / "stamp") == 0o644


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_error_the_former_content_is_there_and_nothing_else(error: type[BaseException], tmp_path: Path):
    with atomic_directory(tmp_path / "engines") as tmp_dir:
        (tmp_dir / "file").write_text("former")
    with pytest.raises(error), atomic_directory(tmp_path / "engines") as tmp_dir:
        (tmp_dir / "file").write_text("half")
        raise error
    assert [path.name for path in tmp_path.iterdir()] == ["engines"]
    assert (tmp_path / "engines" / "file").read_text() == "former"


def test_the_former_directory_is_deleted_only_after_the_new_one_is_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """At every deletion of former content, `engines` must hold the new content."""
    with atomic_directory(tmp_path / "engines") as tmp_dir:
        (tmp_dir / "file").write_text("former")
    delete, seen = manifest_writer.shutil.rmtree, []

    def recorded(path: Path, ignore_errors: bool = False) -> None:
        if (Path(path) / "file").exists():
            seen.append(((Path(path) / "file").read_text(), (tmp_path / "engines" / "file").read_text()))
        delete(path, ignore_errors)

    monkeypatch.setattr(manifest_writer.shutil, "rmtree", recorded)
    with atomic_directory(tmp_path / "engines") as tmp_dir:
        (tmp_dir / "file").write_text("new")
    assert seen == [("former", "new")]
    assert [path.name for path in tmp_path.iterdir()] == ["engines"]


def test_a_crash_between_the_two_renames_is_repaired_by_the_next_call(tmp_path: Path):
    old = tmp_path / ".engines.old"
    old.mkdir()
    (old / "file").write_text("former")
    with pytest.raises(ValueError), atomic_directory(tmp_path / "engines"):
        raise ValueError
    assert (tmp_path / "engines" / "file").read_text() == "former"
    assert [path.name for path in tmp_path.iterdir()] == ["engines"]


@torch.no_grad()
def test_the_hash_of_weights_is_that_of_their_names_and_numbers():
    wanted = sha256_of_weights(random_reader(FIDO))
    assert sha256_of_weights(random_reader(FIDO)) == wanted
    assert len({wanted, *(sha256_of_weights(random_reader(config, seed)) for config, seed in ((FIDO, 1), (FID, 0)))}) == 3
    for name in ("embedding.weight", "decoder.layers.4.feed_forward.wo.weight"):
        changed = random_reader(FIDO)
        changed.get_parameter(name).view(-1)[-1] += 1
        assert sha256_of_weights(changed) != wanted
    rounded = random_reader(FIDO).half()
    assert sha256_of_weights(rounded) == sha256_of_weights(random_reader(FIDO).half().float()) != wanted


def test_a_prompt_names_its_end_token_only_where_answers_end_with_another(tokenizer_json: str):
    assert prompt_of(FID, tokenizer_json).end_token_id is None
    assert prompt_of(dataclasses.replace(FID, eos_token_id=7), tokenizer_json).end_token_id == 1
