"""The command line's manners: wrong values, hostile text, narrow terminals, questions first."""

from __future__ import annotations

import io
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import typer.main
from rich.cells import cell_len

from kvstore.api.client import Orchestrator
from kvstore.client.session import Session
from kvstore.server.cli import main as command_line
from kvstore.server.cli.main import app
from kvstore.transport import protocol
from tests.control_tools import NAMESPACE_ID
from tests.integration.test_cli_verbs import COMMAND, served, session
from tests.session_tools import PATIENCE, Served, namespace, prompt, save

__all__ = ["served", "session"]
pytestmark = pytest.mark.timeout(90)  # A value that is taken may be waited for.

TRACE = str(Path(__file__).with_name("small_trace.jsonl"))
TOKENS = ",".join(map(str, prompt(1, 4)))
BLOCKS = (NAMESPACE_ID[:8], "--tokens", TOKENS)


def commands() -> Iterator[tuple[str, Any]]:
    """All commands there are, by their words."""

    def below(command: Any, words: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
        if words and (command.params or not hasattr(command, "commands")):
            yield " ".join(words), command
        for name, inner in getattr(command, "commands", {}).items():
            yield from below(inner, (*words, name))

    yield from below(typer.main.get_command(app), ())


class Told:
    """What `kvstore WORDS` answers. In this process: starting one takes half a second."""

    def __init__(
        self, capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch, address: str = ""
    ) -> None:
        self._capsys = capsys
        self._patch = patch
        self._address = address
        patch.setenv("TERM", "dumb")
        patch.setenv("NO_COLOR", "1")

    def run(self, *words: object, columns: int = 80, stdin: str = "") -> tuple[int, str, str]:
        line = ["kvstore", *map(str, words)]
        self._patch.setenv("COLUMNS", str(columns))
        if self._address:
            self._patch.setenv("KVSTORE_ADDRESS", self._address)
        self._patch.setattr(sys, "argv", line)
        self._patch.setattr(sys, "stdin", io.StringIO(stdin))
        code = 0
        try:
            command_line.main()
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else 1
        out, err = self._capsys.readouterr()
        return code, out, err

    def text(self, *words: object, columns: int = 80) -> str:
        code, out, err = self.run(*words, columns=columns)
        assert code == 0, err
        return out


@pytest.fixture
def told(
    served: Served, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Told:
    return Told(capsys, monkeypatch, f"unix://{served.socket}")


def test_help_breaks_no_sentence(told: Told) -> None:
    for command, found in commands():
        shown = " ".join(told.text(*command.split(), "--help").split())
        for line in (found.help or "").split("\n\n"):
            assert " ".join(line.split()).replace("`", "") in shown
    lines = told.text("token", "new", "--help").splitlines()
    assert max(map(len, lines[4:6])) > 70, lines


# -- what cannot be taken back ------------------------------------------------------------------

DESTRUCTIVE = {"clear", "ttl", "quota"}
HARMLESS = {
    "version", "doctor", "serve", "stats", "namespaces", "sessions", "leases", "events", "lookup",
    "explain", "inspect", "token new", "operations list", "operations watch", "operations cancel",
    "top", "bench",
    *(f"bench {name}" for name in (
        "copy", "codec", "disk", "session", "store", "weights", "peer", "gpu-copy", "engine",
        "soak", "loop", "blend", "tier", "policy")),
    # What they change can be changed back, and nothing is lost by it.
    "pin", "unpin", "prefetch", "move", "copy", "compress", "decompress", "admission",
    "drain",  # --stop says it, and writes out before
    "pieces add", "calibrate",
    "simulate", "replay", "plan", "record",
    "fsck",  # --repair says it, and drops what nobody could be served
}  # fmt: skip


def test_every_command_that_destroys_takes_yes() -> None:
    found = dict(commands())
    assert set(found) == DESTRUCTIVE | HARMLESS
    asking = {n for n, c in found.items() if any("--yes" in p.opts for p in c.params)}
    assert asking == DESTRUCTIVE


def test_nothing_is_destroyed_without_a_terminal_and_without_yes(
    told: Told, session: Session
) -> None:
    for words in (
        ["clear", "--all"],
        ["clear", "--all", "--format", "json"],
        ["clear", "-n", NAMESPACE_ID],
        ["clear", "-n", *BLOCKS, "--no-wait"],
        ["clear", "--tenant", ""],
        ["ttl", "1ms", "--all"],
        ["quota", "", "--memory", "4KiB"],
        ["quota", "", "--disk", "0"],
    ):
        code, out, err = told.run(*words, stdin="y\n")
        assert (code, out) == (2, ""), words
        assert "--yes" in err
    assert session.lookup(session.keys(prompt(1, 4))).blocks == 3


@pytest.mark.parametrize(
    ("words", "code", "message", "never"),
    [
        (["clear", "--tenant", "nobody"], 0, "0 objects would be removed", "--yes"),
        (["clear", "--all"], 2, "would be removed (", "Invalid value"),
        (["clear"], 2, "│ choose blocks by an option", "Invalid value"),
        (["move", "--to", "tape", "--all"], 1, "no tier 'tape'; this daemon has", "Value error"),
        (["lookup", NAMESPACE_ID, "--tokens", "1,x"], 2, "are whole numbers below", "JSON is"),
        (["unpin"], 2, "│ give the id of a pin", "Invalid value"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_misuse_is_told_plainly(
    told: Told, session: Session, words: list[str], code: int, message: str, never: str
) -> None:
    ended, out, err = told.run(*words)
    assert ended == code, err
    assert message in out + err
    assert never not in out + err


def test_the_pipe_of_the_shell(served: Served, session: Session) -> None:
    line = [*COMMAND, "clear", "--all", "--address", f"unix://{served.socket}"]
    for stdin in ("echo n |", "", "exec <&-;"):
        shell = f"{stdin} {' '.join(line)}" + ("" if stdin else " </dev/null")
        ended = subprocess.run(shell, shell=True, capture_output=True, text=True, check=False)
        assert ended.returncode == 2, ended
        assert "Traceback" not in ended.stderr
    assert session.lookup(session.keys(prompt(1, 4))).blocks == 3


def test_yes_is_taken_for_an_answer(told: Told, session: Session) -> None:
    told.text("quota", "", "--memory", "4KiB", "--disk", "4KiB", "--yes")
    assert session.lookup(session.keys(prompt(1, 4))).blocks == 1
    told.text("quota", "", "--memory", "none", "--disk", "none")
    assert "changed 1 object\n" in told.text("ttl", "1d", "--all", "-y")
    assert told.text("clear", "--all", "-y").startswith("removed 1 object (")


def test_no_time_means_at_once(told: Told, served: Served) -> None:
    served.signal(signal.SIGSTOP)
    try:
        started = time.monotonic()
        code, _, err = told.run("stats", "--timeout", "0s")
        assert (code, "no daemon answers" in err) == (1, True)
        assert time.monotonic() - started < 8
    finally:
        served.signal(signal.SIGCONT)


# -- what clients say ---------------------------------------------------------------------------

HOSTILE = [
    "\x1b[31mred\x1b]0;title\x07",
    "[red]bold[/red]",
    "\\[red]x[/]",
    "a\nid  │ forged",
    "\u202egpj.exe",
    "\x9b2J\r\x7f",
    "t" * 200,
    "\u79df\u6237" * 30,
]
TABLES: dict[str, list[str]] = {
    "stats": [],
    "namespaces": [],
    "sessions": [],
    "leases": [],
    "quota": [],
    "admission": [],
    "lookup": [*BLOCKS],
    "explain": [*BLOCKS],
    "operations list": [],
}
LINES = {
    "pin", "unpin", "ttl", "prefetch", "move", "copy", "compress", "decompress", "clear", "events",
    "doctor", "drain", "operations watch", "operations cancel",
}  # fmt: skip


@pytest.fixture(scope="module")
def crowded(served: Served) -> Iterator[None]:
    """A daemon with hostile tenants, a client of hostile software, pins and operations."""
    with ExitStack() as stack:
        api = stack.enter_context(Orchestrator(f"unix://{served.socket}"))
        for tenant in ["", *HOSTILE]:
            opened = stack.enter_context(served.session(tenant=tenant))
            save(opened, opened.keys(prompt(1, 4))[:3])
            stack.callback(opened.clear)
            api.pin(NAMESPACE_ID, tokens=prompt(1, 4), ttl=3600, owner=tenant or "me")
            stack.callback(api.unpin, owner=tenant or "me")
        api.set_admission(denied_tenants=HOSTILE)
        stack.callback(api.set_admission, denied_tenants=[])
        api.move("memory", everything=True).wait()
        client = stack.enter_context(socket.socket(socket.AF_UNIX))
        client.connect(str(served.socket))
        hello = protocol.Hello(protocol.VERSION, HOSTILE[0] + HOSTILE[1], 1)
        client.sendall(protocol.encode(1, hello))
        client.settimeout(PATIENCE)
        assert client.recv(1)
        yield


def test_every_command_that_asks_a_daemon_is_looked_at() -> None:
    asking = {n for n, c in commands() if any("--wide" in p.opts for p in c.params)}
    assert asking == set(TABLES) | LINES


def test_tables_fit_80_columns_and_print_what_clients_say_as_it_is(
    told: Told, crowded: None
) -> None:
    shown = {}
    for command, arguments in TABLES.items():
        for columns in (40, 80):
            text = told.text(*command.split(), *arguments, columns=columns)
            for line in text.splitlines():
                assert line.isprintable(), (command, line)
                if "│" in line or "┃" in line:
                    assert cell_len(line) <= columns, (command, line)
            shown[command, columns] = text
    for command in ("namespaces", "quota"):
        assert "[red]bold[/red]" in shown[command, 80]
        assert "\\x1b[31mred" in shown[command, 80]
    assert "memory" in shown["namespaces", 80]
    assert NAMESPACE_ID[:12] in shown["namespaces", 80]
    assert "never_stored" in shown["explain", 80]
    assert "healthy" in shown["stats", 80]
    assert "[red]bold[/red]" in told.text("sessions", columns=300).replace("\n", "")


def test_wide_shows_all_columns_on_a_line(told: Told, crowded: None) -> None:
    code, _, err = told.run("namespaces")
    assert code == 0
    assert "left out: parts" in err
    code, out, err = told.run("namespaces", "--wide")
    assert (code, err) == (0, "")
    assert "float32" in out
    (line,) = (line for line in out.splitlines() if "t" * 200 in line)
    assert "test/model" in line


def test_json_is_exact_and_harmless(told: Told, crowded: None) -> None:
    text = told.text("namespaces", "--format", "json")
    assert text.isascii()
    assert text.rstrip("\n").isprintable()
    found = {n["namespace"]["tenant"] for n in json.loads(text)["namespaces"]}
    assert found >= set(HOSTILE)
    sessions = json.loads(told.text("sessions", "--format", "json"))["sessions"]
    assert HOSTILE[0] + HOSTILE[1] in [s["software"] for s in sessions]


def test_lines_are_escaped_too(told: Told, crowded: None, served: Served) -> None:
    other = namespace("[red]bold[/red]").digest.hex()
    for words in (
        ["events", "--after", "0", "--count", "3"],
        ["explain", NAMESPACE_ID, "--tokens", "9," * 16],
        ["lookup", other, "--tokens", TOKENS],
        ["operations", "watch", "\x1b[31m"],
        ["pin", *BLOCKS, "--ttl", "31d"],
        ["stats", "--token-file", "/no/\x1b[31mfile"],
        ["stats", "--address", "\x1b[31m"],
    ):
        _, out, err = told.run(*words)
        for line in (out + err).splitlines():
            assert line.isprintable(), words


# -- wrong values -------------------------------------------------------------------------------

NUL, SURROGATE, ESCAPE, MARKUP = "a\0b", "a\udcffb", "\x1b[31mx", "[/red]"
LONG = "9" * 5000
NO_TIME = [
    "",
    "5",
    "-1s",
    "soon",
    "nans",
    "infs",
    "1e9s",
    "\uff13s",
    "\u0663s",
    LONG + "s",
    "36501d",
]
NO_SIZE = [
    "",
    "-1",
    "ten",
    "1.5.5GiB",
    "10 Gb",
    "\uff13GiB",
    "\u0663",
    "nan",
    LONG,
    "9999999TiB",
    NUL,
]
NO_COUNT = ["", "0", "-1", "1.5", "nan", "ten", NUL, LONG, str(1 << 64)]
NO_NUMBER = ["", "0", "-1", "nan", "inf", "1e99", "ten", NUL]
NO_FOLDER = ["/no/such/folder", __file__, NUL, SURROGATE]
NO_FILE = ["", "/no/such/file", "/", "/dev/null/x", NUL, SURROGATE]
NO_TEXT = [SURROGATE]
NO_NAME = ["", "x" * 300, NUL, SURROGATE, ESCAPE]
NO_IDS = ["", "one", "-1", "1.5", str(1 << 32), LONG, "[1.5]", "[true]", '["1"]', "[NaN]",
          "[1e400]", "[" * 5000, "[1,", "{}", "\uff11", "\u0661", NUL, SURROGATE]  # fmt: skip
NO_CHOICE = ["", "ALL", "cloud", "all ", NUL, SURROGATE, MARKUP]
NO_NAMESPACE = ["", "abc", "xyz", "f" * 65, "ffffff", "\uff46" * 6, NUL, SURROGATE, ESCAPE, MARKUP]
NO_OPERATION = ["", "1-1", "x" * 300, NUL, SURROGATE, ESCAPE, MARKUP]
NO_ADDRESS = ["", "localhost", "unix:///no/such.sock", "unix://relative", "::1:7420", "host:99999",
              "host:\u0667", "grpc://", "http://a:1", "x" * 64 + ".org:80", "a..b:80", NUL,
              f"unix:///{NUL}", f"unix:///{SURROGATE}", "unix:///" + "x" * 200, MARKUP]  # fmt: skip
NO_LISTENER = ["7420", "::1:7420", "host:99999", "host:\u0667", "host:x", "a..b:1", NUL, SURROGATE]
PROMPT, WHERE = [*BLOCKS], ["--all"]

VALUES: dict[str, list[str]] = {
    "namespace": NO_NAMESPACE, "--namespace": NO_NAMESPACE,
    "--tokens": NO_IDS, "--tokens-file": [*NO_FILE, "/dev/zero"],
    "--keys": ["", "xx", "abcd", "0" * 63, "\uff10" * 64, NUL, SURROGATE],
    "--salt": NO_TEXT,
    "--name": NO_NAME, "--role": NO_CHOICE, "token new --tenant": NO_NAME,
    "--lora": ["", "x", "0" * 63, "/no/such/folder", "\uff10" * 64, NUL, SURROGATE],
    "--media": ["", "image", "image:d", "image:d:1", "image:d:-1:1", "image:d:x:1", "image:d:1:0",
                "image::1:1", ":d:1:1", "image:d:\uff11:1", f"image:{'x' * 300}:1:1",
                f"image:{SURROGATE}:1:1", f"image:d:{LONG}:1"],
    "--extra": ["", "1", "x:1", "-1:x", "\uff11:x", f"{LONG}:x", ":x"],
    "--config": NO_FILE[1:], "--address": NO_ADDRESS, "--token-file": [*NO_FILE[1:], "/dev/null"],
    "--timeout": NO_TIME, "--interval": NO_TIME, "--format": NO_CHOICE,
    "--ttl": [*NO_TIME, "0s", "31d"], "time": [*NO_TIME, "0s"], "--within": [*NO_TIME, "2d"],
    "--older-than": NO_TIME, "--unused-for": NO_TIME,
    "--owner": NO_TEXT, "pin --owner": [*NO_TEXT, "", "x" * 300],
    "pin": ["", "pin-0", "x" * 300, NUL, SURROGATE, MARKUP],
    "--tier": NO_CHOICE, "--to": NO_CHOICE, "--codec": NO_CHOICE,
    "files": NO_FILE, "--key-file": NO_FILE, "pieces add --tokens": NO_COUNT,
    "--piece": ["", "1", "1:", ":1", "a:b", "2:1", "-1:4", LONG, NUL],
    "--tenant": NO_TEXT, "tenant": [*NO_TEXT, "x" * 5000], "--deny": [*NO_TEXT, "x" * 5000],
    "--session": NO_COUNT, "--after": ["", "-1", "1.5", LONG, str(1 << 64)],
    "--incarnation": NO_TEXT, "--count": NO_COUNT[:5],
    "quota --memory": NO_SIZE, "quota --disk": NO_SIZE,
    "--limit": ["", "far", "=1", "far=much", "far=1"],
    "admission --memory": NO_CHOICE, "admission --disk": NO_CHOICE,
    "--rule": ["", "far", "=all", "disk=some", "far=none"],
    "operation": NO_OPERATION,
    "--socket": ["", "/no/such/s.sock", "/" + "x" * 200, SURROGATE],
    "--memory": [*NO_SIZE, "0"], "--disk": ["", NUL, SURROGATE], "--disk-size": [*NO_SIZE, "1MiB"],
    "--grpc": NO_LISTENER, "--http": NO_LISTENER, "--tcp": NO_LISTENER,
    "serve --tokens": NO_FILE, "--log-level": NO_CHOICE,
    "folder": NO_FOLDER, "--folder": NO_FOLDER,
    "--size": [*NO_SIZE, "0", "1kB", "1TiB"], "--threads": NO_COUNT, "--samples": NO_COUNT,
    "--clients": NO_COUNT, "--connections": NO_COUNT, "--type": NO_CHOICE,
    "--streams": NO_COUNT, "--requests": NO_COUNT, "--objects": NO_COUNT,
    "--blocks": NO_COUNT, "traces": NO_FILE,
    "file": [*NO_FILE, __file__], "--for": NO_TIME,
    "--max-memory": [*NO_SIZE, "0"], "--max-disk": [*NO_SIZE, "0"], "--trace": NO_FILE,
    "trace": NO_FILE, "--block-tokens": NO_COUNT, "--nodes": NO_COUNT, "--png": NO_FILE,
    "simulate --memory": [*NO_SIZE, "0", "1"], "simulate --disk": [*NO_SIZE, "0"],
    "--shared": [*NO_SIZE, "0"], "--token-bytes": [*NO_SIZE, "0"],
    "--gpu-hour": NO_NUMBER, "--prefill": NO_NUMBER, "--memory-price": NO_NUMBER,
    "--disk-price": NO_NUMBER, "--shared-price": NO_NUMBER, "--drive-tbw": NO_NUMBER,
    "--drive-price": NO_NUMBER,
    "--engine": NO_CHOICE, "--processes": NO_CHOICE, "--speed": NO_NUMBER,
    "--minutes": ["", "-1", "nan", "inf", "1e9", "x"], "--seconds": ["", "-1", "nan", "inf", "1e9"],
}  # fmt: skip
"""What every option and argument must refuse; a new one needs a line."""

BESIDE: dict[str, list[str]] = {
    "token new": ["--name", "n", "--role", "read"],
    "pin": ["--ttl", "1h"],
    "ttl": ["1d", "--all", "--yes"],
    "move": ["--to", "disk", "--all"],
    "copy": ["--to", "disk", "--all"],
    "compress": ["--codec", "raw", "--all"],
    "decompress": ["--all"],
    "clear": ["--dry-run", "--all"],
    "quota": ["t"],
    "serve": ["--grpc", "none", "--http", "none", "--socket", "/no/such/folder/s.sock"],
    "bench": ["--quick"],
    "pieces add": [__file__],
    "simulate": [TRACE, "--token-bytes", "1KiB"],
    "replay": [TRACE, "--token-bytes", "1KiB"],
    "plan": ["--trace", TRACE, "--token-bytes", "1KiB"],
}
"""What a command needs beside the value in question."""

OF_OTHERS = {
    "model",
    "--model",
    "--revision",
    "--dtype",
    "--connector",
    "--results",
    "--url",
    "--endpoint",
}
"""What the engine judges, a server, or who has a GPU."""
NAMES_BLOCKS = {"--tokens", "--tokens-file", "--keys"}


def wrong_values() -> Iterator[tuple[str, str, list[str]]]:
    """Every option and argument that takes a value, once: a command that has it, and the values."""
    seen = set()
    for command, found in commands():
        for parameter in found.params:
            name = parameter.opts[0]
            own = f"{command} {name}"
            same = (name, getattr(parameter, "help", ""))
            if getattr(parameter, "is_flag", False) or name in OF_OTHERS:
                continue
            values = VALUES.get(own) or VALUES.get(name, [])
            if same not in seen:
                seen.add(same)
                yield command, name, values


def test_every_option_and_argument_is_in_the_table() -> None:
    names = {name for _, name, _ in wrong_values()}
    assert names >= {"--after", "--media", "namespace", "folder"}
    assert {key.split()[-1] for key in VALUES} == names
    assert all(values for _, _, values in wrong_values())


@pytest.mark.parametrize(("command", "name", "values"), list(wrong_values()))
def test_a_wrong_value_is_told_in_one_message(
    told: Told, session: Session, command: str, name: str, values: list[str]
) -> None:
    for value in values:
        beside = list(BESIDE.get(command, []))
        if command in ("lookup", "explain", "pin", "prefetch") and name != "namespace":
            beside.append(NAMESPACE_ID)
        if command in ("lookup", "explain", "pin", "prefetch") and name not in NAMES_BLOCKS:
            beside += ["--tokens", TOKENS]
        if not name.startswith("-"):
            beside = [word for word in beside if word not in ("t", "1d", TRACE)]
        line = [*command.split(), *beside, *([name] if name.startswith("-") else ["--"]), value]
        code, out, err = told.run(*line)
        assert code in (1, 2), (line, out)
        assert out == "", line
        assert "Traceback" not in err
        if code == 1:
            (only,) = err.splitlines()
            assert only.startswith("error: "), line
        else:
            assert err.count("─ Error ─") == 1, (line, err)
        assert len(err) < 3000, line
        assert all(text.isprintable() for text in err.splitlines()), line
