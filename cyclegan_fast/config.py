"""Typed configuration: frozen dataclasses filled from YAML files and ``section.field=value`` overrides.

Every field carries its documentation, unit and allowed values as metadata, so that the error messages, the
``cyclegan-fast train --help-config`` listing and ``docs/config.md`` all come from one place. This module imports
neither torch nor any sibling but the base of the errors: a configuration can be read, checked and printed anywhere.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import reprlib
import stat
import types
import typing
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cyclegan_fast.errors import InputError

__all__ = [
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "DistributedConfig",
    "LossConfig",
    "ModelConfig",
    "MonitorConfig",
    "TrainingConfig",
    "describe",
    "from_dict",
    "load_config",
    "reference_page",
    "to_dict",
    "to_yaml",
    "upgraded",
]

# Limits of a configuration file. The longest that this version can write has 4 kB and three levels.
_FILE_BYTES = 100_000
_DEPTH = 16

# Settings of earlier versions, and what to write instead.
_RENAMED = {
    "training.compile": "training.mode=compile for true, training.mode=eager (the default) for false",
}


class ConfigError(InputError):
    """A configuration that cannot be used; the message names the field, the value and what is allowed."""


def _option(
    default: Any,
    doc: str,
    *,
    choices: Sequence[Any] | None = None,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
) -> Any:
    """A dataclass field with its documentation and its allowed values (``low <= v <= high``, ``above < v``)."""
    metadata = {"doc": doc, "choices": choices, "low": low, "high": high, "above": above}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class DataConfig:
    """Pictures on disk to batches on the device."""

    source: str = _option(
        "folder",
        "where pictures come from: `folder` reads data.root; `side_by_side` reads pictures there that hold one of A in "
        "their left half and its partner of B in the right, in folders train and, if there is one, test or val; "
        "`synthetic` renders flowers once and then reads them",
        choices=("folder", "side_by_side", "synthetic"),
    )
    root: str = _option(
        "datasets/iphone2dslr_flower",
        "folder that holds trainA, trainB and, if there are any, testA and testB; with source `synthetic`, where the "
        "rendered pictures are kept",
    )
    synthetic_train: int = _option(200, "synthetic only: training pictures a domain, count", low=1, high=1_000_000)
    synthetic_test: int = _option(24, "synthetic only: test pictures a domain, count", low=1, high=1_000_000)
    synthetic_size: int = _option(128, "synthetic only: side of the square pictures, pixels", low=16, high=4096)
    synthetic_seed: int = _option(0, "synthetic only: seed of the scenes", low=0, high=2**63 - 1)
    synthetic_styles: int = _option(
        1,
        "synthetic only: colour grades of domain B, count; each of its pictures has one of them, which domain A does "
        "not tell: for many-to-many translation",
        low=1,
        high=64,
    )
    limit_train: int | None = _option(
        None, "use a random subset of this many training pictures a domain, chosen by `seed`; null for all", low=1
    )
    limit_test: int | None = _option(None, "the same for the test pictures", low=1)
    unreadable: str = _option(
        "refuse",
        "what the scan before training does about files it cannot use: `refuse` to start, or `skip` them, by name",
        choices=("refuse", "skip"),
    )
    preprocess: str = _option(
        "resize_and_crop",
        "how a picture becomes a training sample. resize_and_crop: load_size x load_size, then a random crop; crop: a "
        "random crop of the original; scale_width: width to load_size; scale_width_and_crop: that, then a random "
        "crop; scale_shortside: short side to load_size; none: as it is",
        choices=("resize_and_crop", "crop", "scale_width", "scale_width_and_crop", "scale_shortside", "none"),
    )
    load_size: int = _option(286, "size that pictures are resized to, pixels (see preprocess)", low=8, high=16384)
    crop_size: int = _option(256, "side of the square random crop, pixels (see preprocess)", low=8, high=16384)
    flip: bool = _option(True, "mirror each picture left-right with probability 1/2")
    resample: str = _option(
        "bicubic",
        "resize filter: antialiased `bicubic` or `bilinear`; `bilinear_tf` is plain bilinear interpolation without "
        "antialiasing, as the Keras example resizes",
        choices=("bicubic", "bilinear", "bilinear_tf"),
    )
    pairing: str = _option(
        "unpaired",
        "unpaired: an epoch visits the larger set once, in shuffled order, A modulo its size and B drawn with "
        "replacement; ordered: the i-th of A with the i-th of B (modulo), shuffled together; zip: two shuffles side "
        "by side, as long as the smaller set (the Keras example); aligned: each of A with the picture of B of the same "
        "name (whatever its suffix), cropped and mirrored alike, as pix2pix needs them; with source `synthetic`, both "
        "cameras see the same scenes",
        choices=("unpaired", "ordered", "zip", "aligned"),
    )
    frozen_augmentation: bool = _option(
        False, "draw each picture's crop and flip once and keep it for all epochs (the Keras example caches them)"
    )
    cache: str | None = _option(
        None,
        "folder for the decoded uint8 stores; null: $CYCLEGAN_FAST_CACHE, else the user's cache folder",
    )
    resident: str = _option(
        "auto",
        "keep the store in the device's memory: `auto` when it takes less than a quarter of what is free; `never` "
        "streams batches from the memory-mapped store",
        choices=("auto", "always", "never"),
    )
    workers: int = _option(0, "processes that decode pictures into the store; 0: one a core", low=0, high=1024)


@dataclass(frozen=True)
class ModelConfig:
    """What is learned, and the networks that learn it."""

    method: str = _option(
        "cyclegan",
        "`cyclegan`: both directions from unpaired pictures; `pix2pix`: one direction from aligned pairs; `augmented`: "
        "both directions from unpaired pictures, each translation chosen by a random latent code (Augmented CycleGAN)",
        choices=("cyclegan", "pix2pix", "augmented"),
    )
    direction: str = _option("AtoB", "pix2pix only: which way it translates", choices=("AtoB", "BtoA"))
    latent: int = _option(8, "augmented only: numbers in the latent code of a picture, count", low=1, high=1024)
    preset: str = _option(
        "original",
        "`original`: the de-facto PyTorch networks; `keras`: those of the Keras example, which differ in biases, "
        "affine norms, paddings and initialisation",
        choices=("original", "keras"),
    )
    generator: str = _option(
        "resnet",
        "`resnet`: the paper's, with residual blocks; `unet_N`: a U-Net that halves the picture until N pixels are one "
        "position, 256 or 128 in pix2pix; a picture whose sides are no multiples of N is extended, and cut again",
        choices=("resnet", *(f"unet_{2**downs}" for downs in range(5, 11))),
    )
    affine: bool = _option(
        False,
        "norms with a scale and a shift for each channel, and no biases before them; `keras` has them in any case. One "
        "pair at a time, that is what the de-facto `--norm batch` computes",
    )
    gamma: float | None = _option(
        None,
        "affine norms only: mean of the scales that training begins with; null: 1, and 0 with `keras`, as its example "
        "draws them (docs/quality.md)",
        low=0,
    )
    channels_A: int = _option(3, "channels of domain A: 1 gray, 2 gray + alpha, 3 RGB, 4 RGB + alpha", low=1, high=4)
    channels_B: int = _option(3, "channels of domain B, likewise", low=1, high=4)
    blocks: int = _option(
        9, "resnet only: residual blocks of a generator, count (de facto: 9, or 6 for small pictures)", low=1, high=1000
    )
    ngf: int = _option(64, "filters of a generator's first convolution, count", low=1, high=4096)
    ndf: int = _option(64, "filters of a discriminator's first convolution, count", low=1, high=4096)
    upsample: str = _option(
        "transposed",
        "how a generator doubles the sides: `transposed` convolutions, as the de-facto networks, or nearest-neighbour "
        "`resize` and a convolution, which begins without checkerboards (docs/options.md)",
        choices=("transposed", "resize"),
    )
    dropout: bool = _option(
        False, "dropout 0.5 inside the residual blocks, or behind the upward steps of a U-Net that are 8 ngf wide"
    )
    discriminator: str = _option(
        "patch", "`patch`: PatchGAN, 70x70 with 3 layers; `pixel`: 1x1 convolutions only", choices=("patch", "pixel")
    )
    discriminator_layers: int = _option(3, "stride-2 layers of the patch discriminator, count", low=1, high=8)
    spectral_norm: bool = _option(
        False,
        "the discriminators' weights divided by their largest singular value, by one power iteration a step "
        "(docs/options.md)",
    )
    init_gain: float = _option(0.02, "standard deviation of the normal initialisation of the weights", above=0)
    init_from: str | None = _option(
        None,
        "a new run starts from these weights instead: a run folder, a checkpoint, or a `.pth` or `.safetensors` file, "
        "or folder of these, of the de-facto implementation. Networks that it lacks are initialised as usual",
    )


@dataclass(frozen=True)
class LossConfig:
    """What the networks minimise."""

    gan: str = _option(
        "lsgan",
        "adversarial loss: least squares, binary cross-entropy on logits, hinge, or Wasserstein with gradient penalty",
        choices=("lsgan", "vanilla", "hinge", "wgangp"),
    )
    cycle_A: float = _option(10.0, "weight of the cycle loss A -> B -> A (pix2pix has none)", low=0)
    cycle_B: float = _option(10.0, "weight of the cycle loss B -> A -> B (pix2pix has none)", low=0)
    identity: float = _option(
        0.5,
        "cyclegan only: identity loss relative to the cycle weights; 0 leaves out its two generator passes",
        low=0,
    )
    l1: float = _option(100.0, "pix2pix only: weight of the L1 distance from the true picture", low=0)
    latent: float = _option(
        1.0,
        "augmented only: weight of the cycle loss of the codes, the L1 distance after code -> picture -> code",
        low=0,
    )
    gradient_penalty: float = _option(10.0, "wgangp only: weight of the gradient penalty", low=0)
    generator_gradient: str = _option(
        "joint",
        "`joint`: both generators get the gradient of the whole sum; `own`: each gets that of its own losses only, "
        "so the first generator of a cycle gets none from it (the Keras example)",
        choices=("joint", "own"),
    )


@dataclass(frozen=True)
class TrainingConfig:
    """The optimisation and how it is executed."""

    epochs: int = _option(100, "epochs at the full learning rate", low=0, high=10**9)
    epochs_decay: int = _option(
        100, "further epochs in which the learning rate falls linearly towards 0", low=0, high=10**9
    )
    steps: int | None = _option(None, "stop after this many optimiser steps, if that comes before the epochs", low=1)
    batch: int = _option(1, "pairs in one forward pass of one process, count", low=1, high=65536)
    accumulate: int = _option(
        1, "forward passes whose gradients are averaged into one optimiser step, count", low=1, high=65536
    )
    global_batch: int | None = _option(
        None,
        "pairs in one optimiser step of all processes together, count: whatever the number of processes, each takes "
        "its equal share, in passes of at most training.batch pairs, and training.accumulate follows and stays 1 here; "
        "null: batch x accumulate x processes",
        low=1,
        high=2**31,
    )
    lr: float = _option(2e-4, "learning rate of all four networks", above=0)
    lr_scaling: str = _option(
        "none",
        "what multiplies training.lr where a step has more than one pair (batch x accumulate x processes): nothing, "
        "their number (`linear`), or its square root (`sqrt`). Quality is compared at equal updates: no recipe sets it",
        choices=("none", "linear", "sqrt"),
    )
    beta1: float = _option(0.5, "Adam's decay of the first moment", low=0, high=0.999999)
    beta2: float = _option(0.999, "Adam's decay of the second moment", low=0, high=0.999999)
    adam_eps: float = _option(1e-8, "Adam's epsilon", above=0)
    ema: float = _option(
        0.0,
        "keep averages of the generators' weights, whose decay a step this is, 0.999 say, and use them for samples, "
        "`best` and translation; they change nothing in training. 0: none",
        low=0,
        high=0.999999,
    )
    patience: int = _option(
        0,
        "end the run when so many measurements in a row (monitor.metrics_every, or with each checkpoint) have not "
        "improved on the best of checkpoint.best: it ends as a complete one does, and goes on when it is resumed with "
        "a larger patience, or 0. 0: never",
        low=0,
        high=10**9,
    )
    pool_size: int = _option(
        50, "generated pictures kept a domain for the discriminators; 0: none", low=0, high=1_000_000
    )
    precision: str = _option(
        "auto",
        "fp32; tf32 (CUDA only); bf16 or fp16 autocast with fp32 weights, statistics and losses (fp16 CUDA only, with "
        "a loss scaler); auto: bf16 where the hardware multiplies in it, else fp16 on CUDA, else fp32",
        choices=("auto", "fp32", "tf32", "bf16", "fp16"),
    )
    channels_last: bool = _option(True, "keep weights and activations in NHWC memory order")
    mode: str = _option(
        "eager",
        "how a step is executed: `eager`, operation by operation; `compile`, the networks through torch.compile; "
        "`graph`, the whole step recorded once as a CUDA graph and replayed, which relieves the host (on a CPU, and "
        "for pictures of several sizes, a graph is not possible and the step runs eagerly)",
        choices=("eager", "compile", "graph"),
    )
    impl: str = _option(
        "auto",
        "the networks by `fused` operations, as plain PyTorch (`reference`), or `auto`: fused where the operations "
        "have kernels. The weights are the same",
        choices=("auto", "fused", "reference"),
    )
    recompute: bool = _option(
        False, "compute residual blocks again in the backward pass instead of keeping them: less memory, 28 % more work"
    )
    streams: int = _option(
        1,
        "CUDA streams of a step, count; 2: what G_B computes runs beside what G_A computes (CUDA only)",
        choices=(1, 2),
    )
    deterministic: bool = _option(False, "deterministic algorithms only (slower on CUDA; the CPU always is)")
    device: str = _option("auto", "auto (CUDA when there is one), cpu, cuda or cuda:N")
    threads: int = _option(
        0, "CPU threads of one process; 0: all cores, shared among the processes of a host", low=0, high=1024
    )
    timeout: float = _option(
        600.0,
        "several processes: seconds that one may keep the others waiting, in a step, an evaluation or a checkpoint's "
        "writing, before the run ends with a message that names it. Reading the data set is not limited",
        low=1,
        high=86400,
    )


@dataclass(frozen=True)
class DistributedConfig:
    """How several processes work together; without effect on a single one."""

    bucket_mb: float = _option(
        25.0,
        "gradients travel in buckets of at most this many 1e6 bytes, each as soon as the backward pass has filled it",
        above=0,
    )
    compression: str = _option(
        "none",
        "`bf16`: gradients travel as bf16, half the bytes, and are summed in it, with an error of up to 2**-8 of their "
        "size for each process; the mean is taken in fp32",
        choices=("none", "bf16"),
    )
    check_every: int = _option(
        200,
        "steps between checks that all processes hold the same weights, optimisers and pools to the bit, and once more "
        "at the end of the run; 0: only at the start",
        low=0,
    )


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept of a run, and how often."""

    every_epochs: float = _option(
        1.0, "write a checkpoint each time this many epochs have passed (fractions too); 0: only at the end", low=0
    )
    every_minutes: float = _option(
        15.0, "and at the latest this many minutes after the last one; 0: no such limit", low=0
    )
    keep: int = _option(2, "number of the latest checkpoints kept", low=1)
    milestones: tuple[int, ...] = _option((), "epochs whose checkpoint is kept for good")
    best: str = _option(
        "cycle",
        "measure by which a `best` checkpoint is kept, on fixed test pictures: `cycle` (L1 of A -> B -> A and "
        "B -> A -> B; with pix2pix, which has no cycle, L1 from the true picture), `generator` (the generators' whole "
        "loss), `swd` (sliced Wasserstein distance from the real pictures), `swd_colour` (the same, and sees a colour "
        "cast), `psnr` or `ssim` (against the truth, where it is known), the last four as means of the directions, or "
        "`none`",
        choices=("cycle", "generator", "swd", "swd_colour", "psnr", "ssim", "none"),
    )


