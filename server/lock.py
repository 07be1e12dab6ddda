"""One daemon per socket."""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
from pathlib import Path
from typing import Final

from kvstore.errors import ConfigError, NotNow
from kvstore.files import open_own

_POLL: Final = 0.05


async def take_lock(socket_path: Path, patience: float) -> int:
    """The descriptor of the lock beside a socket; it ends with the process, however it ends.

    Waits `patience` seconds for a daemon that is still writing to disk, but not for one that
    serves.

    Raises:
        ConfigError: it cannot be made.
        NotNow: another daemon has it.
    """
    path = socket_path.with_name(socket_path.name + ".lock")
    try:
        lock = open_own(path, os.O_RDWR)
    except OSError as e:
        raise ConfigError(f"cannot write {path}: {e.strerror}; choose another socket") from e
    loop = asyncio.get_running_loop()
    until = loop.time() + patience
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if loop.time() < until and not _answers(socket_path):
                await asyncio.sleep(_POLL)
                continue
            holder = os.read(lock, 32).decode(errors="replace").strip()
            os.close(lock)
            raise NotNow(
                f"a daemon (pid {holder or '?'}) serves {socket_path} already; stop it or choose "
                "another socket"
            ) from None
    os.truncate(lock, 0)
    os.write(lock, f"{os.getpid()}\n".encode())
    return lock


def _answers(path: Path) -> bool:
    """Whether somebody listens on a socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        probe.setblocking(False)
        return probe.connect_ex(str(path)) == 0
