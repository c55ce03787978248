"""Processes as /proc shows them: who descends from whom, who is alive, how much memory each holds. Pure but for reading /proc."""

from __future__ import annotations

import os
from pathlib import Path

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def state_and_parent(stat: str) -> tuple[str, int]:
    """State letter and parent's process id from the text of /proc/PID/stat; the command in it may hold blanks and brackets."""
    fields = stat.rpartition(")")[2].split()
    return fields[0], int(fields[1])


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that ended and was not waited for does not."""
    try:
        return state_and_parent(Path(f"/proc/{pid}/stat").read_text())[0] not in "ZX"
    except (OSError, IndexError):
        return False


def descendants(pid: int) -> list[int]:
    """Live children of a process, their children, and so on."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, parent = state_and_parent((entry / "stat").read_text())
            except (OSError, IndexError):
                continue  # it ended while we looked
            if state not in "ZX":
                children.setdefault(parent, []).append(int(entry.name))
    found, open_ = [], [pid]
    while open_:
        direct = children.get(open_.pop(), [])
        found += direct
        open_ += direct
    return found


def arguments(pid: int) -> list[str]:
    """The command line of a process; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def resident_bytes(pid: int) -> int:
    """Memory that the process alone holds: resident, less what it shares (libraries, /dev/shm); 0 if it is gone."""
    try:
        resident, shared = Path(f"/proc/{pid}/statm").read_text().split()[1:3]
    except OSError:
        return 0
    return (int(resident) - int(shared)) * PAGE_BYTES
