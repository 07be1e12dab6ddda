"""The page in a real browser: it follows the traffic, and nothing on it runs but its own code."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import pytest

from tests import browser
from tests.browser import Page
from tests.http_tools import ON, address
from tests.session_tools import ROOT, Served, Stores, load, prompt, save

EVIL: Final = "<img src=x onerror=\"window.evil=1;console.error('evil')\"><b>bold</b>"
TOKEN: Final = "reader-0123456789abcdef0123456789"


@pytest.fixture
async def page() -> AsyncIterator[Page]:
    executable = browser.find()
    if executable is None:
        pytest.skip(f"no browser is installed; any of {', '.join(browser.NAMES)} will do")
    async with browser.browser(executable) as tab:
        await tab.size(1280, 900)
        yield tab


def at_home(page: Page, served: Served) -> None:
    """Nothing went wrong on the page, and it asked nobody but its daemon."""
    assert page.problems == []
    home = f"http://{address(served)}/"
    assert page.requests
    assert [url for url in page.requests if not url.startswith(home)] == []


def cells(table: str, column: int) -> str:
    """JavaScript for the texts of a column."""
    return (
        f"Array.from(document.querySelectorAll('#{table} tbody tr'))"
        f".map((row) => row.cells[{column}].innerText)"
    )


async def test_the_page_follows_the_traffic(stores: Stores, page: Page) -> None:
    served = stores.serve(disk="16MiB", server=ON | {"name": "node-under-test"})
    await page.open(f"http://{address(served)}/")
    await page.until("document.getElementById('state').innerText == 'ready'")
    assert await page.text("#node") == "node-under-test"
    assert await page.text("#now-sessions") == "0"
    assert "Nothing is stored yet." in await page.text("#main")
    assert "No requests yet." in await page.text("#main")
    with served.session(tenant="team-7") as session:
        keys = session.keys(prompt(1, 6))
        save(session, keys)
        await page.until("document.getElementById('now-objects').innerText == '6'")
        assert await page.text("#now-sessions") == "1"
        assert await page.evaluate(cells("namespaces", 1)) == ["team-7"]
        assert "24.0 KiB" in await page.text(".tier.memory .legend .used")
        await page.until(cells("recent", 2) + ".length == 1")

        def hits() -> bool:
            return session.lookup(keys).blocks == 6 and load(session, keys).blocks == 6

        # The hit rate, the throughput and the latency appear as lookups and loads go on.
        shown = "document.querySelector('#chart-{} .keys').innerText"
        traffic = asyncio.create_task(_keep_on(hits))
        await page.until(shown.format("hits") + ".includes('together 100 %')")
        await page.until("/load [1-9]/.test(" + shown.format("bytes") + ")")
        await page.until("/p99 [1-9]/.test(" + shown.format("latency") + ")")
        line = "document.querySelector('#chart-hits .series.s-memory').getAttribute('d')"
        before = await page.until(line)
        await page.until(f"{line} != {json.dumps(before)}")
        assert not traffic.done()
        traffic.cancel()
        assert {"lookup", "load"} <= set(await page.evaluate(cells("recent", 2)))
        save(session, session.keys(prompt(2, 4)))
        await page.until("document.getElementById('now-objects').innerText == '10'")
        session.lookup(session.keys(prompt(3, 4)))
        await page.until(cells("reasons", 1) + ".includes('absent')")
    await page.until("document.getElementById('now-sessions').innerText == '0'")
    at_home(page, served)


async def _keep_on(work: object) -> None:
    assert callable(work)
    while True:
        assert await asyncio.to_thread(work)
        await asyncio.sleep(0.1)


async def test_names_of_clients_are_text(stores: Stores, page: Page) -> None:
    served = stores.serve(server=ON)
    await page.open(f"http://{address(served)}/")
    with served.session(tenant=EVIL) as session:
        save(session, session.keys(prompt(1, 2)))
        for table, column in (("namespaces", 1), ("recent", 4)):
            await page.until(cells(table, column) + f".includes({json.dumps(EVIL)})")
    assert (
        await page.evaluate("document.querySelectorAll('main img, main b.bold, td b').length") == 0
    )
    assert await page.evaluate("window.evil ?? 0") == 0
    at_home(page, served)


async def test_the_page_asks_for_a_token_and_keeps_it_to_itself(stores: Stores, page: Page) -> None:
    tokens = stores.folder / "tokens.yaml"
    tokens.write_text(json.dumps({"tokens": [{"name": "me", "role": "read", "token": TOKEN}]}))
    tokens.chmod(0o600)
    served = stores.serve(server=ON | {"tokens": str(tokens)})
    await page.open(f"http://{address(served)}/")
    await page.until("document.getElementById('ask').open")
    assert "token is needed" in await page.text("#ask-why")
    await _enter(page, "wrong-0123456789abcdef0123456789")
    await page.until("document.getElementById('ask-why').innerText.includes('not known')")
    await _enter(page, TOKEN)
    await page.until("document.getElementById('state').innerText == 'ready'")
    assert not await page.evaluate("document.getElementById('ask').open")
    kept = (
        "JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href])"
    )
    assert TOKEN not in await page.evaluate(kept)
    assert not [url for url in page.requests if TOKEN in url]
    # The browser itself reports answers of 401.
    assert all("401" in problem for problem in page.problems)


async def _enter(page: Page, token: str) -> None:
    await page.evaluate(
        f"document.getElementById('token').value = {json.dumps(token)};"
        "document.querySelector('#ask button').click()"
    )


async def test_the_page_tells_when_the_daemon_is_gone_and_finds_it_again(
    stores: Stores, page: Page
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        where = f"127.0.0.1:{probe.getsockname()[1]}"
    served = stores.serve(server={"http": where})
    state = "document.getElementById('state').innerText"
    await page.open(f"http://{address(served)}/")
    await page.until(f"{state} == 'ready'")
    served.kill()
    await page.until(f"{state} == 'unreachable'")
    assert "does not answer" in await page.text("#problem")
    served.restart()
    await page.until(f"{state} == 'ready'")
    assert await page.text("#problem") == ""


async def test_the_page_fits_and_is_readable_in_light_and_dark(stores: Stores, page: Page) -> None:
    served = stores.serve(server=ON)
    colours = []
    for scheme, width, height in (("light", 1280, 900), ("dark", 1280, 900), ("dark", 600, 900)):
        await page.size(width, height, scheme)
        await page.open(f"http://{address(served)}/")
        await page.until("document.getElementById('state').innerText == 'ready'")
        overflow = "document.documentElement.scrollWidth - innerWidth"
        assert await page.evaluate(overflow) <= 0, (scheme, width)
        if width == 1280:
            tall = "document.documentElement.scrollHeight - innerHeight"
            assert await page.evaluate(tall) <= 0
            style = "getComputedStyle(document.body)"
            colours.append(await page.evaluate(f"[{style}.color, {style}.backgroundColor]"))
    (light_text, light_ground), (dark_text, dark_ground) = colours
    assert _brightness(light_ground) - _brightness(light_text) > 150
    assert _brightness(dark_text) - _brightness(dark_ground) > 150
    at_home(page, served)


def _brightness(colour: str) -> float:
    numbers = colour[colour.index("(") + 1 : -1].split(",")[:3]
    return sum(map(float, numbers)) / 3


def test_the_page_is_small_and_needs_nothing_from_elsewhere() -> None:
    files = sorted((ROOT / "server" / "http" / "page").iterdir())
    assert sum(file.stat().st_size for file in files) < 50_000
    for file in files:
        _check_file(file)


def _check_file(file: Path) -> None:
    text = file.read_text().replace("http://www.w3.org/2000/svg", "")
    for word in ("http:", "https:", "//cdn", "@import", "innerHTML", "outerHTML", "eval("):
        assert word not in text, (file.name, word)
    assert "<script>" not in text
    assert "style=" not in text
