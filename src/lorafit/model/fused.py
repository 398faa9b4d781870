"""Families whose decoder layers we compute ourselves: their layers are recognised, and instances replaced by ours.

The original stays inside, with the same children under the same names: it decodes with a cache, and whatever else ours
does not do. Nothing of transformers is patched; a family that is not in the table keeps its own layers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lorafit.adapter.group import Group, stack
from lorafit.adapter.lora import BiasLinear, LoraLinear
from lorafit.frozen.linear import FrozenLinear
from lorafit.kernels import layer as parts
from lorafit.kernels.attention import Rules
from lorafit.model.buffers import give
from lorafit.model.head import decoder_of
from lorafit.model.layer import Layer, LayerFunction, Norm, Norms, Shape, norm_gradient, used_up

ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}  # a configuration's name, and ours
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
FUSED_TYPES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "smollm3",
    "granite",
    "gemma3_text",
)  # a configuration's model_type
FAMILIES = {  # of a decoder layer's class: what its norms add to their weights
    "LlamaDecoderLayer": 0.0,
    "MistralDecoderLayer": 0.0,
    "Qwen2DecoderLayer": 0.0,
    "Qwen3DecoderLayer": 0.0,
    "SmolLM3DecoderLayer": 0.0,
    "GraniteDecoderLayer": 0.0,
    "Gemma3DecoderLayer": 1.0,
}


def fuse(model: nn.Module) -> int:
    """Replace the layers and the last norm of a model of a family that we know; the number of layers replaced."""
    backbone = decoder_of(model)
    known = [(index, layer) for index, layer in enumerate(backbone.layers) if _is_known(layer)]
    for index, layer in known:
        backbone.layers[index] = FusedLayer(layer)
    if known:
        backbone.norm = FusedNorm(backbone.norm, FAMILIES[type(known[0][1]).__name__])
    return len(known)


def _is_known(layer: nn.Module) -> bool:
    """Whether this very layer is one that FusedLayer computes: its class, its activation, its matrices."""
    if type(layer).__name__ not in FAMILIES or not type(layer).__module__.startswith("transformers."):
        return False
    attention: Any = layer.self_attn
    mlp = layer.mlp
    linear = [getattr(attention, name, None) for name in ATTENTION] + [getattr(mlp, name, None) for name in MLP]
    return all(isinstance(one, FrozenLinear) for one in linear) and _activation(attention.config) in ACTIVATIONS


def _activation(config: Any) -> str:
    return str(getattr(config, "hidden_activation", None) or config.hidden_act)


class FusedLayer(nn.Module):
    """A decoder layer of transformers with the same children, computed by `Layer` where no cache is involved."""

    gradient_checkpointing = False  # as transformers names it: keep the input alone
    turn: Callable[[int], None] | None = None  # what model/paging.py does as the layer's turn comes, on the way 1 or -1

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        for name, child in layer.named_children():
            self.add_module(name, child)
        self._original = (layer,)  # in a tuple: its children are registered here already
        self._offset = FAMILIES[type(layer).__name__]
        attention: Any = self.self_attn
        config, dim = attention.config, attention.head_dim
        windowed = config if type(layer).__name__ == "MistralDecoderLayer" else attention
        self._rotates = bool(getattr(attention, "use_rope", True))
        self._shape = Shape(
            heads=attention.q_proj.out_features // dim,
            key_heads=attention.k_proj.out_features // dim,
            dim=dim,
            rules=Rules(attention.scaling, getattr(windowed, "sliding_window", None)),
            activation=ACTIVATIONS[_activation(config)],
            residual=getattr(layer, "residual_multiplier", 1.0),
        )
        stack([getattr(attention, name).weight for name in ATTENTION[:3]])
        stack([getattr(self.mlp, name).weight for name in MLP[:2]])

    def forward(self, hidden_states: Tensor, *arguments: Any, **named: Any) -> Tensor:
        """hidden_states (B, L, H); of the rest, position_embeddings and documents are taken, others not needed."""
        if self.turn is not None:
            self.turn(1)
        angles = named.get("position_embeddings")
        cached = named.get("past_key_values") is not None
        if arguments or angles is None or cached or not self._fits(angles[0]):
            return self._by_original(hidden_states, *arguments, **named)
        rows, length, width = hidden_states.shape
        documents = named.get("documents") or tuple(range(0, rows * length + 1, length))
        cos, sin = (_half(angle, rows) for angle in angles)
        trains = torch.is_grad_enabled() and (hidden_states.requires_grad or _trains(self))
        chained = self.training and trains and "documents" in named  # our own training step
        layer = self._layer(cos, sin, documents, chained or not trains, chained)
        keeps = not (self.gradient_checkpointing and self.training)
        x = hidden_states.reshape(-1, width).contiguous()
        if not trains:
            y, _ = layer.forward(x, keeps=False)
            return y.view(hidden_states.shape)
        y = LayerFunction.apply(x, layer, keeps, *layer.parameters)
        return y.view(hidden_states.shape)

    def _by_original(self, *arguments: Any, **named: Any) -> Tensor:
        """The original's output, computed twice where this layer is to be."""
        original: Any = self._original[0]
        original.training, original.gradient_checkpointing = self.training, self.gradient_checkpointing
        if self.gradient_checkpointing:
            original._gradient_checkpointing_func = self._gradient_checkpointing_func
        result: Tensor = original(*arguments, **named)
        turn = self.turn
        if turn is not None and result.requires_grad:
            result.register_hook(lambda _: turn(-1))
        return result

    def _fits(self, cos: Tensor) -> bool:
        """Whether the whole of each head is rotated, every matrix is ours, dropout, if any, knows its places, and no
        hook waits for a module that is not called."""
        linear = [getattr(self.self_attn, name) for name in ATTENTION] + [getattr(self.mlp, name) for name in MLP]
        adapted = [layer for layer in linear if isinstance(layer, LoraLinear) and layer.enabled]
        bases = [layer.base if isinstance(layer, BiasLinear) else layer for layer in linear]
        drops = [layer.adapter.dropout for layer in adapted]
        return (
            cos.shape[-1] == self._shape.dim
            and all(isinstance(base, FrozenLinear) for base in bases)
            and all(not drop.active or (drop.places is not None and drop.places.keys_T is not None) for drop in drops)
            and not any(_is_hooked(module) for child in self.children() for module in child.modules())
        )

    def _layer(self, cos: Tensor | None, sin: Tensor | None, documents: tuple[int, ...], *owns: bool) -> Layer:
        attention, mlp = self.self_attn, self.mlp
        q, k, v, o = (getattr(attention, name) for name in ATTENTION)
        gate, up, down = (getattr(mlp, name) for name in MLP)
        if not self._rotates:
            cos = sin = None
        groups = Group([q, k, v]), Group([o]), Group([gate, up]), Group([down])
        pooled, chained = owns
        return Layer(*groups, self._norms(), self._shape, cos, sin, documents, pooled, chained, self.turn)

    def _norms(self) -> Norms:
        def norm(owner: Any, name: str) -> Norm | None:
            module = getattr(owner, name, None)
            return None if module is None else norm_of(module, self._offset)

        attention = norm(self, "input_layernorm")
        after, before = norm(self, "post_attention_layernorm"), norm(self, "pre_feedforward_layernorm")
        mlp = after if before is None else before  # where blocks are normed behind, too, `after` is the attention's
        assert attention is not None and mlp is not None, "a decoder layer has two norms"  # noqa: PT018
        q, k = (norm(self.self_attn, name) for name in ("q_norm", "k_norm"))
        if before is None:
            return Norms(attention, mlp, q, k)
        return Norms(attention, mlp, q, k, after, norm(self, "post_feedforward_layernorm"))


