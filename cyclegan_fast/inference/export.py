"""A trained generator as a file that runs without this package: ONNX, a program of `torch.export`, or ExecuTorch.

What is written is the reference execution, plain operators only, with any batch and any size of at least 8 x 8 pixels:
extending a picture to what the network can halve, and cropping the result, are part of the graph. An ExecuTorch
program, for phones, takes single pictures of one size, chosen when it is written, which must need no extending.
Statistics of the norms stay float32 in a float16 graph, as in training.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental import _config

from cyclegan_fast.atomic import replacing
from cyclegan_fast.errors import InputError
from cyclegan_fast.inference.translate import Translator
from cyclegan_fast.models.reference import InstanceNorm, ReflectionPad2d
from cyclegan_fast.version import __version__

__all__ = ["FORMATS", "OPSET", "PRECISIONS", "Exported", "export", "read_metadata"]

logger = logging.getLogger("cyclegan_fast.export")

FORMATS = ("onnx", "pt2", "pte")
PRECISIONS = ("fp32", "fp16")
OPSET = 18
MINIMUM = 8  # pixels a side, of what the graph takes
SIDE = 256  # pixels a side of what an ExecuTorch program takes, unless another size is asked for

_METADATA_FILE = "cyclegan_fast.json"  # inside a .pt2 archive
_METADATA_METHOD = "cyclegan_fast"  # of a .pte program: returns the same text
_MULTIPLE = 4  # of a side, where a generator says nothing else
# (batch, height, width) that the file is compared at: multiples of 4, odd sizes, and one side below the other's half.
_CHECKED = ((1, 64, 64), (2, 45, 70), (1, 33, 97))
# Largest and mean error in [-1, 1], where a level of 8 bits is 2 / 255. fp32: rounding in another order, an eighth of a
# level. fp16: 11 bits a value through some thirty layers, a level on average; random full-size networks reach 0.03.
_TOLERANCE = {"fp32": (1e-3, 1e-4), "fp16": (0.1, 2 / 255)}


class ExportError(InputError):
    """A model that cannot be exported as asked, or whose file does not compute what the model does."""


@dataclass(frozen=True)
class Exported:
    """A written file: its size in bytes, and for each (batch, height, width) it was run at, the largest error.

    Errors are in [-1, 1], or in levels of 255 with ``uint8``; empty when the file was not checked.
    """

    path: Path
    size: int
    errors: dict[tuple[int, int, int], float]


def export(
    translator: Translator,
    path: str | Path,
    *,
    direction: str = "AtoB",
    format: str | None = None,  # noqa: A002 - the word users know
    precision: str = "fp32",
    uint8: bool = False,
    size: tuple[int, int] | None = None,
    check: bool | None = None,
    source: str = "",
) -> Exported:
    """Write one direction's generator to a file, which appears whole and, if it was checked, computing the same.

    ``format``: ``onnx`` (opset OPSET; made by PyTorch's exporter, without TorchScript), ``pt2`` (a program of
    ``torch.export``) or ``pte`` (ExecuTorch, with its XNNPACK backend); by default what the path's suffix says.
    ``precision``: weights and convolutions in fp32 or fp16.

    Input ``image`` and output ``translated``: float32 [N, C, H, W] in [-1, 1], for both precisions; with ``uint8``
    uint8 [N, H, W, C], so that an application needs no arithmetic. N >= 1, H and W >= 8; ``pte``: N = 1, and (H, W) =
    ``size``, multiples of what the generator halves, by default SIDE x SIDE. The file says so itself, with the
    direction, the package's version, ``source`` and a digest of the weights: see ``read_metadata``.

    ``check``: run the file at several sizes and batches and compare it with the generator; by default, if what runs it
    is installed. Raises ExportError for a wrong argument, a missing package, a file that cannot be written and one
    that computes something else (which is not kept).
    """
    path = Path(path)
    file_format = _format(path, format)
    channels = translator.channels(direction)
    if precision not in PRECISIONS:
        raise ExportError(f"precision {precision!r} is not one of {', '.join(PRECISIONS)}")
    check = _checkable(file_format, check)
    generator = _plain(translator.G_A if direction == "AtoB" else translator.G_B)
    fixed = _fixed_size(file_format, size, getattr(generator, "multiple", _MULTIPLE))
    facts = {
        **_description(channels, uint8, precision, fixed),
        "direction": direction,
        "producer": f"cyclegan_fast {__version__}, torch {torch.__version__}",
        "source": source,
        "weights_sha256": _digest(generator),
    }
    graph = _Graph(_for_graph(generator, precision, _REPLACED[file_format]), precision, uint8, extends=not fixed).eval()
    program = _program(graph, channels[0], uint8, fixed)
    write = {"onnx": _write_onnx, "pt2": _write_pt2, "pte": _write_pte}[file_format]
    run_of = {"onnx": _run_onnx, "pt2": _run_pt2, "pte": _run_pte}[file_format]
    sizes = ((1, *fixed),) if fixed else _CHECKED
    errors: dict[tuple[int, int, int], float] = {}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            write(program, temporary, facts)
            if check:
                errors = _compare(run_of(temporary), generator, sizes, channels[0], precision, uint8)
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error.strerror or error}") from error
    return Exported(path, path.stat().st_size, errors)


def read_metadata(path: str | Path) -> dict[str, str]:
    """What an exported file says about itself, as ``export`` describes. Raises ExportError for another file."""
    path = Path(path)
    try:
        file_format = _format(path, None)
        if file_format == "pt2":
            extra = {_METADATA_FILE: ""}
            torch.export.load(path, extra_files=extra)
            return {key: str(value) for key, value in json.loads(extra[_METADATA_FILE]).items()}
        if file_format == "pte":
            [text] = _pte_method(path, _METADATA_METHOD).execute([])
            return {key: str(value) for key, value in json.loads(text).items()}
        onnx = _needed("onnx")
        model = onnx.load(path, load_external_data=False)
        return {entry.key: entry.value for entry in model.metadata_props}
    except InputError:
        raise
    except Exception as error:  # of a parser of whatever kind
        raise ExportError(f"{path} is no exported model: {error}") from error


class _Graph(nn.Module):
    """What is exported: the network's layers between the conversions, the extension and the crop.

    Without ``extends`` it takes only what the layers take.
    """

    def __init__(self, generator: nn.Module, precision: str, uint8: bool, *, extends: bool = True) -> None:
        super().__init__()
        layers = getattr(generator, "model", None)
        if not isinstance(layers, nn.Module):
            raise ExportError(f"a {type(generator).__name__} has no layers called `model` to export")
        self.layers = layers
        self.multiple: int = getattr(generator, "multiple", _MULTIPLE)
        self.dtype = torch.float16 if precision == "fp16" else torch.float32
        self.uint8 = uint8
        self.extends = extends

    def forward(self, image: Tensor) -> Tensor:
        x = image.permute(0, 3, 1, 2).float() / 127.5 - 1 if self.uint8 else image
        height, width = x.shape[2], x.shape[3]
        if self.extends:
            x = _extended(_extended(x, 2, self.multiple), 3, self.multiple)
        y: Tensor = self.layers(x.to(self.dtype)).float()
        if self.extends:
            # A slice would depend on whether anything is cut off, which is not known yet.
            y = y.index_select(2, torch.arange(height, device=y.device))
            y = y.index_select(3, torch.arange(width, device=y.device))
        if not self.uint8:
            return y
        return ((y + 1) / 2 * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def _extended(x: Tensor, dim: int, multiple: int) -> Tensor:
    """x extended at the end of a dimension to a multiple, as the generators do it, for a size not known yet.

    By reflection, or by repeating the border where the picture is too small for that.
    """
    size = x.shape[dim]
    position = torch.arange((size + multiple - 1) // multiple * multiple, device=x.device)
    mirrored = 2 * size - 2 - position  # the smaller one of the two, beyond the last
    reflected, repeated = torch.minimum(position, mirrored), torch.clamp(position, max=size - 1)
    return x.index_select(dim, torch.where(mirrored.min() >= 0, reflected, repeated))


class _NativeNorm(nn.Module):
    """`InstanceNorm` as the one operator that ONNX has for it, always in float32."""

    def __init__(self, norm: InstanceNorm) -> None:
        super().__init__()
        self.eps = norm.eps
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        y = F.instance_norm(x.float(), None, None, self.weight, self.bias, use_input_stats=True, eps=self.eps)
        return y.to(x.dtype)


class _MeanNorm(nn.Module):
    """`InstanceNorm` by means alone, which converters of programs to other formats know, always in float32."""

    def __init__(self, norm: InstanceNorm) -> None:
        super().__init__()
        self.eps = norm.eps
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        deviation = x.float()
        deviation = deviation - deviation.mean((2, 3), keepdim=True)
        y = deviation * torch.rsqrt((deviation * deviation).mean((2, 3), keepdim=True) + self.eps)
        if self.weight is not None and self.bias is not None:
            y = y * self.weight[:, None, None] + self.bias[:, None, None]
        return y.to(x.dtype)


class _SlicedPad(nn.Module):
    """`ReflectionPad2d` from slices of one row or column, which XNNPACK has; by index it would run outside of it."""

    def __init__(self, pad: ReflectionPad2d) -> None:
        super().__init__()
        self.padding = pad.padding

    def forward(self, x: Tensor) -> Tensor:
        left, right, top, bottom = self.padding
        for dim, before, after in ((3, left, right), (2, top, bottom)):
            last = x.shape[dim] - 1
            first = [x.narrow(dim, place, 1) for place in range(before, 0, -1)]
            behind = [x.narrow(dim, last - place, 1) for place in range(1, after + 1)]
            if before + after > 4:  # with x more than the five tensors that XNNPACK joins at once
                first, behind = [torch.cat(first, dim)], [torch.cat(behind, dim)]
            x = torch.cat([*first, x, *behind], dim)
        return x


# What stands for a layer in the graph of each format.
_REPLACED: dict[str, dict[type[nn.Module], Callable[[Any], nn.Module]]] = {
    "onnx": {InstanceNorm: _NativeNorm},
    "pt2": {InstanceNorm: _MeanNorm},
    "pte": {InstanceNorm: _MeanNorm, ReflectionPad2d: _SlicedPad},
}


def _plain(generator: nn.Module) -> nn.Module:
    """A copy on the CPU, in float32, that runs as the reference does."""
    plain: Any = copy.deepcopy(generator).to(device="cpu", dtype=torch.float32)  # Any: impl is not every module's
    if hasattr(plain, "impl"):
        plain.impl = "reference"
    network: nn.Module = plain.to(memory_format=torch.contiguous_format).eval().requires_grad_(False)
    return network


def _for_graph(
    generator: nn.Module, precision: str, replaced: Mapping[type[nn.Module], Callable[[Any], nn.Module]]
) -> nn.Module:
    """A copy with the weights in the precision asked for, norms excepted, and layers replaced by the format's own."""
    network = copy.deepcopy(generator)
    if precision == "fp16":
        network = network.half()
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            for kind, other in replaced.items():
                if isinstance(child, kind):
                    setattr(parent, name, other(child.float()))
    return network


