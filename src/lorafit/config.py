"""Every setting of a training run, declared once: flags, YAML, run.yaml and `--help` all come from here.

A field's docstring stands under it: first its unit, then what it does and what the default means. `None` means
"auto": the value is worked out before step 1, and run.yaml says by which rule (see `Resolved`).
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import math
import re
import types
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from lorafit.errors import ConfigError, Faults, LorafitError

MAX_YAML_BYTES = 1 << 20
TRACKERS = ("jsonl", "tensorboard", "wandb", "mlflow", "trackio")
TAKEN_OVER = (
    "init",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "bias",
    "modules_to_save",
    "train_tokens",
    "new_tokens",
)  # from --init-adapter
ADAPTER_ONLY = (
    "rank",
    "alpha",
    "dropout",
    "targets",
    "init_adapter",
    "lora_plus_ratio",
    *TAKEN_OVER,
)  # what means nothing with --method full


@dataclass(frozen=True)
class TrainConfig:
    """What `lorafit train` does; the field names are the options' names and run.yaml's keys."""

    model: str = ""
    """A .gguf file or a Hugging Face model folder."""
    data: tuple[str, ...] = ()
    """Training data: .jsonl, .json, .csv or .txt files, or folders of them."""
    out: str = ""
    """The run's folder: run.yaml, metrics.jsonl, checkpoints/, adapter/ (or model/), report.html, report.json."""

    method: Literal["lora", "full"] = "lora"
    """What is trained: an adapter (lora), or all weights of the model (full), which takes 16 bytes a weight."""
    rank: int = 16
    """Rank of the adapter: A is (rank, inputs), B is (outputs, rank). Higher learns more and costs little."""
    alpha: float = 32.0
    """Scale of the adapter: its output is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Probability that an input of the adapter is dropped in training. 0 = none."""
    targets: tuple[str, ...] = ("all-linear",)
    """Layers that get an adapter: all-linear, attention, mlp, experts, or names and globs, separated by commas.
    experts = a mixture's stacks of experts, each expert with its own adapter; all-linear does not include them."""
    init_adapter: str | None = None
    """Adapter folder to go on from; its rank, alpha, targets and kind are taken over. Default: a new adapter."""
    init: Literal["default", "pissa", "loftq", "eva"] = "default"
    """How a new adapter starts: as no change (default), from the largest singular part of each matrix (pissa), from
    what 4 bits took away (loftq, with --base nf4), or with A along the layer's inputs on training rows (eva)."""
    use_rslora: bool = False
    """Scale the adapter by alpha / sqrt(rank), which holds high ranks down less. Default: by alpha / rank."""
    use_dora: bool = False
    """Also train the length of each row of the adapted weights (DoRA); slower. Default: LoRA alone."""
    lora_plus_ratio: float = 1.0
    """How many times A's learning rate B has (LoRA+); its paper suggests 16, with a lower --lr."""
    rank_pattern: tuple[str, ...] = ()
    """Ranks of some layers: NAME=RANK, separated by commas; names, paths or globs. Default: --rank everywhere."""
    alpha_pattern: tuple[str, ...] = ()
    """Alphas of some layers, the same way. Default: --alpha everywhere."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases that are trained: none, those of all linear layers, or those of adapted layers."""
    modules_to_save: tuple[str, ...] = ()
    """Of embed_tokens and lm_head, those that are trained whole and saved with the adapter. Default: none."""
    train_tokens: tuple[str, ...] = ()
    """Tokens of the vocabulary whose embeddings are trained, by their text. Default: none."""
    new_tokens: tuple[str, ...] = ()
    """Texts that become tokens of their own, saved with the adapter; their embeddings are trained. Default: none."""

    base: Literal["auto", "bf16", "fp32", "nf4", "int8", "packed"] = "auto"
    """How the frozen weights are stored: 16 or 32 bits, 4 bits (nf4), 8 bits (int8), or as the model's file has them
    (packed). auto = packed for a quantised model, else as --compute."""
    compute: Literal["auto", "bf16", "fp32"] = "auto"
    """What matrix products run in. auto = bf16 where the processor has fast bf16 products, else fp32."""
    kernels: Literal["auto", "avx512_bf16", "avx512", "avx2", "neon", "portable", "plain"] = "auto"
    """Processor path of the native kernels; plain = plain torch. auto = the best that the processor has."""
    threads: int | None = None
    """Processor threads. Default: the physical cores that this process may use."""

    lr: float | None = None
    """Peak learning rate. Default: full fine-tuning's for the model's width, 10 x that for LoRA, and said."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate goes on after warm-up: down to 0 (linear, cosine), or not (constant)."""
    warmup: float = 0.03
    """Fraction of all steps over which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay, per step and unit of learning rate. 0 = none."""
    clip_norm: float = 1.0
    """Largest norm of the whole gradient; a larger one is scaled down to it. 0 = no clipping."""
    epochs: float | None = None
    """Passes over the training rows. Default: 1, or as many as --max-steps needs."""
    max_steps: int | None = None
    """Optimizer steps after which the run ends. Default: what --epochs gives; with both, the first reached."""
    batch_size: int | None = None
    """Rows per optimizer step, whatever the micro-batches. Default: 16, or 8 below 500 rows."""
    seed: int = 0
    """Seed of the order of rows, of the adapter's start and of dropout."""

    max_length: int | None = None
    """Tokens per row; longer rows are cut and counted. Default: the longest row, up to the model's context."""
    trained: Literal["assistant", "all", "last"] = "assistant"
    """Tokens that are trained: every assistant turn, all tokens, or the last assistant turn."""
    template: str | None = None
    """File with a chat template (Jinja) to use instead of the model's own."""
    skip_bad_rows: bool = False
    """Count rows with faults and go on without them. Default: faults stop the run before it begins."""
    packing: Literal["auto", "off"] = "auto"
    """auto = several rows share one sequence, exactly as if each were alone; off = one row at a time."""
    micro_batch_tokens: int | None = None
    """Tokens computed at once; a step's rows are packed into sequences of at most this many, which bounds memory.
    Default: 2048, 1024 or 512, the smaller the more memory a token's activations need."""
    checkpointing: Literal["auto", "off", "some", "all"] = "auto"
    """Keep the activations of every layer (off), or compute some or all layers twice. auto = as many as are needed to
    keep activations under 1.2 GB and half of the free memory, or the whole run inside --memory."""
    checkpointed_layers: int | None = None
    """Layers that are computed twice. Default: none with off, every one with all, else as many as are needed."""

    loss_chunk: int | None = None
    """Tokens whose logits are alive at once. Default: 512, or fewer where --memory asks for it."""
    memory: str | None = None
    """Bytes to stay inside, such as 8GB: packs, checkpointing, the loss's chunks and, with --base auto, the base's bits
    are the fastest that fit. Default: what is free on the machine or in its container."""
    shorten: bool = False
    """Let --memory lower --max-length where nothing else fits: long rows lose their end, and are counted. Default:
    rows are never cut for memory."""
    paging: Literal["auto", "off", "on"] = "auto"
    """on = read a base that lies packed in its file layer by layer and drop it behind, so that it may be larger than
    memory. auto = where it does not fit otherwise."""

    eval: tuple[str, ...] = ()
    """Evaluation data. Default: a part of the training data, see --eval-fraction."""
    eval_fraction: float = 0.05
    """Fraction of the rows held out for evaluation: at least 8 and at most 200 rows, chosen by hash. 0 = none."""
    eval_every: int | None = None
    """Optimizer steps between evaluations. Default: as --save-every."""
    save_every: int | None = None
    """Optimizer steps between checkpoints. Default: a tenth of the run."""
    patience: int | None = None
    """Evaluations without a better loss after which the run ends. Default: never ends early."""
    report_to: tuple[str, ...] = ("jsonl",)
    """Trackers, separated by commas: jsonl (metrics.jsonl, always written), tensorboard, wandb, mlflow, trackio."""

    def __post_init__(self) -> None:
        faults = [ConfigError(f"--{name.replace('_', '-')}", *fault) for name, fault in self._faults() if fault]
        if faults:
            raise Faults(faults) if len(faults) > 1 else faults[0]

    def _faults(self) -> list[tuple[str, tuple[str, str] | None]]:
        """(field, (what, remedy)) for each value that cannot be meant."""

        def at_least(name: str, low: float, unit: str = "") -> tuple[str, tuple[str, str] | None]:
            value = getattr(self, name)
            bad = value is not None and not (low <= value < math.inf)
            return name, ((f"is {value}", f"give {low} or more{unit}") if bad else None)

        def within(name: str, low: float, high: float) -> tuple[str, tuple[str, str] | None]:
            value = getattr(self, name)
            return name, None if low <= value <= high else (f"is {value}", f"give a number from {low} to {high}")

        def positive(name: str) -> tuple[str, tuple[str, str] | None]:
            value = getattr(self, name)
            ok = value is None or 0 < value < math.inf
            return name, None if ok else (f"is {value}", "give a number above 0")

        return [
            within("rank", 1, 4096),
            positive("alpha"),
            within("dropout", 0, 0.99),
            ("report_to", self._unknown_tracker()),
            positive("lora_plus_ratio"),
            self._pattern_fault("rank_pattern"),
            self._pattern_fault("alpha_pattern"),
            *((name, self._taken_over(name)) for name in TAKEN_OVER),
            ("targets", None if self.targets else ("is empty", "name at least one layer, or all-linear")),
            at_least("threads", 1),
            positive("lr"),
            within("warmup", 0, 1),
            at_least("weight_decay", 0),
            at_least("clip_norm", 0),
            positive("epochs"),
            at_least("max_steps", 1, " steps"),
            at_least("batch_size", 1, " rows"),
            within("seed", 0, 2**63 - 1),
            at_least("max_length", 2, " tokens"),
            at_least("micro_batch_tokens", 1, " tokens"),
            at_least("checkpointed_layers", 0, " layers"),
            at_least("loss_chunk", 1, " tokens"),
            ("memory", None if self.memory is None else _fault_of_size(self.memory)),
            within("eval_fraction", 0, 0.5),
            at_least("eval_every", 1, " steps"),
            at_least("save_every", 1, " steps"),
            at_least("patience", 1, " evaluations"),
        ]

    def _unknown_tracker(self) -> tuple[str, str] | None:
        unknown = [name for name in self.report_to if name not in TRACKERS]
        return (f"{unknown[0]} is no tracker", f"there are {', '.join(TRACKERS)}") if unknown else None

    def _pattern_fault(self, name: str) -> tuple[str, tuple[str, str] | None]:
        whole = name == "rank_pattern"
        for entry in getattr(self, name):
            layer, _, text = entry.partition("=")
            number = float(text) if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text) else 0.0
            if not layer or number <= 0 or (whole and (number != int(number) or number > 4096)):
                return name, (f"holds {entry}", f"give NAME={'RANK, 1 to 4096' if whole else 'ALPHA, above 0'}")
        return name, None

    def _taken_over(self, name: str) -> tuple[str, str] | None:
        given = self.init_adapter is not None and getattr(self, name) != type(self).__dataclass_fields__[name].default
        told = f"is {getattr(self, name)}, and --init-adapter has its own start and kind"
        return (told, "leave one of them out") if given else None


