"""What Prometheus reads from a daemon: names, help, and values that follow the traffic."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from kvstore.client.session import Session
from tests.http_tools import ON, address, ask
from tests.session_tools import (
    BIG,
    PATIENCE,
    ROOT,
    SMALL,
    Served,
    Stores,
    eventually,
    load,
    prompt,
    save,
)

NAME: Final = re.compile(r"kvstore_[a-z][a-z0-9_]*[a-z0-9]\Z")
UNITS: Final = ("_bytes", "_seconds")


def scrape(served: Served) -> dict[str, Metric]:
    text = ask(address(served), "/metrics").body.decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def value(served: Served, name: str, **labels: str) -> float:
    """One sample; counters by their full name."""
    found = [
        sample.value
        for family in scrape(served).values()
        for sample in family.samples
        if sample.name == name and sample.labels == labels
    ]
    assert len(found) == 1, (name, labels, found)
    return found[0]


def traffic(session: Session, number: int, blocks: int) -> list[bytes]:
    """Look up, save, look up and load one prompt."""
    keys: list[bytes] = session.keys(prompt(number, blocks))
    session.lookup(keys)
    assert save(session, keys).stored == blocks
    assert session.lookup(keys).blocks == blocks
    assert load(session, keys).blocks == blocks
    return keys


def test_every_metric_is_explained_and_named_by_the_rules(stores: Stores) -> None:
    served = stores.serve(memory=SMALL, disk="16MiB", server=ON)
    with served.session(BIG) as session:
        for number in range(3):
            traffic(session, number, 5)  # More than memory holds.
            session.flush(PATIENCE)  # What is being written keeps its room.
        assert load(session, session.keys(prompt(0, 5))).blocks == 5
        eventually(lambda: "kvstore_hop_seconds" in scrape(served))
        answer = ask(address(served), "/metrics")
        assert answer.headers["Content-Type"].startswith("text/plain; version=")
        families = scrape(served)
    assert len(families) > 50
    for name, family in families.items():
        assert NAME.match(name), name
        assert family.documentation.endswith((".", "…).")) or name.startswith("kvstore_process_")
        assert family.documentation[:1].isupper() or family.documentation[:1].isdigit()
        assert family.type in ("gauge", "counter", "histogram"), name
        for sample in family.samples:
            if family.type == "counter":
                assert sample.name == f"{name}_total"
                assert sample.value >= 0
            if "byte" in name and family.type == "gauge" and "_per_" not in name:
                assert name.endswith("_bytes"), name
            if family.type == "histogram":
                assert name.endswith(UNITS), name
            assert len(sample.labels) <= 3, sample
    for histogram in ("kvstore_lookup_seconds", "kvstore_hop_seconds", "kvstore_hop_bytes"):
        assert families[histogram].type == "histogram", histogram
    hops = {s.labels["hop"] for s in families["kvstore_hop_seconds"].samples}
    assert {"disk_read", "disk_write"} <= hops
    series = {f"{n}_total" if f.type == "counter" else n for n, f in families.items()}
    documented = (ROOT / "docs" / "metrics.md").read_text()
    listed = set(re.findall(r"^\| `(kvstore_[a-z0-9_]+)`", documented, re.MULTILINE))
    assert series == listed
    # Whatever the store counts has a metric of its own.
    assert families["kvstore_events"].samples == []


def test_the_values_are_those_of_the_store(stores: Stores) -> None:
    served = stores.serve(memory=SMALL, disk="16MiB", server=ON)
    with served.session(BIG) as session:
        for number in range(3):
            traffic(session, number, 5)
            session.flush(PATIENCE)
        session.lookup(session.keys(prompt(9, 2)))
        stats: dict[str, Any] = session.stats()
        counters = stats["counters"]
        for name, counter in (
            ("kvstore_lookups_total", "lookup.requests"),
            ("kvstore_lookup_tokens_total", "lookup.tokens"),
            ("kvstore_lookup_hit_blocks_total", "lookup.hit_blocks"),
            ("kvstore_save_blocks_total", "save.blocks"),
            ("kvstore_save_bytes_total", "save.bytes"),
        ):
            assert value(served, name) == counters[counter] > 0, name
        for tier in ("memory", "disk"):
            hits = value(served, "kvstore_hit_tokens_total", tier=tier)
            assert hits == counters.get(f"hit.tokens.{tier}", 0)
            loaded = value(served, "kvstore_load_bytes_total", tier=tier)
            assert loaded == counters.get(f"load.bytes.{tier}", 0)
            for kind in ("capacity", "used", "free", "fragmented"):
                have = value(served, f"kvstore_tier_{kind}_bytes", tier=tier)
                assert have == stats["tiers"][tier][kind], (tier, kind)
        written = value(served, "kvstore_tier_written_bytes_total", tier="disk")
        assert written == counters["write.bytes.disk"] > 0
        assert value(served, "kvstore_lookup_misses_total", reason="absent") == 4
        assert value(served, "kvstore_evictions_total", tier="memory") == counters["evict.memory"]
        assert value(served, "kvstore_objects") == stats["objects"]
        assert value(served, "kvstore_tier_slots", tier="memory") == 8
        lookups = stats["histograms"]["seconds.lookup"]
        assert value(served, "kvstore_lookup_seconds_count") == sum(lookups["counts"])
        assert value(served, "kvstore_lookup_seconds_sum") == lookups["sum"]
        assert value(served, "kvstore_lookup_seconds_bucket", le="+Inf") == sum(lookups["counts"])


def test_gauges_come_and_go(stores: Stores) -> None:
    served = stores.serve(server=ON)
    assert value(served, "kvstore_ready") == 1
    assert value(served, "kvstore_draining") == 0
    assert "kvstore_tier_healthy{" not in scrape(served)  # There is no disk tier.
    with served.session() as session:
        keys = traffic(session, 1, 3)
        pin = session.pin(keys)
        assert value(served, "kvstore_sessions") == 1
        assert value(served, "kvstore_leases", kind="pin") == 1
        assert value(served, "kvstore_pinned_bytes") == 3 * 4096
        assert value(served, "kvstore_tenant_pinned_bytes", tenant="") == 3 * 4096
        pin.release()
        eventually(lambda: value(served, "kvstore_leases", kind="pin") == 0)
        assert value(served, "kvstore_pinned_bytes") == 0
    eventually(lambda: value(served, "kvstore_sessions") == 0)


def test_tenants_have_labels_but_not_without_end(stores: Stores) -> None:
    server = ON | {"max_labels": 5}
    served = stores.serve(server=server, quotas={"tenant-3": {"memory": "3MiB"}})
    ugly = 'a"b\\c\n{}<é>'
    with served.session(tenant=ugly) as session:
        traffic(session, 1, 8)
        assert value(served, "kvstore_tenant_bytes", tenant=ugly, tier="memory") == 8 * 4096
    for number in range(12):
        with served.session(tenant=f"tenant-{number}") as session:
            save(session, session.keys(prompt(number, 1 + (number == 3))))
    families = scrape(served)
    named = [s for s in families["kvstore_tenant_bytes"].samples if s.labels["tier"] == "memory"]
    assert len(named) == 5
    assert value(served, "kvstore_tenants") == 13
    rest = value(served, "kvstore_tenants_other_bytes", tier="memory")
    assert rest == 8 * 4096
    assert sum(s.value for s in named) + rest == (8 + 12 + 1) * 4096
    quota = value(served, "kvstore_tenant_quota_bytes", tenant="tenant-3", tier="memory")
    assert quota == 3 << 20


def test_a_lost_disk_shows(stores: Stores) -> None:
    missing = {"path": "/proc/no/such/place", "size": "16MiB"}
    served = stores.serve(disk=missing, server=ON)
    assert value(served, "kvstore_tier_healthy", tier="disk") == 0
    assert "kvstore_tier_capacity_bytes" in scrape(served)


def test_a_queue_is_that_of_one_tier(stores: Stores, tmp_path: Path) -> None:
    far = {"kind": "slab", "name": "far", "options": {"path": str(tmp_path), "size": "16MiB"}}
    served = stores.serve(disk="16MiB", tiers=[far | {"queue": "1MiB"}], server=ON)
    for tier, limit in (("disk", 256), ("far", 1)):
        assert value(served, "kvstore_write_queue_bytes", tier=tier) == 0
        assert value(served, "kvstore_write_queue_limit_bytes", tier=tier) == limit << 20
        assert value(served, "kvstore_tier_healthy", tier=tier) == 1
