"""One process of the demo: read a document, answer a question with and without the store."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from reading import say, told
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from kvstore.connectors.transformers.cache import KVStoreCache
from kvstore.sources import load_config


class FirstToken:
    """A streamer that notes when the first generated token comes out."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._puts = 0
        self.seconds = 0.0

    def put(self, tokens: torch.Tensor) -> None:
        """Called with the prompt, then with each token."""
        self._puts += 1
        if self._puts == 2:
            self.seconds = time.perf_counter() - self._start

    def end(self) -> None:
        """Called after the last token."""


def read(model_dir: Path, address: str, document: str, question: str, limit: int) -> dict[str, Any]:
    """Answer `question` through the store at `address`, then without it; tell both."""
    say(step="loading the model")
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    content = f"Read this document.\n\n{document}\n\nQuestion: {question}"
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    length = prompt["input_ids"].shape[1]
    options = {"max_new_tokens": limit, "do_sample": False}
    # The first steps of a process are slow, with a store or without.
    model.generate(prompt["input_ids"][:, :128], max_new_tokens=2, do_sample=False)

    say(step="opening the store")
    config = load_config(overrides={"address": address})
    with KVStoreCache.open(model, config) as cache:
        say(step=f"answering with the store ({length} tokens)")
        clock = FirstToken()
        answer = cache.generate(**prompt, streamer=clock, **options)[0, length:].tolist()
        with_store = clock.seconds
        report = cache.last
        assert report is not None
        assert report.saved is not None

    say(step=f"answering without it ({length} tokens)")
    clock = FirstToken()
    alone = model.generate(**prompt, streamer=clock, **options)[0, length:].tolist()
    return {
        "question": question,
        "answer": tokenizer.decode(answer, skip_special_tokens=True).strip(),
        "identical": answer == alone,
        "prompt_tokens": length,
        "computed_tokens": report.computed_tokens,
        "loaded_tokens": report.tiers,
        "first_token_seconds": with_store,
        "first_token_seconds_alone": clock.seconds,
        "load_seconds": report.load_seconds,
        "blocks_saved": report.saved.stored,
        "save_seconds": report.saved.seconds,
        "reason": report.reason,
    }


if __name__ == "__main__":
    given = told()
    logging.disable_progress_bar()
    torch.set_num_threads(2)
    document = given.document.read_text()
    say(result=read(given.model, given.address, document, given.question, given.new_tokens))
