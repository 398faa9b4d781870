"""The command line. Each command is a few lines; what is heavy is imported inside it, so that --help is quick."""

from __future__ import annotations

import sys
import time
import traceback
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click

from lorafit import config, console
from lorafit.config import Resolved, TrainConfig
from lorafit.errors import ConfigError, LorafitError

PATHS = ("model", "data", "out")


def main(arguments: list[str] | None = None) -> None:
    """Entry point: runs a command, turns errors into `error:` lines and exit codes."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    try:
        code = cli([a for a in arguments if a != "--debug"], standalone_mode=False, prog_name="lorafit")
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.Abort:
        sys.exit(130)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        place = context.command_path if context else "lorafit"
        console.fail([str(ConfigError(place, error.format_message(), f"see {place} --help"))])
        sys.exit(2)
    except LorafitError as error:
        if debug:
            traceback.print_exc()
        console.fail(error.lines())
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="lorafit")
def cli() -> None:
    """LoRA fine-tuning of open-weights language models on the hardware people have.

    MODEL is a .gguf file or a Hugging Face folder. DATA is .jsonl, .json, .csv or .txt files, or folders of them.
    --debug with any command shows tracebacks.
    """


def config_options(*names: str) -> Any:
    """Options made from the configuration's fields: type, default and help stand there alone."""

    def add(command: Any) -> Any:
        for name in reversed(names or tuple(n for n in config.field_types() if n not in PATHS)):
            command = _option(name)(command)
        return command

    return add


def _option(name: str) -> Any:
    kind, _ = config.field_types()[name]
    default = TrainConfig.__dataclass_fields__[name].default
    text = config.field_docs()[name]
    flag = f"--{name.replace('_', '-')}"
    if default not in (None, (), False) and "efault" not in text:
        shown = ",".join(default) if isinstance(default, tuple) else f"{default:g}" if kind is float else default
        text += f" [default: {shown}]"
    if kind is bool:
        return click.option(flag, name, is_flag=True, default=None, help=text)
    if get_origin(kind) is Literal:
        return click.option(flag, name, type=click.Choice(get_args(kind)), help=text)
    if name == "eval":
        return click.option(flag, name, multiple=True, metavar="DATA", help=text + " May be given several times.")
    return click.option(flag, name, type=str if get_origin(kind) is tuple else kind, help=text)


def _resolve(file: str | None, flags: dict[str, Any]) -> Resolved:
    """Defaults, then the configuration file, then flags: a flag wins over the file."""
    given = {name: value for name, value in flags.items() if value not in (None, ())}
    values: dict[str, Any] = {}
    if file is not None:
        values = config.read_yaml(Path(file))
        values.pop("identity", None)
        values = config.from_values(values, file)
    origin = dict.fromkeys(values, f"from {Path(file).name}" if file else "") | dict.fromkeys(given, "given")
    return Resolved(TrainConfig(**{**values, **config.from_values(given, "options")}), origin)


@cli.command()
@click.argument("model", required=False)
@click.argument("data", nargs=-1)
@click.option("--out", metavar="OUT", help="Folder for the run's files; refused if it is not empty.")
@config_options()
@click.option("--config", "file", metavar="FILE", help="YAML file with the same settings; flags win over it.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier run in OUT.")
@click.option("--resume", metavar="OUT", help="Go on with the run in this folder, with its own settings.")
def train(file: str | None, overwrite: bool, resume: str | None, **flags: Any) -> None:
    """Train an adapter on DATA for MODEL."""
    started = time.perf_counter()
    if resume is not None:
        from lorafit.run import resume as go_on

        changes = config.from_values({k: v for k, v in flags.items() if v not in (None, ())}, "options")
        go_on(Path(resume), changes, started=started)
        return
    resolved = _resolve(file, flags)
    for name in PATHS:
        if not getattr(resolved.config, name):
            raise ConfigError("lorafit train", f"{name.upper()} is missing", "lorafit train MODEL DATA --out OUT")
    from lorafit.run import train as run_train

    run_train(resolved, overwrite=overwrite, started=started)


@cli.command()
@click.argument("model")
@click.argument("data", nargs=-1, required=True)
@click.option("-n", "count", type=click.IntRange(0), help="Rows to show. [default: 3; all with --json]")
@config_options("max_length", "trained", "template")
@click.option("--json", "as_json", is_flag=True, help="One JSON document with every row on standard output.")
def preview(model: str, data: tuple[str, ...], count: int | None, as_json: bool, **options: Any) -> int:
    """Show rows exactly as MODEL will see them, trained tokens in colour, and every problem in DATA."""
    from lorafit.use import preview as look

    return look(model, data, count=count, as_json=as_json, **options)


@cli.command(name="eval")
@click.argument("model")
@click.argument("data", nargs=-1, required=True)
@click.option("--adapter", "adapters", multiple=True, metavar="DIR", help="Adapter to compare with the base; several.")
@click.option("--forget-on", metavar="FILE", help="Text that was not trained: has the adapter made it worse?")
@config_options("base", "compute", "threads", "max_length", "trained", "template", "skip_bad_rows")
@click.option("--json", "as_json", is_flag=True, help="A JSON list on standard output.")
def evaluate(model: str, data: tuple[str, ...], adapters: tuple[str, ...], **options: Any) -> None:
    """Held-out loss of MODEL and of each adapter on DATA, with a paired interval for the difference."""
    from lorafit.use import evaluate as measure

    measure(model, data, adapters, **options)


@cli.command()
@click.argument("model")
@click.option("--prompt", metavar="TEXT", help="Answer this.")
@click.option("--data", "file", metavar="FILE", help="Answer every row of a file, as JSON lines.")
@click.option("--system", metavar="TEXT", help="System message.")
@click.option("--adapter", metavar="DIR", help="Adapter to use.")
@click.option("--max-tokens", type=click.IntRange(1), default=256, help="Tokens per answer at most. [default: 256]")
@click.option("--temperature", type=click.FloatRange(0), default=0.0, help="0 takes the likeliest token. [default: 0]")
@config_options("base", "compute", "threads", "template", "seed")
@click.option("--json", "as_json", is_flag=True, help="JSON on standard output.")
def generate(model: str, **options: Any) -> None:
    """Answer one prompt, or every row of a file."""
    from lorafit.use import answer

    answer(model, **options)


@cli.command()
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="JSON on standard output.")
def info(path: str, as_json: bool) -> None:
    """Say what a model, adapter, run or checkpoint is."""
    from lorafit.inspection import describe

    console.facts(describe(Path(path)), as_json)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="JSON on standard output.")
def doctor(as_json: bool) -> None:
    """Machine, versions, processor features, the kernels in use and why, memory."""
    from lorafit.inspection import doctor as examine

    console.facts(examine(), as_json)
