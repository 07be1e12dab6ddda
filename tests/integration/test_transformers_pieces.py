"""Pieces reused behind other text: what is exact stays exact, what is approximate stays apart."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from typer.testing import CliRunner  # noqa: E402

from kvstore.benchmarks import blend, calibrate  # noqa: E402
from kvstore.blend import calibration  # noqa: E402
from kvstore.blend.calibration import Quality, Verdict, keep  # noqa: E402
from kvstore.blend.reuse import asked  # noqa: E402
from kvstore.blend.selection import SELECTIONS  # noqa: E402
from kvstore.connectors.transformers.cache import KVStoreCache, cache_part  # noqa: E402
from kvstore.connectors.transformers.pieces import Approximate  # noqa: E402
from kvstore.connectors.transformers.repair import Repair  # noqa: E402
from kvstore.connectors.transformers.rows import Rows  # noqa: E402
from kvstore.errors import SpecError  # noqa: E402
from kvstore.server.cli.main import app  # noqa: E402
from tests.transformers_tools import SIZES, build, greedy, llama, open_cache  # noqa: E402

ROOM = {"max_position_embeddings": 2048}
PIECES = [[20, 120], [120, 190], [200, 300]]
INSIDE = 270


def text(count: int, seed: int) -> Any:
    return np.random.default_rng(seed).integers(1, 64, count)


PROMPT = text(320, 0)


def ids(tokens: Any = PROMPT) -> Any:
    return torch.from_numpy(np.asarray(tokens))[None]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    """Several wait for each other by spinning, which takes ages where others work as well."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model() -> Any:
    return llama(**ROOM)


@pytest.fixture(scope="module")
def pieces(model: Any, shared_store: Any) -> Iterator[KVStoreCache]:
    """A cache whose store has the pieces of PROMPT."""
    with open_cache(model, shared_store, "pieces") as opened:
        for start, end in PIECES:
            opened.add_piece(PROMPT[start:end])
        yield opened


@pytest.fixture
def cache(pieces: KVStoreCache) -> KVStoreCache:
    """The same, whose store has nothing else."""
    pieces.session.clear()
    return pieces


def blended(cache: KVStoreCache, tokens: Any = PROMPT, **words: Any) -> tuple[Any, Approximate]:
    """A cache with pieces in it, and what became of them."""
    past = transformers.DynamicCache(config=cache.model.config)
    wanted = asked({"reuse": "approximate", "pieces": PIECES} | words, len(tokens))
    return past, cache._of_pieces().blend(past, np.asarray(tokens), wanted)


def prefilled(model: Any, tokens: Any = PROMPT) -> Any:
    past = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids(tokens), past_key_values=past)
    return past


def apart(one: Any, other: Any, rows: Any) -> float:
    """How far two caches differ at most."""
    pairs = zip(one.layers, other.layers, strict=True)
    planes = [(getattr(a, p), getattr(b, p)) for a, b in pairs for p in ("keys", "values")]
    return max(float((a[:, :, rows] - b[:, :, rows]).abs().max()) for a, b in planes)


def test_all_rows_computed_again_are_those_of_the_prompt(cache: KVStoreCache, model: Any) -> None:
    past, done = blended(cache, recompute=1.0)
    assert done == Approximate(0, INSIDE, 3, 0)
    assert past.get_seq_length() == 300
    assert apart(past, prefilled(model), slice(300)) < 1e-5
    stale, done = blended(cache, recompute=0.0)
    assert done == Approximate(INSIDE, 0, 3, 0)
    assert apart(stale, prefilled(model), slice(20)) < 1e-5
    assert apart(stale, prefilled(model), slice(20, 120)) > 1e-2
    # Whatever context, the first layer's values depend on the token alone, and its keys on the
    # place: rotated there, they are as computed there.
    stale.layers[1:], full = [], prefilled(model)
    full.layers[1:] = []
    assert apart(stale, full, slice(300)) < 1e-4
    said = greedy(lambda *a, **k: cache.generate(*a, recompute=1, pieces=PIECES, **k), ids(), 32)
    assert said == greedy(model.generate, ids(), 32)


