"""Fixed test pictures, translated again and again: grids to look at and measures to choose the best state by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import combinations, groupby
from typing import Generic, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from cyclegan_fast.evaluation.figures import grid
from cyclegan_fast.training.augmented import AugmentedState
from cyclegan_fast.training.cyclegan import CycleGANState
from cyclegan_fast.training.latents import latent_draws
from cyclegan_fast.training.pix2pix import Pix2PixState, beside
from cyclegan_fast.training.step import TrainState, l1_loss

__all__ = ["AugmentedSamples", "BaseSamples", "PairSamples", "Samples"]

State = TypeVar("State", bound=TrainState)
_STYLES = 4  # random codes that a sample is translated with
_STYLE_SEED = 0
_AT_ONCE = 4  # pictures translated as one batch: without a backward pass they take less memory than a step


class BaseSamples(ABC, Generic[State]):
    """Pairs of fixed pictures, each [1, C, h, w] float32 in [-1, 1], and the plain networks that translate them.

    best: the measure that each value of `checkpoint.best` means.
    """

    best: Mapping[str, str] = {"cycle": "test_cycle", "generator": "test_generator"}

    def __init__(
        self, real_A: list[Tensor], real_B: list[Tensor], modules: Mapping[str, nn.Module], state: State
    ) -> None:
        self.real_A, self.real_B, self.modules, self.state = real_A, real_B, modules, state

    @property
    def directions(self) -> tuple[str, ...]:
        """The directions that are learned."""
        return "AtoB", "BtoA"

    @abstractmethod
    def columns(self) -> dict[str, Sequence[str]]:
        """Of each grid by name: which pictures of a sample it shows, in order."""

    @abstractmethod
    def translated(self, real_A: Tensor, real_B: Tensor, index: int) -> dict[str, Tensor]:
        """All pictures of sample `index` by name, the real ones included."""

    @abstractmethod
    def measured(self, sample: Mapping[str, Tensor]) -> dict[str, float]:
        """The measures of one sample."""

    @abstractmethod
    def translation(self, direction: str, real: Tensor, index: int) -> Tensor:
        """Of a batch [N, C, h, w], the pictures `index` and after, as the direction has it."""

    @property
    def _device(self) -> torch.device:
        return next(next(iter(self.modules.values())).parameters()).device

    @torch.no_grad()
    def generated(self, direction: str, pictures: Sequence[Tensor]) -> Iterator[Tensor]:
        """Translations of pictures [1, C, h, w] in their order, as batches [n, C, h, w] of one size, float32."""
        with _evaluating(self.modules):
            first = 0
            for _, alike in groupby(enumerate(pictures), key=lambda item: (item[0] // _AT_ONCE, item[1].shape)):
                real = torch.cat([picture for _, picture in alike]).to(self._device)
                with self.state.casting(real):
                    made = self.translation(direction, real, first)
                first += len(real)
                yield made.float()

    @torch.no_grad()
    def translate(self) -> Iterator[dict[str, Tensor]]:
        """All pictures of each sample by name, float32."""
        with _evaluating(self.modules):
            device = self._device
            for index, (real_A, real_B) in enumerate(zip(self.real_A, self.real_B, strict=True)):
                real_A, real_B = real_A.to(device), real_B.to(device)
                with self.state.casting(real_A):
                    pictures = self.translated(real_A, real_B, index)
                yield {name: picture.float() for name, picture in pictures.items()}

    def grids(self, title: str) -> Iterator[tuple[str, Image.Image]]:
        """Name and picture of each grid: a row a sample."""
        samples = [{name: _to_image(picture) for name, picture in sample.items()} for sample in self.translate()]
        for name, wanted in self.columns().items():
            columns = [column for column in wanted if column in samples[0]]
            rows = [[sample[column] for column in columns] for sample in samples]
            yield (
                name,
                grid(rows, column_titles=columns, row_titles=[""] * len(rows), title=f"{title}, {name}"),
            )

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Means of the measures over the samples, by name; they begin with ``test_``."""
        totals: dict[str, float] = {}
        for sample in self.translate():
            for name, value in self.measured(sample).items():
                totals[name] = totals.get(name, 0.0) + value
        return {name: total / len(self.real_A) for name, total in totals.items()}


