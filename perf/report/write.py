"""`python -m perf.report FOLDER ...`: the measurements of a run as an HTML page, and as a summary in Markdown and in JSON.

In: a run's folder (`perf.report.run_folder`). Out, into the same folder: report.html (one page with its plots, no external resources),
summary.md (the same numbers), summary.json; for the run that README.md shows, its plot in docs/. The same input gives the same bytes.
Nothing is measured here.
Without a folder it reports every folder under perf/results that has a sweep.json. A malformed file gives one line and exit code 1.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import plots
from .page import Cell, Figure, Link, Section, Table, html_from_sections, markdown_from_sections, shown, significant, whole
from .run_folder import NAMES, PACKED, ReportError, Row, Run, Spread, library_peers, pack_run, read_run, times_peer
from .verdict import (
    EXCLUDED,
    HOW_TO_READ,
    best_of,
    claims,
    is_compiled,
    machine_name,
    marked_points,
    measured_parts,
    ratios_by_length,
    readers_of,
    readme_plot,
    steadiness,
    summary,
    verdict,
)

RESULTS = Path("perf/results")
README_RUN, README_PLOT = "h100", Path("docs/fido_over_fid.svg")
MISSING = "Not measured in this run."
MODELS = {f"{reader}{suffix}": name + shown for reader, name in NAMES.items() for suffix, shown in (("", ""), ("_stream", ", streaming"))}


def _raw(run: Run, row: Row) -> Cell:
    """A link to the raw file of each round, if the file exists."""
    return [Link(f"r{point['round']:g}", point["raw"]) for point in row.rounds if (run.folder / point["raw"]).is_file()]


def _machine(run: Run) -> Section:
    machine = run.files["machine"]
    rows: list[tuple[str, str]] = [
        ("GPU", machine["gpu"] or "none"),
        ("processor", f"{machine['processor']}, {whole(machine['cores'])} cores"),
        ("memory, GiB", whole(machine["memory_gib"])),
        ("matrix product, TFLOP/s", f"{shown(machine['peak_tflops'])} in {machine['precision']}, measured"),
        ("copy, TB/s", f"{shown(machine['copy_tb_per_s'])}, bytes read and written, measured"),
        ("system", f"{machine['system']}, Python {machine['python']}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in machine["versions"].items())),
        ("commit", machine["commit"]),
    ]
    settings = {key: value for key, value in run.files["sweep"]["settings"].items() if key != "workloads"}
    rows += [(f"sweep: {key}", value if isinstance(value, str) else json.dumps(value)) for key, value in settings.items()]
    workloads = Table(("workload", "what it asks"), list(run.workloads.items()), run.source("sweep"))
    return Section("Machine, settings, failures and workloads", [Table(("", ""), rows, run.source("machine")), workloads])


def _sweep_table(run: Run, rows: Sequence[Row], load: str) -> Table:
    """Throughput and latency, one line for each load of each model."""
    head = ("model", load, "questions/s", "p50, ms", "p99, ms", "requests", "errors", "raw")
    lines: list[list[Cell]] = [
        [
            *(MODELS[row["model"]], whole(row["load"]) + row.mark, shown(row.questions_per_s, row.mark)),
            *(shown(row.over_rounds("latency_ms", percent), row.mark) for percent in ("p50", "p99")),
            *(whole(sum(each[key] for each in row.rounds)) for key in ("requests", "errors")),
            _raw(run, row),
        ]
        for row in rows
    ]
    return Table(head, lines)


def _sweep(run: Run, title: str, mode: str, load: str, caption: str) -> Section:
    blocks: list[str | Table | Figure] = []
    for workload, meaning in sorted(run.workloads.items(), key=lambda each: each[0] != run.main):
        if rows := run.select(workload, mode):
            blocks.append(f"Workload {workload}: {meaning}.")
            if len({row["load"] for row in rows}) > 1:
                draw = plots.throughput_against_latency if mode == "concurrency" else plots.latency_against_rate
                blocks.append(Figure(draw(workload, rows), f"{workload}: {caption}"))
            blocks.append(_sweep_table(run, rows, load))
    return Section(title, blocks)


def _streaming(run: Run) -> Section:
    head = (
        "workload",
        "model",
        "load",
        "first token p50, ms",
        "first token p99, ms",
        "between tokens p50, ms",
        "between tokens p99, ms",
        "tokens/s",
        "raw",
    )
    unit = {"concurrency": "at once", "request_rate": "a second"}
    lines: list[list[Cell]] = [
        [
            *(row["workload"], MODELS[row["model"]], f"{whole(row['load'])} {unit[row['mode']]}{row.mark}"),
            *(shown(row.over_rounds(key, percent), row.mark) for key in ("ttft_ms", "inter_token_ms") for percent in ("p50", "p99")),
            *(shown(row.over_rounds("tokens_per_s"), row.mark), _raw(run, row)),
        ]
        for row in run.rows
        if row["ttft_ms"] or row["inter_token_ms"]
    ]
    return Section("Streaming: time to the first token, and between tokens", [Table(head, lines)] if lines else [])


def _ratios(run: Run) -> Section:
    lines: list[list[Cell]] = []
    for workload in sorted(run.workloads, key=lambda name: name != run.main):
        head = run.headline(workload)
        for pair in run.pairs(workload):
            fid = pair.fid
            chosen = ", FiD's best" if head and fid is head.fid else ""
            rates = (shown(row.questions_per_s, row.mark) for row in (fid, pair.fido))
            texts = (
                workload,
                whole(fid["new_tokens"]),
                f"{whole(fid['load'])}{chosen}",
                *rates,
                shown(pair.ratio, pair.mark),
                str(pair.rounds),
            )
            lines.append([*texts, _raw(run, fid), _raw(run, pair.fido)])
    if not lines:
        return Section("FiDO over FiD", [])
    table = Table(
        ("workload", "new tokens", "concurrency", "FiD, questions/s", "FiDO, questions/s", "FiDO / FiD", "rounds", "FiD, raw", "FiDO, raw"),
        lines,
    )
    drawn = ratios_by_length(run)
    caption = "Ratio of questions/s at the concurrency where FiD answers most; bars are the least and the most of the rounds."
    return Section("FiDO over FiD", [*([Figure(plots.ratio_against_new_tokens(drawn), caption)] if drawn else []), table])


def _stages(run: Run, source: str = "stages") -> Section:
    title, readers = "Where a question's time goes", readers_of(run.files["stages"])
    if not readers:
        return Section(title, [])
    lines: list[tuple[str, ...]] = []
    for reader, stage in readers.items():
        name = NAMES[reader]
        lines += [(name, part.replace("_", " "), shown(value), "", "") for part, value in measured_parts(stage).items()]
        for batch, step in sorted((stage["step_ms"] or {}).items(), key=lambda each: int(each[0])):
            lines.append((name, f"a step, batch {batch}", shown(step), *_of_bound(step, (stage["step_bound_ms"] or {}).get(batch))))
        if stage["encoder_ms"]:
            rate = f" ({shown(stage['encoder_tflops'])} TFLOP/s)" if stage["encoder_tflops"] else ""
            lines.append(
                (
                    name,
                    f"encoder, a call of {whole(stage['questions']) or '?'} questions{rate}",
                    shown(stage["encoder_ms"]),
                    *_of_bound(stage["encoder_ms"], stage["encoder_bound_ms"]),
                )
            )
        lines += [
            (name, part.removesuffix("_ms").replace("_", " "), shown(stage[part]), "", "")
            for part in ("in_process_ms", "served_ms")
            if stage[part]
        ]
    first = next(iter(readers.values()))
    sizes = [f"{whole(first[key])} {key.replace('_', ' ')}" for key in ("passages", "passage_tokens", "new_tokens") if first[key]]
    figure = Figure(
        plots.stage_bars({reader: measured_parts(stage) for reader, stage in readers.items()}),
        "Medians of the parts of one question, each measured by itself. What the chain and Triton add is not drawn: it would be a "
        "difference of larger numbers that were not measured together. The table has the whole chain in process and served.",
    )
    about = f"One question at a time{': ' if sizes else ''}{', '.join(sizes)}{', preset ' + first['preset'] if first['preset'] else ''}."
    return Section(title, [about, figure, Table(("reader", "part", "ms", "bound, ms", "times bound"), lines, run.source(source))])


def _of_bound(measured: Spread | None, bound: float | None) -> tuple[str, str]:
    """The bound, and the measured time as a multiple of it."""
    return shown(bound), significant(measured["median"] / bound) if measured and bound else ""


def _roofline(run: Run) -> Section:
    points = (run.files["roofline"] or {"points": []})["points"]
    if not points:
        return Section("Roofline", [])
    copy, peak = (run.files["machine"][key]["median"] for key in ("copy_tb_per_s", "peak_tflops"))
    lines = [
        (
            str(number),
            point["name"],
            *(shown(value) for value in _roofline_figures(point)),
            significant(point["seconds"] / point["bound_s"]),
        )
        for number, point in enumerate(points, 1)
    ]
    head = ("#", "part", "operations/byte", "TFLOP/s", "TB/s", "ms", "bound, ms", "times bound")
    caption = "Numbers are those of the table; the dotted line is what is left up to the roof."
    return Section("Roofline", [Figure(plots.roofline(points, copy, peak), caption), Table(head, lines, run.source("roofline"))])


def _roofline_figures(point: Mapping[str, Any]) -> tuple[float, ...]:
    flops, moved, seconds = (point[key] for key in ("flops", "bytes", "seconds"))
    return flops / moved, flops / seconds / 1e12, moved / seconds / 1e12, seconds * 1e3, point["bound_s"] * 1e3


def _ablation(run: Run) -> Section:
    title, ablation = "Ablation: from FiD to FiDO", run.files["ablation"]
    if not ablation or not ablation["rows"]:
        return Section(title, [])
    rows = ablation["rows"]
    steps, variants = [], []
    for row in rows:
        measured = row["step_ms"] or {}
        for batch in sorted({*measured, *row["bound_ms"]}, key=int):
            step, bound = measured.get(batch), row["bound_ms"].get(batch)
            steps.append((row["name"], batch, shown(step), *_of_bound(step, bound)))
        note = ", ".join(filter(None, ("" if row["measured"] else "not measured, arithmetic only", row["note"])))
        sizes = [whole(row["period"]), whole(row["num_kv_heads"]), row["decoder"], shown(row["cross_kv_mb_per_question"])]
        costs = [shown(row[key]) for key in ("decoder_ms_per_question", "total_ms_per_question")]
        variants.append((row["name"], *sizes, whole(row["largest_batch"]), *costs, note))
    head = (
        "variant",
        "K",
        "kv heads",
        "decoder",
        "cross k/v, MB/question",
        "largest batch",
        "decoder, ms/question",
        "all, ms/question",
        "note",
    )
    tables = [
        Table(head, variants, run.source("ablation")),
        Table(("variant", "batch", "step, ms", "bound, ms", "times bound"), steps, run.source("ablation")),
    ]
    caption = "Time of one decoder step of each variant; the tick is its bound on this machine. K: every K-th decoder layer cross-attends."
    about = f"Preset {ablation['preset']}, {ablation['workload']}."
    return Section(title, [about, Figure(plots.ablation_bars(rows), caption), *tables])


def _passages(run: Run) -> Section:
    groups: dict[tuple[Any, ...], list[str]] = {}
    for workload in run.workloads:
        rows = run.select(workload)
        if rows and rows[0]["passages"] and "padding" not in workload:
            groups.setdefault((rows[0]["passage_tokens"], rows[0]["new_tokens"]), []).append(workload)
    blocks: list[str | Table | Figure] = []
    for (passage_tokens, new_tokens), workloads in groups.items():
        rows, where = run.alike(workloads)
        if len({row["passages"] for row in rows}) > 1:
            name = f"{whole(passage_tokens)} tokens a passage, {whole(new_tokens) or 'as many as come'} new tokens"
            blocks += [Figure(plots.cost_against_passages(name, rows, where), f"{name}, {where}."), _workload_table(run, rows)]
    return Section("Cost of passages", blocks)


def _workload_table(run: Run, rows: Sequence[Row]) -> Table:
    """The sweep's table over several workloads."""
    table = _sweep_table(run, rows, "concurrency")
    return Table(("workload", *table.head), [[row["workload"], *line] for row, line in zip(rows, table.rows, strict=True)])


