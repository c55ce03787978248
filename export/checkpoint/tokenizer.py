"""The tokenizer of a checkpoint, as JSON of the `tokenizers` library.

Comes in: a directory or a file. Goes out: the text of a tokenizer.json; a lone spiece.model is converted. Tokenizes no prompts;
serving/pipeline does.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from export.errors import CheckpointError
from serving.contract.tokenizer import token_without_embedding

from .sentencepiece import T5_EXTRA_IDS, parse_model, tokenizer_from_model
from .source_files import one_line, read_json, read_text, require_file

TOKENIZER_FILE = "tokenizer.json"
SPIECE_FILE = "spiece.model"


def read_tokenizer(place: Path, vocab_size: int | None = None) -> str:
    """The tokenizer in a directory or file.

    Args:
        place: a directory with tokenizer.json or spiece.model, or one of the two, whatever its name.
        vocab_size: rows of the embedding; a spiece.model gets T5's 100 sentinels only if they have rows.

    Raises:
        CheckpointError: if there is none, or it is damaged.
    """
    path = place
    if place.is_dir():
        path = next((place / name for name in (TOKENIZER_FILE, SPIECE_FILE) if (place / name).exists()), place / TOKENIZER_FILE)
    hint = f"no {TOKENIZER_FILE} or {SPIECE_FILE}; pass one with --tokenizer (t5-base's for FiD's readers)"
    if not path.exists() and not path.is_symlink():
        raise CheckpointError(f"{place}: {hint}")
    require_file(path)
    if path.suffix == ".json":
        text = read_text(path)
        _parsed(text, path)
        return text
    model = parse_model(path.read_bytes(), str(path))
    extra_ids = _extra_ids(path.parent)
    if extra_ids is None:
        fits = vocab_size is None or len(model.pieces) + T5_EXTRA_IDS <= vocab_size
        extra_ids = T5_EXTRA_IDS if fits else 0
    return str(tokenizer_from_model(model, extra_ids).to_str())


def require_embeddings(tokenizer_json: str, vocab_size: int, source: str) -> None:
    """Raise CheckpointError unless every token of the tokenizer has a row in an embedding of `vocab_size` rows."""
    token = token_without_embedding(Tokenizer.from_str(tokenizer_json), vocab_size)
    if token is not None:
        raise CheckpointError(
            f"{source}: the tokenizer has token id {token}, but the embedding has {vocab_size} rows; "
            "pass the checkpoint's own tokenizer with --tokenizer"
        )


def end_token_id(tokenizer_json: str) -> int | None:
    """The token that the tokenizer ends its texts with, or the id of `</s>`; None if it has neither."""
    tokenizer = Tokenizer.from_str(tokenizer_json)
    bare, whole = (tokenizer.encode("", add_special_tokens=added).ids for added in (False, True))
    if len(whole) == len(bare) + 1:
        return int(whole[-1])
    found = tokenizer.token_to_id("</s>")
    return None if found is None else int(found)


def _parsed(text: str, path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_str(text)
    except BaseException as error:  # the library raises Exception, and pyo3's PanicException, which is none
        if isinstance(error, (KeyboardInterrupt, SystemExit)) or type(error).__module__.startswith("export"):
            raise
        raise CheckpointError(f"{path}: not a tokenizer of the tokenizers library; download it again ({one_line(error)})") from error


def _extra_ids(directory: Path) -> int | None:
    """The number of sentinels that tokenizer_config.json states, if any."""
    path = directory / "tokenizer_config.json"
    if not path.exists():
        return None
    number = read_json(path).get("extra_ids")
    if number is None:
        return None
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise CheckpointError(f"{path}: extra_ids: wanted a number of tokens, got {number!r}")
    return number
