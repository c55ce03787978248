"""What happens to a Deployment of the chart while clients ask it: restarts, drains, kills, scaling. Counts what became of each question."""

from __future__ import annotations

import collections
import dataclasses
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Collection
from typing import Any

import clients  # noqa: F401  (it makes fido_client importable in a checkout)
from fido_client.errors import ReaderError
from fido_client.reader_client import Answer, ReaderClient

from .build import BuildError
from .cluster import NODES, Cluster, is_ready

NAME, READER = "fido", "fido"
# A client's threads of each kind. gRPC shares one connection within a process, so there are several processes.
CLIENTS, UNARY, STREAMS = 2, 3, 2
RETRIES, TIMEOUT_S = 100, 60.0
BEFORE_S, AFTER_S, RECOVERY_S = 4.0, 6.0, 240.0
TOKENS = 16
CASES = [
    ("what is the capital of France?", ["France: Capital: name: Paris", "Belgium: Capital: Brussels"]),
    ("what is the capital of Belgium?", ["France: Capital: name: Paris", "Belgium: Capital: name: Brussels"]),
    ("w1 w2", ["w3 w4", "w5", "w6 w7 w8"]),
]


@dataclasses.dataclass
class Outcome:
    """What became of the questions of one scenario.

    Attributes:
        lost: Questions whose asker got an error.
        cut: Of `lost`, streams that ended after their first part.
        wrong: Questions whose answer is not the one of an undisturbed server.
        duplicated: Streams that sent a part twice, and questions that were answered twice.
        longest_s: The longest wait for an answer.
        recovery_s: From the fault until all servers that should be ready were.
        errors: How often each error came.
    """

    scenario: str = ""
    asked: int = 0
    answered: int = 0
    lost: int = 0
    cut: int = 0
    wrong: int = 0
    duplicated: int = 0
    longest_s: float = 0.0
    recovery_s: float = 0.0
    errors: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def add(self, other: Outcome) -> None:
        """Count the questions of another client too."""
        for name in ("asked", "answered", "lost", "cut", "wrong", "duplicated"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.longest_s = max(self.longest_s, other.longest_s)
        self.errors += other.errors


class Asker:
    """One client process's questions; safe to share between its threads."""

    def __init__(self, url: str, wanted: list[str]) -> None:
        self._url, self._wanted = url, wanted
        self._lock = threading.Lock()
        self.outcome = Outcome()

    def ask_until(self, stop: Any, streams: bool) -> None:
        """Ask one question after another. A thread of its own for each caller."""
        number = 0
        with ReaderClient(self._url, READER, TIMEOUT_S, retries=RETRIES) as reader:
            while not stop.is_set():
                case = number % len(CASES)
                self._ask(reader, case, streams)
                number += 1

    def _ask(self, reader: ReaderClient, case: int, streams: bool) -> None:
        question, passages = CASES[case]
        pieces: list[str] = []
        start_s = time.monotonic()
        error: ReaderError | None = None
        answer: Answer | None = None
        try:
            if streams:
                with reader.stream(question, passages, max_new_tokens=TOKENS) as stream:
                    pieces.extend(piece.text for piece in stream)
                    answer = stream.answer
            else:
                answer = reader.answer(question, passages, max_new_tokens=TOKENS)
        except ReaderError as failure:
            error = failure
        with self._lock:
            outcome = self.outcome
            outcome.asked += 1
            outcome.longest_s = max(outcome.longest_s, time.monotonic() - start_s)
            if error is not None or answer is None:
                outcome.lost += 1
                outcome.cut += bool(pieces)
                outcome.errors[f"{type(error).__name__}: {str(error)[:160]}"] += 1
                return
            outcome.answered += 1
            outcome.wrong += answer.text != self._wanted[case]
            outcome.duplicated += streams and "".join(pieces) != answer.text


def _client(url: str, wanted: list[str], stop: Any, outcomes: Any) -> None:
    """One client process: asks until `stop`, then says what became of its questions."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent stops us
    asker = Asker(url, wanted)
    threads = [threading.Thread(target=asker.ask_until, args=(stop, streams)) for streams in [False] * UNARY + [True] * STREAMS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    outcomes.put(asker.outcome)


class Load:
    """Clients that ask from __enter__ to __exit__; `outcome` is complete after that."""

    def __init__(self, url: str, wanted: list[str], scenario: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._stop, self._outcomes = context.Event(), context.Queue()
        arguments = (url, wanted, self._stop, self._outcomes)
        self._clients = [context.Process(target=_client, args=arguments, daemon=True) for _ in range(CLIENTS)]
        self.outcome = Outcome(scenario)

    def __enter__(self) -> Load:
        for client in self._clients:
            client.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for client in self._clients:
            try:
                self.outcome.add(self._outcomes.get(timeout=TIMEOUT_S + 30))
            except queue.Empty:
                raise BuildError("a client has not ended: its questions cannot be counted") from None
            finally:
                client.join(10)
                client.kill()


class Deployment:
    """The chart's Deployment on the cluster, and what is done to it."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.url = f"{self._address()}:8001"

    def _address(self) -> str:
        return str(next(each for each in self.cluster.items("services") if each["metadata"]["name"] == NAME)["spec"]["clusterIP"])

    def ready_pods(self) -> list[dict[str, Any]]:
        """Pods that are ready and not about to end, in the order of their names."""
        return [pod for pod in self.cluster.items("pods") if is_ready(pod)]

    def wait_for(self, count: int, other_than: Collection[str] = ()) -> None:
        """Wait until `count` pods are ready and no other exists, none of them one of `other_than` (names)."""
        deadline = time.monotonic() + RECOVERY_S
        while True:
            pods, ready = self.cluster.items("pods"), self.ready_pods()
            names = {pod["metadata"]["name"] for pod in ready}
            if len(ready) == count and names.isdisjoint(other_than) and (len(pods) == count or self._only_unreachable_end(pods)):
                return
            if time.monotonic() > deadline:
                states = {pod["metadata"]["name"]: pod["status"].get("phase") for pod in pods}
                raise BuildError(f"wanted {count} ready pods within {RECOVERY_S:g} s, got {states}")
            time.sleep(0.5)

    def _only_unreachable_end(self, pods: list[dict[str, Any]]) -> bool:
        """A pod of a dead node cannot end until its node is back."""
        nodes = self.cluster.ready_nodes()
        return all(is_ready(pod) or pod["spec"].get("nodeName") not in nodes for pod in pods)

    def answers(self) -> list[str]:
        """The undisturbed answers to CASES."""
        with ReaderClient(self.url, READER, TIMEOUT_S, retries=RETRIES) as reader:
            return [reader.answer(question, passages, max_new_tokens=TOKENS).text for question, passages in CASES]

    def rollout_restart(self) -> None:
        """Replace every pod by a new one, as a new image or a new setting does."""
        old = {pod["metadata"]["name"] for pod in self.ready_pods()}
        self.cluster.kubectl("rollout", "restart", f"deployment/{NAME}")
        self.wait_for(2, other_than=old)

    def drain(self) -> None:
        """Move the pods of a node to the other one."""
        self.cluster.kubectl("drain", NODES[1], "--delete-emptydir-data", "--ignore-daemonsets", "--timeout=200s")
        self.wait_for(2)

    def uncordon(self) -> None:
        """Take pods on the drained node again, and spread them."""
        self.cluster.kubectl("uncordon", NODES[1])
        self.spread()

    def kill_pod(self) -> None:
        """Kill all processes of one server at once; the kubelet starts its container again."""
        pod = self.ready_pods()[0]
        started = _restarts(pod)
        for pid, command in self.cluster.processes(pod).items():
            if "catatonit" not in command:
                _kill(pid)
        self._wait_until(lambda: any(_restarts(each) > started and is_ready(each) for each in self._same(pod)), "a restarted container")
        self.wait_for(2)

    def kill_model_process(self) -> None:
        """Kill the Python process of the reader in one server; its launcher starts the server again."""
        pod = self.ready_pods()[0]
        models = [pid for pid, line in self.cluster.processes(pod).items() if "backend_stub" in line and f"/{READER}/" in line]
        if not models:
            raise BuildError(f"wanted the process of {READER} in {pod['metadata']['name']}, got {self.cluster.processes(pod)}")
        for pid in models:
            _kill(pid)

        def answers() -> bool:
            question, passages = CASES[0]
            with ReaderClient(f"{pod['status']['podIP']}:8001", READER, 2.0) as reader:
                try:
                    return bool(reader.answer(question, passages, max_new_tokens=TOKENS))
                except ReaderError:
                    return False

        self._wait_until(answers, "an answer of the server whose model process was killed")

    def kill_node(self) -> None:
        """Cut a node's power: nothing of it answers, not even with a refusal."""
        gone = self._names_on(NODES[1])
        if len(gone) != 1:
            raise BuildError(f"wanted one server on {NODES[1]}, got {len(gone)}: nothing to lose there, or all")
        self.cluster.kill_node(NODES[1])
        self.wait_for(2, other_than=gone)

    def revive_node(self) -> None:
        """Start the killed node, and spread the pods."""
        self.cluster.start_node(NODES[1])
        self._wait_until(lambda: self.cluster.ready_nodes() == set(NODES), "both nodes")
        self.spread()

    def spread(self) -> None:
        """Have one server on each node: the scheduler prefers that, and a rollout may still end otherwise."""
        self.wait_for(2)
        for empty, full in (NODES, NODES[::-1]):
            if not self._names_on(empty):
                moved = self._names_on(full).pop()
                self.cluster.kubectl("cordon", full)
                self.cluster.kubectl("delete", "pod", moved)
                self.wait_for(2, other_than=[moved])
                self.cluster.kubectl("uncordon", full)

    def _names_on(self, node: str) -> set[str]:
        return {pod["metadata"]["name"] for pod in self.ready_pods() if pod["spec"].get("nodeName") == node}

    def scale(self, count: int) -> None:
        """Have so many servers."""
        self.cluster.kubectl("scale", f"deployment/{NAME}", f"--replicas={count}")
        self.wait_for(count)

    def _same(self, pod: dict[str, Any]) -> list[dict[str, Any]]:
        return [each for each in self.cluster.items("pods") if each["metadata"]["uid"] == pod["metadata"]["uid"]]

    def _wait_until(self, happened: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + RECOVERY_S
        while not happened():
            if time.monotonic() > deadline:
                raise BuildError(f"wanted {what} within {RECOVERY_S:g} s")
            time.sleep(0.2)


def _restarts(pod: dict[str, Any]) -> int:
    return sum(each["restartCount"] for each in pod["status"].get("containerStatuses", []))


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it has ended with its parent


# Scenario: what happens while clients ask, and what puts the cluster right afterwards: two servers, one a node.
SCENARIOS: dict[str, tuple[Callable[[Deployment], None], Callable[[Deployment], None] | None]] = {
    "rollout restart": (Deployment.rollout_restart, Deployment.spread),
    "node drain": (Deployment.drain, Deployment.uncordon),
    "pod kill": (Deployment.kill_pod, None),
    "model process kill": (Deployment.kill_model_process, None),
    "scale 2 to 4": (lambda deployment: deployment.scale(4), None),
    "scale 4 to 2": (lambda deployment: deployment.scale(2), Deployment.spread),
    "node kill": (Deployment.kill_node, Deployment.revive_node),
}


def run(scenario: str, deployment: Deployment, wanted: list[str]) -> Outcome:
    """Run a scenario under load; `wanted` has the right answers."""
    happen, put_right = SCENARIOS[scenario]
    with Load(deployment.url, wanted, scenario) as load:
        time.sleep(BEFORE_S)
        fault_s = time.monotonic()
        happen(deployment)
        load.outcome.recovery_s = time.monotonic() - fault_s
        time.sleep(AFTER_S)
    if put_right is not None:
        put_right(deployment)
    return load.outcome


def faults_of(outcome: Outcome) -> list[str]:
    """What was not as promised, a line each."""
    found = [f"{outcome.scenario}: {outcome.lost} questions lost, {outcome.cut} of them streams that had begun"] if outcome.lost else []
    found += [f"{outcome.scenario}: {outcome.wrong} answers differ from an undisturbed server's"] if outcome.wrong else []
    found += [f"{outcome.scenario}: {outcome.duplicated} questions answered twice"] if outcome.duplicated else []
    return found + ([] if outcome.answered else [f"{outcome.scenario}: no question was answered"])
