"""Codecs that lose nothing: how much less they store, and how fast, beside copies."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvstore import _native
from kvstore.benchmarks.figures import BenchmarkError, Report, Run
from kvstore.benchmarks.serving import default_model
from kvstore.blocks.spec import Described, Group, Part
from kvstore.codecs import CODECS, RAW, find
from kvstore.codecs.base import Codec, coded_part, decode, encode
from kvstore.errors import ConfigError
from kvstore.memory.bounce import Bounce

_TOKENS: Final = 64
_SLOW_BYTES: Final = 64 << 20
"""Enough for codecs that take a hundred times as long."""

Values = NDArray[np.uint16]


def run(report: Report, *, size: int) -> None:
    """Measure with `size` bytes of a bfloat16 cache, and with one thread."""
    values, what = _real() or (_synthetic(), "numbers of chance, spread like a cache's")
    report.note(f"codecs run over {what}")
    layers, _, heads, _, channels = values.shape
    part = Part(Group(layers, heads, (channels,) * 2, "bfloat16"), Described("LPHNC"))
    for name in (name for name in CODECS if name != RAW):
        try:
            codec = find(name)
        except ConfigError as e:
            report.note(f"left out: {e}")
            continue
        amount = size if name == "e4" else min(size, _SLOW_BYTES)
        _measure(report, codec, part, _objects(values, part, amount))


def _real() -> tuple[Values, str] | None:
    """What the demo's model makes of a text, [layer, plane, head, token, channel]."""
    model = default_model()
    if model is None or importlib.util.find_spec("transformers") is None:
        return None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    text = " ".join(str(cls.__doc__) for cls in vars(np).values() if cls.__doc__)
    ids = AutoTokenizer.from_pretrained(model)(text)["input_ids"][: 16 * _TOKENS]
    cache = DynamicCache(config=loaded.config)
    with torch.no_grad():
        loaded(torch.tensor([ids]), past_key_values=cache, logits_to_keep=1)
    planes = [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]
    return torch.stack(planes).view(torch.int16).numpy().view(np.uint16), f"KV of {model.name}"


def _synthetic() -> Values:
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.standard_normal(64) / 2)
    found = (rng.standard_normal((30, 2, 3, 16 * _TOKENS, 64)) * sizes).astype(np.float32)
    return (found.view(np.uint32) >> 16).astype(np.uint16)


def _objects(values: Values, part: Part, size: int) -> list[Bounce]:
    """Blocks of it, each in memory of its own; the same ones again up to so many bytes."""
    blocks = [
        np.ascontiguousarray(values[:, :, :, at : at + _TOKENS])
        for at in range(0, values.shape[3], _TOKENS)
    ]
    objects = []
    for number in range(max(1, size // part.nbytes(_TOKENS))):
        memory = Bounce(part.nbytes(_TOKENS))
        block = blocks[number % len(blocks)]
        np.frombuffer(memory.view, np.uint8)[:] = block.reshape(-1).view(np.uint8)
        objects.append(memory)
    return objects


def _measure(report: Report, codec: Codec, part: Part, plain: list[Bounce]) -> None:
    coded = coded_part(codec, part, _TOKENS)
    assert coded is not None, "codecs are for such numbers"
    nbytes, room = part.nbytes(_TOKENS), coded.nbytes(_TOKENS)
    frames, back = [Bounce(room) for _ in plain], [Bounce(nbytes) for _ in plain]
    pairs = list(zip(plain, frames, back, strict=True))
    fitted = 0
    for source, frame, to in pairs:  # What is measured must be right.
        checksum = encode(codec, part, coded, _TOKENS, source.address, frame.address)
        if checksum is None:
            continue
        fitted += 1
        if decode(codec, room, frame.address, to.address, nbytes) != checksum or (
            source.view != to.view
        ):
            raise BenchmarkError(f"{codec.name} brought other bytes; run the tests first")
    if fitted < len(pairs):
        report.note(f"{codec.name}: {len(pairs) - fitted} of {len(pairs)} blocks do not fit")
        return

    def each(what: Callable[[Bounce, Bounce, Bounce], object]) -> Run:
        return Run(lambda: [what(*pair) for pair in pairs])

    def copied(source: Bounce, _: Bounce, to: Bounce) -> None:
        _native.copy(to.address, source.address, nbytes)

    def hashed(source: Bounce, _: Bounce, to: Bounce) -> None:
        stream = _native.Xxh3Stream()
        stream.update(source.address, nbytes, to.address)

    runs = {
        "encode": each(lambda s, f, _: encode(codec, part, coded, _TOKENS, s.address, f.address)),
        "decode": each(lambda _, f, t: decode(codec, room, f.address, t.address, nbytes)),
        "copy": each(copied),
        "copy that hashes": each(hashed),
    }
    figures = {
        f"{what} {codec.name}{beside}": (what, limit)
        for what in ("encode", "decode")
        for limit, beside in (("copy that hashes", ""), ("copy", ", bare copy"))
    }
    ratio = round(nbytes / room, 3)
    report.measure(codec.name, runs, figures, nbytes * len(pairs), ratio=ratio, object=nbytes)
