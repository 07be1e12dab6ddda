"""Tokens that are changed while the daemon runs: who has lost one is out, everybody else stays."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Final

import grpc
import pytest

from kvstore.transport import protocol
from kvstore.transport.protocol import Failure, Welcome
from tests.control_tools import Api, refusal, secret, write_tokens
from tests.http_tools import ON, address, ask
from tests.integration.test_access import Wire
from tests.session_tools import Served, Stores, eventually, prompt, save
from tests.tcp_tools import tcp_session

LEAVES: Final[dict[str, Any]] = {"name": "leaves", "role": "write", "tenants": ["a"]}
SAID: Final = "the tokens stay as they were: server.tokens"
STAYS: Final[dict[str, Any]] = {"name": "stays", "role": "admin"}


@pytest.fixture
def served(stores: Stores) -> Served:
    """A daemon with two tokens and all faces."""
    tokens = write_tokens(stores.folder, LEAVES, STAYS)
    server = ON | {"grpc": "127.0.0.1:0", "tcp": "127.0.0.1:0", "tokens": tokens}
    return stores.serve(server=server)


def replace(stores: Stores, text: str) -> None:
    """Put another file in the place of that with the tokens, as editors and Kubernetes do."""
    new = stores.folder / "new.yaml"
    new.touch(0o600)
    new.write_text(text)
    os.replace(new, stores.folder / "tokens.yaml")


def greeted(served: Served, name: str) -> bool:
    wire = Wire(served.socket, secret(name))
    wire.close()
    return isinstance(wire.greeting, Welcome)


@pytest.mark.parametrize("change", ["removed", "limited", "replaced"])
def test_a_token_that_is_taken_away_ends_its_sessions_calls_and_watches(
    stores: Stores, served: Served, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVSTORE_TOKEN", secret("stays"))
    local, there, stays = (
        Wire(served.socket, secret("leaves")),
        Wire(served.socket, secret("leaves")),
        Wire(served.socket, secret("stays")),
    )
    local.open("a")
    # Under a lease its own threads may be copying: that session is told, and closes by itself.
    assert isinstance(there.ask(protocol.Reserve(there.open("a"), 1, b"k" * 32)), protocol.Reserved)
    with (
        tcp_session(served, tenant="a") as session,
        Api(served, secret("leaves"), tcp=True) as api,
        Api(served, secret("stays"), tcp=True) as other,
    ):
        save(session, session.keys(prompt(1, 3)))
        watch, kept = api.call("WatchEvents"), other.call("WatchEvents")
        for stream in (watch, kept):
            stream.initial_metadata()
        entries = {
            "removed": [],
            "limited": [LEAVES | {"tenants": ["b"], "token": secret("leaves")}],
            "replaced": [LEAVES | {"token": "another-secret-token"}],
        }[change]
        stay = STAYS | {"token": secret("stays")}
        replace(stores, json.dumps({"tokens": [*entries, stay]}))
        with pytest.raises(grpc.RpcError) as caught:
            next(watch)
        assert refusal(caught.value)[:2] == ("UNAUTHENTICATED", "TOKEN_UNKNOWN")
        for wire in (local, there):
            told = wire.hear()
            assert isinstance(told, Failure)
            assert told.fatal
            assert "not known here any more" in told.reason
        assert local.closed()
        assert greeted(served, "leaves") is (change == "limited")
        assert api.outcome("Stats") == ("OK" if change == "limited" else "UNAUTHENTICATED")
        status = ask(address(served), "/status", token=secret("leaves")).status
        assert status == (200 if change == "limited" else 401)
        # Whoever has another token has noticed nothing.
        assert stays.open("any") == 0
        save(session, session.keys(prompt(2, 1)))
        assert next(kept).HasField("stored")
        assert other.call("Stats").counters["tokens.read.done"] == 1
        kept.cancel()
    there.close()


def test_a_file_that_is_no_good_changes_nothing_and_is_said(stores: Stores, served: Served) -> None:
    path = stores.folder / "tokens.yaml"
    good = path.read_text()
    wire = Wire(served.socket, secret("leaves"))
    for number, bad in enumerate(("tokens: []", f"tokens: [{secret('leaves')}", None), 1):
        if bad is None:
            path.unlink()
        else:
            replace(stores, bad)
        eventually(lambda n=number: served.log.read_text().count(SAID) == n)
        assert greeted(served, "leaves")
        assert wire.open("a") == number - 1
    assert secret("leaves") not in served.log.read_text()
    replace(stores, json.dumps({"tokens": [json.loads(good)["tokens"][1]]}))
    assert wire.hear() == Failure("this token is not known here any more; use another", fatal=True)
    eventually(lambda: not greeted(served, "leaves"))


def test_a_token_that_is_added_lets_in(stores: Stores, served: Served) -> None:
    assert not greeted(served, "new")
    tokens = json.loads((stores.folder / "tokens.yaml").read_text())["tokens"]
    tokens.append({"name": "new", "role": "read", "token": secret("new")})
    path = Path(stores.folder / "tokens.yaml")
    path.write_text(json.dumps({"tokens": tokens}))  # In place.
    eventually(lambda: greeted(served, "new"))