def _program(graph: _Graph, channels: int, uint8: bool, fixed: tuple[int, int] | None) -> torch.export.ExportedProgram:
    """The graph for one size, or any batch, height and width, without the trace's file names and lines."""
    sides = fixed or (2 * graph.multiple + 10, 3 * graph.multiple + 5)
    batch = 1 if fixed else 2
    example = torch.zeros(batch, *sides, channels, dtype=torch.uint8) if uint8 else torch.zeros(batch, channels, *sides)
    height, width = (1, 2) if uint8 else (2, 3)
    dim = torch.export.Dim
    free = {0: dim("batch", min=1), height: dim("height", min=MINIMUM), width: dim("width", min=MINIMUM)}
    shapes = None if fixed else {"image": free}
    # Oblivious: a single position, as at the bottom of a U-Net, is no case of its own.
    with _quiet(), torch.no_grad(), _config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        program = torch.export.export(graph, (example,), dynamic_shapes=shapes)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


def _write_onnx(program: torch.export.ExportedProgram, path: Path, facts: Mapping[str, str]) -> None:
    onnx = _needed("onnx")
    _needed("onnxscript")
    with _quiet():
        made = torch.onnx.export(
            program, dynamo=True, opset_version=OPSET, verbose=False, input_names=["image"], output_names=["translated"]
        )
    if made is None:
        raise ExportError("PyTorch's exporter gave no ONNX program")
    model = made.model_proto
    _name_dimensions(model.graph, "uint8" in facts["input"])
    # Left out of the file: every operator's place in the sources that it was traced from.
    for part in (model.graph, *model.graph.node, *model.graph.input, *model.graph.output, *model.graph.value_info):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    model.graph.ClearField("value_info")  # in terms of symbols that have just been renamed
    model.producer_name, model.producer_version = "cyclegan_fast", __version__
    model.doc_string = f"{facts['direction']}: {facts['input']} -> {facts['output']}"
    onnx.helper.set_model_props(model, dict(facts))
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())


