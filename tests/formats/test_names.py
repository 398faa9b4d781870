"""The laws of lorafit.formats.names: a GGUF file holds the tensors of the model that it was converted from."""

from __future__ import annotations

from pathlib import Path

import gguf as gguf_py
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from builders.gguf_files import gguf_bytes, number_key, state_of, string_key, tensor_info
from builders.gguf_gemma4 import gemma4_name
from builders.gguf_models import GGUF_FAMILIES, IDS, as_gguf, from_gguf
from builders.models import tiny_model
from lorafit.errors import Faults, ModelError
from lorafit.formats import names
from lorafit.formats.gguf import GgufFile, read_gguf
from lorafit.kernels.unpack import unpack


@pytest.mark.parametrize("family", GGUF_FAMILIES)
def test_f32_files_hold_the_same_model(family: str, tmp_path: Path) -> None:
    """Every parameter of the original comes back with its bits (gemma3's norms to one rounding), and no other."""
    model = tiny_model(family)
    file = as_gguf(model, tmp_path)
    state = {name: entry.load(file) for name, entry in names.entries(file).items()}
    expected = state_of(model)
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        plus_one = family == "gemma3_text" and name.endswith("norm.weight")
        torch.testing.assert_close(state[name], value, rtol=0, atol=1e-6 if plus_one else 0)


@pytest.mark.parametrize("family", GGUF_FAMILIES)
def test_the_same_logits(family: str, tmp_path: Path) -> None:
    """The model built from configuration and tensors of the file computes what the original computes."""
    model = tiny_model(family)
    with torch.no_grad():
        torch.testing.assert_close(from_gguf(as_gguf(model, tmp_path))(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("tensor_type", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_packed_parameters_are_gguf_pys_values(tensor_type: str, tmp_path: Path) -> None:
    """A packed matrix has gguf-py's values for the original's rows: permuting rows and packing commute."""
    model = tiny_model("llama")
    file = as_gguf(model, tmp_path, tensor_type)
    kind = GGMLQuantizationType[tensor_type]
    for name, entry in names.entries(file).items():
        original = state_of(model)[name].numpy()
        if original.ndim == 2 and original.shape[1] == 32:
            assert file.tensors[entry.tensor].type.name == tensor_type
            expected = quants.dequantize(quants.quantize(original, kind), kind)
            np.testing.assert_array_equal(entry.load(file).numpy(), expected)


def test_row_order_is_exact_on_packed_rows(tmp_path: Path) -> None:
    """The packed rows in `row_order` unpack to the parameter; a parameter in the file's order has none."""
    file = as_gguf(tiny_model("llama"), tmp_path, "Q4_0")
    found = names.entries(file)
    for layer in range(2):
        for module, heads in (("q_proj", 4), ("k_proj", 2)):
            entry = found[f"model.layers.{layer}.self_attn.{module}.weight"]
            tensor, order = file.tensors[entry.tensor], entry.row_order()
            assert entry.heads == heads
            assert order is not None
            assert sorted(order) == list(range(entry.shape[0]))
            assert torch.equal(unpack(torch.from_numpy(tensor.data[order]), "Q4_0"), entry.load(file))
    assert found["model.layers.0.self_attn.v_proj.weight"].row_order() is None


@pytest.mark.parametrize("architecture", names.FAMILIES)
def test_names_are_those_of_gguf_py(architecture: str) -> None:
    """Each name of ours is gguf-py's name for the same parameter, and layers have all that gguf-py knows."""
    (named,) = (one for one, name in gguf_py.MODEL_ARCH_NAMES.items() if name == architecture)
    theirs = gguf_py.get_tensor_name_map(named, 3)
    ours = names.hf_names(architecture, 3)
    for gguf_name, hf_name in ours.items():
        name = hf_name.removesuffix("_bias") + (".bias" if hf_name.endswith("_bias") else "")  # of experts: no dot
        name = gemma4_name(name)
        name = name if name.endswith((".weight", ".bias", ".A_log", ".scale")) else f"{name}.weight"
        name = name.replace("linear_attn.dt.bias", "linear_attn.dt_proj.bias")
        for ours_now, published in (("moe.router", "moe.router.layer"), ("block_sparse_moe.experts", "mlp.experts")):
            name = name.replace(ours_now, published)  # Granite's
        if gguf_name.split(".")[-2] in ("ffn_gate_exps", "ffn_up_exps") and architecture == "gemma4":
            continue  # read by llama.cpp and not written: gguf-py has the fused tensor alone
        assert theirs.get_name(name, try_suffixes=(".weight", ".bias", ".scale")) == gguf_name
    family = names.MIXTRAL if architecture == "llama" else names.FAMILIES[architecture]
    assert len(ours) == 2 * (len(family.top) + 3 * len(family.layer)) + 3 * len(family.parameters)


def raw_llama(tmp_path: Path, tensors: dict[str, list[int]], kind: str = "llama") -> GgufFile:
    """A llama file of one layer and two heads with these tensors (in the file's order of dimensions)."""
    keys = [string_key("general.architecture", kind)]
    keys += [number_key(f"{kind}.{key}", "I", n) for key, n in (("block_count", 1), ("attention.head_count", 2))]
    infos, offset = [], 0
    for name, ne in tensors.items():
        infos.append(tensor_info(name, ne, 0, offset))
        offset += -(-4 * int(np.prod(ne)) // 32) * 32
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes(keys, infos, bytes(offset)))
    return read_gguf(path)


def test_all_unknown_tensors_are_listed(tmp_path: Path) -> None:
    """Tensors that the family does not have are refused together, also under Hugging Face's names."""
    extra = ["blk.1.attn_q.weight", "model.norm.weight", "blk.0.attn_q_norm.weight", "x"]
    with pytest.raises(Faults) as caught:
        names.entries(raw_llama(tmp_path, {"token_embd.weight": [8, 4], **{name: [8] for name in extra}}))
    assert [fault.place.split(": ")[1] for fault in caught.value.faults] == extra


@pytest.mark.parametrize("name", ["blk.0.ffn_gate_inp.weight", "blk.0.ffn_up_exps.weight"])
def test_experts_are_refused_by_their_tensors(name: str, tmp_path: Path) -> None:
    """A dense architecture has no experts: the error names a tensor."""
    with pytest.raises(ModelError, match=f"{name}: experts are not supported in a qwen2 model"):
        names.entries(raw_llama(tmp_path, {"token_embd.weight": [8, 4], name: [8, 8]}, "qwen2"))


def test_rows_must_divide_into_heads(tmp_path: Path) -> None:
    """q and k rows that are not pairs within heads are refused before they are reordered."""
    with pytest.raises(ModelError, match=r"blk.0.attn_q.weight: has 6 rows, which 2 heads of even size do not divide"):
        names.entries(raw_llama(tmp_path, {"token_embd.weight": [8, 4], "blk.0.attn_q.weight": [8, 6]}))
