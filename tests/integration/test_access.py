"""Tokens, tenants and the unix group, against a running daemon."""

from __future__ import annotations

import grp
import hashlib
import json
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from kvstore.api import connection
from kvstore.errors import StoreUnavailable
from kvstore.server.listeners import make_folder
from kvstore.transport import protocol
from kvstore.transport.channel import Channel
from kvstore.transport.protocol import Failure, Hello, Message, Open, Opened, Reply, Welcome
from kvstore.transport.sockets import frame_size
from tests.session_tools import (
    PART,
    PATIENCE,
    Served,
    Stores,
    back_again,
    load,
    namespace,
    prompt,
    save,
)

SECRETS: Final = {role: f"the-token-of-the-{role}-role" for role in ("read", "write", "admin")}
STRANGER: Final = 61_234
KEY: Final = b"k" * 32


def token_file(folder: Path, **limits: list[str]) -> str:
    """One token per role; `limits` gives tenants by role."""
    entries = [
        {"name": role, "role": role, "token": secret}
        | ({"tenants": limits[role]} if role in limits else {})
        for role, secret in SECRETS.items()
    ]
    path = folder / "tokens.yaml"
    path.touch(0o600)
    path.write_text(json.dumps({"tokens": entries}))
    return str(path)


class Wire:
    """A session spoken by hand."""

    def __init__(self, path: Path, token: str = "") -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(PATIENCE)
        self._socket.connect(str(path))
        self.greeting = self.ask(Hello(protocol.VERSION, "test", os.getpid(), token))

    def ask(self, message: Message) -> Reply:
        self._socket.sendall(protocol.encode(1, message))
        return self.hear()

    def hear(self) -> Reply:
        """What the daemon says next."""
        length, _ = frame_size(self._receive(protocol.HEADER.size))
        return protocol.decode_reply(self._receive(length))

    def refused(self, message: Message) -> str:
        """The reason why it was not done."""
        reply = self.ask(message)
        assert isinstance(reply, Failure), reply
        assert not reply.fatal
        return reply.reason

    def open(self, tenant: str) -> int:
        reply = self.ask(Open(namespace(tenant), (PART,)))
        assert isinstance(reply, Opened), reply
        return reply.handle

    def closed(self) -> bool:
        """Whether the daemon says no more, and has ended the connection."""
        return self._socket.recv(1) == b""

    def close(self) -> None:
        self._socket.close()

    def _receive(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = self._socket.recv(count - len(data))
            assert piece, "closed by the daemon"
            data += piece
        return data


# -- tokens and tenants -------------------------------------------------------------------------


def test_an_unknown_token_is_refused_even_from_the_own_user(stores: Stores) -> None:
    served = stores.serve(server={"tokens": token_file(stores.folder)})
    assert isinstance(Wire(served.socket).greeting, Welcome)
    for secret in SECRETS.values():
        assert isinstance(Wire(served.socket, secret).greeting, Welcome)
    greeting = Wire(served.socket, "some-other-token").greeting
    assert isinstance(greeting, Failure)
    assert greeting.fatal
    log = served.log.read_text()
    assert "not known here" in log
    assert "some-other-token" not in log


def test_a_token_that_reads_changes_nothing(stores: Stores) -> None:
    served = stores.serve(server={"tokens": token_file(stores.folder)})
    with served.session() as session:
        save(session, session.keys(prompt(1, 3)))
        keys = b"".join(session.keys(prompt(1, 3)))
        reader = Wire(served.socket, SECRETS["read"])
        handle = reader.open("")
        for request in (
            protocol.Reserve(handle, 1, KEY),
            protocol.Pin(handle, 1, keys, 60.0),
            protocol.Clear(handle),
        ):
            assert "needs the role write, 'read' has read" in reader.refused(request)
        found = reader.ask(protocol.Lookup(handle, keys))
        assert isinstance(found, protocol.Found)
        assert len(found.tiers) == 3
        assert session.stats()["leases"] == 0
        assert load(session, session.keys(prompt(1, 3))).blocks == 3


def test_a_token_limited_to_tenants_opens_no_other(stores: Stores) -> None:
    served = stores.serve(server={"tokens": token_file(stores.folder, write=["a", ""])})
    wire = Wire(served.socket, SECRETS["write"])
    assert wire.open("a") == 0
    assert wire.open("") == 1
    for tenant in ("b", "A", "a "):
        reason = wire.refused(Open(namespace(tenant), (PART,)))
        assert "'write' may not use the tenant" in reason


def test_keys_of_another_tenant_reach_nothing_of_it(stores: Stores) -> None:
    """A tenant's name and a prompt are no secrets: whoever knows both knows the keys."""
    tokens = token_file(stores.folder, write=["thief"])
    served = stores.serve(disk="8MiB", server={"tokens": tokens})
    with served.session(tenant="rich") as session:
        keys = session.keys(prompt(1, 4))
        assert save(session, keys[:2]).stored == 2
        joined = b"".join(keys)
        thief = Wire(served.socket, SECRETS["write"])
        handle = thief.open("thief")
        found = thief.ask(protocol.Lookup(handle, joined))
        assert isinstance(found, protocol.Found)
        assert found.tiers == b""
        assert found.reason == "absent"
        held = thief.ask(protocol.Acquire(handle, 1, joined, 1.0, 4))
        assert isinstance(held, protocol.Held)
        assert held.slots == b""
        for request in (
            protocol.Pin(handle, 2, joined, 60.0),
            protocol.Prefetch(handle, joined),
        ):
            assert thief.ask(request) == protocol.Count(0)
        # Nor does what it saves under such keys reach the other tenant.
        reserved = thief.ask(protocol.Reserve(handle, 3, joined))
        assert isinstance(reserved, protocol.Reserved)
        assert min(memoryview(reserved.slots).cast("q")) >= 0
        assert thief.ask(protocol.Commit(3)) == protocol.Committed(4, "")
        assert session.lookup(keys).blocks == 2
        assert load(session, keys).blocks == 2
        served.stop()
        served.restart()
        back_again(session)
        assert load(session, keys).blocks == 2
        thief = Wire(served.socket, SECRETS["write"])
        handle = thief.open("thief")
        assert thief.ask(protocol.Clear(handle)) == protocol.Count(4)
        assert load(session, keys).blocks == 2


def test_stats_of_a_session_name_no_tenant(stores: Stores) -> None:
    served = stores.serve(
        server={"tokens": token_file(stores.folder, read=["a"])},
        quotas={"rich-tenant": {"memory": "4MiB"}},
        admission={"denied_tenants": ["poor-tenant"]},
    )
    for tenant in ("rich-tenant", "poor-tenant"):
        with served.session(tenant=tenant) as session:
            save(session, session.keys(prompt(1, 3)))
            load(session, session.keys(prompt(1, 3)))
    reply = Wire(served.socket, SECRETS["read"]).ask(protocol.Stats())
    assert isinstance(reply, protocol.StatsReply)
    assert "tenant" not in reply.text


# -- the unix group -----------------------------------------------------------------------------

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")


def as_user(uid: int, gid: int, groups: list[int], what: Callable[[], str]) -> str:
    """What `what` returns in a forked process of that user; an exception as its text."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups(groups)
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
            said = what()
        except (OSError, AssertionError) as e:
            said = repr(e)
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said


def open_to_all(stores: Stores, served: Served) -> None:
    """Let other users reach the socket; its own mode is what counts then."""
    for folder in (stores.folder, served.folder):
        folder.chmod(0o755)


@pytest.fixture
def group() -> grp.struct_group:
    """Some group that is not ours."""
    return next(g for g in grp.getgrall() if g.gr_gid not in (0, *os.getgroups()))


@needs_root
def test_members_of_the_group_open_sessions_that_write(
    stores: Stores, group: grp.struct_group
) -> None:
    served = stores.serve(server={"group": group.gr_name})
    open_to_all(stores, served)
    found = served.socket.stat()
    assert (found.st_gid, stat.S_IMODE(found.st_mode)) == (group.gr_gid, 0o660)
    control = served.socket.with_name(served.socket.name + ".control")
    if control.exists():
        assert stat.S_IMODE(control.stat().st_mode) == 0o600

    def use() -> str:
        wire = Wire(served.socket)
        assert isinstance(wire.greeting, Welcome), wire.greeting
        reserved = wire.ask(protocol.Reserve(wire.open("any"), 1, KEY))
        return type(reserved).__name__

    assert as_user(STRANGER, STRANGER, [group.gr_gid], use) == "Reserved"
    assert as_user(STRANGER, group.gr_gid, [], use) == "Reserved"
    assert as_user(STRANGER, STRANGER, [], use).startswith("PermissionError")
    # Not even where the socket's mode lets a stranger through.
    served.socket.chmod(0o666)
    said = as_user(STRANGER, STRANGER, [], use)
    assert f"user {STRANGER} may not use the store" in said
    assert as_user(STRANGER, STRANGER, [group.gr_gid], use) == "Reserved"


@needs_root
def test_members_of_the_group_need_a_token_where_there_are_tokens(
    stores: Stores, group: grp.struct_group
) -> None:
    served = stores.serve(
        server={"group": group.gr_name, "tokens": token_file(stores.folder, read=["a"])}
    )
    open_to_all(stores, served)

    def use(token: str) -> Callable[[], str]:
        return lambda: repr(Wire(served.socket, token).greeting)

    def ask(token: str) -> str:
        return as_user(STRANGER, STRANGER, [group.gr_gid], use(token))

    assert "a token is needed" in ask("")
    assert "not known here" in ask("some-other-token")
    assert ask(SECRETS["read"]).startswith("Welcome(")


@needs_root
def test_without_a_group_other_users_stay_out(stores: Stores) -> None:
    served = stores.serve()
    open_to_all(stores, served)
    served.socket.chmod(0o666)
    said = as_user(STRANGER, STRANGER, [], lambda: repr(Wire(served.socket).greeting))
    assert f"user {STRANGER} may not use the store of user 0" in said


@needs_root
def test_who_may_not_use_a_socket_is_told_whose_it_is(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = stores.serve()
    monkeypatch.setattr(connection, "_first", 0)  # The child looks, but does not use gRPC.
    kvstore = connection.Target(str(served.socket), "", None, (), served.socket)

    def told(use: Callable[[], object]) -> str:
        def ask() -> str:
            with pytest.raises(StoreUnavailable) as raised:
                use()
            return str(raised.value)

        return as_user(STRANGER, STRANGER, [], ask)

    for place in (stores.folder, served.socket):
        for use in (kvstore.check, lambda: Channel.connect(served.socket, 1)):
            said = told(use)
            assert f"{place} belongs to user 0 and you are user {STRANGER}; have" in said
            assert "server.group" in said
        open_to_all(stores, served)


@needs_root
def test_the_last_folder_is_made_for_the_group(stores: Stores, group: grp.struct_group) -> None:
    for number, (name, owner, mode) in enumerate(
        ((None, 0, 0o700), (group.gr_name, group.gr_gid, 0o750))
    ):
        folder = stores.folder / str(number)
        make_folder(folder, name)
        found = folder.stat()
        assert (found.st_gid, stat.S_IMODE(found.st_mode)) == (owner, mode)
        folder.chmod(0o711)
        make_folder(folder, name)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o711, "what is there stays as it is"


def test_a_group_that_is_unknown_is_named(stores: Stores) -> None:
    said = serve_fails(stores.folder, "server: {group: no-such-group}")
    assert "server.group: there is no group 'no-such-group'" in said


@needs_root
def test_a_group_that_we_are_not_in_is_refused(stores: Stores, group: grp.struct_group) -> None:
    from kvstore.errors import ConfigError
    from kvstore.server.listeners import share

    path = stores.folder / "file"
    path.touch()
    stores.folder.chmod(0o755)
    os.chown(path, STRANGER, STRANGER)

    def give() -> str:
        try:
            share(path, group.gr_gid)
        except ConfigError as e:
            return str(e)
        return "given"

    assert "make the daemon's user a member" in as_user(STRANGER, STRANGER, [], give)
    assert as_user(STRANGER, STRANGER, [group.gr_gid], give) == "given"


# -- the command line ---------------------------------------------------------------------------


def serve_fails(folder: Path, config: str, *flags: str) -> str:
    """What `kvstore serve` says when it will not."""
    path = folder / "config.yaml"
    path.write_text(config)
    command = ["serve", "-c", str(path), "--socket", str(folder / "s"), "--memory", "1MiB"]
    ended = kvstore(*command, *flags)
    assert ended.returncode == 1, ended
    return ended.stderr


def kvstore(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvstore.server.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("face", ["grpc", "http", "tcp"])
def test_serve_refuses_to_listen_to_the_world_unprotected(stores: Stores, face: str) -> None:
    said = serve_fails(stores.folder, "", f"--{face}", "0.0.0.0:0")
    assert said.startswith(f"error: server.{face}: 0.0.0.0:0 can be reached from other machines")
    assert "Traceback" not in said


def test_serve_names_a_bad_token_file(stores: Stores) -> None:
    path = stores.folder / "tokens.yaml"
    path.write_text("tokens: []")
    path.chmod(0o644)
    assert "chmod 0600" in serve_fails(stores.folder, "", "--tokens", str(path))


def test_a_new_token_is_shown_once_and_its_entry_lets_it_in(stores: Stores) -> None:
    made = kvstore("token", "new", "--name", "engine", "--role", "write", "--tenant", "123")
    assert made.returncode == 0, made.stderr
    token = made.stdout.strip()
    assert len(token) == 43
    assert token not in made.stderr
    entries: Any = yaml.safe_load(made.stderr)
    assert entries == [
        {
            "name": "engine",
            "role": "write",
            "sha256": hashlib.sha256(token.encode()).hexdigest(),
            "tenants": ["123"],
        }
    ]
    path = stores.folder / "tokens.yaml"
    path.touch(0o600)
    path.write_text(yaml.safe_dump({"tokens": entries}))
    served = stores.serve(server={"tokens": str(path)})
    wire = Wire(served.socket, token)
    assert wire.open("123") == 0
    assert "may not use" in wire.refused(Open(namespace("124"), (PART,)))
    for wrong in (
        ("--name", "x", "--role", "owner"),
        ("--name", "", "--role", "read"),
        ("--name", "a\nb", "--role", "read"),
        ("--name", "x", "--role", "read", "--tenant", ""),
    ):
        refused = kvstore("token", "new", *wrong)
        assert (refused.returncode, refused.stdout) == (2, ""), wrong