def _write_pt2(program: torch.export.ExportedProgram, path: Path, facts: Mapping[str, str]) -> None:
    content = io.BytesIO()  # files must be called *.pt2, which an unfinished one is not
    torch.export.save(program, content, extra_files={_METADATA_FILE: json.dumps(facts, indent=1)})
    path.write_bytes(content.getbuffer())


def _write_pte(program: torch.export.ExportedProgram, path: Path, facts: Mapping[str, str]) -> None:
    with _quiet():
        partitioner = _needed("executorch.backends.xnnpack.partition.xnnpack_partitioner").XnnpackPartitioner()
        lowered = _needed("executorch.exir").to_edge_transform_and_lower(
            program, partitioner=[partitioner], constant_methods={_METADATA_METHOD: json.dumps(facts, indent=1)}
        )
        path.write_bytes(lowered.to_executorch().buffer)


def _name_dimensions(graph: Any, uint8: bool) -> None:
    """Words for the free dimensions of input and output."""
    names = {0: "batch", **({1: "height", 2: "width"} if uint8 else {2: "height", 3: "width"})}
    for value in (*graph.input, *graph.output):
        for place, name in names.items():
            value.type.tensor_type.shape.dim[place].dim_param = name


def _run_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    onnxruntime = _needed("onnxruntime")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda image: torch.from_numpy(session.run(None, {"image": image.numpy()})[0])


