"""The layout that DESIGN and CONTRIBUTING promise: import directions, public names, no global settings on import."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import cyclegan_fast

ROOT = Path(cyclegan_fast.__file__).parent
PACKAGE = "cyclegan_fast"
FILES = sorted(ROOT.rglob("*.py"))

# Modules of the package that each part may import; a prefix stands for all below it. What is not listed may be
# imported by entry points only.
ALLOWED = {
    "atomic": set(),
    "errors": set(),
    "tensor_file": set(),
    "options_file": {"config", "errors"},
    "version": set(),
    "config": {"errors"},
    "comparison": set(),
    "machine": set(),
    "progress": set(),
    "device": {"errors", "machine"},
    "distributed": {"heartbeat"},
    "heartbeat": set(),
    "data": {"atomic", "config", "errors", "distributed", "data", "machine", "ops", "progress"},
    "ops": {"ops", "version"},
    "models.reference": set(),
    "models": {"config", "models"},
    "models.fused": {"models", "ops"},
    "training.elastic": {"atomic", "config"},
    "training.ema": {"errors", "training.checkpoint"},
    "training.losses": set(),
    "training.schedule": set(),
    "training.image_pool": {"ops.image_pool"},
    "training.latents": set(),
    "training.step": {"training.losses"},
    "training.cyclegan": {"training.losses", "training.step"},
    "training.pix2pix": {"training.losses", "training.step"},
    "training.augmented": {"training.losses", "training.pix2pix", "training.step"},
    "training.best": {"config"},
    "training.measures": {
        *("config", "data.fixed", "data.folder", "evaluation.metrics", "training.best", "training.samples"),
    },
    "training.checkpoint": {"atomic", "errors", "tensor_file"},
    "training.lock": {"errors"},
    "training.monitor": {"atomic", "models.cost", "progress", "roofline"},
    "training.samples": {
        *("evaluation.figures", "training.latents", "training.step"),
        *("training.augmented", "training.cyclegan", "training.pix2pix"),
    },
    "training.process": {"config", "device", "distributed", "machine"},
    "training.reduction": {"distributed"},
    "training.replicas": {"distributed"},
    "training.run_folder": {
        *("atomic", "config", "distributed", "errors"),
        *(f"training.{name}" for name in ("checkpoint", "elastic", "lock")),
    },
    "training.experiment": {"config", "data.loader", "training.checkpoint"},
    "training.state": {"training.checkpoint", "training.ema", "training.image_pool", "training.step"},
    "training.familiar": {"data.folder", "data.loader", "data.photo", "data.store", "inference.familiarity"},
    "training.health": {
        *("data.loader", "distributed"),
        *(f"training.{name}" for name in ("checkpoint", "experiment", "monitor", "state")),
    },
    "inference.export": {"atomic", "errors", "inference", "models", "version"},
    "inference.tiles": {"device", "errors", "models.reference", "ops", "progress"},
    "inference": {
        *(
            "atomic",
            "comparison",
            "config",
            "data",
            "device",
            "errors",
            "inference",
            "machine",
            "models",
            "tensor_file",
        ),
        *("training.checkpoint", "training.ema", "training.latents"),
    },
    "evaluation": {"atomic", "data.photo", "errors", "evaluation", "inference.translate", "training.checkpoint"},
    "evaluation.report": {
        *("atomic", "comparison", "config", "data.folder", "data.photo", "errors", "evaluation", "version"),
        *("inference.translate", "training.checkpoint"),
    },
    "evaluation.sets": {"config", "data"},
    "evaluation.embedding": {"errors", "evaluation.metrics", "tensor_file"},
    "evaluation.evaluate": {
        *("config", "errors", "evaluation", "progress", "version"),
        *("inference.translate", "inference.weights", "training.checkpoint"),
    },
    "roofline": {"atomic", "data.store", "machine"},
    "doctor": {"data.store", "device", "machine", "ops", "roofline", "version"},
    "training.build": {
        *("config", "device", "distributed", "models", "ops.instance_norm"),
        *(f"training.{name}" for name in ("augmented", "cyclegan", "pix2pix", "samples")),
        *(f"training.{name}" for name in ("image_pool", "losses", "reduction", "step")),
    },
    "training.graph": {"ops.crop_flip", "training.step"},
    "training.trainer": {
        *("config", "data.loader", "device", "distributed", "errors", "evaluation.figures", "models", "version"),
        "inference.weights",  # a run that starts from weights of others
        *(f"training.{name}" for name in ("best", "build", "checkpoint", "elastic", "ema", "experiment", "familiar")),
        *(
            f"training.{name}"
            for name in ("graph", "health", "image_pool", "measures", "monitor", "process", "replicas", "run_folder")
        ),
        *("roofline", "training.latents", "training.schedule", "training.state", "training.step"),
    },
}
ENTRY_POINTS = {"__init__", "__main__", "cli"}
# These see modules and tensors only.
ONLY_TORCH = {"models.reference", "training.losses"}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__") or "__init__"


def imports(path: Path) -> set[str]:
    """Dotted names of all modules a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path} imports relatively"
            folder = ROOT.parent.joinpath(*node.module.split(".")).is_dir()  # `from package.part import module`
            found |= {f"{node.module}.{alias.name}" if folder else node.module for alias in node.names}
    return found


