"""How objects are encoded in a tier. Raw bytes are the only codec so far."""

from typing import Final

CODECS: Final = ("raw",)
