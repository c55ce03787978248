"""`python -m tests.cluster`: the chart on a real Kubernetes cluster of two nodes, asked while pods and nodes come and go.

Needs root on Debian 12, or on a machine whose apt has its packages. The first run compiles Kubernetes (15 minutes on two cores) and builds
the image of this project; both stay in ${XDG_CACHE_HOME:-~/.cache}/fido-cluster. Exit code 0 if no question was lost, answered twice or
answered wrongly.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .build import CLUSTER_TOOLS, ROOT, BuildError, check_tools, images, kubernetes
from .cluster import RUN, Cluster
from .scenarios import NAME, READER, SCENARIOS, Deployment, Outcome, faults_of, run

CHART = ROOT / "deploy" / "helm" / "fido"
MODELS = ROOT / "build" / "demo" / "model_repository"
LOGS = ROOT / "build" / "log" / "cluster"
VALUES: dict[str, Any] = {
    "replicas": 2,
    "image": {"repository": "localhost/fido", "tag": "latest"},
    "readers": [READER],
    "stream": True,
    "models": {"source": "image", "image": {"reference": "localhost/fido:latest", "path": "/repository"}, "sizeLimit": "200Mi"},
    "resources": {"requests": {"cpu": "50m", "memory": "300Mi"}, "limits": {"memory": "2Gi"}},
    "sharedMemory": "256Mi",
}
COLUMNS: tuple[str, ...] = ("scenario", "asked", "answered", "lost", "duplicated", "longest wait s", "recovery s")


def main() -> int:
    """Build, start, run the scenarios, undo; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.cluster", description=__doc__)
    parser.add_argument("--scenarios", nargs="*", choices=list(SCENARIOS), default=list(SCENARIOS), metavar="NAME", help="only these")
    parser.add_argument("--out", type=Path, help="a JSON file for the table")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: the cluster is removed first
    try:
        outcomes = tested(arguments.scenarios)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the cluster is removed", file=sys.stderr)
        return 130
    print("\n".join(table(outcomes)))
    if arguments.out is not None:
        rows = [vars(outcome) for outcome in outcomes]
        arguments.out.write_text(json.dumps({"cores": os.cpu_count(), "load": os.getloadavg()[0], "scenarios": rows}, indent=1) + "\n")
    faults = [fault for outcome in outcomes for fault in faults_of(outcome)]
    for fault in faults:
        print(f"wrong: {fault}")
    asked, lost = (sum(getattr(outcome, name) for outcome in outcomes) for name in ("asked", "lost"))
    print(f"cluster: {len(outcomes)} scenarios, {asked} questions, {lost} lost")
    return 1 if faults else 0


def tested(scenarios: list[str]) -> list[Outcome]:
    """Run the scenarios on a new cluster."""
    if os.geteuid() != 0:
        raise BuildError("wanted root, for network bridges, cgroups and containers: run it as root")
    check_tools(CLUSTER_TOOLS)
    try:
        import helm_python
    except ImportError:
        raise BuildError("wanted the package helm-python-sdk: run `make setup FOR=dev`") from None
    if not (MODELS / READER).exists():
        raise BuildError(f"wanted the demo readers in {MODELS}: run `make cluster-test`, or `make demo-readers ENGINE=onnxruntime`")
    start_s = time.monotonic()

    def log(text: str) -> None:
        print(f"{time.monotonic() - start_s:6.0f} s  {text}", flush=True)

    programs = kubernetes(log)
    tar = images(MODELS, log)
    outcomes = []
    log("starting two nodes")
    with Cluster(programs, tar, LOGS) as cluster:
        log("installing the chart")
        with helm_python.Config(kubeconfig_path=cluster.kubeconfig, namespace="default") as helm:
            helm.install(chart_for_the_cluster(), NAME, VALUES)
        deployment = Deployment(cluster)
        deployment.wait_for(VALUES["replicas"])
        wanted = deployment.answers()
        log(f"{VALUES['replicas']} servers are ready")
        for scenario in scenarios:
            outcome = run(scenario, deployment, wanted)
            outcomes.append(outcome)
            log(f"{scenario}: {outcome.asked} asked, {outcome.answered} answered, {outcome.lost} lost")
            for error, count in outcome.errors.most_common(5):
                log(f"    {count} x {error}")
    return outcomes


def chart_for_the_cluster() -> str:
    """A copy of the chart for Kubernetes 1.20, the newest that Debian has the source of: an older name of one API, and no check of the
    version. All else is as users get it."""
    folder = Path(tempfile.mkdtemp(dir=RUN)) / "fido"
    shutil.copytree(CHART, folder)
    for name, old, new in (("Chart.yaml", r"kubeVersion: .*", ""), ("templates/server.yaml", "policy/v1$", "policy/v1beta1")):
        text, count = re.subn(old, new, (folder / name).read_text(), flags=re.M)
        if count != 1:
            raise BuildError(f"{name} of the chart: wanted one line {old!r}, got {count}")
        (folder / name).write_text(text)
    return str(folder)


def table(outcomes: list[Outcome]) -> list[str]:
    """A heading and one line per scenario."""
    rows = [COLUMNS]
    for each in outcomes:
        counts = (each.asked, each.answered, each.lost, each.duplicated)
        rows.append((each.scenario, *map(str, counts), f"{each.longest_s:.1f}", f"{each.recovery_s:.1f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


if __name__ == "__main__":
    sys.exit(main())
