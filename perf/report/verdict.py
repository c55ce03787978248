"""A run in one sentence, in a few claims, and in a few numbers; and how all numbers are to be read.

In: a `Run`. Out: the verdict and the claims as text, and the summary for JSON.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from . import plots
from .page import shown, significant, whole
from .run_folder import NAMES, WORKLOAD_KEYS, ReportError, Row, Run, Spread, best, times_peer

FEW_TURNS = 12  # answers a place in flight in a round; equal answers end together, so a third of fewer is only a few bursts
MAX_STEP_BATCH = 24  # verdict and summary report the step at the largest measured batch up to this

HOW_TO_READ = (
    "A number is the median of the rounds, with the least and the most of them in brackets where they differ. A round is one process of "
    "perf_analyzer; its raw output is linked where the folder still has it (`make perf RUN=folder` writes it). * marks a point of which "
    "a round was not steady from its start to its end, † one of which a round had errors; they are hollow in the plots; none is left out.",
    "A ratio is FiDO's questions/s over FiD's, both at the same workload and concurrency: the ratio of the medians, and in brackets the "
    "least and the most of a round. Where one ratio has to stand for a workload, it is the one at the concurrency where FiD answers most "
    "questions/s, steady or not.",
    "A bound is the time below which this machine cannot do a piece of work: its operations over the machine's rate for a large matrix "
    "product, or the bytes that it has to read and write at least once over its rate for a copy, whichever is longer. Both rates were "
    "measured on the machine, not taken from a data sheet.",
)
EXCLUDED = (
    "Start-up, loading of models and engines, and the first questions of each point.",
    "Retrieval of the passages, and any network: client and server share the machine, and its processor.",
    "Whether answers are right. Where a workload fixes the number of new tokens, the answer's length is forced.",
    "Bounds know nothing of launches, synchronisation, tokenization or Triton, and count every byte once.",
)


def readers_of(stages: Any) -> dict[str, Any]:
    """The readers in stages.json, FiD first."""
    return {reader: stages["readers"][reader] for reader in NAMES if stages and stages["readers"][reader]}


def step_batch(stages: Any) -> str | None:
    """The largest batch up to MAX_STEP_BATCH at which the steps of all readers were measured."""
    measured = [set(stage["step_ms"] or {}) for stage in readers_of(stages).values()]
    common = [batch for batch in set.intersection(*measured) if int(batch) <= MAX_STEP_BATCH] if measured else []
    return max(common, key=int, default=None)


def machine_name(run: Run) -> str:
    """The GPU, or the processor, of the run."""
    machine = run.files["machine"]
    return machine["gpu"] or f"{machine['processor']}, {whole(machine['cores'])} cores"


def best_of(run: Run, reader: str, workload: str | None = None) -> Row | None:
    """The reader's row at its best concurrency, of the main workload by default."""
    return best(run.closed(workload or run.main, reader))


def fastest_peer(run: Run, reader: str) -> Any:
    """The peer of this reader with the highest questions/s, or None."""
    peers = [peer for peer in run.peers() if peer["reader"] == reader and peer["questions_per_s"]]
    return max(peers, key=lambda peer: peer["questions_per_s"]["median"], default=None)


def verdict(run: Run) -> str:
    """The answer in one sentence, for the top of the page."""
    where = f"On {machine_name(run)} in {run.files['machine']['precision']}"
    head = run.headline(run.main)
    if not head:
        return f"{where}, FiD and FiDO were not measured beside each other in the workload {run.main}."
    return (
        f"{where}, FiDO answers {shown(head.ratio, head.mark)} times as many questions/s as FiD at concurrency "
        f"{whole(head.fid['load'])}, where FiD answers most: {_median(head.fido)} against {_median(head.fid)} ({run.workloads[run.main]})."
    )


def claims(run: Run) -> list[str]:
    """What else the run shows, each a sentence or two that stands alone."""
    return [*_claim_lengths(run), *_claim_bests(run), *_claim_peers(run), *_claim_bounds(run), *_claim_marks(run)]


