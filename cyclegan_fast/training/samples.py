"""Fixed test pictures, translated again and again: grids to look at and measures to choose the best state by."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from PIL import Image
from torch import Tensor, nn

from cyclegan_fast.evaluation.figures import grid
from cyclegan_fast.training.step import Objective, l1_loss

DIRECTIONS = {"A-to-B": ("real_A", "fake_B", "rec_A", "idt_B"), "B-to-A": ("real_B", "fake_A", "rec_B", "idt_A")}


class Samples:
    """Pairs of fixed pictures, each [1, C, h, w] float32 in [-1, 1], and the plain networks that translate them."""

    def __init__(
        self,
        real_A: list[Tensor],
        real_B: list[Tensor],
        modules: dict[str, nn.Module],
        objective: Objective,
        autocast: torch.dtype | None,
    ) -> None:
        self.real_A, self.real_B = real_A, real_B
        self.modules, self.objective, self.autocast = modules, objective, autocast

    @torch.no_grad()
    def translate(self) -> Iterator[dict[str, Tensor]]:
        """Real, generated, reconstructed and (with an identity loss) identity pictures of each sample, float32."""
        G_A, G_B = self.modules["G_A"], self.modules["G_B"]
        device = next(G_A.parameters()).device
        training = G_A.training
        G_A.eval(), G_B.eval()
        try:
            for real_A, real_B in zip(self.real_A, self.real_B, strict=True):
                real_A, real_B = real_A.to(device), real_B.to(device)
                with torch.autocast(device.type, dtype=self.autocast, enabled=self.autocast is not None):
                    fake_B, fake_A = G_A(real_A), G_B(real_B)
                    pictures = {"real_A": real_A, "fake_B": fake_B, "rec_A": G_B(fake_B)}
                    pictures |= {"real_B": real_B, "fake_A": fake_A, "rec_B": G_A(fake_A)}
                    if self.objective.identity:
                        pictures |= {"idt_A": G_A(real_B), "idt_B": G_B(real_A)}
                yield {name: picture.float() for name, picture in pictures.items()}
        finally:
            G_A.train(training), G_B.train(training)

    def grids(self, title: str) -> Iterator[tuple[str, Image.Image]]:
        """Name and picture grid of each direction: a row a sample, its real, generated, reconstructed, identity."""
        samples = [{name: _to_image(picture) for name, picture in sample.items()} for sample in self.translate()]
        for direction, names in DIRECTIONS.items():
            columns = [name for name in names if name in samples[0]]
            rows = [[sample[name] for name in columns] for sample in samples]
            yield (
                direction,
                grid(rows, column_titles=columns, row_titles=[""] * len(rows), title=f"{title}, {direction}"),
            )

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """``test_cycle``, the mean L1 of both cycles in [0, 2], and ``test_generator``, the generators' whole loss."""
        objective, cycle, generator = self.objective, 0.0, 0.0
        for sample in self.translate():
            cycle_A, cycle_B = l1_loss(sample["rec_A"], sample["real_A"]), l1_loss(sample["rec_B"], sample["real_B"])
            whole = objective.cycle_A * cycle_A + objective.cycle_B * cycle_B
            whole += objective.gan.generator(self.modules["D_A"](sample["fake_B"]))
            whole += objective.gan.generator(self.modules["D_B"](sample["fake_A"]))
            if "idt_A" in sample:
                whole += objective.identity * objective.cycle_B * l1_loss(sample["idt_A"], sample["real_B"])
                whole += objective.identity * objective.cycle_A * l1_loss(sample["idt_B"], sample["real_A"])
            cycle += float(cycle_A + cycle_B) / 2
            generator += float(whole)
        count = len(self.real_A)
        return {"test_cycle": cycle / count, "test_generator": generator / count}


def _to_image(picture: Tensor) -> Image.Image:
    """[1, C, h, w] in [-1, 1] to a picture of 8 bits a channel."""
    pixels = ((picture[0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
