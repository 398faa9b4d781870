"""Which models we know, by the model_type of their configuration, and what a multimodal one calls its text part.

A multimodal model (Gemma 3, Llama 4, Mistral Small, Qwen 3.5, ...) is loaded as the text model inside it: its vision
tower is neither read nor changed. In the model's own files, and in those of PEFT, the text part's modules have longer
paths, since the tower has a q_proj too:

    own path                        in transformers' wrapper, and in an adapter's file
    model.layers.0.mlp.up_proj      model.language_model.layers.0.mlp.up_proj        (llama4: language_model.model....)
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

from lorafit.errors import ModelError

TEXT = (
    "llama", "smollm3", "granite", "phi3", "olmo2", "olmo3",
    "mistral", "ministral", "ministral3",
    "qwen2", "qwen3", "qwen3_5_text",
    "gemma3_text", "gemma4_text",
)  # fmt: skip
"""Dense text models."""

MOE = (
    "qwen3_moe", "qwen3_next", "qwen3_5_moe_text", "mixtral", "mistral4", "deepseek_v3", "gpt_oss", "llama4_text",
    "qwen2_moe", "olmoe", "granitemoe",
)  # fmt: skip
"""Text models with experts; gemma4_text has some where its configuration says so."""

IMAGE_TEXT = ("mistral4",)  # text models that transformers lists with the multimodal ones alone
LINEAR_ATTENTION = ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next")
LENGTH_DEPENDENT = ("dynamic", "longrope")  # kinds of rotary scaling that depend on the longest position at hand


@dataclass(frozen=True)
class Wrapper:
    """A multimodal model: the model_type of its text part where its configuration leaves that out, and the paths that
    its text part's modules have there."""

    text: str
    paths: tuple[tuple[str, str], ...] = (("model.", "model.language_model."), ("lm_head", "lm_head"))
    """Beginnings of the text model's own paths, and of the same modules' in transformers' wrapper."""


WRAPPERS = {
    "gemma3": Wrapper("gemma3_text"),
    "gemma4": Wrapper("gemma4_text"),
    "mistral3": Wrapper("mistral"),
    "qwen3_5": Wrapper("qwen3_5_text"),
    "qwen3_5_moe": Wrapper("qwen3_5_moe_text"),
    "llama4": Wrapper(
        "llama4_text", (("model.", "language_model.model."), ("lm_head", "language_model.lm_head"))
    ),
}  # fmt: skip

TEXT_PREFIXES = (  # of a file's tensors, and what they begin with in the text model
    ("model.language_model.lm_head.", "lm_head."),
    ("model.language_model.model.", "model."),
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)
OTHER_PREFIXES = (  # of tensors beside the text part: towers, projectors, heads that predict several tokens
    "vision_tower.", "vision_model.", "visual.", "multi_modal_projector.", "embed_vision.", "audio_tower.",
    "embed_audio.", "mtp.",
)  # fmt: skip


ASIDE = (  # fields that say nothing of the model
    "quantization_config", "auto_map", "architectures", "transformers_version", "torch_dtype", "dtype", "_name_or_path",
)  # fmt: skip


def text_config(config: dict[str, Any], place: str, known: tuple[str, ...]) -> dict[str, Any]:
    """The text part's configuration, `model_type` in it; a text model's own configuration is that already. What is
    `ASIDE` is left out.

    known: model types that can be loaded. Raises ModelError, naming the nearest known type, for another one, and for
    one that is no language model.
    """
    kind = config.get("model_type")
    if kind not in WRAPPERS:
        _check_kind(kind, f"{place}: model_type", (*known, *WRAPPERS))
        _check_class(config, place)
        _check_fields(config, place)
        return plain(config)
    inner = config.get("text_config", {})
    if not isinstance(inner, dict):
        raise ModelError(f"{place}: text_config", f"is {str(inner)[:40]!a}, not an object", "download the model again")
    inner = {"model_type": WRAPPERS[kind].text, **inner}
    _check_kind(inner["model_type"], f"{place}: text_config.model_type", known)
    _check_class(config, place)
    _check_fields(inner, place)
    if "tie_word_embeddings" in config:  # the wrapper has the head
        inner["tie_word_embeddings"] = config["tie_word_embeddings"]
    return plain(inner)


def plain(config: dict[str, Any]) -> dict[str, Any]:
    """The fields that describe the model."""
    return {key: value for key, value in config.items() if key not in ASIDE}


def _check_kind(kind: Any, place: str, known: tuple[str, ...]) -> None:
    if kind not in known:
        near = difflib.get_close_matches(str(kind), known, 1)
        remedy = f"the nearest supported one is {near[0]}" if near else f"supported: {', '.join(known)}"
        raise ModelError(place, f"{str(kind)[:60]!r} is not supported yet", remedy)


def _check_fields(config: dict[str, Any], place: str) -> None:
    """Refuses what a model_type allows and we do not compute."""
    if config.get("attn_logit_softcapping"):
        what = f"is {config['attn_logit_softcapping']}: capped attention scores are not supported yet"
        raise ModelError(f"{place}: attn_logit_softcapping", what, "use a model without")
    if config.get("use_bidirectional_attention") not in (None, False, "vision"):  # of images, which are no rows here
        what = "tokens see those after them, which is no language model"
        raise ModelError(f"{place}: use_bidirectional_attention", what, "use a causal model")


def _check_class(config: dict[str, Any], place: str) -> None:
    """Refuses a classifier or an encoder made of a language model, whose file has another head or none."""
    classes = config.get("architectures") or []
    named = [str(one) for one in classes] if isinstance(classes, list) else [str(classes)]
    if named and not any(one.endswith(("ForCausalLM", "ForConditionalGeneration")) for one in named):
        what = f"{named[0][:60]!r} is no language model"
        raise ModelError(f"{place}: architectures", what, "give a model whose class ends in ForCausalLM")


def own_name(tensor: str) -> str | None:
    """What the text model calls a file's tensor; None for one that is no part of the text model."""
    if tensor.removeprefix("model.").startswith(OTHER_PREFIXES):
        return None
    for theirs, own in TEXT_PREFIXES:
        if tensor.startswith(theirs):
            return own + tensor[len(theirs) :]
    return tensor


def unpackable(config: dict[str, Any]) -> str:
    """Why several rows cannot lie in one sequence without changing each other, or "" where they can."""
    if config.get("model_type") in LINEAR_ATTENTION:
        return "its linear attention carries a state from row to row"
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kinds = {scaling.get("rope_type", scaling.get("type"))} if isinstance(scaling, dict) else set()
    found = kinds.intersection(LENGTH_DEPENDENT)
    return f"its rotary scaling {found.pop()} depends on the longest row of a pack" if found else ""
