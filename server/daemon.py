"""The node daemon: one event loop that owns the store and serves sessions on a unix socket."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import logging
import os
import resource
import socket
import struct
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvstore.config import Config, ServerConfig, format_size
from kvstore.errors import ConfigError, KVStoreError, NotNow
from kvstore.files import make_way, open_own
from kvstore.memory.arena import Arena
from kvstore.memory.slots import slot_policy
from kvstore.server.access.access import LOCAL, Access, Denied, Grant, Role
from kvstore.server.access.group import group_id, is_member, share
from kvstore.server.listeners import bind, clear
from kvstore.server.node import Face, Node
from kvstore.server.notify import notify
from kvstore.server.process import end_after, exit_code, heed_signals
from kvstore.server.sessions.greeting import Greeting, Newcomers, admit, welcome
from kvstore.server.sessions.session import Peer, SessionConnection
from kvstore.server.steps import Steps
from kvstore.server.tasks import hear_threads, run
from kvstore.store.admission import Admission
from kvstore.store.store import Store
from kvstore.store.tiering import OpenDisk
from kvstore.store.usage import Quota
from kvstore.telemetry import LineFormatter
from kvstore.transport import protocol
from kvstore.transport.protocol import Hello

if TYPE_CHECKING:
    from kvstore.server.http.admin import AdminFace

_TICK: Final = 0.5
_LOCK_POLL: Final = 0.05
_FIRST_SESSION_SECONDS: Final = 30.0
_PREDECESSOR_SECONDS: Final = 30.0
_CLOSING_PART: Final = 0.1
"""Of the time to stop, for all that comes after the writes."""
_PEER: Final = struct.Struct("3i")

_log = logging.getLogger("kvstore.daemon")

Ready = Callable[[list[str], str | None], None]


class _StoppedEarly(Exception):
    """Told to stop before there was anything to serve."""


class Daemon:
    """Serves one store on `path` until told to stop.

    Args:
        config: what to serve.
        path: the socket; its folder must exist.
        steps: what its loop waits with.
        embedded: end once the last session has left.
        progress: told (done, total) bytes while the arena is touched.
    """

    def __init__(
        self,
        config: Config,
        path: Path,
        steps: Steps,
        *,
        embedded: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.path = path
        if embedded:  # It listens nowhere but beside its socket, whatever the engine's file says.
            server = ServerConfig(grpc=None, http=None)
            config = config.model_copy(update={"address": f"unix://{path}", "server": server})
        self._config = config
        self._steps = steps
        self._embedded = embedded
        self._progress = progress
        self._newcomers = Newcomers()
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._until: float | None = None
        self._group: int | None = None
        self._lock = -1
        self._http: AdminFace | None = None
        self._arena: Arena | None = None
        self._node: Node | None = None

    async def run(self, ready: Ready) -> None:
        """Open everything, call `ready`, serve, and on `stop` put everything away.

        `ready` is told where the daemon listens besides its socket, and what ails the disk.

        Raises:
            ConfigError: another daemon serves there, or the configuration cannot be had.
        """
        server = self._config.server
        access = Access.load(server)
        self._group = None if server.group is None else group_id(server.group)
        await self._take_lock()
        http = self._http = self._http_face(access)
        try:
            listener = self._bind()
            try:
                if http is not None:  # Before all else: it tells those who probe that we warm up.
                    await http.start()
                # In a thread, so that a signal is heard: much memory takes long to touch.
                arena = self._arena = await asyncio.to_thread(self._make_arena)
                node = self._node = Node(
                    self._config, await self._open_store(arena), access, self._steps, self.stop
                )
                # Goes on while the writes are waited for.
                counters = node.store.counters
                upkeep = [
                    run("upkeep", lambda: self._tick(node.store), counters, again=True),
                    run("following the tokens", node.follow_tokens, counters, again=True),
                ]
                await self._serve(node, arena, listener, ready)
            finally:
                self._hang_up(listener)
            assert self._until is not None
            spare = _CLOSING_PART * self._config.server.stop_timeout
            await node.drain(self._until - time.monotonic() - spare)
            self._say_what_is_lost()
            for task in upkeep:
                task.cancel()
            for session in list(node.sessions.values()):
                session.close()
            await asyncio.to_thread(node.store.close)
        finally:
            if http is not None:  # Last of all: probes and metrics see the draining.
                await http.stop()
            if self._arena is not None:
                self._arena.unlink()
            os.close(self._lock)

    def _make_arena(self) -> Arena:
        memory = self._config.memory
        arena = Arena.create(
            memory.size,
            huge_dir=memory.huge_dir,
            path=memory.path,
            prefault=memory.prefault,
            private=self._embedded,
            progress=self._touched,
        )
        advice = arena.advice()
        if advice is not None:
            _log.info(advice)
        return arena

    async def _open_store(self, arena: Arena) -> Store:
        memory, disk = self._config.memory, self._config.disk
        # In a thread as well: the disk tier reads what it held.
        store = await asyncio.to_thread(
            Store,
            arena,
            lambda task: _post(self._loop, task),
            chunk=min(memory.chunk, arena.size),  # A private arena may be smaller than configured.
            policy=memory.policy,
            lease_seconds=self._config.lease_seconds,
            open_disk=disk_opener(self._config, direct=arena.huge),
            write_queue=disk.queue,
            retry_seconds=disk.retry_seconds,
            max_pinned=memory.max_pinned,
        )
        store.admission = Admission(**self._config.admission.model_dump())
        for tenant, quota in self._config.quotas.items():
            store.set_quota(tenant, Quota(quota.memory, quota.disk))
        return store

    async def _serve(self, node: Node, arena: Arena, listener: socket.socket, ready: Ready) -> None:
        """Serve until told to stop."""
        hear_threads(node.store.counters)
        welcome = partial(self._welcome, node, arena)
        accepting = await self._loop.create_unix_server(
            partial(Greeting, node, self._newcomers, "session", "", welcome), sock=listener
        )
        faces: list[Face] = []
        try:
            if not self._embedded:
                await node.open_control()
            for face in self._faces(node):
                await face.start()
                faces.append(face)
            node.ready = True
            if self._http is not None:
                self._http.attach(node)
            listening = [face for face in (self._http, node.control, *faces) if face is not None]
            addresses = [address for face in listening for address in face.addresses]
            ready(addresses, node.store.tiering.disk_problem)
            if not self._embedded:  # What we inherited would be the engine's.
                notify("READY=1")
            await self._stop.wait()
            if not self._embedded:
                notify("STOPPING=1")
        finally:
            node.ready = False
            accepting.close()
            self._hang_up(listener)
            for face in reversed(faces):
                await face.stop()
            if node.control is not None:
                await node.control.stop()

    def _hang_up(self, listener: socket.socket) -> None:
        listener.close()
        with contextlib.suppress(OSError):  # Somebody put something else there.
            make_way(self.path)

    def stop(self) -> None:
        """Ask `run` to end, and see that the process does within `server.stop_timeout`.

        For any thread.
        """
        if self._until is None:
            self._until = time.monotonic() + self._config.server.stop_timeout
            end_after(self._config.server.stop_timeout, self._give_up)
        _post(self._loop, self._stop.set)

    def reload(self) -> None:
        """Read again what may change while we run; for any thread."""
        if self._node is not None:
            _post(self._loop, self._node.access.forget)

    def _say_what_is_lost(self) -> None:
        if self._node is None or not self._node.store.tiering.unwritten:
            return
        tiering = self._node.store.tiering
        why = tiering.disk_problem if tiering.disk is None else tiering.disk.problem
        _log.warning(
            "%d objects (%s) did not reach the disk before the stop: %s",
            tiering.unwritten,
            format_size(tiering.writes.wanted_bytes),
            why or f"server.stop_timeout is {self._config.server.stop_timeout:g} s",
        )

    def _give_up(self) -> None:
        """The end did not come in time, because of a disk that hangs most likely."""
        if self._arena is not None:
            self._arena.unlink()
        _log.warning("server.stop_timeout has passed: the process ends as it is")
        self._say_what_is_lost()

    def _faces(self, node: Node) -> list[Face]:
        """The ways in besides the sockets."""
        if self._config.server.tcp is None:
            return []
        from kvstore.server.sessions.streams import StreamFace

        return [StreamFace(node)]

    def _http_face(self, access: Access) -> AdminFace | None:
        if self._config.server.http is None:
            return None
        from kvstore.server.http.admin import AdminFace

        return AdminFace(self._config, access)

    def _touched(self, done: int, total: int) -> None:
        if self._stop.is_set():
            raise _StoppedEarly
        if self._http is not None:
            self._http.touched = done / total
        if self._progress is not None:
            self._progress(done, total)

    async def _take_lock(self) -> None:
        """One daemon per socket; the lock ends with the process, however it ends.

        An embedded daemon waits for one before it that is still writing to disk, but not for one
        that serves.
        """
        path = self.path.with_name(self.path.name + ".lock")
        try:
            self._lock = open_own(path, os.O_RDWR)
        except OSError as e:
            raise ConfigError(f"cannot write {path}: {e.strerror}; choose another socket") from e
        loop = asyncio.get_running_loop()
        until = loop.time() + (_PREDECESSOR_SECONDS if self._embedded else 0.0)
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if loop.time() < until and not self._answers():
                    await asyncio.sleep(_LOCK_POLL)
                    continue
                holder = os.read(self._lock, 32).decode(errors="replace").strip()
                os.close(self._lock)
                raise NotNow(
                    f"a daemon (pid {holder or '?'}) serves {self.path} already; stop it or choose "
                    "another socket"
                ) from None
        os.truncate(self._lock, 0)
        os.write(self._lock, f"{os.getpid()}\n".encode())

    def _answers(self) -> bool:
        """Whether somebody listens on our socket."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
            probe.setblocking(False)
            return probe.connect_ex(str(self.path)) == 0

    def _bind(self) -> socket.socket:
        """Take our socket, which refuses callers yet, and see that the other places can be had."""
        clear(self.path)
        if not self._embedded:
            clear(self._config.control_socket)
        with contextlib.ExitStack() as probes:
            for key in ("grpc", "tcp"):
                if (address := getattr(self._config.server, key)) is not None:
                    for probe in bind(f"server.{key}", address):
                        probes.enter_context(probe)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        mask = os.umask(0o177)
        try:
            listener.bind(str(self.path))
        except OSError as e:
            raise ConfigError(f"cannot listen on {self.path}: {e}; choose another socket") from e
        finally:
            os.umask(mask)
        if self._group is not None:
            share(self.path, self._group)
        return listener

    def _welcome(
        self, node: Node, arena: Arena, hello: Hello, request_id: int, transport: asyncio.Transport
    ) -> SessionConnection:
        """Hand over the arena, and serve from then on; a `Welcomer`."""
        with socket.socket(
            fileno=os.dup(transport.get_extra_info("socket").fileno())
        ) as connection:
            peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
            pid, uid, gid = _PEER.unpack(peer)
            member = self._group is not None and is_member(connection, self._group, gid)
            grant = admit(node, hello, self._trusted(node.access, uid, member), here=True)
            number = next(node.numbers)
            reply = welcome(node, hello, number)
            reply.arena_path = "" if arena.path is None else str(arena.path)
            reply.arena_inode = arena.inode
            socket.send_fds(connection, [protocol.encode(request_id, reply)], [arena.fd])
        client = Peer(number, "unix", pid, hello.software, hello.features)
        session = node.sessions[number] = SessionConnection(node, client, grant, self._left)
        return session

    def _trusted(self, access: Access, uid: int, member: bool) -> Grant | None:
        """What a process of user `uid` may do without a token; None: nothing.

        `member`: it belongs to the configured group.

        Raises:
            Denied: not even with one.
        """
        if uid in (os.getuid(), 0):
            return LOCAL
        if not member:
            raise Denied(
                "user",
                f"user {uid} may not use the store of user {os.getuid()}; share it with a group "
                "(server.group)",
            )
        return None if access.has_tokens else Grant(f"user {uid}", Role.WRITE)

    def _left(self, session: SessionConnection) -> None:
        assert self._node is not None
        del self._node.sessions[session.peer.session]
        if self._embedded and not self._node.sessions:
            self._loop.call_later(self._config.linger_seconds, self._stop_if_alone)

    def _stop_if_alone(self) -> None:
        if self._node is not None and not self._node.sessions and not self._newcomers:
            self.stop()

    async def _tick(self, store: Store) -> None:
        if self._embedded:
            self._loop.call_later(_FIRST_SESSION_SECONDS, self._stop_if_alone)
        while True:
            store.tick()
            await asyncio.sleep(_TICK)


