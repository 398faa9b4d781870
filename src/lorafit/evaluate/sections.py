"""The sections of the report's page that show what was found, each from report.json alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorafit import console
from lorafit.evaluate import charts
from lorafit.evaluate.marks import marks
from lorafit.evaluate.markup import both, counted, esc, fact_table, plainly

MOVED = 8  # layers that are listed


def answers(samples: Sequence[dict[str, str]]) -> str:
    """Base and trained model beside each other, each against the right answer."""
    if not samples:
        return "<p>None: no rows were held out.</p>"
    note = (
        "<p class=note>The first held-out rows, answered greedily. <mark>Marked</mark> words are not in the right "
        "answer, <ins>underlined</ins> ones are missing: only the right answer has them.</p>"
    )
    return note + "".join(map(_sample, samples))


def _sample(sample: dict[str, str]) -> str:
    prompt, expected = sample["prompt"], sample["expected"]
    short = " ".join(sample.get("question", prompt).split())
    short = short if len(short) <= 120 else "... " + short[-116:]
    told = "".join(
        f"<div class='answer{' hit' if sample[who].strip() == expected.strip() else ''}'><h4><span>{title}</span>"
        f"{'<span class=badge>the right answer</span>' if sample[who].strip() == expected.strip() else ''}</h4>"
        f"<p dir=auto>{_marked(sample[who], expected)}</p></div>"
        for who, title in (("base", "Before: the base"), ("adapter", "After: trained"))
    )
    return (
        f"<div class=sample><details><summary>{esc(short)}</summary>"
        f"<div class=prompt dir=auto>{esc(prompt)}</div></details>"
        f"<div class=answers><div class='answer right'><h4>The right answer</h4><p dir=auto>{esc(expected)}</p></div>"
        f"{told}</div></div>"
    )


def _marked(answer: str, expected: str) -> str:
    tags = {"same": ("", ""), "other": ("<mark>", "</mark>"), "missing": ("<ins>", "</ins>")}
    pieces = [f"{tags[kind][0]}{esc(text)}{tags[kind][1]}" for kind, text in marks(answer, expected)]
    return "".join(pieces) or "<span class=note>nothing</span>"


def trained_on(report: dict[str, Any]) -> str:
    """What was trained on what."""
    trained, base = report["trained"], report["base"]
    own = report["total_parameters"] - (report["trainable_parameters"] if trained["layers"] else 0)
    stored = ", ".join(f"{name} {console.gigabytes(size)}" for name, size in base["bytes_by_format"].items())
    facts = [
        ("model", trained["model"]),
        ("architecture", f"{trained['architecture']}, {own:,} parameters"),
        ("frozen weights", stored),
        ("method", report["method"]),
        ("trained parameters", f"{report['trainable_parameters']:,}"
         f" ({report['trainable_parameters'] / report['total_parameters']:.2%} of all)"),
    ]  # fmt: skip
    if trained["layers"]:
        facts.append(("adapter", f"rank {trained['rank']}, alpha {trained['alpha']:g}, {trained['layers']} layers"))
    if base["kept_in_16_bits"]:
        facts.append(("kept in 16 bits", ", ".join(base["kept_in_16_bits"])))
    facts += [
        ("data", ", ".join(trained["data"])),
        ("evaluated on", ", ".join(trained["eval"]) or "rows held out of the data"),
        ("tokens seen", f"{report['tokens']:,} ({report['trained_tokens']:,} trained)"),
        ("folder", trained["out"]),
    ]
    return fact_table(facts)


def data_found(report: dict[str, Any]) -> str:
    """Rows by length, how much of them is trained, and what was odd."""
    data, lengths = report["data"], report["findings"]["lengths"]
    where = "evaluated on, from other files" if report["trained"]["eval"] else "of them held out"
    held = f"; {data['held_out']:,} {where}" if data["held_out"] else ", none held out"
    share = data["trained_tokens"] / data["tokens"] if data["tokens"] else 0.0
    facts = [
        ("rows", f"{data['rows']:,}, {data['used']:,} used{held}"),
        ("tokens", f"{data['tokens']:,}"),
        ("trained share", f"{share:.1%} of the tokens ({data['trained_tokens']:,})"),
        ("length", f"{lengths['shortest']:,} to {lengths['longest']:,} tokens, median {lengths['median']:,}"),
        ("cut", counted(data["truncated"], "row")),
        ("left out", counted(data["skipped"], "row")),
        ("duplicates", counted(data["duplicates"], "row")),
    ]
    drawn = both(lambda width: charts.histogram(lengths, width))
    problems, count = report["findings"]["problems"], report["findings"]["problem_count"]
    found = "".join(f"<li>{esc(one['place'])}: {esc(one['what'])}</li>" for one in problems)
    more = (
        f"<li>and {count - len(problems):,} more; lorafit preview lists them all</li>" if count > len(problems) else ""
    )
    listed = f"<summary>{counted(count, 'thing')} to look at</summary><ul class=plain>{found}{more}</ul>"
    noted = f"<details class=more>{listed}</details>"
    return fact_table(facts) + f"<h3>Rows by length</h3>{drawn}" + (noted if problems else "")


def costs(report: dict[str, Any]) -> str:
    """Memory and time, predicted and measured."""
    predicted = report["predicted"]
    rows = [
        ("memory at the peak", predicted["memory_bytes"], report["peak_memory_bytes"], console.gigabytes),
        ("whole command", predicted["seconds"], report["seconds"], console.duration),
    ]
    body = ""
    for name, guess, real, shown in rows:
        off = "" if not guess or not real else f"{guess / real - 1:+.0%}"
        told = "not predicted" if guess is None else shown(guess)
        body += f"<tr><th>{name}</th><td>{esc(told)}</td><td>{esc(shown(real))}</td><td>{off}</td></tr>"
    more = [
        ("training alone", f"{console.duration(report['training_seconds'])}, steps and saves"),
        (
            "private memory",
            f"{console.gigabytes(report['private_memory_bytes'])} at the end, the mapped model file not counted",
        ),
    ]
    return (
        "<table class='num short'><thead><tr><th></th><th>predicted</th><th>measured</th><th>off by</th></tr></thead>"
        f"<tbody>{body}</tbody></table>{fact_table(more)}"
    )


def movement(report: dict[str, Any]) -> str:
    """How far each layer moved."""
    updates = report["updates"]
    if not updates:
        return "<p>No adapter: every weight was trained.</p>"
    measure = "relative" if all(update["relative"] is not None for update in updates) else "norm"
    ordered = sorted(updates, key=lambda update: -update[measure])
    what = "the size of the update beside the weight that it is added to" if measure == "relative" else "its norm"
    listed = "".join(
        f"<li>{esc(update['layer'])}: {esc(charts.amount(update, measure))}</li>" for update in ordered[:MOVED]
    )
    return (
        f"<p class=note>The stronger the colour, the further a matrix moved: {what} (Frobenius norms). From "
        f"{esc(charts.amount(ordered[-1], measure))} to {esc(charts.amount(ordered[0], measure))}.</p>"
        f"{both(lambda width: charts.layer_map(updates, measure, width))}"
        f"<details class=more><summary>The layers that moved most</summary><ul class=plain>{listed}</ul></details>"
    )


def settings(report: dict[str, Any]) -> str:
    """Every setting with where it came from; the machine and the versions."""
    rows = "".join(
        f"<tr><th>{esc(name)}</th><td>{esc(plainly(entry['value']))}</td><td class=why>{esc(entry['origin'])}</td></tr>"
        for name, entry in report["settings"].items()
    )
    chosen = (
        "<details class=more open><summary>Settings, each with where it came from</summary>"
        "<table class='num settings'>"
        "<thead><tr><th>setting</th><th>value</th><th>from</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></details>"
    )
    pair = "".join(f"<div><h3>{title}</h3>{fact_table(list(report[key].items()))}</div>"
                   for key, title in (("machine", "Machine"), ("versions", "Versions")))  # fmt: skip
    return f"{chosen}<div class=two>{pair}</div>"
