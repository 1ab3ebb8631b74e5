"""Distances of sets of pictures in the features of a network: FID, KID, and the same formulas with other networks.

The Fréchet distance (Heusel et al. 2017, arXiv:1706.08500, section 2) and the kernel distance, the unbiased squared MMD
with the kernel (x.y / K + 1)^3 (Binkowski et al. 2018, arXiv:1801.01401, section 4), are called FID and KID only in the
features of the Inception network that published figures are given for. torch-fidelity has that network, as an extra:
`pip install "cyclegan_fast[fid]"`. With other features they order models, but compare with nothing published.

The Fréchet distance of few pictures is much too large, even of two samples of one distribution, and the more so the
more features there are: compare only what was measured with equal numbers. The kernel distance is unbiased.
Their intervals are for another choice of as many pictures. A plain bootstrap repeats pictures, which raises both
distances, the first beyond any interval; its standard error is sound, if a little large, and is taken about the
estimate.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import math
import os
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from cyclegan_fast.errors import InputError, shown
from cyclegan_fast.evaluation.metrics import Interval
from cyclegan_fast.tensor_file import Refused, check_directory, read_tensors

__all__ = [
    "Embedding",
    "EmbeddingError",
    "features",
    "frechet_distance",
    "inception_embedding",
    "kernel_distance",
    "program_embedding",
    "random_embedding",
    "resampled",
]

Floats = npt.NDArray[np.float64]

_INCEPTION_FEATURES = "2048"
_INCEPTION_HASH = "6726825d"  # of the library's file of weights: the first digits of its SHA-256, as its name says
_LARGEST_PROGRAM = 4 << 30  # bytes, unpacked
_MOST_FEATURES = 65536
_RESAMPLES, _FEWER_RESAMPLES = 200, 50
_FEW_PICTURES = 500  # above, fewer resamples: their cost grows with the cube of the number of pictures


class EmbeddingError(InputError):
    """Features that cannot be computed; the message names the package, the file, or the shape, and what is right."""


@dataclass(frozen=True)
class Embedding:
    """Maps uint8 [N, 3, H, W], RGB, to features [N, K]; ``key`` and ``title`` name it, ``note`` says what it is."""

    key: str
    title: str
    note: str
    run: Callable[[Tensor], Tensor]


# Distances


def frechet_distance(first: Floats, second: Floats) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of the means and covariances of features [N, K] and [M, K].

    With centred rows C over sqrt(N - 1), S = C^T C, and the trace of the root is the sum of the singular values of
    C1 C2^T: no root of a matrix of K x K is needed, nor one that is regular.
    """
    means, factors = zip(*(_moments(rows) for rows in _checked(first, second)), strict=True)
    spread = sum(float(np.square(factor).sum()) for factor in factors)
    common = np.linalg.svd(factors[0] @ factors[1].T, compute_uv=False).sum()
    return max(0.0, float(np.square(means[0] - means[1]).sum() + spread - 2 * common))


def kernel_distance(first: Floats, second: Floats) -> float:
    """The unbiased squared MMD of features [N, K] and [M, K], which may be below 0.

    Of all pictures at once: what torch-fidelity gives as the mean over subsets is the same in expectation.
    """
    first, second = _checked(first, second)
    n, m = len(first), len(second)
    own, other = _kernel(first, first), _kernel(second, second)
    within = (own.sum() - np.trace(own)) / (n * (n - 1)) + (other.sum() - np.trace(other)) / (m * (m - 1))
    return float(within - 2 * _kernel(first, second).mean())


def resampled(
    distance: Callable[[Floats, Floats], float], first: Floats, second: Floats, *, level: float = 0.95, seed: int = 0
) -> Interval:
    """A distance, and about it the interval of its bootstrap standard error: pictures of both sets drawn anew."""
    first, second = _checked(first, second)
    random = np.random.default_rng(seed)
    count = _RESAMPLES if max(len(first), len(second)) <= _FEW_PICTURES else _FEWER_RESAMPLES
    found = [
        distance(*(rows[random.integers(0, len(rows), len(rows))] for rows in (first, second))) for _ in range(count)
    ]
    value = distance(first, second)
    error = float(np.std(found, ddof=1)) * NormalDist().inv_cdf((1 + level) / 2)
    return Interval(value, value - error, value + error)


def _checked(first: Floats, second: Floats) -> tuple[Floats, Floats]:
    shapes = [list(np.shape(rows)) for rows in (first, second)]
    if not all(len(shape) == 2 and shape[0] >= 2 and shape[1] >= 1 for shape in shapes) or shapes[0][1] != shapes[1][1]:
        raise EmbeddingError(
            f"features of shapes {shapes[0]} and {shapes[1]}: they must be [N, K] and [M, K], N, M >= 2"
        )
    return np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)


