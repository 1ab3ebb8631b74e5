"""cyclegan_fast: unpaired image-to-image translation, trained and used fast.

import cyclegan_fast as cf

model = cf.load("runs/flowers")
model.translate("IMG_1.HEIC").save("out.jpg")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cyclegan_fast.version import __version__

if TYPE_CHECKING:
    from cyclegan_fast import ops
    from cyclegan_fast.config import Config, ConfigError, load_config
    from cyclegan_fast.errors import InputError
    from cyclegan_fast.evaluation.evaluate import evaluate
    from cyclegan_fast.evaluation.result import Evaluation
    from cyclegan_fast.inference.translate import Translator, load
    from cyclegan_fast.models.fused import PatchDiscriminator, PixelDiscriminator, ResnetGenerator
    from cyclegan_fast.models.unet import UnetGenerator
    from cyclegan_fast.training.trainer import train

__all__ = [
    "Config",
    "ConfigError",
    "Evaluation",
    "InputError",
    "PatchDiscriminator",
    "PixelDiscriminator",
    "ResnetGenerator",
    "Translator",
    "UnetGenerator",
    "__version__",
    "evaluate",
    "load",
    "load_config",
    "ops",
    "train",
]

# Where each public name lives. They are imported when first used: torch takes seconds, and much needs none of it.
_HOMES = {
    "Config": "config",
    "ConfigError": "config",
    "Evaluation": "evaluation.result",
    "InputError": "errors",
    "PatchDiscriminator": "models.fused",
    "PixelDiscriminator": "models.fused",
    "ResnetGenerator": "models.fused",
    "Translator": "inference.translate",
    "UnetGenerator": "models.unet",
    "evaluate": "evaluation.evaluate",
    "load": "inference.translate",
    "load_config": "config",
    "train": "training.trainer",
}


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module(f"{__name__}.ops")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
