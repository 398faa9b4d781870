"""The fastest settings that stay inside a budget of memory, and the ways out where none do.

Nothing that is chosen here changes the loss beyond rounding: how many tokens are computed at once, which layers are
computed twice, how many logits are alive, whether a mapped base stays in memory. Two choices do, so they come last and
are said: fewer bits for a base that `--base auto` may store as it likes, and shorter rows where --shorten allows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from lorafit import console
from lorafit.planning.memory import DTYPE_BYTES, Memory, Use, activations, casts, parameters, predict, training
from lorafit.planning.outline import Outline

SIZES = (2048, 1024, 512, 256, 128, 64)  # tokens computed at once
CHUNKS = (512, 256, 128, 64)  # tokens whose logits are alive at once
ACTIVATIONS = 12 * 10**8  # bytes that they may take unless --memory says more, however much is free
COURTEOUS = {2048: 4 * 10**8, 1024: ACTIVATIONS, 512: ACTIVATIONS}
"""Tokens computed at once, and the activations that so many may need without --memory: 2048 are 5 % faster than 1024,
1024 20 % faster than 512 (SmolLM2, 2 cores), the less the wider the model."""
SAFETY = 1.15  # what is predicted, times this, must be inside the budget
SHORTEST = 64  # tokens that --shorten cuts rows to at most


@dataclass(frozen=True)
class Largest:
    """Tokens of the largest pack in training, trained ones of the largest of all, tokens of the largest evaluated."""

    tokens: int
    trained: int
    evaluated: int = 0


@dataclass(frozen=True)
class Situation:
    """What a choice is made from: the model, what memory holds already, the budget in bytes, the rows' lengths."""

    model: Outline
    libraries: int
    data: int
    budget: int
    lengths: Sequence[int]
    packs: Callable[[int], Largest]
    """The largest packs, where packs may have so many tokens."""
    on_device: bool = False
    """Whether the budget is a device's, which holds neither libraries nor rows nor mapped files."""

    def memory(self, use: Use) -> Memory:
        if not self.on_device:
            return predict(self.model, use, libraries=self.libraries, data=self.data)
        parts = training(self.model, use)
        parts["weights_private"] += parts.pop("weights_mapped")
        return Memory({**parts, "casts": casts(self.model, use)})

    def sized(self, use: Use, limit: int) -> Use:
        """The same with packs of at most `limit` tokens, or the longest row's where that has more."""
        found = self.packs(limit)
        tokens, evaluated = found.tokens, found.evaluated
        if use.longest < max(self.lengths, default=1):  # rows are to be cut
            tokens, evaluated = (min(count, max(limit, use.longest)) for count in (tokens, evaluated))
        trained = min(found.trained, max(tokens, evaluated))
        return replace(use, limit=limit, tokens=tokens, trained=trained, evaluated=evaluated)

    def fits(self, use: Use) -> bool:
        return self.memory(use).total * SAFETY <= self.budget


@dataclass(frozen=True)
class Free:
    """Which settings are left to us."""

    base: bool = True
    tokens: bool = True
    chunk: bool = True
    checkpointed: bool = True
    paging: bool = True
    length: bool = False


def courteous(here: Situation, use: Use, free: Free, room: int) -> Use:
    """The largest packs that are worth the memory of their activations; where not even the smallest fit, layers that
    are computed twice, as many as are needed. room: bytes that activations may take."""
    room, model = min(room, ACTIVATIONS), here.model
    if free.tokens:
        sizes = {n: replace(use, limit=n, tokens=max(n, use.longest)) for n in COURTEOUS}
        fitting = [n for n, most in COURTEOUS.items() if activations(model, sizes[n]) <= min(most, room)]
        use = here.sized(use, fitting[0] if fitting else min(sizes))
    return _least_checkpointed(use, lambda one: activations(model, one) <= room, model) if free.checkpointed else use


