"""How a user calls the package, for mypy alone: each result has the type that docs/python.md promises.

Not run. A wrong use carries the error that mypy must find: without one, mypy reports an unused comment.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from typing_extensions import assert_type

import cyclegan_fast as cf
from cyclegan_fast.inference.pictures import Pixels


def translations(model: cf.Translator, pixels: npt.NDArray[np.uint8], batch: torch.Tensor) -> None:
    assert_type(cf.load("runs/flowers"), cf.Translator)
    assert_type(model.translate("IMG_1.HEIC"), Image.Image)
    assert_type(model.translate(Path("IMG_1.HEIC"), "BtoA"), Image.Image)
    assert_type(model.translate(Image.new("RGB", (4, 4))), Image.Image)
    assert_type(model.translate(pixels), Pixels)
    assert_type(model.translate(batch), torch.Tensor)
    assert_type(model.cycle(batch), tuple[torch.Tensor, torch.Tensor])


def measures() -> None:
    assert_type(cf.evaluate("runs/flowers", Path("datasets/flowers"), limit=50), cf.Evaluation)
    assert_type(cf.evaluate("runs/flowers").table(), str)


def wrong_uses(model: cf.Translator) -> None:
    assert_type(model.translate("IMG_1.HEIC"), torch.Tensor)  # type: ignore[assert-type]
    model.translate(3)  # type: ignore[call-overload]
    cf.load("runs/flowers", device=0)  # type: ignore[arg-type]
