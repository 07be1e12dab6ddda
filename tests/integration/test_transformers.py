"""KVStoreCache with the real model: reuse never changes an answer, whatever the store does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from kvstore.connectors.transformers.cache import KVStoreCache  # noqa: E402

pytestmark = pytest.mark.model

ROOT = Path(__file__).parents[2]
BLOCK = 64
PROMPT = 400
ANSWER = 16


@pytest.fixture(scope="module")
def model(model_folder: Path) -> Any:
    """SmolLM2-135M-Instruct in float32."""
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    return transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def document(model_folder: Path) -> Any:
    """Token ids [1, PROMPT] of the beginning of a long document."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    text = (ROOT / "LICENSE").read_text()
    return tokenizer(text, return_tensors="pt")["input_ids"][:, :PROMPT]


@pytest.fixture(scope="module")
def alone(model: Any, document: Any) -> Any:
    """What the model says after `document` without a store."""
    return ask(model, document)


def ask(model: Any, ids: Any) -> Any:
    """Greedy tokens [1, prompt + answer], without a store."""
    return model.generate(ids, max_new_tokens=ANSWER, do_sample=False)


def answer(cache: KVStoreCache, ids: Any, **kwargs: Any) -> Any:
    """The same through a store."""
    return cache.generate(ids, max_new_tokens=ANSWER, do_sample=False, **kwargs)


def whole(tokens: int) -> int:
    """Tokens in the whole blocks of a prompt that leave one token to compute."""
    return (tokens - 1) // BLOCK * BLOCK


def test_answers_stay_the_same_from_memory_and_after_a_restart_from_disk(
    served_store: Any, model: Any, document: Any, alone: Any
) -> None:
    with KVStoreCache.open(model, served_store.config()) as cache:
        assert torch.equal(answer(cache, document), alone)
        assert cache.last.loaded_tokens == 0
        assert cache.last.computed_tokens == PROMPT
        assert cache.last.saved.stored == (PROMPT + ANSWER - 1) // BLOCK
        assert cache.last.first_token_seconds > 0

    with KVStoreCache.open(model, served_store.config()) as cache:
        assert torch.equal(answer(cache, document), alone)
        assert cache.last.tiers == {"memory": whole(PROMPT)}
        line = f"{whole(PROMPT)} of {PROMPT} tokens loaded ({whole(PROMPT)} from memory) in "
        assert str(cache.last).startswith(line)
        assert len(str(cache.last)) < 200
        assert cache.last.computed_tokens == PROMPT - whole(PROMPT)
        assert cache.last.saved.stored == 0

    served_store.stop()
    served_store.start()
    with KVStoreCache.open(model, served_store.config()) as cache:
        assert torch.equal(answer(cache, document), alone)
        assert cache.last.tiers == {"disk": whole(PROMPT)}


def test_a_new_process_is_served_what_another_one_saved(
    served_store: Any, model_folder: Path, tmp_path: Path
) -> None:
    document = tmp_path / "document"
    document.write_text((ROOT / "LICENSE").read_text()[:2500])

    def read(question: str) -> dict[str, Any]:
        command = [
            sys.executable, str(ROOT / "examples" / "demo_reader.py"),
            "--model", str(model_folder), "--address", served_store.address,
            "--document", str(document), "--question", question, "--new-tokens", "8",
        ]  # fmt: skip
        quiet = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}  # as in the demo
        output = subprocess.run(
            command, check=True, capture_output=True, text=True, env=quiet
        ).stdout
        result: dict[str, Any] = json.loads(output.splitlines()[-1])["result"]
        return result

    first, second = read("Who is the Licensor?"), read("What is a Work?")
    assert first["identical"]
    assert second["identical"]
    assert first["loaded_tokens"] == {}
    assert second["loaded_tokens"]["memory"] >= 6 * BLOCK


def test_generated_tokens_serve_the_next_turn(shared_store: Any, model: Any, document: Any) -> None:
    turn = document[:, :BLOCK]
    with KVStoreCache.open(model, shared_store.config(), tenant="turns") as cache:
        said = cache.generate(
            turn, min_new_tokens=2 * BLOCK, max_new_tokens=2 * BLOCK, do_sample=False
        )
        # The last token's KV was never computed: the third block lacks it and is not stored.
        assert cache.last.saved.stored == 2
        following = torch.cat([said, document[:, :8]], dim=1)
        alone = ask(model, following)
        assert torch.equal(answer(cache, following), alone)
        assert cache.last.loaded_tokens == 2 * BLOCK > turn.shape[1]


def test_load_generate_and_save_by_hand(
    shared_store: Any, model: Any, document: Any, alone: Any
) -> None:
    with KVStoreCache.open(model, shared_store.config(), tenant="by hand") as cache:
        for loaded in (0, whole(PROMPT)):
            past = cache.load(document)
            assert isinstance(past, transformers.DynamicCache)
            assert past.get_seq_length() == loaded
            said = model.generate(
                document, past_key_values=past, max_new_tokens=ANSWER, do_sample=False
            )
            assert torch.equal(said, alone)
            assert past.get_seq_length() == said.shape[1] - 1
            saved = cache.save(said, past)
            assert saved.stored + saved.had == (PROMPT + ANSWER - 1) // BLOCK


