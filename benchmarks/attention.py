"""Attention over packed documents: ours against PyTorch's kernel, document by document, over their lengths.

    python -m benchmarks.attention [--dtype bf16] [--out attention.md]

As many documents of one length as make 2,048 tokens (one, if they are longer), forward, and forward with backward, in
turns; the largest difference of the outputs. Heads are SmolLM2's (9 of 64, 3 of keys) and Gemma-3-270M's (4 of 256, 1).
"""

from __future__ import annotations

import statistics
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import alternate, arguments, heading, publish, say, table
from lorafit.kernels.attention import Rules, attend, attend_backward

SHAPES = {"SmolLM2": (9, 3, 64), "Gemma-3-270M": (4, 1, 256)}
LENGTHS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
TOKENS = 2048
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def ours(q: Tensor, k: Tensor, v: Tensor, grad: Tensor | None, documents: tuple[int, ...]) -> Tensor:
    """The output; with a gradient the backward pass too."""
    rules, out = Rules(q.shape[2] ** -0.5), torch.empty_like(q)
    lse = attend(q, k, v, documents, rules, out)
    if grad is not None:
        grads = [torch.empty_like(x) for x in (q, k, v)]
        attend_backward(grad, q, k, v, out, lse, documents, rules, *grads)
    return out


def torchs(q: Tensor, k: Tensor, v: Tensor, grad: Tensor | None, documents: tuple[int, ...]) -> Tensor:
    """The same by scaled_dot_product_attention."""
    inputs = [x.detach().requires_grad_(grad is not None) for x in (q, k, v)]
    outs = []
    for start, end in pairwise(documents):
        parts = [x[start:end].transpose(0, 1)[None] for x in inputs]
        outs.append(F.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
    out = torch.cat(outs)
    if grad is not None:
        torch.autograd.grad(out, inputs, grad)
    return out.detach()


def row(shape: tuple[int, int, int], length: int, dtype: torch.dtype, rounds: int) -> list[str]:
    """A line of the table."""
    heads, key_heads, dim = shape
    tokens = max(TOKENS, length)
    documents = tuple(range(0, tokens + 1, length))
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(tokens, count, dim).to(dtype) for count in (heads, key_heads, key_heads, heads))
    cells = []
    for wanted in (None, grad):
        works = {
            "ours": lambda number, wanted=wanted: ours(q, k, v, wanted, documents),
            "torch": lambda number, wanted=wanted: torchs(q, k, v, wanted, documents),
        }
        times = alternate(works, rounds)
        mine, theirs = (statistics.median(seconds for seconds, _ in times[name]) * 1e3 for name in ("ours", "torch"))
        cells += [f"{mine:.1f}", f"{theirs:.1f}", f"{theirs / mine:.1f}"]
        gap = float((times["ours"][0][1].float() - times["torch"][0][1].float()).abs().max())
    return [f"{len(documents) - 1} x {length}", *cells, f"{gap:.1e}"]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    parts = [heading(f"Attention over packed documents, {asked.dtype}", asked.threads)]
    columns = ["documents", "forward ms", "torch", "times", "with backward ms", "torch", "times", "largest difference"]
    for name, shape in SHAPES.items():
        say(name)
        rows = [row(shape, length, DTYPES[asked.dtype], asked.repeats) for length in LENGTHS]
        parts += [f"## {name}: {shape[0]} heads of {shape[2]}, {shape[1]} of keys", table(columns, rows)]
    publish(parts, asked.out)


if __name__ == "__main__":
    main()
