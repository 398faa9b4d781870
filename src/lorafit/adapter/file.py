"""An adapter's folder in PEFT's layout: written whole, and read strictly.

    adapter_config.json          PEFT's keys: r, lora_alpha, target_modules, ...
    adapter_model.safetensors    base_model.model.PATH.lora_A.weight (r, in), ....lora_B.weight (out, r)
    lorafit.json                 ours: fingerprints of base, tokenizer, template and data
    README.md                    model card

and of other kinds PATH.lora_magnitude_vector (DoRA), PATH.base_layer.bias (trained biases), PATH.lora_embedding_A and
_B, PATH.weight (an embedding or head trained whole), PATH.token_adapter.trainable_tokens_delta (rows of some tokens).
Those of experts are in peft_experts.py. Nothing from a file is compiled or run. Source: PEFT 0.21's saved files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lorafit.adapter import peft_experts
from lorafit.adapter.attach import adapted, own_bias, put_adapter
from lorafit.adapter.card import model_card
from lorafit.adapter.dropout import Places
from lorafit.adapter.experts import LoraStack
from lorafit.adapter.lora import Adapted
from lorafit.adapter.peft_config import (
    alpha_of,
    by_file_path,
    method_of,
    own_path,
    peft_config,
    rank_of,
    read_config,
    read_json,
    token_indices,
)
from lorafit.adapter.read import PREFIX, ROWS, read_layers
from lorafit.adapter.variants.pissa import PissaAdapter
from lorafit.adapter.variants.vocabulary import TokenEmbedding, WholeEmbedding, WholeLinear, matrix_of
from lorafit.adapter.vocabulary import new_tokens, put_rows, put_whole, tied
from lorafit.errors import AdapterError
from lorafit.formats.folders import commit
from lorafit.formats.safetensors import write_safetensors
from lorafit.frozen.fingerprint import difference, fingerprint

TEMPLATE_FILE = "chat_template.jinja"  # only where training used another template than the model's
FILES = ("adapter_config.json", "adapter_model.safetensors", "lorafit.json", "README.md", TEMPLATE_FILE)


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    about: Mapping[str, Any] | None = None,
    experts: Literal["fused", "split"] = "fused",
) -> None:
    """Write the adapter on `model` into `folder`, which PEFT and lorafit.load_adapter read.

    about: facts for lorafit.json and the model card (`base_model`, `tokenizer`, `template`, `data`, `figures`), and
    `chat_template`, the source of a template that is not the model's own. experts: the layout of adapters on experts,
    a pair of tensors for all of them or for each (peft_experts.py).
    An older adapter there is replaced. Raises AdapterError when the model has no adapter or `folder` holds other files,
    which would be lost, or for "split" where other programs do not know it; ConfigError when the disk refuses.
    """
    folder, about = Path(folder).resolve(), dict(about or {})
    others = sorted({path.name for path in folder.iterdir()} - set(FILES)) if folder.is_dir() else []
    if others:
        raise AdapterError(str(folder), f"holds {others[0]}, which is no adapter's file", "name another folder")
    layers = by_file_path(model, adapted(model))
    if not layers:
        raise AdapterError(str(folder), "the model has no adapter", "attach one first")
    if experts == "split" and (whose := peft_experts.fused_only(model)):
        raise AdapterError(str(folder), f"the experts of {whose} are known as a whole only", 'give experts="fused"')
    tensors = {
        f"{PREFIX}{path}.{end}": tensor.detach().clone()  # of a tied pair both names have a tensor
        for path, layer in layers.items()
        if not isinstance(layer, LoraStack)
        for end, tensor in layer.tensors().items()
    }
    kind = str(getattr(getattr(model, "config", None), "model_type", ""))
    of_experts = peft_experts.split_tensors(layers, kind) if experts == "split" else peft_experts.fused_tensors(layers)
    tensors |= {f"{PREFIX}{name}": tensor for name, tensor in of_experts}
    config = peft_config(model, str(about.get("base_model", "")))
    if experts == "split":
        peft_experts.name_split(config, layers, kind)
    ours: dict[str, Any] = {key: about[key] for key in ("tokenizer", "template", "data") if key in about}
    ours |= {"base": fingerprint(model), "method": method_of(model)}
    if new_tokens(model):
        ours["new_tokens"] = list(new_tokens(model))

    def write(temporary: Path) -> None:
        (temporary / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        write_safetensors(temporary / "adapter_model.safetensors", tensors)
        (temporary / "lorafit.json").write_text(json.dumps(ours, indent=1, sort_keys=True) + "\n")
        (temporary / "README.md").write_text(
            model_card(ours["method"], config, about, new_tokens(model)), encoding="utf-8"
        )
        if about.get("chat_template"):
            (temporary / TEMPLATE_FILE).write_text(about["chat_template"], encoding="utf-8")

    commit(folder, write, manifest=False)


def load_adapter(model: nn.Module, folder: str | Path) -> list[str]:
    """Put the adapter in `folder` on `model` and return notes for the user, such as "same weights in another format".

    The model's other parameters are frozen. Strict: raises AdapterError (or Faults with one line per tensor) for
    anything renamed, missing, extra, non-finite, of a wrong dtype, rank or shape, or made for another base, and then
    the model is as it was.
    """
    folder = Path(folder)
    if adapted(model):
        raise AdapterError(str(folder), "cannot be put on a model that has an adapter", "load it on the plain model")
    config = read_config(folder)
    notes = _check_base(model, folder)
    own = tokens_of(folder)
    if own != new_tokens(model):
        what = f"adds {len(own)} tokens that the model's tokenizer was not given"
        raise AdapterError(str(folder), what, "open both with lorafit.load(MODEL, adapter=...)")
    found = read_layers(folder, model, config)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    places = Places()
    for path, tensors in found.items():
        _put(model, path, tensors, config, places)  # a file's path
    _tie(model)
    model.lora_places, model.lora_init = places, "default"  # type: ignore[assignment]
    return notes


@torch.no_grad()
def _put(model: nn.Module, path: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any], places: Places) -> None:
    """Train one layer as the file says, from what it holds; path: the file's."""
    own = own_path(model, path)
    if "weight" in tensors:
        layer: Adapted = put_whole(model, own)
    elif ROWS in tensors:
        ids = token_indices(config)[path.rsplit(".", 1)[-1]]
        layer = put_rows(model, own, ids, new=len(new_tokens(model)))
    elif "bias" in tensors:
        layer = own_bias(model, own)
    else:
        kind = {key: bool(config.get(key)) for key in ("use_rslora", "use_dora")}
        pissa = config.get("init_lora_weights") == "pissa"
        rank, alpha = rank_of(config, path), alpha_of(config, path)
        times = tensors["lora_A.weight"].shape[-2] // rank if "lora_A.weight" in tensors else 1  # gate and up as one
        alpha *= math.sqrt(times) if kind["use_rslora"] else times
        put_adapter(model, own, rank * times, alpha, 0.0, places, pissa=pissa, **kind)
        found: Any = model.get_submodule(own)
        if isinstance(found.adapter, PissaAdapter):  # PEFT takes the start out of the base when it loads such a file
            found.adapter.start_from(matrix_of(found.base), torch.Generator(), exact=True)
        layer = own_bias(model, own) if "base_layer.bias" in tensors else found
    for end, parameter in layer.parts().items():
        parameter.copy_(tensors[end])


