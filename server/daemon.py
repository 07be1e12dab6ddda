"""The node daemon: one event loop that owns the store and all ways to it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kvstore.config import Config
from kvstore.errors import KVStoreError, NoPackage, missing
from kvstore.memory.arena import Arena
from kvstore.sections import PeersConfig, ServerConfig
from kvstore.server.access.access import Access
from kvstore.server.handover import hand_over
from kvstore.server.listeners import bind, clear, make_folder, take_lock
from kvstore.server.loop import Steps, hear_threads, post, run
from kvstore.server.node import Face, Node
from kvstore.server.opening import make_arena, open_pool, open_store
from kvstore.server.process import end_after, exit_code, heed_signals, notify
from kvstore.server.publishing import Publishing
from kvstore.server.sessions.local import LocalFace
from kvstore.store.store import Store
from kvstore.telemetry import LineFormatter
from kvstore.values import format_size

if TYPE_CHECKING:
    from kvstore.server.http.admin import AdminFace

_TICK: Final = 0.5
_FIRST_SESSION_SECONDS: Final = 30.0
_PREDECESSOR_SECONDS: Final = 30.0
_COLLECT: Final = 2_000, 20, 1_000_000
"""When to look for garbage in circles: the old is looked at by `Node.collect_garbage`."""
_HANDING_PART: Final = 0.3
"""Of the time to stop, for peers to fetch what is here."""
_CLOSING_PART: Final = 0.1
"""Of the time to stop, for all that comes after the writes."""

_log = logging.getLogger("kvstore.daemon")

Ready = Callable[[list[str], Mapping[str, str]], None]


class _StoppedEarly(Exception):
    """Told to stop before there was anything to serve."""


class Daemon:
    """Serves one store on `path` until told to stop.

    Args:
        config: what to serve.
        path: the socket; the last folder on the way is made if it is missing.
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
        progress: Callable[[int, int], None],
    ) -> None:
        self.path = path
        if embedded:  # It listens nowhere but beside its socket, whatever the engine's file says.
            server = ServerConfig(grpc=None, http=None)
            alone = {"server": server, "peers": PeersConfig()}
            config = config.model_copy(update={"address": f"unix://{path}"} | alone)
        self._config = config
        self._steps = steps
        self._embedded = embedded
        self._progress = progress
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._until: float | None = None
        self._http: AdminFace | None = None
        self._local: LocalFace | None = None
        self._arena: Arena | None = None
        self._node: Node | None = None

    async def run(self, ready: Ready) -> None:
        """Open everything, call `ready`, serve, and on `stop` put everything away.

        `ready` is told where the daemon listens besides its socket, and what ails the disk.

        Raises:
            ConfigError: another daemon serves there, or the configuration cannot be had.
            NoPackage: the configuration asks for what a package is missing for.
        """
        server = self._config.server
        access = Access.load(server)
        make_folder(self.path.parent, server.group)
        async with contextlib.AsyncExitStack() as last:
            lock = await take_lock(self.path, _PREDECESSOR_SECONDS if self._embedded else 0.0)
            last.callback(os.close, lock)
            last.callback(self._unlink)
            if server.http is not None:
                self._open_http(access)
            if self._http is not None:
                # Until all else has ended: probes and metrics see the draining.
                last.push_async_callback(self._http.stop)
            self._probe_places()
            local = self._local = LocalFace(self.path, server.group)
            with contextlib.closing(local):
                if self._http is not None:  # Before all else: those who probe see the warm-up.
                    await self._http.start()
                # In threads, so that a signal is heard: much memory takes long to touch, and a
                # disk to read.
                arena = self._arena = await asyncio.to_thread(
                    make_arena, self._config, self._touched, private=self._embedded
                )
                pool = await asyncio.to_thread(open_pool, self._config, arena)
                store = await asyncio.to_thread(open_store, self._config, arena, self._loop, pool)
                node = self._node = Node(
                    self._config, store, access, self._steps, self.stop, pool, self._left
                )
                # Goes on while the writes are waited for.
                upkeep = [
                    run("upkeep", lambda: self._tick(store), store.counters, again=True),
                    run("following the tokens", node.follow_tokens, store.counters, again=True),
                    run("tracing", node.tracing.run, store.counters, again=True),
                ]
                if pool is not None:
                    node.publishing = Publishing(store, pool.directory, server.name)
                    upkeep.append(
                        run("publishing", node.publishing.run, store.counters, again=True)
                    )
                await self._serve(node, arena, local, ready)
            assert self._until is not None
            spare = _CLOSING_PART * server.stop_timeout
            await node.drain(self._until - time.monotonic() - spare)
            await node.tracing.write()
            self._say_what_is_lost()
            for task in upkeep:
                task.cancel()
            for session in list(node.sessions.values()):
                session.close()
            await asyncio.to_thread(node.store.close)
            if pool is not None:
                await asyncio.to_thread(pool.close)
            _log.info("stopped in order")

    async def _serve(self, node: Node, arena: Arena, local: LocalFace, ready: Ready) -> None:
        """Serve until told to stop."""
        hear_threads(node.store.counters)
        await local.open(node, arena)
        faces: list[Face] = []
        try:
            if not self._embedded:
                try:
                    await node.open_control()
                except NoPackage as e:
                    self._do_without("grpc", e)
            if self._config.server.tcp is not None:
                from kvstore.server.sessions.streams import StreamFace

                streams = StreamFace(node)
                await streams.start()
                faces.append(streams)
            self._steps.forget()
            gc.freeze()  # What is loaded stays, and need not be walked through again and again.
            gc.set_threshold(*_COLLECT)
            node.ready = True
            if self._http is not None:
                self._http.attach(node)
            listening = [face for face in (self._http, node.control, *faces) if face is not None]
            addresses = [address for face in listening for address in face.addresses]
            ready(addresses, node.store.movement.away)
            if not self._embedded:  # What we inherited would be the engine's.
                notify("READY=1")
            await self._stop.wait()
            if not self._embedded:
                notify("STOPPING=1")
            if node.pool is not None and not node.draining:  # Else it has done so.
                node.ready, node.store.draining = False, True
                await hand_over(node, _HANDING_PART * self._config.server.stop_timeout)
        finally:
            node.ready = False
            local.close()
            for face in (*faces, node.control):
                if face is not None:
                    await face.stop()

    def stop(self) -> None:
        """Ask `run` to end, and see that the process does within `server.stop_timeout`.

        For any thread.
        """
        if self._until is None:
            self._until = time.monotonic() + self._config.server.stop_timeout
            end_after(self._config.server.stop_timeout, self._give_up)
        post(self._loop, self._stop.set)

    def reload(self) -> None:
        """Read again what may change while we run; for any thread."""
        if self._node is not None:
            post(self._loop, self._node.access.forget)

    def _say_what_is_lost(self) -> None:
        if self._node is None or not self._node.store.movement.unwritten:
            return
        movement = self._node.store.movement
        _log.warning(
            "%d objects (%s) were not written before the stop: %s",
            movement.unwritten,
            format_size(movement.catalogue.writes.nbytes),
            "; ".join(self._node.held_up())
            or f"server.stop_timeout is {self._config.server.stop_timeout:g} s",
        )

    def _give_up(self) -> None:
        """The end did not come in time, because of a disk that hangs most likely."""
        self._unlink()
        _log.warning("server.stop_timeout has passed: the process ends as it is")
        self._say_what_is_lost()

    def _unlink(self) -> None:
        if self._arena is not None:
            self._arena.unlink()

    def _touched(self, done: int, total: int) -> None:
        if self._stop.is_set():
            raise _StoppedEarly
        if self._http is not None:
            self._http.touched = done / total
        self._progress(done, total)

    def _probe_places(self) -> None:
        """See that the places beside our socket can be had."""
        if not self._embedded:
            clear(self._config.control_socket)
        with contextlib.ExitStack() as probes:
            for key in ("grpc", "tcp"):
                if (address := getattr(self._config.server, key)) is not None:
                    for probe in bind(f"server.{key}", address):
                        probes.enter_context(probe)

    def _open_http(self, access: Access) -> None:
        try:
            from kvstore.server.http.admin import AdminFace
        except ImportError as e:
            self._do_without("http", missing("HTTP", "server", e))
        else:
            self._http = AdminFace(self._config, access)

    def _do_without(self, key: str, why: NoPackage) -> None:
        """Sessions are served all the same, unless somebody has asked for what cannot be had."""
        server = self._config.server
        if key in server.model_fields_set and getattr(server, key) is not None:
            raise why
        _log.warning("%s; it is not served", why)

    def _left(self) -> None:
        """A session has."""
        if self._embedded and self._node is not None and not self._node.sessions:
            self._loop.call_later(self._config.linger_seconds, self._stop_if_alone)

    def _stop_if_alone(self) -> None:
        if self._node and self._local and not (self._node.sessions or self._local.greeting):
            self.stop()

    async def _tick(self, store: Store) -> None:
        if self._embedded:
            self._loop.call_later(_FIRST_SESSION_SECONDS, self._stop_if_alone)
        while True:
            store.tick()
            if self._node is not None:
                self._node.look_after()
            await asyncio.sleep(_TICK)


