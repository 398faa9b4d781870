"""The command line. Each command is a few lines; what is heavy is imported inside it, so that --help is quick."""

from __future__ import annotations

import atexit
import gc
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click

from lorafit import config, console
from lorafit.config import Resolved, TrainConfig
from lorafit.errors import ConfigError, LorafitError

PATHS = ("model", "data", "out")
SPINS = "1000"
METAVARS = {
    "eval": "DATA",
    "targets": "NAMES",
    "report_to": "NAMES",
    "template": "FILE",
    "init_adapter": "DIR",
    "rank_pattern": "NAME=RANK,...",
    "alpha_pattern": "NAME=ALPHA,...",
    "modules_to_save": "NAMES",
    "train_tokens": "TOKENS",
    "new_tokens": "TOKENS",
}
WORDS = """MODEL is a .gguf file or a Hugging Face folder. DATA is .jsonl, .json, .csv or .txt files, or folders of
them. --debug with any command shows tracebacks."""
METRICS_HELP = """Also measure answers, separated by commas: exact and normalised match, choice (the likeliest of a
set of labels), json (validity and field F1), bleu, rouge. Default: losses alone."""


def main(arguments: list[str] | None = None) -> None:
    """Entry point: runs a command, turns errors into `error:` lines and exit codes."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command = " ".join(["lorafit", *(word for word in arguments[:1] if word in cli.commands)])
    try:
        code = cli([a for a in arguments if a != "--debug"], standalone_mode=False, prog_name="lorafit")
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.Abort:  # Ctrl-C outside training
        sys.exit(130)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except (click.ClickException, OSError, LorafitError) as error:
        fault = _as_fault(error, command)
        if "--debug" in arguments:
            traceback.print_exc()
        console.fail(fault.lines())
        sys.exit(fault.exit_code)


def _as_fault(error: Exception, command: str) -> LorafitError:
    """Any error that a user can cause, in lorafit's own form."""
    if isinstance(error, LorafitError):
        return error
    if isinstance(error, click.ClickException):
        return ConfigError(command, error.format_message().rstrip("."), f"see {command} --help")
    assert isinstance(error, OSError)  # a full disk, a folder that may not be written
    what = error.strerror or str(error)
    return ConfigError(str(error.filename or command), what, "check the path and the space on its disk")


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help=f"LoRA fine-tuning of open-weights language models on the hardware people have.\n\n{WORDS}",
)
@click.version_option(package_name="lorafit")
def cli() -> None:
    """The group of all commands."""


@contextmanager
def _importing() -> Iterator[None]:
    """A command's imports without garbage collection, which walks over and over through the half million objects that
    they make (0.8 of 3.4 s). Those stay for good, so later collections pass them over."""
    if "torch" in sys.modules:  # not our process alone, and little is left to import
        yield
        return
    _wait_without_spinning()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(gc.unfreeze)  # what stays at the end would be reported as leaks by some libraries


def _wait_without_spinning() -> None:
    """OpenMP's threads sleep soon after their work (some microseconds) instead of spinning on: beside one other busy
    process on 2 cores a training step is twice as fast, alone as fast. It counts until torch is imported."""
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPINS


class NumberOrAuto(click.ParamType):
    """A number, or `auto` for what the option's help says of its default."""

    name = "number or auto"

    def __init__(self, kind: click.ParamType) -> None:
        self._kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if value == "auto" else self._kind.convert(value, param, ctx)


def config_options(*names: str) -> Any:
    """Options made from the configuration's fields: type, default and help stand there alone."""

    def add(command: Any) -> Any:
        for name in reversed(names or tuple(n for n in config.field_types() if n not in PATHS)):
            command = _option(name)(command)
        return command

    return add


