"""Outlines of models of the Llama family, by their sizes alone."""

from __future__ import annotations

from lorafit.planning.outline import Outline, of_shapes


def llama(
    layers: int, hidden: int, mlp: int, *, heads: int, key_heads: int | None = None, dim: int | None = None,
    vocabulary: int = 32000, tied: bool = False, kind: str = "llama", **options: object,
) -> Outline:  # fmt: skip
    """The outline of such a model in 16 bits; options: of `of_shapes`."""
    key_heads, dim = key_heads or heads, dim or hidden // heads
    config = {
        "model_type": kind, "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": key_heads, "head_dim": dim, "vocab_size": vocabulary,
        "tie_word_embeddings": tied, "max_position_embeddings": 8192,
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    norms = ["input_layernorm", "post_attention_layernorm"]
    if kind == "gemma3_text":
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    for n in range(layers):
        layer = f"model.layers.{n}."
        shapes |= {f"{layer}{norm}.weight": (hidden,) for norm in norms}
        if kind in ("gemma3_text", "qwen3"):
            shapes |= {f"{layer}self_attn.{norm}.weight": (dim,) for norm in ("q_norm", "k_norm")}
        for name, rows in (("q", heads * dim), ("k", key_heads * dim), ("v", key_heads * dim)):
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (rows, hidden)
        shapes[f"{layer}self_attn.o_proj.weight"] = (hidden, heads * dim)
        shapes |= {f"{layer}mlp.{name}_proj.weight": (mlp, hidden) for name in ("gate", "up")}
        shapes[f"{layer}mlp.down_proj.weight"] = (hidden, mlp)
    shapes["model.norm.weight"] = (hidden,)
    if not tied:
        shapes["lm_head.weight"] = (vocabulary, hidden)
    return of_shapes(config, shapes, **options)