class Samples(BaseSamples[CycleGANState]):
    """CycleGAN's: each domain's real, generated, reconstructed and, with an identity loss, identity pictures."""

    def columns(self) -> dict[str, Sequence[str]]:
        """Both directions."""
        return {"A-to-B": ("real_A", "fake_B", "rec_A", "idt_B"), "B-to-A": ("real_B", "fake_A", "rec_B", "idt_A")}

    def translated(self, real_A: Tensor, real_B: Tensor, index: int) -> dict[str, Tensor]:  # noqa: ARG002
        """See `training.cyclegan` for the names."""
        G_A, G_B = self.modules["G_A"], self.modules["G_B"]
        fake_B, fake_A = G_A(real_A), G_B(real_B)
        pictures = {"real_A": real_A, "fake_B": fake_B, "rec_A": G_B(fake_B)}
        pictures |= {"real_B": real_B, "fake_A": fake_A, "rec_B": G_A(fake_A)}
        if self.state.objective.identity:
            pictures |= {"idt_A": G_A(real_B), "idt_B": G_B(real_A)}
        return pictures

    def translation(self, direction: str, real: Tensor, index: int) -> Tensor:  # noqa: ARG002
        """By G_A or G_B."""
        made: Tensor = self.modules["G_A" if direction == "AtoB" else "G_B"](real)
        return made

    def measured(self, sample: Mapping[str, Tensor]) -> dict[str, float]:
        """``test_cycle``, the mean L1 of both cycles in [0, 2], and ``test_generator``, the generators' whole loss."""
        objective = self.state.objective
        cycle_A, cycle_B = l1_loss(sample["rec_A"], sample["real_A"]), l1_loss(sample["rec_B"], sample["real_B"])
        whole = objective.cycle_A * cycle_A + objective.cycle_B * cycle_B
        whole += objective.gan.generator(self.modules["D_A"](sample["fake_B"]))
        whole += objective.gan.generator(self.modules["D_B"](sample["fake_A"]))
        if "idt_A" in sample:
            whole += objective.identity * objective.cycle_B * l1_loss(sample["idt_A"], sample["real_B"])
            whole += objective.identity * objective.cycle_A * l1_loss(sample["idt_B"], sample["real_A"])
        return {"test_cycle": float(cycle_A + cycle_B) / 2, "test_generator": float(whole)}


class PairSamples(BaseSamples[Pix2PixState]):
    """pix2pix's: input, generated, truth."""

    best: Mapping[str, str] = {"cycle": "test_l1", "generator": "test_generator"}

    @property
    def directions(self) -> tuple[str, ...]:
        """The one direction."""
        return (self.state.direction,)

    def columns(self) -> dict[str, Sequence[str]]:
        """The one direction."""
        return {self.state.direction.replace("to", "-to-"): ("input", "generated", "truth")}

    def translated(self, real_A: Tensor, real_B: Tensor, index: int) -> dict[str, Tensor]:  # noqa: ARG002
        """input, generated and truth."""
        source, target = (real_A, real_B) if self.state.suffix == "A" else (real_B, real_A)
        return {"input": source, "generated": self.modules[f"G_{self.state.suffix}"](source), "truth": target}

    def translation(self, direction: str, real: Tensor, index: int) -> Tensor:  # noqa: ARG002
        """By the one generator."""
        made: Tensor = self.modules[f"G_{self.state.suffix}"](real)
        return made

    def measured(self, sample: Mapping[str, Tensor]) -> dict[str, float]:
        """``test_l1``, the mean distance from the truth in [0, 2], and ``test_generator``, the generator's loss."""
        state = self.state
        l1 = l1_loss(sample["generated"], sample["truth"])
        logits = self.modules[f"D_{state.suffix}"](beside(sample["input"], sample["generated"]))
        return {"test_l1": float(l1), "test_generator": float(state.gan.generator(logits) + state.l1 * l1)}


