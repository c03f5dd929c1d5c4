"""u4d: 4D scene completion. One diffusion transformer over RGB, depth and camera rays; clamp what is observed."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from u4d import convert, data, diffusion, presets
    from u4d.convert import init_from_wan
    from u4d.model.transformer import Transformer
    from u4d.pipeline import Pipeline
    from u4d.scene import Scene

__version__ = "0.1.0"
__all__ = ["Pipeline", "Scene", "Transformer", "convert", "data", "diffusion", "init_from_wan", "presets"]

# Loaded when first asked for, so that `import u4d` needs neither diffusers nor a codec for video.
_LAZY = {
    "Pipeline": "u4d.pipeline",
    "Scene": "u4d.scene",
    "Transformer": "u4d.model.transformer",
    "convert": "u4d.convert",
    "data": "u4d.data",
    "diffusion": "u4d.diffusion",
    "init_from_wan": "u4d.convert",
    "presets": "u4d.presets",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'u4d' has no attribute {name!r}")
    module = import_module(_LAZY[name])
    return module if _LAZY[name] == f"u4d.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
