"""What may happen to the store of an engine, whose requests finish all the same."""

from __future__ import annotations

import signal
import time
from abc import ABC, abstractmethod
from typing import Any, Final

from tests.engines.model_tools import document
from tests.session_tools import Served, eventually

PROMPT: Final = 500
TOKENS: Final = 12


class Serving(ABC):
    """An engine and its store, and what the engine answers to `prompts` without that."""

    def __init__(self, served: Served) -> None:
        self.served = served
        text = document(1400)
        self.prompts = [text[n * 100 : n * 100 + PROMPT] for n in range(5)]
        self.expected = self.without()

    @abstractmethod
    def without(self) -> Any:
        """The answers of an engine that has no store."""

    @abstractmethod
    def begin(self) -> None:
        """Have it answer all prompts at once, its own cache empty."""

    @abstractmethod
    def answer(self) -> dict[str, Any]:
        """What it answers."""

    def ask(self) -> dict[str, Any]:
        """All prompts at once, its own cache empty."""
        self.begin()
        return self.answer()

    def check(self, answer: dict[str, Any]) -> None:
        """Every request ended as it should, with the right answer."""
        assert answer["finish"] == ["length"] * len(self.prompts)
        assert answer["tokens"] == self.expected

    def hits(self) -> bool:
        """Whether all prompts are served from the store now; checks their answers."""
        answer = self.ask()
        self.check(answer)
        return min(answer["cached"]) > 0

    def killed_and_restarted(self) -> None:
        """The store is killed in the middle."""
        eventually(self.hits, 120)
        self.begin()
        time.sleep(0.3)  # Somewhere in the middle.
        self.served.kill()
        self.check(self.answer())
        self.check(self.ask())
        self.served.restart()
        eventually(self.hits, 120)

    def stands_still(self) -> None:
        """The store is stopped in the middle, and goes on later."""
        eventually(self.hits, 120)
        self.begin()
        time.sleep(0.2)
        self.served.signal(signal.SIGSTOP)
        try:
            self.check(self.answer())
            self.check(self.ask())
        finally:
            self.served.signal(signal.SIGCONT)
        eventually(self.hits, 120)

    def stop(self) -> None:
        """End the store in good order, once all of it is on disk."""
        eventually(self.hits, 120)
        with self.served.session() as session:
            assert session.flush() == 0
        self.served.stop()

    def bits_flip(self, step: int) -> None:
        """The store is restarted with a bit changed in every `step` bytes of its disk, and notices.

        It notices when it reads, which may be before an engine is promised anything.
        """
        self.stop()
        slab = next((self.served.folder / "disk").rglob("kvstore.slab"))
        with slab.open("r+b") as file:
            for offset in range(8192, slab.stat().st_size, step):
                file.seek(offset)
                byte = file.read(1)
                file.seek(offset)
                file.write(bytes([byte[0] ^ 4]))
        self.served.restart()

        def noticed() -> bool:
            self.check(self.ask())
            return any("corrupt" in name for name in self.served.stats()["counters"])

        eventually(noticed, 120)
        eventually(self.hits, 120)