def pattern(entries: tuple[str, ...]) -> dict[str, float]:
    """NAME=NUMBER entries of a setting as a mapping, in their order."""
    pairs = (entry.partition("=") for entry in entries)
    return {name: float(number) for name, _, number in pairs}


def bytes_of(text: str) -> int:
    """Bytes in words: 8GB = 8 * 10^9, 500MB, 6GiB = 6 * 2^30, or a plain number. Raises ValueError for other text."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)(i?)b?\s*", text, re.IGNORECASE)
    if not found or (found[3] and not found[2]):
        raise ValueError(text)
    power = " kmgt".index(found[2].lower() or " ")
    return round(float(found[1]) * (1024 if found[3] else 1000) ** power)


def _fault_of_size(text: str) -> tuple[str, str] | None:
    remedy = "give a size such as 8GB or 500MB"
    try:
        return None if bytes_of(text) > 0 else (f"is {text}", remedy)
    except ValueError:
        return f"is {text!r}", remedy


@dataclass(frozen=True)
class Resolved:
    """A configuration with nothing left to choose, and where each value came from."""

    config: TrainConfig
    origin: dict[str, str] = field(default_factory=dict)

    def settle(self, name: str, value: Any, why: str) -> Resolved:
        """The same with one field settled; `why` is the rule, for run.yaml and the output."""
        origin = {**self.origin, name: why}
        return Resolved(dataclasses.replace(self.config, **{name: value}), origin)


@cache
def field_docs() -> dict[str, str]:
    """The docstring under each field of TrainConfig, read from this file's syntax tree once."""
    body = ast.parse(inspect.getsource(TrainConfig)).body[0].body  # type: ignore[attr-defined]
    docs = {}
    for node, after in pairwise(body):
        if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr):
            docs[node.target.id] = ast.literal_eval(after.value)  # type: ignore[union-attr]
    return docs


