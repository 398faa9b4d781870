"""The laws of lorafit.kernels.ops: the plain twins' bits, for every format, on every processor path and without one.

Data begin at an odd address, as rows in a mapped file may.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lorafit.kernels import BLOCK_TYPES, native, nf4, ops
from lorafit.kernels.ops import Stored

DOUBLE = "NF4 double"  # with double quantisation
FORMATS = [*BLOCK_TYPES, "NF4", DOUBLE, "INT8"]
PLAIN = "plain torch"
# Zeros of both signs, the smallest and largest subnormals, the smallest normal, the largest.
HALVES = torch.tensor([0x0000, -0x8000, 0x0001, -0x7C01, 0x0400, 0x7BFF, -0x0401], dtype=torch.int16)
EXPONENTS = torch.tensor([0, 1, 2, 252])  # two subnormal scales, the smallest normal, the largest of finite values
SINGLES = [0.0, -0.0, 1.4e-45, -1.1754942e-38, 1.17549435e-38, torch.finfo(torch.float32).max]
# Halfway between two bf16: down to even, up to even, up to infinity; just below the last.
HALFWAY = torch.tensor([0x3F808000, 0x3F818000, 0x7F7F8000, 0x7F7F7FFF], dtype=torch.int32)


@pytest.fixture(params=[*native.paths(), PLAIN], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every law holds on each processor path of this machine, and in plain torch, without the library."""
    before = native.describe()[0]
    if request.param == PLAIN:
        monkeypatch.setenv(native.VARIABLE, "0")
        native._library.cache_clear()
    else:
        native.use(request.param)
    assert native.describe()[0] == request.param
    yield request.param
    monkeypatch.undo()
    native._library.cache_clear()
    if before != PLAIN:
        native.use(before)


def sizes(format_: str) -> list[tuple[int, int]]:
    """(rows, columns): whole blocks, or numbers of columns that are no whole vectors."""
    elements = 64 if format_.startswith("NF4") else 1 if format_ == "INT8" else BLOCK_TYPES[format_].elements
    if elements == 1:
        return [(1, 1), (3, 31), (7, 33), (5, 65), (2, 96)]
    return [(rows, blocks * elements) for rows, blocks in ((1, 1), (3, 1), (7, 5))]


def at_odd_address(data: Tensor) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.uint8), data.flatten()])[1:].view(data.shape)


