"""report.json has the specification's figures; report.html shows them on one page that needs nothing else."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

import lorafit
from builders.commands import QUICK, World, run, write_rows
from lorafit.evaluate.page import page, verdict
from lorafit.evaluate.samples import SAMPLE_TOKENS, SAMPLES
from lorafit.training.metrics import read_metrics

FP32 = ("--compute", "fp32", "--threads", 1)
SCRIPT = "<script>alert('x')</script> & <b>"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    """Its evaluation rows hold markup."""
    world = World(tmp_path_factory.mktemp("report"))
    rows = [{"prompt": f"{SCRIPT} {n}", "completion": f"{SCRIPT} is {n}."} for n in range(5)]
    write_rows(world.folder / "markup.jsonl", rows)
    world.test = world.folder / "markup.jsonl"
    return world


def test_the_report_has_the_specifications_figures_with_their_types(world):
    """Every key, each of its type; counts fit each other, and the metrics add up to them."""
    report = json.loads((world.out / "report.json").read_text())
    kinds = {
        "base_loss": float,
        "adapter_loss": float,
        "tokens": int,
        "trained_tokens": int,
        "steps": int,
        "seconds": float,
        "training_seconds": float,
        "tokens_per_second": float,
        "peak_memory_bytes": int,
        "private_memory_bytes": int,
        "predicted": dict,
        "trainable_parameters": int,
        "total_parameters": int,
        "adapter_bytes": int,
        "data": dict,
        "machine": dict,
        "versions": dict,
        "samples": list,
    }
    assert {key: type(report[key]) for key in kinds} == kinds
    assert {"rows", "used", "skipped", "duplicates", "truncated"} <= set(report["data"])
    assert set(report["predicted"]) == {"memory_bytes", "seconds"}
    lines = [line for line in read_metrics(world.out / "metrics.jsonl") if "loss" in line]
    assert (report["steps"], report["tokens"]) == (6, sum(line["tokens"] for line in lines))
    assert report["tokens_per_second"] == pytest.approx(report["tokens"] / report["training_seconds"], rel=0.1)
    assert report["training_seconds"] <= report["seconds"]
    assert report["private_memory_bytes"] <= report["peak_memory_bytes"]
    assert report["adapter_bytes"] == (world.out / "adapter/adapter_model.safetensors").stat().st_size
    assert report["total_parameters"] == 48_288 + report["trainable_parameters"]


def test_samples_stand_beside_the_right_answers(world):
    """Prompt, expected answer, and what base and adapter say."""
    samples = world.result.report["samples"]
    assert 1 <= len(samples) <= SAMPLES
    for number, sample in enumerate(samples):
        assert list(sample) == ["prompt", "question", "expected", "base", "adapter"]
        assert f"{SCRIPT} {number}" in sample["prompt"]
        assert sample["question"] == f"{SCRIPT} {number}"
        assert sample["expected"] == f"{SCRIPT} is {number}."


def test_samples_are_answered_with_the_adapter_and_without(world):
    """Base and adapter say in the report what `lorafit generate` prints of each."""
    report = world.result.report
    for name, words in (("base", ()), ("adapter", ("--adapter", world.out / "adapter"))):
        outcome = run("generate", world.model, "--data", world.test, "--max-tokens", SAMPLE_TOKENS, *words, *FP32)
        said = [json.loads(line)["output"].strip() for line in outcome.out.splitlines()]
        assert [sample[name] for sample in report["samples"]] == said[: len(report["samples"])]


class Page(HTMLParser):
    """Tags that are open and all tags seen; raises where one closes that is not the innermost open one."""

    VOID = ("meta", "path", "polyline")  # with or without a slash at their end

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        self.seen.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.seen.add(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else(world):
    """Balanced tags, no script, no link, no image, no address, no import."""
    text = (world.out / "report.html").read_text()
    found = Page(text)
    assert found.open == []
    assert found.seen.isdisjoint({"script", "link", "img", "iframe", "a", "object", "base"})
    for word in ("http", "src=", "url(", "@import", "//"):
        assert word not in text


def test_markup_in_the_data_is_text_on_the_page(world):
    """A data row that holds a script is shown, not run."""
    text = (world.out / "report.html").read_text()
    assert "<script" not in text
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; &amp; &lt;b&gt; is 0." in text


def test_the_page_shows_every_figure(world):
    """Losses, steps, tokens, times, speed, memory, parameters, sizes, the machine and every version."""
    text, report = (world.out / "report.html").read_text(), world.result.report
    wanted = [f"{report['base_loss']:.4f}", f"{report['adapter_loss']:.4f}", f"{report['tokens']:,}"]
    wanted += [f"{report['trained_tokens']:,} trained", f"<b>{report['tokens_per_second']:,.0f}</b>"]
    wanted += [f"{report['trainable_parameters']:,} (", "48,288 parameters", f"{report['data']['tokens']:,}"]
    wanted += [f"<td>24, 24 used; {report['data']['held_out']} evaluated on, from other files</td>"]
    wanted += [f"{report[key] / 1e9:.2f} GB" for key in ("peak_memory_bytes", "private_memory_bytes")]
    wanted += [f"<th>{key}</th><td>{value}</td>" for key, value in report["versions"].items()]
    wanted += [f"<th>{key}</th>" for key in report["settings"]]
    assert [figure for figure in wanted if figure not in text] == []


def test_the_curve_has_a_point_per_step_and_evaluation(world):
    """Once for a desk and once for a phone: training over all steps, held out from the base's loss at step 0."""
    text = (world.out / "report.html").read_text()
    for kind, count in (("raw", 6), ("train", 6), ("held", 3)):  # held out: the base, steps 3 and 6
        lines = re.findall(rf"<polyline class={kind} points='(.*?)'", text)
        assert [len(line.split()) for line in lines] == [count, count]


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        (None, "No rows were held out"),
        ({"mean": -1.0, "low": -1.5, "high": -0.5}, "The adapter helped: Held-out loss went from 3.0000 to 2.0000"),
        ({"mean": 1.0, "low": 0.5, "high": 1.5}, "The adapter made it worse"),
        ({"mean": -1.0, "low": -2.5, "high": 0.5}, "No difference beyond noise"),
        ({"mean": -1.0, "low": None, "high": None}, "One row was held out, too few to say"),
    ],
)
def test_the_verdict_follows_from_the_interval(difference, words):
    """Helped or harmed only where the interval leaves out zero."""
    report = {"difference": difference, "base_loss": 3.0, "adapter_loss": 2.0, "method": "lora"}
    assert words in ": ".join(verdict(report))
    assert "adapter" not in " ".join(verdict({**report, "method": "full"})), "full fine-tuning has none"


