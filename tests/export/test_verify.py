"""When a comparison passes and when it is an error; what is compared."""

from __future__ import annotations

import pytest
import torch

from builders.chats import style_tokenizer
from builders.commands import write_rows
from builders.models import frozen, tiny_model
from builders.tokenizers_tiny import tiny_tokenizer
from lorafit.errors import AdapterError, ConfigError
from lorafit.export.probes import LENGTH, Probe, log_probabilities, probes
from lorafit.export.verify import Gap, Ours, Verdict, floor, rounding_facts, rounding_steps


def verdict(adapted: float, base: float = 0.0, effect: float = 0.0, size: float = 1.0, limit: float = 0.001) -> Verdict:
    gaps = [Gap(value, value / 2) for value in (adapted, base, effect, size)]
    return Verdict("llama.cpp", 12, limit, *gaps)


def test_what_passes():
    """Within the floor; or within twice what the base alone differs by, when the effect is the same."""
    assert verdict(0.0009).check("x").facts()["largest_difference"] == 0.0009
    verdict(0.9, base=0.5, effect=0.4, limit=0.5).check("x")
    Verdict("llama.cpp", 12, 0.05, Gap(0.4, 0.2), size=Gap(2.0, 0.9)).check("merged")


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (verdict(0.0011), "log-probabilities in llama.cpp differ by 0.0011, more than 0.001"),
        (verdict(1.1, base=0.5, limit=0.5), "differ by 1.1, more than 1"),
        (verdict(0.5, base=2.1, limit=0.5), "the base alone differs by 2.1"),
        (verdict(0.4, base=0.1, effect=0.6, limit=0.5), "the adapter's effect in llama.cpp is another one"),
        (verdict(float("nan")), "differ by nan"),
        (Verdict("llama.cpp", 12, 0.05, Gap(0.4, 0.3), size=Gap(2.0, 0.9)), "differ by 0.4, more than 0.05"),
    ],
)
def test_what_is_an_error(found, said):
    """Above the floor, a base that is read differently, an effect that is another one, NaN."""
    with pytest.raises(AdapterError, match=said):
        found.check("out.gguf")


def test_floors_rise_with_what_is_rounded():
    """In F32 only the order of sums is left; formats whose activations are rounded explain more."""
    assert floor("F32") == 0.005
    assert floor("F32") < floor("F16") <= floor("BF16") < floor("Q8_0") < floor("Q4_1") == floor("Q6_K")


def test_rounding_explains_what_its_steps_explain():
    """A 16-bit file that is off by half of the effect is an error, unless no weight is further off than rounding to the
    format takes it: by torch's own rounding, numbers below the format's normal ones too, and not by a step more."""
    mine = Ours(torch.zeros(2, 3), torch.ones(2, 3))
    with pytest.raises(AdapterError, match=r"of the merged model differ by 0.7 .*, and the adapter's effect is 1;"):
        rounding_facts(mine, torch.full((2, 3), 1.7), "BF16", "out", lambda: 1.5)
    told = rounding_facts(mine, torch.full((2, 3), 1.7), "BF16", "out", lambda: 1.0)
    assert told["rounding_difference_rms"] == pytest.approx(0.7)
    exact = torch.randn(64, 64) * torch.logspace(-9, 2, 64)
    for kind, dtype in (("F16", torch.float16), ("BF16", torch.bfloat16)):
        stored = exact.to(dtype)
        assert 0.4 < rounding_steps([(exact, stored)], kind) <= 1
        assert rounding_steps([(exact, stored), (exact, exact.roll(1, 0).to(dtype))], kind) > 100
        assert rounding_steps([(exact, stored.float() * 1.01)], kind) > 1


def test_rows_begin_answers_and_go_on(tmp_path):
    """Compared are the first token of the answer, one in it and the last; rows are cut to LENGTH tokens and counted."""
    tokenizer = tiny_tokenizer()
    rows = [{"prompt": f"Q{n}", "completion": "SELECT name FROM people"} for n in range(20)]
    rows[1]["completion"] = "word " * 400
    found = probes(tokenizer, str(write_rows(tmp_path / "d.jsonl", rows)), 4096)
    assert len(found) == 8
    first = found[0]
    assert tokenizer.decode(first.prefixes[0]).endswith("<|im_start|>assistant\n")
    assert len(first.lengths) == 3
    assert len(found[1].ids) == LENGTH
    assert probes(style_tokenizer("llama3"), None, 4096)[0].lengths


def test_a_file_without_answers_is_refused(tmp_path):
    """Nothing to compare is said, in one line."""
    with pytest.raises(ConfigError, match="no row to compare"):
        probes(tiny_tokenizer(), str(write_rows(tmp_path / "d.jsonl", [{"text": "a"}])), 1)


def test_log_probabilities_are_the_plain_ones(tmp_path):
    """One row of the table for each beginning: log softmax of the logits after its last token, by transformers."""
    model = tiny_model("llama")
    found = [Probe((5, 9, 200, 31, 7), (2, 4)), Probe((4, 8, 100), (3,))]
    ours = log_probabilities(frozen(model, tmp_path / "m").model, found)
    with torch.no_grad():
        want = [model(torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(-1)
                for ids in ([5, 9], [5, 9, 200, 31], [4, 8, 100])]  # fmt: skip
    torch.testing.assert_close(ours, torch.stack(want), rtol=1e-4, atol=1e-4)
