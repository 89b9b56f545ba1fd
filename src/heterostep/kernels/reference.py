"""Plain PyTorch row moves, right on every device.

Shapes: B batch, N tokens, n active tokens, H heads, D head dim, ... whatever a row holds.
"""

from __future__ import annotations

import torch


def gather_rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows of the active tokens: [B or 1, N, ...] at int64 [B, n] -> [B, n, ...]."""
    if x.shape[0] == 1:
        return x[0][index]
    return x[torch.arange(x.shape[0], device=x.device)[:, None], index]


def write_rows(store: torch.Tensor, index: torch.Tensor, rows: torch.Tensor) -> None:
    """Write rows [B, H, n, D] into `store` [B, H, N, D] at int64 [B, n], in place."""
    for sample in range(store.shape[0]):
        store[sample].index_copy_(1, index[sample], rows[sample])
