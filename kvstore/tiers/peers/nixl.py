"""Bytes between the arenas of two nodes by NIXL: RDMA where there is some, else what UCX offers.

NIXL and UCX may abort their process, and a transfer that was given up may still land. So they run
in helper processes, which map the arena: one is read from by peers, the other reads from theirs. A
transfer that does not end in time is ended with its process: nothing writes into the arena then.
Run as a program, this module is such a helper.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import mmap
import os
import select
import socket
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Sequence
from concurrent.futures import Future
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final, NamedTuple

import msgspec

from kvstore.errors import StoreUnavailable, missing
from kvstore.memory.arena import Arena
from kvstore.telemetry import shown

MAX_AGENT: Final = 1 << 16
"""Bytes that describe an agent."""
MAX_SPANS: Final = 2048
"""Spans of one read."""

_MAX_FRAME: Final = 192 << 10
_BUFFER: Final = 1 << 20
_PACKAGES: Final = ("nixl_cu13", "nixl_cu12", "nixl")
_START_SECONDS: Final = 20.0
_PAUSE: Final = 5e-5
_SERVING_PAUSE: Final = 1e-3
"""Takes 2 % of a processor, and a fifth of the speed where there is no RDMA."""


class Span(NamedTuple):
    """Bytes to be read: offsets in the peer's arena and in ours, and how many."""

    remote: int
    local: int
    nbytes: int


class Agent(NamedTuple):
    """What a peer needs to read from an arena: NIXL's description, and where the arena lies."""

    described: bytes
    address: int


class _Started(msgspec.Struct, tag=True):
    described: bytes
    address: int


class _Read(msgspec.Struct, tag=True):
    number: int
    agent: bytes
    spans: bytes


class _Ended(msgspec.Struct, tag=True):
    number: int
    error: str = ""


