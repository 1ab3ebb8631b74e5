"""Configuration: defaults, files, overrides, and what is refused with which words."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from cyclegan_fast.config import (
    Config,
    ConfigError,
    describe,
    from_dict,
    load_config,
    reference_page,
    to_dict,
    to_yaml,
    upgraded,
)

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "configs").rglob("*.yaml"))


def test_defaults_are_the_original_recipe() -> None:
    config = Config()
    assert (config.training.lr, config.training.beta1, config.training.beta2) == (2e-4, 0.5, 0.999)
    assert (config.training.epochs, config.training.epochs_decay, config.training.batch) == (100, 100, 1)
    assert (config.training.pool_size, config.loss.cycle_A, config.loss.identity) == (50, 10.0, 0.5)
    assert (config.data.load_size, config.data.crop_size, config.data.resample) == (286, 256, "bicubic")


def test_dictionary_and_yaml_round_trip() -> None:
    config = load_config(None, ["checkpoint.milestones=[1, 10]", "data.limit_train=5", "training.lr=1e-3"])
    assert from_dict(to_dict(config)) == config
    assert from_dict(yaml.safe_load(to_yaml(config))) == config
    assert config.checkpoint.milestones == (1, 10)


def test_overrides_win_over_the_file_in_order(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("name: a\ntraining: {epochs: 3, lr: 2e-4}\n")
    config = load_config(file, ["training.epochs=4", "training.epochs=5", "data.limit_train=null"])
    assert (config.name, config.training.epochs, config.training.lr) == ("a", 5, 2e-4)
    assert config.data.limit_train is None


def test_an_empty_file_and_empty_sections_mean_defaults(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("")
    assert load_config(file) == Config()
    file.write_text("training:\n")
    assert load_config(file) == Config()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.limt_train=3", ["unknown field data.limt_train", "did you mean data.limit_train?"]),
        ("trainig.lr=3", ["unknown field trainig", "training?"]),
        ("lr=3", ["did you mean training.lr?"]),
        ("data.xyzzy=1", ["unknown field data.xyzzy", "did you mean data."]),
        ("training.lr=-1", ["training.lr = -1.0", "a number > 0"]),
        ("training.lr=.nan", ["training.lr = nan", "a number > 0"]),
        ("training.batch=0", ["training.batch = 0", "an integer from 1 to 65536"]),
        ("training.batch=1.5", ["training.batch = 1.5", "an integer"]),
        ("training.batch=many", ["training.batch = 'many'", "an integer"]),
        ("training.batch=true", ["training.batch = True", "an integer"]),
        ("training.recompute=1", ["training.recompute = 1", "true or false"]),
        ("training.compile=true", ["training.compile is no setting any more", "write training.mode=compile"]),
        ("training.mode=fast", ["training.mode = 'fast'", "eager, compile, graph"]),
        ("training.impl=triton", ["training.impl = 'triton'", "auto, fused, reference"]),
        ("training.streams=3", ["training.streams = 3", "one of 1, 2"]),
        ("training.precision=fp8", ["training.precision = 'fp8'", "auto, fp32, tf32, bf16, fp16"]),
        ("model.channels_A=5", ["model.channels_A = 5", "from 1 to 4"]),
        ("data=3", ["data is a section"]),
        ("training.lr.x=3", ["training.lr = {'x': 3}", "a number"]),
        ("name=../elsewhere", ["name = '../elsewhere'", "one folder name"]),
        ("data.crop_size=300", ["data.crop_size = 300", "data.load_size = 286"]),
        ("model.channels_B=1", ["loss.identity", "model.channels_B = 1"]),
        ("model.gamma=0", ["model.gamma = 0.0", "model.affine=true"]),
        ("checkpoint.milestones=[0]", ["checkpoint.milestones", "count from 1"]),
        ("training", ["'training' is not of the form"]),
        ("training.lr=[", ["not valid YAML"]),
    ],
)
def test_what_is_refused_and_how(override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, [override])
    for word in words:
        assert word in str(error.value)


def test_the_configuration_of_an_older_checkpoint_is_upgraded() -> None:
    old = to_dict(load_config(None, ["training.lr=1e-3"]))
    del old["training"]["mode"]
    for compiled, mode in ((True, "compile"), (False, "eager")):
        old["training"]["compile"] = compiled
        config = from_dict(upgraded(old))
        assert (config.training.mode, config.training.lr) == (mode, 1e-3)
    assert old["training"]["compile"] is False
    assert from_dict(upgraded({})) == Config()
    assert upgraded(to_dict(Config())) == to_dict(Config())


def test_no_epoch_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one epoch"):
        load_config(None, ["training.epochs=0", "training.epochs_decay=0"])


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"a: [1", "not valid YAML"), (b"- 1\n- 2", "holds a list"), (b"\xff\xfe\x00", "UTF-8")],
)
def test_bad_files(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=words) as error:
        load_config(file)
    assert str(file) in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: No such file"):
        load_config(tmp_path / "none.yaml")


def test_yaml_cannot_make_objects(tmp_path: Path) -> None:
    file = tmp_path / "evil.yaml"
    file.write_text("name: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(file)


def test_every_field_is_documented_and_listed_in_the_docs() -> None:
    assert len([name for name, *_ in describe()]) == sum(1 for _ in _leaves(Config()))
    for _, allowed, _, doc in describe():
        assert len(doc) > 10
        assert allowed
    page = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert page == reference_page(), "write it anew: cyclegan-fast train --help-config > docs/config.md"


def _leaves(config: object) -> Iterator[object]:
    for item in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, item.name)
        yield from _leaves(value) if dataclasses.is_dataclass(value) else [value]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_valid_and_say_hardware_and_result(recipe: Path) -> None:
    config = load_config(recipe)
    assert config.name == recipe.stem
    head = recipe.read_text().split("name:")[0]
    assert "# Hardware:" in head
    assert "Result:" in head


def test_the_keras_recipe_is_that_of_the_paper() -> None:
    config = load_config(ROOT / "configs" / "paper" / "keras.yaml")
    assert config.model.preset == "keras"
    assert (config.data.pairing, config.data.frozen_augmentation, config.data.resample) == ("zip", True, "bilinear_tf")
    assert (config.data.limit_train, config.data.limit_test) == (500, 200)
    assert (config.training.epochs, config.training.epochs_decay, config.training.pool_size) == (50, 0, 0)
    assert (config.loss.generator_gradient, config.training.adam_eps) == ("own", 1e-7)


def test_the_recipes_are_there() -> None:
    names = {path.stem for path in RECIPES}
    assert names >= {"quickstart", "iphone2dslr", "keras", "original", "ours", "horse2zebra", "small_real"}
