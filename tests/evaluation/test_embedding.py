"""Distances in features against closed forms, brute force and torch-fidelity's; networks that are refused."""

from __future__ import annotations

import io
import pickle
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cyclegan_fast.evaluation import embedding
from cyclegan_fast.evaluation.embedding import (
    EmbeddingError,
    features,
    frechet_distance,
    inception_embedding,
    kernel_distance,
    program_embedding,
    random_embedding,
    resampled,
)


def exact(mean: list[float], variances: list[float], count: int, seed: int = 0) -> np.ndarray:
    """Features [N, K] whose sample mean and (diagonal) sample covariance are these."""
    rows = np.random.default_rng(seed).standard_normal((count, len(mean)))
    rows -= rows.mean(axis=0)
    rows = np.linalg.qr(rows)[0] * np.sqrt(count - 1)
    return rows * np.sqrt(variances) + mean


def batch(count: int, height: int = 40, width: int = 36, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, channels, height, width), generator=generator, dtype=torch.uint8)


# Distances


@pytest.mark.parametrize("count", [4, 30])
def test_frechet_distance_of_known_gaussians(count: int) -> None:
    """Of diagonal covariances |m1 - m2|^2 + sum (sqrt a - sqrt b)^2, with fewer pictures than features and more."""
    a, b = [1.0, 4.0, 9.0], [4.0, 4.0, 1.0]
    first, second = exact([0, 0, 0], a, count, 0), exact([3, 0, -1], b, count + 2, 1)
    assert frechet_distance(first, second) == pytest.approx(10 + 1 + 0 + 4, abs=1e-9)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)
    # Features that say nothing, and a rotation of all, change nothing; covariances need not be regular.
    turn = np.linalg.qr(np.random.default_rng(5).standard_normal((7, 7)))[0]
    wide = [np.concatenate([rows, np.zeros((len(rows), 4))], axis=1) @ turn for rows in (first, second)]
    assert frechet_distance(*wide) == pytest.approx(15, abs=1e-9)


def test_frechet_distance_of_covariances_that_do_not_commute() -> None:
    """The trace of the root by eigenvalues of S1 S2, as the definition has it."""
    random = np.random.default_rng(1)
    first, second = (random.standard_normal((50, 4)) @ random.standard_normal((4, 4)) for _ in range(2))
    means = first.mean(axis=0) - second.mean(axis=0)
    S1, S2 = np.cov(first.T), np.cov(second.T)
    root = np.sqrt(np.linalg.eigvals(S1 @ S2).astype(complex)).real.sum()
    expected = means @ means + np.trace(S1) + np.trace(S2) - 2 * root
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)


def test_kernel_distance_is_its_definition() -> None:
    random = np.random.default_rng(2)
    x, y = random.standard_normal((4, 3)), random.standard_normal((5, 3)) + 1

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / 3 + 1) ** 3)

    own = np.mean([k(x[i], x[j]) for i in range(4) for j in range(4) if i != j])
    other = np.mean([k(y[i], y[j]) for i in range(5) for j in range(5) if i != j])
    between = np.mean([k(a, b) for a in x for b in y])
    assert kernel_distance(x, y) == pytest.approx(own + other - 2 * between, rel=1e-12)


def test_torchmetrics_computes_the_same() -> None:
    fid, kid = pytest.importorskip("torchmetrics.image.fid"), pytest.importorskip("torchmetrics.image.kid")
    random = np.random.default_rng(7)
    first, second = (random.standard_normal((60, 8)) @ random.standard_normal((8, 8)) + i for i in range(2))
    moments = [torch.from_numpy(part) for rows in (first, second) for part in (rows.mean(axis=0), np.cov(rows.T))]
    assert frechet_distance(first, second) == pytest.approx(float(fid._compute_fid(*moments)), rel=1e-9)
    expected = float(kid.poly_mmd(torch.from_numpy(first), torch.from_numpy(second)))
    assert kernel_distance(first, second) == pytest.approx(expected, rel=1e-9)


def test_kernel_distance_has_no_bias_and_frechet_has() -> None:
    """Of two samples of one distribution the one is 0 on average, and the other far from it."""
    random = np.random.default_rng(3)
    pairs = [(random.standard_normal((10, 16)), random.standard_normal((10, 16))) for _ in range(300)]
    kernel = [kernel_distance(*pair) for pair in pairs]
    assert abs(np.mean(kernel)) < 3 * np.std(kernel) / np.sqrt(300)
    assert np.mean([frechet_distance(*pair) for pair in pairs]) > 5


