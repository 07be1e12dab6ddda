"""One vLLM engine in a process of its own, and how it is made for each contender."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

import msgspec

from kvstore.benchmarks.figures import BenchmarkError

_CHILD: Final = "kvstore.benchmarks.vllm_child"
_START_SECONDS: Final = 900.0
_ANSWER_SECONDS: Final = 900.0
_END_SECONDS: Final = 60.0
_LAST_WORDS: Final = 8000
_ENVIRONMENT: Final = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # Left to itself, vLLM computes on other cores with a connector than without: on two cores, on
    # both of them or on one.
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "2" if len(os.sched_getaffinity(0)) > 4 else "0",
    "VLLM_NO_USAGE_STATS": "1",
    # Threads that spin while another process has their core would make every time meaningless.
    "OMP_WAIT_POLICY": "PASSIVE",
}


@dataclass(frozen=True, slots=True)
class Contender:
    """vLLM with one way to keep KV: `settings` is what `LLM` is made with, beside the model."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def connected(self) -> bool:
        """Whether a KV connector keeps what vLLM's own cache loses."""
        return "kv_transfer_config" in self.settings


PLAIN: Final = Contender("plain vLLM")
UNCACHED: Final = Contender("vLLM without prefix cache", {"enable_prefix_caching": False})
KVSTORE: Final = "kvstore"


def connector(name: str, *, address: str, memory: int, folder: Path) -> Contender:
    """vLLM with the connector of this name; `memory` bytes and `folder` are for those that ask.

    `address` is the store's. Connectors that need more than this take it from their own
    environment variables, and have otherwise their defaults.
    """
    if name == KVSTORE:
        # A deadline that a busy machine misses would be measured as a fast miss.
        extra: dict[str, Any] = {
            "kvstore.address": address,
            "kvstore.session.lookup_timeout": 10.0,
            "kvstore.session.load_timeout": 60.0,
        }
        transfer = {
            "kv_connector": "KVStoreConnector",
            "kv_connector_module_path": "kvstore.connectors.vllm",
        }
    else:
        asked: dict[str, dict[str, Any]] = {
            "ExampleConnector": {"shared_storage_path": str(folder)},
            "OffloadingConnector": {"cpu_bytes_to_use": memory},
            "SimpleCPUOffloadConnector": {"cpu_bytes_to_use": memory},
        }
        extra = asked.get(name, {})
        transfer = {"kv_connector": name}
    environment = {}
    if name.startswith("LMCache"):
        gigabytes = -(-memory // (1 << 30))
        environment = {
            "LMCACHE_LOCAL_CPU": "True",
            "LMCACHE_MAX_LOCAL_CPU_SIZE": str(gigabytes),
            "LMCACHE_CHUNK_SIZE": "128",  # the documents are a multiple of it
        }
    whole = {**transfer, "kv_role": "kv_both", "kv_connector_extra_config": extra}
    return Contender(name, {"kv_transfer_config": whole}, environment)


class Said(msgspec.Struct):
    """What an engine says of itself once it has started."""

    start_seconds: float
    device: str
    dtype: str
    vocabulary: int
    token_bytes: int
    """Bytes of the KV of one token, in all layers."""


class Answered(msgspec.Struct):
    """What became of prompts that were given together; lists have one item per prompt."""

    seconds: float
    first: list[float]
    """Seconds from a request's arrival to its first token, waiting included."""
    cached: list[int]
    """Tokens of the prompt that were not computed."""
    answers: list[list[int]]
    finished: list[bool]


class VllmEngine:
    """A vLLM engine that takes one order at a time; a context manager.

    Raises:
        BenchmarkError: it did not start, ended, or did not answer in time; with its last words.
    """

    def __init__(
        self, contender: Contender, *, in_process: bool, local: bool, **settings: Any
    ) -> None:
        variables = _ENVIRONMENT | os.environ | contender.environment
        variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if in_process else "1"
        if local:
            variables["HF_HUB_OFFLINE"] = "1"
        # A file, not a pipe: worker processes keep it open, and nobody reads it as it fills.
        self._log = tempfile.NamedTemporaryFile("w+", prefix="vllm-", suffix=".log")  # noqa: SIM115
        self._name = contender.name
        made_with = msgspec.json.encode(settings | contender.settings).decode()
        self._process = subprocess.Popen(
            [sys.executable, "-m", _CHILD, made_with],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd="/",
            env=variables,
            start_new_session=True,  # so that its workers can be ended with it
        )
        try:
            self.said = msgspec.json.decode(self._line(_START_SECONDS), type=Said)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def generate(self, prompts: Sequence[list[int]], tokens: int) -> Answered:
        """Greedy answers of so many tokens to `prompts`, all given at once."""
        answered = msgspec.json.decode(
            self._ask(do="generate", prompts=prompts, tokens=tokens), type=Answered
        )
        if not all(answered.finished):
            raise BenchmarkError(f"{self._name}: a request did not end as it should")
        return answered

    def forget(self) -> None:
        """Empty vLLM's own prefix cache; saves that are under way have ended then."""
        said = msgspec.json.decode(self._ask(do="forget"), type=dict[str, str])
        if "error" in said:
            raise BenchmarkError(f"{self._name}: {said['error']}")

    def close(self) -> None:
        """End it in good order, workers included."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # It has ended already.
            self._process.stdin.close()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        with suppress(ProcessLookupError):  # Workers that outlived it.
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.stdout.close()
        self._log.close()

    def _ask(self, **order: Any) -> bytes:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(msgspec.json.encode(order) + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure("ended") from None
        return self._line(_ANSWER_SECONDS)

    def _line(self, seconds: float) -> bytes:
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], seconds)
        if not readable:
            raise self._failure(f"said nothing within {seconds:g} s")
        line = self._process.stdout.readline()
        if not line:
            raise self._failure("ended")
        return line

    def _failure(self, what: str) -> BenchmarkError:
        words = Path(self._log.name).read_text(errors="replace")[-_LAST_WORDS:]
        return BenchmarkError(f"{self._name}: the engine {what}; its last words:\n{words}")