def _tie(model: nn.Module) -> None:
    """Of a tied pair: the head takes the embedding's trained rows, or its whole matrix where both are the same."""
    one = tied(model)
    if not one:
        return
    embedding, head = (model.get_submodule(path) for path in one)
    if isinstance(embedding, TokenEmbedding):
        put_rows(model, one[1], embedding.ids, embedding.rows, len(new_tokens(model)))
        return
    if (
        isinstance(embedding, WholeEmbedding)
        and isinstance(head, WholeLinear)
        and torch.equal(embedding.matrix, head.matrix)
    ):
        head.matrix = embedding.matrix


def tokens_of(folder: str | Path) -> tuple[str, ...]:
    """The tokens that the adapter in `folder` adds to the vocabulary. Raises AdapterError for no list of texts."""
    file = Path(folder) / "lorafit.json"
    found = (
        read_json(file, "remove it if the adapter is another program's").get("new_tokens", []) if file.exists() else []
    )
    if not isinstance(found, list) or not all(isinstance(token, str) and token for token in found):
        raise AdapterError(f"{file}: new_tokens", f"is {str(found)[:80]}", "it must be a list of texts")
    return tuple(found)


def _check_base(model: nn.Module, folder: Path) -> list[str]:
    file = folder / "lorafit.json"
    if not file.exists():
        return ["the adapter has no lorafit.json: its base can be checked by names and shapes only"]
    stored = read_json(file, "remove it if the adapter is another program's")
    try:
        same, what = difference(stored["base"], fingerprint(model))
    except (KeyError, TypeError, AttributeError) as error:
        raise AdapterError(f"{file}: base", f"is no fingerprint: {error}", "save the adapter again") from None
    if not same:
        raise AdapterError(str(folder), f"does not belong to this base: {what}", "give the base it was trained on")
    return [what] if what else []
