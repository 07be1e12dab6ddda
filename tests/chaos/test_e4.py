"""A hundred thousand damaged frames of the codec e4, under the sanitizers of the compiler."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from kvstore._native import cpu_features

ROOT = Path(__file__).parents[2]
ROUNDS = 100_000


@pytest.mark.slow
def test_nothing_is_out_of_bounds(tmp_path: Path) -> None:
    program = tmp_path / "fuzz"
    sources = ("native/e4.cpp", "native/xxh3.cpp", "native/lines.cpp", "native/cpu.cpp")
    subprocess.run(
        [
            os.environ.get("CXX", "c++"), "-std=c++17", "-O1", "-g", "-fno-omit-frame-pointer",
            "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
            str(ROOT / "tests/chaos/e4_fuzz.cpp"), *(str(ROOT / source) for source in sources),
            "-o", str(program),
        ],
        check=True,
    )  # fmt: skip
    kinds = ["portable"] + [
        kind for kind in ("avx2", "avx2,avx512") if kind.split(",")[-1] in cpu_features()
    ]
    for kind in kinds:
        told = subprocess.run(
            [str(program), str(ROUNDS // len(kinds))],
            env={"KVSTORE_CPU": kind},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        same, refused, other = map(int, told.split())
        assert same >= ROUNDS / len(kinds) / 5, "whole frames come back"
        assert refused > 0
        assert other > 0, "checksums tell what these are not"