@cache
def field_types() -> dict[str, tuple[Any, bool]]:
    """Field -> (type without None, whether None is allowed). Types are int, float, str, bool, tuple and Literal."""
    found = {}
    for name, hint in get_type_hints(TrainConfig).items():
        optional = get_origin(hint) in (Union, types.UnionType) and type(None) in get_args(hint)
        found[name] = (next(a for a in get_args(hint) if a is not type(None)) if optional else hint, optional)
    return found


def from_values(values: dict[str, Any], place: str) -> dict[str, Any]:
    """Values by field, each checked against its field's type; `place` names the file for errors.

    Raises ConfigError (or Faults) for unknown keys, with the nearest name, and for values of another type.
    """
    faults: list[LorafitError] = []
    checked: dict[str, Any] = {}
    for key, value in values.items():
        if key not in field_types():
            near = difflib.get_close_matches(str(key), field_types(), 1)
            faults.append(ConfigError(f"{place}: {key}", "is no setting", f"did you mean {near[0]}?" if near else ""))
            continue
        try:
            checked[key] = _convert(value, *field_types()[key])
        except ValueError as wrong:
            faults.append(ConfigError(f"{place}: {key}", f"is {value!r}", f"give {wrong}"))
    if faults:
        raise Faults(faults) if len(faults) > 1 else faults[0]
    return checked


