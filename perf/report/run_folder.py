"""Reads and checks a run's folder of measurements, and groups the sweep's rounds.

In: machine.json and sweep.json, and any other files of `SHAPES`. Out: a `Run`, in which missing optional values are None. A ratio is that
of the two medians, so that it follows from the numbers beside it; its ends are those of the single rounds, where both readers had the same
workload, load and machine state.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from perf.bounds.statistics import spread

Spread = Mapping[str, float]  # median, min, max
NAMES = {"fid": "FiD", "fido": "FiDO"}

NUMBER, POSITIVE, TEXT, FLAG, ANYTHING = "a number", "a number above 0", "a text", "true or false", "anything"
KINDS: dict[str, Callable[[Any], bool]] = {
    NUMBER: lambda value: isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value),
    POSITIVE: lambda value: KINDS[NUMBER](value) and value > 0,
    TEXT: lambda value: isinstance(value, str),
    FLAG: lambda value: isinstance(value, bool),
    ANYTHING: lambda value: True,
}
SPREAD = {"median": NUMBER, "min": NUMBER, "max": NUMBER}
RATE = dict.fromkeys(SPREAD, POSITIVE)  # a divisor

# A list holds the shape of its entries, a tuple the allowed texts. In an object, "key?" may be null or missing, "*" is any key and "#" any
# whole number (a batch size); other keys are allowed and not checked.
STAGES = {
    "parts_ms": {"*": SPREAD},
    **{"step_ms?": {"#": SPREAD}, "step_bound_ms?": {"#": POSITIVE}, "encoder_bound_ms?": POSITIVE, "preset?": TEXT},
    **dict.fromkeys(("encoder_ms?", "encoder_questions_per_s?", "in_process_ms?", "served_ms?"), SPREAD),
    **dict.fromkeys(("encoder_tflops?", "questions?", "passages?", "passage_tokens?", "new_tokens?"), NUMBER),
}
SWEEP: dict[str, Any] = {
    "settings": {"workloads": {"*": TEXT}},
    "points": [
        {
            **{"reader": ("fid", "fido"), "model": ("fid", "fid_stream", "fido", "fido_stream"), "workload": TEXT},
            **{"mode": ("concurrency", "request_rate"), "load": NUMBER, "round": NUMBER, "raw": TEXT, "stable": FLAG},
            **dict.fromkeys(("new_tokens?", "passages?", "passage_tokens?", "tokens_per_s?"), NUMBER),
            **dict.fromkeys(("questions_per_s", "requests", "errors"), NUMBER),
            "latency_ms": {"p50": NUMBER, "p99": NUMBER},
            "ttft_ms?": {"p50": NUMBER, "p99": NUMBER},
            "inter_token_ms?": {"p50": NUMBER, "p99": NUMBER},
        }
    ],
}
SHAPES: dict[str, Any] = {
    "machine": {
        **dict.fromkeys(("processor", "system", "python", "commit", "precision"), TEXT),
        **{"gpu?": TEXT, "cores": NUMBER, "memory_gib": NUMBER, "versions": {"*": ANYTHING}},
        **{"copy_tb_per_s": RATE, "peak_tflops": RATE},
    },
    "sweep": SWEEP,
    "sweep_fp8": SWEEP,
    "stages": {"readers": {"fid?": STAGES, "fido?": STAGES}},
    "stages_fp8": {"readers": {"fid?": STAGES, "fido?": STAGES}},
    "library_pytorch": {
        "summary": {"*": NUMBER},
        "ways": {"*": {"all_ms?": SPREAD, "one_question_ms?": SPREAD, "questions_per_s?": {"*": RATE}, "error?": ANYTHING}},
        "settings": {"questions": NUMBER, "passages": NUMBER, "passage_length": NUMBER, "new_tokens": NUMBER},
    },
    "cpu_engines": {"encoder_ms": {"*": SPREAD}, "fid_questions_per_s": {"*": RATE}},
    "chain": {"demo_readers": {"fid": {"triton_throughput_cost_at_8": NUMBER}, "fido": {"triton_throughput_cost_at_8": NUMBER}}},
    "peers": {
        "peers": [
            {
                **{"name": TEXT, "reader": ("fid", "fido"), "batch?": NUMBER, "excludes?": TEXT},
                **{"questions_per_s?": RATE, "p50_ms?": SPREAD, "error?": TEXT},
                **dict.fromkeys(("new_tokens?", "passages?", "passage_tokens?"), ANYTHING),
            }
        ]
    },
    "ablation": {
        **{"preset": TEXT, "workload": TEXT},
        "rows": [
            {
                **{"name": TEXT, "decoder": TEXT, "period": NUMBER, "num_kv_heads": NUMBER, "measured": FLAG, "note?": TEXT},
                **{"step_ms?": {"#": SPREAD}, "bound_ms": {"#": POSITIVE}},
                **dict.fromkeys(
                    ("cross_kv_mb_per_question?", "largest_batch?", "decoder_ms_per_question?", "total_ms_per_question?"), NUMBER
                ),
            }
        ],
    },
    "roofline": {
        "points": [{"name": TEXT, "reader": ("fid", "fido"), **dict.fromkeys(("flops", "bytes", "seconds", "bound_s"), POSITIVE)}],
    },
}
REQUIRED = ("machine", "sweep")
WORKLOAD_KEYS = ("new_tokens", "passages", "passage_tokens")  # constant for one workload name


PACKED = "run.json"  # {name: what NAME.json would hold}


class ReportError(ValueError):
    """A file of a run is missing or malformed."""


def checked(value: Any, shape: Any, where: str, joint: str = ".") -> Any:
    """The value, with None for every missing optional key.

    Raises:
        ReportError: the value does not have the shape; the message names `where`, what was wanted and what was found.
    """
    if isinstance(shape, str):
        if not KINDS[shape](value):
            raise ReportError(f"{where}: wanted {shape}, got {json.dumps(value)[:60]}")
        return value
    if isinstance(shape, tuple):
        if value not in shape:
            raise ReportError(f"{where}: wanted one of {', '.join(shape)}, got {json.dumps(value)[:60]}")
        return value
    if isinstance(shape, list):
        if not isinstance(value, list):
            raise ReportError(f"{where}: wanted a list, got {json.dumps(value)[:60]}")
        return [checked(each, shape[0], f"{where}[{number}]") for number, each in enumerate(value)]
    if not isinstance(value, dict):
        raise ReportError(f"{where}: wanted an object, got {json.dumps(value)[:60]}")
    found = dict(value)
    inside = where + joint
    for key, wanted in shape.items():
        if key in ("*", "#"):
            if key == "#" and (wrong := [name for name in value if not name.isdecimal()]):
                raise ReportError(f"{inside}{wrong[0]}: wanted a whole number as key")
            found |= {name: checked(each, wanted, f"{inside}{name}") for name, each in value.items()}
        elif key.endswith("?"):
            name = key[:-1]
            found[name] = None if value.get(name) is None else checked(value[name], wanted, f"{inside}{name}")
        elif key not in value:
            raise ReportError(f"{inside}{key}: wanted, but it is missing")
        else:
            found[key] = checked(value[key], wanted, f"{inside}{key}")
    if shape in (SPREAD, RATE) and not found["min"] <= found["median"] <= found["max"]:
        raise ReportError(f"{where}: wanted min <= median <= max, got {json.dumps(value)}")
    return found


@dataclasses.dataclass(frozen=True)
class Row:
    """All rounds of one point of the sweep, as in sweep.json; `row[key]` is a value that the rounds share."""

    rounds: tuple[dict[str, Any], ...]

    def __getitem__(self, key: str) -> Any:
        return self.rounds[0][key]

    def over_rounds(self, *keys: str) -> Spread | None:
        """Median, minimum and maximum of a value over the rounds, or None if a round lacks it."""
        values: list[Any] = list(self.rounds)
        for key in keys:
            values = [None if value is None else value[key] for value in values]
        return None if None in values else spread(values, 6)

    @property
    def questions_per_s(self) -> Spread:
        """Throughput over the rounds."""
        return spread([each["questions_per_s"] for each in self.rounds], 6)

    @property
    def streams(self) -> bool:
        """Whether the model streams."""
        return self["model"].endswith("_stream")

    @property
    def mark(self) -> str:
        """`*` if a round was unstable, `†` if one had errors."""
        unstable, failed = any(not each["stable"] for each in self.rounds), any(each["errors"] for each in self.rounds)
        return ("*" if unstable else "") + ("†" if failed else "")


@dataclasses.dataclass(frozen=True)
class Pair:
    """Both readers at the same workload and load.

    Attributes:
        ratio: FiDO's questions/s over FiD's, of the rounds that both have: of the medians, and the least and the most of a round.
        rounds: number of these rounds.
    """

    fid: Row
    fido: Row
    ratio: Spread
    rounds: int

    @property
    def mark(self) -> str:
        """The marks of both rows."""
        return "".join(sign for sign in "*†" if sign in self.fid.mark + self.fido.mark)


def best(rows: Sequence[Row]) -> Row | None:
    """The row with the highest questions/s. One with a mark counts too: a table with a higher number than the best would contradict it."""
    return max(rows, key=lambda row: row.questions_per_s["median"], default=None)


def times_peer(row: Row | None, peer: Mapping[str, Any]) -> float | None:
    """A row's questions/s over a peer's, or None if either is missing or the peer had another workload."""
    if not row or not peer["questions_per_s"] or any(peer[key] not in (None, row[key]) for key in WORKLOAD_KEYS if row[key] is not None):
        return None
    return row.questions_per_s["median"] / peer["questions_per_s"]["median"]


def pair_from_rows(fid: Row, fido: Row) -> Pair | None:
    """Both rows with their ratio, or None if they share no round in which FiD answered."""
    rates = [{each["round"]: each["questions_per_s"] for each in row.rounds} for row in (fid, fido)]
    common = [number for number, rate in rates[0].items() if rate > 0 and number in rates[1]]
    if not common:
        return None
    fid_median, fido_median = (spread([rate[number] for number in common], 6)["median"] for rate in rates)
    ratio = fido_median / fid_median
    ratios = [ratio, *(rates[1][number] / rates[0][number] for number in common)]
    return Pair(fid, fido, {"median": round(ratio, 6), "min": round(min(ratios), 6), "max": round(max(ratios), 6)}, len(common))


WAYS = {"hand": "PyTorch by hand (flex_attention)", "library": "PyTorch with library kernels (QuACK, cuDNN)"}


def library_peers(measured: Mapping[str, Any] | None, *, fp8: bool) -> list[dict[str, Any]]:
    """What perf/peers/library.py measured, as rows of peers.json: those in FP8, or the others; none if it was not run."""
    found = []
    for way, row in (measured["ways"] if measured else {}).items():
        kind, _, precision = way.partition("_")
        if (precision == "fp8") != fp8:
            continue
        settings = measured["settings"] if measured else {}
        for reader in NAMES:
            rate = (row["questions_per_s"] or {}).get(reader)
            found.append(
                {
                    **{"name": f"{WAYS[kind]}, compiled, {precision}", "reader": reader, "batch": settings["questions"]},
                    **{"questions_per_s": rate, "p50_ms": None, "error": None if rate else str(row["error"] or "not measured")},
                    **{"new_tokens": settings["new_tokens"], "passages": settings["passages"]},
                    **{"passage_tokens": settings["passage_length"], "excludes": EXCLUDED_OF_LIBRARY},
                }
            )
    return found


EXCLUDED_OF_LIBRARY = "Triton, tokenization and any queue: batches of token ids, one after the other; compilation."


@dataclasses.dataclass(frozen=True)
class Run:
    """The content of a run's folder; a missing file is None in `files`."""

    folder: Path
    files: dict[str, Any]

    @property
    def workloads(self) -> dict[str, str]:
        """Name -> description."""
        return self.files["sweep"]["settings"]["workloads"]

    @property
    def main(self) -> str:
        """The workload that the verdict is about: the one measured at most concurrencies. Packing may have changed their order."""
        loads = {name: len({row["load"] for row in self.select(name)}) for name in self.workloads}
        return max(loads, key=lambda name: loads[name])

    @functools.cached_property
    def rows(self) -> list[Row]:
        """All points of the sweep with their rounds, ordered by workload, mode, model and load."""

        def point(each: dict[str, Any]) -> tuple[Any, ...]:
            return list(self.workloads).index(each["workload"]), each["mode"], each["model"], each["load"]

        points = sorted(self.files["sweep"]["points"], key=lambda each: (*point(each), each["round"]))
        return [Row(tuple(rounds)) for _, rounds in itertools.groupby(points, point)]

    def select(self, workload: str, mode: str = "concurrency") -> list[Row]:
        """Rows of one workload, ordered by model and load."""
        return [row for row in self.rows if row["workload"] == workload and row["mode"] == mode]

    def closed(self, workload: str, reader: str) -> list[Row]:
        """Closed-loop rows by concurrency: of the unary model, or of the streaming one if only that was measured."""
        rows = self.select(workload)
        streams = all(row.streams for row in rows)
        return [row for row in rows if row["reader"] == reader and row.streams == streams]

    def pairs(self, workload: str) -> list[Pair]:
        """Both readers at each concurrency that both were measured at."""
        fido = {row["load"]: row for row in self.closed(workload, "fido")}
        found = (pair_from_rows(row, fido[row["load"]]) for row in self.closed(workload, "fid") if row["load"] in fido)
        return [pair for pair in found if pair]

    def alike(self, workloads: Sequence[str]) -> tuple[list[Row], str]:
        """Rows to compare workloads, and their load in words: the highest common concurrency, else the best of each."""
        measured = [rows for workload in workloads for reader in NAMES if (rows := self.closed(workload, reader))]
        common = set.intersection(*({row["load"] for row in rows} for rows in measured)) if measured else set()
        if common:
            load = max(common)
            return [row for rows in measured for row in rows if row["load"] == load], f"at concurrency {load:g}"
        return [row for rows in measured if (row := best(rows))], "at the best concurrency of each"

    def source(self, name: str) -> str:
        """The file of the folder that holds NAME.json's content, for a link."""
        return f"{name}.json" if (self.folder / f"{name}.json").exists() else PACKED

    def peers(self) -> list[dict[str, Any]]:
        """The rows of peers.json and of every peers_*.json beside it, and PyTorch's of library_pytorch.json in half precision."""
        files = [content for name, content in self.files.items() if name.startswith("peers") and content]
        return [peer for content in files for peer in content["peers"]] + library_peers(self.files.get("library_pytorch"), fp8=False)

    def in_fp8(self) -> Run | None:
        """The same readers in FP8, on the same machine, or None if they were not measured."""
        if not self.files.get("sweep_fp8"):
            return None
        return Run(self.folder, self.files | {"sweep": self.files["sweep_fp8"], "stages": self.files.get("stages_fp8")})

    def headline(self, workload: str) -> Pair | None:
        """The pair at FiD's best concurrency: among saturated loads the comparison least favourable to FiDO."""
        pairs = self.pairs(workload)
        fid = best([pair.fid for pair in pairs])
        return next((pair for pair in pairs if pair.fid is fid), None)