def test_each_selection_computes_its_share(cache: KVStoreCache, model: Any) -> None:
    stale, full = blended(cache, recompute=0.0)[0], prefilled(model)
    for selection in SELECTIONS:
        past, done = blended(cache, recompute=0.3, selection=selection)
        wanted = {"all": INSIDE, "none": 0}.get(selection, round(0.3 * INSIDE))
        assert done == Approximate(INSIDE - wanted, wanted, 3, 0), selection
        assert apart(past, full, slice(20)) < 1e-5, selection
        same = (past.layers[1].values == stale.layers[1].values).all(-1).all(1)[0]
        assert int(same[20:190].sum() + same[200:300].sum()) == INSIDE - wanted, selection


def test_rows_do_not_see_what_comes_after_them(cache: KVStoreCache) -> None:
    """Neither computed ones in one pass nor in many small ones."""
    other = PROMPT.copy()
    other[250:] = text(70, 1)
    one, _ = blended(cache, selection="first", recompute=0.5)
    cache.add_piece(other[200:300])
    two, _ = blended(cache, other, selection="first", recompute=0.5)
    assert apart(one, two, slice(250)) < 1e-5
    assert apart(one, two, slice(250, 300)) > 1e-2


def test_rows_are_the_same_in_small_passes(
    cache: KVStoreCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = {name: blended(cache, selection=name)[0] for name in ("question", "deviation")}
    monkeypatch.setattr("kvstore.connectors.transformers.rows._MOST", 8192)
    for name, past in wanted.items():
        assert apart(blended(cache, selection=name)[0], past, slice(300)) < 1e-5


def test_the_question_is_asked_what_it_attends_to(model: Any) -> None:
    group = cache_part(model).group
    rows, full = Rows(model, group, PROMPT), prefilled(model)
    for layer, held in enumerate(full.layers):
        rows.put(layer, 0, held.keys, held.values)
    scores = rows.question(np.arange(300, 320), 300)
    assert model.config._attn_implementation == "sdpa"
    assert not any(module._forward_hooks for module in model.modules())
    looking = llama(**ROOM)
    looking.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = looking(ids(), output_attentions=True).attentions
    wanted = np.zeros(300)
    for weights, held in zip(attentions, full.layers, strict=True):
        seen = weights[0, :, 300:, :300].sum(1).view(2, 2, 300).sum(1)
        wanted += (seen * held.values[0, :, :300].norm(dim=-1)).sum(0).numpy()
    assert np.allclose(scores, wanted, rtol=1e-4)


def test_what_is_approximate_is_kept_apart(cache: KVStoreCache, model: Any) -> None:
    alone = greedy(model.generate, ids())
    given = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids())}
    output = cache.generate(
        ids(), pieces=PIECES, recompute=0.1, return_dict_in_generate=True, **given
    )
    assert cache.last is not None
    assert cache.last.approximate == Approximate(INSIDE - 27, 27, 3, 0)
    assert cache.last.loaded_tokens == INSIDE - 27
    assert "3 pieces reused, approximately: 27 of 270 tokens computed again" in str(cache.last)
    keys = cache.session.keys(output.sequences[0].numpy())
    assert cache.session.lookup(keys, holes=True).tiers == ("miss",) * len(keys)
    saved = cache.save(output.sequences, output.past_key_values)
    assert (saved.stored, saved.reason) == (0, "it holds reused pieces, which are approximate")
    # An exact request finds nothing of it; and pieces begin where what is exact ends.
    assert greedy(cache.generate, ids()) == alone
    assert (cache.last.loaded_tokens, cache.last.approximate) == (0, None)
    cache.generate(ids(), recompute="fast", **given)
    assert cache.last.approximate == Approximate(reason="prefix")
    assert cache.last.tiers == {"memory": 304}


def test_pieces_are_found_in_any_prompt_behind_what_is_exact(
    cache: KVStoreCache, model: Any
) -> None:
    greedy(cache.generate, ids(PROMPT[:50]))  # its three blocks end inside of the first piece
    prompt = np.concatenate([PROMPT[:50], PROMPT[200:300], text(9, 3), PROMPT[20:120], [5]])
    said = greedy(lambda *a, **k: cache.generate(*a, recompute=1.0, **k), ids(prompt))
    assert said == greedy(model.generate, ids(prompt))
    assert cache.last is not None
    assert cache.last.approximate == Approximate(0, 200, 2, 0)
    assert cache.last.tiers == {"memory": 48}


