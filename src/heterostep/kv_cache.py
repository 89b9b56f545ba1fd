"""Keys and values of all tokens, kept over steps; active tokens overwrite their rows.

Shapes: B batch, N tokens, n active tokens, H heads, D head dim.
"""

from __future__ import annotations

import torch

from heterostep.kernels import write_rows


class KVCache:
    """One attention layer's K/V for one guidance branch, stored [B, H, N, D]: attention backends read that uncopied."""

    def __init__(self) -> None:
        self._keys: torch.Tensor | None = None
        self._values: torch.Tensor | None = None

    def update(
        self, key: torch.Tensor, value: torch.Tensor, index: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the rows of the active tokens and return everyone's K and V.

        Args:
            key, value: [B, n, H, D]; n = N where `index` is None.
            index: the active tokens, int64 [B, n]; None where all are.

        Returns:
            K and V of all tokens, [B, N, H, D].
        """
        if index is None:
            # New tensors rather than a write into the old ones: compiled code need not ask whether there are any.
            self._keys = key.transpose(1, 2).contiguous()
            self._values = value.transpose(1, 2).contiguous()
            return key, value
        if self._keys is None or self._values is None:
            raise RuntimeError("a sparse step needs a dense one before it: the K/V cache is empty")
        write_rows(self._keys, index, key.transpose(1, 2))
        write_rows(self._values, index, value.transpose(1, 2))
        return self._keys.transpose(1, 2), self._values.transpose(1, 2)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.numel() * t.element_size() for t in (self._keys, self._values) if t is not None)

    def reset(self) -> None:
        """Free the memory."""
        self._keys = self._values = None


class StaticKV:
    """K/V that are the same at every step (of the text, of a given image): computed once, then kept.

    Attributes:
        tensors: whatever the attention made of them; None until it has.
    """

    def __init__(self) -> None:
        self.tensors: tuple[torch.Tensor, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.numel() * t.element_size() for t in self.tensors or ())

    def reset(self) -> None:
        """Free the memory."""
        self.tensors = None
