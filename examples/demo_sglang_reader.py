"""One SGLang engine of the demo: read a document, answer a question with and without the store."""

from __future__ import annotations

import argparse
import os
import time
from typing import IO, Any

from reading import say, told


def counted(name: str) -> dict[str, int]:
    """A metric of the connector, by its label, from all processes of the engine."""
    from prometheus_client import CollectorRegistry
    from prometheus_client.multiprocess import MultiProcessCollector

    registry = CollectorRegistry()
    MultiProcessCollector(registry)
    samples = [s for family in registry.collect() for s in family.samples if s.name == name]
    return {sample.labels.get("tier", ""): int(sample.value) for sample in samples if sample.value}


def read(given: argparse.Namespace, out: IO[str]) -> dict[str, Any]:
    """Answer the question through the store at the address given, then without it; tell both."""
    say(out, step="importing SGLang")
    from transformers import AutoTokenizer

    from kvstore.benchmarks.sglang_engine import ask, forget, linked, start

    say(out, step="starting the engine (some 20 s)")
    engine = start(
        model_path=str(given.model),
        dtype="float32",
        context_length=4096,
        max_total_tokens=8192,
        max_running_requests=4,
        enable_metrics=True,
        **linked(given.address),
    )
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    content = f"Read this document.\n\n{given.document.read_text()}\n\nQuestion: {given.question}"
    messages = [{"role": "user", "content": content}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    def answer(tokens: list[int], limit: int, **wishes: bool) -> tuple[float, list[int]]:
        params = {"custom_params": {"kvstore": wishes}, "ignore_eos": False}
        first, answers = ask(engine, [tokens], limit, sampling_params=params)
        return first[0], answers[0]["output_ids"]

    apart = {"skip_load": True, "skip_save": True}
    # The first steps of a process are slow, with a store or without.
    answer(prompt[-100:], 2, **apart)
    say(out, step=f"answering with the store ({len(prompt)} tokens)")
    with_store, stored = answer(prompt, given.new_tokens)
    forget(engine)  # Else SGLang would remember the prompt itself.
    say(out, step=f"answering without it ({len(prompt)} tokens)")
    without, alone = answer(prompt, given.new_tokens, **apart)
    # Numbers come with the steps of the engine, once a second.
    time.sleep(1.0)
    answer(prompt[-100:], 2, **apart)
    loaded, saved = (counted(f"kvstore_{what}_tokens_total") for what in ("loaded", "saved"))
    engine.shutdown()
    return {
        "question": given.question,
        "answer": tokenizer.decode(stored, skip_special_tokens=True).strip(),
        "identical": stored == alone,
        "prompt_tokens": len(prompt),
        "computed_tokens": len(prompt) - sum(loaded.values()),
        "loaded_tokens": loaded,
        "first_token_seconds": with_store,
        "first_token_seconds_alone": without,
        "blocks_saved": sum(saved.values()),
        "reason": "not in the store",
    }


if __name__ == "__main__":
    # What SGLang prints goes to standard error; only events go to the demo.
    events = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    say(events, result=read(told(), events))