@dataclass(frozen=True)
class MonitorConfig:
    """What is reported while a run goes on."""

    log_every: int = _option(
        50, "steps between readings of the losses, which synchronise host and device", low=1, high=50_000
    )
    images_every: float = _option(1.0, "epochs between image grids (fractions too); 0: none", low=0)
    samples: int = _option(
        4, "fixed test pictures a domain in the grids and the measures `cycle` and `generator`, count", low=1, high=64
    )
    metrics_every: int = _option(
        0,
        "steps between measurements of the fixed test pictures, of which a new best is saved at once. They come with "
        "each checkpoint by epochs, by milestones and at the end in any case; 0: only then",
        low=0,
        high=10**9,
    )
    metrics_samples: int = _option(
        16,
        "fixed test pictures a domain (of training, without test folders) whose translations are measured: SWD from "
        "the real pictures, and PSNR and SSIM where the truth is known (aligned pairs; folders truthB, with pictures "
        "named as in testA, and truthA), count; 0: none",
        low=0,
        high=4096,
    )
    tensorboard: bool = _option(True, "write TensorBoard events beside the JSON lines")
    progress: bool = _option(True, "show a progress bar")


@dataclass(frozen=True)
class Config:
    """One training run, completely."""

    name: str = _option("experiment", "name of the run: its folder below `out`")
    out: str = _option("runs", "folder that holds the runs")
    seed: int = _option(0, "seed of everything random in the run", low=0, high=2**63 - 1)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)

    @property
    def run_dir(self) -> Path:
        """Folder of the run."""
        return Path(self.out) / self.name


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply ``key.sub=value`` overrides, in order; values are parsed as YAML.

    Raises ConfigError naming file or override, field, value and what is allowed.
    """
    tree: dict[str, Any] = {}
    where = "configuration"
    if path is not None:
        where = str(path)
        tree = _read_yaml(Path(path))
    for override in overrides:
        _apply_override(tree, override)
    try:
        return from_dict(tree)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def from_dict(tree: Mapping[str, Any]) -> Config:
    """Build a checked Config from nested mappings; missing fields take their defaults."""
    config: Config = _build(Config, tree, prefix="")
    _check_together(config)
    return config


def upgraded(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of a configuration that an earlier version saved, in today's settings; the tree itself stays."""
    training = tree.get("training", {})
    if not isinstance(training, Mapping):  # from_dict will say so
        return dict(tree)
    training = dict(training)
    if "compile" in training:
        compiled = training.pop("compile")
        training.setdefault("mode", "compile" if compiled else "eager")
    return {**tree, "training": training}


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain values, ready for YAML, JSON or a checkpoint; ``from_dict`` reads them back."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return list(value) if isinstance(value, tuple) else value

    result: dict[str, Any] = plain(dataclasses.asdict(config))
    return result


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML text, in the order of the dataclasses."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def describe() -> Iterator[tuple[str, str, Any, str]]:
    """Yield (dotted name, allowed values, default, documentation) for every field, in order."""

    def walk(cls: type, prefix: str) -> Iterator[tuple[str, str, Any, str]]:
        hints = typing.get_type_hints(cls)
        for item in dataclasses.fields(cls):
            hint = hints[item.name]
            if dataclasses.is_dataclass(hint):
                yield from walk(typing.cast(type, hint), f"{prefix}{item.name}.")
            else:
                yield prefix + item.name, _allowed(item, hint), item.default, item.metadata["doc"]

    return walk(Config, "")


