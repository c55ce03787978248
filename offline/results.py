"""The results' folder: a manifest of what is asked, and for each shard a Parquet file of answers and one of the rows set aside.

    OUT/manifest.json                     the files with their shards, the reader, the settings
    OUT/answers/FILE-SHARD.parquet        id, answer, log_prob, tokens, file, row; once it is there, the shard is done
    OUT/set_aside/FILE-SHARD.parquet      id, error, source, file, row; only where a row of the shard could not be answered
    OUT/input/FILE.jsonl                  copies of files that can only be read from their start

Every file is written whole or not at all, so a run may be killed at any time and run again.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from fido_client.data.json_values import DataFileError

from .inputs import Row, Shard, place_of, shards_of, written_whole

FORMAT = 1
_KEY = [pa.field("id", pa.string(), False), pa.field("file", pa.string(), False), pa.field("row", pa.int64(), False)]
ANSWERS = pa.schema([*_KEY, pa.field("answer", pa.string()), pa.field("log_prob", pa.float32()), pa.field("tokens", pa.int32())])
SET_ASIDE = pa.schema([*_KEY, pa.field("error", pa.string()), pa.field("source", pa.string())])


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the answers depend on; a run with others needs another folder.

    Attributes:
        reader: name of the reader, or folder of its engines.
        max_passages: each question keeps its best so many; None: all.
        max_new_tokens: of an answer; None: the reader's default.
        shard_rows: rows of a shard.
    """

    reader: str
    max_passages: int | None
    max_new_tokens: int | None
    shard_rows: int


class Results:
    """The results' folder at a path or URI."""

    def __init__(self, out: str) -> None:
        self.out = out.rstrip("/")

    def known_files(self, settings: Settings) -> list[dict[str, Any]]:
        """The plans of the files that earlier runs planned; none in a new folder.

        Raises:
            DataFileError: If the folder was made with other settings.
        """
        system, place = place_of(f"{self.out}/manifest.json")
        if system.get_file_info(place).type == pafs.FileType.NotFound:
            return []
        with system.open_input_file(place) as file:
            manifest = json.loads(file.read())
        wanted = {"format": FORMAT, **dataclasses.asdict(settings)}
        differing = [name for name, value in wanted.items() if manifest.get(name) != value]
        if differing:
            texts = [f"{name}: {manifest.get(name)!r} then, {wanted[name]!r} now" for name in differing]
            raise DataFileError(f"{self.out}: made with other settings ({'; '.join(texts)}); repeat them, or pass another --out")
        files: list[dict[str, Any]] = manifest["files"]
        return files

    def write_manifest(self, settings: Settings, files: list[dict[str, Any]]) -> None:
        """Write what is asked."""
        with written_whole(f"{self.out}/manifest.json") as file:
            file.write(json.dumps({"format": FORMAT, **dataclasses.asdict(settings), "files": files}).encode())

    def undone(self, files: list[dict[str, Any]], *, again: bool) -> list[Shard]:
        """The shards without answers; with `again`, also those of which rows were set aside."""
        done, faulty = self._names("answers"), self._names("set_aside") if again else set()
        return [shard for entry in files for shard in shards_of(entry) if shard.name not in done or shard.name in faulty]

    def set_aside(self) -> int:
        """How many rows of done shards are set aside."""
        return sum(self._table("set_aside", name).num_rows for name in self._names("set_aside") & self._names("answers"))

    def answered_rows(self, shard: Shard) -> pa.Table:
        """The answers that a shard has; none if it is not done."""
        return self._table("answers", shard.name) if shard.name in self._names("answers") else ANSWERS.empty_table()

    def write(self, shard: Shard, answers: list[tuple[Row, Any]], kept: pa.Table, faults: list[tuple[Row, str]]) -> None:
        """Write the results of a shard: the rows set aside first, since the answers mark it as done.

        Args:
            shard: that is done now.
            answers: rows with their answers: text, log_prob, tokens.
            kept: answers that the shard had before.
            faults: rows with what is wrong with them.
        """
        columns = [
            [row.id for row, _ in answers],
            [shard.file] * len(answers),
            [row.row for row, _ in answers],
            *([getattr(answer, name) for _, answer in answers] for name in ("text", "log_prob", "tokens")),
        ]
        table = pa.Table.from_arrays([pa.array(column, field.type) for column, field in zip(columns, ANSWERS, strict=True)], schema=ANSWERS)
        aside = [{"id": row.id, "file": shard.file, "row": row.row, "error": error, "source": row.source} for row, error in faults]
        system, place = place_of(f"{self.out}/set_aside/{shard.name}.parquet")
        if aside:
            self._write("set_aside", shard.name, pa.Table.from_pylist(aside, schema=SET_ASIDE))
        self._write("answers", shard.name, pa.concat_tables([kept, table]).sort_by("row"))
        if not aside and system.get_file_info(place).type == pafs.FileType.File:  # all of it answered at another try
            system.delete_file(place)

    def _write(self, kind: str, name: str, table: pa.Table) -> None:
        with written_whole(f"{self.out}/{kind}/{name}.parquet") as file:
            pq.write_table(table, file, compression="zstd")

    def _table(self, kind: str, name: str) -> pa.Table:
        system, place = place_of(f"{self.out}/{kind}/{name}.parquet")
        with system.open_input_file(place) as file:
            return pq.read_table(file)

    def _names(self, kind: str) -> set[str]:
        system, place = place_of(f"{self.out}/{kind}")
        listed = system.get_file_info(pafs.FileSelector(place, allow_not_found=True))
        return {info.base_name.removesuffix(".parquet") for info in listed if info.base_name[:1].isdigit()}
