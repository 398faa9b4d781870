"""Exports to PEFT and to servers, of every family with experts or with towers: PEFT on transformers' model agrees."""

from __future__ import annotations

import json

import pytest

from builders.adapters import write_adapter
from builders.architectures import WRAPPED, folder_of
from builders.commands import run
from builders.models import MOE_FAMILIES, tiny_model
from builders.tokenizers_tiny import write_tiny_folder
from lorafit.adapter.peft_experts import WHOLE

ODD = {"moe_intermediate_size": 14, "num_experts": 5}  # transformers' grouped products take neither this width


def folder(name, path):
    """The model as transformers saves it: experts in a matrix each, where the family's published files have them so."""
    if name in WRAPPED:
        return folder_of(name, path)
    changes = ODD if name in ("qwen3_moe", "gemma4_text") else {}
    tiny_model(name, **changes).save_pretrained(path)
    return write_tiny_folder(path)


@pytest.mark.parametrize("name", [*MOE_FAMILIES, *WRAPPED])
def test_peft_takes_what_is_exported(name, tmp_path):
    """Both targets: PEFT's log-probabilities are ours to 0.001, with an adapter on experts where there are some. Single
    experts are written for the families that PEFT reads them for."""
    model = folder(name, tmp_path / "model")
    text = name if name not in WRAPPED else WRAPPED[name][0]
    targets = ["all-linear", *(["experts"] if text in MOE_FAMILIES and name != "gemma4" else [])]
    adapter = write_adapter(model, tmp_path / "adapter", targets=targets)
    for target in ("peft", "portable"):
        done = run("export", model, adapter, "--to", target, "--out", tmp_path / target, "--json")
        assert done.code == 0, done.err
        assert done.json["program"] == "PEFT"
        assert done.json["largest_difference"] < 1e-3
    config = json.loads((tmp_path / "portable" / "adapter_config.json").read_text())
    single = any("experts.down_proj" in name or "experts.w2" in name for name in config["target_modules"])
    assert single == (name in MOE_FAMILIES and name not in WHOLE)
