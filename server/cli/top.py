"""`kvstore top`: what the daemon's page shows, live in a terminal."""

from __future__ import annotations

import json
import os
import select
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from http.client import HTTPException
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kvstore.errors import ConfigError, StoreUnavailable
from kvstore.server.cli.output import many
from kvstore.telemetry import shown
from kvstore.transport.credentials import client_context
from kvstore.values import format_size, lasting, split_host_port

if TYPE_CHECKING:
    from kvstore.config import Config

SLOWEST: Final = 5
_ROWS: Final = 8
_RATE_SECONDS: Final = 10
_MINUTE: Final = 60.0
_MAX_ANSWER: Final = 16 << 20
_BAR: Final = 20

_REASONS: Final = (
    "lookup.miss", "save.dropped", "load.failed", "commit.refused", "write.dropped",
    "write.failed", "evict.lost", "recover.dropped", "lease.expired",
)  # fmt: skip
"""Counters of what was not to be had, each by reason; as on the page."""


class Source:
    """Asks the HTTP face of a daemon for `/status`, as its page does.

    `where` is host:port, or an URL; None: `server.http` of the configuration.
    """

    def __init__(self, where: str | None, config: Config, token: str, timeout: float) -> None:
        where = where or config.server.http
        if where is None:
            raise ConfigError("server.http is none; give --http host:port of the daemon")
        secure = config.server.tls_cert or config.session.tls_ca or config.session.tls_cert
        scheme, separator, rest = where.rpartition("://")
        try:
            if separator and scheme not in ("http", "https"):
                raise ValueError("there is HTTP and HTTPS")
            split_host_port(rest.rstrip("/"))
        except ValueError as e:
            raise ConfigError(f"--http {where!r:.200}: {e}; write host:port") from e
        base = f"{scheme or ('https' if secure else 'http')}://{rest}"
        self.shown = base.rstrip("/")
        self._timeout = timeout
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        context: ssl.SSLContext | None = None
        if base.startswith("https"):
            context = client_context(config.session)
        self._open = urllib.request.build_opener(
            urllib.request.ProxyHandler({}),  # Not for this traffic, whatever the environment says.
            urllib.request.HTTPSHandler(context=context),
        ).open

    def ask(self, after: int) -> dict[str, Any]:
        """The status, with the samples after that one.

        Raises:
            StoreUnavailable: nobody answers, or what answers refuses.
        """
        _, said = self.get(f"/status?after={after}", _MAX_ANSWER)
        try:
            found = json.loads(said)
        except ValueError as e:
            raise StoreUnavailable(f"{self.shown} answers no JSON: {e}; see server.http") from e
        if not isinstance(found, dict) or "tiers" not in found:
            raise StoreUnavailable(f"{self.shown} is no daemon of ours; see server.http")
        return found

    def get(self, path: str, most: int) -> tuple[Message, bytes]:
        """Headers and body of an answer, of so many bytes at most. Raises as `ask` does."""
        request = urllib.request.Request(self.shown + path, None, self._headers)
        try:
            with self._open(request, timeout=self._timeout) as answer:
                return answer.headers, answer.read(most)
        except urllib.error.HTTPError as e:
            told = e.read(4096).decode(errors="replace")
            raise StoreUnavailable(f"{self.shown} answers {e.code}: {told}") from e
        except (OSError, ValueError, HTTPException) as e:
            raise StoreUnavailable(
                f"no daemon answers at {self.shown}: {getattr(e, 'reason', e)}; name its HTTP face "
                "by --http (server.http in its configuration)"
            ) from e


@dataclass
class Seen:
    """What successive answers add up to: the last minute of samples, requests and counters."""

    status: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    requests: dict[tuple[Any, ...], dict[str, Any]] = field(default_factory=dict)
    counters: list[tuple[float, dict[str, int]]] = field(default_factory=list)

    @property
    def latest(self) -> int:
        """Number of the last sample."""
        return int(self.samples[-1]["number"]) if self.samples else 0

    def add(self, status: dict[str, Any]) -> None:
        """An answer; one of another daemon than before begins anew."""
        if self.status and self.status["started"] != status["started"]:
            self.__init__()  # type: ignore[misc]
        since = status["now"] - _MINUTE
        self.status = status
        self.samples = [s for s in (*self.samples, *status["samples"]) if s["at"] >= since]
        for request in status["recent"]:
            self.requests[tuple(request.values())] = request
        self.requests = {key: r for key, r in self.requests.items() if r["at"] >= since}
        self.counters.append((status["now"], status["counters"]))
        self.counters = [kept for kept in self.counters if kept[0] >= since]

    def rate(self, name: str) -> float:
        """A second, lately."""
        last = self.samples[-_RATE_SECONDS:]
        return float(sum(s[name] for s in last) / (sum(s["seconds"] for s in last) or 1.0))

    def lately(self, name: str) -> int:
        """How much a counter has risen within the minute."""
        return int(self.status["counters"].get(name, 0) - self.counters[0][1].get(name, 0))


def frame(seen: Seen) -> RenderableType:
    """All there is to see, 80 columns wide at least. Names come from clients: they are escaped."""
    status = seen.status
    state = "draining" if status["draining"] else "ready" if status["ready"] else "stopping"
    up = lasting(status["now"] - status["started"])
    head = Text.assemble(
        (shown(status["node"]), "bold"), f" · kvstore {status['version']} · up {up} · ",
        (state, "green" if state == "ready" else "yellow"),
        f" · {many(status['sessions'], 'session')} · {many(status['objects'], 'object')}",
    )  # fmt: skip
    parts = (_tiers(status), _rates(seen), _hits(seen), _slowest(seen), _drops(seen))
    return Group(head, *(part for part in parts if part.row_count))


