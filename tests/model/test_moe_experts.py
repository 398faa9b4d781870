"""Models with experts from files to training: every layout on disk, every format in memory, the same numbers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorafit
from builders.gguf_experts import ARCHITECTURES, write_moe_gguf
from builders.models import MOE_FAMILIES, frozen, save_folder, tiny_model
from builders.processes import write_data
from builders.rows import random_rows
from lorafit.adapter.attach import adapted_layers, attach
from lorafit.config import TrainConfig
from lorafit.data.batch import pack_rows
from lorafit.errors import Interrupted, LorafitError, ModelError
from lorafit.frozen.fingerprint import difference, fingerprint
from lorafit.frozen.packed import quantise
from lorafit.frozen.stack import FrozenStack
from lorafit.model.architectures import LINEAR_ATTENTION
from lorafit.model.generate import generate
from lorafit.model.load import bytes_by_format, frozen_parameters, frozen_weights, load_base
from lorafit.model.save import save_nf4
from lorafit.model.sources import open_source
from lorafit.training.checkpoint import Checkpoints
from lorafit.training.loop import Plan, Run, fit
from lorafit.training.metrics import Metrics
from lorafit.training.step import accumulate

ROWS = random_rows([9, 4, 12, 7, 5, 11, 8, 6], seed=1)
IDS = torch.tensor([[5, 9, 200, 31, 7, 88, 120, 44, 17, 3], [8, 1, 4, 4, 90, 2, 6, 301, 12, 77]])
WIDE = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64}  # rows of whole NF4 blocks
GGUF = [family for family in MOE_FAMILIES if family in ARCHITECTURES]
PACKING = [family for family in MOE_FAMILIES if family not in LINEAR_ATTENTION]
PER_EXPERT = [
    family for family in MOE_FAMILIES if family not in ("gpt_oss", "llama4_text", "granitemoe", "gemma4_text")
]


LINEAR_KEYS = {"linear_key_head_dim": 16}  # normed keys of 8 features make gradients too sensitive to rounding
OWN = {
    "deepseek_v3": {"kv_lora_rank": 64, "q_lora_rank": 64, "v_head_dim": 16},
    "mistral4": {"kv_lora_rank": 64, "q_lora_rank": 64, "v_head_dim": 16},
    "qwen3_next": {"shared_expert_intermediate_size": 64, "linear_value_head_dim": 16},
    "qwen3_5_moe_text": {"shared_expert_intermediate_size": 64, "linear_num_value_heads": 8},
    "gemma4_text": {"head_dim": 16},
    "llama4_text": {"head_dim": 16},
    "qwen2_moe": {"shared_expert_intermediate_size": 64},
}
IN_GGUF = {"llama4_text": {"no_rope_layers": [1, 1], "attention_chunk_size": 8192}}  # as llama.cpp has them


def wide(family: str, **changes: object):
    return tiny_model(family, **{**WIDE, **OWN.get(family, {}), **changes})


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def stacks(model) -> dict[str, FrozenStack]:
    return {path: module for path, module in model.named_modules() if isinstance(module, FrozenStack)}


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_logits_and_size_are_transformers(family, tmp_path):
    """Through our experts, linear layers and attention: logits within 1e-5, and as many parameters."""
    original = tiny_model(family)
    model = frozen(original, tmp_path).model
    assert relative(logits(model), logits(original)) < 1e-5
    assert frozen_parameters(model) == sum(p.numel() for p in original.parameters())
    for path, stack in stacks(model).items():
        assert torch.equal(stack.dense(), original.get_parameter(path))


def as_published(folder: Path, family: str) -> None:
    """The folder's fused experts as a matrix for each, under the names of published checkpoints."""
    file, found = folder / "model.safetensors", {}
    for name, tensor in load_file(file).items():
        parts = re.fullmatch(r"(.+\.experts)\.(gate_up_proj|down_proj)", name)
        if not parts:
            found[name.replace(".mlp.", ".block_sparse_moe.") if family == "mixtral" else name] = tensor
            continue
        for expert, matrix in enumerate(tensor):
            halves = (
                {"down_proj": matrix}
                if parts[2] == "down_proj"
                else dict(zip(("gate_proj", "up_proj"), matrix.chunk(2), strict=True))
            )
            for half, values in halves.items():
                own = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}[half] if family == "mixtral" else half
                path = parts[1].replace(".mlp.", ".block_sparse_moe.") if family == "mixtral" else parts[1]
                found[f"{path}.{expert}.{own}.weight"] = values.clone()
    save_file(found, file, metadata={"format": "pt"})


