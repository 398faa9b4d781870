"""The command line from outside: options, exit codes, one-line errors, what goes to which stream."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest

from builders.commands import QUICK, World, run, write_rows
from lorafit import config
from lorafit.cli import cli

QUICKLY = [word for name, value in QUICK.items() for word in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("cli"))


def squeezed(text: str) -> str:
    """Without white space: help is wrapped, at hyphens too."""
    return re.sub(r"\s", "", text)


@pytest.mark.parametrize("command", ["", *cli.commands])
def test_every_command_has_help(command):
    """--help answers on standard output with exit code 0 and says what each option means."""
    outcome = run(*command.split(), "--help")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith(f"Usage: lorafit {command}".rstrip())
    options = cli.commands[command].params if command else []
    for option in options:
        assert option.param_type_name == "argument" or option.help, f"{command}: {option.name} has no help"


def test_train_has_an_option_for_every_setting_with_its_meaning_and_default():
    """Options come from the configuration's fields: flag, the field's words, and its default where there is one."""
    shown = squeezed(run("train", "--help").out)
    for name, field in config.TrainConfig.__dataclass_fields__.items():
        if name in ("model", "data", "out"):
            continue
        assert f"--{name.replace('_', '-')}" in shown
        assert squeezed(config.field_docs()[name]) in shown
        if isinstance(field.default, (int, float)) and not isinstance(field.default, bool):
            wanted = squeezed(f"{config.field_docs()[name]} [default: {field.default:g}]")
            assert wanted in shown, name


def test_eval_names_every_metric():
    """The metrics, what is short for one of them, and the bound of an answer with its default."""
    shown = squeezed(run("eval", "--help").out)
    for words in (
        "exact and normalised match, choice",
        "json",
        "bleu, rouge",
        "--exact-match The same as --metrics exact",
    ):
        assert squeezed(words) in shown
    assert squeezed("Tokens per answer at most. [default: 256]") in shown


def test_help_imports_nothing_heavy():
    """What makes --help quick: torch, transformers and numpy stay unloaded."""
    code = (
        "import sys\nfrom lorafit.cli import main\ntry: main(['train', '--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'transformers', 'numpy', 'jinja2') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "[]"


def test_after_a_commands_imports_garbage_is_collected_as_before():
    """Collection is on again and passes over what was imported; a process that has torch already is left alone."""
    code = (
        "import gc, sys\n{}from lorafit.cli import main\ntry: main(['doctor'])\nexcept SystemExit: pass\n"
        "print(gc.isenabled(), gc.get_freeze_count())"
    )
    for before, frozen in (("", True), ("import torch\n", False)):
        command = [sys.executable, "-c", code.format(before)]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
        assert found.stderr == ""
        enabled, count = found.stdout.split()[-2:]
        assert enabled == "True"
        assert (int(count) > 10_000) == frozen


def test_a_commands_threads_do_not_spin_unless_told_to():
    """OpenMP is told before torch loads; who set a policy, or has torch already, keeps what he has."""
    code = (
        "import os\n{}from lorafit.cli import main\ntry: main(['doctor'])\nexcept SystemExit: pass\n"
        "print(os.environ.get('GOMP_SPINCOUNT'))"
    )
    plain = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    for before, environment, said in [
        ("", plain, "1000"),
        ("import torch\n", plain, "None"),
        ("", {**plain, "GOMP_SPINCOUNT": "7"}, "7"),
        ("", {**plain, "OMP_WAIT_POLICY": "active"}, "None"),
    ]:
        command = [sys.executable, "-c", code.format(before)]
        found = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        assert found.stdout.split()[-1] == said


def test_a_process_ends_with_the_exit_code_and_one_line():
    """`python -m lorafit` with an unknown option: code 2, nothing on standard output, one error line."""
    found = subprocess.run([sys.executable, "-m", "lorafit", "train", "--rnk", "3"], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith("error: lorafit train: No such option '--rnk'")
    assert found.stderr.endswith("see lorafit train --help\n")
    assert found.stderr.count("\n") == 1


def test_a_reader_that_leaves_ends_the_command_quietly(world):
    """`lorafit preview ... | head`: the closed pipe ends the command without a word."""
    command = [sys.executable, "-m", "lorafit", "preview", str(world.model), str(world.data), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


def wrong_inputs() -> list[tuple[str, str]]:
    """(arguments of train after MODEL DATA --out OUT, what the last error line says)."""
    return [
        ("--rnk 3", r"lorafit train: No such option '--rnk'.*; see lorafit train --help"),
        ("--use-nothing", r"lorafit train: No such option '--use-nothing'.*; see lorafit train --help"),
        ("--share-prefix auto", r"lorafit train: No such option '--share-prefix'; see lorafit train --help"),
        ("--rank", r"lorafit train: Option '--rank' requires an argument; see lorafit train --help"),
        ("--rank x", r"lorafit train: Invalid value for '--rank': 'x' .*; see lorafit train --help"),
        ("--lr x", r"lorafit train: Invalid value for '--lr': 'x' .*; see lorafit train --help"),
        ("--schedule zigzag", r"lorafit train: .*'zigzag' is not one of 'linear'.*; see lorafit train --help"),
        ("--base fp4", r"lorafit train: .*'fp4' is not one of .*; see lorafit train --help"),
        ("--rank 0", r"--rank: is 0; give a number from 1 to 4096"),
        ("--rank 0 --alpha -1", r"--alpha: is -1.0; give a number above 0"),
        ("--lr nan", r"--lr: is nan; .*"),
        ("--epochs inf", r"--epochs: is inf; .*"),
        ("--batch-size 0", r"--batch-size: is 0; .*"),
        ("--targets q_proj,,v_proj", r"lorafit train: targets: is 'q_proj,,v_proj'; give a list of names"),
        ("--targets nothing", r"--targets: nothing matches no linear layer; this model has .*q_proj.*"),
        ("--max-length 2", r".*data.jsonl: leaves no row with a trained token; raise --max-length"),
        ("--eval {d}/missing.jsonl", r".*missing.jsonl: No such file or directory; check the path"),
        ("--template {d}/missing", r"--template: .*missing: does not read: No such file or directory; .*"),
        ("--template {d}", r"--template: .*: does not read: Is a directory; .*"),
        ("--template {d}/latin.txt", r"--template: .*latin.txt: does not read: 'utf-8' codec .*; .*"),
        ("--template {d}/broken.jinja", r"--template: .*broken.jinja: does not compile: .*; .*"),
        ("--template {d}/refuses.jinja", r".*data.jsonl: and 4 more"),
        ("--init-adapter {d}", r".*adapter_config.json: does not exist; give an adapter's folder"),
        ("--init-adapter {other}", r".*: does not belong to this base: .*; give the base it was trained on"),
        ("--config {d}/missing.yaml", r".*missing.yaml: No such file or directory; check the path"),
        ("--config {d}", r".*: Is a directory; check the path"),
        ("--config {d}/broken.yaml", r".*broken.yaml: is no YAML: .*; mend that line"),
        ("--config {d}/list.yaml", r".*list.yaml: holds list; write `key: value` lines"),
        ("--config {d}/unknown.yaml", r".*unknown.yaml: rnk: is no setting; did you mean rank\?"),
        ("--config {d}/types.yaml", r".*types.yaml: alpha: is True; give a number"),
    ]


@pytest.fixture(scope="module")
def files(world):
    """The world's folder with everything that the wrong inputs name."""
    from builders.models import save_folder, tiny_model

    d = world.folder
    (d / "latin.txt").write_bytes(b"caf\xe9")
    (d / "broken.jinja").write_text("{% for x in %}")
    (d / "refuses.jinja").write_text("{{ raise_exception('not like this') }}")
    (d / "broken.yaml").write_text("rank: [1\n")
    (d / "list.yaml").write_text("- rank\n")
    (d / "unknown.yaml").write_text("rnk: 3\n")
    (d / "types.yaml").write_text("rank: x\nalpha: true\n")
    other = save_folder(tiny_model("llama", seed=1), d / "other-model")
    adapter = d / "other" / "adapter"
    assert run("train", other, world.data, "--out", d / "other", *QUICKLY, "--max-steps", 1).code == 0
    return {"d": d, "other": adapter}


