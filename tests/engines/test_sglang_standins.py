"""What stands for the packages that SGLang imports and a CPU does without."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

pytestmark = pytest.mark.sglang


def test_kernels_can_be_written_and_not_run() -> None:
    import triton
    import triton.language as tl

    @triton.autotune(configs=[triton.Config({"BLOCK": 64})], key=["n"])
    @triton.jit
    def kernel(x: Any, n: tl.constexpr) -> None:
        """Nobody compiles it."""

    with pytest.raises(NotImplementedError, match="kernel"):
        kernel[(1,)](None, 1)
    assert (triton.cdiv(7, 2), triton.next_power_of_2(5), triton.next_power_of_2(8)) == (4, 8, 8)
    with pytest.raises(RuntimeError, match="0 active drivers"):
        _ = triton.runtime.driver.active


def test_kernels_for_cpus_say_that_they_are_missing() -> None:
    from sgl_kernel.mamba import causal_conv1d_fn_cpu

    with pytest.raises(NotImplementedError, match=r"sgl_kernel\.causal_conv1d_fn_cpu"):
        causal_conv1d_fn_cpu()
    with pytest.raises(ImportError):
        importlib.import_module("sgl_kernel.flash_attn")
