"""Published models by name: the configuration of each, one JSON file beside this one with the source of its numbers.

    find("qwen3-8b")["hidden_size"]    4096

A source that begins with, or names, "unverified" says which numbers no copy of the published file confirmed.
"""

from __future__ import annotations

import difflib
import json
from functools import cache
from importlib.resources import files
from typing import Any

from lorafit.errors import ConfigError


@cache
def names() -> tuple[str, ...]:
    """The models of the catalogue, in alphabetical order."""
    return tuple(sorted(file.name[:-5] for file in files(__name__).iterdir() if file.name.endswith(".json")))


def find(name: str) -> dict[str, Any]:
    """The model's configuration, as its folder's config.json would hold it. Raises ConfigError for an unknown name."""
    config: dict[str, Any] = _read(name)["config"]
    return config


def source(name: str) -> str:
    """Where the configuration's numbers come from. Raises ConfigError for an unknown name."""
    return str(_read(name)["source"])


def _read(name: str) -> dict[str, Any]:
    if name not in names():
        near = difflib.get_close_matches(name.lower(), names(), 3)
        remedy = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(names())}"
        raise ConfigError(name, "is no model of the built-in catalogue", remedy)
    found: dict[str, Any] = json.loads((files(__name__) / f"{name}.json").read_text(encoding="utf-8"))
    return found
