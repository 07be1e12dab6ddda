"""Tiers of segments on real media, a folder and an S3 server: rules, damage, races, sessions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import pytest
from obstore.store import from_url

from kvstore._native import xxh3_64
from kvstore.tiers import conformance
from kvstore.tiers.base import Held, Host, Job, ObjectName, Tier
from kvstore.tiers.conformance import Bench, Make, Objects, content_of, segment_of
from kvstore.tiers.files import open_files
from kvstore.tiers.s3 import open_s3
from kvstore.tiers.segments.format import Segment, decode, encode, path_of, shape_of
from tests.s3_tools import S3Server
from tests.session_tools import Stores, load, prompt, save

Damage = Callable[[bytearray, bytearray], bytes]


class Medium:
    """A place for a tier, with a way around it: `files` in a folder, or `s3` under a prefix."""

    def __init__(self, folder: Path, server: S3Server | None) -> None:
        self._folder, self._server = folder, server
        if server is not None:
            options = server.options(str(folder).strip("/"), client_options={"allow_http": True})
            url = options.pop("url")
            self._client = from_url(url, **options.pop("config"), **options)
        else:
            folder.mkdir()

    @property
    def config(self) -> dict[str, Any]:
        """What a configuration says of a tier there."""
        if self._server is None:
            return {"kind": "files", "options": {"path": str(self._folder)}}
        return {"kind": "s3", "options": self._server.options(str(self._folder).strip("/"))}

    def open(self, host: Host, folder: Path) -> Tier:
        opened: Any = open_files if self._server is None else open_s3
        return opened("far", host, self.config["options"] | {"retry_seconds": 0.2})  # type: ignore[no-any-return]

    def read(self, name: ObjectName) -> bytearray:
        if self._server is None:
            return bytearray((self._folder / path_of(name)).read_bytes())  # type: ignore[arg-type]
        return bytearray(bytes(obstore.get(self._client, path_of(name)).bytes()))  # type: ignore[arg-type]

    def write(self, name: ObjectName, data: bytes) -> None:
        if self._server is None:
            (self._folder / path_of(name)).write_bytes(data)  # type: ignore[arg-type]
        else:
            obstore.put(self._client, path_of(name), data)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    one = S3Server()
    yield one
    one.stop()


@pytest.fixture(params=["files", "s3"])
def medium(request: pytest.FixtureRequest, tmp_path: Path) -> Medium:
    s3 = request.param == "s3"
    return Medium(tmp_path / "shared", request.getfixturevalue("server") if s3 else None)


def probe(bench: Bench, names: list[ObjectName]) -> list[Held | None]:
    answers: list[list[Held | None]] = []
    bench.tier.probe(names, answers.append)
    bench.run_until(lambda: bool(answers), "a probe is answered")
    return answers[0]


@pytest.mark.parametrize("kind", ["files", "s3"])
@pytest.mark.parametrize("check", conformance.CHECKS, ids=lambda check: check.__name__)
def test_conforms(
    kind: str, check: Callable[[Make, Path], None], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    server = request.getfixturevalue("server") if kind == "s3" else None

    def make(host: Host, folder: Path) -> Tier:
        if server is not None:
            return open_s3("far", host, server.options(str(folder).strip("/")))
        folder.mkdir(exist_ok=True)
        return open_files("far", host, {"path": str(folder), "size": "8MiB"})

    check(make, tmp_path / "shared")


NAMES = segment_of(1, 8192)
SHAPE = shape_of(NAMES[0])  # type: ignore[arg-type]


def flipped(at: int) -> Damage:
    def damage(data: bytearray, other: bytearray) -> bytes:
        data[at] ^= 1
        return data

    return damage


def stamped(**fields: Any) -> Damage:
    """Another header, whole in itself."""

    def damage(data: bytearray, other: bytearray) -> bytes:
        segment = decode(bytes(data))
        assert isinstance(segment, Segment)
        return encode(segment._replace(**fields))[: SHAPE.header] + data[SHAPE.header :]

    return damage


IN_HEADER: dict[str, Damage] = {
    "magic": flipped(0),
    "version": flipped(8),
    "count": flipped(12),
    "name": flipped(45),
    "sum of a block": flipped(140),
    "sum of the header": flipped(88 + 16 * 80 + 1),
    "cut in the header": lambda data, other: data[:1000],
    "empty": lambda data, other: b"",
    "of another namespace": stamped(digest=bytes(32)),
    "of another layout": stamped(variant=bytes(16)),
    "of another size": stamped(nbytes=4096),
    "of other blocks": lambda data, other: other,
    "of less blocks": lambda data, other: encode(
        decode(bytes(data))._replace(blocks=decode(bytes(data)).blocks[:15])  # type: ignore[union-attr]
    ),
    "ones": lambda data, other: b"\xff" * len(data),
}
IN_DATA: dict[str, Damage] = {
    "first byte": flipped(SHAPE.header + 8 * SHAPE.stride),
    "last byte": flipped(SHAPE.header + 8 * SHAPE.stride + 8191),
    "cut in the block": lambda data, other: data[: SHAPE.header + 8 * SHAPE.stride + 100],
    "cut before it": lambda data, other: data[: SHAPE.header],
    "others' bytes": lambda data, other: data[: SHAPE.header] + other[SHAPE.header :],
}


@pytest.mark.parametrize("damage", IN_HEADER.values(), ids=IN_HEADER)
def test_a_damaged_header_is_a_miss_and_made_anew(medium: Medium, damage: Damage) -> None:
    others = segment_of(2, 8192)
    with Bench(medium.open, Path()) as bench:
        bench.put(*NAMES, *others)
        medium.write(NAMES[0], damage(medium.read(NAMES[0]), medium.read(others[0])))
        assert probe(bench, NAMES) == [None] * 16
        assert bench.tier.counters["segments_invalid"] == 1
        assert bench.put(*NAMES).get() == [None] * 16
        assert all(probe(bench, [*NAMES, *others]))


@pytest.mark.parametrize("damage", IN_DATA.values(), ids=IN_DATA)
def test_damaged_data_is_a_miss_and_made_anew(medium: Medium, damage: Damage) -> None:
    others = segment_of(2, 8192)
    with Bench(medium.open, Path()) as bench:
        objects = bench.put(*NAMES, *others)
        medium.write(NAMES[0], damage(medium.read(NAMES[0]), medium.read(others[0])))
        results = objects.get()
        assert results[8] == "corrupt"
        assert set(results[:16]) <= {None, "corrupt"}
        assert results[16:] == [None] * 16
        assert bench.tier.state.readable, "one file says nothing of the others"
        bench.tier.delete([NAMES[8]])
        assert bench.put(*NAMES).get() == [None] * 16


def test_what_others_have_put_stays(medium: Medium, monkeypatch: pytest.MonkeyPatch) -> None:
    """KV computed elsewhere differs in its last bits: the first one's is whole, and is kept."""
    with Bench(medium.open, Path()) as one, Bench(medium.open, Path()) as other:
        first = one.put(*NAMES)
        assert Objects(other, NAMES).put() == [None] * 16, "the same bytes"
        assert other.tier.counters["segments_there"] == 1
        with monkeypatch.context() as changed:
            changed.setattr(conformance, "content_of", lambda name: content_of(name)[::-1])
            assert Objects(other, NAMES).put() == ["exists"] * 16
        assert first.get() == [None] * 16
        assert [held and held.checksum for held in probe(other, NAMES)] == [
            job.checksum for job in first.jobs
        ]


