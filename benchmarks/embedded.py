"""Daemons for benchmarks: private, in a folder of their own, gone at the end."""

from __future__ import annotations

import fcntl
import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from kvstore.client.embedded import socket_path
from kvstore.config import Config, load_config

_END_SECONDS: Final = 60.0
_POLL: Final = 0.01

# A deadline that a busy machine misses would be measured as a fast miss.
_PATIENCE: Final = {
    "lookup_timeout": 10.0,
    "load_timeout": 60.0,
    "save_timeout": 60.0,
    "connect_timeout": 10.0,
}


@contextmanager
def private_store(
    memory: Mapping[str, Any],
    disk: Mapping[str, Any] | None = None,
    session: Mapping[str, Any] | None = None,
) -> Iterator[Config]:
    """The configuration of a store that sessions of this process alone start and join.

    What the user has configured besides, such as `memory.huge_dir`, holds. Close all sessions
    before leaving; then the daemon ends, and is waited for.
    """
    with TemporaryDirectory(prefix="kvstore-bench-") as run_dir:
        config = load_config(
            None,
            {
                "address": None,
                "run_dir": run_dir,
                "linger_seconds": 0.0,
                "memory": dict(memory),
                "disk": {"path": None} if disk is None else dict(disk),
                "session": _PATIENCE | dict(session or {}),
            },
        )
        try:
            yield config
        finally:
            _wait_for_end(socket_path(config).with_suffix(".lock"))


def _wait_for_end(lock: Path) -> None:
    """A daemon holds its lock for life, and has written its pid there."""
    try:
        fd = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:  # None was ever started.
        return
    try:
        deadline = time.monotonic() + _END_SECONDS
        while not _free(fd):
            if time.monotonic() >= deadline:
                os.kill(int(os.pread(fd, 32, 0)), signal.SIGKILL)
                return
            time.sleep(_POLL)
    finally:
        os.close(fd)


def _free(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
