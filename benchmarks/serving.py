"""Time to first token and throughput of engines: plain, with KVStore, and with other connectors.

Engines run one after another, all of them in each lap, since two would take each other's cores and
memory. What an outside hit is measured against happens in the same process, in turns with it.
"""

from __future__ import annotations

import os
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from kvstore import _native
from kvstore.benchmarks.figures import BenchmarkError, Report, Samples
from kvstore.benchmarks.served import served
from kvstore.benchmarks.serving_engine import (
    KVSTORE,
    PLAIN,
    UNCACHED,
    Contender,
    Kind,
    Said,
    ServingEngine,
)
from kvstore.benchmarks.serving_load import Chat, Documents, Load, Size, Unseen
from kvstore.memory.bounce import Bounce
from kvstore.sources import load_config

FRESH: Final = f"{KVSTORE}, a new process"
_MEMORY_SPARE: Final = 256 << 20
_OWED: Final = 1.05
"""An outside hit may take so many times an own one, and the time to copy the bytes."""
_ERROR: Final = re.compile(r"\b\w+(?:Error|Exception): .+")
EXACT: Final = "float32"
"""In other types, answers differ with the steps in which the same KV was computed."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What all engines have in common."""

    kind: Kind
    model: str
    dtype: str | None
    in_process: bool
    size: Size

    def engine(self, contender: Contender) -> ServingEngine:
        """A running engine, not warmed up."""
        local = os.path.isdir(self.model)
        variables = {"HF_HUB_OFFLINE": "1"} if local else {}
        if self.in_process:
            variables |= self.kind.one_process or {}
        return ServingEngine(
            self.kind,
            replace(contender, environment=contender.environment | variables),
            model=os.path.abspath(self.model) if local else self.model,
            dtype=self.dtype,
            longest=self.size.longest + 1,
            requests=self.size.requests,
            room=self.size.room,
        )


@dataclass(slots=True)
class Taken:
    """What one contender did, in all laps."""

    documents: list[Documents] = field(default_factory=list)
    chats: list[Chat] = field(default_factory=list)
    unseen: list[Unseen] = field(default_factory=list)

    def samples(self, of: Callable[[Documents], list[float]]) -> Samples:
        """First tokens of all laps, in seconds."""
        return Samples(tuple(seconds for lap in self.documents for seconds in of(lap)))


def default_model() -> Path | None:
    """The small model that `make setup` has put into the user's cache, if it is there."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(cache) if os.path.isabs(cache) else Path.home() / ".cache"
    folders = sorted((root / "kvstore" / "models").glob("SmolLM2-135M-Instruct-*[0-9]"))
    return folders[-1] if folders else None


def run(report: Report, setup: Setup, connectors: Sequence[str]) -> None:
    """Measure the plain engine, then each connector, in as many laps as there are samples.

    Raises:
        BenchmarkError: it or KVStore did not run, did not hit, or answered differently.
    """
    taken: dict[str, Taken] = {}
    names = list(dict.fromkeys(connectors))
    said: Said | None = None
    for lap in range(report.samples):
        where = f"lap {lap + 1} of {report.samples}"
        for contender in (Contender(UNCACHED, setup.kind.uncached), Contender(PLAIN)):
            report.note(f"{where}: {contender.name}")
            with setup.engine(contender) as engine:
                report.note(f"started in {engine.said.start_seconds:.0f} s")
                said = engine.said
                _serve(setup, engine, contender, taken.setdefault(contender.name, Taken()))
        assert said is not None
        for name in list(names):
            report.note(f"{where}: {setup.kind.name} with {name}")
            done = taken.setdefault(name, Taken())
            try:
                _serve_connected(setup, name, said, done, taken)
            except BenchmarkError as e:
                if name == KVSTORE:
                    raise
                report.note(f"{name} is left out: {gist(str(e))}")
                names.remove(name)
                del taken[name]
        check(report, taken, names, exact=said.dtype == EXACT)
    assert said is not None
    _tell(report, setup, said, taken, names)


def _serve_connected(
    setup: Setup, name: str, said: Said, done: Taken, taken: dict[str, Taken]
) -> None:
    """One lap of a connector, with an empty store of its own; KVStore meets a new process, too."""
    memory = setup.size.stored * said.token_bytes * 5 // 4 + _MEMORY_SPARE
    own = name == KVSTORE
    with (
        TemporaryDirectory(prefix="kvstore-bench-") as folder,
        served(memory={"size": memory}) if own else nullcontext() as daemon,
    ):
        address = str(daemon.config.address) if daemon else ""
        contender = setup.kind.connector(name, address=address, memory=memory, folder=Path(folder))
        with setup.engine(contender) as engine:
            _serve(setup, engine, contender, done)
        if own:
            with setup.engine(contender) as engine:
                load = Load(setup.size, engine.said.vocabulary)
                load.warm_up(engine)
                engine.forget()
                taken.setdefault(FRESH, Taken()).documents.append(load.fresh(engine))


def _serve(setup: Setup, engine: ServingEngine, contender: Contender, taken: Taken) -> None:
    """All loads, once."""
    load = Load(setup.size, engine.said.vocabulary)
    load.warm_up(engine)
    if contender.name not in (PLAIN, UNCACHED):
        copy = copier(setup.size.tokens * engine.said.token_bytes)
        taken.documents.append(load.outside(engine, copy))
        engine.forget()
    else:
        taken.documents.append(load.documents(engine))
    taken.unseen.append(load.unseen(engine))
    taken.chats.append(load.chat(engine))


def copier(nbytes: int) -> Callable[[], float]:
    """Seconds that a streaming copy of so many bytes takes, with a session's threads."""
    threads = load_config(None, {}).session.copy_threads
    source, target = Bounce(nbytes), Bounce(nbytes)

    def copy() -> float:
        started = time.perf_counter()
        _native.copy(target.address, source.address, nbytes, threads)
        return time.perf_counter() - started

    return copy


