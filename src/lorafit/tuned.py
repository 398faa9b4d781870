"""What full fine-tuning leaves: OUT/model, and the two models that its report compares."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lorafit.config import Resolved, TrainConfig
from lorafit.data.tokens import TokenRow
from lorafit.formats.template import PLAIN_TEMPLATE
from lorafit.frozen.stack import FrozenStack
from lorafit.model.load import DTYPES, Base, load_base
from lorafit.model.save_plain import save_plain
from lorafit.model.sources import open_source
from lorafit.settings import settle_for_machine
from lorafit.training.trained import Trained


def save_tuned(
    base: Base, trained: Trained, rows: Sequence[TokenRow], config: TrainConfig, folder: Path, about: Mapping[str, Any]
) -> None:
    """The trained weights as a Hugging Face folder, in the dtype that products ran in: what was evaluated is what is
    written, bit for bit.

    about: facts for lorafit.json and the model card (`base`, `tokenizer`, `template`, `data`, `figures`).
    """
    dtype = DTYPES[config.compute]
    stacks = {path: one for path, one in base.model.named_modules() if isinstance(one, FrozenStack)}
    tensors = {path: stack.dense(torch.float32).to(dtype) for path, stack in stacks.items()}
    for name, master in trained.parameters.items():
        path, _, own = name.removesuffix(".bias").partition(".weights.")
        if path not in stacks:
            tensors[name] = master.detach().to(dtype)
        elif not own:
            tensors[f"{path}_bias"] = master.detach().to(dtype)
    kept = base.model.state_dict().keys()  # DeepSeek's correction of its router, Gemma 4's scalars: not trained
    tensors |= {name: buffer for name, buffer in base.model.named_buffers() if name in kept}
    conversations = any(row.record.messages is not None for row in rows)
    template = base.tokenizer.chat_template or (PLAIN_TEMPLATE if conversations else None)
    facts = {key: value for key, value in about.items() if key != "figures"}
    card = _model_card(config, about)
    texts = {"lorafit.json": json.dumps(facts, indent=1, sort_keys=True) + "\n", "README.md": card}
    save_plain(
        base.model, tensors, base.tokenizer, folder, source=Path(config.model), template=template, texts=texts
    )  # fmt: skip


def reopen(path: str | Path, config: TrainConfig) -> Base:
    """A model from disk as a run with an adapter would hold it, in the run's compute dtype."""
    source = open_source(Path(path))
    plain = settle_for_machine(Resolved(TrainConfig(compute=config.compute)), source.quantised).config
    return load_base(source, source.tokenizer(config.template and Path(config.template).read_text("utf-8")),
                     plain.base, plain.compute)  # fmt: skip


def disk_bytes(trainable: int) -> int:
    """Bytes that a run takes at most: the newest two checkpoints, the best and the one being written, 12 bytes a weight
    each, and the model, 4."""
    return (4 * 12 + 4) * trainable


def _model_card(config: TrainConfig, about: Mapping[str, Any]) -> str:
    figures = "".join(f"- {name}: {value}\n" for name, value in about.get("figures", {}).items())
    return (
        f"---\nlibrary_name: transformers\ntags: [lorafit]\n---\n# Fine-tuned with lorafit\n\n"
        f"All weights of `{Path(config.model).name}` (fingerprint {about['base']}), trained; "
        f"stored in {torch.finfo(DTYPES[config.compute]).dtype}.\n\n{figures}"
    )
