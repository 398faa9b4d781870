"""Write the tables of docs/models.md: what the tests showed of each architecture, and the published models' adapters.

    python scripts/architectures.py                   runs the tests that fill the table (some minutes), then writes it
    python scripts/architectures.py --results r.xml   takes them from a file of `pytest --junitxml=r.xml`
    python scripts/architectures.py --check           writes nothing; exit code 1 when the page's rows are not today's

A cell says `yes` where every test of its column passed for that architecture and there was one, `FAILED` where one
failed, and `-` where there is none; nothing where there is nothing to test (experts of a dense model, the tower of a
text model); what is refused on purpose is a line of REFUSED.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "models.md"
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "src")]

COLUMNS = {  # a heading, and the tests that fill it, as "module::test"
    "trains": ("test_architectures::test_loss_falls", "test_moe_experts::test_a_memorised_batch.*"),
    "NF4": (
        "test_architectures::test_nf4_base",
        "test_load::test_quantising.*",
        "test_moe_experts::test_experts_in_nf4.*",
    ),
    "GGUF, packed": (
        "test_architectures::test_gguf_packed",
        "test_load::test_packed_and_unpacked.*",
        "test_moe_experts::test_packed_experts.*",
    ),
    "packing": (
        "test_architectures::test_packs_exactly",
        "test_families::test_packed_rows.*",
        "test_moe_experts::test_packed_rows.*",
    ),
    "multimodal": ("test_architectures::test_a_wrapper_is_its_text_part",),
    "experts": ("test_moe_experts::test_a_memorised_batch_is_learnt",),
    "PEFT and back": (
        "test_architectures::test_adapter_goes_to_peft_and_back",
        "test_peft_experts::test_our_adapter_in_peft.*",
    ),
    "resumes": ("test_architectures::test_resumes", "test_moe_experts::test_a_stopped_run.*"),
    "generates": ("test_architectures::test_generates", "test_moe_experts::test_answers.*"),
    "GGUF export": (
        "test_gguf_adapter::test_base_plus.*",
        "test_gguf_model::test_f32.*",
        "test_multimodal::test_gguf.*",
    ),
}
REFUSED = {  # (model_type, column): why there is no test that passes
    ("qwen3_5_text", "packing"): "one row at a time",
    ("qwen3_5", "packing"): "one row at a time",
    ("qwen3_5_moe_text", "packing"): "one row at a time",
    ("qwen3_5_moe", "packing"): "one row at a time",
    ("qwen3_next", "packing"): "one row at a time",
    ("ministral", "GGUF, packed"): "not in llama.cpp",
    ("ministral", "GGUF export"): "not in llama.cpp",
}
MARK = "<!-- {} made by scripts/architectures.py -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, help="a file of pytest --junitxml")
    parser.add_argument("--check", action="store_true", help="compare the rows with the page's and write nothing")
    options = parser.parse_args()
    if options.check:
        written = set(re.findall(r"^\| `(\w+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
        sys.exit("docs/models.md: run scripts/architectures.py again" if written != set(architectures()) else 0)
    results = read(options.results) if options.results else run()
    tables = {"architectures": architecture_table(results), "published models": published_table()}
    page = PAGE.read_text(encoding="utf-8")
    for name, table in tables.items():
        begin, end = MARK.format(f"begin: {name},"), MARK.format(f"end: {name},")
        before, rest = page.split(begin)
        page = before + begin + "\n" + table + "\n" + end + rest.split(end)[1]
    PAGE.write_text(page, encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)} from {sum(map(len, results.values()))} tests")


def run() -> dict[str, dict[str, bool]]:
    """Runs the tests of every column."""
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if fills(path.stem)]
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "results.xml"
        subprocess.run([sys.executable, "-m", "pytest", "-q", f"--junitxml={found}", *files], cwd=ROOT)
        return read(found)


def fills(module: str) -> bool:
    """Whether a test module may hold tests of a column."""
    return any(re.fullmatch(one.split("::")[0], module) for patterns in COLUMNS.values() for one in patterns)


def read(file: Path) -> dict[str, dict[str, bool]]:
    """{"module::test": {its parameters, joined by "-": whether it passed}}; skipped tests have not."""
    found: dict[str, dict[str, bool]] = {}
    for case in ElementTree.parse(file).iter("testcase"):
        name, _, parameters = case.get("name", "").partition("[")
        test = f"{case.get('classname', '').rsplit('.', 1)[-1]}::{name}"
        passed = not any(child.tag in ("failure", "error", "skipped") for child in case)
        found.setdefault(test, {})[parameters.rstrip("]")] = passed
    return found


def architectures() -> list[str]:
    """Every model_type that we load, multimodal ones last, of whose text part we know the type."""
    from lorafit.model.architectures import WRAPPERS
    from lorafit.model.sources import MODEL_TYPES

    return [*MODEL_TYPES, *(kind for kind, wrapper in WRAPPERS.items() if wrapper.text in MODEL_TYPES)]


def architecture_table(results: dict[str, dict[str, bool]]) -> str:
    lines = ["| model_type | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for kind in architectures():
        lines.append(f"| `{kind}` | " + " | ".join(cell(kind, column, results) for column in COLUMNS) + " |")
    return "\n".join(lines)


def cell(kind: str, column: str, results: dict[str, dict[str, bool]]) -> str:
    from lorafit.model.architectures import MOE, WRAPPERS

    if (kind, column) in REFUSED:
        return REFUSED[kind, column]
    text = WRAPPERS[kind].text if kind in WRAPPERS else kind
    mixed = text in MOE or text == "gemma4_text"  # some of which have experts
    if (column == "experts" and not mixed) or (column == "multimodal" and kind not in WRAPPERS):
        return ""
    outcomes = [
        passed
        for test, cases in results.items()
        if any(re.fullmatch(pattern, test) for pattern in COLUMNS[column])
        for parameters, passed in cases.items()
        if kind in parameters.split("-")
    ]
    if outcomes:
        return "yes" if all(outcomes) else "FAILED"
    as_text = kind in WRAPPERS and column in ("NF4", "GGUF, packed", "experts")  # they load as the text model inside
    return f"as `{WRAPPERS[kind].text}`" if as_text else "-"


def published_table() -> str:
    """Parameters of the text part, and those of an adapter of rank 16 on every linear layer, with its file's size."""
    from builders.published import published, text_of
    from lorafit import catalogue
    from lorafit.adapter.attach import attach
    from lorafit.model.sources import MODEL_TYPES

    lines = ["| model | parameters | rank 16, all-linear | file | configuration |", "|---|--:|--:|--:|---|"]
    for name in catalogue.names():
        if text_of(name)["model_type"] not in MODEL_TYPES:
            continue
        model = published(name)
        total = sum(parameter.numel() for parameter in model.parameters())
        attach(model, rank=1)
        count = 16 * sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        sure = "unverified in part" if "unverified" in catalogue.source(name) else "published"
        lines.append(f"| {name} | {total / 1e9:,.2f} B | {count:,} | {count * 4 / 1e6:,.0f} MB | {sure} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
