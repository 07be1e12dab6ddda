"""What engines are asked: long documents, chats of several rounds, and prompts never seen."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from kvstore.benchmarks.figures import BenchmarkError
from kvstore.benchmarks.serving_engine import ServingEngine

_UNIT: Final = 128
"""Documents are a multiple of the pages and blocks that engines and stores commonly have."""
_QUESTION: Final = 30
_ANSWER: Final = 8
_TURN: Final = 32
_REPLY: Final = 16
_ORDINARY: Final = 1000
"""Token ids below may be special ones."""


@dataclass(frozen=True, slots=True)
class Size:
    """How much is asked; tokens of a document, conversations (and unseen prompts) at once …"""

    tokens: int
    requests: int
    documents: int
    pairs: int
    """Per document, questions answered from outside; as many from the engine's own cache."""
    rounds: int
    batches: int

    @classmethod
    def chosen(cls, tokens: int, requests: int, *, quick: bool) -> Size:
        """The usual size, or a quick one; documents have whole units of tokens."""
        tokens = max(tokens // _UNIT, 1) * _UNIT
        if quick:
            return cls(tokens, requests, documents=2, pairs=2, rounds=3, batches=2)
        return cls(tokens, requests, documents=4, pairs=3, rounds=5, batches=4)

    @property
    def short(self) -> int:
        """Tokens of an unseen prompt, and of a conversation's first one."""
        return max(self.tokens // 4, _QUESTION)

    @property
    def longest(self) -> int:
        """The most tokens that a request ever has."""
        return max(self.tokens + _QUESTION + _ANSWER, self._grown)

    @property
    def room(self) -> int:
        """Tokens whose KV an engine has room for: a request and half of the conversations."""
        return max(self.longest, self.requests * self._grown // 2)

    @property
    def stored(self) -> int:
        """Tokens that a store is given, at most."""
        unseen = (self.batches + 1) * self.requests * (self.short + _REPLY)
        return (self.documents + 2) * self.longest + self.requests * self._grown + unseen

    @property
    def _grown(self) -> int:
        """Tokens of a conversation at its end."""
        return self.short + self.rounds * (_TURN + _REPLY)


@dataclass(slots=True)
class Documents:
    """First tokens, in seconds, and the answers in the order of the questions."""

    miss: list[float] = field(default_factory=list)
    own: list[float] = field(default_factory=list)
    outside: list[float] = field(default_factory=list)
    copies: list[float] = field(default_factory=list)
    """Streaming copies of as many bytes as an outside hit brings, in turns with those."""
    unhit: int = 0
    """Outside questions whose document was not served whole; in `outside` nevertheless."""
    answers: dict[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Chat:
    """Conversations, all in flight together."""

    seconds: float
    produced: int
    first: float  # mean seconds to the first token, without the first round
    cached: float  # the part of all prompt tokens that was not computed
    answers: list[list[int]]


@dataclass(frozen=True, slots=True)
class Unseen:
    """Batches of prompts that nobody has computed before."""

    seconds: list[float]
    tokens: int  # of a batch, answers included
    answers: list[list[int]]


class Load:
    """The same prompts for every engine: random tokens of a vocabulary."""

    def __init__(self, size: Size, vocabulary: int) -> None:
        self.size = size
        self._vocabulary = vocabulary

    def warm_up(self, engine: ServingEngine) -> None:
        """The first steps of a process are slow: one as long as those measured, and a hit."""
        for question in range(3):
            if question == 1:
                engine.forget()
            engine.generate([self.asked(-1, question)], _ANSWER)

    def documents(self, engine: ServingEngine) -> Documents:
        """One question after the other, on one document after the other."""
        done = Documents()
        for document in range(self.size.documents):
            for question in range(2 * self.size.pairs + 1):
                first, _ = self._ask(engine, done, document, question)
                (done.own if question else done.miss).append(first)
        return done

    def outside(self, engine: ServingEngine, copy: Callable[[], float]) -> Documents:
        """The same questions; every second one after the engine's own cache was emptied.

        `copy` is called after each of those.
        """
        done = Documents()
        for document in range(self.size.documents):
            first, _ = self._ask(engine, done, document, 0)
            done.miss.append(first)
            for pair in range(self.size.pairs):
                engine.forget()
                self._ask_outside(engine, done, document, 2 * pair + 1)
                done.copies.append(copy())
                first, _ = self._ask(engine, done, document, 2 * pair + 2)
                done.own.append(first)
        return done

    def fresh(self, engine: ServingEngine) -> Documents:
        """One question on each document, to an engine that has computed none of them."""
        done = Documents()
        for document in range(self.size.documents):
            self._ask_outside(engine, done, document, 0)
        return done

    def chat(self, engine: ServingEngine) -> Chat:
        """Every prompt is the conversation so far and a new turn; a round waits for the slowest."""
        starts = range(self.size.requests)
        prompts = [self._tokens(f"chat {n}", self.size.short) for n in starts]
        seconds, first, cached, given = 0.0, [], 0, 0
        replies: list[list[int]] = [[] for _ in prompts]
        for turn in range(self.size.rounds):
            for n, prompt in enumerate(prompts):
                prompt += self._tokens(f"chat {n} turn {turn}", _TURN)
            answered = engine.generate(prompts, _REPLY)
            seconds += answered.seconds
            given += sum(map(len, prompts))
            cached += sum(answered.cached)
            if turn:
                first += answered.first
            for prompt, reply, answer in zip(prompts, replies, answered.answers, strict=True):
                prompt += answer
                reply += answer
        produced = sum(map(len, replies))
        return Chat(seconds, produced, sum(first) / len(first), cached / given, replies)

    def unseen(self, engine: ServingEngine) -> Unseen:
        """Batches in a row: what a store still does after one slows down the next."""
        seconds, answers = [], []
        for batch in range(self.size.batches + 1):
            names = [f"unseen {batch} {n}" for n in range(self.size.requests)]
            prompts = [self._tokens(name, self.size.short) for name in names]
            answered = engine.generate(prompts, _REPLY)
            if any(answered.cached):
                raise BenchmarkError("a prompt that nobody has seen was found in a cache")
            answers += answered.answers
            if batch:  # No batch was before the first one.
                seconds.append(answered.seconds)
        return Unseen(seconds, self.size.requests * (self.size.short + _REPLY), answers)

    def _ask(
        self, engine: ServingEngine, done: Documents, document: int, question: int
    ) -> tuple[float, int]:
        """Seconds to the first token, and how many tokens were cached."""
        answered = engine.generate([self.asked(document, question)], _ANSWER)
        done.answers[f"document {document}, question {question}"] = answered.answers[0]
        return answered.first[0], answered.cached[0]

    def _ask_outside(
        self, engine: ServingEngine, done: Documents, document: int, question: int
    ) -> None:
        first, cached = self._ask(engine, done, document, question)
        done.outside.append(first)
        done.unhit += cached < self.size.tokens

    def asked(self, document: int, question: int) -> list[int]:
        """A question on a document."""
        body = self._tokens(f"document {document}", self.size.tokens)
        return body + self._tokens(f"document {document} question {question}", _QUESTION)

    def _tokens(self, name: str, count: int) -> list[int]:
        draw = random.Random(name)
        lowest = min(_ORDINARY, self._vocabulary // 2)
        return [draw.randrange(lowest, self._vocabulary) for _ in range(count)]
