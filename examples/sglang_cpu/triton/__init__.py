"""Stands for Triton: SGLang imports it wherever it runs, and calls its kernels on GPUs alone."""

from importlib import import_module

from absent import absent, submodules

__version__ = "0"


def cdiv(a: int, b: int) -> int:
    """The quotient, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest that is no less than `n`."""
    return 1 << (n - 1).bit_length()


class _NoDriver:
    @property
    def active(self) -> object:
        raise RuntimeError("0 active drivers")  # As Triton says where there is no GPU.


__getattr__ = absent
submodules(__name__)
import_module("triton.runtime").driver = _NoDriver()