def reference_page() -> str:
    """Every setting with its default, allowed values and meaning, as the Markdown of ``docs/config.md``."""
    lines = [
        "# Settings",
        "",
        "A YAML file given to `--config`, and `section.field=value` on the command line. `cyclegan-fast train "
        "--help-config` prints this page.",
    ]
    section = None
    for name, allowed, default, doc in describe():
        head = name.rpartition(".")[0] or "top level"
        if head != section:
            section = head
            lines += ["", f"## {section}", ""]
        shown = yaml.safe_dump(list(default) if isinstance(default, tuple) else default, default_flow_style=True)
        lines.append(f"* `{name}` = `{shown.splitlines()[0]}` ({allowed}): {doc}")
    return "\n".join(lines) + "\n"


class _Loader(yaml.SafeLoader):
    """YAML's plain values, without what a settings file needs for nothing but harm.

    Aliases, of which a few lines unfold to billions of values; depth, which ends in a RecursionError; and a field given
    twice, of which YAML takes the last without a word.
    """

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or self.depth >= _DEPTH:
            what = "aliases are not read" if self.depth < _DEPTH else f"more than {_DEPTH} levels are not read"
            raise yaml.composer.ComposerError(None, None, what, event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, "merge keys are not read", key_node.start_mark)
            if isinstance(key_node, yaml.ScalarNode) and key_node.value in seen:
                what = f"the field {key_node.value:.99} is given twice"
                raise yaml.constructor.ConstructorError(None, None, what, key_node.start_mark)
            seen.add(key_node.value if isinstance(key_node, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)


def _parsed(text: str) -> Any:
    """The value that YAML text stands for. Raises yaml.YAMLError."""
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a subclass of SafeLoader
    except (ValueError, OverflowError) as error:  # a thirteenth month, a number of a million digits
        raise yaml.YAMLError(str(error)[:200]) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            what = "it is a folder" if stat.S_ISDIR(status.st_mode) else "it is not a regular file"
            raise ConfigError(f"cannot read the configuration {path}: {what}")
        if status.st_size > _FILE_BYTES:
            raise ConfigError(f"{path} has {status.st_size} bytes; a configuration has at most {_FILE_BYTES}")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not a text file in UTF-8; a YAML configuration is needed") from None
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"cannot read the configuration {path}: {error}") from None  # a zero byte in its name
    try:
        tree = _parsed(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold `field: value` lines, but holds a {type(tree).__name__}")
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r} is not of the form section.field=value")
    try:
        value = _parsed(text)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: the value is not valid YAML") from None
    *sections, name = key.strip().split(".")
    node = tree
    for depth, section in enumerate(sections):
        child = node.setdefault(section, {})
        if not isinstance(child, dict):
            inside = ".".join(sections[: depth + 1])
            raise ConfigError(f"override {override!r}: {inside} is a value, not a section")
        node = child
    node[name] = value


