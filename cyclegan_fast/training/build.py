"""What a run trains, from its configuration: networks, optimisers and the state of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from cyclegan_fast import distributed
from cyclegan_fast.config import Config, ModelConfig
from cyclegan_fast.device import AUTOCAST
from cyclegan_fast.models import build_augmented, build_discriminators, build_generators, build_pix2pix
from cyclegan_fast.models.reference import power_iteration
from cyclegan_fast.ops.instance_norm import runs_kernels
from cyclegan_fast.training.augmented import AugmentedState
from cyclegan_fast.training.cyclegan import CycleGANState, Objective
from cyclegan_fast.training.image_pool import ImagePool
from cyclegan_fast.training.losses import GANLoss
from cyclegan_fast.training.pix2pix import Pix2PixState
from cyclegan_fast.training.reduction import BucketReduction
from cyclegan_fast.training.samples import AugmentedSamples, BaseSamples, PairSamples, Samples
from cyclegan_fast.training.step import Exchange, TrainState

__all__ = ["NETWORKS", "build_networks", "build_samples", "build_state", "executed", "resolved_impl", "roles"]

NETWORKS = ("G_A", "G_B", "D_A", "D_B")


def roles(model: ModelConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the networks that the generators' loss trains, and of those that the discriminators' does."""
    if model.method == "pix2pix":
        suffix = model.direction[0]
        return (f"G_{suffix}",), (f"D_{suffix}",)
    if model.method == "augmented":
        return ("G_A", "G_B", "E_A", "E_B"), ("D_A", "D_B", "D_Z_A", "D_Z_B")
    return NETWORKS[:2], NETWORKS[2:]


def resolved_impl(config: Config, precision: str, device: torch.device) -> str:
    """`fused` or `reference`: what training.impl means in a resolved precision on a device."""
    if config.training.impl != "auto":
        return config.training.impl
    return "fused" if runs_kernels(device, AUTOCAST.get(precision, torch.float32)) else "reference"


def build_networks(config: Config, impl: str, device: torch.device) -> dict[str, nn.Module]:
    """The networks of the method by name, initialised from the seed, on the device; impl as `resolved_impl`."""
    torch.manual_seed(config.seed)
    model, training = config.model, config.training
    # The fused operations have no second derivative, which the gradient penalty needs.
    impl_D = "reference" if config.loss.gan == "wgangp" else impl
    if model.method == "pix2pix":
        modules = build_pix2pix(model, impl=impl, impl_D=impl_D, recompute=training.recompute)
    elif model.method == "augmented":
        modules = build_augmented(model, impl=impl, impl_D=impl_D)
    else:
        generators = build_generators(model, impl=impl, recompute=training.recompute)
        modules = dict(zip(NETWORKS, (*generators, *build_discriminators(model, impl=impl_D)), strict=True))
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
    generators, discriminators = roles(config.model)
    names = generators if config.loss.gan == "wgangp" else generators + discriminators
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
    model, training, loss = config.model, config.training, config.loss
    generators, discriminators = roles(model)

    def adam(names: Sequence[str]) -> torch.optim.Adam:
        parameters = [parameter for name in names for parameter in modules[name].parameters()]
        betas = (training.beta1, training.beta2)
        optimizer = torch.optim.Adam(parameters, lr=training.lr, betas=betas, eps=training.adam_eps, fused=True)

        def iterate(*_: Any) -> None:
            for name in names:
                power_iteration(modules[name])

        if model.spectral_norm:  # part of the optimiser's step, and so of a recorded one
            optimizer.register_step_post_hook(iterate)
        return optimizer

    common: dict[str, Any] = {
        "optimizer_G": adam(generators),
        "optimizer_D": adam(discriminators),
        "autocast": AUTOCAST.get(precision),
        "scaler": GradScaler(device.type, enabled=precision == "fp16"),
        "reduction_G": _reduction(config, modules, *generators),
        "reduction_D": _reduction(config, modules, *discriminators),
        "side_stream": torch.cuda.Stream(device) if training.streams == 2 and device.type == "cuda" else None,
    }
    gan, penalty = GANLoss(loss.gan), loss.gradient_penalty if loss.gan == "wgangp" else 0.0
    if model.method == "pix2pix":
        suffix, target = ("A", "B") if model.direction == "AtoB" else ("B", "A")
        return Pix2PixState(
            G=run[f"G_{suffix}"],
            D=run[f"D_{suffix}"],
            exchange_pairs=_shared(pools[target]),
            direction=model.direction,
            gan=gan,
            l1=loss.l1,
            gradient_penalty=penalty,
            **common,
        )
    networks: dict[str, Any] = {**run}
    exchanges: dict[str, Any] = {f"exchange_{domain}": _shared(pool) for domain, pool in pools.items()}
    if model.method == "augmented":
        cycle = {"cycle_A": loss.cycle_A, "cycle_B": loss.cycle_B, "latent": loss.latent}
        options: dict[str, Any] = {"gan": gan, "latent_size": model.latent, "gradient_penalty": penalty, **cycle}
        return AugmentedState(**networks, **exchanges, **options, **common)
    objective = Objective(
        gan=gan,
        cycle_A=loss.cycle_A,
        cycle_B=loss.cycle_B,
        identity=loss.identity,
        gradient_penalty=penalty,
        own_gradient=loss.generator_gradient == "own",
    )
    return CycleGANState(**networks, **exchanges, objective=objective, **common)


def build_samples(
    real_A: list[Tensor], real_B: list[Tensor], modules: dict[str, nn.Module], state: TrainState
) -> BaseSamples[Any]:
    """The fixed test pictures, [1, C, h, w] each, as the method of the state looks at them."""
    if isinstance(state, Pix2PixState):
        return PairSamples(real_A, real_B, modules, state)
    if isinstance(state, AugmentedState):
        return AugmentedSamples(real_A, real_B, modules, state)
    if isinstance(state, CycleGANState):
        return Samples(real_A, real_B, modules, state)
    raise TypeError(f"{type(state).__name__} is not the state of a known method")


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
