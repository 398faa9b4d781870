"""Exports do in llama.cpp and PEFT what the adapter does here. Run with `make proof-export`; needs xllamacpp.

Tiny models of the families whose conversions differ, on F32 bases, where nothing but arithmetic is left: 0.001 nats.
Then every format of a merged file, and SmolLM2's own Q4_1 file.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import xllamacpp  # noqa: F401  without it nothing is proven
from torch import nn

import lorafit
from builders.adapters import write_adapter
from builders.architectures import save_wrapper
from builders.commands import run
from builders.gguf_models import tiny_of, wrapper_of, written
from builders.models import save_folder
from builders.tokenizers_tiny import VOCABULARY
from lorafit.adapter.attach import adapted_layers
from lorafit.errors import AdapterError
from lorafit.export.probes import Probe
from lorafit.export.verify import ask_llama
from lorafit.formats.gguf_pieces import Piece
from lorafit.formats.names import Entry

ROOT = Path(__file__).parent.parent
F32 = 0.001  # nats; two programs' fp32 sums
GELU = 0.003  # llama.cpp looks it up in a table of 16 bits (docs/export.md)
FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma3_text", "ministral3", "qwen3_5_text", "smollm3", "granite", "phi3",
    "olmo2", "olmo3",
)  # fmt: skip
WIDE = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96}


def tiny(family: str):
    return tiny_of(family, **WIDE)


@pytest.fixture(params=FAMILIES)
def world(request, tmp_path):
    """A family's tiny model as an F32 GGUF file and as a folder, and an adapter on every linear layer."""
    model = tiny(request.param)
    folder = save_folder(model, tmp_path / "folder")
    file = written(model, tmp_path / "base.gguf")
    for path, name in ((folder, "for-folder"), (file, "for-base.gguf")):
        write_adapter(path, tmp_path / name)
    return tmp_path, folder, file


@pytest.mark.parametrize("base", ["folder", "base.gguf"])
def test_gguf_adapter_on_an_f32_base(world, base):
    """Base and adapter in llama.cpp: each compared log-probability within 0.001, from a GGUF base and from a folder."""
    folder = world[0]
    adapter = folder / f"for-{base}"
    done = run("export", folder / base, adapter, "--to", "gguf", "--out", folder / "adapter.gguf", "--json")
    assert done.code == 0, done.err
    told = done.json
    print(
        f"\n{base}: {told['largest_difference']:.2e}, base alone {told['base_alone']:.2e}, effect {told['effect']:.2f}"
    )
    assert told["program"] == "llama.cpp"
    assert told["largest_difference"] < F32
    assert told["effect_difference"] < F32
    assert told["effect"] > 0.1


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_merged_file(world, kind):
    """The merged file in llama.cpp is what lorafit reads in it, within the format's floor."""
    folder = world[0]
    out = folder / "merged.gguf"
    done = run(
        "export", world[1], folder / "for-folder", "--to", "gguf-merged", "--dtype", kind, "--out", out, "--json"
    )
    assert done.code == 0, done.err
    told = done.json
    print(f"\n{kind}: {told['largest_difference']:.2e} of {told['floor']}; rounding {told['rounding_difference']:.2e}")
    assert told["program"] == "llama.cpp"
    if kind == "F32":
        assert told["largest_difference"] < F32


@pytest.mark.parametrize("target", ["peft", "portable"])
def test_folders_in_peft(world, target):
    """PEFT on transformers' own model: within 0.001."""
    folder = world[0]
    done = run("export", world[2], folder / "for-base.gguf", "--to", target, "--out", folder / target, "--json")
    assert done.code == 0, done.err
    print(f"\n{target}: {done.json['largest_difference']:.2e}")
    assert done.json["program"] == "PEFT"
    assert done.json["largest_difference"] < F32


@pytest.mark.parametrize("name", ["gemma3", "llama4", "mistral3", "mistral3-mistral", "qwen3_5", "qwen3_5_moe"])
def test_gguf_adapter_of_a_multimodal_folder(name, tmp_path):
    """Trained on the folder, it does in llama.cpp, on the text part's file, what it does here."""
    folder = save_wrapper(wrapper_of(name), tmp_path / "folder")
    adapter = write_adapter(folder, tmp_path / "adapter")
    done = run("export", folder, adapter, "--to", "gguf", "--out", tmp_path / "adapter.gguf", "--json")
    assert done.code == 0, done.err
    print(f"\n{name}: {done.json['largest_difference']:.2e}, effect {done.json['effect']:.2f}")
    assert done.json["largest_difference"] < (GELU if name == "gemma3" else F32)


def test_a_forgotten_permutation_is_found(tmp_path, monkeypatch):
    """q and k rows left in Hugging Face's order: llama.cpp disagrees, the export fails, and nothing is left."""
    folder = save_folder(tiny("llama"), tmp_path / "folder")
    adapter = write_adapter(folder, tmp_path / "adapter")
    out = tmp_path / "out"
    file = written(tiny("llama"), tmp_path / "base.gguf")
    from lorafit.export import gguf_adapter

    write = gguf_adapter.write_gguf_adapter

    def wrong(path, where, *rest):
        plain = {
            name: [Piece(Entry(piece.entry.tensor, piece.entry.shape)) for piece in pieces]
            for name, pieces in where.pieces.items()
        }
        write(path, type(where)(where.architecture, plain), *rest)

    monkeypatch.setattr("lorafit.export.targets.write_gguf_adapter", wrong)
    monkeypatch.setattr("lorafit.export.targets._compare", lambda *_: None)
    done = run("export", file, adapter, "--to", "gguf", "--out", out / "adapter.gguf")
    assert done.code == 2
    assert "log-probabilities in llama.cpp differ by" in done.err
    print(done.err)
    assert list(out.iterdir()) == []


def test_files_that_llama_does_not_load_are_an_error(tmp_path):
    """llama.cpp's own words, one line; our process lives."""
    file = written(tiny("llama"), tmp_path / "base.gguf")
    (tmp_path / "adapter.gguf").write_bytes(file.read_bytes()[:4000])
    for model, adapter in ((file, tmp_path / "adapter.gguf"), (tmp_path / "adapter.gguf", None)):
        with pytest.raises(AdapterError, match=r"out: llama\.cpp does not load it") as error:
            ask_llama(model, adapter, [Probe((1, 2, 3), (3,))], "out")
        print(f"\n{error.value}")


def test_effect_on_smollm2s_own_file(tmp_path):
    """On the Q4_1 file the base alone differs by up to half a nat; the adapter's effect is the same in both."""
    command = [sys.executable, ROOT / "scripts" / "fetch_model.py", "smollm2"]
    model = Path(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.decode().strip())
    trained = lorafit.load(model, compute="fp32")
    lorafit.attach(trained, rank=8)
    torch.manual_seed(0)
    for _, layer in adapted_layers(trained):
        nn.init.normal_(layer.adapter.B, std=0.03)
    lorafit.save_adapter(trained, tmp_path / "adapter", {"base_model": str(model)})
    data = ROOT / "examples" / "wikisql" / "test.jsonl"
    out = tmp_path / "adapter.gguf"
    done = run("export", model, tmp_path / "adapter", "--to", "gguf", "--out", out, "--data", data, "--json")
    assert done.code == 0, done.err
    print("\n" + json.dumps(done.json, indent=1))
    # the effect is a difference of two, each with its own rounding: sqrt(2) times the base's
    assert done.json["effect_difference_rms"] < 2 * done.json["base_alone_rms"]
    assert done.json["effect_difference_rms"] < 0.5 * done.json["effect_rms"]
