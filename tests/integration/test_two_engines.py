"""Two engines with a real model share their KV through a daemon, and outlive it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import pytest

from kvstore.sections import PlannerConfig
from tests.session_tools import Child, Stores, eventually

pytest.importorskip("torch")
pytest.importorskip("transformers")

pytestmark = [pytest.mark.model, pytest.mark.timeout(600)]

BLOCK: Final = 64
DOCUMENT: Final = 3 * BLOCK
"""Tokens that the prompts about one document have in common."""
PATIENCE: Final = 180.0  # for one answer: two engines share two cores with whoever else is there

# An engine is asked for line by line. It answers through the store, and `plain` without.
ENGINE: Final = """
import torch, transformers
from kvstore.connectors.transformers.cache import KVStoreCache

config = Config.model_validate_json(sys.argv[1])
folder, document_tokens = sys.argv[2], int(sys.argv[3])
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
words = tokenizer((ROOT / "LICENSE").read_text(), return_tensors="pt")["input_ids"]

def prompt_about(document, question):
    first = document * document_tokens
    asked = tokenizer(question, return_tensors="pt")["input_ids"]
    return torch.cat([words[:, first : first + document_tokens], asked], dim=1)

with KVStoreCache.open(model, config) as cache:
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        do, document, question = json.loads(line)
        if do == "find the store":
            eventually(lambda: cache.session.problem is None)
            said = None
        elif do == "write all":
            said = cache.session.flush()
        else:
            ids = prompt_about(document, question)
            generate = model.generate if do == "plain" else cache.generate
            tokens = generate(ids, max_new_tokens=8, do_sample=False)[0].tolist()
            said = {"tokens": tokens[ids.shape[1] :]}
            if do == "ask":
                last = cache.last
                said |= {"tiers": last.tiers, "computed": last.computed_tokens}
                said |= {"prompt": ids.shape[1], "reason": last.reason}
                said |= {"stored": last.saved.stored, "dropped": last.saved.dropped}
        print(json.dumps(said), flush=True)
"""


class Engine(Child):
    """A transformers process that answers questions about documents."""

    def do(self, what: str, document: int = 0, question: str = "") -> Any:
        self.tell(json.dumps((what, document, question)))
        return json.loads(self.says(PATIENCE))

    def ask(self, document: int, question: str) -> dict[str, Any]:
        """An answer through the store, which must be the one that the model gives by itself."""
        answer: dict[str, Any] = self.do("ask", document, question)
        assert answer["tokens"] == self.do("plain", document, question)["tokens"]
        assert answer["computed"] + sum(answer["tiers"].values()) == answer["prompt"]
        return answer


def test_two_engines_share_documents_and_outlive_the_daemon(
    stores: Stores, model_folder: Path
) -> None:
    served = stores.serve("128MiB", "256MiB")
    # Whether loading pays is the planner's business, and not asked here.
    always = {"planner": PlannerConfig(mode="load")}
    settings = served.config().model_copy(update=always).model_dump_json()
    with (
        Engine(ENGINE, settings, model_folder, DOCUMENT) as a,
        Engine(ENGINE, settings, model_folder, DOCUMENT) as b,
    ):
        assert json.loads(a.says(PATIENCE)) == json.loads(b.says(PATIENCE)) == "ready"

        # What one has computed, the other one loads: all of it but the question.
        computed = a.ask(0, " Who is the Licensor?")
        assert computed["tiers"] == {}
        assert computed["stored"] >= DOCUMENT // BLOCK
        loaded = b.ask(0, " What is a Contribution?")
        assert loaded["tiers"] == {"memory": DOCUMENT}
        assert b.ask(1, " What is this about?")["tiers"] == {}
        assert a.ask(1, " Who may sue whom?")["tiers"] == {"memory": DOCUMENT}
        assert a.do("write all") == 0

        # The daemon dies. Both go on and compute.
        served.kill()
        for engine in (a, b):
            alone = engine.ask(0, " What is the Work?")
            assert alone["tiers"] == {}
            assert alone["stored"] == 0
            assert alone["dropped"] > 0
            assert alone["reason"] != "nothing found"

        # It comes back, and what it had on disk serves engines that have never been restarted.
        served.restart()
        for engine, document in ((a, 0), (b, 1)):
            engine.do("find the store")
            warm = engine.ask(document, " What must a copy include?")
            assert warm["tiers"] == {"disk": DOCUMENT}
        for engine, document in ((a, 1), (b, 0)):
            warm = engine.ask(document, " Are trademarks granted?")
            assert warm["tiers"] == {"memory": DOCUMENT}
        eventually(lambda: served.stats()["leases"] == 0)