def test_what_others_have_put_instead_is_a_miss_and_stays(
    medium: Medium, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Bench(medium.open, Path()) as one, Bench(medium.open, Path()) as other:
        first = one.put(*NAMES)
        other.tier.delete(NAMES)
        assert other.tier.flush(20)
        monkeypatch.setattr(conformance, "content_of", lambda name: content_of(name)[::-1])
        second = other.put(*NAMES)
        assert set(first.get()) == {"absent"}
        assert second.get() == [None] * 16


def test_many_nodes_put_one_segment_at_once(medium: Medium) -> None:
    kept: list[Objects] = []
    with Bench(medium.open, Path()) as one, Bench(medium.open, Path()) as other:
        for number in range(10, 16):
            names, ends = segment_of(number, 8192), list[str | None]()

            def ended(job: Job, error: str | None, ends: list[str | None] = ends) -> None:
                ends.append(error)

            for bench in (one, other):
                kept.append(Objects(bench, names))
                kept[-1].fill()
                bench.tier.put(kept[-1].jobs, ended)
            for bench in (one, other):
                bench.run_until(lambda ends=ends: len(ends) == 32, "all end")  # type: ignore[misc]
            assert ends == [None] * 32
        made = [bench.tier.counters["segments_written"] for bench in (one, other)]
        assert sum(made) == 6, "each is there once"


def test_an_expired_segment_is_made_anew(medium: Medium) -> None:
    with Bench(medium.open, Path()) as bench:
        bench.put(*NAMES, expires=1000)
        bench.put(*NAMES, expires=1 << 40)
        assert {held and held.expires for held in probe(bench, NAMES)} == {1 << 40}


def test_memory_that_changes_is_not_stored(medium: Medium) -> None:
    with Bench(medium.open, Path()) as bench:
        objects = Objects(bench, NAMES)
        for number, job in enumerate(objects.jobs):
            data = np.frombuffer(content_of(job.name), np.uint8)
            job.checksum = xxh3_64(data.ctypes.data, data.nbytes) ^ (number == 3)
        assert objects.put() == ["corrupt" if number == 3 else "partial" for number in range(16)]
        assert probe(bench, NAMES) == [None] * 16


def test_two_daemons_share_segments(medium: Medium, stores: Stores) -> None:
    """What one has saved in pieces is loaded by the other, from the start and from the middle."""
    tiers = [medium.config | {"name": "far", "probe_seconds": 5}]
    one, other = stores.serve(tiers=tiers), stores.serve(tiers=tiers)
    with one.session() as session:
        chain = session.keys(prompt(1, 150))
        save(session, chain[:40])
        save(session, chain[40:], parent=chain[39], position=40)
        assert session.flush() == 0
        counters = session.stats()["counters"]
        assert counters["write.dropped.partial"] == 40 + 22
    with other.session() as session:
        late = session.lookup(chain[70:], position=70)
        assert (late.blocks, set(late.tiers)) == (58, {"far"})
        found = session.lookup(chain)
        assert (found.blocks, found.reason) == (128, "absent")
        assert load(session, chain[:128]).tiers == {"far": 128}
        assert session.stats()["counters"]["probe.found.far"] == 128


def test_files_go_by_the_name_of_their_daemon(stores: Stores, tmp_path: Path) -> None:
    tier = {"kind": "files", "name": "far", "options": {"path": str(tmp_path)}}
    served = stores.serve(tiers=[tier], server={"name": "rack7-node3"})
    with served.session() as session:
        save(session, session.keys(prompt(1, 64)))
        assert session.flush() == 0
    (node,) = (tmp_path / "nodes").iterdir()
    assert (node.name, len(list(node.iterdir()))) == ("rack7-node3", 1)
