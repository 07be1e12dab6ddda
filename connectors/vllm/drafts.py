"""Draft models: whose layers are whose, what names a draft's KV, and how much of it is not settled.

vLLM puts a draft's layers into the groups of the model that it drafts for, or beside them. Here
they are always a group of their own, whose name covers the draft: the target's blocks are the same
with any draft and without, and no draft is given another's.

A draft that goes by the target's hidden states (EAGLE, MTP) has at each place seen the token behind
it, too. So its KV of a block's last token hangs on a token that the block's key does not cover.
That token is computed again wherever a load ends (vLLM itself drops a whole page there). Further
back it may be of another continuation, where a block was stored with one and went on with another:
one place of that block is of another token in the draft's eyes, as in vLLM's own cache. Answers are
the same, since the target verifies each token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec, SlidingWindowSpec

from kvstore.errors import SpecError

_WITHOUT_KV: Final = frozenset({"ngram", "ngram_gpu", "suffix", "medusa", "mlp_speculator"})
"""Ways of speculating that keep no KV."""
_OF_A_DRAFT: Final = re.compile(r"(draft_model|mtp)\.")
_NUMBER: Final = re.compile(r"\blayers\.(\d+)\.")


def has_draft(vllm_config: Any) -> bool:
    """Whether a draft model keeps KV.

    Raises:
        SpecError: there may be some, and nobody knows what it holds; or not where it is looked for.
    """
    speculative = vllm_config.speculative_config
    if speculative is None or speculative.method in _WITHOUT_KV:
        return False
    if not (speculative.use_eagle() or speculative.uses_draft_model()):
        raise SpecError(
            f"speculative decoding by {speculative.method!r} may keep KV that this connector does "
            "not know; use EAGLE, MTP, a draft model or ngram, or none"
        )
    stages = vllm_config.parallel_config.pipeline_parallel_size
    if stages > 1:
        raise SpecError(
            f"a draft model on the last of {stages} pipeline stages is not supported; use "
            "--pipeline-parallel-size 1, or leave out --speculative-config"
        )
    return True


def split(vllm_config: Any, group: Any) -> list[tuple[list[str], bool, Any]]:
    """Layers of one of vLLM's groups, whether they are a draft's, and how their KV lies.

    Those of the target come first. Where a draft's KV differs from theirs in size, workers are told
    of both, the scheduler of the target's only: so both go by the draft's configuration.
    """
    names, drafted = list(group.layer_names), list[str]()
    if has_draft(vllm_config):
        own = vllm_config.model_config.get_total_num_hidden_layers()
        drafted = [name for name in names if _is_drafts(name, own)]
    mine = [name for name in names if name not in drafted]
    spec = _common(group.kv_cache_spec, mine or drafted)
    kinds = [(mine, False, spec)] if mine else []
    if drafted:
        kinds.append((drafted, True, _of_the_draft(vllm_config, spec) if mine else spec))
    return kinds


def _is_drafts(name: str, own: int) -> bool:
    """A draft's layers are called so, or counted behind the `own` layers of the target."""
    number = _NUMBER.search(name)
    return bool(_OF_A_DRAFT.match(name)) or (number is not None and int(number[1]) >= own)


def _common(spec: Any, names: Sequence[str]) -> Any:
    """What these layers have in common; the group's, where they differ."""
    each: Mapping[str, Any] = getattr(spec, "kv_cache_specs", {})
    first = each.get(names[0], spec)
    return first if all(each.get(name, spec) == first for name in names) else spec


def _of_the_draft(vllm_config: Any, spec: Any) -> Any:
    speculative = vllm_config.speculative_config
    model = speculative.draft_model_config
    if not isinstance(spec, FullAttentionSpec | SlidingWindowSpec) or model.use_mla:
        return spec
    if speculative.kv_cache_dtype not in (None, vllm_config.cache_config.cache_dtype):
        raise SpecError(
            f"a draft model with a cache of {speculative.kv_cache_dtype} in the target's group is "
            "not supported; leave out kv_cache_dtype of --speculative-config"
        )
    heads, size = model.get_num_kv_heads(speculative.draft_parallel_config), model.get_head_size()
    if isinstance(spec, MLAAttentionSpec):
        return FullAttentionSpec(
            block_size=spec.block_size, num_kv_heads=heads, head_size=size, dtype=spec.dtype
        )
    return replace(spec, num_kv_heads=heads, head_size=size, head_size_v=size)


@dataclass(frozen=True, slots=True)
class Drafting:
    """What the scheduler must know of a draft."""

    ahead: int = 0
    """Tokens behind one that its KV of it has seen."""
    guesses: int = 0
    """Tokens that it proposes in a step."""
    longest: int | None = None
    """A step in which some request has more tokens goes without the draft; None: there is none."""

    @classmethod
    def of(cls, vllm_config: Any) -> Drafting:
        """As the engine's configuration says."""
        if vllm_config is None or not has_draft(vllm_config):
            return cls()
        speculative, guesses = vllm_config.speculative_config, vllm_config.num_speculative_tokens
        room = guesses + speculative.use_dflash()
        longest = speculative.draft_model_config.max_model_len - room
        return cls(vllm_config.num_prefill_lookahead_tokens, guesses, longest)

    @property
    def unsettled(self) -> int:
        """Tokens at the end of those known whose KV is written again: of drafts in a chain, each of
        which sees one token more than the one before it."""
        return max(0, self.ahead - 1)

    def rests(self, output: Any) -> bool:
        """Whether the draft computes nothing in this step of vLLM's."""
        if self.longest is None:
            return False
        cached = output.scheduled_cached_reqs
        computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        computed |= {one.req_id: one.num_computed_tokens for one in output.scheduled_new_reqs}
        scheduled = output.num_scheduled_tokens.items()
        return any(computed[name] + tokens > self.longest for name, tokens in scheduled)
