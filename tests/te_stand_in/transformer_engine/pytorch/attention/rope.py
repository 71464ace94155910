"""The fused rotary embedding."""

from typing import Any

import torch


def apply_rotary_pos_emb(t: torch.Tensor, freqs: torch.Tensor, **more: Any) -> torch.Tensor:
    first, second = t.chunk(2, -1)
    return t * freqs.cos().to(t.dtype) + torch.cat((-second, first), -1) * freqs.sin().to(t.dtype)