def _table(title: str, *columns: str) -> Table:
    """The first column gets the room there is; numbers stand to the right."""
    table = Table(title=title, title_justify="left", title_style="bold cyan", box=None)
    table.expand, table.padding = True, (0, 1)
    for number, name in enumerate(columns):
        right = name.endswith(">")
        table.add_column(
            name.removesuffix(">"), justify="right" if right else "left", no_wrap=True,
            overflow="ellipsis", ratio=None if number else 1, header_style="dim",
        )  # fmt: skip
    return table


def _tiers(status: dict[str, Any]) -> Table:
    table = _table("tiers", "tier", "", "used>", "of>", "pinned>")
    for name, held in status["tiers"].items():
        used, capacity = held.get("used"), held.get("capacity")
        problem = held.get("problem")
        bar = Text(shown(problem), "red") if problem else _bar(used or 0, capacity)
        sizes = (format_size(n) if n is not None else "" for n in (used, capacity))
        table.add_row(name, bar, *sizes, format_size(held.get("pinned") or 0))
    return table


def _bar(used: int, capacity: int | None) -> Text:
    filled = round(_BAR * used / capacity) if capacity else 0
    return Text.assemble(("━" * filled, "green"), ("─" * (_BAR - filled), "dim"))


def _rates(seen: Seen) -> Table:
    table = _table(
        f"rates a second, of the last {_RATE_SECONDS} s", "asked>", "saved>", "loaded>", "read>"
    )
    table.add_column("written", justify="right", header_style="dim")
    table.add_column("lookup p50 / p99", justify="right", header_style="dim")
    if seen.samples:
        rates = [format_size(seen.rate(n)) for n in ("save", "load", "read", "write")]
        times = [s for s in seen.samples[-_RATE_SECONDS:] if s["p99"] is not None]
        told = [lasting(max(s[p] for s in times)) for p in ("p50", "p99")] if times else ["–"]
        table.add_row(f"{seen.rate('asked'):,.0f} tokens", *rates, " / ".join(told))
    return table


def _hits(seen: Seen) -> Table:
    """Of tokens by tier, where the node's counters are to be seen; of blocks by tenant."""
    table = _table("hit rate", "of", "last minute>", "since start>")
    counters = seen.status["counters"]
    asked = counters.get("lookup.tokens", 0)
    for tier in seen.status["tiers"]:
        name = f"hit.tokens.{tier}"
        if asked:
            lately = _part(seen.lately(name), seen.lately("lookup.tokens"))
            table.add_row(f"tier {tier}", lately, _part(counters.get(name, 0), asked))
    wanted: Counter[str] = Counter()
    found: Counter[str] = Counter()
    for request in seen.requests.values():
        if request["what"] == "lookup":
            wanted[request["tenant"]] += request["asked"]
            found[request["tenant"]] += request["memory"] + request["below"]
    for tenant, blocks in wanted.most_common(_ROWS):
        table.add_row(_name(f"tenant {tenant or '–'}"), _part(found[tenant], blocks), "")
    return table


def _slowest(seen: Seen) -> Table:
    table = _table("slowest requests, last minute", "model", "tenant", "what", "found>", "took>")
    for r in sorted(seen.requests.values(), key=lambda r: -r["seconds"])[:SLOWEST]:
        model = r["model"].rstrip("/").rpartition("/")[2]
        blocks = f"{r['memory'] + r['below']}/{r['asked']}"
        row = (_name(model), _name(r["tenant"]), r["what"], blocks, lasting(r["seconds"]))
        table.add_row(*row)
    return table


def _drops(seen: Seen) -> Table:
    table = _table("dropped and missed", "what", "reason", "last minute>", "since start>")
    rows = []
    for name, total in seen.status["counters"].items():
        what, _, reason = name.rpartition(".")
        if what in _REASONS and total:
            rows.append((seen.lately(name), total, what, reason))
    for lately, total, what, reason in sorted(rows, reverse=True)[:_ROWS]:
        table.add_row(what, _name(reason), f"+{lately:,}" if lately else "0", f"{total:,}")
    return table


def _part(some: int, whole: int) -> str:
    return f"{some / whole:.1%}" if whole else "–"


def _name(text: str) -> Text:
    return Text(shown(text))


def watch(source: Source, interval: float, *, once: bool) -> None:
    """Show frames until `q` or Ctrl-C, or one. A daemon that goes away is waited for.

    Raises:
        StoreUnavailable: there is none at the beginning.
    """
    console, seen = Console(), Seen()
    seen.add(source.ask(0))
    if once:
        console.print(frame(seen))
        return
    live = Live(frame(seen), console=console, screen=True, auto_refresh=False)
    with _keys() as pressed, live:
        while not pressed(interval):
            try:
                seen.add(source.ask(seen.latest))
                live.update(frame(seen), refresh=True)
            except StoreUnavailable as e:
                live.update(Group(Text(shown(str(e)), "red"), frame(seen)), refresh=True)


@contextmanager
def _keys() -> Iterator[Any]:
    """Waits so many seconds for the key that ends it; true if it, or Ctrl-C, was pressed."""
    import termios
    import tty

    terminal = sys.stdin is not None and sys.stdin.isatty()
    before = termios.tcgetattr(sys.stdin) if terminal else None

    def pressed(seconds: float) -> bool:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if not terminal:
                time.sleep(left)
                continue
            ready, _, _ = select.select([sys.stdin], [], [], left)
            if ready and os.read(sys.stdin.fileno(), 1) in (b"q", b"Q", b""):
                return True
        return False

    try:
        if terminal:
            tty.setcbreak(sys.stdin)
        yield pressed
    except KeyboardInterrupt:
        pass
    finally:
        if before is not None:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
