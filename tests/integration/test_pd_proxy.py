"""The proxy of the examples, before servers that say what they were asked."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from types import ModuleType
from typing import Any

from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer

TOLD = {"do_remote_prefill": True, "remote_engine_id": "p"}
ASKED = {
    "prompt": "long", "max_tokens": 9, "max_completion_tokens": 9, "min_tokens": 3, "stream": True,
    "stream_options": {"include_usage": True}, "kv_transfer_params": {"ttl": 5.0},
    "custom_params": {"kvstore": {"pin": 1.0}},
}  # fmt: skip


class Servers:
    """A prefill and a decode server, and what they were asked."""

    def __init__(self) -> None:
        self.prefilled: list[dict[str, Any]] = []
        self.decoded: list[dict[str, Any]] = []
        self.status = 200
        self.more = asyncio.Event()
        self.left = asyncio.Event()

    async def prefill(self, request: web.Request) -> web.Response:
        self.prefilled.append(await request.json())
        assert request.headers["Authorization"] == "Bearer me"
        return web.json_response({"kv_transfer_params": TOLD, "error": "?"}, status=self.status)

    async def decode(self, request: web.Request) -> web.StreamResponse:
        self.decoded.append(await request.json())
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        try:
            await response.write(b"data: 1\n\n")
            await self.more.wait()
            await response.write(b"data: 2\n\n")
        except (asyncio.CancelledError, ConnectionError):
            self.left.set()
            raise
        return response

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": ["a model"]})


def test_a_request_is_prefilled_and_then_decoded(example: Callable[[str], ModuleType]) -> None:
    async def scenario() -> None:
        servers = Servers()
        prefill, decode = web.Application(), web.Application()
        prefill.router.add_post("/v1/completions", servers.prefill)
        decode.router.add_post("/v1/completions", servers.decode)
        decode.router.add_get("/v1/models", servers.models)
        ends = [TestServer(one, handler_cancellation=True) for one in (prefill, decode)]
        for one in ends:
            await one.start_server()
        urls = [[str(one.make_url("")).rstrip("/")] for one in ends]
        prefills, [decodes] = urls
        proxy = example("pd_proxy").Proxy(prefills, [f"{decodes}=tcp://there:1"])
        front = TestServer(proxy.app(), handler_cancellation=True)
        await front.start_server()
        headers = {"Authorization": "Bearer me"}
        async with ClientSession(front.make_url("/"), headers=headers) as client:
            # What the decode server says comes as it says it.
            async with client.post("/v1/completions", json=ASKED) as answer:
                assert await answer.content.readline() == b"data: 1\n"
                servers.more.set()
                assert (await answer.read()).endswith(b"data: 2\n\n")
            [first], [then] = servers.prefilled, servers.decoded
            assert (first["max_tokens"], first["max_completion_tokens"]) == (1, 1)
            assert first["stream"] is False
            assert not first.keys() & {"min_tokens", "stream_options"}
            wishes = first["kv_transfer_params"]
            assert (wishes["do_remote_decode"], wishes["ttl"]) == (True, 5.0)
            assert wishes["remote_decoder"] == "tcp://there:1"
            custom = {"kvstore": {"pin": 1.0, "do_remote_prefill": True}}
            told = {"kv_transfer_params": TOLD | {"ttl": 5.0}, "custom_params": custom}
            assert then == ASKED | told
            assert first["custom_params"]["kvstore"]["do_remote_decode"] is True
            # A request that is refused is not asked twice.
            servers.status = 400
            async with client.post("/v1/completions", json=ASKED) as answer:
                assert (answer.status, json.loads(await answer.text())["error"]) == (400, "?")
            assert len(servers.decoded) == 1
            # A prefill server that fails, or is gone, costs the prefill alone.
            servers.status = 500
            async with client.post("/v1/completions", json=ASKED) as answer:
                assert (await answer.read()).count(b"data") == 2
            await ends[0].close()
            async with client.post("/v1/completions", json=ASKED) as answer:
                assert (await answer.read()).count(b"data") == 2
            assert servers.decoded[1:] == [ASKED, ASKED]
            assert proxy.skipped == 2
            # Who goes ends the request at the server, too.
            servers.more.clear()
            async with client.post("/v1/completions", json=ASKED) as answer:
                assert await answer.content.readline() == b"data: 1\n"
            await asyncio.wait_for(servers.left.wait(), 10)
            async with client.get("/v1/models") as answer:
                assert await answer.json() == {"data": ["a model"]}
            async with client.post("/v1/completions", data=b"no json") as answer:
                assert answer.status == 400
            wrong: list[dict[str, Any]] = [
                {"kv_transfer_params": [1]},
                {"custom_params": "x"},
                {"custom_params": {"kvstore": 1}},
            ]
            for one in wrong:
                async with client.post("/v1/completions", json=ASKED | one) as answer:
                    assert answer.status == 400
                    assert next(iter(one)) in await answer.text()
            await ends[1].close()
            async with client.get("/v1/models") as answer:
                assert answer.status == 502
        await front.close()

    asyncio.run(scenario())
