"""`python -m offline`: files of questions -> Parquet files of answers, on all machines of a Ray cluster or on this one. See --help.

    python -m offline questions.parquet --out answers --repository model_repository --reader fido
    python -m offline data/*.jsonl --out s3://bucket/answers --url 127.0.0.1:8001 --reader fido --address auto

One actor a GPU, or a node where there are none. Run again after any end: what is done is not done again.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

# Ray sends nobody anything, and says only what is wrong: the lines of this command are its progress.
for name, value in {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_LOG_LEVEL": "ERROR"}.items():
    os.environ.setdefault(name, value)

try:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from .inputs import Shard, data_files, place_of, plan_file
    from .readers import ShardReader, Source
    from .results import Results, Settings
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing}: `make setup FOR=offline`, then .venv-offline/bin/python -m offline")

LEAST_ASKED = 100  # rows, before the share set aside is judged
NODE_RETRIES = 3  # of a shard whose process or node died; a question that ends the process must not be asked for ever
PROGRESS_EVERY_S = 1.0
FRUITLESS_PASSES = 3  # in which Ray lost all actors, one after the other


class OfflineError(Exception):
    """The run cannot go on; the message says what to do."""


def main(argv: Sequence[str] | None = None) -> int:
    """Plan, answer, report; returns the exit code."""
    arguments = _arguments(argv)
    settings = Settings(arguments.reader, arguments.max_passages, arguments.max_new_tokens, arguments.shard_rows)
    results = Results(arguments.out if "://" in arguments.out else os.path.abspath(arguments.out))
    try:
        if arguments.engines is None and arguments.url is None and not os.path.isdir(arguments.repository):
            raise OfflineError(f"--repository {arguments.repository}: there is no such folder (`make export` makes one)")
        names, planned = data_files(arguments.files), results.known_files(settings)
        _require_unchanged(names, planned)
        _connect(arguments.address)
        return _run(arguments, settings, results, _planned(names, planned, settings, results))
    except KeyboardInterrupt:
        print("offline: stopped; run it again to go on", file=sys.stderr)
        return 130
    except (OfflineError, ValueError, OSError, ray.exceptions.RayError) as error:
        print(f"error: {_reason(error)}", file=sys.stderr)
        return 1
    finally:
        ray.shutdown()


def _connect(address: str | None) -> None:
    """Join the cluster at the address, or start one of this machine."""
    alone: dict[str, Any] = {} if address else {"include_dashboard": False}
    ray.init(address=address or "local", logging_level=logging.ERROR, **alone)  # without an address Ray joins any cluster that it finds
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.max_errored_blocks = -1  # a shard that failed is not done: it is asked for again
    context.print_on_execution_start = False
    context.max_consecutive_actor_init_deaths = NODE_RETRIES


def _require_unchanged(names: list[str], planned: list[dict[str, Any]]) -> None:
    """Refuse a file that has changed since it was planned: its shards would hold other rows."""
    sizes = {entry["file"]: entry["bytes"] for entry in planned}
    for name in names:
        system, place = place_of(name)
        now = system.get_file_info(place).size
        if sizes.get(name, now) != now:
            raise OfflineError(f"{name}: {sizes[name]} bytes when it was planned, {now} now; pass another --out")


def _planned(names: list[str], planned: list[dict[str, Any]], settings: Settings, results: Results) -> list[dict[str, Any]]:
    """The plans of all files, old and new, which the manifest holds then."""
    known = {entry["file"] for entry in planned}
    new = [name for name in names if name not in known]
    if new:
        plan = ray.remote(plan_file)
        pending = [plan.remote(name, len(planned) + index, settings.shard_rows, results.out) for index, name in enumerate(new)]
        planned = planned + ray.get(pending)
        results.write_manifest(settings, planned)
    return planned


def _run(arguments: argparse.Namespace, settings: Settings, results: Results, files: list[dict[str, Any]]) -> int:
    """Answer every shard that is not done, in passes, until all are done or a pass gets nowhere."""
    started_s = time.monotonic()
    total = sum(entry["rows"] for entry in files)
    todo = results.undone(files, again=arguments.again)
    nodes, gpus = _places()
    actors = arguments.actors or gpus or len(nodes)
    progress = _Progress(total, sum(shard.rows for shard in todo))
    print(
        f"offline: {total} questions in {len(files)} files and {sum(len(entry['shards']) for entry in files)} shards, "
        f"{progress.done_before} done before; {actors} actors on {len(nodes)} nodes",
        flush=True,
    )
    source = Source(
        arguments.url,
        os.path.abspath(arguments.repository),
        arguments.engines and os.path.abspath(arguments.engines),
        arguments.reader,
        arguments.concurrency,
        arguments.timeout_s,
        arguments.wait_s,
    )
    fruitless = 0
    while todo:
        problems: list[str] = []
        before = len(todo)
        try:
            for summary in _pass(todo, ShardReader, (source, settings, results.out), actors, nodes if not gpus else []):
                if summary["problem"]:
                    problems.append(f"shard {summary['shard']} on {summary['actor']}: {summary['problem']}")
                    print(f"offline: {problems[-1]}", file=sys.stderr, flush=True)
                    if len(problems) >= 2 * actors and not progress.asked:
                        break
                    continue
                progress.add(summary)
                if progress.set_aside > arguments.max_set_aside * max(progress.asked, LEAST_ASKED) and results.undone(files, again=False):
                    raise OfflineError(
                        f"{progress.set_aside} of {progress.asked} questions were set aside, the first: {progress.first_error}; "
                        "mend the data or the reader, or allow more with --max-set-aside"
                    )
        except ray.exceptions.RayError as error:  # a loaded machine was seen to lose an actor before it ran
            problems.append(_reason(error))
            print(f"offline: Ray ended a pass: {problems[-1]}", file=sys.stderr, flush=True)
        todo = results.undone(files, again=False)
        fruitless = fruitless + 1 if len(todo) >= before else 0
        if fruitless and (fruitless == FRUITLESS_PASSES or any(problem.startswith("shard ") for problem in problems)):
            raise OfflineError(f"no shard could be answered: {problems[0] if problems else 'their processes died, see the lines above'}")
    set_aside = results.set_aside()
    print(
        f"offline: {total} questions, {total - set_aside} answered, {set_aside} set aside, "
        f"{progress.asked} of them asked now in {time.monotonic() - started_s:.1f} s; {arguments.out}/answers",
        flush=True,
    )
    return 0


def _pass(todo: list[Shard], actor: type, arguments: tuple[Any, ...], actors: int, nodes: list[str]) -> Iterator[dict[str, Any]]:
    """The summaries of the shards, as they are done, in any order.

    Args:
        todo: the shards.
        actor: class of the actors.
        arguments: of its constructor.
        actors: how many.
        nodes: ids of the nodes that the actors are dealt to; empty: one GPU each, wherever it is.
    """
    turns = itertools.cycle(nodes)

    def placed() -> dict[str, Any]:
        # Soft: the actor of a node that is lost goes to another one. A resource of our own may not spread actors (ray#47631).
        return {"scheduling_strategy": NodeAffinitySchedulingStrategy(next(turns), soft=True)}

    # Ray warns that two arguments lose their form in 2.64; requirements-offline.txt pins 2.60.
    warnings.filterwarnings("ignore", message=".*ray_remote_args", category=Warning)
    data = ray.data.from_items([dataclasses.asdict(shard) for shard in todo], override_num_blocks=len(todo)).map(
        actor,
        fn_constructor_args=arguments,
        compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=2),
        max_task_retries=NODE_RETRIES,
        **({"num_cpus": 1, "ray_remote_args_fn": placed} if nodes else {"num_gpus": 1}),
    )
    for batch in data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from batch.to_pylist()


def _places() -> tuple[list[str], int]:
    """Ids of the nodes that live, and how many GPUs they have."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    return [node["NodeID"] for node in alive], int(sum(node["Resources"].get("GPU", 0) for node in alive))