@pytest.mark.parametrize("family", PER_EXPERT)
def test_published_folders_with_a_matrix_for_each_expert_load(family, tmp_path):
    """The same model bit for bit, the same fingerprint, and its matrices stay single weights, nothing copied together;
    in NF4 too."""
    original = wide(family)
    fused = frozen(original, tmp_path / "fused").model
    folder = save_folder(original, tmp_path / "split")
    as_published(folder, family)
    source = open_source(folder)
    assert {source.format(name) for name in source.shapes} == {"F32"}
    split = lorafit.load(folder, base="fp32", compute="fp32")
    assert torch.equal(logits(split), logits(fused))
    assert difference(fingerprint(fused), fingerprint(split)) == (True, "")
    path, stack = next(iter(stacks(split).items()))
    assert len(stack.weights) == 2 * stack.experts
    quantised = lorafit.load(folder, base="nf4", compute="fp32")
    first = quantised.get_submodule(path)
    want = torch.stack([torch.cat([quantise(half, "nf4").dense() for half in matrix.chunk(2)])
                        for matrix in original.get_parameter(path).detach()])  # fmt: skip
    assert torch.equal(first.dense(), want)


def test_granite_and_its_own_names(tmp_path):
    """input_linear, output_linear and router.layer of Granite's published files are its experts and router."""
    original = tiny_model("granitemoe")
    folder = save_folder(original, tmp_path)
    renamed = {".experts.gate_up_proj": ".input_linear.weight", ".experts.down_proj": ".output_linear.weight"}
    renamed[".router.weight"] = ".router.layer.weight"
    found = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        end = next((end for end in renamed if name.endswith(end)), "")
        found[name.removesuffix(end) + renamed.get(end, "")] = tensor
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    assert relative(logits(lorafit.load(folder, base="fp32", compute="fp32")), logits(original)) < 1e-5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: t.pop("model.layers.1.mlp.experts.4.up_proj.weight"),
            "experts.up_proj: of expert 4 of 6 is missing",
        ),
        (
            lambda t: t.update({"model.layers.1.mlp.experts.4.up_proj.weight": torch.zeros(3, 3)}),
            r"has shapes \[\[3, 3\], \[64, 64\]\] for its experts",
        ),
        (
            lambda t: [t.pop(k) for k in list(t) if "up_proj" in k],
            "experts: has down_proj, gate_proj, not gate, up and down",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.experts.6.down_proj.weight": torch.zeros(64, 64)}),
            "of expert 6 of 7",
        ),
    ],
)
def test_a_folder_that_lacks_an_expert_is_refused(change, words, tmp_path):
    """One line with the matrix and the expert's number."""
    folder = save_folder(wide("qwen3_moe"), tmp_path)
    as_published(folder, "qwen3_moe")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=words):
        lorafit.load(folder)


@pytest.mark.parametrize("family", MOE_FAMILIES)
@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_experts_in_nf4_or_int8_leave_no_16_bit_copy(family, base, tmp_path):
    """Every stack has the quantiser's values of its rows, its outputs' order and its biases; what stays in 16 bits are
    embedding and head alone."""
    original = wide(family)
    source = open_source(save_folder(original, tmp_path))
    loaded = load_base(source, source.tokenizer(None), base, "fp32")
    assert loaded.kept == ()
    for path, stack in stacks(loaded.model).items():
        values = original.get_parameter(path).detach()
        values = values.transpose(1, 2) if stack.transposed else values
        rows = values.reshape(-1, values.shape[2])
        assert stack.format == base.upper()
        want = quantise(rows, base).dense().view(values.shape)
        assert torch.equal(torch.stack([stack.matrix(e) for e in range(stack.experts)]), want)
    sizes = bytes_by_format(loaded.model)
    assert set(sizes) == {base.upper(), "bf16"}
    assert sizes["bf16"] == (1 if original.config.tie_word_embeddings else 2) * 2 * 512 * 64


def test_experts_whose_rows_do_not_divide_are_listed(tmp_path):
    """Rows of 24 are no whole blocks of 64: down_proj's stack stays in 16 bits and is named."""
    source = open_source(save_folder(wide("qwen3_moe", moe_intermediate_size=24), tmp_path))
    kept = load_base(source, source.tokenizer(None), "nf4", "fp32").kept
    assert kept == tuple(f"model.layers.{n}.mlp.experts.down_proj" for n in (0, 1))