def _padding(run: Run) -> Section:
    padded = [workload for workload in run.workloads if "padding" in workload and run.select(workload)]
    if not padded:
        return Section("Cost of padding", [])
    workloads = list(dict.fromkeys([run.main, *padded]))
    rows, where = run.alike(workloads)
    figure = Figure(plots.throughput_bars(workloads, rows, where), f"Questions/s {where}; the first pair of bars is the main workload.")
    return Section("Cost of padding", [figure, _workload_table(run, rows)])


def _peer_table(run: Run, peers: Sequence[Mapping[str, Any]], source: str) -> Table:
    """Peers beside what is served, each at its best concurrency."""
    lines = []
    for peer in peers:
        times = times_peer(best_of(run, peer["reader"]), peer)
        rates = (shown(peer["questions_per_s"]), shown(peer["p50_ms"]), shown(times))
        compiled = "yes" if is_compiled(peer) else "no"
        lines.append((peer["name"], NAMES[peer["reader"]], compiled, whole(peer["batch"]), *rates, peer["error"] or ""))
    return Table(("peer", "reader", "compiled", "batch", "questions/s", "p50, ms", "ours / peer", "error"), lines, run.source(source))


def _peers(run: Run) -> Section:
    about = (
        f"Ours: through Triton at its best concurrency, workload {run.main}; where a peer was asked something else, no ratio is given. "
        "Medians; the rounds of a peer are not those of the sweep, and what a peer excludes is below."
    )
    table = _peer_table(run, run.peers(), "peers")
    return Section("Against other ways to run the same readers", [about, table] if table.rows else [])


