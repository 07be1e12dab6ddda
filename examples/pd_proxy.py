"""A proxy before servers of vLLM or SGLang: some compute prompts, others go on from there.

    python examples/pd_proxy.py --prefill http://127.0.0.1:8100 --decode http://127.0.0.1:8200

Both kinds share a store (docs/vllm.md, "Prefill and decode apart"). A request first goes to a
prefill server, for one token; what that says under `kv_transfer_params`, as vLLM does, goes with it
to a decode server, whose answer is handed on as it comes. SGLang is asked by `custom_params`. Where
no prefill server answers, the decode server computes the prompt. Servers take turns. Where decode
servers have stores of their own, each is followed by its store's address, `--decode
http://127.0.0.1:8200=tcp://127.0.0.1:7777`, among those that the (vLLM) prefill servers allow.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from typing import Any, Final

from aiohttp import ClientError, ClientSession, ClientTimeout, web

HEADERS: Final = ("Authorization", "Content-Type", "X-Request-Id")
"""Of a request, that servers are given."""
MOST_BYTES: Final = 64 << 20
"""Of a request."""
SGLANGS: Final = ("do_remote_decode", "do_remote_prefill", "remote_kv_source", "remote_num_tokens")
"""Of what a request says, what SGLang's servers know."""


def asking(body: dict[str, Any], wishes: dict[str, Any]) -> dict[str, Any]:
    """A request with these wishes, where vLLM looks for them and where SGLang does."""
    custom = body.get("custom_params") or {}
    own = (custom.get("kvstore") or {}) | {k: v for k, v in wishes.items() if k in SGLANGS}
    return body | {
        "kv_transfer_params": (body.get("kv_transfer_params") or {}) | wishes,
        "custom_params": custom | {"kvstore": own},
    }


class Proxy:
    """Sends requests on; addresses are `http://host:port`, and `=` and the store's may follow."""

    def __init__(self, prefill: list[str], decode: list[str]) -> None:
        self._prefill: Iterator[str] = itertools.cycle(prefill)
        self._decode: Iterator[tuple[str, str]] = itertools.cycle(
            (url, store) for url, _, store in (one.partition("=") for one in decode)
        )
        self.skipped = 0
        """Requests that no prefill server computed."""

    def app(self) -> web.Application:
        """The HTTP server."""
        app = web.Application(client_max_size=MOST_BYTES)
        for path in ("/v1/completions", "/v1/chat/completions"):
            app.router.add_post(path, self.answer)
        app.router.add_get("/{path:.*}", self.pass_on)
        app.cleanup_ctx.append(self._session)
        return app

    async def _session(self, app: web.Application) -> Any:
        # Answers take as long as they take; who does not even accept a connection is away.
        timeout = ClientTimeout(total=None, connect=5.0)
        async with ClientSession(timeout=timeout) as self._servers:
            yield

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Prefill, then decode."""
        try:
            body = await request.json()
        except ValueError:
            body = None
        if not isinstance(body, dict):
            raise web.HTTPBadRequest(text="the body is no JSON object")
        custom = body.get("custom_params") or {}
        wishes = {"kv_transfer_params": body.get("kv_transfer_params"), "custom_params": custom}
        if isinstance(custom, dict):
            wishes["custom_params: kvstore"] = custom.get("kvstore")
        for name, given in wishes.items():
            if given and not isinstance(given, dict):
                raise web.HTTPBadRequest(text=f"{name} is no JSON object")
        headers = {name: request.headers[name] for name in HEADERS if name in request.headers}
        url, store = next(self._decode)
        asks = {"remote_decoder": store} if store else {}
        told = await self._compute(request.path, body, asks, headers)
        if isinstance(told, web.Response):
            return told
        if told is not None:
            body = asking(body, told)
        return await self._hand_on(url, request, "POST", json.dumps(body).encode(), headers)

    async def _compute(
        self, path: str, body: dict[str, Any], wishes: dict[str, Any], headers: dict[str, str]
    ) -> dict[str, Any] | web.Response | None:
        """What a prefill server says of a prompt that it has computed; None: none has.

        A response: it refuses the request, as the decode server would.
        """
        remote = ("engine_id", "block_ids", "host", "port")
        asks = wishes | {"do_remote_decode": True, "do_remote_prefill": False}
        asks |= {f"remote_{name}": None for name in remote}
        first = {k: v for k, v in body.items() if k not in ("stream_options", "min_tokens")}
        first = asking(first, asks) | {"stream": False, "max_tokens": 1}
        if "max_completion_tokens" in first:
            first["max_completion_tokens"] = 1
        url = next(self._prefill) + path
        try:
            async with self._servers.post(url, json=first, headers=headers) as answer:
                said = await answer.read()
                if 400 <= answer.status < 500:
                    kind = answer.content_type
                    return web.Response(body=said, status=answer.status, content_type=kind)
                answer.raise_for_status()
                told = json.loads(said).get("kv_transfer_params")
        except (ClientError, TimeoutError, ValueError) as e:
            self.skipped += 1
            print(f"{url}: {e}; the decode server computes the prompt", file=sys.stderr)
            return None
        # SGLang's servers say nothing; the names of blocks are the same.
        return told if isinstance(told, dict) else {"do_remote_prefill": True}

    async def pass_on(self, request: web.Request) -> web.StreamResponse:
        """Anything else is for a decode server to answer."""
        return await self._hand_on(next(self._decode)[0], request, "GET", None, {})

    async def _hand_on(
        self, server: str, request: web.Request, method: str, body: bytes | None,
        headers: dict[str, str],
    ) -> web.StreamResponse:  # fmt: skip
        """A decode server's answer, piece by piece. A client that goes ends the request there."""
        url = server + request.path_qs
        try:
            answer = await self._servers.request(method, url, data=body, headers=headers)
        except (ClientError, TimeoutError) as e:
            raise web.HTTPBadGateway(text=f"{url}: {e}") from e
        async with answer:
            kind = {"Content-Type": answer.headers.get("Content-Type", "application/json")}
            response = web.StreamResponse(status=answer.status, headers=kind)
            await response.prepare(request)
            async for piece in answer.content.iter_any():
                await response.write(piece)
            await response.write_eof()
        return response


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description="A proxy for prefill and decode apart.")
    parser.add_argument("--prefill", action="append", required=True, metavar="URL")
    parser.add_argument("--decode", action="append", required=True, metavar="URL[=STORE]")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args()
    web.run_app(Proxy(given.prefill, given.decode).app(), host=given.host, port=given.port)


if __name__ == "__main__":
    main()
