"""What a comparison means, in plain words, each sentence with the figure that it stands on."""

from __future__ import annotations

from typing import Any

from lorafit import console

FACTOR = 1.15  # time and memory that count as different
FEW = 100  # steps below which learning rates differ from those of longer runs ("LoRA Without Regret", 2025)


def advice(found: dict[str, Any]) -> list[dict[str, str]]:
    """[{"say", "because"}] from compare.json's figures."""
    told = []
    methods = {name: arm for name, arm in found["methods"].items() if "loss" in arm}
    for name, arm in found["methods"].items():
        if "loss" not in arm:
            told.append(_say(f"{name} gave no result here.", arm["failure"]))
    if {"lora", "full"} <= methods.keys():
        told += [_quality(found), *_cost(methods["lora"], methods["full"]), *_forgetting(found)]
        if found["steps"] < FEW:
            because = f"{found['steps']} steps are few, and the one that is behind may still be falling faster"
            told.append(_say("Compare again with more steps before you decide.", because))
        if found["sweep"] is None:
            because = "both ran at their rule's learning rate, and a difference may be that of the rates"
            told.append(_say("Run again with --lr-sweep before you rest on a small difference.", because))
    for name, sweep in (found["sweep"] or {}).items():
        best = next(point for point in sweep["rates"] if point["lr"] == sweep["best"])
        if sweep["inside"]:
            because = f"lowest held-out loss, {best['loss']:.4f}, with worse ones on both sides"
            told.append(_say(f"Train {name} with --lr {sweep['best']:g}.", because))
        elif best["loss"] is not None:
            because = f"the best of them, {sweep['best']:g}, is the last that was tried on its side"
            told.append(_say(f"The best learning rate of {name} may lie further out.", because))
    told += [_helped(name, found["differences"][f"{name} - base"]) for name in methods]
    return told


def interval(gap: dict[str, float | None]) -> str:
    """A difference as people read it: -0.0310 (-0.0420 to -0.0200)."""
    told = f"{gap['mean']:+.4f}"
    return told if gap["low"] is None else f"{told} ({gap['low']:+.4f} to {gap['high']:+.4f})"


def _say(what: str, because: str) -> dict[str, str]:
    return {"say": what, "because": because}


def _quality(found: dict[str, Any]) -> dict[str, str]:
    gap = found["differences"]["full - lora"]
    because = f"full minus LoRA is {interval(gap)} nats per token on {found['rows']} held-out rows, 95 % interval"
    if gap["low"] is None or gap["low"] <= 0 <= gap["high"]:
        return _say("LoRA does what full fine-tuning does here: take LoRA.", because)
    if gap["low"] > 0:
        return _say("LoRA is better here: take LoRA.", because)
    lora = found["methods"]["lora"]
    more = f"; {lora['trainable_parameters']:,} parameters may be few for {lora['trained_tokens']:,} trained tokens"
    what = "Full fine-tuning is better here: take it if its cost suits you, or give LoRA a higher --rank first."
    return _say(what, because + more)


def _cost(lora: dict[str, Any], full: dict[str, Any]) -> list[dict[str, str]]:
    told = []
    times = full["training_seconds"] / max(lora["training_seconds"], 1e-9)
    if times > FACTOR or times < 1 / FACTOR:
        seconds = " against ".join(console.duration(arm["training_seconds"]) for arm in (full, lora))
        told.append(_say(f"Full fine-tuning takes {times:.1f} times LoRA's time.", f"{seconds} for the same steps"))
    memory = full["peak_memory_bytes"] / max(lora["peak_memory_bytes"], 1)
    if memory > FACTOR:
        peaks = " against ".join(console.gigabytes(arm["peak_memory_bytes"]) for arm in (full, lora))
        told.append(_say(f"It needs {memory:.1f} times the memory.", f"{peaks} at the peak"))
    sizes = " against ".join(console.gigabytes(arm["bytes_on_disk"]) for arm in (full, lora))
    told.append(_say("Each further task costs a whole model, or an adapter beside the one base.", f"{sizes} on disk"))
    return told


def _forgetting(found: dict[str, Any]) -> list[dict[str, str]]:
    if found["forget"] is None:
        return []
    gaps = found["forget"]["differences"]
    between = gaps["full - lora"]
    because = f"on {found['forget']['file']}, full minus LoRA is {interval(between)} nats per token"
    because += f"; against the base LoRA is {interval(gaps['lora - base'])}, full {interval(gaps['full - base'])}"
    if between["low"] is not None and between["low"] > 0:
        return [_say("Full fine-tuning forgets more.", because)]
    if between["high"] is not None and between["high"] < 0:
        return [_say("LoRA forgets more.", because)]
    return [_say("They forget alike, as far as these rows can tell.", because)]


def _helped(name: str, gap: dict[str, float | None]) -> dict[str, str]:
    because = f"{interval(gap)} nats per token against the base"
    if gap["high"] is not None and gap["high"] < 0:
        return _say(f"{name} helped.", because)
    if gap["low"] is not None and gap["low"] > 0:
        return _say(f"{name} made it worse: lower the learning rate, or train for fewer steps.", because)
    return _say(f"{name} made no difference beyond noise: more data or more steps may.", because)