def fastest(here: Situation, use: Use, free: Free, seconds: Callable[[Use], float]) -> Use | None:
    """The settings of the least seconds that fit, of all that are free; None where none fit.

    seconds: of a use, for the same rows. Base formats come in turn: with fewer bits only where more do not fit.
    """
    for base in _bases(here.model, use, free):
        found: list[Use] = []
        for one in _candidates(here, replace(use, base=base), free):
            chosen = _least_checkpointed(one, here.fits, here.model) if free.checkpointed else one
            if here.fits(chosen):
                found.append(chosen)
        if found:
            return min(found, key=lambda one: (seconds(one), -one.limit, -one.chunk))
    if free.length and use.longest > SHORTEST:
        shorter = replace(use, longest=max(SHORTEST, use.longest * 3 // 4))
        return fastest(here, here.sized(shorter, use.limit), free, seconds)
    return None


def ways_out(here: Situation, use: Use, free: Free) -> list[str]:
    """The three cheapest changes of which each alone makes it fit, with their price; the cheapest first."""
    need = least(here, use, free)
    found: list[tuple[float, str]] = []

    def price(cost: float, text: str, changed: Use, left: Free = free) -> bool:
        if here.fits(least(here, changed, left)):
            found.append((cost, text))
            return True
        return False

    if not (free.tokens and free.checkpointed and free.chunk):
        text = "leave --checkpointing and --micro-batch-tokens to lorafit (slower)"
        price(0.5, text, use, replace(free, tokens=True, checkpointed=True, chunk=True))
    total = sum(here.lengths)
    for longest in _halves(use.longest, SHORTEST):
        lost = sum(max(0, length - longest) for length in here.lengths)
        cut = sum(length > longest for length in here.lengths)
        text = f"--max-length {longest} ({cut} rows lose {lost} of {total} tokens)"
        if price(1 + 40 * lost / max(1, total), text, replace(use, longest=longest)):
            break
    if use.full:
        price(4, "--method lora (rank 16)", replace(use, full=False, rank=16))
    elif use.base not in ("nf4", "packed"):
        price(4, "--base nf4 (4 bits for the frozen layers: rounding costs some loss)", replace(use, base="nf4"))
    elif use.base == "nf4" and here.model.mapped:
        price(2, "--base packed (as the file has it)", replace(use, base="packed"))
    for rank in _halves(use.rank, 1):
        share = parameters(here.model, replace(use, rank=rank)) / max(1, parameters(here.model, use))
        text = f"--rank {rank} ({share:.0%} of the adapter's parameters)"
        if price(2 + 2 * (1 - share), text, replace(use, rank=rank)):
            break
    wanted = here.memory(need).total * SAFETY
    option = "--device-memory" if here.on_device else "--memory"
    text = f"{option} {-(-wanted // 10**7) / 100:.2f}GB ({console.gigabytes(wanted - here.budget)} more memory)"
    found.append((3, text))
    return [text for _, text in sorted(found)[:3]]


def least(here: Situation, use: Use, free: Free) -> Use:
    """The settings that need least, of those that are free, without fewer bits or shorter rows."""
    if free.tokens:
        use = here.sized(use, min(SIZES))
    if free.chunk:
        use = replace(use, chunk=min(CHUNKS))
    if free.checkpointed:
        use = replace(use, checkpointed=max(0, len(here.model.layers) - 1))  # one layer is whole anyway
    return replace(use, paged=True) if _can_page(here.model, use, free) else use


def _candidates(here: Situation, use: Use, free: Free) -> Iterator[Use]:
    for limit in SIZES if free.tokens else (use.limit,):
        sized = here.sized(use, limit)
        for chunk in CHUNKS if free.chunk else (use.chunk,):
            yield replace(sized, chunk=chunk)
            if _can_page(here.model, use, free):
                yield replace(sized, chunk=chunk, paged=True)


def _can_page(model: Outline, use: Use, free: Free) -> bool:
    return free.paging and model.pageable and use.base == "packed"


def _bases(model: Outline, use: Use, free: Free) -> list[str]:
    """How the base may be stored, with the most bits first."""
    if not free.base or model.quantised:
        return [use.base]
    smaller = [base for base in ("bf16",) if use.base == "fp32" and _is_exact(model)]
    return [use.base, *smaller, *(base for base in ("int8", "nf4") if use.base in DTYPE_BYTES)]


def _is_exact(model: Outline) -> bool:
    """Whether bf16 holds every value that the file has."""
    return all(matrix.format == "BF16" for matrix in model.matrices)


def _least_checkpointed(use: Use, fits: Callable[[Use], bool], model: Outline) -> Use:
    """With as few layers computed twice as fit, all of them where not even that does."""
    low, high = 0, len(model.layers)
    while low < high:
        middle = (low + high) // 2
        if fits(replace(use, checkpointed=middle)):
            high = middle
        else:
            low = middle + 1
    return replace(use, checkpointed=low)


def _halves(value: int, smallest: int) -> Iterator[int]:
    """value / 2, value / 4, ... down to smallest."""
    while value // 2 >= smallest:
        value //= 2
        yield value