def _convert(value: Any, kind: Any, optional: bool) -> Any:
    """`value` as the field's type; ValueError names what is wanted."""
    if optional and (value is None or (value == "auto" and kind in (int, float))):
        return None
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ValueError(" or ".join(get_args(kind)))
        return value
    if get_origin(kind) is tuple:
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, (list, tuple)) or not all(isinstance(p, str) and p.strip() for p in parts):
            raise ValueError("a list of names")
        return tuple(p.strip() for p in parts)
    wanted = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[kind]
    if isinstance(value, bool) != (kind is bool) or not isinstance(value, (int, float) if kind is float else kind):
        raise ValueError(wanted)
    return float(value) if kind is float else value


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML without aliases (they can grow without end) and without duplicate keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not read")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = {str(key) for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.YAMLError(f"key {sorted(twice)[0]} stands twice")
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes each text that our loader would take for a number: a hash such as 4753012852353e85."""


# YAML 1.1 reads 1e-3 as text; people write learning rates that way.
for _side in (_StrictLoader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
        list("-+0123456789"),
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError when it is missing, too large or no mapping."""
    try:
        if path.stat().st_size > MAX_YAML_BYTES:
            raise ConfigError(str(path), f"has {path.stat().st_size} bytes", "a configuration is far smaller")
        found = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except OSError as error:
        raise ConfigError(str(path), error.strerror or "cannot be read", "check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(str(path), f"is no YAML: {error}", "mend that line") from None
    if not isinstance(found, dict):
        raise ConfigError(str(path), f"holds {type(found).__name__}", "write `key: value` lines")
    return found


def to_yaml(resolved: Resolved, extra: dict[str, Any]) -> str:
    """run.yaml: every setting with where it came from as its comment, then `extra` sections as they are."""
    lines = ["# lorafit run: reading this file back repeats the run.", "# lorafit train --config run.yaml --out NEW"]
    for name in field_types():
        value = getattr(resolved.config, name)
        plain = list(value) if isinstance(value, tuple) else value
        text = yaml.dump(plain, Dumper=_Dumper, default_flow_style=True, width=10**6, allow_unicode=True)
        text = text.removesuffix("\n").removesuffix("\n...")
        lines.append(f"{name}: {text}  # {resolved.origin.get(name, 'default')}")
    return "\n".join(lines) + "\n" + yaml.dump(extra, Dumper=_Dumper, sort_keys=True, allow_unicode=True)