def test_without_held_out_rows_the_losses_are_null(world, tmp_path):
    """eval_fraction 0: null in report.json, said on the page, nothing measured and no samples."""
    result = lorafit.train(model=world.model, data=world.data, eval_fraction=0.0, out=tmp_path / "out", **QUICK)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [report[key] for key in ("base_loss", "adapter_loss", "difference", "samples")] == [None, None, None, []]
    assert report == result.report
    text = (tmp_path / "out" / "report.html").read_text()
    assert "No rows were held out" in text
    assert "24 used, none held out" in text
    assert "class=held" not in text


def test_one_held_out_row_gives_json_without_infinity(world, tmp_path):
    """Its interval is unknown: null, and the page says that one row is too few."""
    one = write_rows(tmp_path / "one.jsonl", [{"prompt": "a", "completion": "b"}])
    lorafit.train(model=world.model, data=world.data, eval=one, out=tmp_path / "out", **QUICK)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    report = json.loads((tmp_path / "out" / "report.json").read_text(), parse_constant=refuse)
    assert report["difference"]["low"] is None
    assert "too few" in (tmp_path / "out" / "report.html").read_text()


def test_a_page_without_steps_still_stands(world):
    """A run whose metrics were lost has figures and no curve."""
    report = {**world.result.report, "base_loss": None, "difference": None, "tokens_per_second": None, "samples": []}
    assert Page(page(report, [])).open == []


def test_full_fine_tuning_has_no_adapter_and_still_a_page(world):
    """No adapter's file, no layers, no movement: the page says what was trained, and speaks of no adapter file."""
    trained = {**world.result.report["trained"], "layers": 0, "rank": None, "alpha": None}
    settings = {**world.result.report["settings"], "method": {"value": "full", "origin": "given"}}
    report = {**world.result.report, "method": "full", "adapter_bytes": None, "model_bytes": 538_000_000}
    report |= {"updates": [], "trained": trained, "settings": settings}
    text = page(report, read_metrics(world.out / "metrics.jsonl"))
    assert Page(text).open == []
    assert "adapter file" not in text
    assert "<b>0.54 GB</b><span>model file</span>" in text
    assert "No adapter: every weight was trained." in text


def test_what_was_found_is_on_the_page_and_in_the_figures(world):
    """Data's lengths, the layers' movement, what was trained, settings with their origin; report.json has them all."""
    report, text = world.result.report, (world.out / "report.html").read_text()
    assert sum(report["findings"]["lengths"]["counts"]) == report["data"]["used"]
    assert len(report["updates"]) == 14
    assert all(update["relative"] > 0 for update in report["updates"])
    assert report["trained"]["data"] == [str(world.data)]
    assert report["settings"]["rank"] == {"value": 4, "origin": "given"}
    assert text.count("<rect class=cell") == 2 * 14
    for words in ("What to do next", "Rows by length", "predicted", "trained share", "rank 4, alpha 32, 14 layers"):
        assert words in text


def test_predictions_stand_beside_what_was_measured(world):
    """Where a plan was made, both and how far it was off."""
    report = world.result.report
    predicted = {"memory_bytes": int(report["peak_memory_bytes"] * 1.1), "seconds": report["seconds"] * 0.5}
    text = page({**report, "predicted": predicted}, [])
    assert ">+10%<" in text
    assert ">-50%<" in text
    assert "not predicted" not in text


def test_the_page_is_drawn_anew_from_the_runs_files(world, tmp_path):
    """`lorafit report OUT`: the same bytes; a folder without a report, or with another's, is one line."""
    drawn = (world.out / "report.html").read_bytes()
    (world.out / "report.html").unlink()
    outcome = run("report", world.out)
    assert (outcome.code, outcome.out.strip()) == (0, str(world.out / "report.html"))
    assert (world.out / "report.html").read_bytes() == drawn
    assert run("report", tmp_path).err.startswith(f"error: {tmp_path / 'report.json'}: does not exist")
    (tmp_path / "report.json").write_text("{}")
    assert run("report", tmp_path).err.startswith(f"error: {tmp_path / 'report.json'}: is no report that this lorafit")