def test_pieces_that_are_not_there_are_computed(
    cache: KVStoreCache, model: Any, shared_store: Any
) -> None:
    alone = greedy(model.generate, ids())

    def ask(asking: KVStoreCache, **words: Any) -> tuple[list[int], Any]:
        said = greedy(lambda *a, **k: asking.generate(*a, **words, **k), ids())
        assert asking.last is not None
        return said, asking.last.approximate

    with open_cache(model, shared_store, "another") as other:
        assert ask(other, pieces=PIECES) == (alone, Approximate(missed=3))
    # Another process of the same tenant has them; by their tokens it finds whole blocks.
    with open_cache(model, shared_store, "pieces") as second:
        named = [*PIECES[:2], [205, 300]]
        assert ask(second, pieces=named, recompute=1.0) == (alone, Approximate(0, 170, 2, 1))
        assert ask(second, recompute=1.0) == (alone, Approximate(0, 256, 3, 0))
    with open_cache(model, shared_store, "lost") as losing:
        losing.add_piece(PROMPT[20:120])
        losing._of_pieces()._session.clear()
        assert ask(losing, recompute="fast") == (alone, Approximate(missed=1))


def test_a_failure_leaves_an_exact_answer(
    cache: KVStoreCache, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    greedy(cache.generate, ids(PROMPT[:17]))
    alone = greedy(model.generate, ids())
    calls = []

    def broken(rows: Rows, *args: Any) -> Any:
        calls.append(args)
        if len(calls) == 4:  # in the last layer of the second pass
            raise RuntimeError("no more memory")
        return update(rows, *args)

    update = Rows.update
    monkeypatch.setattr(Rows, "update", broken)
    assert greedy(lambda *a, **k: cache.generate(*a, pieces=PIECES, **k), ids()) == alone
    assert cache.last is not None
    assert cache.last.reason == "no pieces reused: RuntimeError: no more memory"
    assert cache.last.tiers == {"memory": 16}
    assert cache.last.saved.stored == 19
    assert model.config._attn_implementation == "sdpa"


def test_a_failure_at_the_very_end_stores_nothing_approximate(
    cache: KVStoreCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(*_: Any, **__: Any) -> Any:
        raise RuntimeError("late")

    monkeypatch.setattr("kvstore.connectors.transformers.pieces.Approximate", late)
    cache.generate(ids(), pieces=PIECES, max_new_tokens=4, do_sample=False)
    assert cache.last is not None
    assert "late" in cache.last.reason
    assert cache.last.saved.stored == 0


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (transformers.GPTNeoXConfig(**SIZES, rotary_pct=0.25), "rotates a part of each key"),
        (transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4), "has 0 rotary"),
        (
            transformers.SmolLM3Config(**(SIZES | ROOM), no_rope_layers=[1, 0]),
            "layer 1 of SmolLM3ForCausalLM depends on positions in another way",
        ),
    ],
)
def test_models_whose_keys_cannot_be_moved_are_refused(
    shared_store: Any, config: Any, problem: str
) -> None:
    model = build(config)
    alone = greedy(model.generate, ids())
    with open_cache(model, shared_store, problem) as cache:
        with pytest.raises(SpecError, match=problem):
            cache.add_piece(PROMPT[20:120])
        assert greedy(lambda *a, **k: cache.generate(*a, pieces=PIECES, **k), ids()) == alone
        assert cache.last is not None
        assert problem in cache.last.reason
        assert cache.last.saved.stored > 0


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        (transformers.MixtralConfig(**(SIZES | ROOM), num_local_experts=4), torch.float32),
        (transformers.Qwen3Config(**(SIZES | ROOM), head_dim=16), torch.float32),
        (
            transformers.LlamaConfig(
                **(SIZES | ROOM),
                rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4},
            ),
            torch.bfloat16,
        ),
    ],
)
def test_models_of_other_kinds(shared_store: Any, request: Any, config: Any, dtype: Any) -> None:
    model = build(config, dtype=dtype)
    with open_cache(model, shared_store, request.node.name) as cache:
        for start, end in PIECES:
            cache.add_piece(PROMPT[start:end])
        past, done = blended(cache, recompute=1.0)
        assert done.recomputed == INSIDE
        assert apart(past, prefilled(model), slice(300)) < (1e-5 if dtype == torch.float32 else 0.1)
        assert blended(cache, recompute=0.2, selection="question")[1].recomputed == 54


def test_rows_are_repaired_while_the_answer_grows(cache: KVStoreCache, model: Any) -> None:
    past, done = blended(cache, selection="none", repair=1024)
    assert done.recomputed == 0
    assert apart(past, prefilled(model), slice(300)) > 1e-2
    past.repair.step()  # All of them at once, in order.
    assert apart(past, prefilled(model), slice(300)) < 1e-5
    ask = {"pieces": PIECES, "recompute": 0.2, "repair": 50, "max_new_tokens": 4}
    said = greedy(lambda *a, **k: cache.generate(*a, **(k | ask)), ids())
    assert said
    assert cache.last is not None
    assert cache.last.approximate == Approximate(216, 54, 3, 0, repaired=4 * 50)