def _moments(rows: Floats) -> tuple[Floats, Floats]:
    """Mean [K], and C [N, K], or fewer rows, with C^T C the covariance."""
    mean = rows.mean(axis=0)
    factor: Floats = (rows - mean) / math.sqrt(len(rows) - 1)
    if len(factor) > factor.shape[1]:
        factor = np.asarray(np.linalg.qr(factor, mode="r"))
    return mean, factor


def _kernel(first: Floats, second: Floats) -> Floats:
    kernel: Floats = (first @ second.T / first.shape[1] + 1) ** 3
    return kernel


# Networks


def features(embedding: Embedding, batches: Iterable[Tensor]) -> Floats:
    """Features, float64 [N, K], of pictures that come as uint8 [n, C, H, W], C of 1 to 4; alpha does not count.

    Raises EmbeddingError for features of another shape, and for such as are not finite.
    """
    found = []
    for batch in batches:
        colours = batch[:, :1].expand(-1, 3, -1, -1) if batch.shape[1] < 3 else batch[:, :3]
        with torch.inference_mode():
            made = embedding.run(colours.contiguous())
        if not isinstance(made, Tensor) or made.ndim != 2 or len(made) != len(batch):
            what = list(made.shape) if isinstance(made, Tensor) else type(made).__name__
            raise EmbeddingError(f"{embedding.title}: gives {what} for {len(batch)} pictures; it must be [N, K]")
        if not 1 <= made.shape[1] <= _MOST_FEATURES:
            raise EmbeddingError(f"{embedding.title}: {made.shape[1]} features; 1 to {_MOST_FEATURES} are allowed")
        if not bool(torch.isfinite(made).all()):
            raise EmbeddingError(f"{embedding.title}: features that are not finite")
        found.append(made.double().cpu().numpy())
    return np.concatenate(found)


def random_embedding() -> Embedding:
    """64 features of a convolutional network with random weights, always the same ones.

    Three 5 x 5 convolutions of stride 2 with ReLU, of normal weights by He et al. 2015, and the mean over places:
    statistics of texture and colour, of no meaning.
    """
    random = np.random.default_rng(0)
    widths = (3, 16, 32, 64)
    kernels = [
        torch.from_numpy(random.standard_normal((wide, before, 5, 5)) * math.sqrt(2 / (25 * before))).float()
        for before, wide in itertools.pairwise(widths)
    ]

    def run(images: Tensor) -> Tensor:
        x = images.float() / 127.5 - 1
        for kernel in kernels:
            x = F.relu(F.conv2d(x, kernel.to(x.device), stride=2, padding=2))
        return x.mean(dim=(2, 3))

    return Embedding("random", "random features", "64 features of a network with random weights: no FID, no KID", run)


def program_embedding(path: str | Path) -> Embedding:
    """Features of a torch.export program, a file *.pt2 that maps pictures [N, 3, H, W], RGB, to [N, K].

    Pictures come as the program's input is declared: uint8, or floating point in [0, 1]. Where N is fixed they come so
    many at a time, and where H and W are, they are resized (bilinear, antialiased). The file can hold weights and
    operations of PyTorch alone: what would run code of its own is refused. Raises EmbeddingError.
    """
    path = Path(path)
    program = _load_program(path)
    names = set(program.graph_signature.user_inputs)
    inputs = [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    if len(inputs) != 1 or not isinstance(inputs[0], Tensor) or inputs[0].ndim != 4:
        raise EmbeddingError(f"{path} does not take one tensor [N, 3, H, W]")
    declared = inputs[0]
    fixed = [int(side) if isinstance(side, int) else None for side in declared.shape]
    if fixed[1] not in (3, None) or not (declared.dtype == torch.uint8 or declared.dtype.is_floating_point):
        raise EmbeddingError(
            f"{path} takes {declared.dtype} with {fixed[1]} channels: pictures are uint8 or floating point, 3 channels"
        )
    network = program.module()

    def run(images: Tensor) -> Tensor:
        return torch.cat(
            [_run_program(path, network, part, declared.dtype, fixed) for part in images.split(fixed[0] or 16)]
        )

    what = f"features of {path.name}"
    return Embedding("embedding", what, f"{what}: no FID, no KID unless they are Inception's", run)


def _run_program(
    path: Path, network: Callable[[Tensor], Tensor], part: Tensor, dtype: torch.dtype, fixed: Sequence[int | None]
) -> Tensor:
    count = len(part)
    if fixed[0] is not None and count < fixed[0]:
        part = torch.cat([part, part[-1:].expand(fixed[0] - count, -1, -1, -1)])
    x = part.float() / 255
    size = [want or have for want, have in zip(fixed[2:], part.shape[2:], strict=True)]
    if size != list(part.shape[2:]):
        x = F.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)
    x = (x * 255).round().to(torch.uint8) if dtype == torch.uint8 else x.to(dtype)
    try:
        made = network(x)
    except Exception as error:  # whatever a program that was exported for other pictures makes torch raise
        shape = " x ".join(map(str, x.shape))
        raise EmbeddingError(f"{path} cannot take pictures of {shape} ({x.dtype}): {error}") from error
    if isinstance(made, (tuple, list)) and len(made) == 1:
        made = made[0]
    if not isinstance(made, Tensor) or made.ndim == 0:
        what = type(made).__name__ if not isinstance(made, Tensor) else "a single number"
        raise EmbeddingError(f"{path} gives {what}: it must give one tensor [N, K]")
    return made[:count]


