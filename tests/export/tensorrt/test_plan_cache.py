"""The plan cache: verified, bounded, and told apart by everything that a plan depends on."""

from __future__ import annotations

import os
from pathlib import Path

from export.tensorrt.plan_cache import PlanCache, fingerprint


def test_a_stored_plan_comes_back(tmp_path: Path):
    cache = PlanCache(tmp_path / "plans")
    assert not cache.fetch("key", tmp_path / "a.plan")
    cache.store("key", b"plan")
    assert cache.fetch("key", tmp_path / "a.plan") and (tmp_path / "a.plan").read_bytes() == b"plan"


def test_a_damaged_plan_is_dropped_and_not_used(tmp_path: Path):
    cache = PlanCache(tmp_path / "plans")
    cache.store("key", b"plan")
    (tmp_path / "plans" / "key.plan").write_bytes(b"plam")
    assert not cache.fetch("key", tmp_path / "a.plan")
    assert not (tmp_path / "a.plan").exists() and not list((tmp_path / "plans").glob("key*"))


def test_a_plan_without_its_hash_is_not_used(tmp_path: Path):
    """As a crash between the two writes leaves it."""
    cache = PlanCache(tmp_path / "plans")
    cache.store("key", b"plan")
    (tmp_path / "plans" / "key.sha256").unlink()
    assert not cache.fetch("key", tmp_path / "a.plan")


def test_the_plans_used_least_recently_are_evicted(tmp_path: Path):
    cache = PlanCache(tmp_path / "plans", max_bytes=30)
    for age, key in ((3, "a"), (2, "b"), (1, "c")):
        cache.store(key, b"x" * 10)
        os.utime(tmp_path / "plans" / f"{key}.plan", ns=(10**18 - age, 10**18 - age))
    assert cache.fetch("a", tmp_path / "a.plan")  # used now, so that b is the oldest
    cache.store("d", b"x" * 10)
    assert {path.stem for path in (tmp_path / "plans").glob("*.plan")} == {"a", "c", "d"}
    assert {path.stem for path in (tmp_path / "plans").glob("*.sha256")} == {"a", "c", "d"}
    cache.store("large", b"x" * 100)
    assert {path.stem for path in (tmp_path / "plans").glob("*.plan")} == {"large"}


def test_fingerprints_depend_on_every_part_and_on_nothing_else():
    assert fingerprint({"a": 1, "b": (1, 2)}) == fingerprint({"b": [1, 2], "a": 1})
    assert len({fingerprint({"a": a, "b": b}) for a in (1, 2) for b in (None, "x")}) == 4
