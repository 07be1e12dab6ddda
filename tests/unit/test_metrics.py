"""Names of metrics, samples over time, and that dashboard, alerts and documents know them all."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from kvstore.server.http.metrics import COUNTERS, counted
from kvstore.server.http.status import Samples, quantile
from kvstore.server.recent import by_tier

ROOT: Final = Path(__file__).parents[2]
METRIC: Final = re.compile(r"\bkvstore_[a-z0-9_]+")


def _counted_in_the_sources() -> Iterator[tuple[str, str]]:
    """File and event of every `counters.add("event", …)` of the daemon."""
    for file in [*(ROOT / "kvstore").rglob("*.py"), *(ROOT / "server").rglob("*.py")]:
        if file.parent.name == "client":  # Counts for itself.
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if node.func.attr == "add" and ast.unparse(node.func.value).endswith("counters"):
                (event, *_) = node.args
                assert isinstance(event, ast.Constant), (file.name, ast.unparse(node))
                yield file.name, event.value


def test_every_counter_of_the_daemon_has_a_metric() -> None:
    found = set(_counted_in_the_sources())
    assert len(found) > 20
    assert {(file, event) for file, event in found if event not in COUNTERS} == set()


def test_names_of_counters_become_metrics_and_labels() -> None:
    assert counted("lookup.tokens") == ("lookup.tokens", "")
    assert counted("lookup.miss.absent") == ("lookup.miss", "absent")
    assert counted("evict.memory") == ("evict", "memory")
    assert counted("evict.lost.not_written_yet") == ("evict.lost", "not_written_yet")
    assert counted("save.bytes.more") == ("save.bytes.more", "")
    assert counted("new.thing") == ("new.thing", "")
    names = [known.name for known in COUNTERS.values()]
    assert len(set(names)) == len(names)


# -- what others say about our metrics ---------------------------------------------------------


@pytest.fixture(scope="module")
def exported() -> set[str]:
    """Names of all series, as docs/metrics.md lists them."""
    names: set[str] = set()
    for line in (ROOT / "docs" / "metrics.md").read_text().splitlines():
        if match := re.match(r"\| `(kvstore_[a-z0-9_]+)`", line):
            names.add(match[1])
    assert len(names) > 50
    return names


def _known(name: str, exported: set[str]) -> bool:
    return name in exported or re.sub(r"_(bucket|sum|count)\Z", "", name) in exported


def test_the_document_lists_every_counter(exported: set[str]) -> None:
    assert {f"kvstore_{known.name}_total" for known in COUNTERS.values()} <= exported


def test_the_dashboard_shows_metrics_that_exist(exported: set[str]) -> None:
    board = json.loads((ROOT / "deploy" / "grafana" / "kvstore.json").read_text())
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in board["panels"]]
    assert len(set(places)) == len(places)
    for panel in panels:
        for target in panel["targets"]:
            names = METRIC.findall(target["expr"])
            assert names, panel["title"]
            unknown = [name for name in names if not _known(name, exported)]
            assert not unknown, (panel["title"], unknown)
            assert target["datasource"]["uid"] == "${datasource}"


def test_the_alerts_watch_metrics_that_exist(exported: set[str]) -> None:
    (group,) = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yaml").read_text())[
        "groups"
    ]
    documented = (ROOT / "docs" / "metrics.md").read_text()
    for rule in group["rules"]:
        names = METRIC.findall(rule["expr"])
        assert names, rule["alert"]
        assert all(_known(name, exported) for name in names), (rule["alert"], names)
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert rule["annotations"]["summary"]
        assert rule["annotations"]["description"]
        assert f"`{rule['alert']}`" in documented


# -- samples and recent requests ---------------------------------------------------------------


def _stats(lookups: list[int], **counters: int) -> dict[str, Any]:
    histogram = {"bounds": [1.0, 2.0, 4.0], "counts": lookups, "sum": 0.0}
    named = {name.replace("__", "."): value for name, value in counters.items()}
    return {"counters": named, "histograms": {"seconds.lookup": histogram} if lookups else {}}


def test_samples_are_differences() -> None:
    samples = Samples()
    samples.take(100.0, _stats([]))
    assert samples.after(0) == []
    samples.take(
        101.0, _stats([0, 4, 0, 0], lookup__tokens=100, hit__tokens__disk=30, hit__tokens__far=10)
    )
    samples.take(
        103.0, _stats([0, 4, 0, 0], lookup__tokens=100, hit__tokens__disk=30, hit__tokens__far=10)
    )
    samples.take(103.0, _stats([9, 9, 9, 9], lookup__tokens=999))  # A clock that stands still.
    first, second = samples.after(0)
    assert (first["number"], first["asked"], first["memory"], first["below"]) == (1, 100, 0, 40)
    assert (first["lookups"], first["p50"], first["seconds"]) == (4, 1.5, 1.0)
    assert (second["asked"], second["lookups"], second["p99"]) == (0, 0, None)
    assert second["seconds"] == 2.0
    assert samples.after(1) == [second]
    assert samples.after(2) == []
    assert samples.after(77) == [first, second]  # Numbers of another daemon.


def test_only_so_many_samples_are_kept() -> None:
    samples = Samples(limit=3)
    for second in range(10):
        samples.take(float(second), _stats([]))
    assert [s["number"] for s in samples.after(0)] == [7, 8, 9]
    assert [s["number"] for s in samples.after(8)] == [9]
    assert [s["number"] for s in samples.after(2)] == [7, 8, 9]


def test_quantiles_of_a_histogram() -> None:
    bounds = [1.0, 2.0, 4.0]
    assert quantile(bounds, [0, 0, 0, 0], 0.5) is None
    assert quantile(bounds, [10, 0, 0, 0], 0.5) == 0.5
    assert quantile(bounds, [1, 1, 2, 0], 0.5) == 2.0
    assert quantile(bounds, [1, 1, 2, 0], 1.0) == 4.0
    assert quantile(bounds, [0, 0, 0, 5], 0.5) == 4.0  # Above all bounds: no less than that.
    assert quantile([], [7], 0.5) == 0.0


def test_what_was_found_is_told_by_tier() -> None:
    assert by_tier(bytes([1, 1, 2])) == (2, 1)
    assert by_tier(b"") == (0, 0)
    assert by_tier(bytes([1, 3, 2, 0, 255])) == (1, 2)