def assert_error(outcome, says: str) -> None:
    """Exit code 2, nothing on standard output, `error:` lines alone, and the last one says this."""
    lines = outcome.err.splitlines()
    assert (outcome.code, outcome.out) == (2, ""), outcome.err
    assert lines
    assert all(re.match(r"error: [^:]+.*: .+", line) for line in lines), outcome.err
    assert re.fullmatch("error: " + says, lines[-1]), lines[-1]


@pytest.mark.parametrize(("arguments", "says"), wrong_inputs(), ids=[arguments for arguments, _ in wrong_inputs()])
def test_wrong_options_are_one_line_each_and_leave_nothing(world, files, tmp_path, arguments, says):
    """Whatever is wrong with an option, its file or its value: code 2, error lines, and OUT is not made."""
    words = arguments.format(**files).split()
    assert_error(run("train", world.model, world.data, "--out", tmp_path / "out", *words), says)
    assert not (tmp_path / "out").exists()


def test_wrong_models_and_data_are_one_line_each(world, tmp_path):
    """A missing model, no model, missing, empty or foreign data, and each of the three left out."""
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "nothing").mkdir()
    (tmp_path / "text.gguf").write_text("hello")
    out = ("--out", tmp_path / "out")
    for command, says in [
        (("train", tmp_path / "no.gguf", world.data, *out), r".*no.gguf: does not exist; give a .gguf file .*"),
        (("train", tmp_path / "text.gguf", world.data, *out), r".*text.gguf: is no GGUF file.*; give a .gguf file"),
        (("train", tmp_path / "nothing", world.data, *out), r".*nothing: holds no config.json; .*"),
        (("train", world.model, tmp_path / "no.jsonl", *out), r".*no.jsonl: No such file or directory; .*"),
        (("train", world.model, tmp_path / "empty.jsonl", *out), r".*empty.jsonl:1: the file is empty; .*"),
        (("train", world.model, tmp_path / "nothing", *out), r".*nothing: the folder holds no data file; .*"),
        (("train", world.model, world.gguf, *out), r".*model.gguf: .gguf is no kind of data that is read; .*"),
        (("train", *out), r"lorafit train: MODEL is missing; .*"),
        (("train", world.model, *out), r"lorafit train: DATA is missing; .*"),
        (("train", world.model, world.data), r"lorafit train: OUT is missing; .*"),
        (("preview", world.model), r"lorafit preview: Missing argument 'DATA...'; see lorafit preview --help"),
        (("plan", world.model), r"lorafit plan: needs DATA, or --rows and --length; give one of them"),
        (("nope", world.model), r"lorafit: No such command 'nope'; see lorafit --help"),
        (("--nope",), r"lorafit: No such option '--nope'; see lorafit --help"),
    ]:
        assert_error(run(*command), says)
    assert not (tmp_path / "out").exists()


