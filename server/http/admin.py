"""The HTTP face: health, metrics, status, configuration, log levels, and a page that shows them.

Every connection carries one request and lives for a few seconds at most, and there are only so
many at a time; the oldest makes room for a new one. So slow or silent clients cost nothing, and
probes get through.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

import aiohttp
import msgspec
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from prometheus_client import CONTENT_TYPE_LATEST

from kvstore import __version__
from kvstore.config import Config
from kvstore.server.access.access import Access, is_loopback
from kvstore.server.access.grants import Denied, Grant, Role
from kvstore.server.http.metrics import Exposition
from kvstore.server.http.status import Samples, status
from kvstore.server.listeners import bind, show
from kvstore.server.loop import run
from kvstore.server.node import Node
from kvstore.server.tracing import lines

_REQUEST_SECONDS: Final = 10.0
_HANDSHAKE_SECONDS: Final = 5.0
_STOP_SECONDS: Final = 1.0
_SAMPLE_SECONDS: Final = 1.0
_MAX_BODY: Final = 4096
_MAX_HEADER: Final = 8190
_OPEN: Final = ("/healthz", "/readyz")
_METHODS: Final = "GET, HEAD, PUT, POST"
_KEPT: Final = ("Allow", "Retry-After")
"""Headers of errors."""
_LEVELS: Final = ("debug", "info", "warning", "error")
_PAGE: Final = Path(__file__).parent / "page"
_HEADERS: Final = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Server": f"kvstore/{__version__}",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}

_log = logging.getLogger("kvstore.http")
_requests_log = logging.getLogger("kvstore.http.requests")
# What is no HTTP is answered with 400, and who has gone is not answered; a traceback each would let
# anybody fill the log.
_OF_CALLERS: Final = (HttpProcessingError, ConnectionError)
_requests_log.addFilter(
    lambda record: not (record.exc_info and isinstance(record.exc_info[1], _OF_CALLERS))
)


_DENIALS: Final = {
    "token_missing": HTTPStatus.UNAUTHORIZED,
    "token_unknown": HTTPStatus.UNAUTHORIZED,
    "host": HTTPStatus.MISDIRECTED_REQUEST,
}
"""By their reasons; others are forbidden."""


class _Server(web.Server):
    """Serves an application that is set up; bounds the connections, and the life of each."""

    def __init__(self, app: web.Server, limit: int) -> None:
        super().__init__(
            self._handle,
            request_factory=app.request_factory,
            access_log=None,
            logger=_requests_log,
            auto_decompress=False,
            max_line_size=_MAX_HEADER,
            max_field_size=_MAX_HEADER,
            lingering_time=0.0,
        )
        self._answer = app.request_handler
        self._limit = limit
        self._ends: dict[object, tuple[asyncio.Transport, asyncio.TimerHandle]] = {}

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        # aiohttp repeats what it does not know here, which may be no text.
        if request.headers.get("Expect", "100-continue").lower() != "100-continue":
            return web.Response(status=HTTPStatus.EXPECTATION_FAILED, headers=_HEADERS)
        return await self._answer(request)

    def connection_made(self, handler: web.RequestHandler, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        loop = asyncio.get_running_loop()
        self._ends[handler] = transport, loop.call_later(_REQUEST_SECONDS, transport.abort)
        if len(self._ends) > self._limit:
            oldest, end = self._ends.pop(next(iter(self._ends)))
            end.cancel()
            oldest.abort()

    def connection_lost(
        self, handler: web.RequestHandler, exc: BaseException | None = None
    ) -> None:
        if (known := self._ends.pop(handler, None)) is not None:
            known[1].cancel()
        super().connection_lost(handler, exc)


class AdminFace:
    """Serves HTTP on `server.http`. Starts before there is a node, to say that it warms up.

    `touched` says how much of the memory was touched so far, from 0 to 1.
    """

    def __init__(self, config: Config, access: Access) -> None:
        assert config.server.http is not None
        self.touched = 0.0
        self._node: Node | None = None
        self._config = config
        self._access = access
        self._samples = Samples()
        self._sampling: asyncio.Task[None] | None = None
        self._bound: list[socket.socket] = []
        self._listeners: list[asyncio.Server] = []
        self._server: _Server | None = None
        self._pages = _read_page()
        app = web.Application(middlewares=[self._guard], client_max_size=_MAX_BODY)
        app.on_response_prepare.append(_forbid)
        app.add_routes(
            [
                *(web.get(path, self._health) for path in _OPEN),
                web.get("/metrics", self._metrics),
                web.get("/status", self._status),
                web.get("/trace", self._trace),
                web.get("/config", self._show_config),
                web.get("/loglevel", self._loglevel),
                web.put("/loglevel", self._set_loglevel),
                web.post("/loglevel", self._set_loglevel),
                *(web.get(path, self._show_page) for path in self._pages),
            ]
        )
        self._app = web.AppRunner(app)

    async def start(self) -> None:
        """Begin to listen. Raises ConfigError: the address cannot be had."""
        loop = asyncio.get_running_loop()
        await self._app.setup()
        assert self._app.server is not None
        server = self._server = _Server(self._app.server, self._config.server.max_requests)
        tls = self._access.server_context()
        patience = None if tls is None else _HANDSHAKE_SECONDS
        assert self._config.server.http is not None
        self._bound = bind("server.http", self._config.server.http)
        self._listeners = [
            await loop.create_server(server, sock=bound, ssl=tls, ssl_handshake_timeout=patience)
            for bound in self._bound
        ]

    def attach(self, node: Node) -> None:
        """The node is ready: tell of it from now on."""
        self._node = node
        self._sampling = run(
            "sampling", lambda: self._sample(node), node.store.counters, again=True
        )

    async def stop(self) -> None:
        """End; a request that runs is answered within a second or cut."""
        if self._server is None:
            return
        if self._sampling is not None:
            self._sampling.cancel()
        for listener in self._listeners:
            listener.close()
        self._server.pre_shutdown()
        await self._server.shutdown(_STOP_SECONDS)
        await self._app.cleanup()

    @property
    def addresses(self) -> list[str]:
        """Where it listens."""
        scheme = "http" if self._access.server_context() is None else "https"
        return [f"{scheme} {show(bound)}" for bound in self._bound]

    async def _sample(self, node: Node) -> None:
        while True:
            self._samples.take(time.time(), node.store.stats())
            await asyncio.sleep(_SAMPLE_SECONDS)

    @web.middleware
    async def _guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Stands before all answers: says no in JSON, and admits callers with a right to them."""
        try:
            self._check_host(request)
            if (error := request.match_info.http_exception) is not None:
                raise self._not_here(request, error)
            if request.path not in (*_OPEN, *self._pages):
                request["grant"] = self._grant(request)
            response = await handler(request)
        except Denied as e:
            if self._node is not None:
                self._node.store.counters.add("refused", e.reason)
            response = web.json_response(
                {"error": str(e)}, status=_DENIALS.get(e.reason, HTTPStatus.FORBIDDEN)
            )
            if response.status == HTTPStatus.UNAUTHORIZED:
                response.headers["WWW-Authenticate"] = "Bearer"
        except web.HTTPException as e:
            kept = {name: e.headers[name] for name in _KEPT if name in e.headers}
            response = web.json_response({"error": e.text}, status=e.status, headers=kept)
        response.force_close()
        return response

    def _not_here(self, request: web.Request, error: web.HTTPException) -> web.HTTPException:
        if isinstance(error, web.HTTPMethodNotAllowed):
            methods = ", ".join(sorted(error.allowed_methods, key=_METHODS.find))
            error.headers["Allow"] = methods
            error.text = f"{request.method} is not for {request.path}; use {methods}"
            return error
        paths = (resource.canonical for resource in self._app.app.router.resources())
        known = ", ".join(path for path in paths if path not in self._pages)
        return web.HTTPNotFound(text=f"there is nothing here; there are {known} and /")

    def _check_host(self, request: web.Request) -> None:
        """Keep web sites that let their name point here from reading along in a browser."""
        if self._access.has_tokens or not _on_loopback(request.transport):
            return
        host = request.host.rpartition(":")[0] if request.host[-1:] != "]" else request.host
        host = (host or request.host).strip("[]")
        if host != "localhost" and not is_loopback(host):
            raise Denied(
                "host",
                f"{host!r} is no name of this machine's loopback; ask for http://127.0.0.1 or "
                "http://localhost, or set server.tokens",
            )

    def _grant(self, request: web.Request) -> Grant:
        grant = self._access.bearer(request.headers.get("Authorization"))
        grant.check(Role.READ, request.path)
        return grant

    # -- answers ----------------------------------------------------------------------------------

    async def _health(self, request: web.Request) -> web.Response:
        if self._node is None:
            answer = {"status": "starting", "memory_touched": round(self.touched, 3)}
        else:
            answer = dict(self._node.health())
        good = ("ready",) if request.path == "/readyz" else ("ready", "draining")
        well = answer["status"] in good
        return web.json_response(
            answer, status=HTTPStatus.OK if well else HTTPStatus.SERVICE_UNAVAILABLE
        )

    async def _metrics(self, request: web.Request) -> web.Response:
        body = Exposition(self._node, request["grant"]).text()
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    def _started(self) -> Node:
        if self._node is None:
            text = f"the daemon is starting, {self.touched:.0%} of its memory is touched; ask again"
            raise web.HTTPServiceUnavailable(text=text, headers={"Retry-After": "1"})
        return self._node

    async def _status(self, request: web.Request) -> web.Response:
        node, after = self._started(), _after(request, "0")
        return web.json_response(status(node, request["grant"], self._samples, after))

    async def _trace(self, request: web.Request) -> web.Response:
        """What was asked for after a request of that number; it is noted from the first call on."""
        tracing = self._started().tracing
        grant: Grant = request["grant"]
        if grant.tenants is not None:
            text = f"a trace is of all tenants, {grant.name!r} of some; use another token"
            raise Denied("tenant", text)
        after = _after(request, "-1")
        noted, number = tracing.since(after)
        missed = noted[0].number - after - 1 if noted else 0
        body = await asyncio.to_thread(lines, noted)  # It takes long with many.
        headers = {"Kvstore-Number": str(number), "Kvstore-Missed": str(missed)}
        return web.Response(body=body, content_type="application/jsonl", headers=headers)

    async def _show_config(self, request: web.Request) -> web.Response:
        """The configuration names the files of secrets, never what is in them."""
        grant: Grant = request["grant"]
        shown = self._config.model_dump(mode="json")
        shown["quotas"] = {t: quota for t, quota in shown["quotas"].items() if grant.sees(t)}
        denied = shown["admission"]["denied_tenants"]
        shown["admission"]["denied_tenants"] = sorted(filter(grant.sees, denied))
        return web.json_response(shown)

    async def _loglevel(self, request: web.Request) -> web.Response:
        return web.json_response({"root": _level_of(logging.getLogger())} | _own_levels())

    async def _set_loglevel(self, request: web.Request) -> web.Response:
        grant: Grant = request["grant"]
        grant.check(Role.ADMIN, "changing a log level")
        if grant.tenants is not None:
            text = f"log levels concern all tenants, {grant.name!r} only some; use another token"
            raise Denied("tenant", text)
        origin = f"{request.scheme}://{request.host}"
        if not grant.digest and request.headers.get("Origin") != origin:
            text = f"without a token send the header Origin: {origin}, as our own page would"
            raise Denied("origin", text)
        if request.content_type != "application/json":  # What another site's form cannot send.
            raise web.HTTPUnsupportedMediaType(text="send Content-Type: application/json")
        wanted = await _body(request)
        level, name = wanted.get("level"), wanted.get("logger", "kvstore")
        if level not in _LEVELS:
            raise web.HTTPBadRequest(text=f"level is {level!r}; use one of {', '.join(_LEVELS)}")
        known = ("root", "kvstore", *_own_levels())
        if name not in known:
            raise web.HTTPBadRequest(text=f"logger is {name!r}; use one of {', '.join(known)}")
        logging.getLogger(None if name == "root" else name).setLevel(level.upper())
        _log.warning("log level of %s is %s now, says %r", name, level, grant.name)
        return await self._loglevel(request)

    async def _show_page(self, request: web.Request) -> web.Response:
        content_type, body = self._pages[request.path]
        return web.Response(body=body, content_type=content_type, charset="utf-8")