def test_loaded_tensors_are_bit_identical_to_the_saved_ones(
    shared_store: Any, model: Any, document: Any
) -> None:
    with KVStoreCache.open(model, shared_store.config(), tenant="bits") as cache:
        past = transformers.DynamicCache(config=model.config)
        with torch.no_grad():
            model(document, past_key_values=past)
        cache.save(document, past)
        back = cache.load(document)
    for here, there in zip(back.layers, past.layers, strict=True):
        assert torch.equal(here.keys, there.keys[:, :, : whole(PROMPT)])
        assert torch.equal(here.values, there.values[:, :, : whole(PROMPT)])


def test_the_planner_can_be_forced_both_ways(
    shared_store: Any, model: Any, document: Any, alone: Any
) -> None:
    for mode, loaded in (("recompute", 0), ("load", whole(PROMPT)), ("recompute", 0)):
        config = shared_store.config(planner={"mode": mode})
        with KVStoreCache.open(model, config, tenant="planner") as cache:
            if mode == "load":
                cache.session.report_prefill(10**6, 1e-3)
            assert torch.equal(answer(cache, document), alone)
            assert cache.last.loaded_tokens == loaded
            assert cache.last.reason


@pytest.mark.parametrize("other", [{"tenant": "b"}, {"revision": "2"}, {"block_tokens": 32}])
def test_other_namespaces_share_nothing(
    shared_store: Any, model: Any, document: Any, other: dict[str, Any]
) -> None:
    own = {"tenant": "a", "revision": "1"}
    prompt = document[:, : 2 * BLOCK]
    with KVStoreCache.open(model, shared_store.config(), **own) as cache:
        answer(cache, prompt)
    with KVStoreCache.open(model, shared_store.config(), **own) as cache:
        cache.load(prompt)
        assert cache.last.loaded_tokens == BLOCK
    with KVStoreCache.open(model, shared_store.config(), **(own | other)) as cache:
        past = cache.load(prompt)
        assert past.get_seq_length() == cache.last.loaded_tokens == 0


def test_a_store_killed_halfway_changes_no_answer(
    served_store: Any, model: Any, document: Any, alone: Any
) -> None:
    class KillsAtTheFirstToken:
        puts = 0

        def put(self, tokens: Any) -> None:
            self.puts += 1
            if self.puts == 2:
                served_store.stop(signal.SIGKILL)

        def end(self) -> None: ...

    with KVStoreCache.open(model, served_store.config()) as cache:
        answer(cache, document)
        said = answer(cache, document, streamer=KillsAtTheFirstToken())
        assert torch.equal(said, alone)
        assert cache.last.loaded_tokens == whole(PROMPT)
        assert cache.last.saved.dropped > 0

        assert torch.equal(answer(cache, document), alone)
        assert cache.last.loaded_tokens == 0
        assert cache.last.reason != "nothing found"

        served_store.start()
        for _ in range(10):
            assert torch.equal(answer(cache, document), alone)
            if cache.last.loaded_tokens == whole(PROMPT):
                break
        else:
            pytest.fail(f"the session did not come back: {cache.session.problem}")


def test_a_load_cut_short_uses_what_arrived(
    shared_store: Any,
    model: Any,
    document: Any,
    alone: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with KVStoreCache.open(model, shared_store.config(), tenant="short") as cache:
        answer(cache, document)
        load = cache.session.load

        def two_blocks(keys: Any, memory: Any, page_ids: Any) -> Any:
            loaded = load(keys[:2], memory, [ids[:2] for ids in page_ids])
            loaded.reason = "timeout"
            return loaded

        monkeypatch.setattr(cache.session, "load", two_blocks)
        assert torch.equal(answer(cache, document), alone)
        assert cache.last.loaded_tokens == 2 * BLOCK
        assert cache.last.reason == "timeout"


def test_the_model_is_converted_once_by_processes_that_start_together(
    example: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The conversion itself is replaced: what counts is who does it, and what is left behind."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); import model\n"
        "def convert(source, target):\n"
        "    yield 'working'\n"
        "    print('converted', flush=True)\n"
        "    time.sleep(0.5)\n"
        "    (target / 'weights').write_text('all')\n"
        "model._convert = convert\n"
        "print((model.prepare() / 'weights').read_text())\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(ROOT / "examples")], stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    output = "".join(process.communicate(timeout=60)[0] for process in processes)
    assert sorted(output.split()) == ["all", "all", "all", "converted"]
    folders = [path for path in (tmp_path / "kvstore" / "models").iterdir() if path.is_dir()]
    assert folders == [example("model").prepare()]
