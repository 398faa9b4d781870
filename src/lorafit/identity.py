"""What a run is: contents by hash, settings by value. A run that goes on must be what it was."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorafit.config import TrainConfig, field_types
from lorafit.errors import Faults, ResumeError
from lorafit.formats.folders import file_hash
from lorafit.formats.tokenizer import TextTokenizer

PATHS = ("model", "data", "eval", "out", "template", "init_adapter")  # may move; what they hold may not change
ASIDE = (*PATHS, "report_to")  # settings that are no part of what a run is


def identity_of(config: TrainConfig, base: str, tokenizer: TextTokenizer) -> dict[str, Any]:
    """What must be equal for a run to go on: contents by hash, settings by value."""
    values = {name: getattr(config, name) for name in field_types() if name not in ASIDE}
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    files = {"data": config.data, "evaluation": config.eval}
    init = Path(config.init_adapter or "") / "adapter_model.safetensors"
    return {
        "base": base,
        "tokenizer": tokenizer.fingerprint(),
        "template": tokenizer.template_fingerprint(),
        **{key: _hash_files(paths) for key, paths in files.items()},
        "init_adapter": file_hash(init)[:16] if config.init_adapter else None,
        "settings": settings,
    }


def without(identity: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The same without these settings: what a run may lower while it goes on."""
    kept = {name: value for name, value in identity["settings"].items() if name not in names}
    return {**identity, "settings": kept}


def _hash_files(paths: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for path in map(Path, paths):
        members = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        found |= {member.name: file_hash(member)[:16] for member in members}
    return found


def refuse_changes(place: str, stored: dict[str, Any], now: dict[str, Any]) -> None:
    """One ResumeError line for each difference between what a run was and what it is now."""
    faults = []
    for key in sorted(stored.keys() | now.keys()):
        was, is_ = stored.get(key), now.get(key)
        if isinstance(was, dict) and isinstance(is_, dict):
            differing = [k for k in sorted(was.keys() | is_.keys()) if was.get(k) != is_.get(k)]
            faults += [ResumeError(f"{place}: {key}.{k}", f"was {was.get(k)}, is {is_.get(k)}") for k in differing]
        elif was != is_:
            faults.append(ResumeError(f"{place}: {key}", f"was {was}, is {is_}", "put it back, or start a new run"))
    if faults:
        raise Faults(faults) if len(faults) > 1 else faults[0]
