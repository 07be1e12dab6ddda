"""An engine's own model, run over chosen rows of one prompt.

Each run of neighbouring rows is a request of its own to the attention kernel, over the same pages
and as long as the prompt is up to its end: so the kernel's causal mask is right for scattered rows.
Keys and values are read from the pages as the layout says, and written by the engine.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Final

import torch
from vllm.config import CUDAGraphMode
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.utils import PAD_SLOT_ID

from kvstore.blend.selection import ASKED
from kvstore.connectors.vllm.layout import ON_CPU, Pages
from kvstore.errors import SpecError

_TEST_TOKENS: Final = 24
_TEST_SHIFT: Final = 37
"""Positions by which the self-test moves its tokens."""
_TOLERANCE: Final = {torch.float32: 1e-3}
"""Relative, of the self-test; of shorter numbers `_COARSE`."""
_COARSE: Final = 0.08
_SCORES: Final = 1 << 26
"""Numbers that one look at attention may hold."""


Turn = Callable[[torch.Tensor], torch.Tensor]
Rotation = Callable[[torch.Tensor, torch.device], Turn]
"""From places by which tokens move on (CPU): what turns their keys."""


class EngineRows:
    """The model and pages of one worker. Used by its thread, within or beside a step.

    All tensors of keys and values have shape (tokens, heads, channels).
    """

    def __init__(self, config: Any, pages: Pages, caches: Mapping[str, torch.Tensor]) -> None:
        """To be made by one of the callers of the engine's runner, once its pages are there.

        Raises:
            SpecError: the engine's internals are not those that this needs, and which.
        """
        self._runner = _runner()
        self._config = config
        self.busy = False
        """Within a pass of ours: hooks of layers are not for the engine's step."""
        self._order = torch.zeros(0)
        """Rows of the pass that is under way, as the model is given them."""
        context = config.compilation_config.static_forward_context
        names, groups = list(pages.layer_names), self._runner.attn_groups
        if len(groups) != 1 or sorted(n for g in groups[0] for n in g.layer_names) != sorted(names):
            raise SpecError("its layers of attention are not those of its pages")
        self._layers = [context[name] for name in names]
        self._caches = [caches[name] for name in names]
        first = self._caches[0]
        self.device = first.device
        self._tokens = int(first.shape[2])
        self._cut = pages.page_tokens // self._tokens
        self._transposed = pages.parts[0].layout == ON_CPU
        self._width = int(first.shape[3]) // 2
        self._rotations = _rotations(self._runner.model, self._layers)
        own = copy.copy(config)
        own.scheduler_config = copy.copy(config.scheduler_config)
        own.compilation_config = copy.copy(config.compilation_config)
        self._most = config.scheduler_config.max_num_batched_tokens
        # Each row may be a request of its own; no graph is ever captured of these passes.
        own.scheduler_config.max_num_seqs = self._most
        own.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
        self._builders = []
        for group in groups[0]:
            spec = group.kv_cache_spec.copy_with_new_block_size(self._tokens)
            kind = group.backend.get_builder_cls()
            if group.kernel_block_size is not None or kind.requires_block_table_width:
                raise SpecError(f"{group.backend.get_name()} maps pages in a way of its own")
            if not hasattr(group.backend.get_impl_cls(), "do_kv_cache_update"):
                raise SpecError(f"{group.backend.get_name()} does not write pages apart")
            builder = kind(spec, group.layer_names, own, self.device)
            self._builders.append((builder, group.layer_names))

    @property
    def layers(self) -> int:
        """How many there are."""
        return len(self._layers)

    def read(
        self, layer: int, page_ids: Sequence[int], start: int, end: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of tokens `start` to `end`."""
        size, width = self._tokens, self._width
        ids = self._ids(page_ids)[start // size : -(-end // size)]
        held = self._caches[layer][ids]
        heads, inside = held.shape[1], slice(start % size, start % size + end - start)
        if self._transposed:
            flat = held.reshape(len(ids), heads, -1)
            cut = size * width
            keys = flat[..., :cut].unflatten(-1, (width, size)).permute(0, 3, 1, 2)
            values = flat[..., cut:].unflatten(-1, (size, width)).transpose(1, 2)
            return keys.flatten(0, 1)[inside], values.flatten(0, 1)[inside]
        rows = held.transpose(1, 2).flatten(0, 1)[inside]
        return rows[..., :width], rows[..., width:]

    def put(
        self, page_ids: Sequence[int], rows: torch.Tensor, by: torch.Tensor, kv: torch.Tensor
    ) -> None:
        """Write tokens of all layers to `rows` of a prompt, `by` places further on than they stood.

        `kv` has shape (tokens, layers, keys and values, heads, channels). Tokens whose row is
        negative are left out. `rows` and `by` lie on the CPU.
        """
        ids, kv = self._ids(page_ids), kv.to(self.device)
        slots = self._slots(ids, rows.clamp(min=0).to(self.device))
        slots[(rows < 0).to(self.device)] = PAD_SLOT_ID
        turns = {rotation: rotation(by, self.device) for rotation in set(self._rotations)}
        for layer, rotation in enumerate(self._rotations):
            own = self._layers[layer]
            keys, values = turns[rotation](kv[:, layer, 0]), kv[:, layer, 1].contiguous()
            own.impl.do_kv_cache_update(own, keys, values, own.kv_cache, slots)

    def rotate(self, layer: int, keys: torch.Tensor, by: int) -> torch.Tensor:
        """`keys`, as they are `by` positions later (or earlier)."""
        return self._rotations[layer](torch.tensor([by]), self.device)(keys)

    def run(
        self,
        page_ids: Sequence[int],
        tokens: Sequence[int],
        rows: Sequence[int],
        shift: int = 0,
    ) -> None:
        """Compute `rows` (ascending) of a prompt, each from what stands in the pages before it.

        `shift` moves all positions, for the self-test.
        """
        for first in range(0, len(rows), self._most):
            self._pass(page_ids, tokens, list(rows[first : first + self._most]), shift)

    def follows(
        self, page_ids: Sequence[int], tokens: Sequence[int], start: int
    ) -> torch.Tensor | None:
        """Logarithms of the probabilities of what follows `tokens`; None: another rank has them.

        Computes the rows from `start` on.
        """
        states = None
        for first in range(start, len(tokens), self._most):
            rows = list(range(first, min(first + self._most, len(tokens))))
            states = self._pass(page_ids, tokens, rows, 0)
        assert states is not None
        logits = self._runner.model.compute_logits(states[-1:])
        return None if logits is None else logits[0].float().log_softmax(-1)

    def _pass(
        self, page_ids: Sequence[int], tokens: Sequence[int], rows: list[int], shift: int
    ) -> Any:
        cuts = [0, *(i for i in range(1, len(rows)) if rows[i] != rows[i - 1] + 1), len(rows)]
        # Backends take short queries for answers that grow, and want those first.
        runs = sorted((rows[a:b] for a, b in pairwise(cuts)), key=len)
        here = self.device
        order = torch.tensor([row for run in runs for row in run], device=here)
        starts = torch.zeros(len(runs) + 1, dtype=torch.int32)
        starts[1:] = torch.tensor([len(run) for run in runs]).cumsum(0)
        ends = torch.tensor([run[-1] + 1 for run in runs], dtype=torch.int32)
        ids, self._order = self._ids(page_ids), order
        slots = self._slots(ids, order)
        common = CommonAttentionMetadata(
            query_start_loc=starts.to(here),
            query_start_loc_cpu=starts,
            seq_lens=ends.to(here),
            seq_lens_cpu_upper_bound=ends,
            num_reqs=len(runs),
            num_actual_tokens=len(rows),
            max_query_len=len(runs[-1]),
            max_seq_len=int(ends.max()),
            block_table_tensor=ids.to(torch.int32)[None].repeat(len(runs), 1),
            slot_mapping=slots,
            causal=True,
            positions=order + shift,
        )
        about: dict[str, Any] = {}
        for builder, names in self._builders:
            about |= dict.fromkeys(names, builder.build(0, common))
        mapping = dict.fromkeys(about, slots)
        numbers = torch.tensor([tokens[row] for run in runs for row in run], dtype=torch.int32)
        with self._silent(), torch.inference_mode(), set_forward_context(
            about, self._config, num_tokens=len(rows), slot_mapping=mapping, skip_compiled=True
        ):  # fmt: skip
            return self._runner.model(input_ids=numbers.to(here), positions=order + shift)

    @contextmanager
    def _silent(self) -> Iterator[None]:
        self.busy = True
        try:
            yield
        finally:
            self.busy = False

    def attention(
        self, page_ids: Sequence[int], tokens: Sequence[int], fresh: Sequence[int], end: int
    ) -> torch.Tensor:
        """What the question, all `tokens` from `end` on, attends to, × the size of its values.

        Computes it, and the `fresh` rows before. Summed over heads and layers; shape (end,), on the
        CPU.
        """
        last = len(tokens)
        looked, rows = max(end, last - ASKED), [*fresh, *range(end, last)]
        if len(rows) > self._most:
            self.run(page_ids, tokens, fresh)
            rows = rows[len(fresh) :]
        score = torch.zeros(end, device=self.device)
        places = torch.arange(last, device=self.device)
        handles = []

        def look(number: int) -> Callable[..., None]:
            def hook(module: Any, given: tuple[Any, ...], _: object) -> None:
                # The pages have all of its keys by now; the question's rows are neighbours in it.
                order, heads = self._order, module.num_kv_heads
                keys, values = self.read(number, page_ids, 0, last)
                turned = keys.float().permute(1, 2, 0)  # heads, channels, tokens
                sizes = values[:end].float().norm(dim=-1).T
                first = int((order == looked).nonzero())
                query = given[0].view(len(order), heads, -1, self._width)
                query = query[first : first + last - looked].float() * module.impl.scale
                step = max(1, _SCORES // (module.num_heads * last))
                for at in range(0, len(query), step):
                    part = query[at : at + step].transpose(0, 1)  # heads, rows, its queries
                    logits = (part.flatten(1, 2) @ turned).unflatten(1, part.shape[1:3])
                    later = places[end:] > places[looked + at :][: part.shape[1], None]
                    logits[..., end:].masked_fill_(later[:, None], -torch.inf)
                    weights = logits.softmax(-1)[..., :end].sum((1, 2))
                    score.add_((weights * sizes).sum(0))

            return hook

        for number, layer in enumerate(self._layers):
            handles.append(layer.register_forward_hook(look(number)))
        try:
            self.run(page_ids, tokens, rows)
        finally:
            for handle in handles:
                handle.remove()
        return tensor_model_parallel_all_reduce(score).cpu()

    def agree(self, good: bool) -> bool:
        """Whether it is good on all ranks."""
        bad = torch.tensor([float(not good)], device=self.device)
        return not tensor_model_parallel_all_reduce(bad).item()

    def check(self) -> None:
        """Compute some tokens, here and further on, and see that rotation leads from one to other.

        The pages that it uses must be nobody's; they are empty afterwards.

        Raises:
            SpecError: it does not, in which layer, or rows by themselves come out otherwise.
        """
        pages = list(range(1, 2 + _TEST_TOKENS // (self._tokens * self._cut)))
        tokens, everything = list(range(7, 7 + 3 * _TEST_TOKENS, 3)), range(_TEST_TOKENS)
        limit = _TOLERANCE.get(self._caches[0].dtype, _COARSE)

        def held() -> list[tuple[torch.Tensor, torch.Tensor]]:
            each = (self.read(n, pages, 0, _TEST_TOKENS) for n in range(self.layers))
            return [(k.clone(), v.clone()) for k, v in each]

        def compare(what: str, layer: int, one: torch.Tensor, other: torch.Tensor) -> None:
            far = (one.float() - other.float()).norm() / other.float().norm()
            if not far <= limit:  # nan, too
                raise SpecError(f"self-test: {what} in layer {layer} are off by {far:.3g}")

        moved_on = torch.full((_TEST_TOKENS,), -_TEST_SHIFT)
        try:
            self.run(pages, tokens, everything, _TEST_SHIFT)
            moved = held()
            self.run(pages, tokens, everything)
            whole = held()
            for n, ((keys, values), (far_keys, far_values)) in enumerate(
                zip(whole, moved, strict=True)
            ):
                compare("rotated keys", n, self.rotate(n, keys, _TEST_SHIFT), far_keys)
                compare(
                    "keys that are rotated back", n, self.rotate(n, far_keys, -_TEST_SHIFT), keys
                )
                compare("values", n, far_values, values)
            far = torch.stack([torch.stack(both, 1) for both in moved], 1)
            self.put(pages, torch.arange(_TEST_TOKENS), moved_on, far)
            self.run(pages, tokens, [3, 4, 9, *range(15, _TEST_TOKENS)])
            for n, (keys, values) in enumerate(held()):
                compare("keys of single rows", n, keys, whole[n][0])
                compare("values of single rows", n, values, whole[n][1])
        finally:
            ids = self._ids(pages)
            for cache in self._caches:
                cache[ids] = 0

    def _ids(self, page_ids: Sequence[int]) -> torch.Tensor:
        ids = torch.tensor(page_ids, device=self.device)
        if self._cut == 1:
            return ids
        return (ids[:, None] * self._cut + torch.arange(self._cut, device=self.device)).flatten()

    def _slots(self, ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return ids[rows // self._tokens] * self._tokens + rows % self._tokens


def _runner() -> Any:
    """The model runner that is calling us."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        found = frame.f_locals.get("self")
        if hasattr(found, "attn_groups") and hasattr(found, "model"):
            return found
    raise SpecError("the engine's model runner is not among the callers")


def _rotations(model: torch.nn.Module, layers: Sequence[Any]) -> list[Rotation]:
    """How keys of each layer are rotated on, by what the engine has in that layer.

    Raises:
        SpecError: a layer has none, or one of another kind.
    """
    parents = {id(child): module for module in model.modules() for child in module.children()}
    known: dict[int, Rotation] = {}
    found = []
    for number, layer in enumerate(layers):
        rotary = getattr(parents.get(id(layer)), "rotary_emb", None)
        if rotary is None or not hasattr(rotary, "_compute_cos_sin_cache"):
            raise SpecError(f"layer {number} has no rotation that is known")
        if id(rotary) not in known:
            table = rotary._compute_cos_sin_cache().float()
            # Some scale keys along with it: what is stored has been scaled.
            table = (table / table[0, 0]).cpu()
            known[id(rotary)] = _rotation(table, rotary.rotary_dim, rotary.is_neox_style)
        found.append(known[id(rotary)])
    return found


def _rotation(table: torch.Tensor, width: int, halves: bool) -> Rotation:
    def by(places: torch.Tensor, device: torch.device) -> Turn:
        cos, sin = table[places.abs()][:, None].to(device).chunk(2, -1)
        sin = sin * places.sign().to(device)[:, None, None]

        def join(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return torch.cat((a, b), -1) if halves else torch.stack((a, b), -1).flatten(-2)

        cosines, sines = join(cos, cos), join(-sin, sin)

        def turn(keys: torch.Tensor) -> torch.Tensor:
            turned, rest = keys[..., :width].float(), keys[..., width:]
            a, b = turned.chunk(2, -1) if halves else (turned[..., ::2], turned[..., 1::2])
            made = (turned * cosines).addcmul_(join(b, a), sines).to(keys.dtype)
            return torch.cat((made, rest), -1) if rest.shape[-1] else made

        return turn

    return by


def only_connector(connector: object) -> bool:
    """Whether no other connector hears of what the model computes."""
    return get_kv_transfer_group() is connector