def gist(words: str) -> str:
    """What tells most among an engine's last words: the last error that refers to no other."""
    errors = [found for found in _ERROR.findall(words) if "root cause above" not in found]
    return errors[-1] if errors else words.splitlines()[0]


def check(report: Report, taken: Mapping[str, Taken], names: Sequence[str], exact: bool) -> None:
    """Answers of the last lap are the plain engine's, and what should hit did.

    Only KVStore is held to it; what others do is told.
    """
    plain = taken[UNCACHED]
    for name, done in taken.items():
        problems = []
        documents = done.documents[-1]
        if documents.unhit:
            total = len(documents.outside)
            problems.append(f"{documents.unhit} of {total} documents were not served whole")
        if exact:
            expected = plain.documents[-1].answers
            differing = [q for q, answer in documents.answers.items() if answer != expected[q]]
            for load, here, there in (
                ("chat", done.chats, plain.chats),
                ("unseen prompts", done.unseen, plain.unseen),
            ):
                if here and here[-1].answers != there[-1].answers:
                    differing.append(load)
            if differing:
                problems.append("answers differ from the plain engine's: " + "; ".join(differing))
        for problem in problems:
            if name in names and name != KVSTORE:
                report.note(f"{name}: {problem}")
            else:
                raise BenchmarkError(f"{name}: {problem}")


def _tell(
    report: Report, setup: Setup, said: Said, taken: Mapping[str, Taken], names: Sequence[str]
) -> None:
    """All figures, those with the same limit beside each other."""
    kind = "one-process engines" if setup.in_process else "engines"
    how = f"{setup.kind.name}, {Path(setup.model).name}, {report.samples} laps of {kind} in turn"
    report.params = {"dtype": said.dtype, "device": said.device}
    _tell_documents(report, setup.size, said, taken, names, how)
    plain = taken[PLAIN]
    for contender in (UNCACHED, PLAIN, *names):
        done = taken[contender]
        of: dict[str, Any] = {"contender": contender, "against": f"{PLAIN}; {how}"}
        report.level(
            "chat: output",
            *(statistics.median(c.produced / c.seconds for c in x.chats) for x in (done, plain)),
            unit="token/s",
            less_is_better=False,
            samples=len(done.chats),
            conversations=setup.size.requests,
            rounds=setup.size.rounds,
            percent_cached=round(100 * statistics.median(chat.cached for chat in done.chats)),
            **of,
        )
        first, least = (Samples(tuple(chat.first for chat in x.chats)) for x in (done, plain))
        report.duration("chat: first token, mean", first, least, unit="ms", **of)
        report.level(
            "unseen prompts: all tokens",
            _throughput(done),
            _throughput(plain),
            unit="token/s",
            less_is_better=False,
            samples=sum(len(unseen.seconds) for unseen in done.unseen),
            prompts=setup.size.requests,
            **of,
        )


def _tell_documents(
    report: Report,
    size: Size,
    said: Said,
    taken: Mapping[str, Taken],
    names: Sequence[str],
    how: str,
) -> None:
    did = {
        kind: {name: done.samples(attrgetter(kind)) for name, done in taken.items()}
        for kind in ("miss", "own", "outside", "copies")
    }
    own, outside, own_name = did["own"][PLAIN], "hit from outside", f"{PLAIN}, own hit"
    uncached = taken[UNCACHED].samples(lambda d: d.miss + d.own)
    rows: list[tuple[str, str, Samples, Samples | float, str]] = []
    if KVSTORE in names:
        owed = _OWED * did["own"][KVSTORE].quantile() + did["copies"][KVSTORE].quantile()
        what = f"{_OWED} × own hit, and the copy"
        rows += [(outside, n, did["outside"][n], owed, what) for n in (KVSTORE, FRESH)]
    rows += [("own hit", n, did["own"][n], own, own_name) for n in (PLAIN, *names)]
    connected = [name for name in (*names, FRESH) if name in taken]
    rows += [(outside, n, did["outside"][n], own, own_name) for n in connected]
    rows += [("everything computed", UNCACHED, uncached, own, own_name)]
    rows += [("miss", n, did["miss"][n], uncached, UNCACHED) for n in (PLAIN, *names)]
    for figure, contender, seconds, limit, against in rows:
        report.duration(
            f"first token, {figure}",
            seconds,
            limit,
            unit="ms",
            contender=contender,
            tokens=size.tokens,
            kv_bytes=size.tokens * said.token_bytes,
            against=f"{against}; {how}",
        )


def _throughput(taken: Taken) -> float:
    return statistics.median(
        unseen.tokens / seconds for unseen in taken.unseen for seconds in unseen.seconds
    )
