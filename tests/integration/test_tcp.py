"""Sessions over TCP and TLS: what they save and load, and who may."""

from __future__ import annotations

import json
import random
import threading
from pathlib import Path

import pytest

from kvstore.benchmarks.barestream import congestion_of
from kvstore.blocks.spec import Described, Part
from kvstore.client.session import Session
from kvstore.errors import ConfigError, SpecError
from kvstore.transport.streams import StreamCarrier
from kvstore.transport.tcp import connect
from tests.certificates import Authority
from tests.session_tools import (
    BIG,
    GROUP,
    MIB,
    PART,
    SMALL,
    Served,
    Stores,
    eventually,
    load,
    no_leases,
    prompt,
    save,
    wide,
)
from tests.tcp_tools import TCP, tcp_config, tcp_session, tls_settings, used

SIZES = {"320 bytes": 320 * 16, "64 KiB": 64 << 10, "3 MiB and a bit": (3 << 20) + 256}


@pytest.fixture(params=["tcp", "tls"])
def served(request: pytest.FixtureRequest, stores: Stores, tmp_path: Path) -> Served:
    """A daemon that also listens for sessions from elsewhere."""
    settings = TCP if request.param == "tcp" else tls_settings(tmp_path)
    return stores.serve("96MiB", **settings)


def session_of(served: Served, tmp_path: Path, *parts: Part, **settings: object) -> Session:
    if "tls" in served.addresses:
        settings["tls_ca"] = str(tmp_path / "authority.pem")
    return tcp_session(served, parts or PART, **settings)


