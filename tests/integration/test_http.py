"""Health, status, configuration and log levels over HTTP, and who gets to see what."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from kvstore.client.session import Session
from tests.certificates import Authority
from tests.http_tools import ON, address, ask
from tests.session_tools import MIB, PATIENCE, Served, Stores, eventually, load, prompt, save

READER: Final = "reader-0123456789abcdef0123456789"
ADMIN: Final = "admin-0123456789abcdef0123456789"
OF_A: Final = "only-a-0123456789abcdef0123456789"
OPEN: Final = ("/healthz", "/readyz", "/", "/page.js", "/page.css", "/icon.svg")
CLOSED: Final = ("/metrics", "/status", "/config", "/loglevel")


@pytest.fixture
def served(stores: Stores) -> Served:
    return stores.serve(server=ON | {"name": "node-1"})


@pytest.fixture
def guarded(stores: Stores) -> Served:
    """A daemon with tokens."""
    tokens = [
        {"name": "reader", "role": "read", "token": READER},
        {"name": "admin", "role": "admin", "token": ADMIN},
        {"name": "of-a", "role": "write", "token": OF_A, "tenants": ["a"]},
    ]
    path = stores.folder / "tokens.yaml"
    path.write_text(json.dumps({"tokens": tokens}))
    path.chmod(0o600)
    return stores.serve(
        server=ON | {"tokens": str(path)},
        quotas={"a": {"memory": "1MiB"}, "b": {"memory": "1MiB"}},
        admission={"denied_tenants": ["b-denied"]},
    )


# -- health ---------------------------------------------------------------------------------------


def test_a_daemon_says_that_it_warms_up_until_it_is_ready(stores: Stores) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        where = f"127.0.0.1:{probe.getsockname()[1]}"
    settings: dict[str, Any] = {
        "address": f"unix://{stores.folder}/kvstore.sock",
        "memory": {"size": "1GiB"},
        "server": {"http": where, "grpc": None},
    }
    path = stores.folder / "config.yaml"
    path.write_text(json.dumps(settings))
    command = [sys.executable, "-m", "kvstore.server.cli", "serve", "-c", str(path)]
    seen: list[tuple[int, str]] = []
    touched: set[float] = set()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            until = time.monotonic() + 60
            while seen[-1:] != [(200, "ready")]:
                assert process.poll() is None
                assert time.monotonic() < until
                with contextlib.suppress(ConnectionRefusedError):
                    health = ask(where, "/healthz")
                    state = health.status, health.json["status"]
                    if seen[-1:] != [state]:
                        seen.append(state)
                    touched.add(health.json.get("memory_touched", 1.0))
                    if len(touched) == 1:
                        assert ask(where, "/readyz").status in (200, 503)
                        metrics = ask(where, "/metrics").body
                        assert b"\nkvstore_ready " in metrics
                        status = ask(where, "/status")
                        assert status.status == 200 or "is starting" in status.json["error"]
            assert seen == [(503, "starting"), (200, "ready")]
            assert len(touched) > 2  # Its progress was seen.
        finally:
            process.terminate()
    assert process.returncode == 0


def test_a_draining_node_is_alive_but_not_ready(served: Served) -> None:
    where = address(served)
    assert ask(where, "/readyz").json == {"status": "ready", "tiers": {}}
    assert ask(where, "/status").json["draining"] is False
    drain = [sys.executable, "-m", "kvstore.server.cli", "drain", "--address"]
    drain += [f"unix://{served.socket}"]
    subprocess.run(drain, check=True, timeout=60, stdout=subprocess.DEVNULL)
    ready, health = ask(where, "/readyz"), ask(where, "/healthz")
    assert (ready.status, ready.json) == (503, {"status": "draining", "tiers": {}})
    assert (health.status, health.json) == (200, {"status": "draining", "tiers": {}})
    assert ask(where, "/status").json["draining"] is True
    assert b"\nkvstore_draining 1.0\n" in ask(where, "/metrics").body


def test_while_it_stops_a_daemon_answers_that_it_does(stores: Stores) -> None:
    # The disk cannot keep up with so many small blocks: much is unwritten at the end.
    served = stores.serve(memory="64MiB", disk="64MiB", server=ON)
    where = address(served)
    with served.session() as session:
        save(session, session.keys(prompt(1, 4000)))
        served.process.terminate()
        states = set()
        with contextlib.suppress(ConnectionError, http.client.HTTPException):
            while served.process.poll() is None:
                health = ask(where, "/healthz")
                states.add((health.status, health.json["status"]))
    assert served.process.wait(60) == 0
    assert (503, "stopping") in states
    assert states <= {(200, "ready"), (503, "stopping")}


# -- what it tells --------------------------------------------------------------------------------


def test_the_status_follows_the_traffic(served: Served) -> None:
    where = address(served)
    empty = ask(where, "/status").json
    assert (empty["node"], empty["objects"], empty["recent"]) == ("node-1", 0, [])
    with served.session(tenant="team") as session:
        keys = session.keys(prompt(1, 6))
        assert session.lookup(keys).blocks == 0
        save(session, keys[:4])
        assert session.lookup(keys).blocks == 4
        assert load(session, keys[:4]).blocks == 4
        pin = session.pin(keys[:2])
        status = ask(where, "/status").json
        assert status["leases"] == {"read": 0, "write": 0, "pin": 1, "withdrawn": 0}
        assert status["pinned_bytes"] == 2 * 4096
        pin.release()
        assert status["sessions"] == 1
        save(session, keys[:4])  # Had already.
    held = status["latest_namespaces"]
    assert [(n["model"], n["tenant"], n["blocks"], n["memory"]) for n in held] == [
        ("test/model", "team", 4, 4 * 4096)
    ]
    recent = eventually(lambda: len(r := ask(where, "/status").json["recent"]) >= 5 and r)
    told = [(r["what"], r["asked"], r["memory"], r["below"], r["reason"]) for r in reversed(recent)]
    assert told == [
        ("lookup", 6, 0, 0, "absent"),
        ("save", 4, 4, 0, ""),
        ("lookup", 6, 4, 0, "absent"),
        ("load", 4, 4, 0, ""),
        ("save", 4, 0, 0, "had"),
    ]
    assert all(0 <= r["seconds"] < PATIENCE and r["session"] == 1 for r in recent)
    assert {r["tenant"] for r in recent} == {"team"}


def test_samples_are_told_once(served: Served) -> None:
    where = address(served)
    with served.session() as session:
        keys = session.keys(prompt(1, 4))
        save(session, keys)

        def looked_up() -> Any:
            session.lookup(keys)
            samples = ask(where, "/status").json["samples"]
            return samples if any(s["lookups"] and s["p99"] for s in samples) else None

        samples = eventually(looked_up)
    numbers = [s["number"] for s in samples]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert sum(s["save"] for s in samples) == 4 * 4096
    assert all(s["memory"] == s["asked"] for s in samples)
    newer = ask(where, f"/status?after={numbers[-1]}").json["samples"]
    assert all(s["number"] > numbers[-1] for s in newer)
    assert ask(where, "/status?after=x").status == 400


def test_a_session_that_leaves_is_gone_from_the_status(served: Served) -> None:
    session = served.session()
    assert ask(address(served), "/status").json["sessions"] == 1
    session.close()
    eventually(lambda: ask(address(served), "/status").json["sessions"] == 0)


def test_the_configuration_tells_no_secret(guarded: Served) -> None:
    shown = ask(address(guarded), "/config", token=READER)
    assert shown.json["memory"]["size"] == 8 * MIB
    assert set(shown.json["quotas"]) == {"a", "b"}
    for secret in (READER, ADMIN, OF_A):
        assert secret.encode() not in shown.body


def test_the_log_level_can_be_changed_while_it_runs(served: Served) -> None:
    where = address(served)
    assert ask(where, "/loglevel").json["kvstore.http"] == "info"
    refused = ask(where, "/loglevel", "PUT", send={"level": "debug"})
    assert (refused.status, f"Origin: http://{where}" in refused.json["error"]) == (403, True)
    own = {"Origin": f"http://{where}"}
    changed = ask(where, "/loglevel", "PUT", send={"level": "debug"}, **own)
    assert changed.json["kvstore.http"] == changed.json["kvstore"] == "debug"
    send = {"level": "error", "logger": "kvstore.http"}
    changed = ask(where, "/loglevel", "POST", send=send, **own)
    assert (changed.json["kvstore.http"], changed.json["kvstore"]) == ("error", "debug")
    eventually(lambda: "log level of kvstore is debug now" in served.log.read_text())


def test_a_bad_log_level_is_refused(served: Served) -> None:
    for send, status, word in (
        ({"level": "loud"}, 400, "debug, info, warning, error"),
        ({}, 400, "level is None"),
        ({"level": "info", "logger": "asyncio"}, 400, "kvstore.http"),
        ({"level": "info", "logger": ["x"]}, 400, "kvstore.http"),
        ([1], 400, "send an object"),
        (b"{", 400, "no JSON"),
        (b"[" * 3000, 400, "no JSON"),
        (b" " * 5000, 413, "4096"),
    ):
        own = {"Origin": f"http://{address(served)}"}
        answer = ask(address(served), "/loglevel", "PUT", send=send, **own)
        assert (answer.status, word in answer.json["error"]) == (status, True), send


# -- who may --------------------------------------------------------------------------------------


def test_without_tokens_everything_is_open_on_loopback(served: Served) -> None:
    for path in OPEN + CLOSED:
        assert ask(address(served), path).status == 200, path
        head = ask(address(served), path, "HEAD")
        assert (head.status, head.body) == (200, b"")


def test_with_tokens_a_token_is_needed(guarded: Served) -> None:
    where = address(guarded)
    for path in OPEN:
        assert ask(where, path).status == 200, path
    for path in CLOSED:
        for wrong in (None, "", "wrong", READER[:-1], READER + "x", "ä"):
            headers = {} if wrong is None else {"Authorization": f"Bearer {wrong}"}
            refused = ask(where, path, **headers)
            assert refused.status == 401, (path, wrong)
            assert refused.headers["WWW-Authenticate"] == "Bearer"
            assert "token" in refused.json["error"]
        assert ask(where, path, Authorization=f"Basic {READER}").status == 401
        for right in (READER, ADMIN, OF_A):
            assert ask(where, path, token=right).status == 200, path
    assert ask(where, "/status", Authorization=f"bearer {READER}").status == 200


def test_only_an_admin_changes_log_levels(guarded: Served) -> None:
    where = address(guarded)
    for token in (READER, OF_A):
        refused = ask(where, "/loglevel", "PUT", token=token, send={"level": "debug"})
        assert refused.status == 403
        assert "admin" in refused.json["error"]
    assert ask(where, "/loglevel", token=READER).json["kvstore"] == "info"
    assert ask(where, "/loglevel", "PUT", token=ADMIN, send={"level": "debug"}).status == 200


def test_a_token_of_one_tenant_sees_no_other(guarded: Served) -> None:
    where = address(guarded)
    with contextlib.ExitStack() as open_sessions:
        for tenant in ("a", "b"):
            session: Session = open_sessions.enter_context(guarded.session(tenant=tenant))
            save(session, session.keys(prompt(1, 4)))
        everything = ask(where, "/status", token=READER).json
        status = ask(where, "/status", token=OF_A).json
        metrics = ask(where, "/metrics", token=OF_A).body.decode()
    assert [n["tenant"] for n in everything["latest_namespaces"]] == ["b", "a"]
    assert (everything["sessions"], status["sessions"]) == (2, 1)
    for shown in (
        status["latest_namespaces"],
        status["recent"],
    ):
        assert [entry["tenant"] for entry in shown] == ["a"], shown
    assert (status["namespaces"], status["tenants"]) == (1, 1)
    assert 'kvstore_tenant_bytes{tenant="a"' in metrics
    assert 'tenant="b"' not in metrics
    config = ask(where, "/config", token=OF_A)
    assert set(config.json["quotas"]) == {"a"}
    assert b"b-denied" not in config.body


def test_tls_is_spoken_where_it_is_configured(stores: Stores, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    identity = authority.issue("server")
    served = stores.serve(
        server=ON
        | {
            "tls_cert": str(identity.cert),
            "tls_key": str(identity.key),
            "tls_client_ca": str(authority.path),
        }
    )
    where = served.addresses["https"]
    tls = ssl.create_default_context(cafile=str(authority.path))
    with pytest.raises((ssl.SSLError, ConnectionError)):  # No certificate of its own.
        ask(where, "/status", tls=tls)
    client = authority.issue("client")
    tls.load_cert_chain(client.cert, client.key)
    assert ask(where, "/status", tls=tls).status == 200
    with pytest.raises((http.client.HTTPException, ConnectionError)):
        ask(where, "/status")


# -- what is no request ----------------------------------------------------------------------------


def test_traces_are_for_those_who_see_all_tenants(guarded: Served) -> None:
    where = address(guarded)
    assert ask(where, "/trace").status == 401
    assert ask(where, "/trace", token=OF_A).status == 403
    told = ask(where, "/trace", token=READER)
    assert (told.status, told.body, told.headers["Kvstore-Number"]) == (200, b"", "0")
    assert ask(where, "/trace?after=-2", token=READER).status == 400


def test_answers_forbid_what_a_page_must_not_do(served: Served) -> None:
    asked: list[tuple[str, dict[str, str]]] = [(path, {}) for path in (*OPEN, *CLOSED, "/nothing")]
    for path, own in [*asked, ("/status", {"Expect": "nothing"})]:
        headers = ask(address(served), path, **own).headers
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["X-Frame-Options"] == "DENY"
        assert headers["Cache-Control"] == "no-store"
        assert "Access-Control-Allow-Origin" not in headers
        assert "aiohttp" not in headers["Server"]


def test_what_is_not_there_and_what_is_not_allowed(served: Served) -> None:
    where = address(served)
    for path in ("/nothing", "/page/page.js", "/../config.py", "/%2e%2e/admin.py", "/index.html"):
        missing = ask(where, path)
        assert missing.status == 404
        assert "/status" in missing.json["error"]
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        refused = ask(where, "/status", method)
        assert refused.status == 405, method
        assert refused.headers["Allow"] == "GET, HEAD"
    assert ask(where, "/loglevel", "DELETE").headers["Allow"] == "GET, HEAD, PUT, POST"


def test_another_site_cannot_use_a_browser_against_the_node(served: Served) -> None:
    where = address(served)
    port = where.rpartition(":")[2]
    for host in (f"localhost:{port}", "localhost", f"127.0.0.1:{port}", f"[::1]:{port}", "[::1]"):
        assert ask(where, "/status", Host=host).status == 200, host
    wrong = ("evil.example", "localhost.evil.example", "10.0.0.1", "127.0.0.1%x.evil.example")
    for host in (f"evil.example:{port}", *wrong):
        assert ask(where, "/status", Host=host).status == 421, host
    level, own = b'{"level":"debug"}', {"Origin": f"http://{where}"}
    form = ask(where, "/loglevel", "POST", send=level, Content_Type="text/plain", **own)
    assert form.status == 415
    for origin in ("http://evil.example", "null", f"https://{where}", "http://localhost"):
        assert ask(where, "/loglevel", "PUT", send=level, Origin=origin).status == 403, origin
        assert "Access-Control-Allow-Origin" not in ask(where, "/status", Origin=origin).headers
    assert 'kvstore_refusals_total{reason="origin"} 4.0' in ask(where, "/metrics").body.decode()
    assert ask(where, "/loglevel").json["kvstore"] == "info"


def test_slow_and_silent_clients_make_room(stores: Stores) -> None:
    served = stores.serve(server=ON | {"max_requests": 8})
    host, _, port = address(served).rpartition(":")
    with contextlib.ExitStack() as stack:
        silent = [
            stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(40)
        ]
        for one in silent[::2]:
            one.sendall(b"GET /status HTTP/1.1\r\nHost: x\r\nX-Slow: ")
        assert ask(address(served), "/healthz").status == 200
        for one in silent[:30]:
            one.settimeout(PATIENCE)
            with contextlib.suppress(ConnectionResetError):
                assert one.recv(1) == b""  # Closed.


def test_one_connection_is_one_request(served: Served) -> None:
    host, _, port = address(served).rpartition(":")
    request = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as client:
        client.sendall(request * 1000)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := client.recv(1 << 16):
                answer += piece
    assert answer.count(b"HTTP/1.1 200") == 1
    assert b"Connection: close" in answer


@pytest.fixture
def taken() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield f"127.0.0.1:{other.getsockname()[1]}"


def test_a_taken_port_is_an_error_with_a_remedy(stores: Stores, taken: str) -> None:
    command = [sys.executable, "-m", "kvstore.server.cli", "serve", "--http", taken]
    command += ["--grpc", "none", "--socket", f"{stores.folder}/kvstore.sock", "--memory", "1MiB"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    for word in ("server.http", taken, "taken", "none"):
        assert word in ended.stderr