def _fp8(run: Run) -> Section:
    fp8 = run.in_fp8()
    if not fp8:
        return Section("", [])
    peers = _peer_table(fp8, library_peers(run.files["library_pytorch"], fp8=True), "library_pytorch")
    tables = [_sweep_table(fp8, fp8.select(fp8.main), "concurrency"), peers]
    stages = _stages(fp8, "stages_fp8").blocks[2:]  # the table alone
    about = f"The same readers, encoder and FiD's cross-attention in FP8, workload {fp8.main}."
    return Section("In FP8", [about, *(table for table in tables if table.rows), *stages])


def _excluded(run: Run) -> Section:
    excluded = run.files["sweep"]["settings"].get("excluded")
    peers: dict[str, list[str]] = {}
    for peer in run.peers():
        if peer["excludes"]:
            peers.setdefault(peer["excludes"], []).append(f"{peer['name']}{', batch ' + whole(peer['batch']) if peer['batch'] else ''}")
    more = [f"From the sweep: {excluded}."] if excluded and isinstance(excluded, str) else []
    every = len(peers) == 1
    more += [f"From {'every peer' if every else '; '.join(names)}: {text.rstrip('.')}." for text, names in peers.items()]
    return Section("What these numbers exclude", [*EXCLUDED, *more])


