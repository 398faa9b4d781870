"""The laws of lorafit.planning: what is chosen fits, is the fastest that does, and changes no loss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from builders.commands import QUICK
from builders.outlines import llama
from builders.rows import Row
from lorafit import machine
from lorafit.config import Resolved, TrainConfig, bytes_of
from lorafit.errors import MemoryLimitError
from lorafit.planning import fit, predict
from lorafit.planning.duration import Clock, Pack, Remaining, Work
from lorafit.planning.memory import Use
from lorafit.planning.outline import of_shapes
from lorafit.planning.predict import Held, Prediction, Rows
from lorafit.planning.speeds import Speeds
from lorafit.settings import settle_for_data, settle_for_machine
from lorafit.training.loop import Plan

SMOLLM2 = llama(30, 576, 1536, heads=9, key_heads=3, vocabulary=49152, tied=True)
LARGE = llama(32, 4096, 14336, heads=32, key_heads=8, vocabulary=128256)
CONFIG = {"model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30}
AMPLE = 10**13


class Known(Speeds):
    """Seconds that nothing measures: a nanosecond for each thousand of whatever it is."""

    def __init__(self) -> None:
        super().__init__(1, "bf16")

    def of(self, name, measure):
        return 1e-3


def settled(rows: int = 100, length: int = 200, model=SMOLLM2, **given) -> tuple[Resolved, Prediction]:
    """Settings and prediction for so many rows of so many tokens."""
    given = {"compute": "bf16", "threads": 1, "eval_fraction": 0.0, **given}
    resolved = settle_for_machine(Resolved(TrainConfig(**given), dict.fromkeys(given, "given")))
    seen = [Row([5] * length, [True] * length)] * rows
    resolved, plan = settle_for_data(resolved, seen, length, CONFIG)
    return predict.settle(resolved, plan, model, Rows(seen, []), Held(0, 0))


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Nothing is measured, and the machine has room."""
    monkeypatch.setattr(Speeds, "of", Known.of)
    monkeypatch.setattr(machine, "available_memory", lambda: AMPLE)


def test_nothing_is_left_to_choose():
    """Every setting that memory decides has a value and a reason, and they agree with each other."""
    resolved, _ = settled()
    config = resolved.config
    assert (config.micro_batch_tokens, config.checkpointing, config.checkpointed_layers) == (1024, "off", 0)
    assert (config.loss_chunk, config.paging) == (512, "off")
    for name in ("micro_batch_tokens", "checkpointing", "checkpointed_layers", "loss_chunk", "paging"):
        assert resolved.origin[name].startswith("auto: "), name


def test_without_a_budget_activations_are_bounded():
    """However much is free, packs are those that are worth their activations, and a large model computes layers twice
    before activations pass 1.2 GB; where less is free, half of it."""
    _, small = settled()
    _, large = settled(model=LARGE)
    assert small.use.checkpointed == 0
    assert (large.use.limit, large.use.checkpointed > 0) == (512, True)
    assert max(p.memory.parts["activations"] for p in (small, large)) <= fit.ACTIVATIONS


def test_what_is_given_is_kept():
    """No rule touches what the user said; what is computed twice is as they said."""
    given = {"micro_batch_tokens": 700, "checkpointing": "all", "loss_chunk": 100, "paging": "off"}
    resolved, prediction = settled(**given)
    assert {name: getattr(resolved.config, name) for name in given} == given
    assert resolved.config.checkpointed_layers == prediction.use.checkpointed == 30
    assert settled(checkpointing="off", micro_batch_tokens=2048)[0].config.checkpointed_layers == 0
    assert settled(checkpointed_layers=3)[0].config.checkpointing == "some"


def test_a_resumed_run_chooses_nothing(monkeypatch):
    """Read back, every setting is as it was, whatever the machine has become."""
    resolved, first = settled(memory="1GB")
    monkeypatch.setattr(machine, "available_memory", lambda: 0)
    seen = [Row([5] * 200, [True] * 200)] * 100
    origin = dict.fromkeys(resolved.origin, "run.yaml")
    again, second = predict.settle(
        Resolved(resolved.config, origin), Plan(13, 13), SMOLLM2, Rows(seen, []), Held(0, 0), resumed=True
    )
    assert again.config == resolved.config
    assert second.use == first.use