async def _forbid(request: web.Request, response: web.StreamResponse) -> None:
    """Add to every answer, those of aiohttp itself included, what browsers must not do with it."""
    response.headers.update(_HEADERS)


def _after(request: web.Request, otherwise: str) -> int:
    after = request.query.get("after", otherwise)
    if after != otherwise and (not after.isdecimal() or len(after) > 15):
        raise web.HTTPBadRequest(text=f"after={after!r} is no number; leave it out")
    return int(after)


async def _body(request: web.Request) -> dict[str, Any]:
    """A JSON object, of `_MAX_BODY` bytes at most."""
    data = b""
    with contextlib.suppress(aiohttp.ClientPayloadError):
        data = await request.read()
    try:
        return msgspec.json.decode(data, type=dict[str, Any])
    except (ValueError, RecursionError) as e:
        text = 'send an object such as {"level": "debug"}'
        raise web.HTTPBadRequest(text=f"the body is no JSON object ({e}); {text}") from e


def _on_loopback(transport: asyncio.Transport | None) -> bool:
    """Whether the connection came in on a loopback address."""
    name = None if transport is None else transport.get_extra_info("sockname")
    return name is not None and is_loopback(name[0])


def _level_of(logger: logging.Logger) -> str:
    return logging.getLevelName(logger.getEffectiveLevel()).lower()


def _own_levels() -> dict[str, str]:
    names = sorted(n for n in logging.root.manager.loggerDict if n.split(".")[0] == "kvstore")
    return {name: _level_of(logging.getLogger(name)) for name in names}


def _read_page() -> dict[str, tuple[str, bytes]]:
    """Content type and bytes of the page's files, by path."""
    types = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
    found = {
        f"/{file.name}": (types[file.suffix], file.read_bytes())
        for file in _PAGE.iterdir()
        if file.suffix in types
    }
    return {"/": ("text/html", (_PAGE / "index.html").read_bytes())} | found
