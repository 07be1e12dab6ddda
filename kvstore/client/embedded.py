"""The private daemon of an engine: started on demand, joined by all its processes, gone with them.

Where no address is configured, the processes of an engine meet at a socket in the run directory,
named by a digest of the configuration. Whoever finds nobody there takes the start lock (released by
the kernel if its holder dies), looks once more, and starts a daemon; the others wait for the lock
and then join. The daemon itself holds a second lock for life, so there is never more than one.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import select
import stat
import subprocess
import sys
import threading
import time
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Final

from kvstore.config import Config
from kvstore.errors import ConfigError, StoreUnavailable
from kvstore.files import open_own
from kvstore.forks import in_child
from kvstore.memory.bounce import HUGE_PAGE
from kvstore.transport import protocol
from kvstore.transport.channel import Channel
from kvstore.transport.credentials import listener, open_to_others
from kvstore.values import format_size

_POLL: Final = 0.02
_log = logging.getLogger("kvstore.session")
_LOOK: Final = 0.2
_FIRST_PAUSE: Final = 1.0
_LONGEST_PAUSE: Final = 300.0


def socket_path(config: Config) -> Path:
    """Where the embedded daemon of this configuration listens."""
    # By the protocol, too: releases side by side that do not understand each other have their own.
    return config.run_dir / f"embedded-{config.instance}-{protocol.VERSION}.sock"


def private_daemons(run_dir: Path) -> list[Path]:
    """The sockets of this user's private daemons that run."""
    return [path for path in sorted(run_dir.glob("embedded-*.sock")) if listener(path)]


def open_control(path: Path, timeout: float) -> Path:
    """Have the daemon at `path` serve its API, which a private one does once it is asked.

    Takes about half a second the first time; returns the socket of the API.

    Raises:
        StoreUnavailable: nobody answers in `timeout` seconds, or it refuses.
    """
    channel = Channel.connect(path, timeout)
    try:
        reply = channel.call(protocol.Control(), timeout)
    finally:
        channel.retire()
    if not isinstance(reply, protocol.Controlled):
        raise StoreUnavailable(f"the daemon at {path} serves no API: {reply}")
    return Path(reply.path)


def prepare_run_dir(config: Config) -> None:
    """Make the run directory, for this user only.

    Raises:
        ConfigError: it cannot be made, or others can change it.
        StoreUnavailable: the same, but nobody has configured it: it is the default.
    """
    folder, others = config.run_dir, None
    configured = "run_dir" in config.model_fields_set
    wrong = ConfigError if configured else StoreUnavailable
    try:
        if not configured:  # XDG_RUNTIME_DIR may be that of a user we were before.
            if not Path(os.environ.get("XDG_RUNTIME_DIR") or "/").is_absolute():
                raise OSError(errno.EINVAL, "XDG_RUNTIME_DIR is relative")
            others = open_to_others(folder.parent.resolve(strict=True))
        if others is None:
            folder.mkdir(mode=0o700, parents=configured, exist_ok=True)
            found = folder.lstat()
    except OSError as e:
        raise wrong(f"run_dir {folder}: {e.strerror}; set run_dir to a folder of yours") from e
    if others is not None or not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise wrong(
            f"run_dir {others or folder} is no folder of this user; set it to a folder of yours"
        )
    if found.st_mode & 0o022:
        raise wrong(
            f"run_dir {folder} can be written by others; `chmod go-w {folder}` or set another"
        )


def join_or_start(config: Config) -> Channel:
    """Connect to the embedded daemon, starting it if nobody has.

    After a failed start the next one waits longer each time; at once, if the configuration failed.

    Raises:
        StoreUnavailable: it could not be started within `session.start_timeout`, with its words;
            or as `prepare_run_dir`.
        ConfigError: as `prepare_run_dir`.
    """
    prepare_run_dir(config)
    path = socket_path(config)
    deadline = time.monotonic() + config.session.start_timeout
    lock = os.fdopen(_open(path.with_suffix(".start"), os.O_RDWR), "rb+", buffering=0)
    in_child(lock, FileIO.close)
    with lock:  # Whose end gives way to others.
        while True:
            try:
                return _join(config, path)
            except StoreUnavailable as e:
                until, _, why = _failed.get(path, (0, 0, ""))
                if time.monotonic() < until:
                    raise StoreUnavailable(why) from None
                if time.monotonic() >= deadline:
                    raise
                reason = str(e)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # Somebody else is starting it.
                time.sleep(_POLL)
                continue
            with suppress(StoreUnavailable):
                return _join(config, path)
            try:
                _start(config, path, deadline, reason)
            except StoreUnavailable:
                # Maybe it gave way to the daemon of a starter that was killed half-way.
                with suppress(StoreUnavailable):
                    return _join(config, path)
                raise


def _join(config: Config, path: Path) -> Channel:
    channel = Channel.connect(path, config.session.connect_timeout)
    _failed.pop(path, None)
    if channel.welcome.arena_bytes <= config.memory.size - HUGE_PAGE:
        _log.warning(
            "the private daemon has %s of memory.size: little was free; `kvstore serve` takes all",
            format_size(channel.welcome.arena_bytes),
        )
    return channel


_failed: Final[dict[Path, tuple[float, float, str]]] = {}
"""Starts that failed: when the next one may be, in monotonic seconds, after what pause, and why."""


def _unstarted(path: Path, why: str, least: float = 0.0) -> StoreUnavailable:
    """Note that a start failed. `least` is the pause before the next one, at least."""
    _, before, _ = _failed.get(path, (0, 0, ""))
    pause = min(max(_FIRST_PAUSE, 2 * before, least), _LONGEST_PAUSE)
    why += f"; the next attempt is in {pause:.3g} s"
    _failed[path] = time.monotonic() + pause, pause, why
    return StoreUnavailable(why)


def _open(path: Path, flags: int) -> int:
    try:
        return open_own(path, flags)
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
        raise _unstarted(path, f"the embedded daemon could not be started: {e}") from e
    finally:
        os.close(write_end)
        os.close(log)
    with suppress(OSError):  # Should memory run out, now or later, it goes before the engine.
        Path(f"/proc/{daemon.pid}/oom_score_adj").write_text("1000")
    with suppress(RuntimeError):  # No more threads; otherwise it is no zombie when it has ended.
        threading.Thread(target=daemon.wait, name="kvstore-daemon", daemon=True).start()
    try:
        assert daemon.stdin is not None
        # Through a pipe, not the command line: other users can read that. As a line, not to the
        # end: a process forked meanwhile may keep the pipe open.
        with suppress(BrokenPipeError):  # It ended already; its words are in the log.
            daemon.stdin.write(config.model_dump_json().encode() + b"\n")
            daemon.stdin.close()
        readable: list[int] = []
        while not readable and daemon.poll() is None and time.monotonic() < deadline:
            readable, _, _ = select.select([read_end], [], [], _LOOK)
        if readable and os.read(read_end, 1):
            return
        if daemon.poll() is None and not readable:
            daemon.kill()
            raise _unstarted(
                path,
                "the embedded daemon was not ready within session.start_timeout "
                f"({config.session.start_timeout:g} s); raise that, or lower memory.size: "
                "memory is touched at about 1 GB/s",
            )
        words = f"the embedded daemon did not start ({reason}); its last words: {_tail(log_path)}"
        raise _unstarted(path, words, _LONGEST_PAUSE if daemon.wait() == os.EX_CONFIG else 0.0)
    finally:
        os.close(read_end)


def _tail(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()[-2000:] or "(none)"
    except OSError as e:
        return f"(no log: {e.strerror})"
