"""`Orchestrator` and `AsyncOrchestrator` against running daemons: answers, handles, errors."""

from __future__ import annotations

import asyncio
import math
import signal
import socket
import threading
import time

import pytest

from kvstore.api import (
    AsyncOrchestrator,
    OperationFailed,
    OperationUnfinished,
    Orchestrator,
    RequestRefused,
    v1,
)
from kvstore.errors import AccessDenied, KVStoreError, StoreUnavailable
from kvstore.sources import load_config
from tests.certificates import Authority
from tests.control_tools import NAMESPACE_ID, secret, write_tokens
from tests.session_tools import PATIENCE, Served, Stores, eventually, namespace, prompt, save


@pytest.fixture
def served(stores: Stores) -> Served:
    """A daemon with three blocks of prompt 1."""
    made = stores.serve("8MiB", "16MiB", server={"grpc": "127.0.0.1:0"})
    with made.session() as session:
        save(session, session.keys(prompt(1, 3)))
        assert session.flush() == 0
    return made


def at(served: Served) -> str:
    return f"unix://{served.socket}"


def test_verbs_take_plain_values(served: Served) -> None:
    with Orchestrator(at(served), timeout=PATIENCE) as kvstore:
        found = kvstore.lookup(NAMESPACE_ID[:8], tokens=prompt(1, 4))
        assert (found.blocks, found.reason) == (3, "never_stored")
        assert kvstore.lookup(namespace(), tokens=prompt(1, 4)) == found
        told = kvstore.explain(namespace(), tokens=prompt(1, 4))
        assert [block.usable for block in told.blocks] == [True, True, True, False]
        keys = [block.key for block in told.blocks]
        assert kvstore.lookup(NAMESPACE_ID, keys=keys).blocks == 3
        pin = kvstore.pin(NAMESPACE_ID, keys=keys, ttl=60, owner="me")
        assert [lease.id for lease in kvstore.list_leases(owner="me").leases] == [pin.id]
        assert kvstore.unpin(pin.id).pins == 1
        assert kvstore.unpin(owner="me").pins == 0
        assert kvstore.set_ttl(3600, namespace=NAMESPACE_ID).objects == 3
        assert kvstore.set_quota("t", {"memory": 1 << 20}).limits["memory"] == 1 << 20
        assert {q.tenant for q in kvstore.get_quota().quotas} == {"", "t"}
        assert kvstore.set_admission({"disk": "none"}).rules["disk"] == "none"
        assert kvstore.get_admission().rules["disk"] == "none"
        assert kvstore.stats().objects == 3
        assert [i.objects for i in kvstore.list_namespaces().namespaces] == [3]
        assert not kvstore.list_sessions().sessions


@pytest.mark.parametrize("timeout", [1e9, 1e18, 1e300, math.inf])
def test_no_timeout_is_too_long(served: Served, timeout: float) -> None:
    with Orchestrator(at(served), timeout=timeout) as kvstore:
        assert kvstore.clear(everything=True, dry_run=True).wait(timeout).changed == 3


def test_values_that_fit_no_field_are_refused(served: Served) -> None:
    with Orchestrator(at(served)) as kvstore:
        with pytest.raises(RequestRefused, match="does not fit"):
            kvstore.watch_events(after=-1)
        with pytest.raises(RequestRefused, match="does not fit"):
            kvstore.list_leases(session=1 << 64)
        with pytest.raises(RequestRefused, match="some two million tokens"):
            kvstore.lookup(NAMESPACE_ID, tokens=[1] * (3 << 20))


def test_operations_have_handles(served: Served) -> None:
    with Orchestrator(at(served), timeout=PATIENCE) as kvstore:
        moved = kvstore.move("disk", everything=True).wait(PATIENCE)
        assert (moved.state, moved.changed) == (v1.Operation.STATE_DONE, 3)
        handle = kvstore.prefetch(namespace(), tokens=prompt(1, 3))
        *_, last = handle.watch()
        assert last == handle.state == kvstore.check_finish(handle.id)
        assert last.changed == 3
        assert handle.cancel() == last
        would = kvstore.clear(dry_run=True, tenant="")
        assert would.wait().changed == 3
        assert {o.id for o in kvstore.list_operations().operations} >= {handle.id, would.id}


