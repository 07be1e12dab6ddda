"""Whatever `generate` is asked, the answer is the one of `model.generate`.

All rows use one store, one tenant and prompts that begin alike: each is warmed by all those before,
which were computed otherwise. A new argument needs a new row, and nothing else.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from kvstore.connectors.transformers.cache import KVStoreCache  # noqa: E402
from kvstore.errors import SpecError  # noqa: E402
from tests.transformers_tools import BLOCK, greedy, llama, open_cache, prompt  # noqa: E402

PAD, TOKENS = 7, 6 * BLOCK
WIDE = {"initializer_range": 0.3, "vocab_size": 64}  # answers that depend on every token
PLAIN = prompt(TOKENS).where(prompt(TOKENS) != PAD, 8)
PADDED = PLAIN.clone()
PADDED[0, 40:44] = PAD
ONES = torch.ones_like(PLAIN)


def masked(first: int, last: int) -> Any:
    mask = ONES.clone()
    mask[0, first:last] = 0
    return mask


class Streamer:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def put(self, tokens: Any) -> None:
        self.seen.append(tokens.tolist())

    def end(self) -> None:
        self.seen.append("end")


def unlike_seven(ids: Any, scores: Any) -> Any:
    return scores.index_fill(1, torch.tensor([PAD]), -1e9)


def by_hand(model: Any, input_ids: Any, **kwargs: Any) -> Any:
    return torch.cat([input_ids, input_ids[:, :2]], dim=1)


def other() -> Any:
    return llama(seed=5, **WIDE)


# What may be loaded of the prompt (None: the call goes without the store), ids, arguments.
BLOCKS = (TOKENS - 1) // BLOCK
ROWS: dict[str, tuple[int | None, Any, dict[str, Any]]] = {
    # attention masks
    "a mask of ones": (BLOCKS, PADDED, {"attention_mask": ONES}),
    "the mask made of pad tokens": (2, PADDED, {}),
    "a mask of ones again": (BLOCKS, PADDED, {"attention_mask": ONES}),
    "no mask, no pad token": (BLOCKS, PLAIN, {}),
    "a pad token that ends too": (BLOCKS, PADDED, {"eos_token_id": [2, PAD]}),
    "another pad token": (BLOCKS, PADDED, {"pad_token_id": 63}),
    "a pad token in a configuration": (
        2, PADDED, {"generation_config": transformers.GenerationConfig(pad_token_id=PAD)},
    ),
    "truth values": (BLOCKS, PADDED, {"attention_mask": ONES.bool()}),
    "padding on the left": (0, PADDED, {"attention_mask": masked(0, 20)}),
    "padding on the right": (5, PADDED, {"attention_mask": masked(90, 96)}),
    "a hole": (3, PLAIN, {"attention_mask": masked(50, 60)}),
    "a mask of another length": (None, PLAIN, {"attention_mask": ONES[:, 1:]}),
    "a mask in four dimensions": (None, PLAIN, {"attention_mask": ONES[None, None]}),
    "a mask of words": (None, PLAIN, {"attention_mask": {"full": ONES}}),
    # which token comes next
    "sampling": (
        BLOCKS, PLAIN, {"do_sample": True, "temperature": 0.7, "top_k": 9, "top_p": 0.9},
    ),
    "penalties": (BLOCKS, PLAIN, {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}),
    "bad words": (BLOCKS, PLAIN, {"bad_words_ids": [[3], [4, 5]], "suppress_tokens": [9]}),
    "a logits processor": (BLOCKS, PLAIN, {"logits_processor": [unlike_seven]}),
    "no list of processors": (None, PLAIN, {"logits_processor": (unlike_seven,)}),
    "allowed tokens": (BLOCKS, PLAIN, {"prefix_allowed_tokens_fn": lambda _, ids: [3, 4, 5]}),
    # when it ends
    "an end": (BLOCKS, PLAIN, {"eos_token_id": list(range(30)), "max_new_tokens": 20}),
    "a minimum": (BLOCKS, PLAIN, {"eos_token_id": list(range(60)), "min_new_tokens": 5}),
    "a length": (BLOCKS, PLAIN, {"max_new_tokens": None, "max_length": TOKENS + 3}),
    "a criterion": (BLOCKS, PLAIN, {"stopping_criteria": [lambda ids, scores: ids[:, -1] > 30]}),
    # what is told of it
    "scores": (
        BLOCKS, PLAIN,
        {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    ),
    "hidden states": (None, PLAIN, {"return_dict_in_generate": True, "output_hidden_states": True}),
    "attentions": (None, PLAIN, {"return_dict_in_generate": True, "output_attentions": True}),
    # several sequences, other caches, guesses
    "beams": (None, PLAIN, {"num_beams": 3}),
    "beams returned": (None, PLAIN, {"num_beams": 3, "num_return_sequences": 2}),
    "several samples": (None, PLAIN, {"do_sample": True, "num_return_sequences": 2}),
    "a batch": (None, PLAIN.repeat(2, 1), {}),
    "no cache": (None, PLAIN, {"use_cache": False}),
    "a static cache": (None, PLAIN, {"cache_implementation": "static"}),
    "a cache of one's own": (None, PLAIN, {"past_key_values": transformers.DynamicCache()}),
    "no cache of one's own": (BLOCKS, PLAIN, {"past_key_values": None}),
    "prefill in chunks": (None, PLAIN, {"prefill_chunk_size": 32}),
    "guesses from the prompt": (None, PLAIN, {"prompt_lookup_num_tokens": 4}),
    "guesses of a model": (None, PLAIN, {"assistant_model": other()}),
    "guidance": (None, PLAIN, {"guidance_scale": 1.5}),
    "a loop of one's own": (None, PLAIN, {"custom_generate": by_hand}),
    # what the model itself is given
    "positions": (None, PLAIN, {"position_ids": torch.arange(3, TOKENS + 3)[None]}),
    "embeddings": (None, None, {"inputs_embeds": torch.randn(1, TOKENS, 32)}),
    "a number of logits": (None, PLAIN, {"logits_to_keep": 1}),
    "inputs": (BLOCKS, None, {"inputs": PLAIN}),
    "nothing": (None, None, {}),
    "short numbers": (None, PLAIN.to(torch.uint8), {}),
    # what is off
    "options that are off": (
        BLOCKS, PLAIN,
        {"num_beams": 1, "use_cache": True, "output_attentions": False, "assistant_model": None},
    ),
    # mistakes of the caller
    "an unknown argument": (None, PLAIN, {"adapter_names": ["one"]}),
    "an unknown list": (None, PLAIN, {"task_ids": [1, 2]}),
    "a strange configuration": (None, PLAIN, {"generation_config": {"num_beams": 1}}),
    "an impossible length": (BLOCKS, PLAIN, {"max_new_tokens": -1}),
}  # fmt: skip

# The same as properties of the model.
CONFIGURATIONS: dict[str, tuple[int | None, dict[str, Any]]] = {
    "beams": (None, {"num_beams": 2}),
    "no cache": (None, {"use_cache": False}),
    "guesses": (None, {"prompt_lookup_num_tokens": 3}),
    "an option that is not known": (None, {"unheard_of": 1}),
    "sampling": (BLOCKS, {"do_sample": True, "top_k": 5}),
}


@pytest.fixture(scope="module")
def model() -> Any:
    torch.set_num_threads(1)  # of tiny matrices, more are slower
    model = llama(**WIDE)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = 2
    return model


@pytest.fixture(scope="module")
def cache(shared_store: Any, model: Any) -> Iterator[KVStoreCache]:
    with open_cache(model, shared_store, "arguments") as cache:
        yield cache


def outcome(generate: Any, ids: Any, arguments: dict[str, Any]) -> Any:
    """What a call gives, in parts that can be compared, or how it fails."""
    arguments = {"max_new_tokens": 6, "do_sample": False} | copy.copy(arguments)
    if isinstance(arguments.get("past_key_values"), transformers.DynamicCache):
        arguments["past_key_values"] = transformers.DynamicCache()
    streamer = Streamer()
    if arguments.get("num_beams", 1) == 1:
        arguments["streamer"] = streamer
    torch.manual_seed(3)
    try:
        output = generate(*(() if ids is None else (ids,)), **arguments)
    except Exception as e:  # noqa: BLE001 - which one it is, is what is compared
        return type(e), str(e)
    if isinstance(output, torch.Tensor):
        return output.tolist(), streamer.seen
    kept = {
        key: [[round(x, 3) for x in step.flatten().tolist()] for step in output[key]]
        for key in ("scores", "logits")
        if output.get(key) is not None
    }
    shapes = {
        key: [[tuple(layer.shape) for layer in step if layer is not None] for step in output[key]]
        for key in ("hidden_states", "attentions")
        if output.get(key) is not None
    }
    return output.sequences.tolist(), streamer.seen, kept, shapes, type(output.past_key_values)


def check(cache: KVStoreCache, ids: Any, arguments: dict[str, Any], blocks: int | None) -> None:
    alone = outcome(cache.model.generate, ids, arguments)
    for _ in range(2):
        assert outcome(cache.generate, ids, arguments) == alone
        assert cache.last is not None
        if blocks is None:
            assert cache.last.loaded_tokens == 0
            assert cache.last.saved is None, "refused before, not after"
            assert cache.last.reason
    if blocks is not None:
        assert cache.last.loaded_tokens == blocks * BLOCK


@pytest.mark.parametrize("row", ROWS)
def test_every_call_gives_what_the_model_alone_gives(cache: KVStoreCache, row: str) -> None:
    blocks, ids, arguments = ROWS[row]
    check(cache, ids, arguments, blocks)


@pytest.mark.parametrize("row", CONFIGURATIONS)
def test_options_of_the_model_count_like_arguments(cache: KVStoreCache, row: str) -> None:
    blocks, options = CONFIGURATIONS[row]
    before = cache.model.generation_config
    cache.model.generation_config = copy.deepcopy(before)
    try:
        for name, value in options.items():
            setattr(cache.model.generation_config, name, value)
        check(cache, PLAIN, {"do_sample": None}, blocks)
        if options.keys() <= {"num_beams", "use_cache"}:  # arguments come first
            check(cache, PLAIN, {"num_beams": 1, "use_cache": True}, BLOCKS)
    finally:
        cache.model.generation_config = before


def test_nothing_that_was_saved_is_of_another_computation(cache: KVStoreCache, model: Any) -> None:
    """After all rows, every prefix that they share is still the one of plain computing."""
    for ids in (PADDED, PLAIN):
        assert greedy(cache.generate, ids) == greedy(model.generate, ids)
        past = cache.load(ids, ONES)
        loaded = past.get_seq_length()
        right = transformers.DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids[:, :loaded], past_key_values=right)
        assert loaded == BLOCKS * BLOCK
        for here, there in zip(past.layers, right.layers, strict=True):
            assert torch.allclose(here.keys, there.keys, atol=1e-5)
            assert torch.allclose(here.values, there.values, atol=1e-5)


def test_what_is_refused_is_said_once_by_name(
    cache: KVStoreCache, caplog: pytest.LogCaptureFixture
) -> None:
    reason = "cache_config may change KV, or needs a cache of its own"
    for _ in range(3):
        cache.generate(PLAIN, cache_config={"nbits": 4}, max_new_tokens=2)
        assert cache.last is not None
        assert cache.last.reason == reason
    said = [record.getMessage() for record in caplog.records if record.name.startswith("kvstore")]
    assert said == [f"computed without the store: {reason}"]


def test_calls_by_hand_follow_masks_and_pad_tokens(shared_store: Any, model: Any) -> None:
    with open_cache(model, shared_store, "by hand") as cache:
        for mask, blocks in ((None, 2), (ONES, 0), (masked(50, 60), 3)):
            past = cache.load(PADDED, mask)
            said = model.generate(
                PADDED,
                attention_mask=mask,
                past_key_values=past,
                max_new_tokens=20,
                do_sample=False,
            )
            saved = cache.save(said, past)
            assert saved.stored + saved.had == (blocks or (TOKENS + 19) // BLOCK)
        assert greedy(cache.generate, PADDED) == greedy(model.generate, PADDED)
        assert cache.last.loaded_tokens == BLOCKS * BLOCK


def test_calls_by_hand_refuse_what_cannot_be_stored(cache: KVStoreCache) -> None:
    for ids, mask, why in (
        (PLAIN.repeat(2, 1), None, "call once per sequence"),
        (PLAIN, ONES[:, 1:], "must be equal"),
        (PLAIN.float(), None, "no tensor of token ids"),
        (PLAIN[:, :0], None, "one sequence"),
    ):
        with pytest.raises(SpecError, match=why):
            cache.load(ids, mask)
