"""Who may call what: roles, tenants as walls, TLS, the socket's mode, and what may be opened."""

from __future__ import annotations

import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, Final

import grpc
import pytest

from kvstore.api.client import Orchestrator
from kvstore.errors import StoreUnavailable
from tests.certificates import Authority
from tests.control_tools import Api, by_keys, by_tokens, secret, write_tokens
from tests.session_tools import PATIENCE, Served, Stores, namespace, prompt, save

ROLES: Final = ("read", "write", "admin")
MINE: Final = namespace("mine").digest.hex()
THEIRS: Final = namespace("theirs").digest.hex()
ALL: Final = {"everything": True}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """A daemon with a token per role, and others that see only the tenant `mine`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("KVSTORE_CONFIG", raising=False)
        stores = Stores()
        entries = [{"name": role, "role": role} for role in ROLES]
        entries += [{"name": f"my-{r}", "role": r, "tenants": ["mine"]} for r in ROLES]  # type: ignore[dict-item]
        tokens = write_tokens(stores.folder, *entries)
        server = {"grpc": "127.0.0.1:0", "tokens": tokens}
        yield stores.serve("8MiB", "16MiB", server=server)
        stores.close()


def by(served: Served, name: str) -> Api:
    return Api(served, secret(name), tcp=True)


@pytest.mark.parametrize("value", ["Basic abc", "Bearer", "nonsense"])
def test_another_form_of_authorization_is_refused(served: Served, value: str) -> None:
    with Api(served, tcp=True) as api:
        api._metadata = (("authorization", value),)
        assert api.refused("Stats")[:2] == ("UNAUTHENTICATED", "TOKEN_MISSING")


def test_on_the_socket_no_token_is_needed_but_one_that_is_shown_counts(served: Served) -> None:
    with Api(served) as local, Api(served, secret("read")) as reader, Api(served, "x" * 40) as bad:
        assert local.call("Stats").counters is not None
        assert reader.refused("Clear", selection=ALL).code == "PERMISSION_DENIED"
        assert bad.refused("Stats")[:2] == ("UNAUTHENTICATED", "TOKEN_UNKNOWN")


class Tenants:
    """Two tenants with three blocks each, sessions open; `mine` sees with the token my-admin."""

    def __init__(self, served: Served) -> None:
        self.sessions = [served.session(tenant=tenant) for tenant in ("mine", "theirs")]
        self.my_keys, self.their_keys = (s.keys(prompt(5, 3)) for s in self.sessions)
        for session, keys in zip(self.sessions, (self.my_keys, self.their_keys), strict=True):
            save(session, keys)
            session.flush()
        self.api = by(served, "my-admin")
        self.all = Api(served)

    def close(self) -> None:
        self.all.finished(self.all.call("Clear", selection=ALL))
        for one in (self.api, self.all, *self.sessions):
            one.close()


@pytest.fixture
def tenants(served: Served) -> Iterator[Tenants]:
    made = Tenants(served)
    yield made
    made.close()


def test_keys_of_others_tell_and_do_nothing(tenants: Tenants) -> None:
    """Whoever knows a key of another tenant cannot use it under a namespace of his own."""
    api = tenants.api
    prefix = by_keys(list(tenants.their_keys), MINE)
    found = api.call("Lookup", prefix=prefix)
    assert (found.blocks, found.reason) == (0, "never_stored")
    block = api.call("Explain", prefix=prefix).blocks[0]
    assert (block.usable, block.tier) == (False, "")
    assert THEIRS[:8] not in block.detail
    assert api.call("Pin", prefix=prefix, ttl={"seconds": 60}, owner="me").blocks == 0
    assert api.finished(api.call("Clear", selection={"prefix": prefix})).total == 0
    assert api.finished(api.call("Prefetch", prefix=prefix)).total == 0
    tenants.all.finished(tenants.all.call("Clear", selection={"namespace_id": THEIRS}))
    (first, *_) = api.call("Explain", prefix=prefix).blocks
    assert first.reason == "never_stored"
    told = tenants.all.call("Explain", prefix=by_tokens(prompt(5, 3), THEIRS)).blocks[0]
    assert told.reason == "cleared"


def test_lists_and_counts_show_only_ones_own(tenants: Tenants) -> None:
    api, everything = tenants.api, tenants.all
    for key_list, where in ((tenants.my_keys, MINE), (tenants.their_keys, THEIRS)):
        prefix = by_keys(list(key_list), where)
        assert everything.call("Pin", prefix=prefix, ttl={"seconds": 60}, owner="ops").blocks == 3
    assert [lease.blocks for lease in api.call("ListLeases").leases] == [3]
    assert len(everything.call("ListLeases").leases) == 2
    (known,) = api.call("ListSessions").sessions
    assert list(known.namespace_ids) == [MINE]
    assert len(everything.call("ListSessions").sessions) == 2
    stats = api.call("Stats")
    assert (stats.objects, stats.leases, stats.sessions) == (3, 1, 1)
    assert not stats.counters
    assert stats.tiers[0].used_bytes == stats.tiers[0].pinned_bytes == 3 * 4096
    assert [q.tenant for q in api.call("GetQuota").quotas] == ["mine"]
    (theirs,) = [p for p in everything.call("ListLeases").leases if p.id not in _ids(api)]
    assert api.refused("Unpin", id=theirs.id)[:2] == ("NOT_FOUND", "PIN_UNKNOWN")
    assert api.call("Unpin", owner="ops").pins == 1
    assert everything.call("Unpin", owner="ops").pins == 1
    everything.call("SetAdmission", denied={"tenants": ["theirs"]})
    assert list(api.call("GetAdmission").denied_tenants) == []
    everything.call("SetAdmission", denied={})


def _ids(api: Api) -> set[str]:
    return {lease.id for lease in api.call("ListLeases").leases}


def test_operations_reach_only_ones_own(served: Served, tenants: Tenants) -> None:
    cleared = tenants.api.finished(tenants.api.call("Clear", selection=ALL))
    assert (cleared.total, cleared.changed) == (3, 3)
    assert tenants.sessions[1].lookup(tenants.their_keys).blocks == 3
    with by(served, "my-write") as writer:
        assert writer.finished(writer.call("Clear", selection=ALL)).total == 0
    with by(served, "write") as writer:
        told = writer.refused("Clear", selection=ALL)
        assert told[:2] == ("PERMISSION_DENIED", "ROLE")
        assert "admin" in told.message
    theirs = tenants.all.call("Clear", selection={"tenant": "theirs"}, dry_run=True)
    for method in ("CheckFinish", "Watch", "Cancel"):
        told = tenants.api.refused(method, id=theirs.id)
        assert told[:2] == ("NOT_FOUND", "OPERATION_UNKNOWN")
    assert cleared.id in {o.id for o in tenants.api.call("ListOperations").operations}
    assert theirs.id not in {o.id for o in tenants.api.call("ListOperations").operations}
    for_mine = tenants.all.call("Clear", selection={"tenant": "mine"}, dry_run=True)
    assert tenants.api.call("CheckFinish", id=for_mine.id).id == for_mine.id
    with by(served, "my-write") as writer:
        assert writer.refused("Cancel", id=for_mine.id)[:2] == ("PERMISSION_DENIED", "ROLE")


def test_events_of_others_are_not_shown(tenants: Tenants) -> None:
    stream = tenants.api.call("WatchEvents")
    stream.initial_metadata()
    for session in reversed(tenants.sessions):
        save(session, session.keys(prompt(6, 1)))
    assert next(stream).stored.tenant == "mine"
    replay = tenants.api.call("WatchEvents", after=0)
    seen = [next(replay) for _ in range(3)]
    for event in seen:
        what = event.WhichOneof("what")
        assert what == "missed" or getattr(event, what).namespace_id == MINE
    for running in (stream, replay):
        running.cancel()


def test_tls_and_mutual_tls(stores: Stores) -> None:
    authority, other = Authority(stores.folder), Authority(stores.folder, "other")
    host, client = authority.issue("server"), authority.issue("client")
    server = {
        "grpc": "127.0.0.1:0",
        "tls_cert": str(host.cert),
        "tls_key": str(host.key),
        "tls_client_ca": str(authority.path),
        "tokens": write_tokens(stores.folder, {"name": "ops", "role": "admin"}),
    }
    served = stores.serve("2MiB", server=server)

    def credentials(trusted: Authority, identity: Any) -> grpc.ChannelCredentials:
        key, cert = (
            (identity.key.read_bytes(), identity.cert.read_bytes())
            if identity
            else (
                None,
                None,
            )
        )
        return grpc.ssl_channel_credentials(trusted.path.read_bytes(), key, cert)

    good = credentials(authority, client)
    with Api(served, secret("ops"), tcp=True, secure=good) as api:
        assert api.call("Stats").objects == 0
    with Api(served, tcp=True, secure=good) as api:
        assert api.refused("Stats").reason == "TOKEN_MISSING"
    for bad in (
        credentials(authority, None),
        credentials(other, client),
        credentials(authority, other.issue("stranger")),
        None,
    ):
        with Api(served, secret("ops"), tcp=True, secure=bad) as api:
            assert api.refused("Stats").code == "UNAVAILABLE"
    with (
        Orchestrator(served.addresses["grpc"]) as kvstore,
        pytest.raises(StoreUnavailable, match=r"if it speaks TLS, set session\.tls_ca"),
    ):
        kvstore.stats()


def serve(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvstore.server.cli", "serve", "--memory", "1MiB"]
    return subprocess.run(
        [*command, "--http", "none", *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def test_a_port_that_is_taken_is_named(stores: Stores) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        result = serve("--socket", f"{stores.folder}/a.sock", "--grpc", address)
    assert result.returncode == 1
    assert result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if "error: " in line]
    assert f"server.grpc: cannot listen on {address}" in line
    assert "--grpc none" in line
    assert not (stores.folder / "a.sock.control").exists()


def test_the_socket_is_for_its_user_alone_and_goes_with_the_daemon(stores: Stores) -> None:
    served = stores.serve("2MiB")
    path = served.socket.with_name("kvstore.sock.control")
    assert stat.S_ISSOCK(path.stat().st_mode)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    served.kill()
    assert path.exists(), "a killed daemon leaves it"
    served.restart()
    with Api(served) as api:
        assert api.call("Stats").objects == 0
    served.stop()
    assert not path.exists()


def test_a_path_too_long_for_the_second_socket_is_refused(stores: Stores) -> None:
    room = 107 - len(str(stores.folder)) - 1
    result = serve("--socket", f"{stores.folder}/{'x' * room}", "--grpc", "none")
    assert result.returncode == 1
    assert "too long" in result.stderr
    assert "choose another socket" in result.stderr