class Helper:
    """A process with an agent of its own, over the arena. Thread-safe.

    Args:
        arena: its descriptor.
        size: bytes of it.
        serves: peers read from it; else it reads from theirs.

    Raises:
        StoreUnavailable: it did not start; with its last words.
    """

    def __init__(self, arena: int, size: int, *, serves: bool) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
        self._socket = ours
        self._numbers = itertools.count()
        self._running: dict[int, Future[str]] = {}
        self._lock = threading.Lock()
        fds = [arena, theirs.fileno()]
        command = [sys.executable, "-m", __name__, *map(str, fds), str(size), str(int(serves))]
        with theirs:
            self._process = subprocess.Popen(
                command, pass_fds=fds, stdin=subprocess.DEVNULL, stdout=sys.stderr.fileno()
            )
        ours.settimeout(_START_SECONDS)
        try:
            started = msgspec.msgpack.decode(ours.recv(_MAX_FRAME), type=_Started | _Ended)
            if isinstance(started, _Ended):
                raise StoreUnavailable(f"peers.transport: NIXL does not start: {started.error}")
        except (OSError, msgspec.MsgspecError) as e:
            self.close()
            raise StoreUnavailable(f"peers.transport: NIXL's process does not start: {e}") from e
        except BaseException:
            self.close()
            raise
        ours.settimeout(None)
        self.agent: Final = Agent(started.described, started.address)
        threading.Thread(target=self._listen, name="kvstore-nixl", daemon=True).start()

    @property
    def alive(self) -> bool:
        """Whether its process runs."""
        return self._process.poll() is None

    def read(self, agent: Agent, spans: Sequence[Span], deadline: float) -> None:
        """Bring bytes from a peer's arena; when this returns, nothing writes into them any more.

        `deadline` is in monotonic seconds. Bytes may be wrong: the peer may have used their slots
        for something else.

        Raises:
            StoreUnavailable: not all have come. The process is ended then.
            ValueError: more than `MAX_SPANS`.
        """
        if len(spans) > MAX_SPANS:
            raise ValueError(f"{len(spans)} spans; give {MAX_SPANS} at most")
        number, ended = next(self._numbers), Future[str]()
        with self._lock:
            self._running[number] = ended
        there, here = agent.address, self.agent.address
        flat = array("Q")
        for span in spans:
            flat.extend((there + span.remote, here + span.local, span.nbytes))
        try:
            read = _Read(number, agent.described, flat.tobytes())
            self._socket.send(msgspec.msgpack.encode(read))
            error = ended.result(max(0.0, deadline - time.monotonic()))
        except (OSError, TimeoutError) as e:
            self.close()
            raise StoreUnavailable(f"a transfer by NIXL did not end in time ({e!r})") from e
        finally:
            with self._lock:
                self._running.pop(number, None)
        if error:  # What has failed by halves may still land.
            self.close()
            raise StoreUnavailable(f"NIXL: {error}")

    def close(self) -> None:
        """End the process. Blocks for a moment; whoever reads gets StoreUnavailable."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._process.kill()
        self._process.wait()

    def _listen(self) -> None:
        """Tell readers of the ends of their transfers."""
        with self._socket:
            with contextlib.suppress(OSError):
                while frame := self._socket.recv(_MAX_FRAME):
                    ended = msgspec.msgpack.decode(frame, type=_Ended)
                    with self._lock:
                        future = self._running.pop(ended.number, None)
                    if future is not None:
                        future.set_result(ended.error)
            self._process.kill()
            self._process.wait()  # Only now does nothing of it write any more.
            with self._lock:
                left = list(self._running.values())
                self._running.clear()
        for future in left:
            future.set_result("its process has ended")


class Helpers:
    """The two helpers of a daemon. One that has ended is started anew when it is needed.

    Thread-safe; all that starts one blocks for about a second.

    Raises:
        NoPackage: there is no NIXL.
    """

    def __init__(self, arena: Arena) -> None:
        if not any(map(find_spec, _PACKAGES)):
            raise missing("peers.transport: nixl", "nixl", ImportError("nixl"))
        self._arena = arena
        self._locks = {serves: threading.Lock() for serves in (True, False)}
        self._started: dict[bool, Helper] = {}
        self._closed = False

    @property
    def agent(self) -> Agent:
        """Of the one that peers read from, for a few seconds at least.

        Raises:
            StoreUnavailable: it does not start.
        """
        return self._helper(serves=True).agent

    def place(self, address: int) -> int:
        """The offset in the arena of an address in this process."""
        return address - self._arena.address

    def read(self, agent: Agent, spans: Sequence[Span], deadline: float) -> None:
        """See `Helper.read`."""
        self._helper(serves=False).read(agent, spans, deadline)

    def close(self) -> None:
        """End both. Blocks for a moment."""
        self._closed = True
        for lock in self._locks.values():
            with lock:
                for helper in self._started.values():
                    helper.close()

    def _helper(self, *, serves: bool) -> Helper:
        with self._locks[serves]:
            helper = self._started.get(serves)
            if helper is None or not helper.alive:
                if self._closed:
                    raise StoreUnavailable("NIXL's processes have been ended")
                helper = Helper(self._arena.fd, self._arena.size, serves=serves)
                self._started[serves] = helper
            return helper


class _Agent:
    """NIXL's agent in a helper."""

    def __init__(self, arena: int, size: int) -> None:
        package = import_module(next(filter(find_spec, _PACKAGES)))
        # Its own thread for progress would take all of a processor.
        config = package.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
        self._agent: Any = package.nixl_agent(
            f"kvstore-{os.getpid()}-{os.urandom(8).hex()}", config
        )
        self._memory = mmap.mmap(arena, size)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._agent.register_memory([(self.address, size, 0, "")], "DRAM")
        self._peers: dict[bytes, str] = {}
        self._running: dict[int, Any] = {}

    @property
    def described(self) -> bytes:
        described: bytes = self._agent.get_agent_metadata()
        return described

    @property
    def busy(self) -> bool:
        return bool(self._running)

    def begin(self, request: _Read) -> str | None:
        """Begin to read; "" or what is wrong, if that has ended already."""
        flat = array("Q", request.spans)
        remote, local = (
            self._agent.get_xfer_descs(list(zip(at, flat[2::3], itertools.repeat(0))), "DRAM")
            for at in (flat[0::3], flat[1::3])
        )
        try:
            if request.agent not in self._peers:
                name = self._agent.add_remote_agent(request.agent)
                self._peers[request.agent] = name.decode() if isinstance(name, bytes) else name
            peer = self._peers[request.agent]
            handle = self._agent.initialize_xfer("READ", local, remote, peer, b"")
            self._running[request.number] = handle
            state = self._agent.transfer(handle)
        except Exception as e:  # noqa: BLE001 - told to the daemon
            return self._end(request.number, e)
        return None if state == "PROC" else self._end(request.number, state)

    def ended(self) -> list[_Ended]:
        """Transfers that have ended since."""
        ended = []
        for number, handle in list(self._running.items()):
            try:
                state = self._agent.check_xfer_state(handle)
            except Exception as e:  # noqa: BLE001 - told to the daemon
                state = e
            if state != "PROC":
                ended.append(_Ended(number, self._end(number, state)))
        return ended

    def move_on(self) -> None:
        """Without RDMA, bytes only leave while somebody asks what is new."""
        self._agent.get_new_notifs()

    def _end(self, number: int, how: object) -> str:
        """Of a transfer; "" or what is wrong."""
        handle = self._running.pop(number, None)
        if how != "DONE":
            return shown(f"{type(how).__name__}: {how}")
        self._agent.release_xfer_handle(handle)
        return ""


def _serve(arena: int, orders: socket.socket, size: int, *, serves: bool) -> None:
    """The life of a helper: until the daemon ends, or closes its end."""

    def tell(message: msgspec.Struct) -> None:
        orders.send(msgspec.msgpack.encode(message))

    try:
        agent = _Agent(arena, size)
        tell(_Started(agent.described, agent.address))
    except Exception as e:  # noqa: BLE001 - told to the daemon
        tell(_Ended(0, shown(f"{type(e).__name__}: {e}")))
        return
    while True:
        pause = _PAUSE if agent.busy else _SERVING_PAUSE if serves else None
        if select.select([orders], [], [], pause)[0]:
            frame = orders.recv(_MAX_FRAME)
            if not frame:
                return
            request = msgspec.msgpack.decode(frame, type=_Read)
            if (error := agent.begin(request)) is not None:
                tell(_Ended(request.number, error))
        for ended in agent.ended():
            tell(ended)
        if serves:
            agent.move_on()


if __name__ == "__main__":
    _arena, _orders, _size, _serves = map(int, sys.argv[1:])
    with contextlib.suppress(OSError):  # The daemon has gone.
        _serve(_arena, socket.socket(fileno=_orders), _size, serves=bool(_serves))
    os._exit(0)  # UCX's own end may hang.