@pytest.mark.parametrize("shift", [0.0, 1.0])
@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
def test_intervals_hold_the_expectation(monkeypatch: pytest.MonkeyPatch, distance: Any, shift: float) -> None:
    """In at least 90 % of 60 draws, the expectation being estimated by 400; a plain bootstrap's do in 0 to 85 %."""
    monkeypatch.setattr(embedding, "_RESAMPLES", 40)
    random = np.random.default_rng(4)

    def draw() -> tuple[np.ndarray, np.ndarray]:
        return random.standard_normal((12, 8)), random.standard_normal((12, 8)) + shift

    expected = np.mean([distance(*draw()) for _ in range(400)])
    found = [resampled(distance, *draw()) for _ in range(60)]
    assert np.mean([each.low <= expected <= each.high for each in found]) >= 0.9
    assert all(each.low < each.value < each.high for each in found)


def test_features_that_do_not_fit_are_refused() -> None:
    rows = np.zeros((3, 2))
    for other in (np.zeros((1, 2)), np.zeros((3, 3)), np.zeros(3)):
        with pytest.raises(EmbeddingError, match="must be"):
            frechet_distance(rows, other)
        with pytest.raises(EmbeddingError, match="must be"):
            kernel_distance(rows, other)


# Networks


def test_random_features_are_always_the_same() -> None:
    first, again = random_embedding(), random_embedding()
    pictures = batch(3)
    found = features(first, [pictures[:2], pictures[2:]])
    assert found.shape == (3, 64)
    assert np.allclose(found, features(again, [pictures]))
    assert found.std(axis=0).max() > 0
    gray = batch(2, channels=1)
    assert np.array_equal(features(first, [gray]), features(first, [gray.expand(-1, 3, -1, -1)]))
    alpha = torch.cat([pictures, batch(3, channels=1)], dim=1)
    assert np.allclose(features(first, [alpha]), found)


class Means(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float().mean(dim=(2, 3))


def program(path: Path, network: nn.Module, example: Tensor, free: tuple[int, ...] = ()) -> Path:
    shapes = {"x": dict.fromkeys(free, torch.export.Dim.AUTO)} if free else None
    torch.export.save(torch.export.export(network, (example,), dynamic_shapes=shapes), path)
    return path


@pytest.mark.parametrize("kind", ["free", "fixed", "uint8"])
def test_programs_get_what_their_input_says(tmp_path: Path, kind: str) -> None:
    example = torch.rand(2, 3, 20, 18)
    if kind == "uint8":
        example = (example * 255).to(torch.uint8)
    file = program(tmp_path / "means.pt2", Means(), example, free=() if kind == "fixed" else (0, 2, 3))
    pictures = batch(5)
    found = features(program_embedding(file), [pictures])
    expected = pictures.double().mean(dim=(2, 3)).numpy() / (1 if kind == "uint8" else 255)
    # A fixed size costs a resizing, which keeps the mean nearly.
    assert np.allclose(found, expected, rtol=0.02 if kind == "fixed" else 1e-5)


class Wrong(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float()


class Unpickled:
    """A pickle that leaves a mark when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


class Wrapped(nn.Module):
    """Means, as ``kind`` says: alone in a tuple, twice, in a dict, or as one number."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        means = x.float().mean(dim=(2, 3))
        return {"one": (means,), "two": (means, means), "dict": {"a": means}, "number": means.sum()}[self.kind]


def test_what_programs_give(tmp_path: Path) -> None:
    pictures = batch(3)
    for kind, words in (("two", "gives tuple"), ("dict", "gives dict"), ("number", "gives a single number")):
        wrong = program_embedding(program(tmp_path / f"{kind}.pt2", Wrapped(kind), pictures.float()))
        with pytest.raises(EmbeddingError, match=rf"{kind}\.pt2 {words}: it must give one tensor"):
            features(wrong, [pictures])
    one = program_embedding(program(tmp_path / "one.pt2", Wrapped("one"), pictures.float()))
    assert features(one, [pictures]).shape == (3, 3)


def test_programs_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EmbeddingError, match="cannot be read"):
        program_embedding(tmp_path / "missing.pt2")
    (tmp_path / "text.pt2").write_text("no program")
    with pytest.raises(EmbeddingError, match=r"text\.pt2"):
        program_embedding(tmp_path / "text.pt2")
    gray = program(tmp_path / "gray.pt2", Means(), torch.rand(2, 1, 8, 8))
    with pytest.raises(EmbeddingError, match="1 channels"):
        program_embedding(gray)
    flat = program(tmp_path / "flat.pt2", nn.Flatten(), torch.rand(2, 12))
    with pytest.raises(EmbeddingError, match="does not take one tensor"):
        program_embedding(flat)
    wrong = program(tmp_path / "wrong.pt2", Wrong(), torch.rand(2, 3, 8, 8), free=(0,))
    with pytest.raises(EmbeddingError, match=r"it must be \[N, K\]"):
        features(program_embedding(wrong), [batch(2)])


def test_programs_run_no_code_of_their_own(tmp_path: Path) -> None:
    good = program(tmp_path / "good.pt2", Means(), torch.rand(2, 3, 8, 8))
    mark = tmp_path / "mark"
    with zipfile.ZipFile(good) as archive:
        members = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    own = {name: data for name, data in members.items() if not name.startswith((".data/", "byteorder"))}
    content = io.BytesIO()
    torch.save(Unpickled(mark), content)
    (inputs,) = (name for name in own if "sample_inputs" in name)
    for name, change in (
        ("evil.pt2", {inputs: content.getvalue()}),
        ("machine.pt2", {"data/aotinductor/model/a.so": b"\x7fELF"}),
    ):
        writer = torch._C.PyTorchFileWriter(str(tmp_path / name))
        for member, data in (own | change).items():
            writer.write_record(member, data, len(data))
        writer.write_end_of_file()
        with pytest.raises(EmbeddingError, match={"evil.pt2": "Weights only", "machine.pt2": "machine code"}[name]):
            program_embedding(tmp_path / name)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Unpickled(mark)))  # noqa: S301 - it would have
    assert mark.exists()


