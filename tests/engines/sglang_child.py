"""What tests have an SGLang engine do, in its process."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from kvstore.benchmarks import sglang_engine


def make(settings: dict[str, Any]) -> tuple[Any, None, Callable[[], object]]:
    """The engine, of which there is nothing to say, and what ends it."""
    engine = sglang_engine.start(**settings)
    return engine, None, engine.shutdown


def generate(
    engine: Any, prompts: list[list[int]], tokens: int, wishes: dict[str, Any]
) -> dict[str, Any]:
    """Greedy answers, all at once; lists have one item per prompt."""
    started = time.perf_counter()
    first, answers = sglang_engine.ask(engine, prompts, tokens, **wishes)
    facts = [answer["meta_info"] for answer in answers]
    return {
        "seconds": time.perf_counter() - started,
        "tokens": [answer["output_ids"] for answer in answers],
        "finish": [fact["finish_reason"]["type"] for fact in facts],
        "cached": [fact["cached_tokens"] for fact in facts],
        "first": first,
    }


def call(engine: Any, name: str, options: dict[str, Any]) -> Any:
    """What a method of the engine returns."""
    return getattr(engine, name)(**options)


def update_weights(engine: Any, options: dict[str, Any]) -> None:
    """Update them from disk, as the HTTP API does, which takes more than the engine's method."""
    from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqInput

    order = UpdateWeightFromDiskReqInput(**options)
    done, words, _ = engine.loop.run_until_complete(
        engine.tokenizer_manager.update_weights_from_disk(order, None)
    )
    assert done, words


def metrics(engine: Any) -> dict[str, float]:
    """The connector's metrics, and SGLang's of retraction and eviction, over all processes."""
    from prometheus_client import CollectorRegistry
    from prometheus_client.multiprocess import MultiProcessCollector

    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    values: dict[str, float] = {}
    for family in registry.collect():
        if not family.name.startswith(("kvstore", "sglang:num_retract", "sglang:evict")):
            continue
        for sample in family.samples:
            if sample.name.endswith(("_bucket", "_created")):
                continue
            label = sample.labels.get("tier") or sample.labels.get("reason")
            name = f"{sample.name}.{label}" if label else sample.name
            values[name] = values.get(name, 0.0) + sample.value
    return values
