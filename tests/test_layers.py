"""Imports point down, lazy ones included; importing the package is quick."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src" / "lorafit"
# From the bottom up; what stands on one line may import the lines before it, and not its neighbours.
LAYERS = [
    {"errors"},
    {"catalogue", "config", "console", "machine"},
    {"formats", "kernels"},
    {"data"},
    {"frozen"},
    {"adapter"},
    {"model"},
    {"training"},
    {"evaluate", "planning"},
    {"settings", "inputs", "trackers"},
    {"tuned", "identity"},
    {"job"},
    {"describe"},
    {"run", "export", "forecast"},
    {"api", "use", "inspection"},
    {"evaluation", "chat", "compare"},
    {"__init__"},
    {"cli"},
    {"__main__"},
]
RANK = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms}
ALSO = {("formats", "kernels")}  # the table of block types stands with the kernels


def rooms_imported(file: Path) -> set[str]:
    """Rooms that a file imports anywhere in it, `TYPE_CHECKING` blocks too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" if node.module == "lorafit" else node.module for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("lorafit.")}
    return found


def room_of(file: Path) -> str:
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


def test_every_import_points_down():
    """No room imports one above it or beside it; every room has its place in the list."""
    seen, wrong = 0, []
    for file in sorted(SOURCE.rglob("*.py")):
        own = room_of(file)
        assert own in RANK, f"{file} is in no layer: give it one here and in CONTRIBUTING.md"
        for room in rooms_imported(file) - {own}:
            seen += 1
            if RANK[room] >= RANK[own] and (own, room) not in ALSO:
                wrong.append(f"{file.relative_to(SOURCE)} imports {room}")
    assert not wrong
    assert seen > 40


def test_data_is_handed_its_tokenizer():
    """The data room imports nothing but configuration and errors."""
    rooms = set().union(*(rooms_imported(file) for file in (SOURCE / "data").glob("*.py")))
    assert rooms <= {"data", "config", "errors"}


def packages_imported(file: Path) -> set[str]:
    """Top-level names of every package that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
    return found


def test_only_the_model_room_knows_transformers():
    """transformers is imported in model/ alone, torch nowhere in data/."""
    knowing = {room_of(file) for file in SOURCE.rglob("*.py") if "transformers" in packages_imported(file)}
    assert knowing == {"model"}
    assert not any("torch" in packages_imported(file) for file in (SOURCE / "data").glob("*.py"))


def test_no_pickle_exec_or_eval_in_the_package():
    """Nothing from a file is ever run: no pickle, torch.load, exec, eval or compile in the source."""
    banned = {"exec", "eval", "compile", "__import__"}
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert not {a.name for a in node.names} & {"pickle", "marshal", "shelve"}, file
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in banned, f"{file}:{node.lineno}"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                assert ast.unparse(node.func) != "torch.load", f"{file}:{node.lineno}"


def test_no_broad_except():
    """`except Exception` and bare `except` stand nowhere but where Rust's panics must be caught."""
    allowed = {"formats/tokenizer.py"}
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ExceptHandler):
                caught = ast.unparse(node.type) if node.type else ""
                broad = caught in ("", "Exception", "BaseException")
                assert not broad or str(file.relative_to(SOURCE)) in allowed, f"{file}:{node.lineno}"


def test_importing_the_package_does_not_import_torch():
    """`import lorafit`, its public names listed, and every --help stay without torch and transformers."""
    code = (
        "import sys, lorafit, lorafit.cli; dir(lorafit)\n"
        "for command in lorafit.cli.cli.commands:\n"
        "    try: lorafit.cli.main([command, '--help'])\n"
        "    except SystemExit as stop: assert stop.code == 0\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