def _build(cls: type, tree: Any, prefix: str) -> Any:
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{prefix.rstrip('.')} is a section of fields, but was given {_words(tree)}")
    hints = typing.get_type_hints(cls)
    fields = {item.name: item for item in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for name, value in tree.items():
        if f"{prefix}{name}" in _RENAMED:
            raise ConfigError(f"{prefix}{name} is no setting any more: write {_RENAMED[prefix + name]}")
        if name not in fields:
            raise ConfigError(_unknown(f"{prefix}{name}"))
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            values[name] = _build(typing.cast(type, hint), {} if value is None else value, f"{prefix}{name}.")
        else:
            values[name] = _checked(value, fields[name], hint, prefix + name)
    return cls(**values)


def _unknown(dotted: str) -> str:
    """The message for an unknown field: the nearest name in its own section, else the nearest anywhere."""
    dotted = _words(dotted)[1:-1]
    known = [name for name, *_ in describe()]
    sections = sorted({name.partition(".")[0] for name in known})
    section, _, last = dotted.rpartition(".")
    siblings = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == section}
    anywhere = {name.rpartition(".")[2]: name for name in known} | {name: name for name in sections}
    for names, cutoff in ((siblings, 0.5), (anywhere, 0.6), (siblings or anywhere, 0.0)):
        if nearest := difflib.get_close_matches(last, list(names), n=1, cutoff=cutoff):
            break
    return f"unknown field {dotted}: did you mean {names[nearest[0]]}?"


