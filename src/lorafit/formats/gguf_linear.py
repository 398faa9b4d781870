"""Linear attention in GGUF files (Qwen3-Next, Qwen 3.5), whose tensors the converter has changed.

    blk.0.attn_qkv.weight, blk.0.attn_gate.weight    linear_attn.in_proj_qkvz.weight   qwen3next: rows by key head
    blk.0.attn_qkv, attn_gate, ssm_alpha, ssm_beta,  in_proj_qkv, in_proj_z, in_proj_a, in_proj_b, dt_bias,
          ssm_dt, ssm_conv1d, ssm_a                  conv1d, A_log                     qwen35: value heads tiled
    blk.0.ssm_out.weight                             linear_attn.out_proj.weight       qwen35: columns tiled
    blk.0.ssm_a                                      linear_attn.A_log                 minus its exponential
    blk.0.ssm_conv1d.weight (C, K)                   linear_attn.conv1d.weight (C, 1, K)

Each key head serves a group of value heads. transformers has the heads of a group side by side; tiled are the first
head of every group, then the second of every group. Rows keep their order beside the mapped bytes; columns are put in
order block by block, in memory, or unpacked where a head is no whole number of blocks. Source: llama.cpp's conversion
of Qwen3-Next and Qwen 3.5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorafit.errors import ModelError
from lorafit.formats import place
from lorafit.formats.gguf import GgufFile
from lorafit.formats.names import Entry, count, fault
from lorafit.kernels.ops import Stored

TILED = ("qwen3_5_text", "qwen3_5_moe_text")  # model types whose files have their value heads tiled
INTERVAL = 4  # every fourth layer has full attention where the file does not say


@dataclass(frozen=True)
class Heads:
    """Heads of linear attention."""

    keys: int
    values_per_key: int
    key_width: int
    value_width: int

    @property
    def query_key_rows(self) -> int:
        """Rows of q and k together."""
        return 2 * self.keys * self.key_width

    def tiled(self, width: int, start: int = 0) -> np.ndarray:
        """The file's row for each row of value heads of this width, behind `start` rows that lie as they are."""
        heads = np.arange(self.values_per_key * self.keys * width).reshape(self.values_per_key, self.keys, width)
        return np.concatenate([np.arange(start), start + heads.swapaxes(0, 1).reshape(-1)])

    def by_key_head(self) -> np.ndarray:
        """The row of (all q, all k, all v, all z) for each row of q, k, v and z of one key head after another."""
        q = np.arange(self.keys * self.key_width).reshape(self.keys, -1)
        v = np.arange(self.keys * self.values_per_key * self.value_width).reshape(self.keys, -1)
        parts = [q, q + q.size, v + 2 * q.size, v + 2 * q.size + v.size]
        return np.concatenate(parts, axis=1).reshape(-1)