def within(module: str, prefixes: set[str]) -> bool:
    return any(module == prefix or module.startswith(prefix + ".") for prefix in prefixes)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_import_directions(path: Path) -> None:
    module = name_of(path)
    own = {name.removeprefix(PACKAGE + ".") for name in imports(path) if name.startswith(PACKAGE + ".")}
    if module in ENTRY_POINTS:
        return
    rule = next((key for key in sorted(ALLOWED, key=len, reverse=True) if within(module, {key})), None)
    if rule is None:
        assert module in {"training"}, f"{module} has no rule in ALLOWED: say what it may import"
        assert not own
        return
    wrong = {name for name in own if not within(name, ALLOWED[rule])}
    assert not wrong, f"{module} may not import {sorted(wrong)}"


@pytest.mark.parametrize("module", sorted(ONLY_TORCH))
def test_some_modules_see_torch_only(module: str) -> None:
    path = ROOT / (module.replace(".", "/") + ".py")
    outside = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names)
    assert outside == {"torch"}


def test_the_rule_would_see_a_wrong_import(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text("from cyclegan_fast import config\nfrom cyclegan_fast.data.photo import open_photo\nimport torch\n")
    assert imports(file) == {"cyclegan_fast.config", "cyclegan_fast.data.photo", "torch"}
    assert not within("data.photo", {"config", "data.photos"})


def test_public_names() -> None:
    assert set(cyclegan_fast.__all__) == {
        *("Config", "ConfigError", "Evaluation", "InputError", "PatchDiscriminator", "PixelDiscriminator"),
        *("ResnetGenerator", "Translator", "UnetGenerator", "__version__", "evaluate", "load", "load_config", "ops"),
        "train",
    }
    for name in cyclegan_fast.__all__:
        assert getattr(cyclegan_fast, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        _ = cyclegan_fast.nothing


def test_importing_changes_no_setting_of_torch() -> None:
    code = """
import torch
def settings():
    return (torch.get_num_threads(), torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled(),
            torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision(),
            torch.backends.cuda.matmul.allow_tf32, torch.is_grad_enabled(), torch.initial_seed())
torch.manual_seed(7)
before = settings()
import cyclegan_fast.cli, cyclegan_fast.doctor, cyclegan_fast.training.trainer, cyclegan_fast.inference.translate
import cyclegan_fast.evaluation.figures, cyclegan_fast.data.synthetic
assert settings() == before, (before, settings())
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_answers_without_torch() -> None:
    code = """
import sys
import cyclegan_fast.cli
try:
    cyclegan_fast.cli.main(["--help"])
except SystemExit:
    pass
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
