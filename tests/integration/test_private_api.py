"""The API of an engine's private store: served once somebody asks, found without an address."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from kvstore.api.client import AsyncOrchestrator, Orchestrator
from kvstore.blocks.keys import Media, block_keys, prompt_extras
from kvstore.blocks.weights import weights_digest
from kvstore.client import embedded
from kvstore.client.session import Session
from kvstore.config import Config
from kvstore.errors import StoreUnavailable
from kvstore.server.cli.main import app
from tests.control_tools import NAMESPACE_ID
from tests.session_tools import (
    BLOCK_TOKENS,
    PART,
    Stores,
    back_again,
    eventually,
    namespace,
    prompt,
    save,
)

IDS = prompt(1, 4)
LORA = "ab" * 32
MEDIA = Media("image", "d1", 20, 16)
TOKENS = ",".join(map(str, IDS))
FLAGS = ["--salt", "s", "--lora", LORA, "--media", "image:d1:20:16", "--extra", "1:mine"]
BESIDE = {"salt": "s", "adapter": LORA, "media": [MEDIA], "extras": {1: [b"mine"]}}


@pytest.fixture
def config(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> Config:
    """Of an engine whose file says where a daemon would listen; a private one does not."""
    monkeypatch.setenv("KVSTORE_RUN_DIR", str(stores.folder / "run"))
    return stores.embedded(server={"grpc": "127.0.0.1:0", "http": "127.0.0.1:0"})


@pytest.fixture
def session(config: Config) -> Iterator[Session]:
    """An engine's session, with three blocks of a prompt with salt, adapter and an image."""
    with Session.open(namespace(), [PART], config) as opened:
        save(opened, engine_keys()[:3])
        yield opened


def engine_keys() -> list[bytes]:
    extras = prompt_extras(BLOCK_TOKENS, range(4), salt="s", adapter=LORA, media=[MEDIA])
    extras[1].append(b"mine")
    return block_keys(namespace(), IDS, extras=extras)


@pytest.fixture
def run(no_settings: None) -> Callable[..., tuple[int, str, str]]:
    def run(*words: str) -> tuple[int, str, str]:
        result = CliRunner().invoke(app, words)
        return result.exit_code, result.stdout, result.stderr or str(result.exception or "")

    return run


def loads_grpc(pid: int) -> bool:
    return "cygrpc" in Path(f"/proc/{pid}/maps").read_text()


def test_explain_without_an_address_finds_the_private_store(
    config: Config, session: Session, stores: Stores, run: Callable[..., tuple[int, str, str]]
) -> None:
    (pid,) = stores.embedded_pids()
    path = embedded.socket_path(config)
    control = path.with_name(path.name + ".control")
    assert not control.exists()
    assert not loads_grpc(pid)
    code, out, err = run("explain", NAMESPACE_ID, "--tokens", TOKENS, *FLAGS, "--format", "json")
    assert (code, err) == (0, f"private store unix://{path}\n")
    found = json.loads(out)
    assert [block["key"] for block in found["blocks"]] == [key.hex() for key in engine_keys()]
    assert [block["reason"] for block in found["blocks"]] == ["stored"] * 3 + ["never_stored"]
    assert control.stat().st_mode & 0o777 == 0o600
    assert loads_grpc(pid)
    assert not psutil.Process(pid).net_connections("inet")
    code, out, err = run("lookup", NAMESPACE_ID, "--tokens", TOKENS)
    assert (code, err) == (0, f"private store unix://{path}\n")
    assert "0 of 4 blocks" in out
    code, out, err = run("stats", "--address", f"unix://{path}")
    assert (code, err) == (0, "")
    assert "3 objects" in out
    assert session.lookup(engine_keys()).blocks == 3
    session.close()
    eventually(lambda: not stores.embedded_pids())
    assert not control.exists()


def test_an_adapter_may_be_given_by_its_folder(
    session: Session,
    run: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "adapter_model.safetensors").write_bytes(b"weights")
    code, out, _ = run(
        "explain", NAMESPACE_ID, "--tokens", TOKENS, "--lora", str(lora), "--format", "json"
    )
    extras = prompt_extras(BLOCK_TOKENS, range(4), adapter=weights_digest(lora))
    keys = block_keys(namespace(), IDS, extras=extras)
    assert (code, [b["key"] for b in json.loads(out)["blocks"]]) == (0, [k.hex() for k in keys])


async def test_both_kinds_of_client(config: Config, session: Session) -> None:
    with Orchestrator(config=config) as kvstore:
        assert kvstore.address == str(embedded.socket_path(config))
        assert kvstore.lookup(NAMESPACE_ID, tokens=IDS, **BESIDE).blocks == 3
        assert kvstore.explain(NAMESPACE_ID, tokens=IDS, **BESIDE).hit_blocks == 3
        assert kvstore.lookup(NAMESPACE_ID, tokens=IDS).blocks == 0
    async with AsyncOrchestrator(config=config) as kvstore:
        assert (await kvstore.lookup(NAMESPACE_ID, tokens=IDS, **BESIDE)).blocks == 3
        assert (await kvstore.explain(NAMESPACE_ID, tokens=IDS, **BESIDE)).hit_blocks == 3
        assert (await kvstore.explain(NAMESPACE_ID, tokens=IDS)).hit_blocks == 0


def test_of_several_one_has_to_be_chosen(
    config: Config,
    session: Session,
    stores: Stores,
    run: Callable[..., tuple[int, str, str]],
) -> None:
    other = stores.embedded(memory={"size": "2MiB"})
    with Session.open(namespace(), [PART], other):
        code, _, err = run("stats")
        assert code == 1
        paths = [embedded.socket_path(one) for one in (config, other)]
        for path, pid in zip(paths, (embedded.listener(path) for path in paths), strict=True):
            assert pid in stores.embedded_pids()
            assert f"unix://{path} (process {pid})" in err
        for path, objects in zip(paths, (3, 0), strict=True):
            with Orchestrator(f"unix://{path}") as kvstore:
                assert kvstore.stats().objects == objects


def test_a_store_that_was_killed_and_started_again_serves_it_again(
    config: Config, session: Session, stores: Stores
) -> None:
    with Orchestrator(config=config) as kvstore:
        assert kvstore.stats().objects == 3
    (pid,) = stores.embedded_pids()
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(StoreUnavailable), Orchestrator(config=config) as kvstore:
        kvstore.stats()
    eventually(lambda: back_again(session) is None)
    with Orchestrator(config=config) as kvstore:
        assert kvstore.stats().objects == 0


def test_a_path_that_is_too_long_for_the_api_is_said(stores: Stores) -> None:
    short = embedded.socket_path(stores.embedded(run_dir=str(stores.folder / "r")))
    run_dir = stores.folder / ("r" + "r" * (104 - len(str(short))))
    config = stores.embedded(run_dir=str(run_dir))
    with Session.open(namespace(), [PART], config) as session:
        assert session.problem is None
        with pytest.raises(StoreUnavailable, match="too long"):
            Orchestrator(config=config)
