"""Averages of the generators' weights, which translate more evenly than the weights of any one step.

    average <- d average + (1 - d) weights     after each step t = 1, 2, ... of the generators' optimiser
    d = min(decay, (1 + t) / (10 + t))

Adversarial training circles around its solution rather than settling there; an exponential moving average (Yazici et
al. 2019, arXiv:1806.04498) is near the centre of the circle. The smaller d of the first steps forgets the weights that
training began with, of which 0.999 by itself would keep a tenth after 2,300 steps. t is the optimiser's own count, a
tensor on the device, so that a CUDA graph can hold the update and a resumed run goes on with it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cyclegan_fast.errors import InputError
from cyclegan_fast.training.checkpoint import CheckpointError

__all__ = ["SUFFIX", "WEIGHTS", "averaged", "preferred", "select"]

SUFFIX = "_ema"
WEIGHTS = ("auto", "ema", "raw")


def averaged(modules: Mapping[str, nn.Module], optimizer: Optimizer, decay: float) -> dict[str, nn.Module]:
    """Copies of the generators (``G_A`` becomes ``G_A_ema``) that follow them at each step of their optimiser.

    modules: the plain networks by name, with float32 weights, all trained by `optimizer` that begin with ``G_``;
    decay: in (0, 1). The optimiser keeps the hook.
    """
    copies = {f"{name}{SUFFIX}": copy.deepcopy(m) for name, m in modules.items() if name.startswith("G_")}
    weights: list[Tensor] = [
        parameter for name in copies for parameter in modules[name.removesuffix(SUFFIX)].parameters()
    ]
    averages: list[Tensor] = [
        parameter.requires_grad_(False) for module in copies.values() for parameter in module.parameters()
    ]

    def follow(*_: Any) -> None:
        steps = (state["step"] for weight in weights if "step" in (state := optimizer.state.get(weight, {})))
        if (step := next(steps, None)) is not None:
            _follow(averages, weights, ((1 + step) / (10 + step)).clamp_max(decay))

    optimizer.register_step_post_hook(follow)
    return copies


@torch.no_grad()
def _follow(averages: list[Tensor], weights: list[Tensor], decay: Tensor) -> None:
    """average <- weight + decay (average - weight), for a decay [] on the device."""
    torch._foreach_sub_(averages, weights)
    torch._foreach_mul_(averages, decay)
    torch._foreach_add_(averages, weights)


def preferred(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The networks by their plain names, averages in the place of what they average."""
    plain = {name: module for name, module in modules.items() if not name.endswith(SUFFIX)}
    return {name: modules.get(f"{name}{SUFFIX}", module) for name, module in plain.items()}


def select(content: Mapping[str, Any], weights: str, file: Path) -> dict[str, Any]:
    """The content of a checkpoint with the generators' weights asked for as ``G_A`` and ``G_B``.

    weights: ``ema``, the averages; ``raw``, those of the last step; ``auto``, the averages if there are any. Raises
    InputError for another word, and CheckpointError naming the file if it holds no averages and is asked for them.
    """
    if weights not in WEIGHTS:
        raise InputError(f"weights {weights!r} is not one of {', '.join(WEIGHTS)}")
    names = [name for name in (f"G_A{SUFFIX}", f"G_B{SUFFIX}") if name in content]
    if weights == "ema" and not names:
        raise CheckpointError(f"{file} holds no averaged weights, which training.ema keeps: use --weights raw")
    chosen = {name: value for name, value in content.items() if name not in names}
    return chosen if weights == "raw" else chosen | {name.removesuffix(SUFFIX): content[name] for name in names}
