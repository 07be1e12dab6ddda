"""Sessions of one process share a client: one connection for all tenants, one planner."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvstore.client.client import Client
from kvstore.client.session import Session
from kvstore.copier.base import Copy
from kvstore.copier.cpu import CpuCopier
from kvstore.errors import SpecError
from kvstore.transport import protocol
from tests.control_tools import Api
from tests.session_tools import (
    BIG,
    MIB,
    PART,
    PATIENCE,
    Served,
    Stores,
    back_again,
    eventually,
    load,
    namespace,
    no_leases,
    prompt,
    save,
    wide,
)
from tests.tcp_tools import TCP, tcp_config


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    stores = Stores()
    yield stores.serve("64MiB", **TCP)
    stores.close()


class Gated(CpuCopier):
    """A copier whose saves wait for `go`; `attached` counts the arenas it may copy to."""

    def __init__(self) -> None:
        super().__init__()
        self.go, self.begun = threading.Event(), threading.Event()
        self.attached = 0

    def attach(self, address: int, nbytes: int) -> None:
        self.attached += 1

    def detach(self, address: int) -> None:
        self.attached -= 1

    def copy(self, copy: Copy) -> list[int] | None:
        if copy.to_slots:
            self.begun.set()
            assert self.go.wait(PATIENCE)
        return super().copy(copy)


def opened(served: Served) -> list[int]:
    """Of every session that the daemon has: how many namespaces it has open."""
    return [len(session.namespace_ids) for session in Api(served).call("ListSessions").sessions]


@pytest.mark.parametrize("way", ["unix", "tcp"])
def test_65_tenants_are_one_client(served: Served, way: str) -> None:
    config = served.config() if way == "unix" else tcp_config(served)
    names = [f"{way} {number}" for number in range(65)]
    with ThreadPoolExecutor(8) as pool:  # Also if all begin at once.
        sessions = list(pool.map(lambda name: Session.open(namespace(name), [PART], config), names))
        assert opened(served) == [65]
        assert len({id(session._client) for session in sessions}) == 1
        keys = sessions[0].keys(prompt(1, 2))
        assert save(sessions[0], keys).stored == 2
        assert sessions[1].lookup(keys).blocks == 0, "tenants are walls"
        saved = pool.map(lambda session: save(session, session.keys(prompt(2, 2))), sessions[1:])
        assert {result.stored for result in saved} == {2}
    sessions[0].report_prefill(1_000_000, 1e-6)
    load(sessions[0], keys)
    assert sessions[9].plan(sessions[9].keys(prompt(2, 2))).reason == "recomputing is faster"
    for session in sessions[1:]:
        session.close()
    assert sessions[1].lookup(keys).reason == "unavailable"
    assert sessions[1].problem == "closed"
    assert load(sessions[0], keys).blocks == 2
    assert opened(served) == [1]
    sessions[0].close()
    eventually(lambda: opened(served) == [])


def test_tenants_may_come_and_go_for_ever(served: Served) -> None:
    """Closed or dropped: handles are used up otherwise."""
    config = served.config()
    with Session.open(namespace("stays"), [PART], config) as stays:
        for number in range(protocol.MAX_OPEN + 100):
            session = Session.open(namespace(f"guest {number}"), [PART], config)
            if number % 2:
                session.close()
        assert stays.problem is None
        del session
        gc.collect()
        Session.open(namespace("last"), [PART], config).close()
        assert opened(served) == [1]


def test_what_a_session_holds_ends_with_it_and_no_sooner(served: Served) -> None:
    config = served.config()
    with Session.open(namespace("a"), [PART], config) as stays:
        leaves = Session.open(namespace("b"), [PART], config)
        kept, left = (session.keys(prompt(3, 2)) for session in (stays, leaves))
        save(stays, kept)
        save(leaves, left)
        pin = stays.pin(kept)
        assert leaves.pin(left).blocks == 2
        released = leaves.pin(left)
        released.release()
        leases = served.stats()["leases"]
        leaves.close()
        assert served.stats()["leases"] == leases - 1
        released.release()
        pin.release()
        assert no_leases(served)


def test_a_session_that_is_closed_completes_what_it_is_doing(served: Served) -> None:
    """And only then lets go of its copier."""
    config, copier = served.config(), Gated()
    with Session.open(namespace("stays"), [BIG], config) as stays:
        leaves = Session.open(namespace("leaves"), [BIG], config, copier=copier)
        again = Session.open(namespace("again"), [BIG], config, copier=copier)
        assert copier.attached == 1
        keys = leaves.keys(prompt(4, 2))
        with ThreadPoolExecutor(1) as pool:
            saving = pool.submit(save, leaves, keys)
            assert copier.begun.wait(PATIENCE)
            leaves.close()
            again.close()
            assert copier.attached == 1
            copier.go.set()
            assert saving.result().stored == 2
        assert copier.attached == 0
        with Session.open(namespace("leaves"), [BIG], config) as reader:
            assert load(reader, keys).blocks == 2
        assert stays.problem is None


def test_all_come_back_with_one_connection_but_those_that_are_refused(stores: Stores) -> None:
    """A new daemon may not take what the old one did; the others do not suffer."""
    served = stores.serve({"size": "64MiB", "chunk": "16MiB"})
    huge = wide(8 * MIB)
    small = stores.serve({"size": "4MiB", "chunk": "1MiB"})
    client = Client(served.config())
    sessions = [Session.open(namespace(str(n)), [PART], client=client) for n in range(5)]
    with Session.open(namespace("huge"), [huge], client=client) as refused:
        served.kill()
        small.stop()
        served.socket.unlink(missing_ok=True)
        client.config = small.config()
        small.restart()
        back_again(sessions[0])
        assert all(session.problem is None for session in sessions)
        assert opened(small) == [5]
        assert "the store cannot serve this session" in (refused.problem or "")
        assert refused.lookup(refused.keys(prompt(1, 2))).reason == "unavailable"
        with pytest.raises(SpecError, match="the store cannot serve this session"):
            Session.open(namespace("more"), [huge], client=client)
        assert sessions[0].problem is None
    for session in sessions:
        session.close()


def test_other_configurations_are_other_clients(served: Served) -> None:
    with (
        Session.open(namespace("a"), [PART], served.config()) as one,
        Session.open(namespace("a"), [PART], served.config(checksum=True)) as other,
        Session.open(namespace("b"), [PART], served.config()) as same,
    ):
        assert one._client is same._client is not other._client
        assert sorted(opened(served)) == [1, 2]
