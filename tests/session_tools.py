"""Paged memory whose right content follows from block keys, and daemons that tests can hurt."""

from __future__ import annotations

import hashlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil
from numpy.typing import NDArray

from kvstore.blocks.spec import Described, Group, Layout, ModelIdentity, Namespace, Opaque, Part
from kvstore.client.client import Client
from kvstore.client.session import Session
from kvstore.config import Config
from kvstore.copier.base import PagedMemory, PlaneMemory
from kvstore.sources import load_config
from kvstore.transport.channel import Channel

MIB: Final = 1 << 20
ROOT: Final = Path(__file__).parents[1]
PATIENCE: Final = 20.0
"""Seconds after which something that should happen soon counts as never."""

BLOCK_TOKENS: Final = 16
PAGE_TOKENS: Final = 4
GROUP: Final = Group(layers=2, heads=2, channels=(8, 8), dtype="float32")
PART: Final = Part(GROUP)
"""Objects of 4 KiB: four pages of four tokens."""

_UINT: Final = {1: np.uint8, 2: np.uint16, 4: np.uint32}

Ids = NDArray[np.int64]


def namespace(tenant: str = "", model: str = "test/model") -> Namespace:
    return Namespace(ModelIdentity(model), tenant, BLOCK_TOKENS)


def wide(nbytes: int, layout: Layout = Described()) -> Part:  # noqa: B008
    """A part whose objects have `nbytes` bytes, a multiple of 256."""
    group = Group(layers=1, heads=1, channels=(nbytes // BLOCK_TOKENS // 8,) * 2, dtype="float32")
    return Part(group, layout)


def eventually(what: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """What `what` returns, as soon as that is true."""
    until = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < until, f"not within {seconds:g} s; at last: {found!r}"
        time.sleep(0.02)
    return found


class Pages:
    """An engine's memory of `pages` random pages for one part."""

    def __init__(self, part: Part, pages: int = 64, page_tokens: int = PAGE_TOKENS) -> None:
        rng = np.random.default_rng()
        group, layout = part.group, part.layout
        opaque = isinstance(layout, Opaque)
        self.part = part
        self.page_tokens = layout.page_tokens if isinstance(layout, Opaque) else page_tokens
        self.pages_per_block = BLOCK_TOKENS // self.page_tokens
        self.arrays: list[NDArray[Any]] = []
        """One array per (layer, plane): page × token × head × channel; opaque: page × byte."""
        dtype = np.uint8 if opaque else _UINT[group.elem_size]
        for _ in range(group.layers):
            for width in (0,) if opaque else group.channels:
                shape: tuple[int, ...] = (pages, self.page_tokens, group.heads, width)
                if isinstance(layout, Opaque):
                    shape = (pages, layout.page_bytes)
                self.arrays.append(rng.integers(np.iinfo(dtype).max, size=shape, dtype=dtype))
        planes = tuple(PlaneMemory(a.ctypes.data, *a.strides[:4]) for a in self.arrays)
        if opaque:
            planes = tuple(PlaneMemory(a.ctypes.data, a.strides[0]) for a in self.arrays)
        self.memory = PagedMemory(part, self.page_tokens, pages, planes, self.arrays)

    def ids(self, blocks: int, first: int = 0) -> Ids:
        """Pages for blocks, in no order."""
        count = blocks * self.pages_per_block
        chosen = first + np.random.default_rng(blocks).permutation(count)
        return chosen.astype(np.int64).reshape(blocks, self.pages_per_block)

    def block(self, ids: Ids) -> list[NDArray[Any]]:
        """The values of one block, per (layer, plane)."""
        return [a[ids].reshape(-1, *a.shape[2:]) if a.ndim == 4 else a[ids] for a in self.arrays]

    def right(self, key: bytes) -> list[NDArray[Any]]:
        """What the block of `key` must hold; equal for all described layouts of a part."""
        seed = key + (self.part.content if isinstance(self.part.layout, Described) else b"opaque")
        shapes = [block.shape for block in self.block(np.arange(self.pages_per_block))]
        sizes = [int(np.prod(s)) * a.itemsize for s, a in zip(shapes, self.arrays, strict=True)]
        data = hashlib.shake_128(seed).digest(sum(sizes))
        ends = np.cumsum(sizes)
        return [
            np.frombuffer(data[end - size : end], a.dtype).reshape(shape)
            for end, size, shape, a in zip(ends, sizes, shapes, self.arrays, strict=True)
        ]

    def fill(self, keys: Sequence[bytes], ids: Ids) -> None:
        """Compute the blocks of `keys` into pages."""
        for key, row in zip(keys, ids, strict=True):
            for array, values in zip(self.arrays, self.right(key), strict=True):
                array[row] = values.reshape(len(row), *array.shape[1:])

    def check(self, keys: Sequence[bytes], ids: Ids) -> None:
        """Every byte of the blocks of `keys` is right."""
        for number, (key, row) in enumerate(zip(keys, ids, strict=True)):
            for have, want in zip(self.block(row), self.right(key), strict=True):
                assert np.array_equal(have, want), f"wrong bytes in block {number}"


def save(session: Session, keys: Sequence[bytes], **options: Any) -> Any:
    """Save the blocks of `keys` from pages of their own."""
    pages = [Pages(p, len(keys) * BLOCK_TOKENS // _page_tokens(p) or 1) for p in session.parts]
    ids = [p.ids(len(keys)) for p in pages]
    for p, i in zip(pages, ids, strict=True):
        p.fill(keys, i)
    return session.save(keys, [p.memory for p in pages], ids, **options)


def load(session: Session, keys: Sequence[bytes], **options: Any) -> Any:
    """Load the blocks of `keys` and check every byte that is said to have come."""
    pages = [Pages(p, len(keys) * BLOCK_TOKENS // _page_tokens(p) or 1) for p in session.parts]
    ids = [p.ids(len(keys)) for p in pages]
    result = session.load(keys, [p.memory for p in pages], ids, **options)
    for p, i in zip(pages, ids, strict=True):
        p.check(keys[: result.blocks], i[: result.blocks])
    return result


def back_again(session: Session) -> None:
    """Wait until the session has found its daemon again."""
    eventually(lambda: session.lookup([bytes(32)]).reason != "unavailable")


def _page_tokens(part: Part) -> int:
    return part.layout.page_tokens if isinstance(part.layout, Opaque) else PAGE_TOKENS


def prompt(number: int, blocks: int) -> list[int]:
    """Tokens of `blocks` blocks that no other `number` shares."""
    return [number, *range(1, blocks * BLOCK_TOKENS)]


class Served:
    """`kvstore serve` as its own process. It runs `fault` first: Python that breaks something."""

    def __init__(self, folder: Path, settings: dict[str, Any], fault: str = "") -> None:
        self.folder = folder
        self.fault = fault
        self.socket = folder / "kvstore.sock"
        self.log = folder / "log"
        self._file = folder / "config.yaml"
        # JSON is YAML; the file says what flags cannot. Many daemons run here at a time, so none
        # listens on a fixed port.
        quiet = {"grpc": None, "http": None} | settings.pop("server", {})
        settings = {"address": f"unix://{self.socket}", "server": quiet} | settings
        self._file.write_text(json.dumps(settings))
        self.addresses: dict[str, str] = {}
        """Where its faces listen, by scheme (http, grpc …)."""
        self.process = self._start()

    def _start(self) -> subprocess.Popen[str]:
        script = f"{self.fault}\nfrom kvstore.server.cli.main import main\nmain()"
        command = [sys.executable, "-c", script, "serve", "-c", str(self._file)]
        with self.log.open("a") as log:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert process.stdout is not None
        readable, _, _ = select.select([process.stdout], [], [], 3 * PATIENCE)
        said = os.read(process.stdout.fileno(), 1 << 16).decode() if readable else ""
        process.stdout.close()
        assert said.startswith(f"ready: unix://{self.socket} "), (said, self.log.read_text())
        self.head, *others = said.splitlines()
        self.addresses = dict(line.split(maxsplit=1) for line in others)
        return process

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """SIGTERM, and wait for the orderly end."""
        self.process.terminate()
        assert self.process.wait(60) == 0, self.log.read_text()

    def restart(self) -> None:
        """Start it again after its end."""
        self.process = self._start()

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def config(self, **session: Any) -> Config:
        """A client's configuration; deadlines are long, since tests share their cores."""
        patient = {"lookup_timeout": 10, "save_timeout": 10, "retry_max": 0.2}
        settings = {"address": f"unix://{self.socket}", "session": patient | session}
        return load_config(overrides=settings)

    def session(self, part: Part = PART, tenant: str = "", **settings: Any) -> Session:
        """With a client of its own, as if it were in another process."""
        client = Client(self.config(**settings))
        return Session.open(namespace(tenant), [part], client=client)

    def channel(self) -> Channel:
        return Channel.connect(self.socket, PATIENCE)

    def stats(self) -> dict[str, Any]:
        with self.session() as session:
            return session.stats()


class Stores:
    """Makes configurations and daemons in a folder of their own; `close` ends all daemons."""

    def __init__(self) -> None:
        # Not pytest's folder: the path of a unix socket has at most 107 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="kv"))
        self._served: list[Served] = []

    def serve(
        self,
        memory: str | dict[str, Any] = "8MiB",
        disk: str | dict[str, Any] | None = None,
        fault: str = "",
        **settings: Any,
    ) -> Served:
        """A daemon; tiers are given by size (a disk then lies in its folder) or in full."""
        folder = self.folder / f"served-{len(self._served)}"
        folder.mkdir()
        settings["memory"] = {"size": memory} if isinstance(memory, str) else memory
        if disk is not None:
            here = {"path": str(folder / "disk"), "size": disk}
            settings["disk"] = here if isinstance(disk, str) else disk
        served = Served(folder, settings, fault)
        self._served.append(served)
        return served

    def embedded(self, **settings: Any) -> Config:
        """The configuration of processes that share a private daemon."""
        session = {"lookup_timeout": 10, "retry_max": 0.2, "start_timeout": 30}
        base: dict[str, Any] = {
            "run_dir": str(self.folder / "run"),
            "memory": {"size": "4MiB"},
            "linger_seconds": 0.5,
        }
        session |= settings.pop("session", {})
        return load_config(overrides=base | {"session": session} | settings)

    def embedded_pids(self) -> list[int]:
        """Processes that serve, or start to serve, a socket in the run directory."""
        run_dir = str(self.folder / "run")
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            line = process.info["cmdline"] or []
            if "kvstore.server.daemon" in line and any(run_dir in word for word in line):
                found.append(process.pid)
        return found

    def close(self) -> None:
        for served in self._served:
            if served.process.poll() is None:
                served.kill()
        for pid in self.embedded_pids():
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.folder)


class Child:
    """A Python process with this module's names, and a line-wise conversation with it."""

    def __init__(self, script: str, *arguments: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from tests.session_tools import *\n" + script]
            + [str(argument) for argument in arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            text=True,
        )

    def says(self, seconds: float = PATIENCE) -> str:
        """Its next line."""
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], seconds)
        assert readable, f"the child said nothing within {seconds:g} s"
        return self.process.stdout.readline().strip()

    def tell(self, line: str = "") -> None:
        """Let it read a line."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def wait(self, seconds: float = PATIENCE) -> int:
        return self.process.wait(seconds)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:  # What it was told last never reached it.
                continue


def no_leases(served: Served) -> bool:
    return bool(served.stats()["leases"] == 0)


BIG: Final = wide(256 << 10)
SMALL: Final = {"size": "2MiB", "chunk": "1MiB"}
"""An arena for eight objects of 256 KiB."""