def serve(
    config: Config,
    path: Path,
    *,
    embedded: bool = False,
    ready: Ready = lambda *_: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
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


def describe(config: Config, away: Mapping[str, str]) -> str:
    """One line on what a daemon of this configuration offers. `away`: tiers it has not, and why."""
    told = [f"memory {format_size(config.memory.size)}"]
    for tier in config.below:
        if tier.name in away:
            told.append(f"no {tier.name} tier: {away[tier.name]}")
        elif tier.kind == "slab":
            size, path = tier.options["size"], tier.options["path"]
            told.append(f"{tier.name} {format_size(size)} in {path}")
        else:
            told.append(tier.name if tier.name == tier.kind else f"{tier.name} ({tier.kind})")
    return ", ".join(told if config.below else (*told, "no disk tier"))


def start_logging(level: str) -> None:
    """Log lines to stderr."""
    # gRPC's core writes a line to stderr for every malformed header that anybody sends.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler])


def main() -> None:
    """Entry of the embedded daemon: configuration as JSON on stdin."""
    _, _, path, _, ready_fd = sys.argv  # As `client.embedded` starts it: --embedded, --ready-fd.
    try:
        config = Config.model_validate_json(sys.stdin.readline())
        start_logging(config.log_level)

        def ready(*_: object) -> None:
            with contextlib.suppress(BrokenPipeError):  # The starter died; others will join.
                os.write(int(ready_fd), b"1")
            os.close(int(ready_fd))

        serve(config, Path(path), embedded=True, ready=ready)
    except (KVStoreError, ValueError) as e:
        print(e, file=sys.stderr)
        sys.exit(exit_code(e))


if __name__ == "__main__":
    main()