def test_no_command_shows_help_and_fails():
    """`lorafit` alone is asked for nothing: the help, on standard error."""
    outcome = run()
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("Usage: lorafit")


def test_the_first_twenty_faults_are_shown_and_the_rest_counted(world, tmp_path):
    """31 bad rows: 20 lines with their places, then `and 11 more`; bad rows can be skipped, missing files cannot."""
    rows = [{"prompt": "a", "completion": None}] * 31
    bad = write_rows(tmp_path / "bad.jsonl", rows)
    outcome = run("train", world.model, bad, "--out", tmp_path / "out")
    lines = outcome.err.splitlines()
    assert (outcome.code, len(lines)) == (2, 21)
    assert lines[19] == f"error: {bad}:20: completion is null; give it text"
    assert lines[20] == f"error: {bad}: and 11 more"
    skipping = ("--skip-bad-rows", "--out", tmp_path / "out", *QUICKLY)
    outcome = run("train", world.model, bad, world.data, *skipping)
    assert outcome.code == 0
    assert f"warning: skipped: {bad}:20: completion is null" in outcome.err
    assert "warning: skipped: 11 more" in outcome.err
    missing = run("train", world.model, world.data, tmp_path / "no.jsonl", "--overwrite", *skipping)
    assert_error(missing, r".*no.jsonl: No such file or directory; check the path")


def test_a_folder_that_cannot_be_made_is_one_line(world):
    """OUT below a file, or a file itself: the system's words, no traceback."""
    for out in (world.data, world.data / "below"):
        outcome = run("train", world.model, world.data, "--out", out, *QUICKLY)
        assert outcome.code == 2
        assert re.match(r"error: .*data.jsonl.*; .+", outcome.err.splitlines()[-1])
        assert "Traceback" not in outcome.err
    assert world.data.read_text().startswith('{"prompt"')