class _Progress:
    """Counts what is asked in this run, and prints a line of it now and then."""

    def __init__(self, total: int, todo: int) -> None:
        self.total, self.done_before, self.asked, self.set_aside, self.first_error = total, total - todo, 0, 0, ""
        self._started_s = self._printed_s = time.monotonic()

    def add(self, summary: dict[str, Any]) -> None:
        """Count a shard."""
        self.asked += summary["asked"]
        self.set_aside += summary["set_aside"]
        self.first_error = self.first_error or summary["error"]
        now_s, done = time.monotonic(), self.done_before + self.asked
        if now_s - self._printed_s >= PROGRESS_EVERY_S or done >= self.total:
            self._printed_s = now_s
            rate = self.asked / (now_s - self._started_s)
            left_s = max(0, self.total - done) / rate if rate else 0.0
            print(f"offline: {done} of {self.total}, {self.set_aside} set aside, {rate:.1f}/s, {left_s:.0f} s left", flush=True)


def _reason(error: BaseException) -> str:
    """What a task or an actor raised, without Ray's traceback."""
    return str(getattr(error, "cause", None) or error).strip().split("\n")[-1]


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; ends the process where it is wrong."""
    parser = argparse.ArgumentParser(prog="python -m offline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="Parquet, JSONL or FiD's JSON, gzipped or not; a folder stands for its files; or URIs")
    parser.add_argument("--out", required=True, help="folder or URI of the results, the same for all nodes")
    parser.add_argument("--reader", default="fido", help="the reader's name (default: %(default)s)")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--repository", default="model_repository", help="every actor starts a server of it (default: %(default)s)")
    where.add_argument("--url", help="servers that run already, at the same address on every node, such as 127.0.0.1:8001")
    where.add_argument("--engines", help="folder of engines that run in the actors' processes, without a server")
    parser.add_argument("--address", help="of the Ray cluster, or auto; default: this machine alone")
    parser.add_argument("--actors", type=_whole, help="default: one a GPU, or one a node where there are no GPUs")
    parser.add_argument("--concurrency", type=_whole, default=32, help="questions in flight of one actor (default: %(default)s)")
    parser.add_argument("--shard-rows", type=_whole, default=2000, help="what a kill can lose of each actor (default: %(default)s)")
    parser.add_argument("--max-passages", type=_whole, help="each question keeps its best so many (default: all)")
    parser.add_argument("--max-new-tokens", type=_whole, help="of an answer (default: the reader's)")
    parser.add_argument("--timeout-s", type=float, default=120.0, help="of one question (default: %(default)g)")
    parser.add_argument("--wait-s", type=float, default=300.0, help="how long a server may be away or start (default: %(default)g)")
    parser.add_argument("--max-set-aside", type=float, default=0.1, help="stop beyond this share of the questions (default: %(default)g)")
    parser.add_argument("--again", action="store_true", help="ask also what earlier runs set aside")
    return parser.parse_args(argv)


def _whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"wanted a whole number from 1, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
