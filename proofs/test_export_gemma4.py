"""Gemma 4 in llama.cpp: what proofs/test_export.py shows of other models. Run with `make proof-export`.

llama.cpp rounds what goes into GELU and what comes out of it to 16 bits: that is some thousandths of a nat here, and
with the same rounding in transformers' model less than 0.001 is left.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import xllamacpp  # noqa: F401  without it nothing is proven
from torch import Tensor, nn

from builders.adapters import write_adapter
from builders.architectures import GEMMA4, tiny
from builders.commands import run
from builders.gguf_experts import write_moe_gguf
from builders.models import save_folder
from builders.tokenizers_tiny import PARAGRAPH, VOCABULARY, write_gemma4_folder
from lorafit.export.gguf_model import merged_file
from lorafit.export.merge import Rounding
from lorafit.export.opened import open_model
from lorafit.export.probes import Probe
from lorafit.export.verify import ask_llama
from lorafit.formats.gguf import read_gguf
from lorafit.formats.gguf_tokenizer import from_gguf
from lorafit.formats.tokenizer import load_tokenizer

F32 = 0.001  # nats; two programs' fp32 sums
WIDE = {"vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY, "hidden_size": 64, "intermediate_size": 96}
TARGETS = {"dense": ["all-linear"], "small": ["attention", "mlp"], "experts": ["all-linear", "*.gate_up_proj"]}
IDS = tuple(torch.arange(48).mul(31).remainder(390).add(3).tolist())
LENGTHS = (4, 9, 18, 48)  # past the windows
TEXTS = (
    PARAGRAPH[:300],
    "a\n\n\nb\n\n\n\n\n c",
    " leading   and  trailing  ",
    "東京🚢é tabs\t\tand",
    "<|turn>user\nHi<turn|>\n",
)


def model_of(kind: str, **changes: Any):
    return tiny("gemma4_text", **{**GEMMA4[kind], **WIDE, **changes})


class Rounded(nn.Module):
    """GELU as llama.cpp computes it on processors: from a table of 16-bit numbers."""

    def forward(self, x: Tensor) -> Tensor:
        """x: any shape, fp32."""
        return nn.functional.gelu(x.half().float(), approximate="tanh").half().float()


def gaps(answers: list[list[tuple[int, float]]], model: nn.Module) -> Tensor:
    """llama.cpp's log-probabilities after each beginning minus the model's."""
    with torch.no_grad():
        mine = [model(torch.tensor([IDS[:n]])).logits[0, -1].log_softmax(-1) for n in LENGTHS]
    return torch.tensor(
        [value - float(row[token]) for row, one in zip(mine, answers, strict=True) for token, value in one]
    )


@pytest.mark.parametrize("softcap", [30.0, None])
@pytest.mark.parametrize("kind", GEMMA4)
def test_the_file_is_the_model_there(kind, softcap, tmp_path):
    """The file that lorafit writes of a folder, in llama.cpp, is transformers' model within GELU's rounding."""
    model = model_of(kind, final_logit_softcapping=softcap)
    folder = save_folder(model, tmp_path / "model")
    out = tmp_path / "model.gguf"
    merged_file(open_model(str(folder), []), "F32", {}, Rounding()).write(out)
    (answers,) = ask_llama(out, None, [Probe(IDS, LENGTHS)], "out")
    plain = gaps(answers, model)
    for module in model.modules():
        if hasattr(module, "act_fn"):
            module.act_fn = Rounded()
    rounded = gaps(answers, model)
    rms = [float(found.square().mean().sqrt()) for found in (plain, rounded)]
    print(f"\n{kind}, cap {softcap}: {plain.abs().max():.1e} (rms {rms[0]:.1e}); "
          f"GELU in 16 bits: {rounded.abs().max():.1e} (rms {rms[1]:.1e})")  # fmt: skip
    assert plain.abs().max() < 0.01
    assert rounded.abs().max() < F32  # where an activation is rounded the other way
    assert rms[1] < 0.5 * rms[0]


@pytest.mark.parametrize("base", ["folder", "base.gguf"])
@pytest.mark.parametrize("kind", GEMMA4)
def test_gguf_adapter_on_an_f32_base(kind, base, tmp_path):
    """Base and adapter in llama.cpp: the adapter's effect there is the one here."""
    model = model_of(kind)
    save_folder(model, tmp_path / "folder")
    write_moe_gguf(tmp_path / "base.gguf", model)
    adapter = write_adapter(tmp_path / base, tmp_path / "adapter", targets=TARGETS[kind])
    out = tmp_path / "adapter.gguf"
    done = run("export", tmp_path / base, adapter, "--to", "gguf", "--out", out, "--json")
    assert done.code == 0, done.err
    told = done.json
    print(f"\n{kind}, {base}: {told['largest_difference']:.1e}, base alone {told['base_alone']:.1e}, "
          f"effect {told['effect']:.2f} to {told['effect_difference']:.1e}")  # fmt: skip
    assert told["program"] == "llama.cpp"
    assert told["effect"] > 0.1
    assert told["effect_difference_rms"] < 0.01 * told["effect_rms"]


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("experts", "F32"), *((kind, dtype) for kind in ("dense", "small") for dtype in ("F32", "BF16", "Q8_0", "Q4_0"))],
)
def test_merged_file(kind, dtype, tmp_path):
    """Every layer adapted, those too that an adapter's file cannot hold: llama.cpp reads what lorafit reads. With
    activations in fewer bits, as it has them beside other formats, the router of a tiny mixture picks other experts at
    some places (2 nats there, and elsewhere what dense models differ by)."""
    folder = save_folder(model_of(kind), tmp_path / "model")
    targets = ["all-linear", *(["experts"] if kind == "experts" else [])]
    adapter = write_adapter(folder, tmp_path / "adapter", targets=targets)
    out = tmp_path / "merged.gguf"
    done = run("export", folder, adapter, "--to", "gguf-merged", "--dtype", dtype, "--out", out, "--json")
    assert done.code == 0, done.err
    told = done.json
    print(f"\n{kind}, {dtype}: {told['largest_difference']:.1e} of {told['floor']}; "
          f"rounding {told['rounding_difference']:.1e}")  # fmt: skip
    assert told["program"] == "llama.cpp"


def test_text_becomes_the_same_tokens(tmp_path):
    """The tokenizer as it is written: llama.cpp expects after a text what it expects after our ids of it."""
    folder = write_gemma4_folder(tmp_path / "tokenizer")
    path = save_folder(model_of("dense", vocab_size=load_tokenizer(folder).vocab_size), tmp_path / "model")
    for file in folder.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    out = tmp_path / "model.gguf"
    done = run(
        "export", path, write_adapter(path, tmp_path / "a"), "--to", "gguf-merged", "--dtype", "F32", "--out", out
    )
    assert done.code == 0, done.err
    tokenizer = from_gguf(read_gguf(out))
    ids = [[tokenizer.bos_id, *tokenizer.encode(text).ids] for text in TEXTS]
    (answers,) = ask_llama(out, None, [SimpleNamespace(prefixes=[*ids, *TEXTS], plain=5)], "out")
    for mine, theirs in zip(answers[: len(TEXTS)], answers[len(TEXTS) :], strict=True):
        assert mine == theirs
    assert len({str(one) for one in answers}) == len(TEXTS)
