"""What a run trains, from its configuration: networks, optimisers and the state of a step."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from cyclegan_fast import distributed
from cyclegan_fast.config import Config
from cyclegan_fast.device import AUTOCAST
from cyclegan_fast.models import build_discriminators, build_generators
from cyclegan_fast.models.reference import power_iteration
from cyclegan_fast.ops.instance_norm import runs_kernels
from cyclegan_fast.training.image_pool import ImagePool
from cyclegan_fast.training.losses import GANLoss
from cyclegan_fast.training.reduction import BucketReduction
from cyclegan_fast.training.step import Exchange, Objective, TrainState

__all__ = ["NETWORKS", "build_networks", "build_state", "executed", "resolved_impl"]

NETWORKS = ("G_A", "G_B", "D_A", "D_B")


def resolved_impl(config: Config, precision: str, device: torch.device) -> str:
    """`fused` or `reference`: what training.impl means in a resolved precision on a device."""
    if config.training.impl != "auto":
        return config.training.impl
    return "fused" if runs_kernels(device, AUTOCAST.get(precision, torch.float32)) else "reference"


def build_networks(config: Config, impl: str, device: torch.device) -> dict[str, nn.Module]:
    """The four networks by name, initialised from the seed, on the device; impl as `resolved_impl`."""
    torch.manual_seed(config.seed)
    training = config.training
    # The fused operations have no second derivative, which the gradient penalty needs.
    impl_D = "reference" if config.loss.gan == "wgangp" else impl
    made: tuple[nn.Module, ...] = (
        *build_generators(config.model, impl=impl, recompute=training.recompute),
        *build_discriminators(config.model, impl=impl_D),
    )
    modules = dict(zip(NETWORKS, made, strict=True))
    for module in modules.values():
        module.to(device)
        if training.channels_last:
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return modules


def executed(config: Config, modules: dict[str, nn.Module], *, one_shape: bool) -> dict[str, nn.Module]:
    """The networks as the step runs them: themselves, or compiled, for one shape of pictures where there is only one.

    Compiled networks have no second derivative, so where the gradient penalty needs it discriminators stay as they are.
    """
    if config.training.mode != "compile":
        return modules
    names = ("G_A", "G_B") if config.loss.gan == "wgangp" else NETWORKS
    dynamic = False if one_shape else None
    compiled = {name: torch.compile(modules[name], fullgraph=True, dynamic=dynamic) for name in names}
    return modules | cast(dict[str, nn.Module], compiled)


def build_state(
    config: Config,
    modules: dict[str, nn.Module],
    run: dict[str, nn.Module],
    pools: dict[str, ImagePool],
    precision: str,
    device: torch.device,
) -> TrainState:
    """What a step reads and changes: modules has the parameters, run what is called, which may be compiled."""
    training, loss = config.training, config.loss

    def adam(*names: str) -> torch.optim.Adam:
        parameters = [parameter for name in names for parameter in modules[name].parameters()]
        betas = (training.beta1, training.beta2)
        optimizer = torch.optim.Adam(parameters, lr=training.lr, betas=betas, eps=training.adam_eps, fused=True)

        def iterate(*_: Any) -> None:
            for name in names:
                power_iteration(modules[name])

        if config.model.spectral_norm:  # part of the optimiser's step, and so of a recorded one
            optimizer.register_step_post_hook(iterate)
        return optimizer

    return TrainState(
        G_A=run["G_A"],
        G_B=run["G_B"],
        D_A=run["D_A"],
        D_B=run["D_B"],
        optimizer_G=adam("G_A", "G_B"),
        optimizer_D=adam("D_A", "D_B"),
        exchange_A=_shared(pools["A"]),
        exchange_B=_shared(pools["B"]),
        objective=Objective(
            gan=GANLoss(loss.gan),
            cycle_A=loss.cycle_A,
            cycle_B=loss.cycle_B,
            identity=loss.identity,
            gradient_penalty=loss.gradient_penalty if loss.gan == "wgangp" else 0.0,
            own_gradient=loss.generator_gradient == "own",
        ),
        autocast=AUTOCAST.get(precision),
        scaler=GradScaler(device.type, enabled=precision == "fp16"),
        reduction_G=_reduction(config, modules, "G_A", "G_B"),
        reduction_D=_reduction(config, modules, "D_A", "D_B"),
        side_stream=torch.cuda.Stream(device) if training.streams == 2 and device.type == "cuda" else None,
    )


def _reduction(config: Config, modules: dict[str, nn.Module], *names: str) -> BucketReduction | None:
    """What averages these networks' gradients, where there are several processes."""
    if distributed.world_size() == 1:
        return None
    return BucketReduction(
        [list(modules[name].parameters()) for name in names],
        bucket_bytes=max(1, round(1e6 * config.distributed.bucket_mb)),
        wire=torch.bfloat16 if config.distributed.compression == "bf16" else None,
    )


def _shared(pool: ImagePool) -> Exchange:
    """One pool for all processes: each sees every fake and makes the same draws, so the law is that of one process."""

    def exchange(images: Tensor, accept: Tensor, slot: Tensor) -> Tensor:
        if pool.size == 0:  # nobody sees another's fakes
            return pool.exchange(images, accept[: images.shape[0]], slot[: images.shape[0]])
        first, count = distributed.rank() * images.shape[0], images.shape[0]
        return pool.exchange(distributed.gather_batch(images), accept, slot)[first : first + count]

    return exchange