@dataclass(frozen=True, eq=False)
class Tiled(Entry):
    """A parameter of linear attention."""

    rows: np.ndarray | None = None
    """The file's row for each row of the parameter; None where they are the same."""
    columns: np.ndarray | None = None
    """The same of columns."""
    log: bool = False
    """The file holds minus the exponential."""

    def row_order(self) -> np.ndarray | None:
        return self.rows

    def column_order(self) -> np.ndarray | None:
        return self.columns

    def to_file(self, values: Tensor) -> Tensor:
        values = super().to_file(values)
        return -values.exp() if self.log else values.flatten(1) if values.ndim == 3 else values

    def matrix(self, gguf: GgufFile) -> Stored | None:
        found, block = super().matrix(gguf), gguf.tensors[self.tensor].type.elements
        if found is None or self.columns is None:
            return found
        blocks = self.columns.reshape(-1, block) if len(self.columns) % block == 0 else np.zeros((1, 2))
        if (blocks[:, 0] % block).any() or (np.diff(blocks, axis=1) != 1).any():
            return None  # a head is no whole number of blocks
        rows = found.data.view(len(found.data), len(blocks), -1)
        return replace(found, data=rows[:, torch.from_numpy(blocks[:, 0] // block)].flatten(1))

    def load(self, gguf: GgufFile) -> Tensor:
        values = super().load(gguf)
        if self.columns is not None:
            values = values[:, torch.from_numpy(self.columns)]
        if not self.log:
            return values
        if not (values < 0).all():
            raise fault(gguf, self.tensor, "holds a number that is not negative")
        return (-values.double()).log().float()


@dataclass(frozen=True, eq=False)
class Gathered(Entry):
    """in_proj_qkvz, whose rows come from two tensors; `tensor` is the first, and stands for both."""

    parts: tuple[Entry, ...] = ()
    rows: np.ndarray = field(default_factory=lambda: np.arange(0))
    """The row of the parts, one behind the other, for each row of the parameter."""

    def matrix(self, gguf: GgufFile) -> Stored | None:
        """The bytes of both, copied; None where their types differ."""
        first, second = (part.stored(gguf) for part in self.parts)
        if first.format != second.format:
            return None
        return replace(first, data=torch.cat([first.data, second.data]), order=torch.from_numpy(self.rows))

    def load(self, gguf: GgufFile) -> Tensor:
        return torch.cat([part.load(gguf) for part in self.parts])[torch.from_numpy(self.rows)]


def arrange(entries: Mapping[str, Entry], config: Mapping[str, Any], path: Path) -> dict[str, Entry]:
    """The entries with those of linear attention as they lie in the file.

    config: the model's. Raises ModelError for a tensor of another shape than the configuration says.
    """
    found = dict(entries)
    if "linear_num_key_heads" not in config:
        return found
    keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    heads = Heads(keys, values // keys, config["linear_key_head_dim"], config["linear_value_head_dim"])
    value_rows, tiled = values * heads.value_width, config["model_type"] in TILED
    every, one = heads.tiled(heads.value_width), heads.tiled(1)
    mixed = heads.tiled(heads.value_width, heads.query_key_rows)
    orders = {"in_proj_qkv.weight": mixed, "conv1d.weight": mixed, "in_proj_z.weight": every, "in_proj_a.weight": one,
              "in_proj_b.weight": one, "dt_bias": one, "A_log": one}  # fmt: skip
    for name, entry in entries.items():
        module, linear, own = name.partition(".linear_attn.")
        if not linear:
            continue
        if own in orders and entry.shape[0] != len(orders[own]):
            raise _misshaped(path, entry, len(orders[own]))
        rows = orders.get(own) if tiled else None
        if own == "out_proj.weight" and tiled:
            if entry.shape[-1] != value_rows:
                raise _misshaped(path, entry, value_rows)
            found[name] = Tiled(entry.tensor, entry.shape, columns=every)
        elif own == "conv1d.weight":
            found[name] = Tiled(entry.tensor, (entry.shape[0], 1, entry.shape[-1]), rows=rows)
        elif own == "A_log":
            found[name] = Tiled(entry.tensor, entry.shape, rows=rows, log=True)
        elif rows is not None:
            found[name] = Tiled(entry.tensor, entry.shape, rows=rows)
        elif own == "in_proj_qkv.weight":
            other = entries.get(f"{module}.linear_attn.in_proj_z.weight")
            if other is None or other.shape != (value_rows, entry.shape[1]):
                what = "stands without attn_gate" if other is None else f"stands beside {list(other.shape)}"
                raise ModelError(place(path, entry.tensor), what, "convert the model again")
            shape = (entry.shape[0] + value_rows, entry.shape[1])
            del found[name], found[f"{module}.linear_attn.in_proj_z.weight"]
            found[f"{module}.linear_attn.in_proj_qkvz.weight"] = Gathered(
                entry.tensor, shape, parts=(entry, other), rows=heads.by_key_head()
            )
    return found


def _misshaped(path: Path, entry: Entry, wanted: int) -> ModelError:
    what = f"has shape {list(entry.shape)}, and its heads have {wanted} features"
    return ModelError(place(path, entry.tensor), what, "convert the model again")


def with_linear(gguf: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    """What a file says of linear attention, and of heads that are rotated in part, as fields of the configuration.

    Raises ModelError for numbers of heads that do not divide.
    """
    key = f"{gguf.metadata['general.architecture']}.{{}}".format
    keys, values, inner = (count(gguf, key(f"ssm.{name}")) for name in ("group_count", "time_step_rank", "inner_size"))
    for name, total, parts in (("ssm.time_step_rank", values, keys), ("ssm.inner_size", inner, values)):
        if total % parts:
            raise fault(gguf, key(name), f"is {total}, which {parts} heads do not divide")
    interval = count(gguf, key("full_attention_interval"), INTERVAL)
    layers = range(1, config["num_hidden_layers"] + 1)
    rotated = count(gguf, key("rope.dimension_count"), config["head_dim"])
    if rotated > config["head_dim"] or rotated % 2:
        raise fault(gguf, key("rope.dimension_count"), f"is {rotated} of {config['head_dim']} features of a head")
    rope = {**config["rope_parameters"], "partial_rotary_factor": rotated / config["head_dim"]}
    if config["model_type"] in TILED:
        rope |= {"mrope_interleaved": True, "mrope_section": _sections(gguf, key("rope.dimension_sections"), rotated)}
    return {
        "linear_conv_kernel_dim": count(gguf, key("ssm.conv_kernel")),
        "linear_key_head_dim": count(gguf, key("ssm.state_size")),
        "linear_value_head_dim": inner // values,
        "linear_num_key_heads": keys,
        "linear_num_value_heads": values,
        "layer_types": ["linear_attention" if layer % interval else "full_attention" for layer in layers],
        "rope_parameters": rope,
    }


def _sections(gguf: GgufFile, key: str, rotated: int) -> list[int]:
    """How many frequencies follow time, height and width, which are one number for a text's token."""
    found = gguf.metadata.get(key)
    if not isinstance(found, list) or len(found) < 3 or not all(type(part) is int and part >= 0 for part in found[:3]):
        raise fault(gguf, key, f"holds no three numbers for {rotated} rotated features")
    return found[:3]
