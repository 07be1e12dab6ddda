"""Whether a live model still computes what it did when it was named, and what its weights hash to.

torch counts what is written to a tensor in place, but neither what is written through `.data` or
numpy nor what is written to tensors made in inference mode. So some of the values are compared as
well: at least one of every row, all of a tensor without a count. That costs less than a token.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any, Final

import torch
from torch.nn.modules import module as torch_modules
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.weak import WeakIdRef
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvstore import _native
from kvstore.connectors.transformers.contents import Contents, own
from kvstore.errors import SpecError

_PLAIN: Final = (torch.Tensor, torch.nn.Parameter, getattr(torch.nn, "Buffer", torch.Tensor))


def unfit(model: Any, held: Contents) -> str:
    """Why `model` computes something now that no name of it covers; empty if it does not.

    `held` is what it holds now.
    """
    if mode := moded(model.device.type):
        return mode
    configs = [model.config.get_text_config(decoder=True)]
    configs += [vars(module)["config"] for module in model.modules() if "config" in vars(module)]
    for kind in {getattr(config, "_attn_implementation", None) for config in configs}:
        for functions in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
            if not own(functions.get(kind)):
                return f"the attention function {kind!r} is not one of transformers"
    if replaced := held.replaced():
        return f"{replaced} was replaced"
    every = torch_modules._global_forward_hooks, torch_modules._global_forward_pre_hooks
    hooked = [("all modules", hooks) for hooks in every]
    for place, module in model.named_modules():
        name = place or "the model"
        if module.training:
            return f"{name} is in training mode, where dropout changes KV; call model.eval()"
        forward = vars(module).get("forward")
        forward = getattr(forward, "_torchdynamo_orig_callable", forward)  # compiled, but its own
        if forward and getattr(forward, "__func__", None) is not type(module).forward:
            return f"the forward of {name} was replaced"
        hooked += [(name, module._forward_hooks), (name, module._forward_pre_hooks)]
    for name, hooks in hooked:
        if not all(own(hook) for hook in hooks.values()):
            return f"a hook on {name} may change values"
    return ""


def moded(device: str) -> str:
    """Why all that torch computes on a kind of device now is another thing; empty if it is not."""
    if torch.is_autocast_enabled(device):
        return "autocast computes with numbers of another type than the model's"
    modes = [*_get_current_dispatch_mode_stack(), *_get_current_function_mode_stack()]
    if not all(own(type(mode)) for mode in modes):
        return "a mode of torch may change values"
    return ""


def precision(model: Any) -> str:
    """What float32 matrices are rounded to when multiplied; empty if they are not."""
    kind = model.device.type
    backend = getattr(torch.backends, "mkldnn" if kind == "cpu" else kind, None)
    found = getattr(getattr(backend, "matmul", None), "fp32_precision", "none")
    return "" if found in ("none", "ieee") else str(found)


def adapter_identity(model: torch.nn.Module) -> str:
    """Which adapters are at work, how strongly, and a hash of all adapters; empty for none."""
    # Those of peft, which may not be there.
    modules = model.named_modules()
    layers: list[tuple[str, Any]] = [m for m in modules if hasattr(type(m[1]), "merged_adapters")]
    states, lines = set(), []
    for place, layer in layers:
        names = [] if layer.disable_adapters else list(layer.active_adapters)
        scaling = getattr(layer, "scaling", {})
        state = [f"{name}*{scaling.get(name, 1.0)!r}" for name in names]
        states.add(",".join(state + [f"{name} merged" for name in layer.merged_adapters]))
        held = Contents(layer, without="base_layer")
        lines += [line_of(f"{place}.{name}", tensor) for name, tensor in held.tensors.items()]
        lines += [f"{place}.{name} {told}" for name, told in held.told.items()]
    text = "; ".join(sorted(states - {""}))
    return f"{text} {sha256(repr(sorted(lines)).encode())[:16]}" if text else ""


def mark(tensor: torch.Tensor) -> tuple[object, ...]:
    """What a tensor keeps as long as it is not changed."""
    count = None if tensor.is_inference() else tensor._version
    kept = WeakIdRef(tensor), tensor.dtype, tensor.shape, tensor.device, count
    if not is_plain(tensor):
        return kept
    step = 1 if count is None or tensor.ndim < 2 else _step(tensor.numel(), tensor.shape[-1])
    sample = tensor.detach().reshape(-1)[::step].contiguous().view(torch.uint8).cpu()
    seen = _native.xxh3_64(sample.data_ptr(), sample.numel())
    return *kept, tensor.data_ptr(), tensor.stride(), seen


def _step(count: int, width: int) -> int:
    """A step through that many numbers by which each row and each column is seen."""
    step = max(1, min(width - 1, count // max(1, width)))
    while math.gcd(step, width) > 1:
        step -= 1
    return step


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether all that a tensor is lies in its bytes."""
    dense = tensor.layout == torch.strided and not tensor.is_quantized
    return type(tensor) in _PLAIN and dense and not tensor.is_meta


def line_of(name: str, value: Any) -> str:
    """What tells a tensor, or other entry of a checkpoint, from all others.

    Raises:
        SpecError: nothing does.
    """
    if not isinstance(value, torch.Tensor):
        if isinstance(value, (bool, int, float, str, torch.dtype, type(None))):
            return f"{name} {value!r}"
    elif is_plain(value):
        raw = value.detach().to("cpu").contiguous().flatten().view(torch.uint8).numpy()
        return f"{name} {value.dtype} {tuple(value.shape)} {sha256(raw.data)}"
    raise SpecError(
        f"the bytes of weight {name} ({type(value).__name__}) cannot be read to tell its model "
        "from others; pass revision="
    )


def sha256(data: Any) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(data).hexdigest()
