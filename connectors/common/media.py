"""What a model is given of an image or the like, by its content."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def feed(h: Any, value: Any) -> bool:
    """Add a value to a hash (`h.update`), so that no two look alike; False: it cannot be."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        value = torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, torch.Tensor):
        h.update(f"tensor {value.dtype} {tuple(value.shape)};".encode())
        h.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, (list, tuple)):
        h.update(f"list {len(value)};".encode())
        return all(feed(h, item) for item in value)
    elif value is None or isinstance(value, (bool, int, float, str)):
        text = repr(value).encode("utf-8", "surrogatepass")
        h.update(f"value {len(text)};".encode() + text)
    else:
        return False
    return True
