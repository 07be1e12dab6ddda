"""The verbs of the API on the command line, as tables and as JSON."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvstore.blend.pieces import piece_keys, piece_namespace
from kvstore.client.session import Session
from kvstore.server.cli.main import app
from tests.control_tools import NAMESPACE_ID, secret, write_tokens
from tests.session_tools import PATIENCE, Served, Stores, namespace, prompt, save

COMMAND = [sys.executable, "-m", "kvstore.server.cli"]
TOKENS = ",".join(map(str, prompt(1, 4)))
BLOCKS = (NAMESPACE_ID[:8], "--tokens", TOKENS)
CHOSEN = ("-n", *BLOCKS)
TERMINAL = {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}


class Cli:
    """Runs commands against one daemon."""

    def __init__(self, served: Served) -> None:
        self.address = f"unix://{served.socket}"

    def run(self, *arguments: object, **settings: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, *map(str, arguments), "--address", self.address],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            stdin=subprocess.DEVNULL,
            env=os.environ | TERMINAL | settings,
        )

    def text(self, *arguments: object) -> str:
        """What it prints for people; in this process, since starting one takes a second."""
        line = [*map(str, arguments), "--address", self.address]
        result = CliRunner().invoke(app, line, env=TERMINAL, catch_exceptions=False)
        assert (result.exit_code, result.stderr) == (0, "")
        return result.stdout

    def json(self, *arguments: object) -> Any:
        """What it prints for programs."""
        return json.loads(self.text(*arguments, "--format", "json"))

    def refused(self, *arguments: object, **settings: str) -> str:
        """The one line of a refusal."""
        result = self.run(*arguments, **settings)
        assert (result.returncode, result.stdout) == (1, ""), result
        (line,) = result.stderr.splitlines()
        assert line.startswith("error: ")
        return line


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """A daemon for all tests here; each saves what it needs."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("KVSTORE_")]:
            patch.delenv(name)
        stores = Stores()
        yield stores.serve("8MiB", "16MiB", server={"name": "node-1"})
        stores.close()


@pytest.fixture
def session(served: Served) -> Iterator[Session]:
    """A session, with three of the four blocks of prompt 1 stored."""
    with served.session() as opened:
        save(opened, opened.keys(prompt(1, 4))[:3])
        assert opened.flush() == 0
        yield opened


@pytest.fixture
def cli(served: Served, session: Session) -> Cli:
    return Cli(served)


def test_lookup_says_what_is_stored_of_pieces(cli: Cli, session: Session) -> None:
    ids = [*prompt(31, 1), *prompt(32, 5), *prompt(33, 4)]
    with session.beside(piece_namespace(session.namespace, range(512))) as pieces:
        save(pieces, piece_keys(pieces.namespace, ids[16:96]))
        asks = ("lookup", NAMESPACE_ID, "--tokens", ",".join(map(str, ids)))
        text = " ".join(cli.text(*asks, "--piece", "16:96", "--piece", "96:160").split())
        name = pieces.namespace.digest.hex()[:12]
        assert f"pieces in order 0, 1: 0 tokens; whole pieces: 80 tokens, in {name}" in text
        assert "piece 1: 0 of 4 blocks, then never_stored" in text
        assert cli.json(*asks, "--piece", "20:90")["pieces"][0]["reason"] == "never_stored"
        assert pieces.clear() == 5  # Other tests count what is there.


def test_lookup(cli: Cli, session: Session) -> None:
    text = cli.text("lookup", *BLOCKS)
    assert "0–2" in text
    assert "node-1" in text
    assert "3 of 4 blocks, 48 tokens; block 3: never_stored" in text
    found = cli.json("lookup", *BLOCKS)
    assert (found["blocks"], found["reason"]) == (3, "never_stored")
    assert found["runs"][0]["tier"] == "memory"
    keys = [key.hex() for key in session.keys(prompt(1, 4))]
    assert cli.json("lookup", NAMESPACE_ID, "--keys", ",".join(keys)) == found


