"""Engines' processes that are forked from one that has imported the engine.

An engine starts two or three processes, and each would import it anew: a dozen seconds of a core,
which is most of what a small model's start takes. Here one process per suite imports it, and is
forked. A process that an engine starts is one that its parent forked off before it did anything
else, so that parents, groups and what is inherited are those that the engine knows.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing import forkserver, popen_forkserver, spawn
from multiprocessing.context import BaseContext, SpawnProcess
from multiprocessing.reduction import recvfds, sendfds
from typing import Any, Final

_SPARES: Final = 4
"""Processes that one may start of these; more are started in the ordinary way."""
_FDS: Final = 64
_waiting: list[socket.socket] = []
"""Sockets of those that wait to be told what to do."""


def importing(*modules: str, environment: dict[str, str]) -> BaseContext:
    """Processes of one that has imported these, with such an environment.

    What this process has in its own by then they have, too; they live as long as it does.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(modules))
    before = dict(os.environ)
    os.environ |= environment
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ |= before
    return context


class WithSpares:
    """What makes an engine, after it has seen to it that the processes of this one are forked."""

    def __init__(self, make: Callable[[dict[str, Any]], Any]) -> None:
        self._make = make

    def __call__(self, settings: dict[str, Any]) -> Any:
        _fork_spares()
        return self._make(settings)


def _fork_spares() -> None:
    _waiting.clear()
    for _ in range(_SPARES):
        ours, theirs = socket.socketpair()
        if os.fork():
            theirs.close()
            _waiting.append(ours)
            continue
        code = 1
        try:
            ours.close()
            code = _wait(theirs)
        except Exception:  # noqa: BLE001 - as what starts it would say
            traceback.print_exc()
        finally:
            os._exit(code)
    SpawnProcess._Popen = staticmethod(_popen)  # type: ignore[method-assign]
    forkserver.connect_to_new_process = _connect


def _wait(orders: socket.socket) -> int:
    """Be a process that this one's parent starts, once it does."""
    while _waiting:
        _waiting.pop().close()  # Brothers shall not outlive the parent by ours.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        child_r, status, variables, *fds = recvfds(orders, _FDS)
    except EOFError:
        return 0
    orders.close()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    with open(variables) as file:
        os.environ |= json.load(file)
    forkserver._forkserver._inherited_fds = fds  # type: ignore[attr-defined]
    forkserver.write_signed(status, os.getpid())  # type: ignore[attr-defined]
    _fork_spares()
    code = spawn._main(child_r, os.dup(child_r))  # type: ignore[attr-defined]
    forkserver.write_signed(status, code)  # type: ignore[attr-defined]
    return int(code)


def _popen(process: SpawnProcess) -> Any:
    if _waiting:
        return popen_forkserver.Popen(process)
    from multiprocessing.popen_spawn_posix import Popen

    return Popen(process)


def _connect(fds: list[int]) -> tuple[int, int]:
    """As `ForkServer.connect_to_new_process`: where a process's id and exit code can be read, and
    where it reads what it is.
    """
    spare = _waiting.pop()
    status_r, status_w = os.pipe()
    child_r, child_w = os.pipe()
    with spare, tempfile.TemporaryFile("w+") as variables:
        json.dump(dict(os.environ), variables)
        variables.seek(0)
        sendfds(spare, [child_r, status_w, variables.fileno(), *fds])
    os.close(child_r)
    os.close(status_w)
    return status_r, child_w