@pytest.mark.parametrize("family", GGUF)
def test_a_gguf_file_gives_transformers_logits(family, tmp_path):
    """As llama.cpp's converter would write it: used as it lies, unpacked, and quantised while it streams in."""
    original = wide(family, **IN_GGUF.get(family, {}))
    file = write_moe_gguf(tmp_path / "model.gguf", original)
    want = logits(original)
    for base in ("packed", "fp32"):
        assert relative(logits(lorafit.load(file, base=base, compute="fp32")), want) < 1e-5
    folder = frozen(original, tmp_path / "folder").model
    assert difference(fingerprint(folder), fingerprint(lorafit.load(file, base="packed", compute="fp32")))[0]
    assert "NF4" in bytes_by_format(lorafit.load(file, base="nf4", compute="fp32"))


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q5_1", "BF16"])
@pytest.mark.parametrize("family", GGUF)
def test_packed_experts_are_the_files_own_bytes_and_values(family, kind, tmp_path):
    """Used as they lie, experts take the file's bytes and no more, and logits and the adapters' gradients are those of
    the unpacked file, within rounding: few tokens are multiplied in registers."""
    model = wide(family, **(LINEAR_KEYS if family in LINEAR_ATTENTION else {}))
    file, results = write_moe_gguf(tmp_path / "model.gguf", model, kind), []
    for base in ("packed", "fp32"):
        model = lorafit.load(file, base=base, compute="fp32")
        if base == "packed":
            assert {w.format for path, w in frozen_weights(model).items() if ".experts." in path} <= {kind, "F16"}
        attach(model, rank=4, targets=["all-linear", "experts"])
        for _, layer in adapted_layers(model):
            layer.adapter.B.data.fill_(0.01)
        out = model(input_ids=IDS).logits
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    assert all(relative(a, b) < 1e-4 for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("family", PACKING)
def test_packed_rows_equal_rows_alone(family, tmp_path):
    """Loss and gradients of rows in one sequence equal those of each row alone, within 1e-5: routing is by token."""
    base, rows = frozen(tiny_model(family), tmp_path), random_rows([11, 3, 17, 8])
    attach(base.model, rank=4, alpha=8, targets=["all-linear", "experts"])
    torch.manual_seed(1)
    for _, layer in adapted_layers(base.model):
        torch.nn.init.normal_(layer.adapter.B, std=0.05)
    found = []
    for packs in (pack_rows(rows, range(4), 100), pack_rows(rows, range(4), 100, together=False)):
        base.model.zero_grad()
        loss = accumulate(base.model, base.head, packs)
        found.append((loss, torch.cat([p.grad.flatten() for p in base.model.parameters() if p.requires_grad])))
    (loss, grad), (other, separate) = found
    assert abs(loss - other) < 1e-5 * abs(loss)
    assert float((grad - separate).norm() / separate.norm()) < 1e-5


@pytest.mark.parametrize(
    ("family", "compute"), [*((family, "fp32") for family in MOE_FAMILIES), ("qwen3_moe", "bf16"), ("gpt_oss", "bf16")]
)
def test_a_memorised_batch_is_learnt(family, compute, tmp_path):
    """Twenty steps on one batch, adapters on everything, layers computed twice or not: the loss falls by half."""
    changes = {"final_logit_softcapping": 30.0} if family == "gemma4_text" else {}  # at 3 all logits are at the cap
    source = open_source(save_folder(wide(family, **changes), tmp_path))
    base = load_base(source, source.tokenizer(None), "nf4", compute)
    attach(base.model, rank=8, alpha=16, targets=["all-linear", "experts"])
    parameters = [p for p in base.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.01)
    packs = pack_rows(random_rows([12, 9]), range(2), 100, together=family in PACKING)
    base.model.train()
    losses = []
    for step in range(20):
        optimizer.zero_grad()
        losses.append(accumulate(base.model, base.head, packs, checkpointed=step % 3))
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    "family",
    ["qwen3_moe", "qwen3_next", "qwen3_5_moe_text", "mixtral", "mistral4", "deepseek_v3", "gpt_oss", "llama4_text",
     "qwen2_moe", "olmoe", "granitemoe", "gemma4_text"],
)  # fmt: skip
def test_a_stopped_run_with_experts_resumes_to_the_same_bits(family, tmp_path):
    """Stopped by a signal after step 2 of 5 and resumed from its checkpoint, experts' adapters and AdamW's state end in
    the bits of the undisturbed run."""

    def run_in(out: Path, stop: int = 0) -> Run:
        base = frozen(tiny_model(family), tmp_path / "model")
        attach(base.model, 4, 8.0, ["all-linear", "experts"])
        config = TrainConfig(rank=4, lr=0.01, batch_size=4, save_every=1, micro_batch_tokens=32,
                             packing="on" if family in PACKING else "off")  # fmt: skip
        out.mkdir(exist_ok=True)
        run = Run(config, Plan(5, 2), base.model, base.head, ROWS, Checkpoints(out), Metrics(out / "m.jsonl", 0),
                  {"base": "tiny"}, None, lambda line: None, lambda: 1)  # fmt: skip
        if stop:
            run.report = lambda line: setattr(run.stop, "signal_number", 15 if line["step"] == stop else 0)
        return run

    whole = run_in(tmp_path / "whole")
    fit(whole, None)
    with pytest.raises(Interrupted):
        fit(run_in(tmp_path / "stopped", stop=2), None)
    again = run_in(tmp_path / "stopped")
    newest, _ = again.checkpoints.newest()
    assert newest.progress.step == 2
    fit(again, newest)
    pairs = zip(adapted_layers(again.model), adapted_layers(whole.model), strict=True)
    for (_, mine), (_, theirs) in pairs:
        assert torch.equal(mine.adapter.A, theirs.adapter.A)
        assert torch.equal(mine.adapter.B, theirs.adapter.B)
        assert mine.adapter.B.abs().max() > 0