def _run_pt2(path: Path) -> Callable[[Tensor], Tensor]:
    module = torch.export.load(io.BytesIO(path.read_bytes())).module()

    def run(image: Tensor) -> Tensor:
        with torch.no_grad():
            y: Tensor = module(image)
        return y

    return run


def _run_pte(path: Path) -> Callable[[Tensor], Tensor]:
    method = _pte_method(path, "forward")
    return lambda image: method.execute([image])[0]


def _pte_method(path: Path, name: str) -> Any:
    with _quiet():
        runtime = _needed("executorch.runtime").Runtime.get()
    return runtime.load_program(str(path)).load_method(name)


def _compare(
    run: Callable[[Tensor], Tensor],
    generator: nn.Module,
    sizes: Sequence[tuple[int, int, int]],
    channels: int,
    precision: str,
    uint8: bool,
) -> dict[tuple[int, int, int], float]:
    """The largest error of the file at each size. Raises ExportError beyond the tolerance, or for another shape."""
    largest, mean = _TOLERANCE[precision]
    errors = {}
    for index, (batch, height, width) in enumerate(sizes):
        pixels = _sample(batch, channels, height, width, seed=index)
        with torch.no_grad():
            expected = generator(pixels.float() / 127.5 - 1)
        image = pixels.permute(0, 2, 3, 1).contiguous() if uint8 else pixels.float() / 127.5 - 1
        result = run(image)
        if uint8:
            result = result.permute(0, 3, 1, 2).float()
            expected = ((expected + 1) / 2 * 255).round().clamp(0, 255)
        if result.shape != expected.shape:
            raise ExportError(f"the exported model gives {list(result.shape)} instead of {list(expected.shape)}")
        error = (result - expected).abs()
        errors[batch, height, width] = float(error.max())
        scale = 255 / 2 if uint8 else 1.0
        # A value beside the limit between two levels may round to the other one.
        allowed = (largest * scale + 1, mean * scale + 0.02) if uint8 else (largest, mean)
        if not (float(error.max()) <= allowed[0] and float(error.mean()) <= allowed[1]):  # NaN fails too
            unit = "levels of 255" if uint8 else "of [-1, 1]"
            raise ExportError(
                f"the exported model differs from the model at {batch} x {width} x {height} by up to "
                f"{float(error.max()):.3g}, {float(error.mean()):.3g} on average, {unit}; at most {allowed[0]:.3g} and "
                f"{allowed[1]:.3g} are rounding" + ("; use precision fp32" if precision == "fp16" else "")
            )
    return errors


