"""Any rows of a prompt through the model's own layers, over KV that lies there already.

The model is called as it is: with the rows' tokens and positions, a mask by which each sees those
up to itself and no later ones, and a cache that takes their keys and values in where they stand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from transformers import DynamicCache

from kvstore.blend.selection import ASKED
from kvstore.errors import SpecError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvstore.blocks.spec import Group

_MOST: Final = 1 << 26
"""Numbers of a mask, or of attention weights, at a time."""
_CHECKED: Final = 1
"""The layer whose keys and values tell how far off those of all layers are."""
_TRIED: Final = 16
_FAR: Final = 512
"""Tokens, and positions, that a rotation is tried with."""


class _Enough(Exception):
    """Later layers need not be computed."""


class Rows(DynamicCache):  # type: ignore[misc] # no types to be had
    """The KV of one prompt, all of it: rows that were put there, and rows that were computed."""

    def __init__(self, model: Any, group: Group, tokens: NDArray[np.int64]) -> None:
        super().__init__(config=model.config)
        device, dtype = model.device, getattr(torch, group.dtype)
        shapes = [(1, group.heads, len(tokens), width) for width in group.channels]
        self.planes = [
            tuple(torch.zeros(shape, dtype=dtype, device=device) for shape in shapes)
            for _ in range(group.layers)
        ]
        self._model = model
        self._tokens = torch.from_numpy(tokens).to(device)
        self._rows = self._tokens
        self._seen: Callable[..., None] | None = None

    def put(self, layer: int, start: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Take in a layer's keys and values, [1, heads, tokens, channels], from `start` on."""
        for plane, new in zip(self.planes[layer], (keys, values), strict=True):
            plane[:, :, start : start + new.shape[2]] = new

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> Any:
        """What the model's layers call."""
        own = self.planes[layer]
        if self._seen is not None:
            self._seen(layer, keys, values)
        for plane, new in zip(own, (keys, values), strict=True):
            plane[:, :, self._rows] = new
        end = int(self._rows[-1]) + 1
        return own[0][:, :, :end], own[1][:, :, :end]

    def compute(self, rows: NDArray[np.int64], *, each: int = 1) -> None:
        """Compute sorted `rows` by what lies in those before; `each` row and column is as many
        numbers at a time."""
        limit = max(1, _MOST // (each * (int(rows[-1]) + 1))) if len(rows) else 1
        for at in range(0, len(rows), limit):
            self._rows = torch.from_numpy(rows[at : at + limit]).to(self._model.device)
            columns = torch.arange(int(self._rows[-1]) + 1, device=self._rows.device)
            dtype = self.planes[0][0].dtype
            mask = torch.zeros(len(self._rows), len(columns), dtype=dtype, device=columns.device)
            mask.masked_fill_(columns > self._rows[:, None], torch.finfo(dtype).min)
            with torch.no_grad(), _attention(self._model), suppress(_Enough):
                self._model(
                    input_ids=self._tokens[self._rows][None],
                    attention_mask=mask[None, None],
                    position_ids=self._rows[None],
                    past_key_values=self,
                    use_cache=True,
                    logits_to_keep=1,
                )

    def question(self, rows: NDArray[np.int64], end: int) -> NDArray[np.float64]:
        """How much the last rows attend to each one before `end`, times the norm of its values.

        Summed over heads and layers. All of `rows`, the last ones too, are computed.

        Raises:
            SpecError: the model does not tell.
        """
        scores = torch.zeros(end, dtype=torch.float64, device=self._model.device)
        first, told = max(end, len(self._tokens) - ASKED), []

        def look(module: Any, _: Any, output: Any) -> None:
            layer, weights = module.layer_idx, output[1]  # the latter [1, heads, rows, columns]
            if self._rows[-1] >= first and isinstance(weights, torch.Tensor):
                values = self.planes[layer][1][0, :, :end].float().norm(dim=-1)
                seen = weights[0, :, self._rows >= first, :end].float().sum(1)
                scores.add_((seen.view(len(values), -1, end).sum(1) * values).sum(0))
                told.append(layer)

        heads = self._model.config.get_text_config(decoder=True).num_attention_heads
        with _attention(self._model, "eager"), ExitStack() as stack:
            for module in self._model.modules():
                if hasattr(module, "layer_idx") and hasattr(module, "is_causal"):
                    stack.callback(module.register_forward_hook(look).remove)
            self.compute(rows, each=heads)
        if not told:
            raise SpecError("the model does not tell what its rows attend to; select the first")
        found: NDArray[np.float64] = scores.cpu().numpy()
        return found

    def deviation(self, rows: NDArray[np.int64], end: int) -> NDArray[np.float64]:
        """How far keys and values of `rows`, all before `end`, are off what lies there.

        They are computed for that in the first layers.
        """
        scores = torch.zeros(end, dtype=torch.float64, device=self._model.device)

        def look(layer: int, *new: torch.Tensor) -> None:
            if layer == _CHECKED:
                for plane, computed in zip(self.planes[layer], new, strict=True):
                    off = (computed - plane[:, :, self._rows]).double().pow(2).sum((0, 1, 3))
                    scores[self._rows] += off
                raise _Enough

        self._seen = look
        try:
            self.compute(rows)
        finally:
            self._seen = None
        found: NDArray[np.float64] = scores.cpu().numpy()
        return found


@contextmanager
def _attention(model: Any, kind: str = "sdpa") -> Iterator[None]:
    """Have a model attend by one of the implementations that take any mask."""
    usual = model.config._attn_implementation
    model.config._attn_implementation = "eager" if usual == "eager" else kind
    try:
        yield
    finally:
        model.config._attn_implementation = usual


class Rotation:
    """Moves keys to other positions, by what the model itself rotates them by."""

    def __init__(self, model: Any, group: Group) -> None:
        """Try it with a few tokens.

        Raises:
            SpecError: keys of this model cannot be moved.
        """
        self._model, name = model, type(model).__name__
        rotary = [m for m in model.modules() if hasattr(m, "inv_freq")]
        if len(rotary) != 1:
            raise SpecError(f"{name} has {len(rotary)} rotary embeddings; pieces need it to have 1")
        self._rotary = rotary[0]
        if {2 * rotary[0].inv_freq.numel()} != set(group.channels[:1]):
            raise SpecError(f"{name} rotates a part of each key; its pieces cannot be moved")
        here, there = (self._tried(start) for start in (0, _FAR))
        close = 1e-3 if group.dtype == "float32" else 0.1
        for layer, (near, far) in enumerate(zip(here.layers, there.layers, strict=True)):
            moved = [(self(near.keys, _FAR), far.keys), (near.values, far.values)]
            for got, wanted in moved:
                off = (got.float() - wanted.float()).abs().max() / wanted.float().abs().max()
                if not off <= close:
                    raise SpecError(
                        f"layer {layer} of {name} depends on positions in another way than by "
                        "rotating whole keys; its pieces cannot be moved"
                    )

    def __call__(self, keys: torch.Tensor, delta: int) -> torch.Tensor:
        """`keys`, [..., tokens, channels], as they are that many positions further on."""
        if not delta:
            return keys
        places = torch.tensor([[abs(delta)]], device=keys.device)
        wide = torch.zeros(1, device=keys.device)
        cos, sin = (
            x / getattr(self._rotary, "attention_scaling", 1.0) for x in self._rotary(wide, places)
        )
        if delta < 0:
            sin = -sin
        one, other = keys.float().chunk(2, dim=-1)
        return (keys.float() * cos + torch.cat((-other, one), dim=-1) * sin).to(keys.dtype)

    def _tried(self, start: int) -> DynamicCache:
        past = DynamicCache(config=self._model.config)
        places = torch.arange(_TRIED, device=self._model.device)[None]
        with torch.no_grad():
            self._model(
                input_ids=places, position_ids=places + start, past_key_values=past, use_cache=True
            )
        return past
