"""Tiers pass the conformance suite, which notices what does not; kinds of tiers are found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from examples.memory_tier import MemoryTier
from kvstore.errors import ConfigError
from kvstore.sources import load_config
from kvstore.tiers import conformance
from kvstore.tiers.base import Host, Tier
from kvstore.tiers.conformance import Make, Nonconforming
from kvstore.tiers.factory import find
from kvstore.tiers.slab.tier import SlabTier
from tests.session_tools import Stores, load, prompt, save

MIB = 1 << 20
MEDIA: dict[Path, dict[Any, Any]] = {}


def memory(host: Host, folder: Path) -> Tier:
    medium = MEDIA.setdefault(folder, {})
    return MemoryTier("memory", host, {"capacity": 2 * MIB, "medium": medium})


def slab(host: Host, folder: Path) -> Tier:
    return SlabTier("slab", host, folder, 4 * MIB, chunk=256 << 10)


@pytest.mark.parametrize("check", conformance.CHECKS)
@pytest.mark.parametrize("make", [slab, memory])
def test_conforms(make: Make, check: Callable[[Make, Path], None], tmp_path: Path) -> None:
    check(make, tmp_path)


class Forgets(MemoryTier):
    def recover(self) -> Any:
        return iter(())


class Resurrects(MemoryTier):
    def delete(self, names: Any) -> None: ...


class Believes(MemoryTier):
    def _load(self, job: Any) -> str | None:
        job.checksum = self._objects[job.name][0].checksum if job.name in self._objects else None
        return super()._load(job)


class Hoards(MemoryTier):
    def _make_room(self, nbytes: int) -> bool:
        return True


class Impolite(MemoryTier):
    def _make_room(self, nbytes: int) -> bool:
        while (self.state.used or 0) + nbytes > self._capacity:
            name = next(iter(self._objects))
            self.delete([name])
            self._host.lost(name, "evicted")
        return True


class Twice(MemoryTier):
    def get(self, jobs: Any, done: Any) -> None:
        super().get(jobs, lambda job, error: (done(job, error), done(job, error)))


@pytest.mark.parametrize("kind", [Forgets, Resurrects, Believes, Hoards, Impolite, Twice])
def test_the_suite_notices(kind: type[MemoryTier], tmp_path: Path) -> None:
    def make(host: Host, folder: Path) -> Tier:
        options = {"capacity": 2 * MIB, "medium": MEDIA.setdefault(folder, {})}
        return kind("wrong", host, options)

    def conform() -> None:
        for check in conformance.CHECKS:
            check(make, tmp_path / check.__name__)

    with pytest.raises(Nonconforming):
        conform()


# --- Kinds ----------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package that offers tiers of the kinds `kept` and `broken`."""
    info = tmp_path / "kept_tier-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kept-tier\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[kvstore.tiers]\nkept = examples.memory_tier:MemoryTier\nbroken = no_such_module:Tier\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_a_daemon_with_a_tier_of_a_package(package: Path, stores: Stores) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", f"{package}:{Path(__file__).parents[2]}")
        tiers = [{"kind": "kept", "name": "far", "options": {"capacity": 8 * MIB}}]
        served = stores.serve("1MiB", tiers=tiers)
    with served.session() as session:
        first, others = session.keys(prompt(1, 4)), session.keys(prompt(2, 400))
        assert save(session, first).stored == 4
        assert session.flush() == 0
        save(session, others)
        assert load(session, first).tiers == {"far": 4}


def test_kinds_that_cannot_be_had_are_named(package: Path) -> None:
    with pytest.raises(
        ConfigError, match="no kind 'other'; known: broken, files, kept, redis, s3, slab"
    ):
        find("other")
    with pytest.raises(ConfigError, match=r"'broken' cannot be loaded .*no_such_module"):
        find("broken")
    assert find("kept") is MemoryTier
    with pytest.raises(ConfigError, match=r"tier far: options\.capacity: 'much' is no size"):
        conformance.Bench(lambda host, _: MemoryTier("far", host, {"capacity": "much"}), package)


SLAB: Final = {"path": "/somewhere", "size": "1GiB"}


def test_a_slab_may_be_given_among_tiers() -> None:
    listed = load_config(overrides={"tiers": [{"kind": "slab", "options": SLAB}]})
    assert listed.below == load_config(overrides={"disk": SLAB}).below


def test_tiers_are_named_and_in_order() -> None:
    tiers = [{"kind": "slab", "name": "far", "options": SLAB}, {"kind": "kept"}]
    rules = {"admission": {"far": "reused"}, "quotas": {"alice": {"kept": "1MiB", "disk": 5}}}
    both = load_config(overrides={"disk": {"path": "/elsewhere"}, "tiers": tiers, **rules})
    assert [tier.name for tier in both.below] == ["disk", "far", "kept"]
    assert both.admission.below == {"disk": "all", "far": "reused"}
    assert both.quotas["alice"].limits == {"memory": None, "disk": 5, "kept": MIB}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"tiers": [{"kind": "slab", "options": {"size": "much"}}]}, "options: a slab: size"),
        ({"tiers": [{"kind": "slab", "options": {"size": "1GiB"}}]}, "a slab needs a path"),
        ({"tiers": [{"kind": "kept"}, {"kind": "kept"}]}, "'kept' is there twice"),
        ({"tiers": [{"kind": "kept", "name": "memory"}]}, "'memory' is there twice"),
        ({"tiers": [{"kind": "kept", "name": "A.b"}]}, "name"),
        (
            {"tiers": [{"kind": "slab", "name": "far", "size": "1GiB", "options": SLAB}]},
            r"tiers\.0\.size: unknown key; did you mean tiers\.0\.options\.size\?",
        ),
        ({"tiers": [{"kind": f"k{n}"} for n in range(7)]}, "7 below memory; give 6"),
        ({"admission": {"far": "none"}}, "admission.far: there is no tier 'far'; known: memory"),
        ({"quotas": {"bob": {"far": 1}}}, "quotas.bob.far: there is no tier 'far'"),
        ({"tiers": [{"kind": "kept"}], "admission": {"kept": "some"}}, "admission.kept"),
    ],
)
def test_tiers_that_make_no_sense_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load_config(overrides=settings)