def _checked(value: Any, item: dataclasses.Field[Any], hint: Any, name: str) -> Any:
    try:
        value = _coerce(value, hint)
    except (TypeError, ValueError, OverflowError):  # the last for an integer beyond every float
        raise ConfigError(f"{name} = {_words(value)} is not allowed: {_allowed(item, hint)}") from None
    meta = item.metadata
    if value is None:
        return None
    wrong = (
        (meta["choices"] is not None and value not in meta["choices"])
        or (isinstance(value, float) and not math.isfinite(value))
        or (meta["low"] is not None and value < meta["low"])
        or (meta["high"] is not None and value > meta["high"])
        or (meta["above"] is not None and value <= meta["above"])
    )
    if wrong:
        raise ConfigError(f"{name} = {_words(value)} is not allowed: {_allowed(item, hint)}")
    return value


def _coerce(value: Any, hint: Any) -> Any:
    """Value as the annotated type, or TypeError / ValueError. YAML 1.1 reads `2e-4` as text: numbers may be text."""
    if isinstance(hint, types.UnionType):
        return None if value is None else _coerce(value, next(a for a in hint.__args__ if a is not type(None)))
    if typing.get_origin(hint) is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_coerce(item, hint.__args__[0]) for item in items)
    if hint is bool:
        if isinstance(value, bool):
            return value
        raise TypeError
    if hint is int:
        if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
            raise TypeError
        return int(value)
    if hint is float:
        if isinstance(value, bool):
            raise TypeError
        return float(value)
    if isinstance(value, (str, int, float)) and not isinstance(value, bool) and "\0" not in str(value):
        return str(value)
    raise TypeError  # a zero byte cannot be part of a path either


