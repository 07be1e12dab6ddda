"""The daemon as a process: the signals that it heeds, what systemd is told, an end in time."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path

from kvstore.errors import NotNow

_log = logging.getLogger("kvstore.daemon")


def heed_signals(stop: Callable[[], None], reload: Callable[[], None]) -> None:
    """Call `stop` at SIGTERM and SIGINT, and `reload` at SIGHUP, on a thread of their own.

    The loop may be waiting for a disk that hangs. SIGHUP is `stop` too where there is a terminal:
    then it says that the terminal has gone. With `nohup` it stays ignored. For the main thread.
    """
    acts: dict[int, Callable[[], None]] = {signal.SIGTERM: stop, signal.SIGINT: stop}
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        acts[signal.SIGHUP] = stop if _has_terminal() else reload
    heard, told = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)  # told at once, whatever Python waits for
    for number in acts:
        signal.signal(number, lambda *_: None)

    def listen() -> None:
        while number := os.read(heard, 1):
            if (act := acts.get(number[0])) is not None:
                act()

    threading.Thread(target=listen, name="kvstore-signals", daemon=True).start()


def _has_terminal() -> bool:
    return Path("/proc/self/stat").read_text().rpartition(")")[2].split()[4] != "0"


def notify(state: str) -> None:
    """Tell systemd (`Type=notify`) e.g. `READY=1`, if `$NOTIFY_SOCKET` is its socket."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):  # systemd's way to write an abstract address.
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.sendto(state.encode(), address)
    except OSError as e:
        _log.warning("NOTIFY_SOCKET could not be told %s: %s", state, e)


def end_after(seconds: float, last_words: Callable[[], None]) -> None:
    """End this process in `seconds`, wherever its threads hang; before that, call `last_words`.

    Should these hang as well, the end comes a second later.
    """

    def end() -> None:
        try:
            last_words()
            logging.shutdown()
        finally:
            os._exit(0)

    for timer in (threading.Timer(seconds, end), threading.Timer(seconds + 1, os._exit, (0,))):
        timer.daemon = True
        timer.start()


def exit_code(error: Exception) -> int:
    """Of a daemon that could not start: whether to try again makes sense."""
    passing = isinstance(error, NotNow) or not isinstance(error, ValueError)
    return 1 if passing else os.EX_CONFIG
