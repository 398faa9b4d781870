"""The whole of LoRA training in one file: no options, no packing, no resume. Read it from top to bottom.

    python examples/train_flat.py MODEL DATA.jsonl OUT      rows: {"prompt": ..., "completion": ...}

lorafit is used for one thing, opening MODEL (a .gguf file or a Hugging Face folder) as a torch module with its
tokenizer; everything that trains stands below. `lorafit train` does the same, faster, safer and with a report.
"""

import json
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

import lorafit

RANK, ALPHA, LR, BATCH, STEPS = 16, 32, 1e-3, 4, 30


class LoraLinear(nn.Module):
    """y = W x + (alpha / r) B A x: W is frozen, A (r, in) and B (out, r) learn. B = 0 at first: nothing changes."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.A = nn.Parameter(torch.empty(RANK, base.in_features))
        self.B = nn.Parameter(torch.zeros(base.out_features, RANK))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))  # U(-1/sqrt(in), 1/sqrt(in))

    def forward(self, x):
        return self.base(x) + x @ self.A.to(x.dtype).T @ self.B.to(x.dtype).T * (ALPHA / RANK)


def attach(model):
    """Freeze the model and wrap every linear layer but the head; returns the wrapped layers by path."""
    model.requires_grad_(False)
    layers = {}
    for path, module in list(model.named_modules()):
        parent, _, name = path.rpartition(".")
        if hasattr(module, "in_features") and name.endswith("_proj"):
            layers[path] = LoraLinear(module)
            setattr(model.get_submodule(parent), name, layers[path])
    return layers


def encode(row, tokenizer):
    """Token ids of the conversation, and how many of them are the prompt, which is not trained."""
    user, assistant = {"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}
    prompt = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([user, assistant], tokenize=False).rstrip()  # ends with the end token
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, whole)]
    return torch.tensor(ids[1]), len(ids[0])


def loss_of(model, ids, prompt):
    """Summed cross-entropy of the answer's tokens: each is predicted from the tokens before it."""
    logits = model(input_ids=ids[None]).logits[0]
    return F.cross_entropy(logits[prompt - 1 : -1].float(), ids[prompt:], reduction="sum")


def save(layers, out):
    """The adapter in PEFT's layout."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for path, layer in layers.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = layer.A.detach()
        tensors[f"base_model.model.{path}.lora_B.weight"] = layer.B.detach()
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    names = sorted({path.rsplit(".", 1)[-1] for path in layers})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "target_modules": names}
    (out / "adapter_config.json").write_text(json.dumps(config, indent=1))


def main(model_path, data, out):
    torch.manual_seed(0)
    model = lorafit.load(model_path)
    layers = attach(model)
    rows = [encode(json.loads(line), model.tokenizer) for line in Path(data).read_text().splitlines()]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0.0)
    for step in range(STEPS):
        batch = [rows[i] for i in torch.randint(len(rows), (BATCH,))]
        trained = sum(len(ids) - prompt for ids, prompt in batch)
        total = 0.0
        for ids, prompt in batch:  # one row at a time; each token weighs the same
            loss = loss_of(model, ids, prompt) / trained
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.param_groups[0]["lr"] = LR * (1 - step / STEPS)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}/{STEPS}  loss {total:.4f}", file=sys.stderr)
    save(layers, Path(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