@pytest.mark.parametrize("form", ["json", "lines"])
def test_tokens_from_files(cli: Cli, tmp_path: Path, form: str) -> None:
    file = tmp_path / "tokens"
    tokens = prompt(1, 4)
    file.write_text(json.dumps(tokens) if form == "json" else "\n".join(map(str, tokens)))
    source = "-" if form == "lines" else str(file)
    with file.open() as content:
        result = subprocess.run(
            [*COMMAND, "lookup", NAMESPACE_ID, "--tokens-file", source, "--address",
             cli.address],
            stdin=content, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert "3 of 4 blocks" in result.stdout, result


def test_explain(cli: Cli) -> None:
    text = cli.text("explain", *BLOCKS)
    assert "never_stored" in text
    assert "0–2" in text
    assert sum("│" in line for line in text.splitlines()) == 2
    assert "3 of 4 blocks can be loaded (3 in memory); block 3: never_stored" in text
    blocks = cli.json("explain", *BLOCKS)["blocks"]
    assert [block["usable"] for block in blocks] == [True, True, True, False]
    assert len(blocks[0]["key"]) == 64


def test_pins(cli: Cli) -> None:
    pinned = cli.json("pin", *BLOCKS, "--ttl", "2h", "--owner", "me")
    assert pinned["blocks"] == 3
    text = cli.text("pin", *BLOCKS, "--ttl", "5m", "--owner", "me")
    assert "pinned 3 blocks (12 KiB) as pin-" in text
    assert "the next one: never_stored" in text
    leases = cli.json("leases", "--owner", "me")["leases"]
    assert [lease["blocks"] for lease in leases] == [3, 3]
    assert pinned["id"] in cli.text("leases")
    assert cli.text("unpin", pinned["id"]) == "ended 1 pin\n"
    assert "it may have ended" in cli.refused("unpin", pinned["id"])
    assert cli.json("unpin", "--owner", "me") == {"pins": 1}


def test_moving(cli: Cli) -> None:
    assert cli.text("move", "--to", "disk", "-n", NAMESPACE_ID) == "moved 3 objects (12 KiB)\n"
    copied = cli.json("copy", "--to", "memory", *CHOSEN)
    assert (copied["verb"], copied["state"], copied["changed"]) == ("Copy", "done", 3)
    again = cli.text("prefetch", *BLOCKS)
    assert again == "brought up 0 objects; left alone: 3 already\n"
    started = cli.text("move", "--to", "disk", "--all", "--no-wait")
    assert "kvstore operations watch" in started
    operation = started.split("watch ")[1].split("`")[0]
    assert "changed 3 objects" in cli.text("operations", "watch", operation)
    assert "changed 3 objects" in cli.text("operations", "cancel", operation)
    listed = cli.json("operations", "list")["operations"]
    assert {o["verb"] for o in listed} >= {"Move", "Copy", "Prefetch"}
    assert operation in cli.text("operations", "list")
    cli.text("prefetch", *BLOCKS)


def test_codecs(cli: Cli) -> None:
    assert "left alone: 3 already" in cli.text("compress", "--codec", "raw", "--all")
    assert "left alone: 3 already" in cli.text("decompress", "--all")
    told = cli.refused("compress", "--codec", "zip", "--all")
    assert "codec: 'zip' is not known; use one of raw" in told


def test_ttl(cli: Cli) -> None:
    assert cli.text("ttl", "2h", "--all", "--yes") == "changed 3 objects\n"
    assert cli.json("ttl", "never", "--tier", "memory") == {"objects": 3}


def test_clear(cli: Cli, session: Session) -> None:
    keys = session.keys(prompt(1, 4))
    assert "3 objects would be removed (12 KiB)" in cli.text("clear", "--all", "--dry-run")
    assert cli.text("clear", "--unused-for", "7d", "-y") == "removed 0 objects\n"
    assert cli.text("clear", "-y", "--tenant", "x", "--older-than", "1s") == "removed 0 objects\n"
    assert session.lookup(keys).blocks == 3
    without = cli.run("clear")
    assert without.returncode == 2
    assert "--all" in without.stderr
    assert cli.json("clear", "--yes", "-n", NAMESPACE_ID)["changed"] == 3
    assert session.lookup(keys).blocks == 0


@pytest.mark.parametrize("answer", ["y", "n"])
def test_clear_asks_on_a_terminal(cli: Cli, session: Session, answer: str) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, "clear", "--all", "--address", cli.address],
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    os.write(ours, f"{answer}\n".encode())
    said, _ = process.communicate(timeout=PATIENCE)
    os.close(ours)
    os.close(theirs)
    assert b"3 objects would be removed (12 KiB). Go on?" in said
    assert process.returncode == (0 if answer == "y" else 1)
    left = 0 if answer == "y" else 3
    assert session.lookup(session.keys(prompt(1, 4))).blocks == left