def test_a_failed_command_loses_nothing(world, tmp_path):
    """Bad data with --overwrite: the run that was there stays whole, byte for byte."""
    out = tmp_path / "out"
    shutil.copytree(world.out, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    bad = write_rows(tmp_path / "bad.jsonl", [{"prompt": "a"}])
    assert run("train", world.model, bad, "--out", out, "--overwrite").code == 2
    assert run("train", world.model, world.data, "--out", out).code == 2
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("arguments", ["--rank 0", "--rnk 1", "--eval missing.jsonl"])
def test_debug_shows_the_traceback(world, tmp_path, arguments):
    """--debug adds the traceback and changes neither the error line nor the exit code."""
    command = ("train", world.model, world.data, "--out", tmp_path / "out", *arguments.split())
    plain, debug = run(*command), run(*command, "--debug")
    assert "Traceback" not in plain.err
    assert debug.err.startswith("Traceback (most recent call last)")
    assert debug.err.endswith(plain.err)
    assert debug.code == plain.code == 2


def test_training_speaks_on_standard_error_alone(world, tmp_path):
    """Progress, warnings and the closing figures go to standard error; standard output stays free for results."""
    outcome = run("train", world.model, world.data, "--out", tmp_path / "out", *QUICKLY)
    assert (outcome.code, outcome.out) == (0, "")
    for words in ("8 rows held out", "lr        0.01  (given)", "step 6/6", "held-out loss", "tokens/s", "report.html"):
        assert words in outcome.err


def test_a_configuration_file_gives_what_flags_do_and_a_flag_wins(world, tmp_path):
    """--config run.yaml repeats the run to the byte; flags beside it win, and run.yaml says where each came from."""
    runs = {name: tmp_path / name for name in ("first", "again", "other")}
    first = ("train", world.model, world.data, "--targets", "q_proj,v_proj", "--eval", world.test, "--eval", world.data)
    assert run(*first, "--out", runs["first"], *QUICKLY).code == 0
    file = ("--config", runs["first"] / "run.yaml")
    assert run("train", *file, "--out", runs["again"]).code == 0
    assert run("train", *file, "--out", runs["other"], "--rank", 2, "--lr", "auto").code == 0
    adapters = {name: (out / "adapter/adapter_model.safetensors").read_bytes() for name, out in runs.items()}
    assert adapters["first"] == adapters["again"] != adapters["other"]
    values = {name: config.read_yaml(out / "run.yaml") for name, out in runs.items()}
    assert values["first"]["targets"] == ["q_proj", "v_proj"]
    assert values["first"]["eval"] == [str(world.test), str(world.data)]
    assert (values["again"]["rank"], values["other"]["rank"]) == (4, 2)
    text = (runs["other"] / "run.yaml").read_text()
    assert re.search(r"^rank: 2  # given$", text, re.M)
    assert re.search(r"^alpha: 32.0  # from run.yaml$", text, re.M)
    assert re.search(r"^lr: .*  # auto: ", text, re.M)


def test_resume_takes_the_runs_own_settings_and_no_others(world, tmp_path):
    """--resume of a finished run rewrites its report; the same flags are welcome, others are shown and refused."""
    out = tmp_path / "out"
    shutil.copytree(world.out, out)
    again = run("train", "--resume", out, "--rank", 4, "--config", out / "run.yaml", "--out", out)
    assert (again.code, again.out) == (0, ""), again.err
    assert "going on after step 6" in again.err
    (tmp_path / "other.yaml").write_text("rank: 8\n")
    for words, says in [
        (("--rank", 8), r"option: rank: was 4, is 8; .*"),
        (("--config", tmp_path / "other.yaml"), r"option: rank: was 4, is 8; .*"),
        (("--overwrite",), r"--overwrite: .*; leave one out"),
    ]:
        assert_error(run("train", "--resume", out, *words), says)
    assert_error(run("train", "--resume", tmp_path), r".*: holds no run.yaml; .*")
    assert_error(run("train", "--resume", tmp_path / "nothing"), r".*nothing: holds no run.yaml; .*")
    assert not (tmp_path / "nothing").exists()


def test_a_reader_that_has_enough_is_no_fault(world):
    """`lorafit preview ... | head`: what is not read any more is no error, and nothing is said of it."""
    command = [sys.executable, "-m", "lorafit", "preview", world.model, world.data, "--json"]
    reader, writer = os.pipe()
    os.close(reader)
    found = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (found.returncode, found.stderr) == (1, "")  # as click ends such a command
