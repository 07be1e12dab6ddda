"""Text that is no prefix: pieces are reused where they stand, and nothing approximate is shared."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import pytest

from kvstore.blend.calibration import Quality, Verdict, keep
from kvstore.blend.pieces import BASE, Placed, filler
from kvstore.blend.reuse import Reuse, asked
from kvstore.blocks.spec import Group, Opaque, Part
from kvstore.connectors.transformers.cache import KVStoreCache, cache_part, model_identity
from kvstore.connectors.vllm.blend_refusals import refusal
from kvstore.connectors.vllm.blending import Blending
from kvstore.connectors.vllm.layout import Pages
from kvstore.connectors.vllm.messages import Blended
from kvstore.errors import SpecError
from tests.engines.model_tools import APART, document, model
from tests.engines.test_vllm_layerwise import damage
from tests.engines.vllm_tools import Engine, transfer
from tests.session_tools import Served, Stores

pytestmark = pytest.mark.vllm

HEAD: Final = 64
"""Tokens that prompts begin with alike: a block."""
LENGTHS: Final = (150, 130, 141)
"""Of the pieces; none is a multiple of a page."""


@pytest.fixture(scope="module")
def served(stores: Stores) -> Served:
    return stores.serve("512MiB")


@pytest.fixture(scope="module")
def reference() -> Any:
    """The same model in transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)  # Several would spin for each other, and for the engine.
    return AutoModelForCausalLM.from_pretrained(model(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def engine(
    served: Served, reference: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    """Its steps are smaller than what pieces and prompts need, and it checks what it loads.

    Its model has passed a calibration, in transformers.
    """
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        found = {"question 0.2": Quality(0.02, 0.96)}
        keep(model_identity(reference, cache_part(reference)), Verdict(1, "small", 384, found))
    connector = transfer(
        address=f"unix://{served.socket}",
        vllm__approximate=True,
        session__checksum=True,
    )
    connector["kv_load_failure_policy"] = "recompute"
    sizes: dict[str, Any] = {"block_size": 32, "max_model_len": 1024, "max_num_batched_tokens": 256}
    with Engine(connector, environment={"XDG_CACHE_HOME": str(cache)}, **sizes) as one:
        yield one


class Texts:
    """Pieces of a document, and prompts made of them."""

    def __init__(self) -> None:
        from transformers import AutoTokenizer

        self.filler = filler(AutoTokenizer.from_pretrained(model()).encode, 0).tolist()
        text = document(1200)
        self.pieces, at = [], 200
        for length in LENGTHS:
            self.pieces.append(text[at : at + length])
            at += length
        self.head, self.question = text[:HEAD], text[-30:]

    def prompt(self, *order: int, first: int | None = None) -> list[int]:
        """Pieces in that order, behind the common head, or one with a `first` token of its own."""
        head = self.head if first is None else [first, *self.head[1:]]
        return [*head, *(token for n in order for token in self.pieces[n]), *self.question]

    def spans(self, *order: int) -> list[list[int]]:
        """Where they stand in it."""
        spans, at = [], HEAD
        for n in order:
            spans.append([at, at + LENGTHS[n]])
            at += LENGTHS[n]
        return spans


@pytest.fixture(scope="module")
def texts() -> Texts:
    return Texts()


def register(engine: Engine, texts: Texts, **wishes: Any) -> None:
    """Have the engine compute the pieces, and wait until they are found."""
    for piece in texts.pieces:
        place = {"piece": {"start": BASE, "end": BASE + len(piece)}}
        engine.generate(texts.filler + piece, max_tokens=1, wishes=wishes | place)
    prompt, until = texts.prompt(0, 1, 2, first=900), time.monotonic() + 30
    ask = {"reuse": "approximate", "selection": "none", "pieces": texts.spans(0, 1, 2)}
    while time.monotonic() < until:
        engine.forget()
        (told,) = engine.generate(prompt, max_tokens=2, wishes=wishes | ask)["told"]
        if told["approximate"]["pieces"] == len(texts.pieces):
            return
    raise AssertionError(f"pieces were not found: {told}")


@pytest.fixture(scope="module")
def registered(engine: Engine, texts: Texts) -> Texts:
    register(engine, texts)
    return texts


def approximate(
    engine: Engine, prompt: list[int], max_tokens: int = 6, **wishes: Any
) -> tuple[list[int], dict[str, Any], list[dict[int, float]]]:
    """An answer, what it says of pieces, and log-probabilities; vLLM's cache is empty before."""
    engine.forget()
    asks = {"reuse": "approximate", "skip_save": True} | wishes
    answer = engine.generate(prompt, max_tokens=max_tokens, wishes=asks, logprobs=5)
    return answer["tokens"][0], answer["told"][0]["approximate"], answer["logprobs"][0]


@pytest.mark.parametrize(
    ("wishes", "length"), [({"recompute": 1.0}, 32), ({"selection": "all"}, 4)], ids=str
)
def test_all_rows_are_a_prefill(
    engine: Engine, registered: Texts, wishes: dict[str, Any], length: int
) -> None:
    prompt = registered.prompt(2, 0, first=901)
    engine.forget()
    plain = engine.generate(prompt, max_tokens=length, wishes=APART, logprobs=5)
    tokens, told, logprobs = approximate(engine, prompt, length, **wishes)
    assert tokens == plain["tokens"][0]
    promised = HEAD + LENGTHS[2] + LENGTHS[0]
    assert told == {"reused": 0, "recomputed": promised, "pieces": 2, "missed": 0}
    for here, there in zip(logprobs, plain["logprobs"][0], strict=True):
        assert max(abs(here[token] - there[token]) for token in here.keys() & there.keys()) <= 1e-3


def test_equal_rows_are_those_of_transformers(
    engine: Engine, registered: Texts, served: Served, reference: Any
) -> None:
    """Chosen one by one, as the reference does, they say the same."""
    import torch
    from transformers import DynamicCache

    prompt, spans = registered.prompt(2, 0, first=907), registered.spans(2, 0)
    torch.set_num_threads(1)  # Several spin while they wait, which takes ages beside an engine.
    engine.tell(_within, "single rows")
    engine.answer()
    with (
        KVStoreCache.open(reference, served.config(), uncalibrated=True) as cache,
        torch.no_grad(),
    ):
        for selection in ("first", "question"):
            wishes = {"selection": selection, "recompute": 0.2, "pieces": spans}
            tokens, told, logprobs = approximate(engine, prompt, 8, **wishes)
            past = DynamicCache(config=reference.config)
            wanted = asked(wishes | {"reuse": "approximate"}, len(prompt))
            there = cache._of_pieces().blend(past, np.asarray(prompt), wanted)
            assert (told["reused"], told["pieces"]) == (there.reused, there.pieces)
            rest = torch.tensor([prompt[past.get_seq_length() :] + tokens[:-1]])
            logits = reference(rest, past_key_values=past, logits_to_keep=len(tokens)).logits[0]
            for here, expected in zip(logprobs, logits.log_softmax(-1), strict=True):
                assert max(abs(here[n] - float(expected[n])) for n in here) <= 1e-3
    engine.tell(_within, "mended")
    engine.answer()


def test_pieces_are_found_and_named(engine: Engine, registered: Texts) -> None:
    """By their tokens, or by their places; and so many rows of them are computed as was asked."""
    prompt, covered = registered.prompt(1, 2, first=902), LENGTHS[1] + LENGTHS[2]
    found = approximate(engine, prompt, recompute="balanced")
    named = approximate(engine, prompt, recompute=0.2, pieces=registered.spans(1, 2))
    assert found == named
    told = found[1]
    rows = told["recomputed"] - HEAD
    assert told["pieces"] == 2
    assert told["reused"] + rows == covered
    assert abs(rows - 0.2 * covered) < 16
    fast = approximate(engine, prompt, recompute="fast")[1]
    assert fast["recomputed"] - HEAD == round(0.1 * covered)
    counts = engine.metrics()
    assert counts["kvstore_approximate_requests_total.blended"] >= 3
    assert counts["kvstore_approximate_tokens_total.reused"] >= told["reused"]


def test_transformers_and_vllm_have_the_same_pieces(
    engine: Engine, registered: Texts, served: Served, reference: Any
) -> None:
    """What one computed the other finds, and says the same with it."""
    import torch

    config = served.config(checksum=True)  # As the engine has it: other tests damage blocks.
    with KVStoreCache.open(reference, config, uncalibrated=True) as cache:
        for made_here in (False, True):
            prompt, spans = registered.prompt(2, 1, first=906), registered.spans(2, 1)
            if made_here:
                cache._of_pieces()._session.clear()
                for piece in registered.pieces:
                    assert cache.add_piece(piece).stored > 0
            asks = {"recompute": 0.1, "selection": "first", "pieces": spans}
            tokens, told, _ = approximate(engine, prompt, 8, **asks)
            said = cache.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, **asks)
            assert cache.last is not None
            assert cache.last.approximate is not None
            assert (cache.last.approximate.pieces, told["pieces"]) == (2, 2)
            assert cache.last.approximate.reused == told["reused"]
            assert tokens == said[0, len(prompt) :].tolist()


def test_an_exact_prefix_comes_first(engine: Engine, registered: Texts) -> None:
    """From the store, behind, and then pieces in the step that goes on from it."""
    prompt = registered.prompt(0, 1)
    engine.generate([*prompt[:HEAD], 7], max_tokens=2)
    told: dict[str, Any] = {}
    for _ in range(50):
        tokens, told, _ = approximate(engine, prompt, recompute=1.0)
        if told["recomputed"] == LENGTHS[0] + LENGTHS[1]:
            break
    assert told["recomputed"] == LENGTHS[0] + LENGTHS[1]
    engine.forget()
    assert [tokens] == engine.generate(prompt, max_tokens=6, wishes=APART)["tokens"]


def test_pieces_of_another_tenant_are_missing(engine: Engine, registered: Texts) -> None:
    prompt = registered.prompt(0, 2, first=903)
    engine.forget()
    plain = engine.generate(prompt, max_tokens=6, wishes=APART)["tokens"][0]
    for place, missed, why in (
        ({"pieces": registered.spans(0, 2)}, 2, "missed"),
        ({}, 0, "no_pieces"),
    ):
        tokens, told, _ = approximate(engine, prompt, tenant="two", **place)
        assert tokens == plain
        nothing = {"reused": 0, "recomputed": 0, "pieces": 0, "missed": missed}
        assert told == nothing | {"reason": why}


def test_what_is_not_offered_here_is_exact(engine: Engine, registered: Texts) -> None:
    for wishes, why in (({"selection": "deviation"}, "selection"), ({"repair": 4}, "repair")):
        told = approximate(engine, registered.prompt(0, first=905), 1, **wishes)[1]
        assert (told["pieces"], told["reason"]) == (0, why)
    for wishes in ({"recompute": 1.5}, {"pieces": [[-1, 70]]}, {"reuse": None, "recompute": 0.2}):
        told = approximate(engine, registered.prompt(0, first=905), 1, **wishes)[1]
        assert (told["pieces"], told["reason"]) == (0, "malformed")
    answer = engine.generate(registered.prompt(0), max_tokens=1, wishes={"piece": 5})
    assert answer["told"] == [{"piece": {"reason": "malformed"}}]


def test_text_behind_other_text_is_no_piece(engine: Engine, registered: Texts) -> None:
    live = registered.prompt(1, first=904)
    engine.generate(
        live, max_tokens=2, wishes={"tenant": "live", "piece": {"start": HEAD, "end": HEAD + 100}}
    )
    told = approximate(engine, live, tenant="live", pieces=[[HEAD, HEAD + 100]])[1]
    assert told["pieces"] == 0
    assert engine.metrics()["kvstore_approximate_requests_total.no_filler"] == 1


def test_a_piece_that_nobody_keeps_is_not_taken(
    engine: Engine, registered: Texts, served: Served
) -> None:
    place = {"piece": {"start": BASE, "end": BASE + 100}}
    served.process.send_signal(signal.SIGSTOP)
    try:
        answer = engine.generate(registered.filler + document(100), max_tokens=1, wishes=place)
    finally:
        served.process.send_signal(signal.SIGCONT)
    assert answer["told"] == [{"piece": {"reason": "unavailable"}}]


def test_a_mix_of_exact_blended_and_aborted_requests(engine: Engine, registered: Texts) -> None:
    """Exact answers are what they would be alone; what was blended is in no cache."""
    orders = [(0, 1), (1, 0), (2, 1), (0, 2)]
    exact = [registered.prompt(*order, first=910 + n % 2) for n, order in enumerate(orders)]
    only = registered.prompt(2, 0, 1, first=920)
    engine.forget()
    expected = [
        engine.generate(prompt, max_tokens=8, wishes=APART)["tokens"][0] for prompt in exact
    ]
    alone = approximate(engine, only, 8, recompute=0.2)[0]
    chance = random.Random(5)
    requests: list[tuple[list[int], dict[str, Any], int]] = []
    for _ in range(60):
        blended = chance.random() < 0.5
        prompt = only if blended and chance.random() < 0.5 else chance.choice(exact)
        share = 0.2 if prompt is only else chance.choice([0.0, 0.1, 0.2])
        wishes = {"reuse": "approximate", "recompute": share} if blended else {}
        requests.append((prompt, wishes, chance.choice([0, 0, 0, 2, 3])))
    engine.forget()
    mixed = engine.ask(do="mix", requests=requests, at_once=3, max_tokens=8)["tokens"]
    ended = 0
    for (prompt, wishes, _), tokens in zip(requests, mixed, strict=True):
        if tokens is not None and not wishes:
            assert tokens == expected[exact.index(prompt)]
            ended += 1
        if tokens is not None and prompt is only:
            assert len(tokens) == 8
    assert ended > 10
    # It was only ever blended: neither vLLM nor the store has more of it, or of its answer, than
    # what stands before its pieces.
    longer = [*only, *alone, 5]
    for _ in range(2):
        answer = engine.generate(longer, max_tokens=2, wishes={"skip_save": True})
        assert answer["cached"][0] <= HEAD
        engine.forget()


def _within(llm: Any, what: str) -> str:
    """Have something go wrong in the engine's process."""
    import torch
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    from kvstore.connectors.vllm import blend_worker

    blends = get_kv_transfer_group()._side._blends  # type: ignore[attr-defined]
    own = blends._engine

    def fails(*given: Any, **named: Any) -> None:
        raise RuntimeError("for a test")

    match what:
        case "fill":
            blends._fill = fails
        case "run":
            own.run = fails
        case "rotation":
            usual = own._rotations[3]
            own._rotations[3] = lambda by, device: lambda keys: keys
            try:
                with torch.inference_mode():
                    own.check()
            except SpecError as e:
                return str(e)
            finally:
                own._rotations[3] = usual
        case "shadow" | "no shadow":
            core = llm.llm_engine.engine_core.engine_core
            share = 1.0 if what == "shadow" else 0.01
            core.scheduler.connector._side._blends._shadow = share
        case "single rows":
            blend_worker._TILE = 1
        case "mended":
            blend_worker._TILE = 16
            vars(blends).pop("_fill", None)
            vars(own).pop("run", None)
    return ""


def test_the_self_test_notices_a_wrong_rotation(engine: Engine, registered: Texts) -> None:
    engine.forget()
    engine.tell(_within, "rotation")
    assert "rotated keys in layer 3" in engine.answer()


@pytest.mark.parametrize("what", ["fill", "run", "lost"])
def test_what_fails_is_computed(
    engine: Engine, registered: Texts, served: Served, what: str
) -> None:
    prompt = registered.prompt(1, 0, 2, first=905)
    engine.forget()
    plain = engine.generate(prompt, max_tokens=6, wishes=APART)["tokens"][0]
    if what == "lost":
        damage(served, 1 << 12)
    else:
        engine.tell(_within, what)
        engine.answer()
    tokens, told, _ = approximate(engine, prompt, recompute=0.1)
    engine.tell(_within, "mended")
    engine.answer()
    assert tokens == plain
    if what != "run":  # vLLM computes that one itself.
        assert told["reason"] == ("checksum" if what == "lost" else "failed")
        assert told["reused"] == 0
    if what == "lost":
        damage(
            served, 1 << 12
        )  # A byte changed twice is as before; what was found damaged is gone.
        register(engine, registered)


def test_a_sampled_answer_is_compared_with_the_exact_one(engine: Engine, registered: Texts) -> None:
    prompt = registered.prompt(2, 0, first=907)
    engine.forget()
    plain = engine.generate(prompt, max_tokens=1, wishes=APART, logprobs=5)["logprobs"][0][0]
    before = approximate(engine, prompt, selection="none")
    engine.tell(_within, "shadow")
    engine.answer()
    exact = approximate(engine, prompt, recompute=1.0)[1]
    tokens, told, logprobs = approximate(engine, prompt, selection="none")
    counts = engine.metrics()
    engine.tell(_within, "no shadow")
    engine.answer()
    kl = told.pop("kl")
    assert (tokens, told) == before[:2]
    assert abs(exact["kl"]) < 1e-5
    # What the likeliest tokens contribute is most of it.
    likely = plain.keys() & logprobs[0].keys()
    part = sum(np.exp(plain[token]) * (plain[token] - logprobs[0][token]) for token in likely)
    assert kl > 1e-4
    assert abs(kl - part) < 0.5
    assert counts["kvstore_approximate_kl_count"] >= 2
    assert counts["kvstore_approximate_kl_sum"] >= kl * 0.99


def test_what_saves_little_is_exact(engine: Engine, registered: Texts) -> None:
    prompt, nothing = registered.prompt(0, first=908), {"reused": 0, "recomputed": 0, "pieces": 0}
    engine.forget()
    plain = engine.generate(prompt, max_tokens=4, wishes=APART)["tokens"][0]
    for asks, reason in (
        ({"pieces": [[HEAD, HEAD + 63]]}, "short"),
        ({"pieces": registered.spans(0), "recompute": 0.2}, "small_saving"),
    ):
        tokens, told, _ = approximate(engine, prompt, 4, **asks)
        assert (tokens, told) == (plain, nothing | {"missed": 0, "reason": reason})
        assert engine.metrics()[f"kvstore_approximate_requests_total.{reason}"] == 1


def test_a_preempted_request_tells_of_its_last_time() -> None:
    """Promised anew, it may be promised less than what workers have told of."""
    piece = Placed(64, 264, np.arange(200, dtype=np.uint32))
    blending = Blending(Reuse(True, 0.5, "first"), placed=[(piece, [b""] * 13)], end=264)
    blending.send(1)
    blending.came = Blended(rows=164, reason="")
    assert blending.account() == {"reused": 100, "recomputed": 164, "pieces": 1, "missed": 0}
    blending.start = 128
    assert blending.account()["recomputed"] == 164
    blending.send(2)
    assert blending.account() == {"reused": 68, "recomputed": 68, "pieces": 1, "missed": 0}
    blending.drop("prefix")
    assert blending.account()["reused"] == 68


def fits(**changed: Any) -> tuple[Any, Pages]:
    """An engine that may, but for what is `changed`, as `section__field`."""
    sections: dict[str, dict[str, Any]] = {
        "parallel_config": {
            "pipeline_parallel_size": 1, "data_parallel_size": 1,
            "enable_expert_parallel": False, "is_moe_model": False,
        },
        "model_config": {
            "hf_text_config": SimpleNamespace(rope_parameters={"rope_type": "llama3"}),
            "is_hybrid": False, "is_attention_free": False, "uses_mrope": False,
            "uses_alibi": False, "dtype": "float32",
        },
        "part": {"kind": "full", "layout": None},
    }  # fmt: skip
    plain = {"lora_config": None, "speculative_config": None}
    for name, value in changed.items():
        section, _, field = name.partition("__")
        if field:
            sections[section][field] = value
        else:
            plain[section] = value
    part = sections.pop("part")
    group = Group(2, 1, (8, 8), "float32", kind=part["kind"])
    parts = (Part(group, part["layout"]) if part["layout"] else Part(group),)
    config = SimpleNamespace(**plain, **{n: SimpleNamespace(**f) for n, f in sections.items()})
    return config, Pages(parts, 16, 1, parts)


@pytest.mark.parametrize(
    ("name", "changed"),
    {
        "pipeline_parallel": {"parallel_config__pipeline_parallel_size": 2},
        "expert_parallel": {
            "parallel_config__is_moe_model": True, "parallel_config__enable_expert_parallel": True,
        },
        "lora": {"lora_config": object()},
        "recurrent": {"model_config__is_hybrid": True},
        "mla": {"part__kind": "mla"},
        "mrope": {"model_config__uses_mrope": True},
        "rope": {
            "model_config__hf_text_config": SimpleNamespace(
                rope_parameters={"full": {"rope_type": "dynamic"}}
            )
        },
        "alibi": {"model_config__uses_alibi": True},
        "draft": {"speculative_config": SimpleNamespace(method="eagle")},
        "packed": {"part__layout": Opaque("amx", 16, 2048)},
        "cache_dtype": {"model_config__dtype": "bfloat16"},
        "engine": {"model_config": None},
    }.items(),
    ids=lambda it: it if isinstance(it, str) else "",
)  # fmt: skip
def test_engines_that_may_not_are_refused_by_name(name: str, changed: dict[str, Any]) -> None:
    assert refusal(*fits()) is None
    if name == "engine":
        config, pages = fits()
        del config.model_config.uses_mrope
    else:
        config, pages = fits(**changed)
    found = refusal(config, pages)
    assert found is not None
    assert found.name == name
    assert found.words
