"""Daemons in network namespaces of their own: the cable is pulled, and put back."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from kvstore.client.client import Client
from kvstore.client.session import Session
from kvstore.sources import load_config
from tests.session_tools import BIG, eventually, load, namespace, prompt, save

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None, reason="namespaces need root, and ip"
)


@pytest.fixture(scope="module")
def demo() -> Any:
    """The demo of a cluster, which makes such hosts, too."""
    pytest.importorskip("rich")
    sys.path.insert(0, str(EXAMPLES))
    try:
        spec = importlib.util.spec_from_file_location("demo_cluster", EXAMPLES / "demo_cluster.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["demo_cluster"] = module  # Its dataclass looks itself up.
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(EXAMPLES))
    return module


@pytest.fixture
def hosts(demo: Any, tmp_path: Path) -> Iterator[list[Any]]:
    """Three, each with a daemon that knows the others by a list."""
    with ExitStack() as undo:
        try:
            _, made = demo.namespaces(undo)
        except OSError as e:
            undo.close()
            pytest.skip(f"no namespaces here: {e}")
        for host in made:
            undo.callback(host.kill)
            own = tmp_path / host.name
            own.mkdir()
            host.address = f"unix://{own}/kvstore.sock"
            server = {"tcp": f"{host.ip}:{host.port}", "insecure": True, "name": host.name}
            settings = {
                "address": host.address,
                "memory": {"size": "32MiB"},
                "server": server | {"grpc": None, "http": None},
                "peers": {
                    "nodes": [f"tcp://{one.ip}:{one.port}" for one in made],
                    "probe_seconds": 0.3,
                    "stall_seconds": 2.0,
                },
            }
            (own / "kvstore.yaml").write_text(json.dumps(settings))
            command = [sys.executable, "-m", "kvstore.server.cli", "serve", "-c"]
            host.daemon = subprocess.Popen(
                [*host.inside, *command, str(own / "kvstore.yaml")], stdout=subprocess.PIPE
            )
            assert host.daemon.stdout is not None
            assert host.daemon.stdout.readline().startswith(b"ready")
        yield made


def session(host: Any) -> Session:
    patient = {"lookup_timeout": 10, "save_timeout": 10, "retry_max": 0.2}
    config = load_config(overrides={"address": host.address, "session": patient})
    return Session.open(namespace(), [BIG], client=Client(config))


def comes(here: Session, keys: list[bytes]) -> bool:
    return bool(here.lookup(keys, wait=2.0).blocks == len(keys) == load(here, keys).blocks)


def test_each_side_goes_on_while_the_cable_is_pulled(hosts: list[Any]) -> None:
    a, b, c = hosts
    with session(a) as on_a, session(b) as on_b, session(c) as on_c:
        first, second = on_a.keys(prompt(1, 16)), on_a.keys(prompt(2, 16))
        save(on_a, first)
        save(on_a, second)
        eventually(lambda: comes(on_b, first))
        cable = a.inside[-1].replace("-", "b")
        down = [*a.inside, "ip", "link", "set", cable, "down"]
        subprocess.run(down, check=True)

        began = time.monotonic()
        assert not comes(on_b, second)
        assert time.monotonic() - began < 8
        assert comes(on_c, first)  # From the second host, which has been served.
        own = on_b.keys(prompt(3, 16))
        save(on_b, own)
        eventually(lambda: comes(on_c, own))
        alone = on_a.keys(prompt(4, 16))
        save(on_a, alone)
        assert load(on_a, alone).blocks == 16
        assert not comes(on_a, own)

        subprocess.run([*down[:-1], "up"], check=True)
        eventually(lambda: comes(on_a, own), 30)
        eventually(lambda: comes(on_b, second), 30)
        eventually(lambda: comes(on_c, alone), 30)
