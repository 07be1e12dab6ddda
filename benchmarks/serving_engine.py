"""Engines in processes of their own: how one is made, what it is asked and what it says."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, Final, Self

from kvstore.benchmarks.crew import SPAWN, start
from kvstore.benchmarks.figures import BenchmarkError

PLAIN: Final = "plain"
UNCACHED: Final = "without prefix cache"
KVSTORE: Final = "kvstore"
_START_SECONDS: Final = 900.0
_ANSWER_SECONDS: Final = 900.0
_END_SECONDS: Final = 60.0
_LAST_WORDS: Final = 8000
ELEMENT_BYTES: Final = {"float32": 4, "float16": 2, "bfloat16": 2}

Maker = Callable[[dict[str, Any]], tuple[Any, Any, Callable[[], object]]]
"""From settings: the engine, what it says of itself, and what ends it."""


@dataclass(frozen=True, slots=True)
class Said:
    """What an engine says of itself once it has started."""

    start_seconds: float
    device: str
    dtype: str
    vocabulary: int
    token_bytes: int
    """Bytes of the KV of one token, in all layers."""


@dataclass(frozen=True, slots=True)
class Answered:
    """What became of prompts that were given together; lists have one item per prompt."""

    seconds: float
    first: list[float]
    """Seconds from a request's arrival to its first token, waiting included."""
    cached: list[int]
    """Tokens of the prompt that were not computed."""
    answers: list[list[int]]
    finished: list[bool]


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to keep KV: `settings` is what an engine is made with, beside the model."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Kind:
    """Engines of one kind; the functions run in an engine's own process."""

    name: str
    make: Maker
    generate: Callable[..., Answered]
    forget: Callable[[Any], None]
    uncached: dict[str, Any]
    """Settings by which it keeps nothing of its own."""
    connector: Callable[..., Contender]
    """By name; `address` (the store's), `memory` (bytes) and `folder` for those that ask."""
    environment: dict[str, str]
    chunk: str
    """The setting that bounds the tokens of a step."""
    handed: int = 1
    """Tokens of a prompt are handed on to another engine by so many; the last one never is."""
    one_process: dict[str, str] | None = None
    """Variables by which all of it runs in one process; None: it never does."""


class EngineProcess:
    """An engine that takes one order at a time; a context manager.

    Raises:
        BenchmarkError: it did not start, ended, or did not answer in time; with its last words.
    """

    def __init__(
        self,
        name: str,
        make: Maker,
        settings: dict[str, Any],
        environment: dict[str, str],
        processes: BaseContext = SPAWN,
    ) -> None:
        """`make` is called in the other process, which is one of `processes`."""
        self._name = name
        # A file, not a pipe: worker processes keep it open, and nobody reads it as it fills.
        self._log = tempfile.NamedTemporaryFile("w+", prefix="engine-", suffix=".log")  # noqa: SIM115
        self._process, self._orders = start(
            serve, make, settings, environment, self._log.name, processes=processes
        )
        try:
            self.said = self.answer(_START_SECONDS)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def log(self) -> str:
        """What it has printed."""
        return Path(self._log.name).read_text(errors="replace")

    def tell(self, call: Callable[..., Any], *given: Any) -> None:
        """Have it call a function with the engine and what is given."""
        with suppress(BrokenPipeError):  # Its answer, or what comes instead, tells why.
            self._orders.send((call, *given))

    def answer(self, seconds: float = _ANSWER_SECONDS) -> Any:
        """What that returned."""
        try:
            if self._orders.poll(seconds):
                return self._orders.recv()
            what = f"said nothing within {seconds:g} s"
        except (EOFError, ConnectionResetError):
            what = "ended"
        words = self.log[-_LAST_WORDS:]
        raise BenchmarkError(f"{self._name}: the engine {what}; its last words:\n{words}")

    def close(self) -> None:
        """End it in good order, workers included."""
        self._orders.close()
        self._process.join(_END_SECONDS)
        self._process.kill()
        self._process.join()
        assert self._process.pid is not None
        with suppress(ProcessLookupError):  # Workers that outlived it.
            os.killpg(self._process.pid, signal.SIGKILL)
        self._log.close()


class ServingEngine(EngineProcess):
    """The engine of a contender."""

    said: Said

    def __init__(self, kind: Kind, contender: Contender, **settings: Any) -> None:
        self._kind = kind
        variables = kind.environment | os.environ | contender.environment
        super().__init__(contender.name, kind.make, settings | contender.settings, variables)

    def generate(self, prompts: Sequence[list[int]], tokens: int, *wishes: object) -> Answered:
        """Greedy answers of so many tokens to `prompts`, all given at once; `wishes` as engines
        take them.
        """
        self.tell(self._kind.generate, prompts, tokens, *wishes)
        answered: Answered = self.answer()
        if not all(answered.finished):
            raise BenchmarkError(f"{self._name}: a request did not end as it should")
        return answered

    def forget(self) -> None:
        """Empty the engine's own prefix cache; saves that are under way have ended then."""
        self.tell(self._kind.forget)
        self.answer()


def serve(
    orders: Connection,
    make: Maker,
    settings: dict[str, Any],
    environment: dict[str, str],
    log: str,
) -> None:
    """Make an engine and say something of it, then call functions with it until orders end.

    What it prints goes to `log`.
    """
    os.setsid()  # so that its workers can be ended with it
    words = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(words, 1)
    os.dup2(words, 2)
    os.environ |= environment
    try:
        engine, said, end = make(settings)
        orders.send(said)
        with suppress(EOFError):
            while True:
                do, *given = orders.recv()
                orders.send(do(engine, *given))
        end()
    except Exception:  # noqa: BLE001 - its last words are in the log
        traceback.print_exc()
        sys.stderr.flush()
        # Else this process would wait for its workers, and others for it.
        os.killpg(0, signal.SIGKILL)