def test_lists(cli: Cli) -> None:
    text = cli.text("namespaces")
    assert NAMESPACE_ID[:12] in text
    assert "test/model" in text
    (info,) = cli.json("namespaces", "--tenant", "")["namespaces"]
    assert info["namespace"]["id"] == NAMESPACE_ID
    assert info["blocks"] == 3
    assert cli.json("namespaces", "--tenant", "x") == {"namespaces": []}
    (known,) = cli.json("sessions")["sessions"]
    assert known["pid"] == os.getpid()
    assert str(os.getpid()) in cli.text("sessions")


def test_quotas(cli: Cli) -> None:
    cli.text("quota", "t", "--memory", "1GiB")
    changed = cli.json("quota", "t", "--disk", "2GiB")["quotas"][0]
    assert changed["limits"] == {"memory": 1 << 30, "disk": 2 << 30}
    text = cli.text("quota")
    assert "1 GiB" in text
    assert "2 GiB" in text
    cli.text("quota", "t", "--memory", "none", "--disk", "none")
    assert [q["tenant"] for q in cli.json("quota")["quotas"]] == [""]
    assert cli.run("quota", "--memory", "1GiB").returncode == 2
    assert cli.run("quota", "t", "--memory", "10 Gb").returncode == 2


def test_admission(cli: Cli) -> None:
    assert "'a', 'b'" in cli.text("admission", "--disk", "reused", "--deny", "a", "--deny", "b")
    assert cli.json("admission")["denied_tenants"] == ["a", "b"]
    ended = cli.json("admission", "--disk", "all", "--deny-nobody")
    assert ended == {"rules": {"memory": "all", "disk": "all"}, "denied_tenants": []}


