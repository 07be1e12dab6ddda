"""An S3 server that is killed, paused, slow, or lacks what others have; and what is told of it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kvstore.errors import ConfigError, TierUnavailable
from kvstore.tiers.base import Held, Host, Tier
from kvstore.tiers.conformance import Bench, Objects, segment_of
from kvstore.tiers.s3 import open_s3
from tests.s3_tools import CREDENTIALS, Meddler, S3Server
from tests.session_tools import Stores, eventually, prompt, save

NAMES = segment_of(1, 8192)
SECRET = CREDENTIALS["aws_secret_access_key"]


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    one = S3Server()
    yield one
    one.stop()


@pytest.fixture
def meddler(server: S3Server) -> Iterator[Meddler]:
    one = Meddler(server)
    yield one
    one.close()


@contextmanager
def bench(server: S3Server, prefix: Path, **more: Any) -> Iterator[Bench]:
    def make(host: Host, _: Path) -> Tier:
        how = {"timeout": 1.0, "retry_seconds": 0.2, "stall_seconds": 2.0} | more
        return open_s3("far", host, server.options(str(prefix).strip("/"), **how))

    with Bench(make, prefix) as one:
        yield one


def probe(bench: Bench) -> str:
    answers: list[Sequence[Held | None]] = []
    bench.tier.probe(NAMES[:1], answers.append)
    bench.run_until(lambda: bool(answers), "a probe is answered")
    (held,) = answers[0] or [Held(NAMES[0], 0, None, 0, 0)]
    return "absent" if held is None else "there" if held.nbytes else "unknown"


def stored(bench: Bench) -> Objects:
    """A segment that is there; on a busy machine the server may not answer at once."""
    objects = Objects(bench, NAMES)
    eventually(lambda: set(objects.put()) == {None})
    return objects


def healed(bench: Bench) -> None:
    eventually(lambda: bench.tier.state.readable and bench.tier.state.writable)


def test_a_server_that_is_killed_costs_misses_until_it_is_back(tmp_path: Path) -> None:
    server = S3Server()
    with bench(server, tmp_path) as one:
        objects = stored(one)
        server.stop()
        began = time.monotonic()
        assert objects.get() == ["io_error"] * 16
        assert not one.tier.state.readable
        assert probe(one) == "unknown"
        assert Objects(one, segment_of(2)).put() == ["io_error"] * 16
        one.tier.delete(NAMES)
        assert time.monotonic() - began < 10
        assert "cannot be used" in (one.tier.state.problem or "")
        server.start()
        healed(one)
        assert probe(one) == "absent", "it has lost all"
        assert stored(one).get() == [None] * 16
        assert one.tier.state.problem is None
    server.stop()


def test_what_was_to_be_deleted_meanwhile_goes_once_the_server_is_back(
    server: S3Server, tmp_path: Path
) -> None:
    with bench(server, tmp_path) as one:
        stored(one)
        with server.paused():
            one.tier.delete(NAMES)
            assert one.tier.flush(20)
            assert probe(one) != "there"
        healed(one)
        eventually(lambda: one.tier.counters["segments_removed"] == 1)
        assert probe(one) == "absent"
    with bench(server, tmp_path) as one:
        assert probe(one) == "absent"


def test_a_server_that_is_paused_holds_nobody_for_long(server: S3Server, tmp_path: Path) -> None:
    with bench(server, tmp_path) as one:
        objects = stored(one)
        with server.paused():
            began = time.monotonic()
            one.tier.state  # noqa: B018 - costs nothing
            assert set(objects.get()) <= {"io_error", "stalled"}
            assert probe(one) == "unknown"
            assert not one.tier.state.readable
            assert time.monotonic() - began < 8
        healed(one)
        assert objects.get() == [None] * 16
        assert probe(one) == "there"


def test_an_end_waits_for_nobody_who_is_paused(server: S3Server, tmp_path: Path) -> None:
    with bench(server, tmp_path) as one:
        objects = stored(one)
        ends: list[str | None] = []
        with server.paused():
            one.tier.get(objects.jobs, lambda job, error: ends.append(error))
            began = time.monotonic()
            one.tier.close()
            assert time.monotonic() - began < 6
        eventually(lambda: len(ends) == 16)
        assert set(ends) <= {"closed", "io_error", None}


def test_a_store_without_creation_only_is_written_all_the_same(
    meddler: Meddler, server: S3Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    meddler.meddle = lambda method, headers: 501 if headers.get("If-None-Match") else None
    with bench(server, tmp_path, endpoint=meddler.endpoint) as one:
        assert stored(one).get() == [None] * 16
        one.put(*segment_of(2))
    assert caplog.text.count("If-None-Match") == 1


def test_bytes_that_change_on_the_way_are_no_hit(
    meddler: Meddler, server: S3Server, tmp_path: Path
) -> None:
    with bench(server, tmp_path, endpoint=meddler.endpoint) as one:
        objects = stored(one)
        meddler.change = lambda body: body[:-1] + b"?" if len(body) > 4096 else body
        assert "corrupt" in objects.get()
        meddler.change = lambda body: body[: len(body) // 2]
        assert "corrupt" in objects.get()
        assert probe(one) == "absent"
        meddler.change = lambda body: body
        assert objects.get() == [None] * 16


@pytest.mark.parametrize(("status", "told"), [(403, "check the credentials"), (503, "503")])
def test_a_server_that_refuses_is_left_alone_and_told_of_without_credentials(
    meddler: Meddler,
    server: S3Server,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    status: int,
    told: str,
) -> None:
    secrets = tmp_path / "credentials"
    secrets.write_text(
        "# of the tests\n" + "".join(f"{k.upper()}={v}\n" for k, v in CREDENTIALS.items())
    )
    more: dict[str, Any] = {"config": {}, "credentials_file": str(secrets)}
    with bench(server, tmp_path, endpoint=meddler.endpoint, **more) as one:
        meddler.meddle = lambda method, headers: status
        assert Objects(one, NAMES).put() == ["io_error"] * 16
        state = one.tier.state
        assert told in (state.problem or "")
        assert not state.readable
        asked = meddler.requests
        assert Objects(one, NAMES).put() == ["io_error"] * 16
        assert meddler.requests <= asked + 3, "it is left alone, but for a trial"
        seen: list[str] = []

        def fine(method: str, headers: Any) -> None:
            seen.append(headers.get("Authorization", ""))

        meddler.meddle = fine
        healed(one)
        stored(one)
        assert all("Credential=tester/" in header for header in seen)
        assert SECRET not in str(state) + caplog.text + str(one.tier.state)


def test_a_daemon_tells_no_credentials(stores: Stores, server: S3Server, tmp_path: Path) -> None:
    options = server.options(str(tmp_path).strip("/"))
    served = stores.serve(tiers=[{"kind": "s3", "name": "far", "options": options}])
    with served.session() as session:
        save(session, session.keys(prompt(1, 64)))
        assert session.flush() == 0
        assert SECRET not in str(session.stats())
    assert SECRET not in served.log.read_text()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"url": "file:///tmp/bucket"}, r"options.url"),
        ({"url": "s3://bucket/x?sig=s3cr3t"}, r"options.url"),
        ({"endpoint": "127.0.0.1:9"}, r"options.endpoint"),
        ({"buckets": "x"}, r"options.buckets: unknown key"),
        ({"config": {"no_such": "s3cr3t"}}, r"no_such"),
        ({"credentials_file": "/no/such/file"}, r"credentials_file /no/such/file: No such file"),
    ],
)
def test_options_that_will_not_do_are_named(
    options: dict[str, Any], told: str, tmp_path: Path
) -> None:
    given = {"url": "s3://bucket/x", "region": "x"} | options
    with (
        pytest.raises((ConfigError, TierUnavailable), match=told) as raised,
        Bench(lambda host, _: open_s3("far", host, given), tmp_path),
    ):
        pass
    assert "s3cr3t" not in str(raised.value)
