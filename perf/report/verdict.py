"""A run in one paragraph, and in a few numbers.

In: a `Run`. Out: the verdict as text, and the summary for JSON.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .page import shown, significant, whole
from .run_folder import NAMES, WORKLOAD_KEYS, Row, Run, best, times_peer

MAX_STEP_BATCH = 24  # verdict and summary report the step at the largest measured batch up to this


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
    """The paragraph at the top of the report."""
    return " ".join([*_verdict_ratio(run), *_verdict_peers(run), *_verdict_bounds(run), *_verdict_marks(run)])


def _verdict_ratio(run: Run) -> Iterable[str]:
    where = f"On {machine_name(run)} in {run.files['machine']['precision']}"
    head = run.headline(run.main)
    if not head:
        yield f"{where}, FiD and FiDO were not measured beside each other in the workload {run.main}."
        return
    rounds = f"{head.rounds} round{'s' if head.rounds > 1 else ''}"
    yield (
        f"{where}, FiDO answers {shown(head.ratio, head.mark)} times as many questions/s as FiD, both at concurrency "
        f"{whole(head.fid['load'])}, where FiD does best ({rounds}; workload {run.main}: {run.workloads[run.main]})."
    )
    rates = [f"{NAMES[row['reader']]} {shown(row.questions_per_s, row.mark)} at {whole(row['load'])}" for row in bests_of(run, run.main)]
    yield f"Questions/s, each at its own best concurrency: {', '.join(rates)}."
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


def _verdict_peers(run: Run) -> Iterable[str]:
    for row in bests_of(run, run.main):
        peer = fastest_peer(run, row["reader"])
        if peer and (times := times_peer(row, peer)):
            yield (
                f"{NAMES[row['reader']]} through Triton answers {significant(times)} times as many as its fastest peer, "
                f"{peer['name']}, at {shown(peer['questions_per_s'])} questions/s."
            )


def _verdict_bounds(run: Run) -> Iterable[str]:
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


def _verdict_marks(run: Run) -> Iterable[str]:
    if marked := sum(bool(row.mark) for row in run.rows):
        yield f"Of {len(run.rows)} points, {marked} were not steady or had errors; they are marked."
    if failures := run.files["sweep"]["settings"].get("failures"):
        yield f"Points that failed and are missing: {len(failures)}."


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
    }
