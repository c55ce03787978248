"""Files of questions -> a plan of shards, and a shard -> its rows. A shard is found again without reading what lies before it.

Parquet is read by row groups and JSONL from a byte offset, where they lie. A JSON list, and anything gzipped, can only be read from its
start: planning copies it to JSONL once. Paths may be local or URIs that pyarrow knows (s3://, gs://, hdfs://).
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow.parquet as pq
from pyarrow import fs as pafs

import clients  # noqa: F401  (it makes fido_client importable in a checkout)
from fido_client.data.examples import ACCEPTED, Example, ExampleError, example_from
from fido_client.data.json_values import DataFileError, json_values, open_data, read_lines

PARQUET_MAGIC = b"PAR1"
DATA_FILES = (".parquet", ".jsonl", ".json", ".jsonl.gz", ".json.gz")
QUESTION_COLUMNS = ("id", "question", "ctxs", "passages", "contexts")  # no others are read: gold answers do not matter here


@dataclasses.dataclass(frozen=True)
class Shard:
    """Some consecutive rows of one file.

    Attributes:
        name: of its result files.
        file: the input file's path as the user knows it.
        read_from: the file that holds the rows: `file`, or its copy as JSONL.
        row: number of the first row in the file, from 0.
        rows: how many.
        offset: byte at which the first row starts; -1 in Parquet.
    """

    name: str
    file: str
    read_from: str
    row: int
    rows: int
    offset: int


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a file: an example, or what is wrong with it.

    Attributes:
        id: the data's own; else the file's name and the row's number.
        row: number in the file, from 0.
        example: None if the row is not a question with passages.
        error: why it is none.
        source: the row as JSON, or as text if it is not JSON.
    """

    id: str
    row: int
    example: Example | None
    error: str
    source: str


def place_of(path: str) -> tuple[pafs.FileSystem, str]:
    """A path or URI -> its file system, and the path there."""
    if "://" in path:
        return pafs.FileSystem.from_uri(path)
    return pafs.LocalFileSystem(), os.path.abspath(path)


@contextlib.contextmanager
def written_whole(path: str) -> Iterator[pafs.NativeFile]:
    """A file to write, which gets its name at the end; its folder is made. Two writers of the same content do not harm each other."""
    system, place = place_of(path)
    folder, name = place.rsplit("/", 1)
    system.create_dir(folder)
    partial = f"{folder}/.{name}.{uuid.uuid4().hex}"
    with system.open_output_stream(partial) as file:
        yield file
    system.move(partial, place)


def data_files(names: Sequence[str]) -> list[str]:
    """The files that the user named; of a folder, its data files in the order of their names.

    Raises:
        DataFileError: If one does not exist, a folder has none, or one is named twice.
    """
    found: list[str] = []
    for name in names:
        system, place = place_of(name)
        kind = system.get_file_info(place).type
        if kind == pafs.FileType.NotFound:
            raise DataFileError(f"{name}: there is no such file or folder")
        if kind == pafs.FileType.File:
            found.append(name if "://" in name else place)
            continue
        listed = sorted(info.base_name for info in system.get_file_info(pafs.FileSelector(place)) if info.type == pafs.FileType.File)
        held = [base for base in listed if base.endswith(DATA_FILES) and not base.startswith((".", "_"))]
        if not held:
            raise DataFileError(f"{name}: wanted files that end in {', '.join(DATA_FILES)}, got none of {len(listed)} files")
        found += [f"{(name if '://' in name else place).rstrip('/')}/{base}" for base in held]
    if len(set(found)) != len(found):
        raise DataFileError(f"{next(name for name in found if found.count(name) > 1)}: named twice")
    return found


def plan_file(file: str, number: int, shard_rows: int, out: str) -> dict[str, Any]:
    """The plan of one file, as JSON values: its size, and each shard as [first row, rows, byte offset].

    Args:
        file: the input file.
        number: of the file in the manifest; names its shards and its copy.
        shard_rows: rows of a shard; the last one has fewer.
        out: the results' folder; a copy as JSONL goes there.

    Raises:
        DataFileError: If it is no Parquet, JSON or JSONL.
    """
    system, place = place_of(file)
    entry = {"file": file, "number": number, "bytes": system.get_file_info(place).size, "read_from": file}
    with system.open_input_file(place) as opened:
        head = opened.read(1 << 16)
    if head.startswith(PARQUET_MAGIC):
        with system.open_input_file(place) as opened:
            try:
                parquet = pq.ParquetFile(opened)
            except OSError as error:  # pyarrow's errors of a damaged file
                raise DataFileError(f"{file}: not a whole Parquet file: {error}") from error
            columns = parquet.schema_arrow.names
            if "question" not in columns or not {"ctxs", "passages", "contexts"} & set(columns):
                raise DataFileError(f"{file}: wanted the columns question and ctxs (or passages, contexts), got {', '.join(columns)}")
            rows = parquet.metadata.num_rows
        shards = [[row, min(shard_rows, rows - row), -1] for row in range(0, rows, shard_rows)]
        return {**entry, "rows": rows, "shards": shards}
    if not _is_jsonl(head):
        entry["read_from"] = f"{out}/input/{number:05d}.jsonl"
        _copy_as_jsonl(file, str(entry["read_from"]))
    rows, shards = 0, []
    for offset, _ in _lines(str(entry["read_from"]), 0):
        if rows % shard_rows == 0:
            shards.append([rows, 0, offset])
        shards[-1][1] += 1
        rows += 1
    return {**entry, "rows": rows, "shards": shards}