def _option(name: str) -> Any:
    kind, optional = config.field_types()[name]
    default = TrainConfig.__dataclass_fields__[name].default
    text = config.field_docs()[name]
    flag, metavar = f"--{name.replace('_', '-')}", METAVARS.get(name)
    if default is not None and default is not False and "efault" not in text:
        shown = ",".join(default) if isinstance(default, tuple) else f"{default:g}" if kind is float else default
        text += f" [default: {shown}]"
    if kind is bool:
        return click.option(flag, name, is_flag=True, default=None, help=text)
    if get_origin(kind) is Literal:
        return click.option(flag, name, type=click.Choice(get_args(kind)), help=text)
    if kind in (int, float):
        number: Any = click.INT if kind is int else click.FLOAT
        if optional:
            number, metavar = NumberOrAuto(number), f"[auto|{number.name.upper()}]"
        return click.option(flag, name, type=number, metavar=metavar, help=text)
    if name == "eval":
        return click.option(flag, name, multiple=True, metavar=metavar, help=text + " May be given several times.")
    return click.option(flag, name, metavar=metavar, help=text)


def _given(flags: dict[str, Any]) -> dict[str, Any]:
    """The options that stand on the command line, checked."""
    given = {name: value for name, value in flags.items() if value not in (None, ())}
    return config.from_values(given, click.get_current_context().command_path)


def _settings(options: dict[str, Any]) -> TrainConfig:
    """The configuration's fields, taken out of a command's options."""
    return TrainConfig(**_given({name: options.pop(name) for name in config.field_types() if name in options}))


def _some(options: dict[str, Any], *names: str) -> TrainConfig:
    """These of the configuration's fields alone, taken out of a command's options; the others keep their defaults."""
    return TrainConfig(**_given({name: options.pop(name) for name in names}))