@pytest.mark.parametrize("nbytes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("streams", [1, 3])
def test_blocks_come_back_as_they_went(
    served: Served, tmp_path: Path, nbytes: int, streams: int
) -> None:
    with session_of(served, tmp_path, wide(nbytes), streams=streams) as session:
        assert session.problem is None
        keys = session.keys(prompt(1, 11))
        assert session.lookup(keys).blocks == 0
        assert save(session, keys).stored == 11
        assert save(session, keys).had == 11
        assert session.lookup(keys).blocks == 11
        loaded = load(session, keys)
        assert (loaded.blocks, loaded.reason) == (11, None)
        assert load(session, keys[:1]).blocks == 1
        stats = session.stats()
        assert stats["leases"] == 0
        assert stats["counters"]["save.blocks"] == 11


def test_blocks_of_several_parts(served: Served, tmp_path: Path) -> None:
    parts = (BIG, PART, Part(GROUP, Described("NLPHC")))
    with session_of(served, tmp_path, *parts[:2]) as session:
        keys = session.keys(prompt(1, 20))
        assert save(session, keys).stored == 20
        assert load(session, keys).blocks == 20


def test_another_layout_is_converted_on_load(served: Served, tmp_path: Path) -> None:
    with session_of(served, tmp_path, PART) as writer:
        keys = writer.keys(prompt(1, 5))
        assert save(writer, keys).stored == 5
    with session_of(served, tmp_path, Part(GROUP, Described("NLPHC"))) as reader:
        assert load(reader, keys).blocks == 5


def test_memory_is_shared_with_sessions_on_the_socket(stores: Stores) -> None:
    served = stores.serve("16MiB", **TCP)
    with served.session(BIG) as near, tcp_session(served, BIG) as far:
        ours, theirs = near.keys(prompt(1, 6)), near.keys(prompt(2, 6))
        assert save(near, ours).stored == 6, "without checksums"
        assert save(far, theirs).stored == 6
        assert load(far, ours).blocks == 6
        assert load(far, ours).blocks == 6
        assert load(near, theirs).blocks == 6
    with served.session(BIG) as near:
        moved = {"bytes.tcp_in", "bytes.tcp_out"}
        histograms = eventually(lambda: moved <= set(now := near.stats()["histograms"]) and now)
        assert histograms["bytes.tcp_in"]["sum"] == 6 * 256 << 10
        assert histograms["bytes.tcp_out"]["sum"] == 12 * 256 << 10
        assert {"seconds.tcp_in", "seconds.tcp_out"} <= set(histograms)


def test_blocks_come_up_from_disk(stores: Stores) -> None:
    served = stores.serve(SMALL, "16MiB", **TCP)
    with tcp_session(served, BIG) as session:
        keys = session.keys(prompt(1, 7))
        assert save(session, keys).stored == 7
        assert session.flush() == 0
        for number in range(2, 5):
            save(session, session.keys(prompt(number, 6)))
            assert session.flush() == 0
        assert "disk" in session.lookup(keys).tiers
        assert load(session, keys).blocks == 7


def test_what_one_lease_is_too_short_for_goes_in_several(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StreamCarrier, "lease_bytes", MIB)
    served = stores.serve("32MiB", **TCP)
    with tcp_session(served, BIG) as session:
        keys = session.keys(prompt(1, 30))
        assert save(session, keys).stored == 30
        assert load(session, keys).blocks == 30
        assert session.stats()["counters"]["save.blocks"] == 30


def test_many_threads_share_a_session(stores: Stores) -> None:
    served = stores.serve("24MiB", **TCP)
    failures: list[BaseException] = []
    blocks = [0] * 6

    def work(number: int, session: Session) -> None:
        rng = random.Random(number)
        try:
            for _ in range(25):
                keys = session.keys(prompt(rng.randrange(8), rng.randrange(1, 12)))
                if rng.random() < 0.5:
                    save(session, keys)
                else:
                    blocks[number] += load(session, keys).blocks
        except BaseException as e:  # noqa: BLE001 - whatever it is, it must not have happened
            failures.append(e)

    with tcp_session(served, BIG, streams=2) as session:
        threads = [threading.Thread(target=work, args=(i, session)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert not failures, failures
        assert all(blocks), blocks
        eventually(lambda: no_leases(served))
        stats = session.stats()["session"]
        assert not [name for name in stats if "failed" in name or "checksum" in name], stats
        session.clear()
    eventually(lambda: used(served) == 0)


def test_a_session_that_only_looks_up_has_no_data_connections(stores: Stores) -> None:
    served = stores.serve(**TCP)
    with tcp_session(served) as session:
        keys = session.keys(prompt(1, 3))
        assert session.lookup(keys).blocks == 0
        assert streams_of(served) == 1
        save(session, keys)
        assert streams_of(served) == 2


def streams_of(served: Served) -> int:
    """Connections to the daemon's TCP port."""
    port = int(served.addresses["tcp"].rpartition(":")[2])
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    mine = [line.split() for line in lines]
    return sum(1 for f in mine if f[1].endswith(f":{port:04X}") and f[3] == "01")


# --- Who may --------------------------------------------------------------------------------------


def test_tokens_are_asked_for_and_their_roles_hold(
    stores: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = {role: f"a-token-for-{role}-{'x' * 16}" for role in ("read", "write")}
    known = [{"name": r, "role": r, "token": t, "tenants": [""]} for r, t in secrets.items()]
    path = tmp_path / "tokens.yaml"
    path.touch(0o600)
    path.write_text(json.dumps({"tokens": known}))
    served = stores.serve(server={"tcp": "127.0.0.1:0", "tokens": str(path)})

    with tcp_session(served) as nobody:
        assert "a token is needed" in str(nobody.problem)
    file = tmp_path / "token"
    file.write_text(secrets["write"] + "\n")
    with tcp_session(served, token_file=str(file)) as writer:
        keys = writer.keys(prompt(1, 3))
        assert save(writer, keys).stored == 3
        with pytest.raises(SpecError, match="may not use the tenant"):
            tcp_session(served, tenant="other", token_file=str(file))
        monkeypatch.setenv("KVSTORE_TOKEN", secrets["read"])
        with tcp_session(served) as reader:
            assert load(reader, keys).blocks == 3
            assert save(reader, reader.keys(prompt(2, 3))).stored == 0
        monkeypatch.setenv("KVSTORE_TOKEN", "a-token-that-nobody-knows")
        with tcp_session(served) as stranger:
            assert "not known here" in str(stranger.problem)


def test_a_missing_token_file_is_explained(stores: Stores, tmp_path: Path) -> None:
    served = stores.serve(**TCP)
    with pytest.raises(ConfigError, match=r"session\.token_file .*give a file"):
        tcp_session(served, token_file=str(tmp_path / "none"))


def test_strangers_certificates_are_not_trusted(stores: Stores, tmp_path: Path) -> None:
    served = stores.serve(**tls_settings(tmp_path))
    other = Authority(tmp_path, "other")
    with tcp_session(served, tls_ca=str(other.path)) as session:
        assert "set session.tls_ca" in str(session.problem)
    plain = "tcp://" + served.addresses["tls"]
    with tcp_session(served, address=plain, connect_timeout=2) as session:
        assert session.problem is not None
        assert session.lookup([bytes(32)]).reason == "unavailable"
    unsecured = stores.serve(**TCP)
    secured = "tls://" + unsecured.addresses["tcp"]
    with tcp_session(unsecured, address=secured, connect_timeout=2) as session:
        assert session.problem is not None


def test_mutual_tls(stores: Stores, tmp_path: Path) -> None:
    settings = tls_settings(tmp_path)
    clients = Authority(tmp_path, "clients")
    settings["server"]["tls_client_ca"] = str(clients.path)
    served = stores.serve(**settings)
    ca = str(tmp_path / "authority.pem")
    with tcp_session(served, tls_ca=ca) as session:
        assert session.problem is not None
    mine = clients.issue("client")
    both = {"tls_cert": str(mine.cert), "tls_key": str(mine.key)}
    with tcp_session(served, tls_ca=ca, **both) as session:
        keys = session.keys(prompt(1, 3))
        assert save(session, keys).stored == 3
        assert load(session, keys).blocks == 3


def test_the_control_of_congestion_can_be_chosen(stores: Stores) -> None:
    """Each side its own; what the kernel has not is refused with what it has."""
    served = stores.serve(server={"tcp": "127.0.0.1:0", "congestion": "reno"})
    with tcp_session(served, congestion="reno") as session:
        keys = session.keys(prompt(1, 4))
        save(session, keys)
        assert load(session, keys).blocks == 4
    connection = connect(tcp_config(served, congestion="reno"))
    assert congestion_of(connection.wire._socket) == "reno"
    connection.wire.close()
    with pytest.raises(ConfigError, match=r"session.congestion: 'swift' cannot be used .* reno"):
        connect(tcp_config(served, congestion="swift"))
