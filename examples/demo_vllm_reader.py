"""One vLLM engine of the demo: read a document, answer a question with and without the store."""

from __future__ import annotations

import argparse
import os
import time
from typing import IO, Any

from reading import say, told


def counted(name: str) -> dict[str, int]:
    """A metric of the connector, by its label."""
    from prometheus_client import REGISTRY

    samples = [s for family in REGISTRY.collect() for s in family.samples if s.name == name]
    return {sample.labels.get("tier", ""): int(sample.value) for sample in samples if sample.value}


def read(given: argparse.Namespace, out: IO[str]) -> dict[str, Any]:
    """Answer the question through the store at the address given, then without it; tell both."""
    say(out, step="importing vLLM")
    from vllm import LLM, SamplingParams

    say(out, step="starting the engine (some 20 s)")
    llm = LLM(
        str(given.model),
        dtype="float32",
        max_model_len=4096,
        max_num_seqs=4,
        block_size=64,  # No larger than the blocks that other engines store.
        enforce_eager=True,
        disable_log_stats=False,
        kv_transfer_config={
            "kv_connector": "KVStoreConnector",
            "kv_connector_module_path": "kvstore.connectors.vllm",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"kvstore.address": given.address},
        },
    )
    content = f"Read this document.\n\n{given.document.read_text()}\n\nQuestion: {given.question}"
    messages = [{"role": "user", "content": content}]
    prompt = llm.get_tokenizer().apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )

    def answer(tokens: list[int], **wishes: bool) -> Any:
        params = SamplingParams(
            temperature=0.0,
            max_tokens=given.new_tokens,
            extra_args={"kv_transfer_params": wishes},
        )
        return llm.generate({"prompt_token_ids": tokens}, params, use_tqdm=False)[0]

    apart = {"skip_load": True, "skip_save": True}
    # The first steps of a process are slow, with a store or without.
    answer(prompt[-100:], **apart)
    say(out, step=f"answering with the store ({len(prompt)} tokens)")
    stored = answer(prompt)
    llm.reset_prefix_cache()  # Else vLLM would remember the prompt itself.
    say(out, step=f"answering without it ({len(prompt)} tokens)")
    alone = answer(prompt, **apart)
    # Numbers come with the steps of the engine.
    time.sleep(0.2)
    answer(prompt[-100:], **apart)
    loaded = counted("kvstore_loaded_tokens_total")
    return {
        "question": given.question,
        "answer": stored.outputs[0].text.strip(),
        "identical": stored.outputs[0].token_ids == alone.outputs[0].token_ids,
        "prompt_tokens": len(prompt),
        "computed_tokens": len(prompt) - sum(loaded.values()),
        "loaded_tokens": loaded,
        "first_token_seconds": stored.metrics.first_token_latency,
        "first_token_seconds_alone": alone.metrics.first_token_latency,
        "blocks_saved": sum(counted("kvstore_saved_tokens_total").values()),
        "reason": "not in the store",
    }


if __name__ == "__main__":
    # What vLLM prints goes to standard error; only events go to the demo.
    events = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    say(events, result=read(told(), events))