def _resolve(file: str | None, flags: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """(settings, where each came from) of the configuration file and the flags: a flag wins over the file."""
    given = _given(flags)
    values: dict[str, Any] = {}
    if file is not None:
        values = config.read_yaml(Path(file))
        values.pop("identity", None)
        values = config.from_values(values, file)
    origin = dict.fromkeys(values, f"from {Path(file).name}" if file else "") | dict.fromkeys(given, "given")
    return {**values, **given}, origin


@cli.command(epilog=WORDS)
@click.argument("model", required=False)
@click.argument("data", nargs=-1)
@click.option("--out", metavar="OUT", help="Folder for the run's files; refused if it is not empty.")
@config_options()
@click.option("--config", "file", metavar="FILE", help="YAML file with the same settings; flags win over it.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier run in OUT.")
@click.option("--resume", metavar="OUT", help="Go on with the run in this folder, with its own settings.")
def train(file: str | None, overwrite: bool, resume: str | None, **flags: Any) -> None:
    """Train an adapter on DATA for MODEL, or with --method full all of its weights."""
    started = time.perf_counter()
    values, origin = _resolve(file, flags)
    if resume is not None:
        if overwrite:
            raise ConfigError("--overwrite", "would replace the run that --resume goes on with", "leave one out")
        with _importing():
            from lorafit.run import resume as go_on

        go_on(Path(resume), values, started=started)
        return
    for name in PATHS:
        if not values.get(name):
            raise ConfigError("lorafit train", f"{name.upper()} is missing", "lorafit train MODEL DATA --out OUT")
    with _importing():
        from lorafit.run import train as run_train

    run_train(Resolved(TrainConfig(**values), origin), overwrite=overwrite, started=started)


@cli.command(epilog=f"{WORDS} MODEL may be a folder with only a config.json, or a built-in name such as qwen3-8b.")
@click.argument("model")
@click.argument("data", nargs=-1)
@click.option("--rows", type=click.IntRange(1), help="Instead of DATA: so many rows ...")
@click.option("--length", type=click.IntRange(2), help="... of so many tokens.")
@config_options()
@click.option("--config", "file", metavar="FILE", help="YAML file with the same settings; flags win over it.")
@click.option("--device", metavar="NAME", help="Plan for another device, such as a100-80gb, h100, rtx4090 or m3-max.")
@click.option("--device-memory", metavar="SIZE", help="Plan for a device with this much memory, such as 48GB.")
@click.option("--json", "as_json", is_flag=True, help="JSON on standard output.")
def plan(file: str | None, **options: Any) -> int:
    """Predict memory, time and size of a run, and choose the settings that fit; no weights are loaded."""
    started = time.perf_counter()
    own = ("rows", "length", "device", "device_memory", "as_json")
    values, origin = _resolve(file, {name: value for name, value in options.items() if name not in own})
    with _importing():
        from lorafit.forecast import run

    return run(Resolved(TrainConfig(**values), origin), started=started, **{name: options[name] for name in own})


@cli.command(epilog=WORDS)
@click.argument("model", required=False)
@click.argument("data", nargs=-1)
@click.option("--out", metavar="OUT", help="Folder for the comparison; refused if it is not empty.")
@click.option("--methods", default="lora,full", help="What to compare: lora, full, or both. [default: lora,full]")
@click.option("--lr-sweep", is_flag=True, help="Find each method's learning rate first: 3 to 5, half a decade apart.")
@click.option("--forget-on", metavar="FILE", help="Text that is not trained: which method has made it worse?")
@config_options(*(name for name in config.field_types() if name not in (*PATHS, "method", "lr")))
@click.option("--overwrite", is_flag=True, help="Replace an earlier comparison in OUT.")
@click.option("--resume", metavar="OUT", help="Go on with the comparison in this folder, with its own settings.")
@click.option("--json", "as_json", is_flag=True, help="compare.json on standard output.")
def compare(
    model: str | None, data: tuple[str, ...], out: str | None, methods: str, lr_sweep: bool, forget_on: str | None,
    overwrite: bool, resume: str | None, as_json: bool, **flags: Any,
) -> None:  # fmt: skip
    """LoRA against full fine-tuning on DATA, same rows, same steps; with --lr-sweep, at each one's best learning rate.

    Each run is a process of its own in OUT/lora, OUT/full. OUT/compare.html tells what it means.
    """
    settings = _given(flags)
    with _importing():
        from lorafit.compare import study
        from lorafit.compare.page import show

    if resume is not None:
        if settings or model or overwrite or lr_sweep or forget_on:
            raise ConfigError("--resume", "goes on with the comparison's own settings", "leave the others out")
        found = study.resume(Path(resume))
    elif not (model and data and out):
        missing = "MODEL" if not model else "DATA" if not data else "OUT"
        raise ConfigError("lorafit compare", f"{missing} is missing", "lorafit compare MODEL DATA --out OUT")
    else:
        names = tuple(name.strip() for name in methods.split(","))
        wanted = study.Study(model, data, names, lr_sweep, forget_on, settings)
        found = study.compare(wanted, Path(out), overwrite=overwrite)
    return console.result_json(found) if as_json else show(found)


@cli.command(epilog=WORDS)
@click.argument("model")
@click.argument("data", nargs=-1, required=True)
@click.option("-n", "count", type=click.IntRange(0), help="Rows to show. [default: 3; all with --json]")
@config_options("eval", "max_length", "trained", "template", "new_tokens")
@click.option("--json", "as_json", is_flag=True, help="One JSON document with every row on standard output.")
def preview(**options: Any) -> int:
    """Show rows exactly as MODEL will see them, trained tokens in colour, and every problem in DATA."""
    with _importing():
        from lorafit.use import preview as look

    return look(_settings(options), **options)


@cli.command(name="eval", epilog=WORDS)
@click.argument("model")
@click.argument("data", nargs=-1, required=True)
@click.option("--adapter", "adapters", multiple=True, metavar="DIR", help="Adapter to compare with the base; several.")
@click.option("--forget-on", metavar="FILE", help="Text that was not trained: has the adapter made it worse?")
@click.option("--metrics", metavar="NAMES", help=METRICS_HELP)
@click.option("--labels", metavar="FILE", help="Labels of choice, one a line. Default: the answers in DATA.")
@click.option("--exact-match", is_flag=True, help="The same as --metrics exact.")
@click.option(
    "--max-tokens",
    type=click.IntRange(1),
    default=256,
    help="Tokens per answer at most. [default: 256]",
)
@config_options("base", "compute", "threads", "max_length", "trained", "template", "skip_bad_rows")
@click.option("--json", "as_json", is_flag=True, help="A JSON list on standard output.")
def evaluate(**options: Any) -> None:
    """Held-out loss of MODEL and of each adapter on DATA, with a paired interval for the difference."""
    with _importing():
        from lorafit.evaluation import evaluate as measure

    measure(_settings(options), **options)


@cli.command(epilog=WORDS)
@click.argument("model")
@click.option("--prompt", metavar="TEXT", help="Answer this.")
@click.option("--data", "file", metavar="FILE", help="Answer every row of a file, as JSON lines.")
@click.option("--system", metavar="TEXT", help="System message, for conversations that have none.")
@click.option("--adapter", metavar="DIR", help="Adapter to use. Default: the base alone.")
@click.option("--max-tokens", type=click.IntRange(1), default=256, help="Tokens per answer at most. [default: 256]")
@click.option("--temperature", type=float, default=0.0, help="0 takes the likeliest token. [default: 0]")
@config_options("base", "compute", "threads", "template")
@click.option("--seed", type=int, help="Seed of the draws at a temperature above 0. [default: 0]")
@click.option("--json", "as_json", is_flag=True, help="JSON on standard output.")
def generate(**options: Any) -> None:
    """Answer one prompt, or every row of a file."""
    with _importing():
        from lorafit.use import answer

    answer(_settings(options), **options)


@cli.command(epilog=WORDS)
@click.argument("model")
@click.option("--adapter", metavar="DIR", help="Adapter to talk to. Default: the base alone.")
@click.option(
    "--compare", is_flag=True, help="Show the base's answer before the adapter's; each keeps its own history."
)
@click.option("--system", metavar="TEXT", help="System message of the conversation.")
@click.option("--max-tokens", type=click.IntRange(1), default=512, help="Tokens per answer at most. [default: 512]")
@click.option("--temperature", type=float, default=0.0, help="0 takes the likeliest token. [default: 0]")
@config_options("base", "compute", "threads", "template")
@click.option("--seed", type=int, help="Seed of the draws at a temperature above 0. [default: 0]")
def chat(**options: Any) -> None:
    """Talk to MODEL, or to it with an adapter: a line is a message, Ctrl-C ends an answer, Ctrl-D leaves."""
    with _importing():
        from lorafit.chat import chat as talk

    talk(_settings(options), **options)


@cli.command()
@click.argument("out")
def report(out: str) -> None:
    """Draw OUT/report.html anew from the run's report.json and metrics.jsonl."""
    with _importing():
        from lorafit.evaluate.report import redraw

    console.result(str(redraw(Path(out))))


DTYPE_HELP = "What the result is stored in. auto = as the base's file; bf16 for a quantised one."
COMPARE = "Rows whose answers are compared between programs. Default: four bundled questions."


@cli.command(epilog=WORDS)
@click.argument("model")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@click.option("--out", metavar="DIR", required=True, help="Folder for the result; refused if it exists.")
@click.option("--weights", metavar="NUMBERS", help="One for each adapter, separated by commas. Default: all 1.")
@click.option(
    "--combine",
    type=click.Choice(["add", "ties", "dare", "dare-ties"]),
    default="add",
    help="How several adapters become one: their weighted sum; TIES, which trims and elects signs; DARE, which drops "
    "values at random; both. [default: add]",
)
@click.option("--density", type=float, default=0.2, help="Share of values that ties and dare keep. [default: 0.2]")
@config_options("seed", "threads", "template")
@click.option("--dtype", type=click.Choice(["auto", "bf16", "fp16", "fp32"]), default="auto", help=DTYPE_HELP)
@click.option("--as-adapter", is_flag=True, help="Write the combined adapter (PEFT's layout), not a merged model.")
@click.option("--rank", type=click.IntRange(1), help="With --as-adapter: cut to this rank. Default: the ranks' sum.")
@click.option("--data", metavar="FILE", help=COMPARE)
@click.option("--json", "as_json", is_flag=True, help="JSON on standard output.")
def merge(as_json: bool, **options: Any) -> None:
    """Add adapters into MODEL: a plain Hugging Face folder."""
    settings = _some(options, "seed", "threads", "template")
    with _importing():
        from lorafit.export.merge import Combination
        from lorafit.export.merge import merge as run_merge

    weights = _numbers("--weights", options.pop("weights"))
    how = Combination(options.pop("combine"), weights, options.pop("density"), settings.seed)
    found = run_merge(**options, how=how, template=settings.template, threads=settings.threads)
    console.facts(found, as_json)


def _numbers(option: str, text: str | None) -> tuple[float, ...]:
    """Numbers separated by commas."""
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise ConfigError(option, f"is {text}", "give numbers separated by commas") from None


@cli.command(epilog=WORDS)
@click.argument("base")
@click.argument("tuned")
@click.option("--rank", type=click.IntRange(1), required=True, help="Rank of the adapter.")
@click.option("--out", metavar="DIR", required=True, help="Folder for the adapter; refused if it exists.")
@config_options("targets", "threads")
@click.option("--json", "as_json", is_flag=True, help="JSON on standard output.")
def extract(as_json: bool, **options: Any) -> None:
    """Make an adapter from two full models: the difference of TUNED to BASE, cut to a rank in each layer."""
    settings = _some(options, "targets", "threads")
    with _importing():
        from lorafit.export.extract import extract as run_extract

    console.facts(run_extract(**options, targets=settings.targets, threads=settings.threads), as_json)


@cli.command(epilog=WORDS)
@click.argument("model")
@click.argument("adapter")
@click.option(
    "--to",
    type=click.Choice(["peft", "portable", "gguf", "gguf-merged", "ollama", "mlx"]),
    required=True,
    help="peft: the adapter as it is; portable: PEFT's layout with one rank and one scale, for vLLM and others; gguf: "
    "an adapter file for llama.cpp; gguf-merged: base and adapter in one file; ollama: a folder with a Modelfile; mlx: "
    "mlx-lm's folder.",
)
@click.option("--out", metavar="PATH", required=True, help="File (gguf, gguf-merged) or folder; refused if it exists.")
@click.option(
    "--dtype",
    "kind",
    type=click.Choice(["auto", "F32", "F16", "BF16", "Q8_0", "Q4_0"], case_sensitive=False),
    default="auto",
    help="Of a merged GGUF file's matrices. auto = as the base's file; Q8_0 for a quantised one.",
)
@config_options("threads", "template")
@click.option("--data", metavar="FILE", help=COMPARE)
@click.option("--json", "as_json", is_flag=True, help="JSON on standard output.")
def export(as_json: bool, **options: Any) -> None:
    """Write ADAPTER in the files of another program, load them there, and compare log-probabilities."""
    settings = _some(options, "threads", "template")
    with _importing():
        from lorafit.export.targets import export as run_export

    console.facts(run_export(**options, template=settings.template, threads=settings.threads), as_json)


@cli.command()
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="JSON on standard output.")
def info(path: str, as_json: bool) -> None:
    """Say what a model, adapter, run or checkpoint is."""
    with _importing():
        from lorafit.inspection import describe

    console.facts(describe(Path(path)), as_json)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="JSON on standard output.")
def doctor(as_json: bool) -> None:
    """Machine, versions, processor features, the kernels in use and why, memory."""
    with _importing():
        from lorafit.inspection import doctor as examine

    console.facts(examine(), as_json)