def shards_of(entry: dict[str, Any]) -> list[Shard]:
    """The shards of a file's plan."""
    return [
        Shard(f"{entry['number']:05d}-{index:06d}", entry["file"], entry["read_from"], row, rows, offset)
        for index, (row, rows, offset) in enumerate(entry["shards"])
    ]


def read_rows(shard: Shard, max_passages: int | None) -> Iterator[Row]:
    """The rows of a shard; a row that is no question is among them with its error.

    Args:
        shard: as planned.
        max_passages: each question keeps its best so many; None: all.
    """
    base = shard.file.rsplit("/", 1)[-1]
    values = _parquet_values(shard) if shard.offset < 0 else _json_values(shard)
    for row, (value, source, error) in enumerate(itertools.islice(values, shard.rows), start=shard.row):
        where = f"{base}:{row}"
        named = isinstance(value, dict) and value.get("id") is not None
        example = None
        if not error:
            try:
                asked = {name: value[name] for name in QUESTION_COLUMNS if name in value} if isinstance(value, dict) else value
                example = example_from(asked, where, n_context=max_passages, where=where)
            except ExampleError as fault:
                error = str(fault)
        yield Row(str(value["id"]) if named else where, row, example, error, source)


def _json_values(shard: Shard) -> Iterator[tuple[Any, str, str]]:
    """Value, text and error of each row of JSONL."""
    for _, line in _lines(shard.read_from, shard.offset):
        text = line.decode("utf-8", "replace").strip()
        try:
            yield json.loads(line.decode("utf-8-sig").strip().removesuffix(",")), text, ""
        except (ValueError, RecursionError) as error:
            yield None, text, f"not JSON: {error}; accepted: {ACCEPTED}"


def _parquet_values(shard: Shard) -> Iterator[tuple[Any, str, str]]:
    """The same of Parquet: of the row groups that hold the shard."""
    system, place = place_of(shard.read_from)
    with system.open_input_file(place) as opened:
        parquet = pq.ParquetFile(opened)
        first, groups, skipped = 0, [], 0
        for group in range(parquet.metadata.num_row_groups):
            rows = parquet.metadata.row_group(group).num_rows
            if first + rows <= shard.row:
                skipped = first + rows
            elif first < shard.row + shard.rows:
                groups.append(group)
            first += rows
        columns = [name for name in QUESTION_COLUMNS if name in parquet.schema_arrow.names]
        at = skipped
        for batch in parquet.iter_batches(256, row_groups=groups, columns=columns):
            start, at = at, at + batch.num_rows
            if at <= shard.row:
                continue
            for value in batch.slice(max(0, shard.row - start)).to_pylist():
                yield value, json.dumps(value, ensure_ascii=False, default=str), ""


def _lines(path: str, offset: int) -> Iterator[tuple[int, bytes]]:
    """Byte offset and content of every line that is not blank, from a line's start on."""
    system, place = place_of(path)
    with system.open_input_file(place) as opened, io.BufferedReader(opened, 1 << 20) as file:
        file.seek(offset)
        for line in file:
            if line.strip():
                yield offset, line
            offset += len(line)


def _is_jsonl(head: bytes) -> bool:
    """Whether a file that starts so has one value a line: not a list, not one object over several lines, not compressed."""
    first = head.removeprefix(b"\xef\xbb\xbf").lstrip().split(b"\n", 1)[0].strip()
    return first.startswith(b"{") and first != b"{" and b"\x00" not in head


def _copy_as_jsonl(file: str, copy: str) -> None:
    """Write the values of a JSON file, gzipped or not, one a line."""
    system, place = place_of(file)
    with system.open_input_file(place) as opened, io.BufferedReader(opened, 1 << 20) as stream, open_data(file, stream) as data:
        with written_whole(copy) as lines:
            for _, value in json_values(read_lines(data, file), file, ACCEPTED):
                lines.write(json.dumps(value).encode() + b"\n")
