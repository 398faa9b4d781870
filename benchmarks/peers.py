"""The peers' sides: PEFT with a loop written by hand, TRL's SFTTrainer, Unsloth's CPU path.

All take the rows, the adapter's start and the settings of AdamW that lorafit has (constant learning rate). A peer's
settings are those of `FACTORS`; which are best is searched.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.sides import Gate

ADAPTERS = ("fp32, autocast", "fp32", "bf16")
"""The dtype of the adapters, and whether products with them run in bf16 all the same."""
MALLOC = ("kept", "default")
PAIR = 2
SORTED = f"sorted, {PAIR} at a time"
FACTORS: dict[str, dict[str, tuple[str, ...]]] = {
    "peft": {"rows": (SORTED, "padded"), "adapters": ADAPTERS, "malloc": MALLOC},
    "trl": {"rows": (SORTED, "padded", "padding-free", "packing"), "adapters": ADAPTERS, "malloc": MALLOC},
    "unsloth": {"rows": (SORTED, "padded"), "checkpointing": ("off", "unsloth"), "malloc": MALLOC},
}
FACTORS["unsloth-nf4"] = FACTORS["unsloth"]
IGNORED = -100  # the label of a token that is not trained
PACKED = 2048  # tokens of a sequence of TRL's packing


def factors(peer: str, kind: str, compute: str) -> dict[str, tuple[str, ...]]:
    """The settings to try; rows of one length need no padding, and fp32 has no other dtype."""
    found = dict(FACTORS[peer])
    if kind == "dense":
        found["rows"] = ("padded",)
    if compute == "fp32" and "adapters" in found:
        found["adapters"] = ("fp32",)
    return found


def peft(spec: dict[str, Any], gate: Gate) -> None:
    """PEFT on a transformers model; the loss is the step's, whatever its micro-batches."""
    torch.set_num_threads(spec["threads"])
    facts, model = spec["facts"], with_adapter(spec)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=facts["lr"], weight_decay=facts["weight_decay"])
    steps, autocast = _steps(spec), "autocast" in spec["settings"]["adapters"]
    for number in gate.steps():
        rows, total = steps[number], 0.0
        targets = sum(sum(row["trained"]) for row in rows)
        optimizer.zero_grad(set_to_none=True)
        for batch in batches(rows, PAIR if spec["settings"]["rows"] == SORTED else len(rows)):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(**batch, use_cache=False, num_items_in_batch=torch.tensor(targets)).loss
            loss.backward()
            total += loss.item()
        if facts["clip_norm"]:
            nn.utils.clip_grad_norm_(trained, facts["clip_norm"])
        optimizer.step()
        gate.answer(total, sum(len(row["ids"]) for row in rows))


def trl(spec: dict[str, Any], gate: Gate) -> None:
    """TRL's trainer on PEFT's model."""
    from transformers import AutoTokenizer

    torch.set_num_threads(spec["threads"])
    fit(spec, gate, with_adapter(spec), AutoTokenizer.from_pretrained(spec["model"]))


def unsloth(spec: dict[str, Any], gate: Gate) -> None:
    """Unsloth's model and adapter, trained by the TRL that it has changed."""
    from unsloth import FastLanguageModel  # it must come before transformers

    torch.set_num_threads(spec["threads"])
    facts = spec["facts"]
    longest = max(len(row["ids"]) for rows in _steps(spec) for row in rows)
    dtype = torch.bfloat16 if facts["compute"] == "bf16" else torch.float32
    model, tokenizer = FastLanguageModel.from_pretrained(
        spec["model"], max_seq_length=max(PACKED, longest), dtype=dtype, load_in_4bit=spec["side"] == "unsloth-nf4"
    )
    names = sorted({name.split(".")[-2] for name in _start(spec)})
    checkpointing: Any = {"off": False}.get(spec["settings"]["checkpointing"], "unsloth")
    model = FastLanguageModel.get_peft_model(
        model, r=facts["rank"], lora_alpha=facts["alpha"], target_modules=names, lora_dropout=0, bias="none",
        use_gradient_checkpointing=checkpointing,
    )  # fmt: skip
    _copy_start(model, spec)
    fit(spec, gate, model, tokenizer)


PEERS = {"peft": peft, "trl": trl, "unsloth": unsloth, "unsloth-nf4": unsloth}