def test_a_repair_that_fails_leaves_the_answer(
    cache: KVStoreCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = {"pieces": PIECES, "recompute": 0.2, "max_new_tokens": 6}
    without = greedy(lambda *a, **k: cache.generate(*a, **(k | ask)), ids())

    def fail(_: Repair) -> None:
        raise MemoryError

    monkeypatch.setattr(Repair, "step", fail)
    with_it = greedy(lambda *a, **k: cache.generate(*a, **(k | ask), repair=8), ids())
    assert with_it == without
    assert cache.last is not None
    assert cache.last.approximate == Approximate(216, 54, 3, 0)


def test_what_is_wrong_is_said(cache: KVStoreCache, model: Any) -> None:
    with pytest.raises(SpecError, match="recompute is 2"):
        cache.generate(ids(), recompute=2)
    with pytest.raises(SpecError, match="a piece has 64 to"):
        cache.add_piece(PROMPT[:10])
    with pytest.raises(SpecError, match="more than the 2048 that the model was made for"):
        cache.add_piece(np.tile(PROMPT, 5))
    model.train()
    try:
        with pytest.raises(SpecError, match=r"call model.eval\(\)"):
            cache.add_piece(PROMPT)
    finally:
        model.eval()
    masked = torch.ones_like(ids())
    masked[0, 30] = 0
    cache.generate(ids(), masked, pieces=PIECES, max_new_tokens=2, do_sample=False)
    assert cache.last is not None
    assert cache.last.reason == "no pieces reused: not all tokens are attended to"


def test_pieces_of_a_model_that_has_changed_are_not_its_own(
    shared_store: Any, request: Any
) -> None:
    model = llama(**ROOM)
    with open_cache(model, shared_store, request.node.name) as cache:
        cache.add_piece(PROMPT[20:120])
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
        alone = greedy(model.generate, ids())
        asking = {"pieces": [[20, 120]], "recompute": 0.5}
        assert greedy(lambda *a, **k: cache.generate(*a, **asking, **k), ids()) == alone
        assert cache.last is not None
        assert cache.last.approximate == Approximate(missed=1)


def test_pieces_are_quantised_by_a_codec(
    cache: KVStoreCache, model: Any, shared_store: Any
) -> None:
    """They are other pieces than those that are kept as they are, and close to them."""
    plain, _ = blended(cache, recompute=0.0)
    with open_cache(model, shared_store, "pieces", codec="i8") as coded:
        assert blended(coded)[1] == Approximate(missed=3)
        for start, end in PIECES:
            assert coded.add_piece(PROMPT[start:end]).stored > 0
        past, done = blended(coded, recompute=0.0)
        assert done == Approximate(INSIDE, 0, 3, 0)
        assert 0 < apart(past, plain, slice(20, 300)) < 0.05
        greedy(lambda *a, **k: coded.generate(*a, pieces=PIECES, **k), ids())
        assert coded.last is not None
        assert coded.last.approximate == Approximate(INSIDE - 54, 54, 3, 0)


def test_what_saves_little_is_computed(cache: KVStoreCache, model: Any) -> None:
    alone = greedy(model.generate, ids())
    for asks, reason in (
        ({"pieces": [[20, 60], [200, 263]]}, "short"),
        ({"pieces": [[20, 120]]}, "small_saving"),
        ({"pieces": PIECES, "recompute": 0.6}, "small_saving"),
    ):
        said = greedy(lambda *a, **k: cache.generate(*a, **asks, **k), ids())  # noqa: B023
        assert said == alone
        assert cache.last is not None
        assert cache.last.approximate == Approximate(reason=reason)
        assert cache.last.saved.reason is None
        cache.session.clear()


def test_a_share_of_answers_is_compared_with_exact_ones(
    model: Any, shared_store: Any, pieces: KVStoreCache
) -> None:
    past, _ = blended(pieces, recompute=0.2)
    with torch.no_grad():
        got = model(ids()[:, 300:], past_key_values=past).logits[0, -1].log_softmax(-1)
        wanted = model(ids()).logits[0, -1].log_softmax(-1)
    kl = float((wanted.exp() * (wanted - got)).sum())
    with open_cache(model, shared_store, "pieces", shadow=0.5) as sampling:
        asks = {"pieces": PIECES, "recompute": 0.2}
        said, found = [], []
        for _ in range(8):
            said += [greedy(lambda *a, **k: sampling.generate(*a, **asks, **k), ids())]
            assert sampling.last is not None
            assert sampling.last.approximate is not None
            found.append(sampling.last.approximate.kl)
        assert all(one == said[0] for one in said)
    compared = [one for one in found if one is not None]
    assert 0 < len(compared) < 8
    assert compared == pytest.approx([kl] * len(compared), rel=0.1)
    assert kl > 0


def test_only_models_that_passed_a_calibration_reuse_pieces(
    model: Any, shared_store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    alone = greedy(model.generate, ids())
    with open_cache(model, shared_store, "calibrated", uncalibrated=False) as cache:
        identity = cache.session.namespace.model
        bad, good = (Verdict(1, "m", 384, {"question 0.2": Quality(0.01, s)}) for s in (0.9, 0.96))
        for verdict, problem in ((None, "kvstore calibrate MODEL --dtype float32"), (bad, "90.0%")):
            if verdict is not None:
                keep(identity, verdict)
            with pytest.raises(SpecError, match=f"^uncalibrated: .*{problem}"):
                cache.add_piece(PROMPT[20:120])
            said = greedy(lambda *a, **k: cache.generate(*a, pieces=PIECES, **k), ids())
            assert said == alone
            assert cache.last is not None
            assert cache.last.reason.startswith("no pieces reused: uncalibrated: LlamaForCausalLM")
        keep(identity, good)
        assert cache.add_piece(PROMPT[20:120]).stored == 7


@pytest.mark.model
def test_a_model_is_calibrated_by_a_command(
    model_folder: Path, shared_store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small one of chance, which is sure of nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("KVSTORE_ADDRESS", shared_store.config().address)
    monkeypatch.setattr(calibrate, "prompts", lambda tokenizer: [next(blend.prompts(tokenizer))])
    monkeypatch.setattr(calibration, "SAME", 1.1)
    tokenizer, folder = transformers.AutoTokenizer.from_pretrained(model_folder), tmp_path / "model"
    tokenizer.save_pretrained(folder)
    llama(vocab_size=len(tokenizer), **ROOM).save_pretrained(folder)
    said = CliRunner().invoke(app, ["calibrate", str(folder), "--dtype", "float32"])
    assert said.exit_code == 1
    assert re.search(r"question 0.2: mean KL \S*, same likeliest token (9.|100)\.", said.output)
    assert "problem: " in said.output
    # The verdict are its figures: what they come to is said by whoever goes by them.
    monkeypatch.setattr(calibration, "SAME", 0.8)
    same = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with KVStoreCache.open(same, shared_store.config(), tenant="passed") as cache:
        assert cache.add_piece(PROMPT[20:120]).stored == 7
        # A piece that is lost is computed, which is no measure of anything.
        prompt = next(blend.prompts(tokenizer))
        with pytest.raises(blend.BenchmarkError, match="4 pieces missed"):
            blend.Exact(same, prompt).judge(cache._of_pieces(), "question", 0.2)


@pytest.mark.model
def test_answers_stay_close_to_the_exact_ones(model_folder: Path, shared_store: Any) -> None:
    """A question on three short pieces of this project's documents, with a real model."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    real = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    ways = [("question", 1.0), ("question", 0.5), ("question", 0.2), ("none", 0.0)]
    with open_cache(real, shared_store, "judged", revision="1") as cache:
        whole = next(blend.prompts(tokenizer))
        prompt = blend.Prompt(whole.before, [p[:200] for p in whole.pieces[:3]], whole.question)
        for piece in prompt.pieces:
            cache.add_piece(piece)
        exact = blend.Exact(real, prompt)
        found = {share: exact.judge(cache._of_pieces(), name, share) for name, share in ways}
    kl = {share: one.kl.mean() for share, one in found.items()}
    assert found[1.0].kl.max() < 1e-4
    assert found[1.0].same.all()
    # One prompt, and a short one: it shows what recompute does, not how good answers are on the
    # whole. That `kvstore bench blend` tells, with bounds, and docs/recompute.md.
    assert kl[0.5] < 0.02 < kl[0.0] < 0.1
    assert kl[0.5] < 0.9 * kl[0.2] < 0.9 * 0.7 * kl[0.0]
