"""Experts in files: which tensors make one parameter."""

from __future__ import annotations

import pytest

from lorafit.errors import ModelError
from lorafit.formats.stacks import Part, Stack, of_matrices, renamed, stack


def shapes_of(path: str, names: tuple[str, str, str], experts: int = 3) -> dict[str, tuple[int, ...]]:
    gate, up, down = names
    sizes = {gate: (6, 4), up: (6, 4), down: (4, 6)}
    return {f"{path}.{e}.{name}.weight": sizes[name] for e in range(experts) for name in names}


@pytest.mark.parametrize(
    ("kind", "path", "names"),
    [
        ("qwen3_moe", "model.layers.7.mlp.experts", ("gate_proj", "up_proj", "down_proj")),
        ("mixtral", "model.layers.7.block_sparse_moe.experts", ("w1", "w3", "w2")),
    ],
)
def test_a_matrix_for_each_expert_makes_two_stacks(kind, path, names):
    """gate's rows come before up's in gate_up_proj, experts in order of their numbers, under transformers' names."""
    shapes = shapes_of(path, names) | {"model.norm.weight": (4,)}
    found = of_matrices(dict(reversed(shapes.items())), kind, "here")
    own = "model.layers.7.mlp.experts"
    gate, up, down = (tuple(f"{path}.{e}.{name}.weight" for e in range(3)) for name in names)
    assert found == {
        f"{own}.gate_up_proj": Stack((3, 12, 4), (Part(gate, slice(0, 6)), Part(up, slice(6, 12)))),
        f"{own}.down_proj": Stack((3, 4, 6), (Part(down, slice(0, 4)),)),
    }


def test_tall_tensors_may_alternate():
    """One tensor for all experts: its columns are every second one, from 0 and from 1."""
    found = stack([["g"], ["u"]], {"g": (3, 6, 4), "u": (3, 6, 4)}, 3, interleaved=True)
    assert found == Stack((3, 12, 4), (Part(("g",), slice(0, None, 2)), Part(("u",), slice(1, None, 2))))


def test_families_names():
    """Mixtral's and Granite's published names become transformers'; other families' stay."""
    assert renamed("model.layers.0.block_sparse_moe.gate.weight", "mixtral") == "model.layers.0.mlp.gate.weight"
    old = "model.layers.0.block_sparse_moe.input_linear.weight"
    assert renamed(old, "granitemoe") == "model.layers.0.block_sparse_moe.experts.gate_up_proj"
    assert renamed(old, "llama") == old


def test_a_missing_matrix_is_named():
    """Which matrix, of which expert, of how many."""
    shapes = shapes_of("x.experts", ("gate_proj", "up_proj", "down_proj"))
    del shapes["x.experts.1.up_proj.weight"]
    with pytest.raises(ModelError, match=r"here: x.experts.up_proj: of expert 1 of 3 is missing"):
        of_matrices(shapes, "qwen3_moe", "here")
