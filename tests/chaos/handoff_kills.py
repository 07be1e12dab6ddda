"""Kills a vLLM engine again and again while it computes a prompt for another one, which goes on.

    .venv-vllm/bin/python -m tests.chaos.handoff_kills 50

Not among the tests, since each kill costs the start of an engine.
"""

from __future__ import annotations

import random
import sys
import time

from tests.engines.test_vllm_disaggregated import (
    BLOCK,
    LONG,
    PREFILL,
    TCP,
    TOKENS,
    alone,
    engine,
    tcp,
)
from tests.engines.vllm_tools import document
from tests.session_tools import Stores, eventually, no_leases


def main() -> None:
    """Every answer is right, and nothing is held afterwards."""
    kills, chance, stores = int(sys.argv[1]), random.Random(1), Stores()
    served = stores.serve("512MiB", **TCP)
    try:
        with engine(f"unix://{served.socket}", "kv_consumer") as decode:
            for kill in range(kills):
                prompt = document(LONG, 13 * kill)
                [expected] = alone(decode, [prompt])
                with engine(tcp(served), "kv_producer") as prefill:
                    prefill.order(do="generate", prompts=[prompt], max_tokens=1, wishes=PREFILL)
                    eventually(lambda: not no_leases(served))
                    wishes = {"do_remote_prefill": True}
                    decode.order(do="generate", prompts=[prompt], max_tokens=TOKENS, wishes=wishes)
                    time.sleep(chance.uniform(0, 2))
                    prefill._process.kill()
                    answered = decode.answer()
                assert answered["tokens"] == [expected], kill
                eventually(lambda: no_leases(served))
                decode.forget()
                print(f"{kill + 1}: {answered['cached'][0] // BLOCK} blocks had come", flush=True)
    finally:
        stores.close()


if __name__ == "__main__":
    main()
