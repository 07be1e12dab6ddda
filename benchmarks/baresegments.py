"""The limits of tiers of segments: files past the page cache, and obstore alone."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from shutil import rmtree
from typing import Any, Final

from kvstore.benchmarks.barefile import PIECE
from kvstore.benchmarks.served import free_port
from kvstore.memory.bounce import Bounce
from kvstore.memory.slots import align

NO_SERVER: Final = (
    "skipped: name a bucket of yours with --url (and --endpoint), whose prefix is emptied, or "
    "pip install 'moto[server]' for one on loopback"
)
NODE: Final = "bench"
_BUCKET: Final = "kvstore-bench"
_SECONDS: Final = 60.0


class BareFiles:
    """A file for every `together` objects, in a folder: direct I/O from memory on huge pages.

    Each is synced; `tier` is the folder to be emptied beside its own.
    """

    version = "direct I/O"
    cpu_seconds = 0.0
    """The file system's work is this process's."""

    def __init__(self, folder: Path, tier: Path, threads: int, together: int) -> None:
        self._folder, self._tier, self._together = folder, tier, together
        self._memory = [Bounce(PIECE) for _ in range(threads)]
        self._pool = ThreadPoolExecutor(threads, "bare-files")

    def write(self, nbytes: int, count: int) -> None:
        """Store so many objects."""

        def store(memory: Bounce, number: int) -> None:
            flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_DIRECT
            fd = os.open(self._folder / str(number), flags, 0o600)
            for at, view in _pieces(memory, nbytes * self._together):
                os.pwritev(fd, [view], at)
            os.fdatasync(fd)
            os.close(fd)

        self._share(store, count)

    def read(self, nbytes: int, count: int) -> None:
        """Bring them."""

        def load(memory: Bounce, number: int) -> None:
            fd = os.open(self._folder / str(number), os.O_RDONLY | os.O_DIRECT)
            for at, view in _pieces(memory, nbytes * self._together):
                os.preadv(fd, [view], at)
            os.close(fd)

        self._share(load, count)

    def _share(self, work: Callable[[Bounce, int], None], count: int) -> None:
        numbers = iter(range(count // self._together))

        def each(memory: Bounce) -> None:
            for number in numbers:
                work(memory, number)

        list(self._pool.map(each, self._memory))

    def clear(self) -> None:
        """Remove all that there is."""
        for folder in (self._folder, self._tier / "v1", self._tier / "nodes"):
            rmtree(folder, ignore_errors=True)
        self._folder.mkdir()
        (self._tier / "nodes" / NODE).mkdir(parents=True)

    def close(self) -> None:
        """End."""
        self._pool.shutdown()


def _pieces(memory: Bounce, nbytes: int) -> Iterator[tuple[int, memoryview]]:
    for at in range(0, nbytes, PIECE):
        yield at, memory.view[: align(min(PIECE, nbytes - at))]


class BareBucket:
    """obstore alone: an object for every `together` objects, got by ranges of one each."""

    def __init__(self, client: Any, process: Any, threads: int, together: int) -> None:
        import obstore

        self._obstore, self._client, self._process = obstore, client, process
        self._together = together
        self._memory = Bounce(128 << 20)
        self._putters = ThreadPoolExecutor(2, "bare-put")
        self._getters = ThreadPoolExecutor(threads, "bare-get")
        self.version = f"obstore {obstore.__version__}"

    @property
    def cpu_seconds(self) -> float:
        """Of a server of our own; none of another one."""
        if self._process is None:
            return 0.0
        import psutil

        times = psutil.Process(self._process.pid).cpu_times()
        return float(times.user + times.system)

    def write(self, nbytes: int, count: int) -> None:
        """Store so many objects."""
        view = self._memory.view[: nbytes * self._together]

        def store(number: int) -> None:
            self._obstore.put(self._client, f"bare/{number}", view, use_multipart=False)

        list(self._putters.map(store, range(count // self._together)))

    def read(self, nbytes: int, count: int) -> None:
        """Bring them."""

        def load(number: int) -> None:
            path, at = f"bare/{number // self._together}", number % self._together * nbytes
            len(self._obstore.get_range(self._client, path, start=at, length=nbytes))

        list(self._getters.map(load, range(count)))

    def clear(self) -> None:
        """Remove all that there is under the prefix."""
        for some in self._obstore.list(self._client):
            self._obstore.delete(self._client, [found["path"] for found in some])

    def close(self) -> None:
        """End."""
        self._putters.shutdown()
        self._getters.shutdown()


@contextmanager
def s3_server() -> Iterator[tuple[dict[str, Any], Any] | None]:
    """Options of a tier in a bucket of a server of our own, and its process; None without moto."""
    if find_spec("moto") is None:
        yield None
        return
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, stdout=quiet, stderr=quiet) as process:
        try:
            endpoint, until = f"http://127.0.0.1:{port}", time.monotonic() + _SECONDS
            while time.monotonic() < until:
                with suppress(OSError):
                    make = urllib.request.Request(f"{endpoint}/{_BUCKET}", method="PUT")
                    urllib.request.urlopen(make, timeout=_SECONDS).close()
                    break
                time.sleep(0.05)
            config = {"aws_access_key_id": "bench", "aws_secret_access_key": "bench"}
            yield {
                "url": f"s3://{_BUCKET}/bench", "endpoint": endpoint, "region": "us-east-1",
                "config": config,
            }, process  # fmt: skip
        finally:
            process.kill()
