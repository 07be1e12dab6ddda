"""One client process of a benchmark: it takes orders, a line each, and says how long they took."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import msgspec

from kvstore.benchmarks.crew import Answer, Order
from kvstore.benchmarks.engine import Engine, prompt_keys
from kvstore.benchmarks.lookups import INDEX_ONLY, Asker
from kvstore.benchmarks.loop import JOBS, Load
from kvstore.benchmarks.shapes import LLAMA_NHD
from kvstore.blocks.spec import Namespace, Part
from kvstore.client.session import Session
from kvstore.config import Config
from kvstore.errors import KVStoreError

Job = Callable[[], object]


class Member:
    """What it has set up, and the jobs that are timed. Close it with its stack."""

    def __init__(self, config: Config, number: int, stack: ExitStack) -> None:
        self._config = config
        self._number = number
        self._stack = stack
        self._jobs: dict[str, Job] = {}

    def copies(self, blocks: int, step: int) -> dict[str, Any]:
        """Save and load a prompt of its own, `step` blocks at a time."""
        session = self._session(LLAMA_NHD.namespace, LLAMA_NHD.part)
        engine = self._stack.enter_context(Engine(LLAMA_NHD, blocks, self._config))
        keys = prompt_keys(session, blocks, seed=self._number)
        load = partial(engine.load, session, keys, step)
        self._jobs = {
            "copy save": partial(engine.copy_out, step),
            "save": partial(engine.save, session, keys, step),
            "copy load": partial(engine.copy_in, step),
            "load": load,
            "check": partial(engine.check, load),
        }
        return {"huge": engine.huge}

    def lookups(self, tokens: int) -> dict[str, Any]:
        """Ask for a prompt that all clients share."""
        session = self._session(INDEX_ONLY.namespace, INDEX_ONLY.part)
        asker = self._stack.enter_context(Asker(session, tokens))
        self._jobs = asker.jobs
        return {"keys": len(asker.keys)}

    def loop(self, objects: int) -> dict[str, Any]:
        """Give the daemon's loop much to do, with so many objects."""
        load = Load(self._config, objects, self._stack)
        self._jobs = {job: getattr(load, job) for job in JOBS}
        return {}

    def work(self, job: str, calls: int = 1) -> Answer:
        """Do a job a few times."""
        run = self._jobs[job]
        stamps = [time.monotonic()]
        for _ in range(calls):
            run()
            stamps.append(time.monotonic())
        seconds = [end - start for start, end in itertools.pairwise(stamps)]
        return Answer(stamps[0], stamps[-1], seconds)

    def _session(self, namespace: Namespace, part: Part) -> Session:
        self._stack.close()  # What was set up before.
        return self._stack.enter_context(Session.open(namespace, [part], self._config))

    def obey(self, order: Order) -> Answer:
        """Set something up, or do a job."""
        match order.do:
            case "copies":
                return Answer(said=self.copies(**order.options))
            case "lookups":
                return Answer(said=self.lookups(**order.options))
            case "loop":
                return Answer(said=self.loop(**order.options))
            case job:
                return self.work(job, **order.options)


def main() -> None:
    """Take orders from stdin until it ends."""
    config = Config.model_validate_json(sys.argv[1])
    with ExitStack() as stack:
        member = Member(config, int(sys.argv[2]), stack)
        for line in sys.stdin.buffer:
            try:
                answer = member.obey(msgspec.json.decode(line, type=Order))
            except KVStoreError as e:
                answer = Answer(error=str(e))
            sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
            sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