def weight(format_: str, rows: int, columns: int, seed: int = 0, extreme: bool = True) -> Stored:
    """A weight of random bytes and finite scales, a third of them extreme; or else all near 1."""
    generator = torch.Generator().manual_seed(seed)

    def mixed(normal: Tensor, special: Tensor) -> Tensor:
        chosen = special[torch.randint(len(special), normal.shape, generator=generator)].to(normal.dtype)
        return chosen.where(torch.rand(normal.shape, generator=generator) < extreme / 3, normal)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def random_bytes(*shape: int) -> Tensor:
        return at_odd_address(torch.randint(256, shape, dtype=torch.uint8, generator=generator))

    singles = torch.tensor(SINGLES)
    if format_ == "INT8":
        scales = mixed(normal(rows), singles / 128)  # -128 times the largest is the largest
        return Stored(format_, columns, random_bytes(rows, columns), scales)
    if format_ == "NF4":
        return Stored(format_, columns, random_bytes(rows, columns // 2), mixed(normal(rows, columns // 64), singles))
    if format_ == DOUBLE:
        codes, first_row = random_bytes(rows, columns // 64), 3
        nested = mixed(normal(((first_row + rows) * columns // 64 + 255) // 256), singles[:-1])
        return Stored("NF4", columns, random_bytes(rows, columns // 2), codes, nested, 0.1, first_row)
    block = BLOCK_TYPES[format_]
    if format_ == "F32":
        values = mixed(normal(rows, columns), torch.cat([singles, HALFWAY.view(torch.float32)]))
        return Stored(format_, columns, at_odd_address(values.view(torch.uint8)))
    if format_ == "BF16":
        values = mixed(normal(rows, columns).bfloat16(), singles[:-1])
        return Stored(format_, columns, at_odd_address(values.view(torch.uint8)))
    data = random_bytes(rows * (columns // block.elements), block.bytes)
    for at in block.exponents:
        data[:, at] = mixed(125 + normal(len(data)).abs(), EXPONENTS).byte()
    for at in () if block.exponents else block.halves or (0,):  # F16 is a half
        halves = mixed(normal(len(data)).half().view(torch.int16), HALVES)
        data[:, at : at + 2] = halves.view(torch.uint8).view(-1, 2)
    return Stored(format_, columns, data.view(rows, -1))


def twin(stored: Stored) -> Tensor:
    """All stored rows by the plain twins."""
    return ops._plain(stored, torch.arange(len(stored.data)))


def assert_bits(got: Tensor, want: Tensor) -> None:
    """Same dtype, shape and bits, so that -0 is not 0."""
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    as_integer = torch.int32 if want.dtype == torch.float32 else torch.int16
    assert torch.equal(got.view(as_integer), want.contiguous().view(as_integer))


@pytest.fixture
def two_threads() -> Iterator[Callable[[], None]]:
    """A call from which on torch and the library run on two threads, until the test ends."""
    before = torch.get_num_threads()
    yield lambda: torch.set_num_threads(2)
    torch.set_num_threads(before)


@pytest.mark.parametrize("format_", FORMATS)
def test_bits_are_the_twins(format_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 has the plain twin's bits, bf16 those of its rounding, in pieces and at once."""
    for (rows, columns), seed in product(sizes(format_), range(5)):
        stored = weight(format_, rows, columns, seed)
        want = twin(stored)
        assert want.isfinite().all()
        assert_bits(ops.values(stored), want)
        assert_bits(ops.values(stored, torch.bfloat16), want.bfloat16())
    monkeypatch.setattr(ops, "PIECE", 1)
    assert_bits(ops.values(stored), want)


def test_bf16_rounds_as_torch() -> None:
    """A million random finite patterns of fp32 round to torch's bf16, and to infinity where it does."""
    patterns = torch.randint(-(1 << 31), 1 << 31, (1024, 1000), generator=torch.Generator().manual_seed(0)).int()
    values = patterns.view(torch.float32)
    values = values.where(values.isfinite(), torch.finfo(torch.float32).max)
    got = ops.values(Stored("F32", 1000, values.view(torch.uint8)), torch.bfloat16)
    assert got.isinf().any()
    assert_bits(got, values.bfloat16())


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("dtype", ops.TYPES)
def test_rows_come_in_the_order_asked_for(format_: str, dtype: torch.dtype) -> None:
    """start, an order of the rows, numbers of rows, repeated ones, every other one, and both: rows of the whole."""
    columns = sizes(format_)[2][1]
    stored, order = weight(format_, 7, columns), torch.tensor([6, 0, 0, 3, 5])
    ordered, want = replace(stored, order=order), twin(stored).to(dtype)
    ids = torch.tensor([2, 9, 2, 9, 0, 9])[::2]
    assert_bits(ops.unpack(stored, 2, torch.empty(4, columns, dtype=dtype)), want[2:6])
    assert_bits(ops.unpack(ordered, 1, torch.empty(3, columns, dtype=dtype)), want[order[1:4]])
    assert_bits(ops.unpack_rows(stored, ids, torch.empty(3, columns, dtype=dtype)), want[ids])
    assert_bits(ops.unpack_rows(stored, ids.int(), torch.empty(3, columns, dtype=dtype)), want[ids])
    assert_bits(ops.unpack_rows(ordered, ids, torch.empty(3, columns, dtype=dtype)), want[order[ids]])
    assert_bits(ops.values(replace(stored, order=order[::2]), dtype), want[order[::2]])
    for start in (0, 5, 7):
        assert_bits(ops.unpack(stored, start, torch.empty(0, columns, dtype=dtype)), want[:0])
    assert_bits(ops.unpack_rows(ordered, ids[:0], torch.empty(0, columns, dtype=dtype)), want[:0])


def test_a_slice_knows_its_nested_blocks() -> None:
    """Rows 49 to 55 of 5 blocks, across scale 256, by first_row have the bits that they have in the whole matrix."""
    whole = ops.quantise_nf4(torch.randn(60, 320))
    assert whole.nested is not None
    assert whole.scales is not None
    assert len(whole.nested) == 2
    part = replace(whole, data=whole.data[49:56], scales=whole.scales[49:56], first_row=49)
    assert_bits(ops.values(part), ops.values(whole)[49:56])
    assert_bits(ops.values(part), twin(whole)[49:56])


@pytest.mark.parametrize("format_", FORMATS)
def test_rows_outside_are_refused(format_: str) -> None:
    """A row number below 0 or past the end is an IndexError, and nothing is written."""
    columns = sizes(format_)[2][1]
    stored = weight(format_, 7, columns)
    ordered, out, x = replace(stored, order=torch.tensor([1, 0, 2, 3])), torch.full((2, columns), 7.0), torch.ones
    wrong: list[Callable[[], object]] = [
        *(lambda s=start: ops.unpack(stored, s, out) for start in (-1, 6, 2**63 - 1)),
        *(lambda s=start: ops.unpack(ordered, s, out) for start in (-3, 3, 2**63 - 1)),
        *(lambda i=row: ops.unpack_rows(stored, torch.tensor([0, i]), out) for row in (-1, 7)),
        *(lambda i=row: ops.unpack_rows(ordered, torch.tensor([0, i]), out) for row in (-1, 4)),
        *(lambda i=row: ops.unpack(replace(stored, order=torch.tensor([0, i])), 0, out) for row in (-1, 7)),
        *(lambda i=row: ops.matvec(replace(stored, order=torch.tensor([0, i])), x(1, columns)) for row in (-1, 7)),
    ]
    for call in wrong:
        with pytest.raises(IndexError, match="out"):
            call()
    assert (out == 7).all()


def test_shapes_that_disagree_are_the_callers_mistake() -> None:
    """Rows of other lengths than `columns` says, in out, x or the matrix to quantise, are never read or written."""
    stored = weight("F32", 3, 33)
    with pytest.raises(AssertionError, match="rows have 33 weights"):
        ops.unpack(stored, 0, torch.empty(3, 32))
    with pytest.raises(AssertionError, match="rows have 33 weights"):
        ops.matvec(stored, torch.empty(1, 32))
    with pytest.raises(AssertionError, match="rows of 100 are no whole blocks of 64"):
        ops.quantise_nf4(torch.zeros(2, 100))
    if native.library():
        with pytest.raises(AssertionError, match=r"\(3, 132\) bytes are no F32 rows of 32 weights"):
            ops.values(replace(stored, columns=32))


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("dtype", ops.TYPES)
def test_matvec_is_the_product(format_: str, dtype: torch.dtype) -> None:
    """x W^T in double, of the same x; a sum of I products, each and each sum rounded once to fp32, is off by at most
    I 2^-24 of the sum of magnitudes (twice where the product is rounded by itself); a last rounding to bf16 by 2^-8."""
    for (rows, columns), batch in product(sizes(format_), (1, 3, 4, 8)):
        stored = weight(format_, rows, columns, extreme=False)
        x = torch.randn(batch, columns).to(dtype)
        for order in (None, torch.tensor([0, *range(rows)]).flip(0)[::2]):
            w = twin(stored).double() if order is None else twin(stored).double()[order]
            got, want = ops.matvec(replace(stored, order=order), x), x.double() @ w.T
            bound = columns * 2.0**-23 * (x.double().abs() @ w.abs().T)
            if dtype == torch.bfloat16:
                bound += 2.0**-8 * (want.abs() + bound)
            assert (got.dtype, got.shape) == (dtype, want.shape)
            assert torch.all((got.double() - want).abs() <= bound)
    assert ops.matvec(stored, x[:0]).shape == (0, rows)


@pytest.mark.parametrize("dtype", ops.TYPES)
def test_matvec_hands_nan_on(dtype: torch.dtype) -> None:
    """NaN in a row of x is NaN in that row of y and in no other."""
    x = torch.ones(5, 64, dtype=dtype)
    x[3, 17] = torch.nan
    assert ops.matvec(weight("Q4_0", 3, 64, extreme=False), x).isnan().all(1).tolist() == [False] * 3 + [True, False]


MATRICES: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda w: w,
    "rows of zeros": lambda w: w * (torch.arange(len(w)) % 2)[:, None],
    "minus zero": lambda w: -torch.zeros_like(w),
    "rows of all magnitudes": lambda w: w * 10 ** torch.linspace(-44, 30, len(w))[:, None],
    "subnormals": lambda w: w * 1e-40,
    "smallest subnormals": lambda w: w.sign() * 1e-45,
    "ties of NF4": lambda w: torch.cat([nf4.NF4_CODE, nf4._middles(nf4.NF4_CODE)]).repeat(w.numel())[: w.numel()],
    "ties of int8": lambda w: torch.cat([torch.tensor([254.0]), torch.arange(-253, 253)]).repeat(w.numel()),
    "largest": lambda w: w.sign() * 3e38 / w.numel(),
}


@pytest.mark.parametrize("kind", MATRICES)
@pytest.mark.parametrize("dtype", [*ops.TYPES, torch.float64])
def test_quantising_gives_the_twins_bytes(kind: str, dtype: torch.dtype) -> None:
    """Codes and scales are those of the plain twins, byte for byte, of transposed matrices too."""
    for rows, columns in [(1, 1), (3, 31), (3, 33), (2, 65), (1, 64), (33, 192)]:
        matrix = MATRICES[kind](torch.randn(rows, columns)).flatten()[: rows * columns].view(rows, columns).to(dtype)
        matrices = (matrix, matrix.T.contiguous().T)
        codes, scales = nf4.quantise_int8(matrix)
        for got in map(ops.quantise_int8, matrices):
            assert (got.format, got.columns) == ("INT8", columns)
            assert torch.equal(got.data, codes.view(torch.uint8))
            assert got.scales is not None
            assert_bits(got.scales, scales)
        if columns % 64 == 0:
            codes, absmax = nf4.quantise_nf4(matrix)
            scales, nested, offset = nf4.quantise_scales(absmax)
            for got in map(ops.quantise_nf4, matrices):
                assert (got.format, got.columns, got.offset) == ("NF4", columns, offset)
                assert torch.equal(got.data, codes)
                assert got.scales is not None
                assert got.nested is not None
                assert torch.equal(got.scales, scales)
                assert_bits(got.nested, nested)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("quantise", [ops.quantise_nf4, ops.quantise_int8])
def test_what_is_not_finite_is_not_quantised(quantise: Callable[[Tensor], Stored], bad: float) -> None:
    """One NaN or infinity, in the first place, the last or between, is a ValueError."""
    for place, dtype in product((0, 100, 5 * 128 - 1), (*ops.TYPES, torch.float16)):
        matrix = torch.randn(5, 128).to(dtype)
        matrix.view(-1)[place] = bad
        with pytest.raises(ValueError, match="holds NaN or infinity"):
            quantise(matrix)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("format_", FORMATS)
def test_the_first_bad_row_is_found(format_: str, bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN or infinity in any half of any block, any scale, any plain float: the first row with it; None else."""
    rows, columns = 60, max(sizes(format_))[1] if format_ in ("F32", "F16", "BF16", "INT8") else sizes(format_)[2][1]
    good = weight(format_, rows, columns)
    broken: list[tuple[Stored, int]] = []

    def with_value_at(part: str, row: int, place: int, dtype: torch.dtype) -> None:
        tensor = getattr(good, part).clone()
        value = torch.tensor([bad]).to(dtype).view(tensor.dtype) if dtype.is_floating_point else torch.tensor([255])
        tensor.view(rows if part != "nested" else 1, -1)[row, place : place + len(value)] = value
        broken.append((replace(good, **{part: tensor}), row))

    if format_ == DOUBLE:
        with_value_at("nested", 0, 1, torch.float32)
        broken = [(broken[0][0], 256 // 5 - good.first_row), (replace(good, offset=bad), 0)]
    elif good.scales is not None:
        for row, place in product((0, 4, rows - 1), (0, good.scales.numel() // rows - 1)):
            with_value_at("scales", row, place, torch.float32)
    else:
        block = BLOCK_TYPES[format_]
        dtypes = {"F32": torch.float32, "BF16": torch.bfloat16, "MXFP4": torch.uint8}
        dtype = dtypes.get(format_, torch.float16)
        for row, at in product((0, 4, rows - 1), block.halves or block.exponents or (0,)):
            for start in range(0, good.data.shape[1], block.bytes):
                with_value_at("data", row, start + at, dtype)
    monkeypatch.setattr(ops, "PIECE", 3 * columns)
    assert ops.first_bad_row(good) is None
    assert [ops.first_bad_row(stored) for stored, _ in broken] == [row for _, row in broken]


def test_which_exponents_of_mxfp4_are_bad() -> None:
    """A block is bad if a value of it is infinite: that depends on its largest magnitude from exponent 253 on."""
    for exponent, code in product(range(248, 256), range(16)):
        data = torch.zeros(3, 2 * 17, dtype=torch.uint8)
        data[1, 17], data[1, 20] = exponent, code << 4
        stored = Stored("MXFP4", 64, at_odd_address(data))
        infinite = [0, 0.5, 1, 1.5, 2, 3, 4, 6][code % 8] * 2.0 ** (exponent - 127) >= 2.0**128
        assert ops.first_bad_row(stored) == (1 if infinite else None)


@pytest.mark.parametrize("format_", ["F32", "Q4_K", DOUBLE, "INT8"])
def test_threads_do_not_show(format_: str, two_threads: Callable[[], None]) -> None:
    """Two threads give the bits of one; of several bad rows they find the first."""
    stored = weight(format_, *sizes(format_)[2], extreme=False)
    matrix, x = torch.randn(33, 192), torch.randn(5, stored.columns)
    poisoned = matrix.clone()
    poisoned[1:, 5] = torch.nan
    bad = Stored("F32", 192, poisoned.view(torch.uint8))

    def results() -> list[Tensor]:
        return [
            ops.values(stored),
            ops.values(stored, torch.bfloat16).float(),
            ops.matvec(stored, x),
            torch.tensor(float(ops.first_bad_row(bad) or 0)),
            *(of.data.float() for of in (ops.quantise_nf4(matrix), ops.quantise_int8(matrix))),
        ]

    one = results()
    two_threads()
    for got, want in zip(results(), one, strict=True):
        assert_bits(got, want)
    assert one[3] == 1
    for quantise in (ops.quantise_nf4, ops.quantise_int8):
        with pytest.raises(ValueError, match="holds NaN or infinity"):
            quantise(poisoned)


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("dtype", ops.TYPES)
def test_fakes_and_schemas(format_: str, dtype: torch.dtype) -> None:
    """What planning sees has the real shapes and dtypes; the operators write to `out` alone, as their schemas say."""
    rows, columns = sizes(format_)[2]
    for order in (None, torch.tensor([1, 0])):
        stored, x = replace(weight(format_, rows, columns), order=order), torch.randn(4, columns).to(dtype)
        arguments, out = ops._arguments(stored), torch.empty(2, columns, dtype=dtype)
        for operator, given in (
            (torch.ops.lorafit.matvec.default, (x, *arguments)),
            (torch.ops.lorafit.unpack.default, (*arguments, 0, out)),
        ):
            torch.library.opcheck(operator, given, test_utils=("test_schema", "test_faketensor"))
        with FakeTensorMode() as mode:
            parts = ("data", "scales", "nested", "order")
            faked = {part: mode.from_tensor(of) for part in parts if (of := getattr(stored, part)) is not None}
            fake = replace(stored, **faked)  # type: ignore[arg-type]
            y = ops.matvec(fake, mode.from_tensor(x))
            assert (y.dtype, y.shape) == (dtype, (4, rows if order is None else 2))
            values = ops.values(fake, dtype)
            assert (values.dtype, values.shape) == (dtype, (y.shape[1], columns))
            ids, two = torch.empty(2, dtype=torch.int64), torch.empty(2, columns, dtype=dtype)
            assert ops.unpack_rows(fake, ids, two) is two
