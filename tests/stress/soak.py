"""Whether memory stays flat: samples of every process and of /dev/shm between many rounds of the same load."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence

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
