"""The private daemon of an engine: started on demand, joined by all its processes, gone with them.

Where no address is configured, the processes of an engine meet at a socket in the run directory,
named by a digest of the configuration. Whoever finds nobody there takes the start lock (released by
the kernel if its holder dies), looks once more, and starts a daemon; the others wait for the lock
and then join. The daemon itself holds a second lock for life, so there is never more than one.
"""

from __future__ import annotations

import fcntl
import os
import select
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from kvstore import protocol
from kvstore.channel import Channel
from kvstore.config import Config
from kvstore.credentials import listener
from kvstore.errors import ConfigError, StoreUnavailable

_POLL: Final = 0.02


def socket_path(config: Config) -> Path:
    """Where the embedded daemon of this configuration listens."""
    return config.run_dir / f"embedded-{config.instance}.sock"


def private_daemons(run_dir: Path) -> list[Path]:
    """The sockets of this user's private daemons that run."""
    return [path for path in sorted(run_dir.glob("embedded-*.sock")) if listener(path)]


def open_control(path: Path, timeout: float) -> Path:
    """Have the daemon at `path` serve its API, which a private one does once it is asked.

    Takes about half a second the first time; returns the socket of the API.

    Raises:
        StoreUnavailable: nobody answers in `timeout` seconds, or it refuses.
    """
    channel = Channel.connect(path, timeout, populate=False)
    try:
        reply = channel.call(protocol.Control(), timeout)
    finally:
        channel.retire()
    if not isinstance(reply, protocol.Controlled):
        raise StoreUnavailable(f"the daemon at {path} serves no API: {reply}")
    return Path(reply.path)


def prepare_run_dir(folder: Path) -> None:
    """Make the run directory, for this user only.

    Raises:
        ConfigError: it cannot be made, or belongs to somebody else.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except OSError as e:
        raise ConfigError(
            f"run_dir {folder}: {e.strerror}; set run_dir to a folder of yours"
        ) from e
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise ConfigError(
            f"run_dir {folder} is no folder of this user; set run_dir to a folder of yours"
        )
    if found.st_mode & 0o022:
        raise ConfigError(
            f"run_dir {folder} can be written by others; `chmod go-w {folder}` or set another"
        )


def join_or_start(config: Config) -> Channel:
    """Connect to the embedded daemon, starting it if nobody has.

    Raises:
        StoreUnavailable: it could not be started within `session.start_timeout`, with its words.
        ConfigError: the run directory is not usable.
    """
    prepare_run_dir(config.run_dir)
    path = socket_path(config)
    deadline = time.monotonic() + config.session.start_timeout
    lock = _open(path.with_suffix(".start"), os.O_RDWR)
    try:
        while True:
            try:
                return Channel.connect(path, config.session.connect_timeout)
            except StoreUnavailable as e:
                if time.monotonic() >= deadline:
                    raise
                reason = str(e)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # Somebody else is starting it.
                time.sleep(_POLL)
                continue
            try:
                return Channel.connect(path, config.session.connect_timeout)
            except StoreUnavailable:
                try:
                    _start(config, path, deadline, reason)
                except StoreUnavailable as failed:
                    # Maybe it gave way to the daemon of a starter that was killed half-way.
                    try:
                        return Channel.connect(path, config.session.connect_timeout)
                    except StoreUnavailable:
                        raise failed from None
            finally:
                fcntl.flock(lock, fcntl.LOCK_UN)
    finally:
        os.close(lock)


def _open(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as e:
        raise StoreUnavailable(
            f"the embedded daemon must write {path}: {e.strerror}; set run_dir to another folder"
        ) from e


def _start(config: Config, path: Path, deadline: float, reason: str) -> None:
    """Start the daemon and wait until it says that it is ready."""
    log_path = path.with_suffix(".log")
    log = _open(log_path, os.O_WRONLY | os.O_TRUNC)
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    try:
        daemon = subprocess.Popen(
            [sys.executable, "-m", "kvstore.server.daemon", "--embedded", str(path),
             "--ready-fd", str(write_end)],
            stdin=subprocess.PIPE, stdout=log, stderr=log,
            pass_fds=[write_end], start_new_session=True, cwd="/",
        )  # fmt: skip
    except OSError as e:
        os.close(read_end)
        raise StoreUnavailable(f"the embedded daemon could not be started: {e}") from e
    finally:
        os.close(write_end)
        os.close(log)
    try:
        assert daemon.stdin is not None
        try:
            # Through a pipe, not the command line: other users can read that.
            daemon.stdin.write(config.model_dump_json().encode())
            daemon.stdin.close()
        except BrokenPipeError:
            pass  # It ended already; its words are in the log.
        readable, _, _ = select.select([read_end], [], [], max(0.0, deadline - time.monotonic()))
        if readable and os.read(read_end, 1):
            return
        if daemon.poll() is None and not readable:
            daemon.kill()
            raise StoreUnavailable(
                "the embedded daemon was not ready within session.start_timeout "
                f"({config.session.start_timeout:g} s); raise that, or lower memory.size: "
                "memory is touched at about 1 GB/s"
            )
        raise StoreUnavailable(
            f"the embedded daemon did not start ({reason}); its last words: {_tail(log_path)}"
        )
    finally:
        os.close(read_end)


def _tail(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()[-2000:] or "(none)"
    except OSError as e:
        return f"(no log: {e.strerror})"
