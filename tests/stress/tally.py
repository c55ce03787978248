"""What a fault did, counted: verdicts on answers, the row of each fault, the table and its last line; and whether memory stays flat."""

from __future__ import annotations

import collections
import dataclasses
import enum
import statistics
import threading
from collections.abc import Iterable, Sequence

NOTES_SHOWN = 4  # of one fault; the rest is counted


class Verdict(enum.Enum):
    """What became of one request."""

    RIGHT = "answered right"
    TOLD = "told that there is no answer"
    WRONG = "answered wrong"
    LOST = "neither answered nor told"


@dataclasses.dataclass
class Tally:
    """One row of the table. Threads may share it.

    Attributes:
        fault: its name.
        verdicts: of every try.
        crashed: processes that died and should not have, and servers that did not come back.
        left: slots, bytes, processes and shared memory regions that were not given back.
        recovery_s: from the fault's end until every model answered right again; None where nothing had to recover.
        faults: what went wrong, in words.
        remarks: what is worth knowing and not wrong.
        unmeasured: checks that could not be made here.
    """

    fault: str
    verdicts: collections.Counter[Verdict] = dataclasses.field(default_factory=collections.Counter)
    crashed: int = 0
    left: int = 0
    recovery_s: float | None = None
    faults: list[str] = dataclasses.field(default_factory=list)
    remarks: list[str] = dataclasses.field(default_factory=list)
    unmeasured: list[str] = dataclasses.field(default_factory=list)
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock, repr=False)

    @property
    def tries(self) -> int:
        """How often the fault was tried."""
        return sum(self.verdicts.values())

    @property
    def wrong(self) -> int:
        """Wrong answers, and answers to what should have been refused."""
        return self.verdicts[Verdict.WRONG]

    @property
    def lost(self) -> int:
        """Requests that were neither answered nor told."""
        return self.verdicts[Verdict.LOST]

    @property
    def sound(self) -> bool:
        """Whether every number is as it should be and every check was made."""
        return not (self.wrong or self.lost or self.crashed or self.left or self.unmeasured)

    def judge(self, verdict: Verdict, what: str = "") -> None:
        """Count one try; a bad one is kept in words."""
        with self._lock:
            self.verdicts[verdict] += 1
            if verdict in (Verdict.WRONG, Verdict.LOST):
                self.faults.append(f"{verdict.value}: {what}")

    def crash(self, what: str) -> None:
        """Count a process that died, or a server that did not come back."""
        with self._lock:
            self.crashed += 1
            self.faults.append(f"crashed: {what}")

    def leave(self, what: str, count: int = 1) -> None:
        """Count what was not given back."""
        with self._lock:
            self.left += count
            self.faults.append(f"left: {what}")

    def recovered(self, seconds: float) -> None:
        """Note a recovery; the slowest one is shown."""
        self.recovery_s = max(seconds, self.recovery_s or 0.0)

    def absorb(self, other: Tally) -> None:
        """Add another round of the same fault."""
        self.verdicts.update(other.verdicts)
        self.crashed += other.crashed
        self.left += other.left
        self.faults += other.faults
        self.remarks += [remark for remark in other.remarks if remark not in self.remarks]
        self.unmeasured += [check for check in other.unmeasured if check not in self.unmeasured]
        if other.recovery_s is not None:
            self.recovered(other.recovery_s)


HEADINGS = ("fault", "tries", "right", "told", "wrong", "lost", "crashed", "left", "recovery")


def table(tallies: Sequence[Tally]) -> str:
    """One line a fault, numbers aligned on the right."""
    rows: list[tuple[str, ...]] = [HEADINGS]
    for tally in tallies:
        verdicts = (tally.verdicts[Verdict.RIGHT], tally.verdicts[Verdict.TOLD], tally.wrong, tally.lost)
        recovery = "-" if tally.recovery_s is None else f"{tally.recovery_s:.2f} s"
        rows.append((tally.fault, *map(str, (tally.tries, *verdicts, tally.crashed, tally.left)), recovery))
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADINGS))]
    return "\n".join(
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))) for row in rows
    )


def notes(tallies: Iterable[Tally]) -> list[str]:
    """Everything that went wrong, was not measured, or is remarkable, a line each; repetitions are counted."""
    lines = []
    for tally in tallies:
        counted = collections.Counter(tally.faults)
        lines += [f"{tally.fault}: {what}{f' ({n} times)' if n > 1 else ''}" for what, n in counted.most_common(NOTES_SHOWN)]
        if len(counted) > NOTES_SHOWN:
            lines.append(f"{tally.fault}: ... and {len(counted) - NOTES_SHOWN} more")
        lines += [f"{tally.fault}: not measured: {check}" for check in tally.unmeasured]
        lines += [f"{tally.fault}: note: {remark}" for remark in tally.remarks]
    return lines


def last_line(tallies: Sequence[Tally]) -> str:
    """The line that `make stress` ends with."""
    tries, wrong, lost, crashed = (sum(getattr(t, name) for t in tallies) for name in ("tries", "wrong", "lost", "crashed"))
    return f"stress: {len(tallies)} faults, {tries} tries, {wrong} wrong, {lost} lost, {crashed} crashed"


# Whether memory stays flat: samples of every process and of /dev/shm between many rounds of the same load.

FLAT = 0.02  # growth allowed between the end of the warm-up and the end
GRAIN_BYTES = 1 << 20  # growth below a megabyte is none: small processes would not be flat for a few pages


@dataclasses.dataclass(frozen=True)
class Growth:
    """Memory of one process, or of all shared memory regions, at the start and at the end."""

    name: str
    start_bytes: int
    end_bytes: int

    @property
    def share(self) -> float:
        """Growth as a share of the start."""
        return self.end_bytes / self.start_bytes - 1 if self.start_bytes else float(self.end_bytes > 0)

    @property
    def is_flat(self) -> bool:
        """Whether it has grown no more than it may."""
        return self.share <= FLAT or self.end_bytes - self.start_bytes < GRAIN_BYTES

    def __str__(self) -> str:
        verdict = "flat" if self.is_flat else f"grew by more than {FLAT:.0%}"
        return f"{self.name:<14} {self.start_bytes / 1e6:8.1f} MB -> {self.end_bytes / 1e6:8.1f} MB  {self.share:+7.2%}  {verdict}"


def growths(samples: Sequence[dict[str, int]]) -> list[Growth]:
    """Growth of each name from the median of the first third of the samples to that of the last third.

    One sample says little: a reader's caches grow and shrink with its questions, so it is a fifth higher or lower a round later.

    Args:
        samples: in order of time, bytes of each name; a name that a sample lacks has 0 there.
    """
    third = max(len(samples) // 3, 1)

    def median(part: Sequence[dict[str, int]], name: str) -> int:
        return int(statistics.median(sample.get(name, 0) for sample in part))

    names = sorted({name for sample in samples for name in sample})
    return [Growth(name, median(samples[:third], name), median(samples[-third:], name)) for name in names]