def test_what_is_chosen_fits_and_more_memory_is_never_slower():
    """Over a sweep of budgets the predicted peak, with its margin, stays inside, and seconds fall."""
    seconds = []
    for budget in (640, 700, 800, 1000, 1400, 2000):
        _, prediction = settled(memory=f"{budget}MB", rows=64, base="bf16")
        assert prediction.memory.total * fit.SAFETY <= budget * 10**6
        seconds.append(prediction.clock.steps(prediction.work))
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[0] > seconds[-1]


def test_fewer_bits_come_last():
    """The base keeps its bits while anything else can give way; one that was asked for is kept always."""
    needs = settled(memory="2GB")[1].memory.parts["weights_private"]
    assert settled(memory="700MB", base="auto")[0].config.base == "bf16"
    resolved, _ = settled(memory=f"{needs // 10**6 + 230}MB", base="auto")
    assert resolved.config.base in ("int8", "nf4")
    assert "may take" in resolved.origin["base"]
    with pytest.raises(MemoryLimitError):
        settled(memory=f"{needs // 10**6 + 230}MB", base="bf16")


def test_where_nothing_fits_three_ways_out_are_named():
    """By how much it is too small, and three changes of which each alone makes it fit: tried here, the error's own
    --memory does."""
    with pytest.raises(MemoryLimitError) as caught:
        settled(memory="510MB", base="bf16")
    (line,) = caught.value.lines()
    assert caught.value.exit_code == 3
    assert "less than the" in line
    assert line.count("; or ") == 2
    enough = line.split("--memory ")[1].split()[0]
    assert settled(memory=enough, base="bf16")[1].memory.total * fit.SAFETY <= bytes_of(enough)


def test_rows_are_shortened_only_where_that_is_allowed():
    """--shorten lowers max_length where nothing else fits; without it that is an error."""
    tight = {"memory": "660MB", "base": "bf16", "length": 4000, "rows": 8}
    with pytest.raises(MemoryLimitError, match="--memory"):
        settled(**tight)
    resolved, prediction = settled(**tight, shorten=True)
    assert resolved.config.max_length == prediction.use.longest < 4000


def test_a_mapped_base_larger_than_memory_is_paged():
    """Where the file does not fit, its layers are dropped behind; where it does, they stay."""
    large = llama(32, 4096, 14336, heads=32, key_heads=8, vocabulary=32000, mapped=True, pageable=True)
    resolved, prediction = settled(model=large, base="packed", memory="5GB")
    assert resolved.config.paging == "on"
    assert prediction.memory.total < 5 * 10**9 < large.file_bytes
    assert settled(model=large, base="packed", memory="60GB")[0].config.paging == "off"


def test_time_follows_the_work():
    """Twice the steps take twice as long; layers computed twice cost more; so do more packs of the same tokens."""
    use = Use("bf16", "bf16", 16, ("all-linear",), 1024, 1024, 512, 256, 512)
    clock = Clock(SMOLLM2, use, Known())
    one, two = [Pack(1024, 512, 200.0)], [Pack(512, 256, 200.0)] * 2
    assert clock.steps(Work([one], 10)) == pytest.approx(10 * clock.step(one))
    assert clock.step(two) > clock.step(one)
    again = Clock(SMOLLM2, Use(**{**vars(use), "checkpointed": 30}), Known())
    assert again.step(one) > clock.step(one)


def test_the_first_steps_correct_what_is_left():
    """A machine that turns out half as fast doubles the estimate; step 1 counts only until step 2 is known."""
    left = Remaining([2.0] * 10, 10, others=0.0)
    assert left.seconds(0) == pytest.approx(20)
    left.took(1, 40.0)
    assert left.seconds(1) == pytest.approx(18 * 20)
    left.took(2, 4.0)
    assert left.seconds(2) == pytest.approx(32)
    assert left.seconds(10) == 0


def test_steps_of_unequal_length_are_told_apart():
    """What is left follows the tokens of the steps to come, not the mean of those gone."""
    left = Remaining([1.0, 1.0, 8.0], 3, others=0.0)
    left.took(1, 2.0)
    left.took(2, 2.0)
    assert left.seconds(2) == pytest.approx(16)


def test_the_loss_does_not_depend_on_the_choice(tmp_path):
    """Trained with packs, chunks and checkpointing of an ample and of a tight budget, on packed and unpacked weights,
    the losses are equal within fp32 rounding."""
    import lorafit
    from builders.commands import World

    world = World(tmp_path)
    common = {**QUICK, "model": world.gguf, "data": world.data, "eval": world.test}
    tight = {"micro_batch_tokens": 40, "loss_chunk": 5, "checkpointing": "all"}
    losses = [
        lorafit.train(**common, **options, out=tmp_path / f"o{n}").report["adapter_loss"]
        for n, options in enumerate(
            ({}, tight, {"base": "fp32"}, {**tight, "base": "fp32"}, {"paging": "on", "base": "packed"})
        )
    ]
    assert losses == pytest.approx([losses[0]] * 5, rel=1e-5)


