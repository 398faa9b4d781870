"""Dropout whose mask is a function of the place, not of a random generator's history.

Each element's fate is a hash of (seed, step, row, position in the row) and (module, feature). So the mask does not
depend on how rows were packed or cut into micro-batches, a recomputed layer draws the same mask again, and a resumed
run needs no random state. Source: ours; the mixing function is splitmix64's finaliser (Steele et al. 2014, OOPSLA).
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn

_M1, _M2 = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15  # 0xbf58476d1ce4e5b9, 0x94d049bb133111eb as signed 64 bit
_GOLDEN = -0x61C8864680B583EB  # 0x9e3779b97f4a7c15


def mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser on int64, element by element (products wrap, shifts are logical)."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _M1
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _M2
    return x ^ ((x >> 31) & (2**33 - 1))


class Places:
    """Where the tokens of the current forward pass stand. `keys_T` is None where nobody said (then no place rules)."""

    def __init__(self) -> None:
        self.keys_T: Tensor | None = None

    def set(self, seed: int, step: int, rows_T: Tensor, positions_T: Tensor) -> None:
        """Name the tokens about to pass: rows_T and positions_T (T,) int64, row numbers in the data set."""
        key = mix(torch.tensor([seed], dtype=torch.int64) + _GOLDEN)
        for part in (torch.tensor([step], dtype=torch.int64), rows_T, positions_T):
            key = mix(key + _GOLDEN + part)
        self.keys_T = key


class PlacedDropout(nn.Module):
    """Inverted dropout: elements are zeroed with probability p and the rest divided by 1 - p; identity in eval mode."""

    def __init__(self, p: float = 0.0, module: str = "", places: Places | None = None) -> None:
        super().__init__()
        self.p, self.places = p, places
        self.module_key = zlib.crc32(module.encode())

    @property
    def active(self) -> bool:
        """Whether anything is dropped now."""
        return self.p > 0.0 and self.training

    def forward(self, x: Tensor) -> Tensor:
        if not self.active:
            return x
        if self.places is None or self.places.keys_T is None:
            return torch.nn.functional.dropout(x, self.p)
        features_I = mix(torch.arange(x.shape[-1]) + (self.module_key << 32))
        hashed_TI = mix(self.places.keys_T[:, None] ^ features_I)
        kept_TI = (hashed_TI & (2**24 - 1)) >= int(self.p * 2**24)
        return x * kept_TI.view_as(x).to(x.dtype) / (1 - self.p)