def test_lorafit_train_with_experts_writes_an_adapter_that_loads(tmp_path):
    """The command's function, on an NF4 base: report.json counts every expert's parameters, the adapter loads."""
    save_folder(wide("qwen3_moe"), tmp_path / "model")
    data = str(write_data(tmp_path / "data.jsonl", 6))
    result = lorafit.train(
        model=str(tmp_path / "model"), data=data, out=str(tmp_path / "out"), rank=4,
        targets="all-linear,experts", base="nf4", batch_size=4, max_steps=2, eval_fraction=0.0, threads=1, lr=0.01,
    )  # fmt: skip
    wanted = 2 * 4 * (6 * (64 + 128 + 64 + 64) + (64 + 64) + 2 * (64 + 32) + (64 + 64))
    assert result.report["trainable_parameters"] == wanted
    again = lorafit.load(tmp_path / "model", adapter=tmp_path / "out" / "adapter", base="nf4")
    assert sum(1 for _ in adapted_layers(again)) == 2 * 6


def test_a_quantised_model_is_saved_with_its_experts_in_16_bits(tmp_path):
    """bitsandbytes reads no 4-bit experts: the saved folder has them in 16 bits, in transformers' shape, and loads."""
    for family in ("qwen3_moe", "gpt_oss"):
        original = wide(family)
        model = lorafit.load(save_folder(original, tmp_path / family), base="nf4", compute="fp32")
        save_nf4(model, tmp_path / f"{family}-nf4")
        again = stacks(lorafit.load(tmp_path / f"{family}-nf4", base="packed", compute="fp32"))
        for path, stack in stacks(model).items():
            assert again[path].format == "bf16"
            assert again[path].dense().shape == original.get_parameter(path).shape
            assert torch.equal(again[path].dense(torch.bfloat16), stack.dense(torch.bfloat16))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_experts": 0}, "num_experts: is 0, not 1 to"),
        ({"num_experts": 10**12}, "num_experts: is 1000000000000, not 1 to"),
        ({"moe_intermediate_size": "x"}, "moe_intermediate_size: is 'x', not 1 to"),
        ({"num_local_experts": 7}, r"gate_up_proj: has shape \[6, 48, 32\], the configuration says \[7, 48, 32\]"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "quantization_config: is 'mxfp4', which is not read; use"),
    ],
)
def test_an_impossible_mixture_is_refused_in_one_line(change, words, tmp_path):
    """Numbers that describe no model, and experts in a format that is not read (gpt-oss's MXFP4)."""
    folder = save_folder(tiny_model("qwen3_moe"), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(LorafitError) as caught:
        lorafit.load(folder)
    assert re.search(words, "\n".join(caught.value.lines()))


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_answers_are_those_of_whole_forward_passes(family, tmp_path):
    """Decoded with a cache, two prompts at once, each answer's tokens are the likeliest of a forward pass over all that
    stands before them."""
    model = frozen(tiny_model(family), tmp_path).model
    prompts = [[5, 9, 200, 31, 7, 88, 120, 44], [8, 1, 4]]
    answers = generate(model, prompts, max_tokens=6, end_ids=())
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(answer) == 6
        with torch.no_grad():
            whole = model(input_ids=torch.tensor([prompt + answer])).logits[0]
        assert whole[len(prompt) - 1 : -1].argmax(-1).tolist() == answer
