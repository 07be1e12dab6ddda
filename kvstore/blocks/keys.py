"""Chained block keys.

``key[i] = SHA-256(key[i-1] ‖ tokens of block i as little-endian u32 ‖ extras of block i)`` with
``key[-1]`` the namespace's digest. A key so names the whole prefix up to and including its block.
Extras (multimodal hashes and the like) are length-prefixed, so no two inputs share an encoding.
The same keys come out on every process, host and version: golden vectors guard them.

What extras say is spelt here (`prompt_extras`), the same for every engine and for the tools that
ask about an engine's prompts.
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvstore import _native
from kvstore.blocks.spec import Namespace
from kvstore.errors import SpecError

KEY_BYTES: Final = 32
MAX_TOKEN: Final = 0xFFFFFFFF


class Media(NamedTuple):
    """An image or the like, `digest` of its content, in place of `length` tokens from `offset`."""

    modality: str
    digest: str
    offset: int
    length: int


def prompt_extras(
    block_tokens: int,
    blocks: range,
    *,
    salt: str = "",
    adapter: str = "",
    weights: str = "",
    media: Iterable[Media] = (),
) -> dict[int, list[bytes]]:
    """What changes the values of a prompt's `blocks` beside its tokens, as `block_keys` takes it.

    The result is numbered from the first of `blocks`. `salt` keeps prompts apart, `adapter` is the
    digest of a LoRA's files, `weights` names weights that a live engine has changed; each (empty:
    none) stands in block 0, and so changes every key.
    """
    extras: dict[int, list[bytes]] = {}
    if 0 in blocks:
        whole = [b"adapter:" + _utf8(adapter)] if adapter else []
        whole += [b"salt:" + _utf8(salt)] if salt else []
        whole += [b"weights:" + _utf8(weights)] if weights else []
        if whole:
            extras[-blocks.start] = whole
    for item in sorted(media, key=lambda item: item.offset):
        first, end = item.offset, item.offset + item.length
        for block in range(
            max(first // block_tokens, blocks.start), min(-(-end // block_tokens), blocks.stop)
        ):
            modality = _utf8(item.modality)
            # The modality's length keeps its end and the digest's beginning apart.
            head = f"media:{first - block * block_tokens}:{len(modality)}:".encode()
            extra = head + modality + _utf8(item.digest)
            extras.setdefault(block - blocks.start, []).append(extra)
    return extras


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def token_array(tokens: Sequence[int] | NDArray[np.integer]) -> NDArray[np.uint32]:
    """`tokens` as a contiguous u32 array, shape (n,).

    Raises:
        SpecError: a token is negative, above u32, or no whole number.
    """
    if isinstance(tokens, np.ndarray):
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise SpecError(
                f"tokens must be a flat array of whole numbers, not {tokens.dtype} {tokens.shape}"
            )
        if tokens.dtype != np.uint32 and tokens.size:
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high > MAX_TOKEN:
                bad = low if low < 0 else high
                raise SpecError(f"token id {bad} is outside u32 (0 to {MAX_TOKEN})")
        return np.ascontiguousarray(tokens, dtype=np.uint32)
    if not isinstance(tokens, list):
        tokens = list(tokens)  # An array or bytes would be taken for raw memory below.
    try:
        return np.frombuffer(_packed(tokens), dtype=np.uint32)
    except (OverflowError, TypeError):
        for position, token in enumerate(tokens):
            if not isinstance(token, (int, np.integer)):
                raise SpecError(f"token {position} is {token!r}, no whole number") from None
            if not 0 <= token <= MAX_TOKEN:
                raise SpecError(
                    f"token id {token} at position {position} is outside u32 (0 to {MAX_TOKEN})"
                ) from None
        raise


def _packed(tokens: list[int]) -> bytes | array[int]:
    try:
        return _native.pack_u32(tokens)
    except TypeError:  # Numbers of another type, such as numpy's, take the slower way.
        return array("I", tokens)


def block_keys(
    namespace: Namespace,
    tokens: Sequence[int] | NDArray[np.integer],
    *,
    extras: Mapping[int, Sequence[bytes]] | None = None,
    parent: bytes | None = None,
) -> list[bytes]:
    """Keys of the whole blocks of `tokens`; a last, partial block has none.

    `extras` maps a block's number to what else changes its values (multimodal hashes). `parent`
    continues a chain: the key of the block before `tokens[0]`.

    Raises:
        SpecError: a token outside u32, or a parent that is no key.
    """
    ids = token_array(tokens)
    size = namespace.block_tokens
    key = namespace.digest if parent is None else parent
    if len(key) != KEY_BYTES:
        raise SpecError(f"parent key has {len(key)} bytes; a key has {KEY_BYTES}")
    keys: list[bytes] = []
    plain_from, count = 0, len(ids) // size
    for block in sorted(b for b in (extras or ()) if 0 <= b < count):
        keys += _plain_chain(key, ids[plain_from * size : block * size], size)
        key = keys[-1] if keys else key
        h = hashlib.sha256(key)
        h.update(ids[block * size : (block + 1) * size].astype("<u4").tobytes())
        assert extras is not None
        for extra in extras[block]:
            h.update(len(extra).to_bytes(4, "little"))
            h.update(extra)
        key = h.digest()
        keys.append(key)
        plain_from = block + 1
    return keys + _plain_chain(key, ids[plain_from * size : count * size], size)


def partial_key(
    namespace: Namespace,
    tokens: Sequence[int] | NDArray[np.integer],
    *,
    extras: Sequence[bytes] = (),
    parent: bytes | None = None,
) -> bytes:
    """The key of a block that has only these tokens, behind `parent`; `extras` are that block's.

    An extra that no whole block has keeps it apart from all of those.

    Raises:
        SpecError: as `block_keys`.
    """
    ids = token_array(tokens)
    padded = np.zeros(namespace.block_tokens, np.uint32)
    padded[: len(ids)] = ids
    own = [f"partial:{len(ids)}".encode(), *extras]
    return block_keys(namespace, padded, extras={0: own}, parent=parent)[0]


def _plain_chain(parent: bytes, ids: NDArray[np.uint32], size: int) -> list[bytes]:
    return split_keys(_native.chain_keys(parent, ids, size))


def join_keys(keys: Sequence[bytes]) -> bytes:
    """Keys as requests carry them; raises SpecError if one is none."""
    if not set(map(len, keys)) <= {KEY_BYTES}:
        raise SpecError(f"keys must be {KEY_BYTES} bytes long; make them with Session.keys")
    return b"".join(keys)


def split_keys(joined: bytes) -> list[bytes]:
    """Cut a run of keys into keys."""
    return list(struct.unpack(f"{KEY_BYTES}s" * (len(joined) // KEY_BYTES), joined))