def _median(row: Row) -> str:
    return significant(row.questions_per_s["median"]) + row.mark


def _claim_bests(run: Run) -> Iterable[str]:
    if rates := [f"{NAMES[row['reader']]} {_median(row)} at {whole(row['load'])}" for row in bests_of(run, run.main)]:
        yield f"Questions/s, each at its own best concurrency: {', '.join(rates)}."


def _claim_lengths(run: Run) -> Iterable[str]:
    head = run.headline(run.main)
    if not head:
        return
    # other lengths of the answer, the same passages: else the ratio would change for another reason
    heads = {name: run.headline(name) for name in run.workloads if "padding" not in name}
    alike = {name: pair for name, pair in heads.items() if pair and all(pair.fid[key] == head.fid[key] for key in WORKLOAD_KEYS[1:])}
    lengths = sorted((pair.fid["new_tokens"], name) for name, pair in alike.items() if pair.fid["new_tokens"])
    if len(lengths) > 1:
        ratios = [
            f"{whole(tokens)} tokens {shown((pair := alike[name]).ratio, pair.mark)} at concurrency {whole(pair.fid['load'])}"
            for tokens, name in lengths
        ]
        yield f"FiDO over FiD by length of the answer: {', '.join(ratios)}."


def bests_of(run: Run, workload: str) -> list[Row]:
    """Each reader's best concurrency."""
    return [row for reader in NAMES if (row := best_of(run, reader, workload))]


def is_compiled(peer: Mapping[str, Any]) -> bool:
    """Whether a compiler made the peer's kernels for its shapes (`torch.compile`), which its name says."""
    return "compiled" in peer["name"]


def peer_name(peer: Mapping[str, Any]) -> str:
    """A peer's name, its batch, and whether it was compiled."""
    batch = f", batch {whole(peer['batch'])}" if peer["batch"] else ""
    return f"{peer['name']}{batch}{'' if is_compiled(peer) else ' (not compiled)'}"


def _claim_peers(run: Run) -> Iterable[str]:
    for row in bests_of(run, run.main):
        name = NAMES[row["reader"]]
        peer = fastest_peer(run, row["reader"])
        if not peer:
            yield f"No peer was measured with {name}."
        elif times := times_peer(row, peer):
            measured = [each for each in run.peers() if each["reader"] == row["reader"] and each["questions_per_s"]]
            missing = "" if any(map(is_compiled, measured)) else " No compiled peer was measured in this run."
            yield (
                f"{name} through Triton answers {significant(times)} times as many questions/s as the strongest peer measured, "
                f"{peer_name(peer)}: {_median(row)} against {significant(peer['questions_per_s']['median'])}.{missing}"
            )


def _claim_bounds(run: Run) -> Iterable[str]:
    stages = run.files["stages"]
    batch = step_batch(stages)
    steps, encoders = [], []
    for reader, stage in readers_of(stages).items():
        if batch and (bound := (stage["step_bound_ms"] or {}).get(batch)):
            steps.append(f"{significant(stage['step_ms'][batch]['median'] / bound)} times its bound in {NAMES[reader]}")
        if stage["encoder_ms"] and stage["encoder_bound_ms"]:
            encoders.append(f"{significant(stage['encoder_ms']['median'] / stage['encoder_bound_ms'])} in {NAMES[reader]}")
    if steps:
        yield f"A decoder step of batch {batch} takes {' and '.join(steps)}."
    if encoders:
        yield f"The encoder, given a full call, takes, in times of its bound, {' and '.join(encoders)}."


def _claim_marks(run: Run) -> Iterable[str]:
    if marked := sum(bool(row.mark) for row in run.rows):
        yield f"Of {len(run.rows)} points, {marked} were not steady or had errors; they are marked, and a table below says why."
    if failures := run.files["sweep"]["settings"].get("failures"):
        yield f"Points that failed and are missing: {len(failures)}."


