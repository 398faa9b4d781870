"""EVA: A along the largest directions of the layers' inputs on training rows."""

from __future__ import annotations

import peft
import pytest
import torch
from peft.tuners.lora.eva import get_eva_state_dict
from torch import nn

from builders.models import frozen, tiny_model
from builders.rows import random_rows
from lorafit.adapter.attach import adapted_layers, attach, detach, enable_adapter
from lorafit.adapter.file import load_adapter, save_adapter
from lorafit.adapter.variants.svd import MORE
from lorafit.data.batch import pack_rows
from lorafit.errors import ConfigError
from lorafit.frozen.linear import FrozenLinear
from lorafit.frozen.packed import quantise
from lorafit.training import sample
from lorafit.training.sample import feed
from lorafit.training.step import accumulate, pack_hidden, pack_losses

RANK = 16


def apart(A: torch.Tensor, V: torch.Tensor) -> float:
    """The sine of the largest angle between the spaces that these orthonormal rows span."""
    return float((A - A @ V.T @ V).norm())


def seen_by(model: nn.Module, rows, numbers) -> dict[str, torch.Tensor]:
    """What each adapted layer is given for these rows, one at a time, below each other."""
    found: dict[str, list[torch.Tensor]] = {path: [] for path, _ in adapted_layers(model)}
    hooks = [
        layer.register_forward_pre_hook(lambda _, given, path=path: found[path].append(given[0].flatten(0, -2)))
        for path, layer in adapted_layers(model)
    ]
    enable_adapter(model, False)
    with torch.no_grad():
        for number in numbers:
            pack_hidden(model, pack_rows(rows, [number], 1)[0])
    enable_adapter(model, True)
    for hook in hooks:
        hook.remove()
    return {path: torch.cat(given) for path, given in found.items()}


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen2"])
@pytest.mark.parametrize("pack", [1024, 40])
def test_it_is_the_top_of_all_inputs(family, pack, tmp_path, monkeypatch):
    """Rows of A are orthonormal and span the leading right singular vectors of all inputs stacked, computed by
    torch.linalg.svd; layers with one input start alike; B is zero. In several packs too, where RANK + MORE is the
    inputs' width or more, so that nothing is cut; else A holds 99 % of what the best would of the inputs' squares."""
    monkeypatch.setattr(sample, "PACK", pack)
    rows = random_rows([30, 21, 25, 34, 17, 28])
    base = frozen(tiny_model(family), tmp_path)
    attach(base.model, rank=RANK, init="eva", feed=lambda: feed(base.model, rows, 3, True))
    layers = dict(adapted_layers(base.model))
    for path, X in seen_by(base.model, rows, range(6)).items():
        A, V = layers[path].adapter.A.detach(), torch.linalg.svd(X)[2][:RANK]
        assert torch.allclose(A @ A.T, torch.eye(RANK), atol=1e-5)
        if pack == 1024 or X.shape[1] <= RANK + MORE:
            assert apart(A, V) < 1e-3, path
        assert (X @ A.T).square().sum() > 0.99 * (X @ V.T).square().sum(), path
        assert not layers[path].adapter.B.any()
        if path.endswith("q_proj"):
            assert torch.equal(A, layers[path.replace("q_proj", "v_proj")].adapter.A)


def test_only_the_first_rows_are_looked_at(tmp_path, monkeypatch):
    """As many as have TOKENS tokens, in the run's order; the start is the same each time, and another for another
    seed."""
    monkeypatch.setattr(sample, "TOKENS", 60)
    rows = random_rows([30, 21, 25, 34, 17, 28])
    base = frozen(tiny_model("llama"), tmp_path)

    def start(seed: int) -> dict[str, torch.Tensor]:
        attach(base.model, rank=RANK, init="eva", seed=seed, feed=lambda: feed(base.model, rows, seed, True))
        return {path: layer.adapter.A.detach().clone() for path, layer in adapted_layers(base.model)}

    first = start(0)
    looked, total = [], 0
    for number in sample.order(0, 0, 6):
        looked.append(int(number))
        total += len(rows[number].ids)
        if total >= 60:
            break
    for path, X in seen_by(base.model, rows, looked).items():
        assert apart(first[path], torch.linalg.svd(X)[2][:RANK]) < 1e-3, path
    detach(base.model)
    again = start(0)
    assert all(torch.equal(again[path], A) for path, A in first.items())
    detach(base.model)
    assert not any(torch.equal(A, first[path]) for path, A in start(1).items())