def _sample(batch: int, channels: int, height: int, width: int, seed: int) -> Tensor:
    """Pictures [N, C, H, W], uint8: large soft shapes and some grain, because photographs are no noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, channels, 5, 6, generator=generator)
    soft = F.interpolate(coarse, size=(height, width), mode="bicubic")
    grain = torch.rand(batch, channels, height, width, generator=generator) - 0.5
    return (255 * (soft + 0.1 * grain)).clamp(0, 255).to(torch.uint8)


def _description(
    channels: tuple[int, int], uint8: bool, precision: str, fixed: tuple[int, int] | None
) -> dict[str, str]:
    order = {1: "gray", 2: "gray, alpha", 3: "RGB", 4: "RGB, alpha"}

    def spoken(count: int) -> str:
        colours = order.get(count, f"{count} channels")
        if uint8:
            return f"uint8 [batch, height, width, {count}], 0 to 255, {colours}, sRGB"
        return f"float32 [batch, {count}, height, width], -1 to 1 (value / 127.5 - 1), {colours}, sRGB"

    sizes = f"any height and width from {MINIMUM} pixels; the output has the input's"
    if fixed:
        sizes = f"batch 1, height {fixed[0]}, width {fixed[1]}"
    return {"input": spoken(channels[0]), "output": spoken(channels[1]), "sizes": sizes, "precision": precision}


def _digest(network: nn.Module) -> str:
    """SHA-256 of the float32 weights in the order of their names."""
    digest = hashlib.sha256()
    for name, weight in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _format(path: Path, asked: str | None) -> str:
    name = path.suffix.lower().removeprefix(".") if asked is None else asked
    if name not in FORMATS:
        where = f"the suffix of {path}" if asked is None else f"format {asked!r}"
        raise ExportError(f"{where} is not one of {', '.join(FORMATS)}")
    return name


def _fixed_size(file_format: str, size: tuple[int, int] | None, multiple: int) -> tuple[int, int] | None:
    """(height, width) of the pictures that a file takes, None for any; refused where it cannot be."""
    if file_format != "pte":
        if size is not None:
            raise ExportError(f"a size is for the format pte; {file_format} takes pictures of any size")
        return None
    size = size or (SIDE, SIDE)
    if any(side < MINIMUM or side % multiple for side in size):
        raise ExportError(f"size {size[1]}x{size[0]}: sides must be multiples of {multiple}, from {MINIMUM} pixels")
    return size


def _checkable(file_format: str, check: bool | None) -> bool:
    """Whether to check, once it is known that everything needed is installed."""
    if file_format == "pte":
        _needed("executorch")  # which holds the runtime too
    if file_format != "onnx":
        return check is not False
    _needed("onnx")
    _needed("onnxscript")
    if check:
        _needed("onnxruntime")
    if check is None and importlib.util.find_spec("onnxruntime") is None:
        logger.warning("not checked: onnxruntime is not installed")
        return False
    return check is not False


def _needed(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        target, extra = ("ExecuTorch", package) if package == "executorch" else ("ONNX", "export")
        raise ExportError(f'exporting to {target} needs {package}: pip install "cyclegan_fast[{extra}]"') from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks about itself and about packages that are not used here."""
    exporter = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(level)
