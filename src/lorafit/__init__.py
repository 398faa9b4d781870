"""lorafit: LoRA fine-tuning of open-weights language models on the hardware people have.

Importing this package is quick: torch is imported by the first function that is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PUBLIC = {
    "train": "lorafit.api",
    "load": "lorafit.use",
    "plan": "lorafit.api",
    "attach": "lorafit.adapter.attach",
    "save_adapter": "lorafit.adapter.file",
    "load_adapter": "lorafit.adapter.file",
    "save_nf4": "lorafit.model.save",
    "LorafitError": "lorafit.errors",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'lorafit' has no attribute {name!r}; it has {', '.join(_PUBLIC)}")


def __dir__() -> list[str]:
    return [*__all__]