def with_adapter(spec: dict[str, Any]) -> nn.Module:
    """The model of the folder with PEFT's adapter on all linear layers, which starts as lorafit's does."""
    import peft as library
    from transformers import AutoModelForCausalLM

    facts = spec["facts"]
    dtype = torch.bfloat16 if facts["compute"] == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=dtype, attn_implementation="sdpa")
    config = library.LoraConfig(
        r=facts["rank"], lora_alpha=facts["alpha"], target_modules="all-linear", task_type="CAUSAL_LM"
    )
    adapted = library.get_peft_model(model, config, autocast_adapter_dtype=spec["settings"]["adapters"] != "bf16")
    _copy_start(adapted, spec)
    return adapted


def batches(rows: list[dict[str, Any]], size: int) -> Iterable[dict[str, torch.Tensor]]:
    """Rows, `size` to a batch, padded at their ends; they come sorted by length."""
    for start in range(0, len(rows), size):
        chosen = rows[start : start + size]
        ids_BT = torch.zeros(len(chosen), max(len(row["ids"]) for row in chosen), dtype=torch.int64)
        mask_BT, labels_BT = torch.zeros_like(ids_BT), torch.full_like(ids_BT, IGNORED)
        for place, row in enumerate(chosen):
            length = len(row["ids"])
            ids_BT[place, :length] = torch.tensor(row["ids"])
            mask_BT[place, :length] = 1
            labels_BT[place, :length] = torch.tensor(_labels(row))
        yield {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": labels_BT}


def fit(spec: dict[str, Any], gate: Gate, model: nn.Module, tokenizer: Any) -> None:
    """SFTTrainer over the rows in the order of the steps, one batch a step; its callback waits at the gate."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    steps, facts, settings = _steps(spec), spec["facts"], spec["settings"]
    rows = [{"input_ids": row["ids"], "labels": _labels(row)} for step in steps for row in step]
    packing = settings["rows"] == "packing"
    batch = {"packing": 1, SORTED: PAIR}.get(settings["rows"], facts["rows"])
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder, max_steps=len(steps), per_device_train_batch_size=batch,
            gradient_accumulation_steps=1 if packing else facts["rows"] // batch,
            learning_rate=facts["lr"], lr_scheduler_type="constant", weight_decay=facts["weight_decay"],
            max_grad_norm=facts["clip_norm"], optim="adamw_torch", train_sampling_strategy="sequential",
            bf16="autocast" in settings.get("adapters", "") or (spec["side"] != "trl" and facts["compute"] == "bf16"),
            packing=packing, max_length=PACKED if packing else None,
            padding_free=settings["rows"] == "padding-free",
            gradient_checkpointing=settings.get("checkpointing", "off") != "off",
            logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True,
            dataloader_pin_memory=False,
        )  # fmt: skip
        data = Dataset.from_list(rows)
        trainer = SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
        trainer.add_callback(_waiting(gate, None if packing else steps))
        trainer.train()


def _waiting(gate: Gate, steps: list[list[dict[str, Any]]] | None) -> Any:
    """A callback that waits before each step and answers after it. Without `steps` the tokens are the trainer's."""
    from transformers import TrainerCallback

    class Waiting(TrainerCallback):
        seen = 0

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            gate.ready()
            gate.wait()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" not in logs:
                return
            if steps is None:
                tokens, self.seen = int(logs["num_tokens"]) - self.seen, int(logs["num_tokens"])
            else:
                tokens = sum(len(row["ids"]) for row in steps[state.global_step - 1])
            gate.answer(float(logs["loss"]), tokens)
            gate.wait()

    return Waiting()


def _labels(row: dict[str, Any]) -> list[int]:
    return [token if trained else IGNORED for token, trained in zip(row["ids"], row["trained"], strict=True)]


def _steps(spec: dict[str, Any]) -> list[list[dict[str, Any]]]:
    return json.loads((Path(spec["folder"]) / "steps.json").read_text())


def _start(spec: dict[str, Any]) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(Path(spec["folder"]) / "start.safetensors")


def _copy_start(model: nn.Module, spec: dict[str, Any]) -> None:
    """A of every layer from lorafit's adapter."""
    start, ending = _start(spec), ".lora_A.default.weight"
    found = {name.removesuffix(ending): value for name, value in model.named_parameters() if name.endswith(ending)}
    for path, value in found.items():
        value.data.copy_(start.pop(path.removeprefix("base_model.model.") + ".A"))
    assert not start, f"without an adapter: {sorted(start)[:3]}"