# Inception


class FakeInception(nn.Module):
    """Takes what torch-fidelity's takes."""

    def __init__(self, name: str, wanted: list[str], feature_extractor_weights_path: str) -> None:
        super().__init__()
        assert (name, wanted) == ("inception-v3-compat", ["2048"])
        self.scale = torch.load(feature_extractor_weights_path, weights_only=True)["scale"]

    def forward(self, x: Tensor) -> tuple[Tensor]:
        assert x.dtype == torch.uint8
        return (x.float().mean(dim=(2, 3)) * self.scale,)


@pytest.fixture
def fake_library(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = FakeInception  # type: ignore[attr-defined]
    module.URL_INCEPTION_V3 = "https://localhost:1/weights-inception-2015-12-05-6726825d.pth"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.usefixtures("fake_library")
def test_inception_weights_come_from_a_file(tmp_path: Path) -> None:
    torch.save({"scale": torch.tensor(2.0)}, tmp_path / "weights.pth")
    found = features(inception_embedding(tmp_path / "weights.pth"), [batch(3)])
    assert np.allclose(found, 2 * batch(3).double().mean(dim=(2, 3)))
    with pytest.raises(EmbeddingError, match=r"missing\.pth"):
        inception_embedding(tmp_path / "missing.pth")
    torch.save({"other": torch.tensor(2.0)}, tmp_path / "other.pth")
    with pytest.raises(EmbeddingError, match="does not hold the weights"):
        inception_embedding(tmp_path / "other.pth")
    mark = tmp_path / "mark"
    torch.save(Unpickled(mark), tmp_path / "evil.pth")
    with pytest.raises(EmbeddingError, match=r"evil\.pth"):
        inception_embedding(tmp_path / "evil.pth")
    assert not mark.exists()


@pytest.mark.usefixtures("fake_library")
def test_a_download_that_fails_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(EmbeddingError, match=r"cannot be downloaded from https.*--inception-weights FILE"):
        inception_embedding()


def test_without_the_library_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(EmbeddingError, match=r'pip install "cyclegan_fast\[fid\]"'):
        inception_embedding()


def test_formulas_are_those_of_the_library() -> None:
    fid = pytest.importorskip("torch_fidelity.metric_fid")
    kid = pytest.importorskip("torch_fidelity.metric_kid")
    random = np.random.default_rng(6)
    x, y = random.standard_normal((30, 8)), 1.3 * random.standard_normal((30, 8)) + 0.5
    moments = [fid.fid_features_to_statistics(torch.from_numpy(rows)) for rows in (x, y)]
    (theirs,) = fid.fid_statistics_to_metric(*moments, False).values()
    assert frechet_distance(x, y) == pytest.approx(theirs, rel=1e-9)
    theirs = kid.kernel_mmd(x, y, kid_kernel="poly", kid_kernel_poly_degree=3, kid_kernel_poly_coef0=1.0)
    assert kernel_distance(x, y) == pytest.approx(theirs, rel=1e-9)


def test_the_library_takes_our_copy_of_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its network with random weights gives, from our file, what it gives itself."""
    library = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    monkeypatch.setattr(library, "load_state_dict_from_url", lambda *_, **__: {})
    monkeypatch.setattr(library.FeatureExtractorInceptionV3, "load_state_dict", lambda *_, **__: None)
    torch.manual_seed(0)
    theirs = library.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    monkeypatch.undo()
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    found = features(inception_embedding(tmp_path / "weights.pth"), [batch(2)])
    assert found.shape == (2, 2048)
    assert np.allclose(found, theirs(batch(2))[0].numpy(), rtol=1e-4, atol=1e-6)