def ratios_by_length(run: Run) -> dict[str, list[tuple[float, Spread, str]]]:
    """Passages in words -> (new tokens, FiDO over FiD where FiD answers most, mark), where two lengths at least were measured."""
    groups: dict[str, list[tuple[float, Spread, str]]] = {}
    for workload in run.workloads:
        head = run.headline(workload)
        if head and head.fid["new_tokens"] and "padding" not in workload:
            group = f"{whole(head.fid['passages'])} passages x {whole(head.fid['passage_tokens'])} tokens"
            groups.setdefault(group, []).append((head.fid["new_tokens"], head.ratio, head.mark))
    found = {group: sorted(points, key=lambda point: point[0]) for group, points in groups.items()}
    return {group: points for group, points in found.items() if len({point[0] for point in points}) > 1}


def measured_parts(stage: Mapping[str, Any]) -> dict[str, Spread]:
    """The parts of a question that were measured. The others were got by subtraction: their share is noise."""
    return {part: value for part, value in stage["parts_ms"].items() if part not in ("rest_of_chain", "triton")}


def readme_plot(run: Run) -> str:
    """The plot of README.md: FiDO over FiD by length of the answer, of one run.

    Raises:
        ReportError: the run has not two lengths of the answer over the same passages.
    """
    (group, points), *_ = ratios_by_length(run).items() or [("", [])]
    if not points:
        raise ReportError(f"{run.folder}: wanted two lengths of the answer for the plot of README.md, got fewer")
    machine = run.files["machine"]
    about = f"{machine_name(run)}, {machine['precision']}, {group}, commit {machine['commit']}"
    return plots.readme_ratio("FiDO over FiD, questions/s through Triton", about, points)


def why_marked(row: Row) -> str:
    """Why a point has its mark, in words: what its own numbers explain, and no more."""
    reasons = []
    if errors := sum(each["errors"] for each in row.rounds):
        reasons.append(f"{whole(errors)} requests failed")
    if all(each["stable"] for each in row.rounds):
        return reasons[0]
    answers = min(each["requests"] for each in row.rounds)
    if row["mode"] == "request_rate":
        reasons.append(
            f"questions come at random times: a third of a round is {answers // 3} of them, and their number alone varies by "
            f"{100 / math.sqrt(max(1, answers // 3)):.0f} %"
        )
    elif answers / row["load"] < FEW_TURNS:
        reasons.append(f"short: {significant(answers / row['load'])} answers a place in flight, which come in bursts")
    else:
        rates = row.questions_per_s
        reasons.append(f"not known; the rounds differ by {100 * (rates['max'] / rates['min'] - 1):.0f} %" if rates["min"] else "not known")
    return "; ".join(reasons)


def marked_points(run: Run) -> list[tuple[Row, str, str, str, str]]:
    """Each point with a mark: its row, and in words its workload, load, questions/s and why it has the mark."""
    unit = {"concurrency": "at once", "request_rate": "a second"}
    return [
        (row, row["workload"], f"{whole(row['load'])} {unit[row['mode']]}", shown(row.questions_per_s, row.mark), why_marked(row))
        for row in run.rows
        if row.mark
    ]


def steadiness(run: Run) -> str:
    """How often points were not steady, by how many answers each place in flight gave: the evidence for `why_marked`."""
    closed = [row for row in run.rows if row["mode"] == "concurrency"]
    groups: dict[bool, list[Row]] = {True: [], False: []}
    for row in closed:
        groups[min(each["requests"] for each in row.rounds) / row["load"] < FEW_TURNS].append(row)
    counts = [f"{sum('*' in row.mark for row in groups[few])} of {len(groups[few])}" for few in (True, False)]
    return (
        f"A point is not steady if a third of its answers came at a rate that differs from the whole by more than 15 %. That was so for "
        f"{counts[0]} points with fewer than {FEW_TURNS} answers a place in flight, and for {counts[1]} with more."
    )