def _not_steady(run: Run) -> Section:
    title, lines = "Points that were not steady, and why", [(MODELS[row["model"]], *why) for row, *why in marked_points(run)]
    table = Table(("model", "workload", "load", "questions/s", "why"), lines, run.source("sweep"))
    return Section(title, [steadiness(run), table] if lines else ["None: every point was steady, and none had errors."])


def sections_of(run: Run) -> list[Section]:
    """The page's sections in order, the answer's plot first and the machine last; an empty one says that it was not measured."""
    sections = [
        _ratios(run),
        Section("What else it shows", claims(run)),
        _peers(run),
        _sweep(
            run,
            "Throughput against latency",
            "concurrency",
            "concurrency",
            "the number beside a point is its concurrency; bars are the rounds' least and most.",
        ),
        _sweep(
            run,
            "Latency against offered rate",
            "request_rate",
            "offered, questions/s",
            "questions are sent at a rate, answered or not; bars are the rounds' least and most.",
        ),
        *(build(run) for build in (_streaming, _stages, _roofline, _ablation, _passages, _padding, _fp8, _not_steady, _excluded)),
        Section("How to read this", HOW_TO_READ),
        _machine(run),
    ]
    return [section if section.blocks else Section(section.title, [MISSING]) for section in sections if section.title]


def write_report(folder: Path) -> None:
    """Read a run's folder and write the three files into it.

    Raises:
        ReportError: a file is missing or malformed; nothing is written then.
    """
    run = read_run(folder)
    title, sections = f"FiD and FiDO through Triton on {machine_name(run)}", sections_of(run)
    texts = {
        "report.html": html_from_sections(title, verdict(run), sections),
        "summary.md": markdown_from_sections(title, verdict(run), sections),
        "summary.json": json.dumps(summary(run), indent=2) + "\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def main() -> int:
    """Write the report of every folder; return exit code 1 if a file is malformed."""
    parser = argparse.ArgumentParser(
        prog="python -m perf.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", type=Path, nargs="*", metavar="FOLDER")
    parser.add_argument("--pack", action="store_true", help="first put all measurements of a run into run.json, as committed runs are kept")
    arguments = parser.parse_args()
    folders: list[Path] = arguments.folders or sorted(
        {path.parent for name in (PACKED, "sweep.json") for path in RESULTS.glob(f"*/{name}")}
    )
    try:
        if not folders:
            raise ReportError(f"{RESULTS}: wanted a folder with a sweep.json or a run.json, found none")
        for folder in folders:
            if arguments.pack:
                pack_run(folder)
            write_report(folder)
            print(folder / "report.html")
            if folder == RESULTS / README_RUN:
                README_PLOT.write_text(readme_plot(read_run(folder)), encoding="utf-8")
                print(README_PLOT)
    except ReportError as error:
        print(f"perf.report: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