def _check_points(points: Sequence[dict[str, Any]], workloads: Mapping[str, str], where: str) -> None:
    """Checks beyond shapes: consistent names, no duplicate point, and one meaning for each workload."""
    if not workloads:
        raise ReportError(f"{where}: settings.workloads: wanted one at least, got none")
    seen: set[tuple[Any, ...]] = set()
    meanings: dict[str, list[Any]] = {}
    for number, point in enumerate(points):
        at, workload = f"{where}: points[{number}]", point["workload"]
        if workload not in workloads:
            raise ReportError(f"{at}.workload: wanted one of settings.workloads ({', '.join(workloads)}), got {json.dumps(workload)}")
        if point["model"].removesuffix("_stream") != point["reader"]:
            raise ReportError(f"{at}.model: wanted a model of {point['reader']}, got {json.dumps(point['model'])}")
        identity = tuple(point[key] for key in ("model", "workload", "mode", "load", "round"))
        if identity in seen:
            raise ReportError(f"{at}: wanted each point once, got a second one of {', '.join(map(str, identity))}")
        seen.add(identity)
        meaning = [point[key] for key in WORKLOAD_KEYS]
        if meanings.setdefault(workload, meaning) != meaning:
            raise ReportError(f"{at}: wanted {', '.join(WORKLOAD_KEYS)} of {workload} as before, {meanings[workload]}, got {meaning}")


