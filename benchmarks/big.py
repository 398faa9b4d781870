"""A model of 8B's shape on a small machine: two steps of 512 tokens on 4 bits, beside bitsandbytes and PEFT.

    python -m benchmarks.big FILE [--layers 2] [--matrices q4_0] [--ours] [--peer] [--keep]

FILE is written first (4.9 GB; random weights) and deleted at the end unless --keep; one that is there is used and left.
Each side runs in a process of its own and its memory is looked at from outside every 50 ms: private is RssAnon, mapped
is RssFile, the peak is VmHWM, both together. Rank 16, all linear layers; the second step is warm. Ours chooses
checkpointing by the rule of `lorafit train`. The peer: a transformers Llama of the same shape whose linear layers are
Linear4bit (NF4, double quantization; one quantised matrix of each shape, copied), bf16 otherwise, its own gradient
checkpointing, adapters under bf16 autocast, and the same settings of malloc as ours.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import bigfile
from benchmarks.common import ROWS, Watched, arguments, heading, memory, publish, say, table, watch
from benchmarks.trainee import Trainee, random_pack
from lorafit import machine

GB = 1e9
TOKENS, STEPS = 512, 2
MOST_PRIVATE, MOST = 3e9, 8e9


def ours(job: dict[str, Any]) -> dict[str, Any]:
    """Two steps of lorafit on the file."""
    began = time.perf_counter()
    options = {"data": (str(ROWS),), "max_length": TOKENS, "batch_size": 1, "threads": job["threads"]}
    trainee = Trainee(model=job["file"], checkpointing=job["checkpointing"], **options)
    packs = [random_pack(trainee.model.config.vocab_size, 1, TOKENS)]
    loaded = time.perf_counter() - began
    note = f"{trainee.config.base}, checkpointing {trainee.config.checkpointing}"
    return {"note": note, "loaded": loaded, **_timed(lambda: trainee.step(packs))}


def peer(job: dict[str, Any]) -> dict[str, Any]:
    """Two steps of PEFT on bitsandbytes' 4-bit layers."""
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    began = time.perf_counter()
    torch.set_num_threads(job["threads"])
    machine.settle_allocator(keeps=True)
    shape = bigfile.Shape(**job["shape"])
    config = LlamaConfig(
        num_hidden_layers=shape.layers, hidden_size=shape.hidden, intermediate_size=shape.mlp,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, vocab_size=shape.vocabulary,
        max_position_embeddings=shape.context, use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    _fill(model)
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    adapted.train()
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4)
    ids = torch.from_numpy(random_pack(shape.vocabulary, 1, TOKENS).ids_T)[None]
    loaded = time.perf_counter() - began

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):  # PEFT's adapters are fp32
            loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return loss.item()

    return {"note": "NF4, double quantization, checkpointing", "loaded": loaded, **_timed(step)}


def _fill(model: torch.nn.Module) -> None:
    """Values for a model without memory, module by module: 4 bits for the layers' matrices, bf16 for the rest."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    quantised: dict[tuple[int, int], Linear4bit] = {}
    for path, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and path != "lm_head":
            sizes = module.in_features, module.out_features
            if sizes not in quantised:
                layer = Linear4bit(*sizes, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta")
                weight = torch.randn(sizes[::-1], dtype=torch.bfloat16) * 0.02
                layer.weight = Params4bit(weight, quant_type="nf4", module=layer)
                quantised[sizes] = layer.to("cpu")
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, copy.deepcopy(quantised[sizes]))
        elif isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
            module.weight = torch.nn.Parameter(torch.randn(module.weight.shape, dtype=torch.bfloat16) * 0.02, False)
        elif not list(module.children()):
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, torch.nn.Parameter(torch.ones(parameter.shape, dtype=torch.bfloat16), False))
    for module in model.modules():
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            module.to_empty(device="cpu", recurse=False)
            model._init_weights(module)


def _timed(step: Callable[[], float]) -> dict[str, Any]:
    seconds, losses = [], []
    for _ in range(STEPS):
        began = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - began)
    return {"seconds": seconds, "losses": losses, "memory": memory()}


def line(name: str, seen: Watched) -> list[object]:
    """A line of the table; what did not finish has its memory and the reason."""
    private, mapped, peak = (seen.peaks.get(field, 0) for field in ("RssAnon", "RssFile", "VmHWM"))
    limits = [
        f"{value / GB:.2f} ({'so far' if seen.result is None else 'yes' if value < most else 'no'})"
        for value, most in ((private, MOST_PRIVATE), (peak, MOST))
    ]
    sizes = [limits[0], f"{mapped / GB:.2f}", limits[1]]
    if seen.result is None:
        return [name, f"{seen.ending} ({seen.seconds:.0f} s)", "", "", "", *sizes]
    rates = [f"{TOKENS / seconds:.1f} ({seconds:.1f} s)" for seconds in seen.result["seconds"]]
    losses = ", ".join(f"{loss:.3f}" for loss in seen.result["losses"])
    return [f"{name}: {seen.result['note']}", *rates, losses, f"{seen.result['loaded']:.1f}", *sizes]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("file", nargs="?", type=Path, help="where the model is or will be written; needs 5 GB")
    parser.add_argument("--layers", type=int, default=32, help="fewer make a shorter model, for quick checks")
    parser.add_argument("--matrices", default="q4_k_m", choices=("q4_k_m", "q4_0"))
    parser.add_argument("--checkpointing", default="auto", choices=("auto", "off", "all"), help="ours (default: auto)")
    parser.add_argument("--limit", type=float, default=1200, help="seconds for each side (default: %(default)s)")
    parser.add_argument("--ours", action="store_true", help="only ours")
    parser.add_argument("--peer", action="store_true", help="only the peer")
    parser.add_argument("--keep", action="store_true", help="leave the file where it is")
    options = parser.parse_args()
    if options.child:
        return print(json.dumps({"ours": ours, "peer": peer}[options.child["side"]](options.child)))
    if options.file is None:
        parser.error("FILE is missing")
    shape = bigfile.Shape(layers=options.layers)
    written = not options.file.exists()
    if written:
        say(f"writing {options.file}")
        bigfile.write(options.file, shape, options.matrices)
    job = {"file": str(options.file.resolve()), "shape": vars(shape), "threads": options.threads}
    job["checkpointing"] = options.checkpointing
    rows = []
    for side, skipped in (("ours", options.peer), ("peer", options.ours)):
        if not skipped:
            say(side)
            rows.append(line(side, watch("benchmarks.big", {**job, "side": side}, options.limit)))
    size = options.file.stat().st_size / GB
    if written and not options.keep:  # what was there before is not ours to delete
        options.file.unlink()
    head = ["", "tokens/s, step 1", "step 2", "losses", "ready after, s", "private, GB (under 3)", "mapped, GB",
            "peak, GB (under 8)"]  # fmt: skip
    title = (
        f"Llama of {options.layers} layers at 8B's width, {options.matrices}, {size:.2f} GB, steps of {TOKENS} tokens"
    )
    publish([heading(title, options.threads, ["bitsandbytes", "peft"]), table(head, rows)], options.out)


if __name__ == "__main__":
    main()