def test_an_operation_that_fails_raises(stores: Stores) -> None:
    obstacle = stores.folder / "obstacle"
    obstacle.write_text("")
    served = stores.serve("2MiB", {"path": str(obstacle), "size": "8MiB"})
    with served.session() as session, Orchestrator(at(served), timeout=PATIENCE) as kvstore:
        save(session, session.keys(prompt(1, 2)))
        drain = kvstore.drain(timeout=1)
        with pytest.raises(OperationFailed, match="2 objects did not reach the tiers below memory"):
            drain.wait()
        with pytest.raises(OperationFailed):
            list(drain.watch())


def test_waiting_has_an_end(served: Served) -> None:
    with Orchestrator(at(served), timeout=PATIENCE) as kvstore:
        operation = kvstore.clear(everything=True, dry_run=True)
        served.signal(signal.SIGSTOP)
        try:
            with pytest.raises(OperationUnfinished, match="it goes on"):
                operation.wait(0.2)
        finally:
            served.signal(signal.SIGCONT)
        assert operation.wait(PATIENCE).state == v1.Operation.STATE_DONE


def test_events_come_from_ready_on_until_closed(served: Served) -> None:
    with Orchestrator(at(served), timeout=PATIENCE) as kvstore:
        events = kvstore.watch_events().ready()
        with served.session() as session:
            save(session, session.keys(prompt(2, 2)))
        first = next(events)
        assert len(first.stored.block_hashes) == 2
        threading.Timer(0.2, events.close).start()
        assert all(event.sequence > first.sequence for event in events)
        assert list(events) == []
        again = kvstore.watch_events(after=first.sequence - 1)
        assert next(again) == first
        again.close()


async def test_asyncio(served: Served) -> None:
    async with AsyncOrchestrator(at(served), timeout=PATIENCE) as kvstore:
        found, stats = await asyncio.gather(
            kvstore.lookup(namespace(), tokens=prompt(1, 4)), kvstore.stats()
        )
        assert (found.blocks, stats.objects) == (3, 3)
        events = await kvstore.watch_events().ready()
        moved = await kvstore.move("disk", everything=True)
        assert (await moved.wait(PATIENCE)).changed == 3
        handle = await kvstore.copy("memory", everything=True)
        states = [state async for state in handle.watch()]
        assert states[-1].changed == 3
        assert (await handle.cancel()).state == v1.Operation.STATE_DONE
        first = await anext(events)
        assert first.removed.reason == "moved"
        whole = kvstore.watch_events(namespace().digest.hex(), snapshot=True)
        assert not (await anext(whole)).snapshot.complete
        assert len((await anext(whole)).stored.block_hashes) == 3
        whole.close()
        events.close()
        assert all([event.sequence > first.sequence async for event in events])
        with pytest.raises(RequestRefused) as caught:
            await kvstore.lookup("ffffff", tokens=[1])
        assert caught.value.reason == "NAMESPACE_UNKNOWN"
        served.kill()
        with pytest.raises(StoreUnavailable):
            await kvstore.stats()
        with pytest.raises(StoreUnavailable):
            await anext(kvstore.watch_events())


def test_refusals_name_the_field_and_the_remedy(served: Served) -> None:
    with Orchestrator(at(served), timeout=PATIENCE) as kvstore:
        with pytest.raises(RequestRefused, match="ListNamespaces") as caught:
            kvstore.lookup("ffffff", tokens=[1])
        assert (caught.value.reason, caught.value.field) == ("NAMESPACE_UNKNOWN", "")
        with pytest.raises(RequestRefused, match="use one of raw") as caught:
            kvstore.compress("zip", everything=True)
        assert (caught.value.reason, caught.value.field) == ("BAD_FIELD", "codec")
        assert isinstance(caught.value, KVStoreError)
        assert isinstance(caught.value, ValueError)
        with pytest.raises(RequestRefused):
            list(kvstore.watch("1-1"))