def _post(loop: asyncio.AbstractEventLoop, task: Callable[[], None]) -> None:
    with contextlib.suppress(RuntimeError):  # The loop is closed: nobody is left to tell.
        loop.call_soon_threadsafe(task)


def disk_opener(config: Config, *, direct: bool) -> OpenDisk | None:
    """What opens the configured disk tier; None when there is none."""
    disk = config.disk
    if disk.path is None:
        return None
    from kvstore.tiers.slab.tier import DiskTier

    return partial(
        DiskTier.open,
        disk.path,
        disk.size,
        chunk=disk.chunk,
        policy=slot_policy(disk.policy),
        threads=disk.threads,
        sync_seconds=disk.sync_seconds,
        retry_seconds=disk.retry_seconds,
        direct_to_arena=direct,
    )


def serve(
    config: Config,
    path: Path,
    *,
    embedded: bool = False,
    ready: Ready = lambda *_: None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Run a daemon in this process until it is told to stop (or, embedded, until it is alone).

    Raises:
        ConfigError: see `Daemon.run`.
    """

    # Every connection takes a descriptor, and the customary 1,024 are few.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    steps = Steps()

    async def main() -> None:
        daemon = Daemon(config, path, steps, embedded=embedded, progress=progress)
        heed_signals(daemon.stop, daemon.stop if embedded else daemon.reload)
        with contextlib.suppress(_StoppedEarly):
            await daemon.run(ready)

    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(steps)) as runner:
        runner.run(main())


def describe(config: Config, problem: str | None) -> str:
    """One line on what a daemon of this configuration offers. `problem`: why it has no disk."""
    disk = "no disk tier" if problem is None else f"no disk tier: {problem}"
    if config.disk.path is not None and problem is None:
        disk = f"disk {format_size(config.disk.size)} in {config.disk.path}"
    return f"memory {format_size(config.memory.size)}, {disk}"


def start_logging(level: str) -> None:
    """Log lines to stderr."""
    # gRPC's core writes a line to stderr for every malformed header that anybody sends.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler])


def main() -> None:
    """Entry of the embedded daemon: configuration as JSON on stdin."""
    parser = argparse.ArgumentParser(prog="kvstore.server.daemon")
    parser.add_argument("--embedded", type=Path, required=True, metavar="SOCKET")
    parser.add_argument("--ready-fd", type=int, required=True)
    arguments = parser.parse_args()
    try:
        config = Config.model_validate_json(sys.stdin.readline())
        start_logging(config.log_level)

        def ready(*_: object) -> None:
            with contextlib.suppress(BrokenPipeError):  # The starter died; others will join.
                os.write(arguments.ready_fd, b"1")
            os.close(arguments.ready_fd)

        serve(config, arguments.embedded, embedded=True, ready=ready)
    except (KVStoreError, ValueError) as e:
        print(e, file=sys.stderr)
        sys.exit(exit_code(e))


if __name__ == "__main__":
    main()
