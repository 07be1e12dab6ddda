"""Take pictures for the documents: `python -m tests.screenshot docs/page.png` of the page, and
`… docs/top.svg --seconds 40` of `kvstore top`.

A daemon serves three models to several sessions for a while; all traffic is real.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import math
import random
import threading
import time
from pathlib import Path

from rich.console import Console

from kvstore.blocks.spec import Group, ModelIdentity, Namespace, Part
from kvstore.client.session import Session
from kvstore.server.cli.top import Seen, Source, frame
from kvstore.sources import load_config
from tests import browser
from tests.session_tools import Pages, Served, Stores

_MODELS = (
    ("meta-llama/Llama-3.1-8B-Instruct", "", 1.0),
    ("Qwen/Qwen3-32B", "search", 0.7),
    ("Qwen/Qwen3-32B", "support", 0.5),
    ("HuggingFaceTB/SmolLM2-135M-Instruct", "", 0.3),
)
_BLOCK_TOKENS = 16
_PART = Part(Group(layers=8, heads=2, channels=(64, 64), dtype="float16"))


def _engine(served: Served, which: int, seconds: float) -> None:
    """Chats: each turn finds the prefix, loads it and saves what is new."""
    model, tenant, load = _MODELS[which]
    chosen = random.Random(which)
    namespace = Namespace(ModelIdentity(model), tenant, _BLOCK_TOKENS)
    began = time.monotonic()
    with Session.open(namespace, [_PART], served.config()) as session:
        chats = [_new_chat(chosen) for _ in range(60)]
        while (now := time.monotonic() - began) < seconds:
            number = min(int(chosen.expovariate(0.09)), len(chats) - 1)
            if chosen.random() < 0.05:
                chats[number] = _new_chat(chosen)
            chat = chats[number]
            keys = session.keys(chat)
            pages = Pages(_PART, len(keys), _BLOCK_TOKENS)
            ids = pages.ids(len(keys))
            found = session.lookup(keys)
            if found.blocks:
                session.load(keys[: found.blocks], [pages.memory], [ids[: found.blocks]])
            session.save(keys, [pages.memory], [ids])
            if chosen.random() < 0.02:
                session.pin(keys[:24], ttl=40)
            chat += [chosen.randrange(1 << 16) for _ in range(chosen.randrange(16, 400))]
            if len(chat) > 6000:
                chats[number] = _new_chat(chosen)
            wave = 1.25 + math.sin(now / 14 + which) + 0.4 * math.sin(now / 3.1)
            time.sleep(chosen.expovariate(6 * load * max(0.15, wave)))


def _new_chat(chosen: random.Random) -> list[int]:
    """A system prompt that many share, and a first question."""
    system = [chosen.randrange(4)] * 320
    return system + [chosen.randrange(1 << 16) for _ in range(chosen.randrange(100, 1500))]


async def _picture(url: str, path: Path, seconds: float, scheme: str) -> None:
    executable = browser.find()
    assert executable is not None, f"no browser: install one of {', '.join(browser.NAMES)}"
    await asyncio.sleep(seconds)
    async with browser.browser(executable) as page:
        await page.size(1280, 900, scheme)
        await page.open(url)
        await page.until("document.querySelectorAll('#recent tbody tr').length > 3")
        await asyncio.sleep(3)
        await page.screenshot(path)
        assert not page.problems, page.problems


def _terminal(where: str, path: Path, seconds: float) -> None:
    """What `kvstore top` shows after so long."""
    source, seen = Source(where, load_config(), "", 5.0), Seen()
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        seen.add(source.ask(seen.latest))
        time.sleep(1)
    console = Console(width=80, record=True, file=io.StringIO(), force_terminal=True)
    console.print(frame(seen))
    console.save_svg(str(path), title="kvstore top")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("path", type=Path)
    parser.add_argument("--seconds", type=float, default=300.0, help="of traffic before it")
    parser.add_argument("--dark", action="store_true")
    arguments = parser.parse_args()
    stores = Stores()
    second = {"path": str(stores.folder / "nvme2"), "size": "4GiB", "chunk": "16MiB"}
    try:
        served = stores.serve(
            memory="256MiB",
            disk={"path": str(stores.folder / "disk"), "size": "4GiB", "chunk": "16MiB"},
            tiers=[{"kind": "slab", "name": "nvme2", "options": second}],
            admission={"nvme2": "reused"},
            server={"http": "127.0.0.1:0", "name": "gpu-node-07"},
        )
        engines = [
            threading.Thread(target=_engine, args=(served, n, arguments.seconds + 15))
            for n in range(len(_MODELS))
        ]
        for engine in engines:
            engine.start()
        scheme = "dark" if arguments.dark else "light"
        where = served.addresses["http"]
        if arguments.path.suffix == ".svg":
            _terminal(where, arguments.path, arguments.seconds)
        else:
            asyncio.run(_picture(f"http://{where}/", arguments.path, arguments.seconds, scheme))
        for engine in engines:
            engine.join()
    finally:
        stores.close()


if __name__ == "__main__":
    main()