def _words(value: Any) -> str:
    """A value as Python writes it, cut to what a message can hold."""
    shortener = reprlib.Repr()
    shortener.maxstring = shortener.maxother = shortener.maxlong = 120
    try:
        return shortener.repr(value)
    except ValueError:  # an integer of more digits than Python writes
        return f"a {type(value).__name__} too long to write"


def _allowed(item: dataclasses.Field[Any], hint: Any) -> str:
    """What a field accepts, in words."""
    meta = item.metadata
    optional = isinstance(hint, types.UnionType)
    base = next(a for a in hint.__args__ if a is not type(None)) if optional else hint
    words = {bool: "true or false", int: "an integer", float: "a number", str: "text"}.get(base, "a list of integers")
    if meta["choices"] is not None:
        words = "one of " + ", ".join(str(choice) for choice in meta["choices"])
    if meta["low"] is not None and meta["high"] is not None:
        words += f" from {meta['low']} to {meta['high']}"
    elif meta["low"] is not None:
        words += f" >= {meta['low']}"
    elif meta["above"] is not None:
        words += f" > {meta['above']}"
    return words + (" or null" if optional else "")


def _check_together(config: Config) -> None:
    """Refuse combinations that no single field can refuse."""
    data, model, training = config.data, config.model, config.training
    if data.preprocess in ("resize_and_crop", "scale_width_and_crop") and data.crop_size > data.load_size:
        raise ConfigError(
            f"data.crop_size = {data.crop_size} is larger than data.load_size = {data.load_size}, "
            f"which preprocess {data.preprocess} crops from: lower crop_size or raise load_size"
        )
    if training.epochs + training.epochs_decay == 0:
        raise ConfigError("training.epochs and training.epochs_decay are both 0: at least one epoch is needed")
    if training.global_batch is not None and training.accumulate != 1:
        raise ConfigError(
            f"training.accumulate = {training.accumulate} and training.global_batch = {training.global_batch}: the "
            "accumulation follows from the global batch, leave it at 1"
        )
    _check_method(config)
    _check_measures(config)
    if model.method == "cyclegan" and config.loss.identity > 0 and model.channels_A != model.channels_B:
        raise ConfigError(
            f"loss.identity = {config.loss.identity} needs equal channels, but model.channels_A = {model.channels_A} "
            f"and model.channels_B = {model.channels_B}: set loss.identity=0"
        )
    _check_generator(config)
    parts = Path(config.name).parts
    if len(parts) != 1 or parts[0] in (".", "..") or Path(config.name).is_absolute():
        raise ConfigError(f"name = {config.name!r} is not allowed: one folder name, without `/` or `..`")
    if any(epoch < 1 for epoch in config.checkpoint.milestones):
        raise ConfigError(f"checkpoint.milestones = {list(config.checkpoint.milestones)}: epochs count from 1")


