"""Unpacking a stored weight: 10^9 weights a second of every format, each processor path, plain torch, bitsandbytes.

    python -m benchmarks.unpack [--formats Q4_K NF4] [--shapes 576x1536]

A cell is best / median of repeated calls of the operator, ours into the same buffer. bitsandbytes comes after ours and
not in turns with it: it brings a second OpenMP team, whose threads wait for work on the cores that the first one needs.
The plain twins are slow and timed thrice.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import alternate, arguments, heading, publish, say, table
from lorafit import machine
from lorafit.kernels import BLOCK_TYPES, native, nf4, ops
from lorafit.kernels import unpack as blocks
from lorafit.kernels.ops import INT8, NF4, PIECE, Stored

FORMATS = [*(name for name, block in BLOCK_TYPES.items() if block.elements > 1), NF4, INT8]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SMALL_WORK = 1 << 26  # weights that a small shape is unpacked to in all, so that short calls are timed often


def stored(format: str, rows: int, columns: int, seed: int = 0) -> Stored:
    """A weight in this format: any bytes, finite scales; NF4 and int8 are quantised from normal values."""
    chance = torch.Generator().manual_seed(seed)
    if format in (NF4, INT8):
        matrix = torch.randn(rows, columns, generator=chance)
        return ops.quantise_nf4(matrix) if format == NF4 else ops.quantise_int8(matrix)
    block = BLOCK_TYPES[format]
    count = rows * columns // block.elements
    data = torch.randint(256, (count, block.bytes), dtype=torch.uint8, generator=chance)
    for place in block.halves:
        data[:, place : place + 2] = torch.rand(count, 1, generator=chance).half().view(torch.uint8)
    for place in block.exponents:
        data[:, place] = torch.randint(119, 124, (count,), generator=chance)
    return Stored(format, columns, data.view(rows, -1))


def twin(weight: Stored, out: Tensor) -> None:
    """The plain torch way, in pieces of rows, as lorafit goes where it has no library."""
    scales = weight.scales
    if scales is not None and weight.nested is not None:
        scales = nf4.unpack_scales(scales, weight.nested, weight.offset)
    step = max(1, PIECE // weight.columns)
    for start in range(0, len(out), step):
        part = slice(start, start + step)
        if scales is None:
            out[part] = blocks.unpack(weight.data[part], weight.format)
        elif weight.format == NF4:
            out[part] = nf4.unpack_nf4(weight.data[part], scales[part])
        else:
            out[part] = nf4.unpack_int8(weight.data[part].view(torch.int8), scales[part])


def bitsandbytes_unpack(weight: Stored, out: Tensor) -> Callable[[int], Any]:
    """bitsandbytes' dequantize_4bit on the same bytes; on a CPU it gives a new tensor each time."""
    from bitsandbytes import functional as bnb

    nested = bnb.QuantState(absmax=weight.nested, code=nf4.DYNAMIC_CODE, blocksize=nf4.NESTED, dtype=torch.float32)
    state = bnb.QuantState(
        absmax=weight.scales.flatten(), shape=out.shape, code=nf4.NF4_CODE, blocksize=nf4.BLOCK, quant_type="nf4",
        dtype=out.dtype, offset=torch.tensor(weight.offset), state2=nested,
    )  # fmt: skip
    work = lambda number: bnb.dequantize_4bit(weight.data.view(-1, 1), state)  # noqa: E731
    assert torch.equal(work(0), ops.unpack(weight, 0, out)), "bitsandbytes gives other values"
    return work


def on_path(path: str, weight: Stored, out: Tensor) -> Callable[[int], Any]:
    def work(number: int) -> None:
        native.use(path)
        ops.unpack(weight, 0, out)

    return work


def measure(format: str, rows: int, columns: int, dtype: str, repeats: int, peer: bool) -> list[object]:
    """One line of the table."""
    weight, out = stored(format, rows, columns), torch.empty(rows, columns, dtype=DTYPES[dtype])
    works = {path: on_path(path, weight, out) for path in native.paths()}
    often = max(repeats, SMALL_WORK // out.numel())
    times = {name: alternate({name: work}, often, warm_up=2)[name] for name, work in works.items()}
    if format == NF4 and peer:
        times |= alternate({"bitsandbytes": bitsandbytes_unpack(weight, out)}, often, warm_up=2)
    times |= alternate({"plain torch": lambda number: twin(weight, out)}, 3)
    cells = []
    for name in columns_of(peer):
        seconds = [second for second, _ in times.get(name, [])]
        rates = [out.numel() / second / 1e9 for second in seconds]
        cells.append(f"{max(rates):.2f} / {statistics.median(rates):.2f}" if rates else "")
    return [format, dtype, *cells]


def columns_of(peer: bool) -> list[str]:
    return [*native.paths(), "plain torch", *(["bitsandbytes"] if peer else [])]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=FORMATS)
    parser.add_argument("--shapes", nargs="+", default=["576x1536", "4096x14336"], help="rows x columns")
    parser.add_argument("--no-peer", action="store_true", help="leave out bitsandbytes")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine.settle_allocator(keeps=True)  # so that bitsandbytes' new tensors cost no page faults
    peer = not options.no_peer
    parts = [heading("Unpacking, G weights/s", options.threads, ["bitsandbytes"] if peer else [])]
    for shape in options.shapes:
        rows, columns = map(int, shape.split("x"))
        lines = []
        for format in options.formats:
            say(f"{shape} {format}")
            lines += [measure(format, rows, columns, dtype, options.repeats, peer) for dtype in DTYPES]
        parts += [f"{rows} x {columns}, best / median", table(["format", "to", *columns_of(peer)], lines)]
    publish(parts, options.out)


if __name__ == "__main__":
    main()
