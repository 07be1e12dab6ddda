"""What KVStore needs installed: little in an engine's environment, more where the daemon runs."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE
from typing import Final

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from kvstore.server.cli.__main__ import _BROUGHT
from kvstore.server.control.face import _BROKEN
from tests.session_tools import ROOT, Stores, load, prompt, save

ENGINES: Final = {"sglang": "grpcio>=1.81.1", "vllm": "grpcio>=1.63.2,<2"}
"""What they ask for of gRPC: smg-grpc-servicer 0.9, and OpenTelemetry's exporter."""
AWAY: Final = """
import sys
for name in {names}:
    sys.modules[name] = None
"""


def requirements(extra: str = "") -> dict[str, Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["optional-dependencies"][extra] if extra else project["dependencies"]
    return {canonicalize_name(r.name): r for r in map(Requirement, lines)}


def pins(name: str) -> Iterator[tuple[str, str]]:
    for line in (ROOT / "requirements" / f"{name}.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            package, _, version = line.partition("==")
            yield canonicalize_name(package), version


def test_engines_keep_their_packages() -> None:
    """KVStore resolves beside SGLang and vLLM: what it asks of gRPC, theirs allows, too."""
    core, server = requirements(), requirements("server")
    assert set(core) == {"msgspec", "numpy", "pydantic", "pyyaml"}
    assert all(len(r.specifier) == 1 and ">=" in str(r.specifier) for r in core.values())
    ours = server["grpcio"].specifier
    for engine, asked in ENGINES.items():
        ((_, version),) = [pin for pin in pins(engine) if pin[0] == "grpcio"]
        assert version in ours & Requirement(asked).specifier, engine
    broken = {str(s) for s in ours if s.operator == "!="}
    assert broken == {f"!={release}*" for release in _BROKEN}


@pytest.mark.parametrize("environment", ["dev", "sglang", "vllm"])
def test_what_is_tested_is_what_is_asked_for(environment: str) -> None:
    asked = requirements() | requirements("server")
    pinned = dict(pins(environment))
    assert "grpcio" in pinned
    wrong = [f"{n}=={v}" for n, v in pinned.items() if n in asked and v not in asked[n].specifier]
    assert not wrong


def without(folder: Path, names: frozenset[str]) -> dict[str, str]:
    """The environment of processes that find none of these modules."""
    (folder / "sitecustomize.py").write_text(AWAY.format(names=sorted(names)))
    return os.environ | {"PYTHONPATH": f"{folder}:{ROOT}"}


def python(*words: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], env=env, capture_output=True, text=True, timeout=60, check=False
    )


def test_sessions_and_private_daemons_do_without_the_server_s_packages(
    stores: Stores, tmp_path: Path
) -> None:
    config = stores.embedded().model_dump_json()
    script = f"""
from tests.session_tools import *
config = Config.model_validate_json({config!r})
with Session.open(namespace(), [PART], config) as session:
    keys = session.keys(prompt(1, 3))
    assert save(session, keys).stored == 3
    assert load(session, keys).blocks == 3
from kvstore.client.embedded import open_control, socket_path
from kvstore.errors import StoreUnavailable
try:
    open_control(socket_path(config), 20)
except StoreUnavailable as e:
    print(e)
"""
    done = python("-c", script, env=without(tmp_path, _BROUGHT))
    assert done.returncode == 0, done.stderr
    assert "the API needs a package that is not installed" in done.stdout
    assert "pip install 'kvstore[server]'" in done.stdout


@pytest.mark.parametrize("missing", ["typer", "rich", "grpc"])
def test_commands_say_what_to_install(tmp_path: Path, missing: str) -> None:
    env = without(tmp_path, frozenset({missing}))
    done = python("-m", "kvstore.server.cli", "namespaces", env=env)
    assert done.returncode == 1
    assert missing in done.stderr
    assert done.stderr.strip().endswith("pip install 'kvstore[server]'")
    assert "Traceback" not in done.stderr


def test_the_api_s_client_says_what_to_install(tmp_path: Path) -> None:
    env = without(tmp_path, frozenset({"grpc"}))
    done = python("-c", "from kvstore.api import Orchestrator", env=env)
    assert "the API needs a package that is not installed" in done.stderr
    assert done.stderr.strip().endswith("pip install 'kvstore[server]'")


BROKEN: Final = "import grpc; grpc.__version__ = '1.85.3'"
NO_GRPC: Final = AWAY.format(names=["grpc"])
NO_AIOHTTP: Final = AWAY.format(names=["aiohttp"])
PORT: Final = "127.0.0.1:0"


@pytest.mark.parametrize(
    ("fault", "words"),
    [(NO_GRPC, "the API needs a package"), (BROKEN, "grpcio 1.85.3 corrupts memory")],
    ids=["none", "broken"],
)
def test_a_daemon_serves_sessions_where_the_api_cannot_be(
    stores: Stores, fault: str, words: str
) -> None:
    served = stores.serve(fault=fault)
    assert words in served.log.read_text()
    assert not Path(f"{served.socket}.control").exists()
    with served.session() as session:
        keys = session.keys(prompt(1, 2))
        save(session, keys)
        assert load(session, keys).blocks == 2
    served.stop()


def test_http_that_cannot_be_is_left_out_unless_it_is_asked_for(
    stores: Stores, tmp_path: Path
) -> None:
    words = ["-m", "kvstore.server.cli", "serve", "--grpc", "none", "--memory", "4MiB"]
    words += ["--socket", str(stores.folder / "a.sock")]
    env = without(tmp_path, frozenset({"aiohttp"}))
    with subprocess.Popen(
        [sys.executable, *words], env=env, stdout=PIPE, stderr=PIPE, text=True
    ) as daemon:
        assert daemon.stdout is not None
        assert daemon.stderr is not None
        assert daemon.stdout.readline().startswith("ready: ")
        daemon.terminate()
        assert "HTTP needs a package that is not installed" in daemon.stderr.read()
    assert daemon.returncode == 0


@pytest.mark.parametrize(
    ("fault", "key"),
    [(NO_AIOHTTP, "http"), (NO_GRPC, "grpc"), (BROKEN, "grpc")],
    ids=["aiohttp", "grpc", "broken"],
)
def test_what_is_asked_for_and_cannot_be_is_refused(stores: Stores, fault: str, key: str) -> None:
    with pytest.raises(AssertionError, match="pip install"):
        stores.serve(fault=fault, server={key: PORT})