def _json_of(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReportError(f"{path}: wanted JSON: {error}") from error


def pack_run(folder: Path) -> Path:
    """Put every measurement of a run into one file, run.json, as the committed runs keep them; the single files are removed.

    Raises:
        ReportError: naming a file that is not JSON; nothing is removed then.
    """
    paths = [path for path in sorted(folder.glob("*.json")) if path.name not in (PACKED, "summary.json")]
    packed = (_json_of(folder / PACKED) if (folder / PACKED).exists() else {}) | {path.stem: _json_of(path) for path in paths}
    (folder / PACKED).write_text(json.dumps(packed, separators=(",", ":")) + "\n", encoding="utf-8")
    for path in paths:
        path.unlink()
    return folder / PACKED


def read_run(folder: Path) -> Run:
    """Read and check every file of a run.

    Raises:
        ReportError: a file is missing or malformed; the message names the file and the key.
    """
    files: dict[str, Any] = {}
    packed = _json_of(folder / PACKED) if (folder / PACKED).exists() else {}
    more = {name for name in (*packed, *(path.stem for path in folder.glob("peers_*.json"))) if name.startswith("peers_")}
    for name, shape in (SHAPES | dict.fromkeys(sorted(more), SHAPES["peers"])).items():
        path = folder / f"{name}.json"
        if path.exists():  # a fresh measurement goes before a packed one
            content = _json_of(path)
        elif name in packed:
            content = packed[name]
        elif name in REQUIRED:
            raise ReportError(f"{path}: wanted, but it is missing")
        else:
            files[name] = None
            continue
        files[name] = checked(content, shape, str(path), ": ")
    _check_points(files["sweep"]["points"], files["sweep"]["settings"]["workloads"], str(folder / "sweep.json"))
    run = Run(folder, files)
    for number, peer in enumerate(run.peers()):
        if not (peer["questions_per_s"] or peer["error"]):
            raise ReportError(f"{folder / 'peers.json'}: peers[{number}]: wanted questions_per_s or error, got neither")
    return run
