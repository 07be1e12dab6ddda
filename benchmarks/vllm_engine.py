"""One vLLM engine in a process of its own, and how it is made for each contender."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from kvstore.benchmarks.crew import start
from kvstore.benchmarks.figures import BenchmarkError
from kvstore.benchmarks.vllm_child import Answered, Said, forget, generate, make, serve

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


class EngineProcess:
    """A vLLM engine that takes one order at a time; a context manager.

    Raises:
        BenchmarkError: it did not start, ended, or did not answer in time; with its last words.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[dict[str, Any]], tuple[Any, Any]],
        settings: dict[str, Any],
        environment: dict[str, str],
    ) -> None:
        """`make` gives the engine and what it `said` of itself, in the other process."""
        self._name = name
        # A file, not a pipe: worker processes keep it open, and nobody reads it as it fills.
        self._log = tempfile.NamedTemporaryFile("w+", prefix="vllm-", suffix=".log")  # noqa: SIM115
        variables = _ENVIRONMENT | os.environ | environment
        self._process, self._orders = start(serve, make, settings, variables, self._log.name)
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


class VllmEngine(EngineProcess):
    """The engine of a contender."""

    said: Said

    def __init__(
        self, contender: Contender, *, in_process: bool, local: bool, **settings: Any
    ) -> None:
        variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0" if in_process else "1"}
        if local:
            variables["HF_HUB_OFFLINE"] = "1"
        settings |= contender.settings
        super().__init__(contender.name, make, settings, contender.environment | variables)

    def generate(self, prompts: Sequence[list[int]], tokens: int) -> Answered:
        """Greedy answers of so many tokens to `prompts`, all given at once."""
        self.tell(generate, prompts, tokens)
        answered: Answered = self.answer()
        if not all(answered.finished):
            raise BenchmarkError(f"{self._name}: a request did not end as it should")
        return answered

    def forget(self) -> None:
        """Empty vLLM's own prefix cache; saves that are under way have ended then."""
        self.tell(forget)
        self.answer()