def test_events(cli: Cli, session: Session) -> None:
    first = cli.json("events", "--after", "0", "--count", "1")
    assert first["sequence"] == 1
    assert first["stored"]["medium"] == "memory"
    text = cli.text("events", "--after", "0", "--count", "1")
    assert f"stored {NAMESPACE_ID[:8]} 3 blocks in memory" in text
    assert text.endswith(" …\n")
    assert len(text) <= 80
    text = cli.text("events", "--snapshot", "--count", "2")
    assert f"snapshot begins of incarnation {first['incarnation']}" in text
    assert f"stored {NAMESPACE_ID[:8]} 3 blocks in memory" in text
    text = cli.text("events", "--after", "1", "--incarnation", "another", "--count", "1")
    assert "missed unknown events" in text
    # Who runs the tests in the background may have told them to ignore Ctrl-C.
    heeding = ["env", "--default-signal=INT", *COMMAND]
    process = subprocess.Popen(
        [*heeding, "events", "--address", cli.address, "--format", "json"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    number = 50
    while not select.select([process.stdout], [], [], 0.2)[0]:
        number += 1
        assert number < 200
        save(session, session.keys(prompt(number, 1)))
    assert json.loads(process.stdout.readline())["stored"]["block_size"] == 16
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=PATIENCE)
    assert process.returncode in (1, 130)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lookup", "ffffff", "--tokens", "1"], "is known once an engine opened"),
        (["lookup", "xyz", "--tokens", "1"], "'xyz' is no id; give 6 to 64 hex digits, as"),
        (["pin", *BLOCKS, "--ttl", "31d"], "ttl: is 31 d; give 1 ms to 30 d"),
        (["operations", "watch", "1-1"], "no operation '1-1' here"),
        (["lookup", BLOCKS[0], "--tokens-file", "/no/such/file"], "--tokens-file /no/such/file"),
        (["stats", "--token-file", "/no/such/file"], "--token-file /no/such/file"),
        (["lookup", BLOCKS[0], "--keys", "abcd"], "prefix.keys.keys[0]: has 2 bytes"),
    ],
    ids=lambda value: " ".join(value)[:30],
)
def test_refusals_are_one_line(cli: Cli, arguments: list[str], message: str) -> None:
    assert message in cli.refused(*arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ["lookup", "abcdef"],
        ["lookup", "--tokens", "1"],
        ["lookup", *BLOCKS, "--keys", "00"],
        ["lookup", "abcdef", "--tokens", "one"],
        ["lookup", "abcdef", "--keys", "xx"],
        ["pin", *BLOCKS, "--ttl", "soon"],
        ["ttl", "soon", "--all"],
        ["unpin"],
        ["unpin", "pin-1", "--owner", "me"],
        ["move", "--all"],
        ["admission", "--deny", "a", "--deny-nobody"],
        ["stats", "--format", "xml"],
    ],
    ids=" ".join,
)
def test_misuse_is_explained(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Usage: " in result.stderr
    assert isinstance(result.exception, SystemExit)


def test_tokens(stores: Stores) -> None:
    tokens = write_tokens(stores.folder, {"name": "reader", "role": "read"})
    served = stores.serve("2MiB", server={"grpc": "127.0.0.1:0", "tokens": tokens})
    cli = Cli(served)
    cli.address = served.addresses["grpc"]
    file = stores.folder / "token"
    file.write_text(secret("reader"))
    assert cli.json("stats", "--token-file", file)["objects"] == 0
    assert cli.run("stats", KVSTORE_TOKEN=secret("reader")).returncode == 0
    assert "a token is needed: KVSTORE_TOKEN, --token-file" in cli.refused("stats")
    assert "not known here" in cli.refused("stats", KVSTORE_TOKEN="wrong" * 8)
    assert "needs the role admin" in cli.refused("drain", "--token-file", file)


def test_drain_and_stop(stores: Stores) -> None:
    served = stores.serve("2MiB", "8MiB")
    cli = Cli(served)
    with served.session() as session:
        save(session, session.keys(prompt(1, 2)))
        assert "takes no more saves" in cli.text("drain")
        assert "draining" in cli.text("stats")
        assert cli.json("drain", "--stop", "--within", "20s")["state"] == "done"
    assert served.process.wait(PATIENCE) == 0


def test_a_drain_that_leaves_something_behind_fails(stores: Stores) -> None:
    obstacle = stores.folder / "obstacle"
    obstacle.write_text("")
    served = stores.serve("2MiB", {"path": str(obstacle), "size": "8MiB"})
    with served.session() as session:
        save(session, session.keys(prompt(1, 2)))
        assert "2 objects did not reach the tiers below memory" in Cli(served).refused("drain")


def test_other_tenants_have_other_namespaces(cli: Cli, served: Served) -> None:
    with served.session(tenant="t") as session:
        save(session, session.keys(prompt(1, 1)))
        assert cli.text("clear", "--tenant", "t", "-y") == "removed 1 object (4 KiB)\n"
        other = cli.json("explain", namespace("t").digest.hex(), "--tokens", TOKENS)
        assert other["blocks"][0]["reason"] == "cleared"
    # It is known for some time after it has gone.
    assert cli.json("explain", namespace("t").digest.hex(), "--tokens", TOKENS) == other
