"""The report's page in a real browser, headless Chromium: nothing runs over, nothing is run, light and dark differ.

`make proof-page`, with `chromium` (Debian's package) or CHROMIUM=/path/to/one. The screenshots stay in
.cache/proofs/page, to be looked at.
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

import lorafit
from builders.commands import QUICK, World, write_rows

KEPT = Path(__file__).parent.parent / ".cache" / "proofs" / "page"
WIDTHS = (320, 390, 768, 1280)
HIT = "<script>parent.document.title = 'run'</script><img src=x onerror=\"parent.document.title = 'run'\">"
ODD = (HIT, "unbroken" * 200, "שלום עולם، مرحبا", "日本語" * 80, "👩‍👩‍👧", "a\tb\n\n  c")


def chromium(*words: str) -> str:
    """What headless Chromium prints."""
    program = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    assert program, "needs chromium: apt-get install chromium, or set CHROMIUM"
    command = [program, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--timeout=20000"]
    return subprocess.run([*command, *words], capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """The report of a run whose data is odd in every way that text can be."""
    world = World(tmp_path_factory.mktemp("page"))
    rows = [{"prompt": f"{text} {n}", "completion": f"{text} is {n}."} for n, text in enumerate(ODD)]
    odd = write_rows(world.folder / "odd.jsonl", rows)
    out = world.folder / "out"
    lorafit.train(model=world.model, data=[world.data, odd], eval=odd, out=out, max_length=200, **QUICK)
    return out / "report.html"


def test_nothing_runs_over_at_any_width_and_no_script_of_the_data_is_run(page, tmp_path):
    """From a small phone to a desk: the page is as wide as its window, with every detail opened; the data's script and
    event handler leave the wrapping page's title alone."""
    inside = html.escape(page.read_text(encoding="utf-8").replace("<details", "<details open"), quote=True)
    frames = "".join(f'<iframe width={width} height=900 srcdoc="{inside}"></iframe>' for width in WIDTHS)
    measure = (
        "addEventListener('load', () => { const told = [...document.querySelectorAll('iframe')].map(f => "
        "[f.clientWidth, f.contentDocument.documentElement.scrollWidth, f.contentDocument.images.length]);"
        "document.body.setAttribute('data-told', JSON.stringify(told)); })"
    )
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(f"<!doctype html><meta charset=utf-8><title>calm</title>{frames}<script>{measure}</script>")
    dom = chromium("--dump-dom", wrapper.as_uri())
    told = json.loads(html.unescape(re.search(r'data-told="(.*?)"', dom)[1]))
    assert [width for width, _, _ in told] == list(WIDTHS)
    assert all(scroll <= width for width, scroll, _ in told), told
    assert all(images == 0 for _, _, images in told)
    assert "<title>calm</title>" in dom


@pytest.mark.parametrize(("mode", "scheme"), [("light", 1), ("dark", 0)])
@pytest.mark.parametrize("width", [500, 1000])
def test_light_and_dark_are_what_was_asked_for(page, mode, scheme, width):
    """The page's ground is bright in light and dark in dark, and it shows many shades: something is drawn."""
    KEPT.mkdir(parents=True, exist_ok=True)
    shot = KEPT / f"{mode}-{width}.png"
    chromium(
        f"--blink-settings=preferredColorScheme={scheme}", f"--window-size={width},2400", f"--screenshot={shot}",
        page.as_uri(),
    )  # fmt: skip
    grey = Image.open(shot).convert("L")
    assert (grey.getpixel((2, 2)) > 200) == (mode == "light")
    assert sum(count > 0 for count in grey.histogram()) > 60
