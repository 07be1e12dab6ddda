"""A real Chromium without a window, driven over its DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import aiohttp

NAMES: Final = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_PATIENCE: Final = 60.0

_FLAGS: Final = (
    "--headless=new",
    "--no-sandbox",  # Tests run as root in containers.
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-extensions",
    "--disable-sync",
    "--remote-debugging-port=0",
)


def find() -> str | None:
    """Path of a browser; None when none is installed."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Page:
    """One tab: what it asked for, what went wrong on it, and what it shows."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.requests: list[str] = []
        """URLs, in order."""
        self.problems: list[str] = []
        """Console errors, exceptions and failed loads."""
        self._socket = socket
        self._number = 0
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}

    async def listen(self) -> None:
        """Take in what the browser says, until it is gone."""
        async for message in self._socket:
            said = message.json()
            if "id" in said:
                self._answers.pop(said["id"]).set_result(said)
            else:
                self._heard(said["method"], said["params"])

    def _heard(self, event: str, params: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            self.problems.append(str(params["exceptionDetails"]))
        elif event == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.problems.append(f"{params['entry']['text']} ({params['entry'].get('url')})")
        elif event == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
            self.problems.append(str(params["args"]))

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol."""
        self._number += 1
        answer = self._answers[self._number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": self._number, "method": method, "params": params})
        said = await asyncio.wait_for(answer, _PATIENCE)
        assert "error" not in said, (method, said)
        result: dict[str, Any] = said["result"]
        return result

    async def open(self, url: str) -> None:
        """Go there, and wait until the page and all it names are loaded."""
        await self.call("Page.navigate", url=url)
        await self.until(f"document.readyState == 'complete' && location.href == {url!r}")

    async def size(self, width: int, height: int, scheme: str = "light") -> None:
        """Size of the window, and whether it is light or dark."""
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        await self.call("Emulation.setEmulatedMedia", features=features)

    async def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        said = await self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in said, said
        return said["result"].get("value")

    async def text(self, selector: str) -> str:
        """The text of the first element that matches; empty when there is none."""
        quoted = selector.replace('"', '\\"')
        found = await self.evaluate(f'document.querySelector("{quoted}")?.innerText ?? ""')
        return str(found)

    async def until(self, expression: str, seconds: float = _PATIENCE) -> Any:
        """What the expression gives, as soon as that is true."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while not (found := await self.evaluate(expression)):
            assert loop.time() < end, (expression, self.problems, await self.text("body"))
            await asyncio.sleep(0.05)
        return found

    async def screenshot(self, path: Path) -> None:
        said = await self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(said["data"]))


@contextlib.asynccontextmanager
async def browser(executable: str) -> AsyncIterator[Page]:
    """A browser with one empty tab; ends with all its processes."""
    with tempfile.TemporaryDirectory(prefix="kvchrome", ignore_cleanup_errors=True) as folder:
        process = await asyncio.create_subprocess_exec(
            executable,
            *_FLAGS,
            f"--user-data-dir={folder}",
            "about:blank",
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            port = await _port(Path(folder) / "DevToolsActivePort", process)
            async with (
                aiohttp.ClientSession() as http,
                http.get(f"http://127.0.0.1:{port}/json/list") as answer,
            ):
                tab = next(t for t in await answer.json() if t["type"] == "page")
                url = tab["webSocketDebuggerUrl"]
                async with http.ws_connect(url, max_msg_size=0) as socket:
                    page = Page(socket)
                    listening = asyncio.create_task(page.listen())
                    for domain in ("Page", "Runtime", "Log", "Network"):
                        await page.call(f"{domain}.enable")
                    yield page
                    await page.call("Browser.close")
                    listening.cancel()
            await asyncio.wait_for(process.wait(), _PATIENCE)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


async def _port(path: Path, process: asyncio.subprocess.Process) -> int:
    """Where the browser listens; it writes that down once it does."""
    loop = asyncio.get_running_loop()
    end = loop.time() + _PATIENCE
    while True:
        lines = path.read_text().splitlines() if path.exists() else []
        if len(lines) >= 2:
            return int(lines[0])
        assert process.returncode is None, f"the browser ended with {process.returncode}"
        assert loop.time() < end, "the browser does not start"
        await asyncio.sleep(0.05)
