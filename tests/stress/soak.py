"""Whether memory stays flat: samples of every process and of /dev/shm before and after many rounds of the same load."""

from __future__ import annotations

import dataclasses

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


def growths(start: dict[str, int], end: dict[str, int]) -> list[Growth]:
    """One a name; what is only in one of the two has 0 bytes in the other."""
    return [Growth(name, start.get(name, 0), end.get(name, 0)) for name in sorted({*start, *end})]