def test_the_first_loss_is_the_bases(tmp_path):
    """The loss of a step before any step: the adapter on and off give the same number."""
    rows = random_rows([30, 21, 25])
    base = frozen(tiny_model("llama"), tmp_path)
    attach(base.model, rank=RANK, init="eva", feed=lambda: feed(base.model, rows, 0, True))
    packs = pack_rows(rows, range(3), 100)
    on = accumulate(base.model, base.head, packs)
    enable_adapter(base.model, False)
    with torch.no_grad():
        off = sum(float(pack_losses(base.model, base.head, pack).sum()) for pack in packs)
    assert on == pytest.approx(off / sum(len(pack.targets_N) for pack in packs), rel=1e-6)


def test_a_packed_base_starts_as_its_values():
    """On NF4 and on the same values unpacked: the same directions."""
    stored = quantise(torch.randn(64, 64), "nf4")
    dense = nn.Linear(64, 64, bias=False)
    dense.weight.data = stored.dense()
    x, found = torch.randn(50, 64) @ torch.diag(torch.arange(64, 0, -1.0)), []
    for first in (FrozenLinear(stored), dense):
        model = nn.Sequential(first, nn.Linear(64, 32))
        nn.init.eye_(model[1].weight)
        attach(model, rank=4, init="eva", feed=lambda model=model: model(x))
        found.append([layer.adapter.A.detach() for _, layer in adapted_layers(model)])
    for packed, plain in zip(*found, strict=True):
        assert apart(packed, plain) < 1e-3


def test_pefts_start_on_centred_inputs_is_ours():
    """PEFT's own decomposition subtracts the mean and is approximate; where the mean is zero and singular values fall
    fast, both start in the same space."""
    x = torch.randn(100, 24) @ torch.diag(0.3 ** torch.arange(24))
    x = x - x.mean(0)
    theirs = peft.get_peft_model(
        nn.Sequential(nn.Linear(24, 24)),
        peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0)),
        low_cpu_mem_usage=True,
    )
    state = get_eva_state_dict(
        theirs,
        [x] * 3,
        forward_fn=lambda model, given: model(given),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    ours = nn.Sequential(nn.Linear(24, 24))
    attach(ours, rank=4, init="eva", feed=lambda: ours(x))
    (V,) = state.values()
    assert apart(ours[0].adapter.A.detach(), V.float()) < 1e-3


def test_in_peft_and_again_here_it_gives_our_logits(tmp_path):
    """Saved as plain LoRA: PEFT loads it on the plain base, logits equal within 1e-5; loaded here, bit for bit."""
    rows, ids = random_rows([30, 21, 25]), torch.tensor([[5, 9, 200, 31, 7, 88, 120]])
    ours = frozen(tiny_model("llama"), tmp_path / "model").model
    attach(ours, rank=RANK, init="eva", feed=lambda: feed(ours, rows, 0, True))
    for _, layer in adapted_layers(ours):
        nn.init.normal_(layer.adapter.B, std=0.05)
    save_adapter(ours, tmp_path / "adapter")
    again = frozen(tiny_model("llama"), tmp_path / "model").model
    load_adapter(again, tmp_path / "adapter")
    with torch.no_grad():
        got = ours(input_ids=ids).logits
        want = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "adapter")(ids).logits
        assert float((got - want).abs().max() / want.abs().max()) < 1e-5
        assert torch.equal(again(input_ids=ids).logits, got)


REFUSED = {
    "head": ({"targets": ["q_proj", "lm_head"]}, "--init eva: is not made for lm_head; leave it out of --targets"),
    "embedding": ({"targets": ["embed_tokens"]}, "--init eva: is not made for model.embed_tokens"),
    "few tokens": ({"rank": 16}, "--init: is eva, and the rows give .* 5 tokens, fewer than the rank 16; give more"),
    "no rows": ({"feed": None}, "init: is eva, and there are no rows to look at"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_cannot_be_is_refused(fault, tmp_path):
    """Each in one line that says what to do."""
    options, words = REFUSED[fault]
    model, rows = frozen(tiny_model("llama"), tmp_path).model, random_rows([5])
    with pytest.raises(ConfigError, match=words) as caught:
        attach(model, **{"rank": 4, "init": "eva", "feed": lambda: feed(model, rows, 0, True), **options})
    assert len(caught.value.lines()) == 1


def test_a_layer_that_no_row_reaches_is_refused():
    """There is nothing to start from, and no other start is taken silently."""
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    with pytest.raises(ConfigError, match="--init: is eva, and the rows do not reach b; leave it out of --targets"):
        attach(model, rank=2, init="eva", feed=lambda: model["a"](torch.randn(9, 8)))