def _check_measures(config: Config) -> None:
    """Refuse a best and an end by what is never measured."""
    best, patience, monitor = config.checkpoint.best, config.training.patience, config.monitor
    if best in ("swd", "swd_colour", "psnr", "ssim") and not monitor.metrics_samples:
        raise ConfigError(f"checkpoint.best = {best!r} needs pictures to measure: set monitor.metrics_samples above 0")
    if patience and best == "none":
        raise ConfigError(f"training.patience = {patience} needs a measure that improves: set checkpoint.best")
    if patience and not (monitor.metrics_every or config.checkpoint.every_epochs or config.checkpoint.milestones):
        raise ConfigError(
            f"training.patience = {patience} counts measurements, of which there are none before the end: set "
            "monitor.metrics_every or checkpoint.every_epochs"
        )


def _check_generator(config: Config) -> None:
    """Refuse settings that a U-Net, or networks without affine norms, do not have."""
    model = config.model
    if model.gamma is not None and (model.method == "augmented" or not (model.affine or model.preset == "keras")):
        raise ConfigError(
            f"model.gamma = {model.gamma} needs affine norms: set model.affine=true or model.preset=keras, with "
            "model.method=cyclegan or pix2pix"
        )
    if model.generator == "resnet":
        return
    for name, value, only in (
        ("model.preset", model.preset, "original"),
        ("model.upsample", model.upsample, "transposed"),
        ("model.gamma", model.gamma, None),
        ("training.recompute", config.training.recompute, False),
    ):
        if value != only:
            raise ConfigError(
                f"{name} = {value!r} is not possible with model.generator={model.generator}: leave it out"
            )
    if model.method == "augmented":
        raise ConfigError(
            f"model.generator = {model.generator!r} is not possible with model.method=augmented: use resnet"
        )


def _check_method(config: Config) -> None:
    """Refuse what a method of training cannot do."""
    data, model, training = config.data, config.model, config.training
    if model.method == "pix2pix" and data.pairing != "aligned":
        raise ConfigError(f"data.pairing = {data.pairing!r}: model.method=pix2pix needs data.pairing=aligned")
    if data.source == "side_by_side" and data.pairing != "aligned":
        raise ConfigError(f"data.pairing = {data.pairing!r}: data.source=side_by_side needs data.pairing=aligned")
    if model.method == "augmented":
        for name, value, plain in (
            ("training.mode", training.mode, "compile"),
            ("training.recompute", training.recompute, True),
            ("loss.generator_gradient", config.loss.generator_gradient, "own"),
        ):
            if value == plain:
                raise ConfigError(f"{name} = {value!r} is not possible with model.method=augmented: leave it out")
    if model.method == "pix2pix" and config.loss.generator_gradient == "own":
        raise ConfigError(
            "loss.generator_gradient = 'own' is about cycles, of which model.method=pix2pix has none: leave it out"
        )
