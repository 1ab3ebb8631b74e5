"""Everything that a run changes, by the names that a checkpoint has it under."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from cyclegan_fast.training.checkpoint import CheckpointError
from cyclegan_fast.training.ema import SUFFIX
from cyclegan_fast.training.image_pool import ImagePool
from cyclegan_fast.training.step import TrainState

__all__ = ["RunState"]


class RunState:
    """Networks, optimisers, loss scaler and image pools.

    modules: the plain networks by name, as they are saved, and the averages of some (see `training.ema`); pools: the
    image pools by domain; step: what a training step holds, with the optimisers of these networks.
    """

    def __init__(self, modules: Mapping[str, nn.Module], pools: Mapping[str, ImagePool], step: TrainState) -> None:
        self.modules, self.pools, self.step = modules, pools, step

    @property
    def optimizers(self) -> dict[str, Optimizer]:
        """The optimisers by name."""
        return {"optimizer_G": self.step.optimizer_G, "optimizer_D": self.step.optimizer_D}

    def state_dict(self, lr: float) -> dict[str, Any]:
        """What a checkpoint holds of it; lr: the learning rate, which a graph keeps in a tensor."""
        return {
            **{name: module.state_dict() for name, module in self.modules.items()},
            **{name: _portable(optimizer, lr) for name, optimizer in self.optimizers.items()},
            "scaler": self.step.scaler.state_dict(),
            "pools": {name: pool.state_dict() for name, pool in self.pools.items()},
        }

    def load_state_dict(self, content: Mapping[str, Any], path: Path) -> None:
        """Take over what the checkpoint at `path` holds. Raises CheckpointError saying what does not fit."""
        try:
            for name, module in self.modules.items():
                # Averages that a run begins to keep now start from the weights.
                module.load_state_dict(content.get(name, content[name.removesuffix(SUFFIX)]))
            for name, optimizer in self.optimizers.items():
                optimizer.load_state_dict(content[name])
            self.step.scaler.load_state_dict(content["scaler"])
            for name, pool in self.pools.items():
                pool.load_state_dict(content["pools"][name])
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"{path} does not fit this configuration: {error}") from error

    def replicated(self) -> dict[str, list[Tensor]]:
        """What all processes must hold alike, by the name of what it belongs to."""
        parts = {name: list(module.state_dict().values()) for name, module in self.modules.items()}
        for name, optimizer in self.optimizers.items():
            parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
            states = (optimizer.state.get(parameter, {}) for parameter in parameters)
            parts[name] = [value for state in states for key, value in state.items() if key.startswith("exp_avg")]
        for name, pool in self.pools.items():
            images = pool.state_dict()["images"]
            parts[f"pool_{name}"] = images if isinstance(images, list) else [] if images is None else [images]
        return parts

    def trained(self) -> Iterator[tuple[str, Tensor]]:
        """All weights and moments, each by its own name."""
        for name, module in self.modules.items():
            yield from ((f"{name}.{key}", value) for key, value in module.state_dict().items())
        weights = {id(p): f"{name}.{key}" for name, m in self.modules.items() for key, p in m.named_parameters()}
        for optimizer in self.optimizers.values():
            for parameter, moments in optimizer.state.items():
                yield from (
                    (f"{key} of {weights[id(parameter)]}", value) for key, value in moments.items() if key != "step"
                )


def _portable(optimizer: Optimizer, lr: float) -> dict[str, Any]:
    """The optimiser's state as mode eager has it, whatever the mode: a graph keeps its learning rate in a tensor."""
    state = optimizer.state_dict()
    groups = [{**group, "lr": lr, "capturable": False} for group in state["param_groups"]]
    return {**state, "param_groups": groups}