def test_tokens(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = write_tokens(
        stores.folder, {"name": "reader", "role": "read"}, {"name": "boss", "role": "admin"}
    )
    served = stores.serve("2MiB", server={"grpc": "127.0.0.1:0", "tokens": tokens})
    address = served.addresses["grpc"]
    for token in (None, "wrong" * 8):
        with (
            Orchestrator(address, token=token, timeout=PATIENCE) as kvstore,
            pytest.raises(AccessDenied),
        ):
            kvstore.stats()
    with Orchestrator(address, token=secret("reader"), timeout=PATIENCE) as kvstore:
        assert kvstore.stats().objects == 0
        with pytest.raises(AccessDenied, match="role write"):
            kvstore.set_ttl(5, everything=True)
    file = stores.folder / "token"
    file.write_text(secret("boss") + "\n")
    config = load_config(overrides={"session": {"token_file": str(file)}})
    with Orchestrator(address, config=config, timeout=PATIENCE) as kvstore:
        assert kvstore.set_admission({"memory": "none"}).rules["memory"] == "none"
    monkeypatch.setenv("KVSTORE_TOKEN", secret("reader"))
    with Orchestrator(address, timeout=PATIENCE) as kvstore, pytest.raises(AccessDenied):
        kvstore.set_admission({"memory": "all"})


def test_tls_from_the_configuration(stores: Stores) -> None:
    authority = Authority(stores.folder)
    host, client = authority.issue("server"), authority.issue("client")
    server = {
        "grpc": "127.0.0.1:0",
        "tls_cert": str(host.cert),
        "tls_key": str(host.key),
        "tls_client_ca": str(authority.path),
    }
    served = stores.serve("2MiB", server=server)
    session = {"tls_ca": str(authority.path)}
    with_cert = session | {"tls_cert": str(client.cert), "tls_key": str(client.key)}
    address = served.addresses["grpc"]
    for where in (address, f"grpcs://{address}"):
        config = load_config(overrides={"session": with_cert})
        with Orchestrator(where, config=config, timeout=PATIENCE) as kvstore:
            assert kvstore.stats().objects == 0
    for settings, where in ((session, address), (with_cert, f"grpc://{address}"), ({}, address)):
        config = load_config(overrides={"session": settings})
        with (
            Orchestrator(where, config=config, timeout=PATIENCE) as kvstore,
            pytest.raises(StoreUnavailable, match=address),
        ):
            kvstore.stats()


def test_nobody_there(stores: Stores) -> None:
    path = stores.folder / "nobody.sock"
    with Orchestrator(f"unix://{path}", timeout=PATIENCE) as kvstore:
        with pytest.raises(StoreUnavailable, match=f"no daemon answers at {path}"):
            kvstore.stats()
        with pytest.raises(StoreUnavailable):
            next(kvstore.watch_events())


def test_something_else_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with Orchestrator(address, timeout=0.3) as kvstore, pytest.raises(StoreUnavailable):
            kvstore.stats()


def test_a_daemon_that_hangs_costs_the_timeout_and_no_more(served: Served) -> None:
    with Orchestrator(at(served), timeout=PATIENCE) as kvstore:
        assert kvstore.stats().objects == 3
        served.signal(signal.SIGSTOP)
        try:
            kvstore.timeout = 0.3
            started = time.monotonic()
            with pytest.raises(StoreUnavailable, match=r"within 0\.3 s"):
                kvstore.stats()
            assert time.monotonic() - started < PATIENCE / 2
        finally:
            served.signal(signal.SIGCONT)
        kvstore.timeout = PATIENCE
        assert kvstore.stats().objects == 3


def test_a_client_finds_a_daemon_that_was_started_again(served: Served) -> None:
    with Orchestrator(at(served), timeout=PATIENCE) as kvstore:
        assert kvstore.stats().objects == 3
        served.stop()
        with pytest.raises(StoreUnavailable):
            kvstore.stats()
        served.restart()

        def answers() -> bool:
            try:
                return kvstore.stats().objects == 3
            except StoreUnavailable:
                return False

        eventually(answers)
