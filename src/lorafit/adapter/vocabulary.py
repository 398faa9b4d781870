"""Training embedding and head: whole, or the rows of some tokens, on a model whose linear layers have adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from lorafit.adapter.lora import Adapted
from lorafit.adapter.variants.vocabulary import (
    TokenEmbedding,
    TokenHead,
    WholeEmbedding,
    WholeLinear,
    matrix_of,
    mean_of,
    rows_of,
    shape_of,
)
from lorafit.errors import ConfigError
from lorafit.frozen.linear import FrozenEmbedding, FrozenLinear

HEAD = "lm_head"
Vocabulary = dict[str, nn.Module]


def vocabulary(model: nn.Module) -> Vocabulary:
    """The embeddings and the head of a model by path, in its order; adapted ones count as themselves."""
    found: Vocabulary = {}

    def walk(module: nn.Module, path: str) -> None:
        plain = module.base if isinstance(module, Adapted) else module
        head = path.rsplit(".", 1)[-1] == HEAD and isinstance(plain, (nn.Linear, FrozenLinear))
        if isinstance(plain, (nn.Embedding, FrozenEmbedding)) or head:
            found[path] = module
        elif not isinstance(module, Adapted):
            for name, child in module.named_children():
                walk(child, f"{path}.{name}".lstrip("."))

    walk(model, "")
    return found


def tied(model: nn.Module) -> tuple[str, ...]:
    """The paths of the embedding and the head that are one matrix; () where each has its own."""
    plain = {path: layer.base if isinstance(layer, Adapted) else layer for path, layer in vocabulary(model).items()}
    weights: dict[str, Any] = {path: layer.weight for path, layer in plain.items()}
    return tuple(path for path, own in weights.items() if sum(own is other for other in weights.values()) > 1)


def train_whole(model: nn.Module, names: Sequence[str]) -> None:
    """Train these of the model's embedding and head whole; of a tied pair always both, as one matrix.

    Raises ConfigError for other names, and for a head that has a bias or an adapter.
    """
    layers = vocabulary(model)
    chosen = {path for path in layers for name in names if path == name or path.endswith(f".{name}")}
    for name in names:
        if not any(path == name or path.endswith(f".{name}") for path in layers):
            known = ", ".join(path.rsplit(".", 1)[-1] for path in layers)
            raise ConfigError("--modules-to-save", f"{name} is no embedding or head", f"this model has {known}")
    one = tied(model)
    chosen.update(one if chosen.intersection(one) else ())
    matrix: nn.Parameter | None = None
    for path in layers:
        if path in one and path in chosen:
            matrix = put_whole(model, path, matrix).matrix
        elif path in chosen:
            put_whole(model, path)


def put_whole(
    model: nn.Module, path: str, matrix: nn.Parameter | None = None
) -> WholeEmbedding | WholeLinear:  # fmt: skip
    """Train the embedding or head at `path` whole, as `matrix` or a copy of its own."""
    base = _plain(model, path, "--modules-to-save")
    matrix = nn.Parameter(matrix_of(base)) if matrix is None else matrix
    layer = WholeLinear(base, matrix) if isinstance(base, (nn.Linear, FrozenLinear)) else WholeEmbedding(base, matrix)
    _replace(model, path, layer)
    return layer


def train_rows(model: nn.Module, ids: Sequence[int], new: Sequence[str] = ()) -> None:
    """Train the embedding's rows of these tokens and the head's: of a tied pair as one.

    They start as they are; the last ones, of tokens that are `new` to the vocabulary, as the mean of all (Hewitt 2021,
    "Initializing New Word Embeddings"). Raises ConfigError for an id that is neither.
    """
    rows: nn.Parameter | None = None
    one = tied(model)
    model.new_tokens = tuple(new)  # type: ignore[assignment]
    for path in vocabulary(model):
        if path in one:
            rows = put_rows(model, path, ids, rows, len(new)).rows
        else:
            put_rows(model, path, ids, new=len(new))


def put_rows(
    model: nn.Module, path: str, ids: Sequence[int], rows: nn.Parameter | None = None, new: int = 0
) -> TokenEmbedding | TokenHead:  # fmt: skip
    """Train the rows `ids` of the embedding or head at `path`, as `rows` or copies of its own; the last `new` of them
    are the vocabulary's too."""
    option = "--new-tokens" if new else "--train-tokens"
    base = _plain(model, path, option)
    count = shape_of(base)[0]
    fault = wrong_ids(ids, count + new)
    if fault:
        raise ConfigError(option, fault, "name tokens of the vocabulary, each once")
    start = rows_of(base, [min(number, count - 1) for number in ids])
    if new:
        start[-new:] = mean_of(base)
    own = nn.Parameter(start.clone()) if rows is None else rows
    layer: TokenEmbedding | TokenHead
    if isinstance(base, (nn.Linear, FrozenLinear)):
        layer = TokenHead(base, own, ids, start, tied=rows is not None)
    else:
        layer = TokenEmbedding(base, own, ids, start)
    _replace(model, path, layer)
    return layer


def new_tokens(model: nn.Module) -> tuple[str, ...]:
    """The tokens that the model's tokenizer was given beside its own, the last of those with trained rows."""
    found: tuple[str, ...] = getattr(model, "new_tokens", ())
    return found


def wrong_ids(ids: Sequence[int], rows: int) -> str | None:
    """What is wrong with token ids for a matrix of so many rows."""
    bad = next((number for number in ids if not 0 <= number < rows), None)
    if bad is not None:
        return f"{bad} is no row of a vocabulary of {rows}"
    return "names a token twice" if len(set(ids)) != len(ids) else None


def _plain(model: nn.Module, path: str, option: str) -> Any:
    """The layer at `path`, if nothing is trained there yet."""
    base: Any = model.get_submodule(path)
    if isinstance(base, Adapted):
        raise ConfigError(
            option,
            f"{path} is trained in another way already",
            "leave it out, or --targets and --modules-to-save without the embedding and head",
        )
    if isinstance(base, (nn.Linear, FrozenLinear)) and base.bias is not None:
        raise ConfigError(option, f"{path} has a bias, which is not supported", "leave the head out")
    return base


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
