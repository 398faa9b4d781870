"""Adapters of a model that is the text part of another: the paths in their files."""

from __future__ import annotations

import json

import torch
from safetensors.torch import load_file
from torch import nn

import lorafit
from lorafit.adapter.attach import adapted_layers
from lorafit.adapter.peft_config import file_path, own_path


class Text(nn.Module):
    """One linear layer under `model.`, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"q_proj": nn.Linear(8, 8)})
        self.lm_head = nn.Linear(8, 3)


PATHS = (("model.", "model.language_model."), ("lm_head", "lm_head"))


def test_paths_go_to_the_wrappers_and_back():
    """Own path -> file -> own path is the identity; without a wrapper nothing changes."""
    text = Text()
    assert file_path(text, "model.q_proj") == own_path(text, "model.q_proj") == "model.q_proj"
    text.peft_paths = PATHS
    for path, theirs in (("model.q_proj", "model.language_model.q_proj"), ("lm_head", "lm_head")):
        assert file_path(text, path) == theirs
        assert own_path(text, theirs) == path


def test_a_file_names_full_paths_and_loads_into_both(tmp_path):
    """q_proj is in the tower too, so names are no help: target_modules lists whole paths. The file loads into the
    wrapper's text part, and one that was made for the text model alone does too."""
    text = Text()
    text.peft_paths = PATHS
    lorafit.attach(text, rank=2, targets=["q_proj"])
    ((_, layer),) = adapted_layers(text)
    nn.init.normal_(layer.adapter.B)
    lorafit.save_adapter(text, tmp_path / "wrapped")
    config = json.loads((tmp_path / "wrapped" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.language_model.q_proj"]
    tensors = load_file(tmp_path / "wrapped" / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.model.language_model.q_proj.lora_") for name in tensors)
    del text.peft_paths
    lorafit.save_adapter(text, tmp_path / "plain")
    for folder in ("wrapped", "plain"):
        other = Text()
        other.load_state_dict(
            {name.replace(".base", ""): p for name, p in text.state_dict().items() if "adapter" not in name}
        )
        other.peft_paths = PATHS
        lorafit.load_adapter(other, tmp_path / folder)
        ((path, got),) = adapted_layers(other)
        assert path == "model.q_proj"
        assert torch.equal(got.adapter.B, layer.adapter.B)
