"""SGLang for benchmarks: how it is made, with which stores, and asked."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from kvstore.benchmarks.figures import BenchmarkError
from kvstore.benchmarks.serving_engine import (
    ELEMENT_BYTES,
    KVSTORE,
    Answered,
    Contender,
    Kind,
    Said,
)

PAGE: Final = 64
_SPARE_PAGES: Final = 2
"""SGLang takes a request in if it fits, answer included, and some is left."""
CPU: Final[dict[str, Any]] = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "disable_cuda_graph": True,
    # Two processes' threads would take turns on the same cores.
    "disable_overlap_schedule": True,
    "mem_fraction_static": 0.5,
}
"""What SGLang's engine and server are started with where there is no GPU."""
_FORGET_SECONDS: Final = 60.0
_ENVIRONMENT: Final = {
    "TOKENIZERS_PARALLELISM": "false",
    # Threads that spin while another process has their core would make every time meaningless.
    "OMP_WAIT_POLICY": "PASSIVE",
}


def linked(address: str, **extra: Any) -> dict[str, Any]:
    """The settings that turn KVStore on in SGLang; `extra` are its own, without `kvstore.`.

    Without an address, the engine has a store of its own.
    """
    settings = ({"address": address} if address else {}) | extra
    return {
        "enable_unified_cache_external_linker": True,
        "unified_cache_external_linker_backend": "dynamic",
        "unified_cache_external_linker_config": {
            "linker": "KVStoreLinker",
            "linker_module_path": "kvstore.connectors.sglang",
            "linker_extra_config": {f"kvstore.{name}": v for name, v in settings.items()},
        },
    }


def connector(name: str, *, address: str, memory: int, folder: Path) -> Contender:
    """SGLang with KVStore, or with its own HiCache and the storage backend of this name.

    Backends that need more than this take it from their own environment variables.
    """
    if name == KVSTORE:
        # A deadline that a busy machine misses would be measured as a fast miss.
        patient = {"session.lookup_timeout": 10.0, "session.load_timeout": 60.0}
        return Contender(name, linked(address, **patient))
    gigabytes = -(-memory // 10**9)
    settings = {"enable_hierarchical_cache": True, "hicache_storage_backend": name}
    environment = {"SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR": str(folder)}
    return Contender(name, settings | {"hicache_size": gigabytes}, environment)


def start(**settings: Any) -> Any:
    """An engine of SGLang with these settings, and those that a CPU needs."""
    import torch

    if not torch.cuda.is_available():
        os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
        settings = CPU | settings
    # It compiles small parts of itself with what lies beside its Python.
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
    import sglang

    common = {"page_size": PAGE, "random_seed": 0, "log_level": "warning"}
    return sglang.Engine(**common | {"skip_server_warmup": True} | settings)


def make(settings: dict[str, Any]) -> tuple[Any, Said, Callable[[], object]]:
    """The engine; what is left open is chosen by the platform."""
    import torch

    on_cpu = not torch.cuda.is_available()
    room, longest, requests = (settings.pop(name) for name in ("room", "longest", "requests"))
    settings["dtype"] = settings["dtype"] or ("float32" if on_cpu else "auto")
    started = time.perf_counter()
    engine = start(
        model_path=settings.pop("model"),
        max_total_tokens=(-(-room // PAGE) + _SPARE_PAGES) * PAGE,
        context_length=longest,
        max_running_requests=requests,
        **settings,
    )
    config = engine.tokenizer_manager.model_config
    dtype = str(config.dtype).removeprefix("torch.")
    heads = 2 * config.get_total_num_kv_heads()
    said = Said(
        time.perf_counter() - started,
        "CPU" if on_cpu else torch.cuda.get_device_name(),
        dtype,
        config.vocab_size,
        config.num_hidden_layers * heads * config.head_dim * ELEMENT_BYTES[dtype],
    )
    return engine, said, engine.shutdown


def ask(
    engine: Any, prompts: list[list[int]], tokens: int, **wishes: Any
) -> tuple[list[float], list[dict[str, Any]]]:
    """Seconds to the first tokens, and the whole greedy answers, to prompts that are given at once.

    `wishes` is what `GenerateReqInput` takes besides, the same for all.
    """
    from sglang.srt.managers.io_struct import GenerateReqInput

    greedy = {"temperature": 0.0, "max_new_tokens": tokens, "ignore_eos": True}
    greedy |= wishes.pop("sampling_params", {})
    started = time.perf_counter()

    async def one(prompt: list[int]) -> tuple[float, dict[str, Any]]:
        # As `Engine.async_generate` does, which does not take all that a request may have.
        order = GenerateReqInput(input_ids=prompt, sampling_params=greedy, stream=True, **wishes)
        chunks = engine.tokenizer_manager.generate_request(order, None)
        answer = await anext(chunks)
        first = time.perf_counter() - started
        return first, [answer, *[chunk async for chunk in chunks]][-1]

    async def together() -> list[tuple[float, dict[str, Any]]]:
        return await asyncio.gather(*map(one, prompts))

    done = engine.loop.run_until_complete(together())
    return [first for first, _ in done], [last for _, last in done]


def generate(
    engine: Any, prompts: list[list[int]], tokens: int, wishes: dict[str, Any] | None = None
) -> Answered:
    """Greedy answers of so many tokens to `prompts`, all given at once with these wishes."""
    started = time.perf_counter()
    params = {"custom_params": {"kvstore": wishes}} if wishes else {}
    first, answers = ask(engine, prompts, tokens, sampling_params=params)
    return Answered(
        time.perf_counter() - started,
        first,
        [answer["meta_info"]["cached_tokens"] for answer in answers],
        [answer["output_ids"] for answer in answers],
        [answer["meta_info"]["finish_reason"]["type"] == "length" for answer in answers],
    )


def forget(engine: Any) -> None:
    """Empty SGLang's own prefix cache, as soon as nothing is under way."""
    until = time.monotonic() + _FORGET_SECONDS
    while not engine.flush_cache().success:
        if time.monotonic() > until:
            raise BenchmarkError(f"its prefix cache was still in use after {_FORGET_SECONDS:g} s")
        time.sleep(0.05)


SGLANG: Final = Kind(
    "SGLang",
    make,
    generate,
    forget,
    uncached={"disable_radix_cache": True},
    connector=connector,
    environment=_ENVIRONMENT,
    chunk="chunked_prefill_size",
    handed=PAGE,
)