def summary(run: Run) -> dict[str, Any]:
    """The few numbers that others quote; None where the run lacks one."""
    machine, stages = run.files["machine"], run.files["stages"]
    readers, batch = readers_of(stages), step_batch(stages)
    encoder: dict[str, Any] = next(iter(readers.values()), {})  # both readers' encoders are the same
    steps = {reader: stage["step_ms"][batch] for reader, stage in readers.items() if batch}
    rates = {row["reader"]: row.questions_per_s for row in bests_of(run, run.main)}
    alone = next((row for row in run.closed(run.main, "fido") if row["load"] == 1), None)
    peer = fastest_peer(run, "fid")
    head = run.headline(run.main)
    return {
        "machine": machine,
        "commit": machine["commit"],
        "encoder_ms": encoder.get("encoder_ms"),
        "encoder_tflops": encoder.get("encoder_tflops"),
        "step_batch": int(batch) if batch else None,
        "fid_step_ms": steps.get("fid"),
        "fido_step_ms": steps.get("fido"),
        "encoder_alone_questions_per_s": encoder.get("encoder_questions_per_s"),
        "fid_questions_per_s": rates.get("fid"),
        "fido_questions_per_s": rates.get("fido"),
        "fido_over_fid": head.ratio if head else None,
        "peer_fid_questions_per_s": peer["questions_per_s"] if peer else None,
        "peer_fid_name": peer["name"] if peer else None,
        "fido_p50_ms": alone.over_rounds("latency_ms", "p50") if alone else None,
        "peak_tflops": machine["peak_tflops"],
        "copy_tb_per_s": machine["copy_tb_per_s"],
        **_one_question(encoder, "encoder_one_question_ms"),
        **_in_fp8(run),
        **((run.files["library_pytorch"] or {}).get("summary", {})),
        **_cpu_engines(run.files["cpu_engines"]),
        **_chain(run.files["chain"]),
    }


def _one_question(stage: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The encoder's time for the passages of one question."""
    return {key: stage["parts_ms"]["encoder"]} if "encoder" in stage.get("parts_ms", {}) else {}


def _in_fp8(run: Run) -> dict[str, Any]:
    """The numbers of the same readers in FP8; none where they were not measured."""
    fp8 = run.in_fp8()
    if not fp8:
        return {}
    readers, batch = readers_of(fp8.files["stages"]), step_batch(fp8.files["stages"])
    encoder: dict[str, Any] = next(iter(readers.values()), {})
    alone = next((row for row in fp8.closed(fp8.main, "fido") if row["load"] == 1), None)
    return {
        "encoder_fp8_ms": encoder.get("encoder_ms"),
        **_one_question(encoder, "encoder_one_question_fp8_ms"),
        **{f"{reader}_step_fp8_ms": stage["step_ms"][batch] for reader, stage in readers.items() if batch},
        **{f"{row['reader']}_fp8_questions_per_s": row.questions_per_s for row in bests_of(fp8, fp8.main)},
        "fido_p50_fp8_ms": alone.over_rounds("latency_ms", "p50") if alone else None,
    }


def _chain(measured: Mapping[str, Any] | None) -> dict[str, float]:
    """`triton_share_at_8`: what Triton costs the dearer of the demo's readers, of the questions/s at 8 in flight (perf/served/chain.py)."""
    readers = measured["demo_readers"] if measured else {}
    shares = [readers[name]["triton_throughput_cost_at_8"] for name in ("fid", "fido") if name in readers]
    return {"triton_share_at_8": max(shares)} if shares else {}


def _cpu_engines(measured: Mapping[str, Any] | None) -> dict[str, Any]:
    """The numbers of perf/peers/cpu_engines.py: `encoder_WAY_ms` and `fid_WAY_questions_per_s`; PyTorch's ways have its name first."""
    found: dict[str, Any] = {}
    for part, unit, by_way in (
        ("encoder", "ms", (measured or {}).get("encoder_ms", {})),
        ("fid", "questions_per_s", (measured or {}).get("fid_questions_per_s", {})),
    ):
        for way, numbers in by_way.items():
            found[f"{way}_{part}_{unit}" if way.startswith("pytorch") else f"{part}_{way}_{unit}"] = numbers
    return found