class FusedNorm(nn.Module):
    """The last norm of a model, with its parameter under the same name."""

    def __init__(self, norm: nn.Module, offset: float) -> None:
        super().__init__()
        self.weight: nn.Parameter = norm.weight  # type: ignore[assignment]
        self._eps, self._offset = _eps(norm), offset

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _NormFunction.apply(
            x.reshape(-1, x.shape[-1]).contiguous(), self.weight.float() + self._offset, self._eps
        )
        return y.view(x.shape)


class _NormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y = torch.empty_like(x)
        ctx.kept = x, weight, parts.norm(x, weight, eps, y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scale = used_up(ctx)
        d_weight = norm_gradient(dy, x, scale) if ctx.needs_input_grad[1] else None
        dx = parts.norm_backward(dy.clone(memory_format=torch.contiguous_format), x, weight, scale)
        give(x)
        return dx, d_weight, None


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _is_hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def norm_of(module: nn.Module, offset: float) -> Norm:
    """A norm of transformers as it multiplies; offset: what the family adds to its weight."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return Norm(weight.float() + offset, _eps(module))


def _eps(norm: nn.Module) -> float:
    return float(getattr(norm, "variance_epsilon", None) or norm.eps)  # type: ignore[arg-type]


_halves: deque[tuple[Tensor, int, Tensor]] = deque(maxlen=4)  # cos and sin of two kinds of layers


def _half(angle_BLD: Tensor, rows: int) -> Tensor:
    """cos or sin of each token's pairs, (B L, D / 2) fp32: the second half repeats the first. All layers share one."""
    for angle, count, half in _halves:
        if angle is angle_BLD and count == rows:
            return half
    length, dim = angle_BLD.shape[1:]
    half = angle_BLD[..., : dim // 2].expand(rows, length, dim // 2).reshape(-1, dim // 2).float().contiguous()
    _halves.append((angle_BLD, rows, half))
    return half