class AugmentedSamples(BaseSamples[AugmentedState]):
    """Augmented CycleGAN's: each picture translated with several random codes, the same at every look."""

    def columns(self) -> dict[str, Sequence[str]]:
        """Both directions."""
        return {
            "A-to-B": ("real_A", *(f"fake_B {i + 1}" for i in range(_STYLES)), "rec_A"),
            "B-to-A": ("real_B", *(f"fake_A {i + 1}" for i in range(_STYLES)), "rec_B"),
        }

    def translated(self, real_A: Tensor, real_B: Tensor, index: int) -> dict[str, Tensor]:
        """``fake_* i`` by the i-th code, and ``rec_*`` from the first of them and the code found in it."""
        G_A, G_B, E_A, E_B = (self.modules[name] for name in ("G_A", "G_B", "E_A", "E_B"))
        pictures = {"real_A": real_A, "real_B": real_B}
        for i in range(_STYLES):
            z_A, z_B = (self._code(index * _STYLES + i, domain, real_A) for domain in (0, 1))
            pictures |= {f"fake_B {i + 1}": G_A(real_A, z_B), f"fake_A {i + 1}": G_B(real_B, z_A)}
        fake_A, fake_B = pictures["fake_A 1"], pictures["fake_B 1"]
        pictures["rec_A"] = G_B(fake_B, E_A(beside(real_A, fake_B)))
        pictures["rec_B"] = G_A(fake_A, E_B(beside(fake_A, real_B)))
        return pictures

    def translation(self, direction: str, real: Tensor, index: int) -> Tensor:
        """By the first of each picture's codes, as in the grids."""
        domain, network = (1, "G_A") if direction == "AtoB" else (0, "G_B")
        codes = [self._code((index + i) * _STYLES, domain, real) for i in range(len(real))]
        made: Tensor = self.modules[network](real, torch.cat(codes))
        return made

    def measured(self, sample: Mapping[str, Tensor]) -> dict[str, float]:
        """``test_cycle`` as CycleGAN's; ``test_generator``, the pictures' part of the generators' loss;
        ``test_diversity_*``, the mean L1 distance in [0, 2] between one picture's translations by different codes.
        """  # fmt: skip
        state = self.state
        cycle_A, cycle_B = l1_loss(sample["rec_A"], sample["real_A"]), l1_loss(sample["rec_B"], sample["real_B"])
        whole = state.cycle_A * cycle_A + state.cycle_B * cycle_B
        whole += state.gan.generator(self.modules["D_A"](sample["fake_B 1"]))
        whole += state.gan.generator(self.modules["D_B"](sample["fake_A 1"]))
        measures = {"test_cycle": float(cycle_A + cycle_B) / 2, "test_generator": float(whole)}
        for direction, made in (("AtoB", "fake_B"), ("BtoA", "fake_A")):
            pairs = [(f"{made} {i + 1}", f"{made} {j + 1}") for i, j in combinations(range(_STYLES), 2)]
            apart = [float(l1_loss(sample[one], sample[other])) for one, other in pairs]
            measures[f"test_diversity_{direction}"] = sum(apart) / len(apart)
        return measures

    def _code(self, index: int, domain: int, like: Tensor) -> Tensor:
        size = self.state.latent_size
        draws = latent_draws(_STYLE_SEED, torch.tensor([index]).numpy(), size, domain)
        return torch.from_numpy(draws).to(like.device, torch.float32)


@contextmanager
def _evaluating(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Networks in evaluation mode for the block."""
    training = {name: module.training for name, module in modules.items()}
    for module in modules.values():
        module.eval()
    try:
        yield
    finally:
        for name, module in modules.items():
            module.train(training[name])


def _to_image(picture: Tensor) -> Image.Image:
    """[1, C, h, w] in [-1, 1] to a picture of 8 bits a channel."""
    pixels = ((picture[0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
