"""One product, whichever library computes it: against fp64, in views, in pieces, and where torch's own is asked."""

import pytest
import torch

from lorafit.kernels import native
from lorafit.kernels import product as product_module
from lorafit.kernels.product import by_onednn, product, rounded


@pytest.fixture
def fast(monkeypatch):
    """As on a processor where MKL is slower."""
    monkeypatch.setattr(product_module, "onednn_is_faster", lambda: True)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize(("rows", "inside", "columns"), [(8, 64, 48), (200, 96, 33), (1000, 32, 7)])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.usefixtures("fast")
def test_is_the_product_in_fp64(rows, inside, columns, turned):
    """fp32 sums of `inside` numbers: 1e-5 of the result's size. W as it lies, and as the transpose of a stored one."""
    x = drawn(rows, inside)
    W = drawn(inside, columns).T if turned else drawn(columns, inside)
    assert by_onednn(x, W)
    wanted = (x.double() @ W.double().T).float()
    torch.testing.assert_close(product(x, W), wanted, rtol=1e-5, atol=1e-5 * inside**0.5)


@pytest.mark.usefixtures("fast")
def test_writes_into_columns_in_pieces(monkeypatch):
    """`out` is a view of a wider matrix, written in several pieces: nothing beside it changes, the values are those of
    the whole."""
    monkeypatch.setattr(product_module, "PIECE", 1)  # 128 rows at a time
    x, W, wide = drawn(300, 40), drawn(24, 40), torch.full((300, 64), 7.0)
    assert product(x, W, out=wide[:, 8:32]).data_ptr() == wide[:, 8:].data_ptr()
    torch.testing.assert_close(wide[:, 8:32], x @ W.T, rtol=1e-5, atol=1e-4)
    assert bool((wide[:, :8] == 7).all())
    assert bool((wide[:, 32:] == 7).all())


@pytest.mark.usefixtures("fast")
def test_torch_multiplies_few_rows_bf16_and_gaps():
    """Then the bits are torch.mm's."""
    gap = drawn(24, 96)[:, ::2]
    for x, W in ((drawn(7, 40), drawn(24, 40)), (drawn(64, 40).bfloat16(), drawn(24, 40).bfloat16()),
                 (drawn(48, 64).T, gap), (drawn(40, 96)[:, :64].T, drawn(24, 40))):  # fmt: skip
        assert not by_onednn(x, W)
        assert torch.equal(product(x, W), torch.mm(x, W.T))
        assert torch.equal(product(x, W, out=x.new_empty(len(x), 24)), torch.mm(x, W.T))


@pytest.mark.parametrize(
    ("vendor", "path", "faster"),
    [("AuthenticAMD", "avx512", True), ("AuthenticAMD", "avx2", True), ("GenuineIntel", "avx512_bf16", False),
     ("AuthenticAMD", "plain", False), ("", "neon", False)],
)  # fmt: skip
def test_follows_from_vendor_and_kernels(monkeypatch, vendor, path, faster):
    """Nothing is measured: the same run.yaml on the same machine takes the same library."""
    monkeypatch.setattr(product_module.machine, "vendor", lambda: vendor)
    monkeypatch.setattr(native, "path", lambda: path)
    product_module._held_back.cache_clear()
    try:
        assert product_module.onednn_is_faster() is faster
    finally:
        product_module._held_back.cache_clear()


def test_rows_are_rounded_to_few_numbers():
    """In bf16 up to 4,096 rows become one of 28 numbers, at most 15 or a quarter more, and stay it; in fp32, where no
    code is made for a number of rows, and where few tokens are decoded, they stay as they are."""
    x = torch.empty(64, 1, dtype=torch.bfloat16)
    found = [rounded(rows, x) for rows in range(1, 4097)]
    assert len(set(found)) == 28
    for rows, more in enumerate(found, start=1):
        assert rows <= more <= max(rows + 15, rows * 5 // 4)
        assert rounded(more, x) == more
    assert rounded(5, x.float()) == 5
    assert rounded(1, x[:1]) == 1