def test_measured_speeds_are_kept(tmp_path: Path, monkeypatch):
    """What was measured once is read back, and a damaged file is measured anew."""
    monkeypatch.undo()
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path))
    speeds = Speeds(1, "fp32")
    first = speeds.product(64, 64, 4, backward=True)
    assert first > 0
    speeds.keep()
    assert Speeds(1, "fp32").product(64, 64, 4, backward=True) == first
    (file,) = (tmp_path / "speeds").iterdir()
    file.write_text("{")
    assert Speeds(1, "fp32").attention(4, 2, 16, 32.0, backward=False) > 0
    alone, adapted = (speeds.expert(32, 16, rank, 40.0, backward=True) for rank in (0, 4))
    assert 0 < alone < 1
    assert 0 < adapted < 1


def test_experts_take_as_long_as_those_that_tokens_go_to(monkeypatch):
    """8 experts of which a token passes 2: one token visits 2 of them, 100 visit all 8, 25 tokens each; a layer that is
    computed twice, twice there."""
    asked = []
    monkeypatch.setattr(Speeds, "expert", lambda _, *what: asked.append(what) or (10.0 if what[-1] else 1.0))
    shapes = {
        "model.embed_tokens.weight": (100, 64),
        "model.layers.0.self_attn.o_proj.weight": (64, 64),
        "model.layers.0.mlp.experts.gate_up_proj": (8, 96, 64),
        "model.layers.0.mlp.experts.down_proj": (8, 64, 48),
    }
    config = {"model_type": "qwen3_moe", "hidden_size": 64, "num_attention_heads": 4, "num_experts_per_tok": 2}
    model = of_shapes(config, shapes)
    use = Use("bf16", "bf16", 4, ("experts",), 1024, 100, 100, 100, 512)
    clock, twice = (Clock(model, replace(use, checkpointed=n), Known()) for n in (0, 1))
    assert clock.pack(Pack(1, 1, 1.0)) == pytest.approx(2 * (1 + 10), rel=0.1)
    assert asked == [(64, 48, 4, 1.0, False), (64, 48, 4, 1.0, True)]
    assert clock.pack(Pack(100, 1, 1.0)) == pytest.approx(8 * (1 + 10), rel=0.1)
    assert asked[-1] == (64, 48, 4, 25.0, True)
    assert clock.pack(Pack(100, 1, 1.0), trains=False) == pytest.approx(8, rel=0.1)
    assert twice.pack(Pack(100, 1, 1.0)) == pytest.approx(8 * (2 + 10), rel=0.1)


def test_kinds_of_adapters_that_take_longer_are_said_to():
    """DoRA's gains take time there and back, and its lengths once a step; where layers are transformers' own it all is
    slower. PiSSA's start is computed once, before step 1."""
    clocks = [settled(**given)[1].clock for given in ({}, {"use_dora": True}, {"init": "pissa"})]
    pack = Pack(200, 100, 200.0)
    plain, dora, pissa = (clock.pack(pack) for clock in clocks)
    assert plain <= pissa < dora  # its products of twice the rank take as long here, where nothing is measured
    assert clocks[1].step([pack, pack]) - 2 * dora > clocks[0].step([pack, pack]) - 2 * plain
    own = replace(clocks[1], model=replace(clocks[1].model, kind="phi3"), _layers={})
    assert own.pack(pack) > 1.5 * plain
    assert clocks[2].load() > clocks[0].load() == clocks[1].load()
    assert settled(init="loftq")[1].clock.load() == clocks[2].load()


def test_evas_start_is_counted():
    """Rows run through the model before step 1, at most 4,096 tokens, and the inputs of each group are decomposed."""
    plain, eva = (settled(init=init)[1] for init in ("default", "eva"))
    assert (plain.work.looked, eva.work.looked) == (0, min(4096, eva.work.looked))
    started = eva.clock.looking(eva.work)
    assert started > eva.clock.pack(Pack(eva.work.looked, 0, 1.0), trains=False)
    assert eva.clock.whole(eva.work) == pytest.approx(plain.clock.whole(plain.work) + started)