def _load_program(path: Path) -> torch.export.ExportedProgram:
    try:
        with path.open("rb") as file:
            check_directory(file, file.seek(0, os.SEEK_END))
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
        if any("aotinductor" in item.filename or item.filename.endswith((".so", ".dll")) for item in members):
            raise EmbeddingError(f"{path} holds machine code: only programs of torch.export.save are run")
        if sum(item.file_size for item in members) > _LARGEST_PROGRAM:
            raise EmbeddingError(f"{path} unpacks to more than {_LARGEST_PROGRAM >> 30} GB")
        with _only_tensors():
            return torch.export.load(io.BytesIO(path.read_bytes()))
    except EmbeddingError:
        raise
    except OSError as error:
        raise EmbeddingError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # whatever a damaged file makes torch raise
        raise EmbeddingError(f"{path} is no program of torch.export.save: {shown(error)}") from error


@contextlib.contextmanager
def _only_tensors() -> Iterator[None]:
    """torch.export.load falls back to unpickling anything, unless this forbids it."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        os.environ.pop(name) if before is None else os.environ.__setitem__(name, before)


def inception_embedding(weights: str | Path | None = None, *, device: torch.device | str = "cpu") -> Embedding:
    """The features of FID and KID, torch-fidelity's Inception network with the weights of TensorFlow's 2015 release.

    ``weights``: the library's file of them; None for its own download, which is kept in torch's cache. Raises
    EmbeddingError when the package is not there, and for weights that cannot be had or do not fit.
    """
    try:
        library = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    except ImportError as error:
        what = "torch-fidelity is not installed" if error.name == "torch_fidelity" else f"torch-fidelity: {error}"
        raise EmbeddingError(f'{what}: pip install "cyclegan_fast[fid]"') from None
    path = _downloaded(library.URL_INCEPTION_V3) if weights is None else Path(weights)
    try:
        state, _ = read_tensors(path)
    except Refused as error:
        raise EmbeddingError(f"{path} {error}") from None
    except OSError as error:
        raise EmbeddingError(f"{path} cannot be read: {error.strerror or error}") from error
    network = _inception(library, path, state).to(device)

    def run(images: Tensor) -> Tensor:
        parts = [network(part.to(device))[0] for part in images.split(16)]
        return torch.cat([part.flatten(1) for part in parts])

    return Embedding("inception", "Inception features", f"{path.name}, by torch-fidelity", run)


def _inception(library: Any, path: Path, state: Any) -> Any:
    """The library's network. It unpickles the file that it is given, so it is given a new one of tensors alone."""
    with tempfile.TemporaryDirectory() as folder:
        clean = Path(folder) / "weights.pth"
        torch.save(state, clean)
        try:
            network = library.FeatureExtractorInceptionV3(
                "inception-v3-compat", [_INCEPTION_FEATURES], feature_extractor_weights_path=str(clean)
            )
        except (RuntimeError, TypeError, AttributeError, KeyError) as error:
            first = str(error).split("\n")[0]
            raise EmbeddingError(
                f"{path} does not hold the weights of torch-fidelity's Inception network: {first}"
            ) from error
    return network.eval()


def _downloaded(url: str) -> Path:
    """The library's weights in torch's cache, downloaded if they are not there."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=_INCEPTION_HASH, progress=False)
        except (OSError, RuntimeError) as error:
            raise EmbeddingError(
                f"the weights cannot be downloaded from {url}: {error}; give a copy of them by --inception-weights FILE"
            ) from error
    return path
