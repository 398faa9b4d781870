"""What a run says of itself on the screen, before its first step and after its last."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from lorafit import console
from lorafit.adapter.attach import adapted_layers, trained
from lorafit.adapter.peft_config import method_of
from lorafit.frozen.fingerprint import EXACT_FORMATS
from lorafit.job import Job
from lorafit.kernels import native
from lorafit.model.load import bytes_by_format
from lorafit.tuned import disk_bytes


def describe(job: Job) -> None:
    """What is about to happen, and every value that was chosen rather than given."""
    config, counts = job.resolved.config, job.data.counts
    layers, full = list(adapted_layers(job.base.model)), config.method == "full"
    trainable = sum(parameter.numel() for parameter in trained(job.base.model).values())
    told = "all weights trained" if full else f"{len(layers)} layers adapted"
    console.say(f"model     {config.model}: {job.base.model.config.model_type}, {told}")
    if job.base.part_of:
        console.say(f"          the text part of {job.base.part_of}: its vision tower is neither read nor trained")
    console.say(f"data      {counts['used']} rows, {counts['tokens']} tokens, "
                f"{counts['trained_tokens']} trained; {len(job.evaluation)} rows held out")  # fmt: skip
    if full:
        _describe_full(trainable, job.source_formats, out=Path(config.out))
    else:
        console.say(f"adapter   {method_of(job.base.model)}, {trainable:,} parameters")
    console.say(f"steps     {job.plan.steps} of {config.batch_size} rows")
    for name in ("lr", "base", "compute"):
        console.say(f"{name:<9} {getattr(config, name)}  ({job.resolved.origin.get(name, 'default')})")
    needed = job.prediction.memory.total, job.prediction.seconds()
    console.say(f"needs     about {console.gigabytes(needed[0])} and {console.duration(needed[1])}, predicted")
    sizes = [f"{name} {console.gigabytes(size)}" for name, size in bytes_by_format(job.base.model).items()]
    console.say(f"weights   {', '.join(sizes)}; kernels {native.describe()[0]}")
    if config.packing == "off":
        console.say(f"packing   off  ({job.resolved.origin.get('packing', 'default')})")
    if not job.base.fused:
        console.say(f"layers    transformers' own: {job.base.model.config.model_type} has no fused ones here")
    if config.checkpointed_layers:
        console.say(
            f"computed twice: {config.checkpointed_layers} layers  ({job.resolved.origin['checkpointed_layers']})"
        )
    if job.base.kept:
        first = ", ".join(job.base.kept[:3]) + (", ..." if len(job.base.kept) > 3 else "")
        console.warn(f"{len(job.base.kept)} layers stay in 16 bits, their rows are no whole blocks: {first}")
    for place, what in job.data.problems[:8]:
        console.warn(f"{place}: {what}")
    if len(job.data.problems) > 8:
        console.warn(f"and {len(job.data.problems) - 8} more; `lorafit preview` lists them all")
    if not job.base.tokenizer.has_template:
        console.warn("the model has no chat template: rows use the plain one of the documentation")


def _describe_full(trainable: int, formats: dict[str, int], out: Path) -> None:
    """What full fine-tuning takes: 16 bytes a weight in memory, and on disk at most four checkpoints at once."""
    weights, state = console.gigabytes(4 * trainable), console.gigabytes(8 * trainable)
    console.say(
        f"trained   {trainable:,} parameters: {weights} in fp32, as much of gradients, {state} of AdamW's state"
    )
    packed = [name for name in formats if name not in EXACT_FORMATS]
    if packed:
        console.say(f"from      the values that the file's {', '.join(packed)} stand for: dequantised, then trained")
    place = next(path for path in (out, *out.absolute().parents) if path.exists())
    needed, free = disk_bytes(trainable), shutil.disk_usage(place).free
    console.say(f"disk      {console.gigabytes(needed)} at most, for checkpoints and the model")
    if free < needed:
        console.warn(f"{out} has {console.gigabytes(free)} free: a save that does not fit stops the run")


def farewell(out: Path, report: dict[str, Any]) -> None:
    base, adapter = report["base_loss"], report["adapter_loss"]
    if adapter is not None:
        console.say(f"held-out loss {base:.4f} -> {adapter:.4f} nats per trained token")
    console.say(f"{report['steps']} steps in {console.duration(report['training_seconds'])}, "
                f"{report['tokens_per_second']:.0f} tokens/s")  # fmt: skip
    predicted = report["predicted"]
    console.say(f"memory    {console.gigabytes(report['peak_memory_bytes'])} at the peak, "
                f"{console.gigabytes(predicted['memory_bytes'])} predicted")  # fmt: skip
    console.say(f"time      {console.duration(report['seconds'])} in all, "
                f"{console.duration(predicted['seconds'])} predicted")  # fmt: skip
    made = next(name for name in ("adapter", "model") if (out / name).is_dir())
    console.say(f"{made:<9} {out / made}")
    console.say(f"report    {out / 'report.html'}")
