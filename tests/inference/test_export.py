"""Exported files: the same picture from onnxruntime and from a loaded program, at any size; errors; what is inside."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from tiny_models import noise, save_run, translator

from cyclegan_fast.cli import _size, main
from cyclegan_fast.errors import InputError
from cyclegan_fast.inference.export import OPSET, export, read_metadata
from cyclegan_fast.inference.translate import Translator
from cyclegan_fast.models.fused import ResnetGenerator
from cyclegan_fast.models.reference import ReflectionPad2d
from cyclegan_fast.models.unet import UnetGenerator

# Not among the sizes that the export itself checks: a single row of blocks, odd ones, batches, one side very long.
SIZES = ((1, 8, 8), (3, 32, 32), (1, 41, 30), (2, 9, 203))


def needs_onnx() -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)


def keras_translator() -> Translator:
    torch.manual_seed(0)
    generators = [ResnetGenerator(ngf=4, blocks=1, preset="keras", init_gain=0.3) for _ in "AB"]
    return Translator(*generators, device="cpu", precision="fp32")


def session(path: Path):
    return importlib.import_module("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("model", [translator, keras_translator])
def test_onnx_gives_the_same_picture_at_every_size(model, tmp_path: Path) -> None:
    needs_onnx()
    ours = model()
    exported = export(ours, tmp_path / "model.onnx", source="flowers")
    assert max(exported.errors.values()) < 1e-3
    check_content(exported.path)
    run = session(exported.path)
    for batch, height, width in SIZES:
        image = torch.rand(batch, 3, height, width) * 2 - 1
        expected = ours.translate(image)
        result = run.run(["translated"], {"image": image.numpy()})[0]
        assert result.shape == tuple(image.shape)
        # Four values a channel at the smallest size: a norm over them amplifies rounding.
        np.testing.assert_allclose(result, expected.numpy(), atol=1e-3 if height > 8 else 1e-2, rtol=0)


def check_content(path: Path) -> None:
    """Plain operators of the stated opset, free dimensions by name, a description, and no path of this machine."""
    model = importlib.import_module("onnx").load(path)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)]
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    [image], [translated] = model.graph.input, model.graph.output
    for value, name in ((image, "image"), (translated, "translated")):
        shape = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        assert (value.name, shape) == (name, ["batch", 3, "height", "width"])
    facts = read_metadata(path)
    assert (facts["direction"], facts["source"]) == ("AtoB", "flowers")
    assert "RGB" in facts["input"]
    assert len(facts["weights_sha256"]) == 64
    content = path.read_bytes()
    assert str(Path(__file__).parents[2]).encode() not in content
    assert b".py" not in content


@pytest.mark.parametrize("name", ["resize", "unet"])
def test_other_generators(name: str, tmp_path: Path) -> None:
    """Resize-convolutions; a U-Net, whose sides are multiples of 32 here, so that small pictures are extended twice."""
    torch.manual_seed(0)
    if name == "unet":
        generator: torch.nn.Module = UnetGenerator(ngf=4, downs=5, init_gain=0.3)
    else:
        generator = ResnetGenerator(ngf=4, blocks=1, upsample="resize", init_gain=0.3)
    ours = Translator(generator, torch.nn.Identity(), device="cpu", precision="fp32")
    run = torch.export.load(export(ours, tmp_path / "model.pt2", check=False).path).module()
    for shape in ((1, 3, 41, 30), (2, 3, 12, 70), (1, 3, 64, 64)):
        image = torch.rand(shape) * 2 - 1
        torch.testing.assert_close(run(image), ours.translate(image), atol=1e-3, rtol=0)


def test_half_precision_and_no_arithmetic_for_the_user(tmp_path: Path) -> None:
    """fp16 weights, uint8 in and out, in one file: a level off on average at most."""
    needs_onnx()
    ours = translator()
    path = export(ours, tmp_path / "model.onnx", precision="fp16", uint8=True).path
    initializers = importlib.import_module("onnx").load(path).graph.initializer
    assert {tensor.data_type for tensor in initializers if len(tensor.dims) == 4} == {10}  # TensorProto.FLOAT16
    picture = noise(30, 41)
    result = session(path).run(None, {"image": picture[None]})[0][0]
    assert result.dtype == np.uint8
    difference = np.abs(result.astype(int) - ours.translate(picture))
    assert difference.mean() < 1
    assert difference.max() < 10


def test_program_of_torch_export(tmp_path: Path) -> None:
    """The way back, from three channels to one: each direction has its own generator and its own channels."""
    direction = "BtoA"
    ours = translator(channels_A=1, channels_B=3)
    exported = export(ours, tmp_path / "model.pt2", direction=direction)
    assert exported.errors
    program = torch.export.load(exported.path)
    assert not any("cyclegan" in str(node.target) for node in program.graph.nodes)
    run = program.module()
    for batch, height, width in SIZES:
        image = torch.rand(batch, ours.channels(direction)[0], height, width) * 2 - 1
        torch.testing.assert_close(run(image), ours.translate(image, direction), atol=1e-3, rtol=0)
    assert read_metadata(exported.path)["direction"] == direction


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_program_of_executorch(precision: str, tmp_path: Path) -> None:
    """One size, which is no square; its own runtime gives the same picture; in fp32 all of it by XNNPACK."""
    pytest.importorskip("executorch")
    ours = translator()
    uint8 = precision == "fp16"
    path = tmp_path / "model.pte"
    exported = export(ours, path, precision=precision, uint8=uint8, size=(16, 24), source="flowers")
    assert list(exported.errors) == [(1, 16, 24)]
    facts = read_metadata(path)
    assert facts["sizes"] == "batch 1, height 16, width 24"
    assert facts["source"] == "flowers"
    method = importlib.import_module("executorch.runtime").Runtime.get().load_program(str(path)).load_method("forward")
    pixels = torch.from_numpy(noise(16, 24))
    image = pixels if uint8 else pixels.permute(2, 0, 1) / 127.5 - 1
    result = method.execute([image[None].contiguous()])[0][0]
    if uint8:
        assert result.dtype == torch.uint8
        assert (result.int() - torch.from_numpy(ours.translate(pixels.numpy())).int()).abs().max() < 10
    else:
        torch.testing.assert_close(result, ours.translate(image[None])[0], atol=1e-3, rtol=0)
        content = path.read_bytes()
        assert b"XnnpackBackend" in content
        assert b"aten" not in content  # the name of an operator that runs outside of it


def test_layers_as_xnnpack_has_them() -> None:
    """Reflections from slices, of one row, of three, and of two at one end only."""
    module = importlib.import_module("cyclegan_fast.inference.export")
    x = torch.randn(2, 3, 5, 7)
    for padding in (1, 3, (2, 1, 0, 2)):
        pad = ReflectionPad2d(padding)
        torch.testing.assert_close(module._SlicedPad(pad)(x), pad(x), atol=0, rtol=0)
    network = module._for_graph(translator().G_A, "fp32", module._REPLACED["pte"])
    kinds = {type(layer) for layer in network.modules()}
    assert {module._SlicedPad, module._MeanNorm} < kinds
    assert ReflectionPad2d not in kinds


def test_sizes_are_for_fixed_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="a size is for the format pte; pt2 takes pictures of any size"):
        export(translator(), tmp_path / "model.pt2", size=(64, 64))
    monkeypatch.setitem(sys.modules, "executorch", None)
    with pytest.raises(InputError, match=r'ExecuTorch needs executorch: pip install "cyclegan_fast\[executorch\]"'):
        export(translator(), tmp_path / "model.pte")
    monkeypatch.setitem(sys.modules, "executorch", ModuleType("executorch"))
    for size in ((64, 66), (4, 64)):
        with pytest.raises(InputError, match=f"size {size[1]}x{size[0]}: sides must be multiples of 4, from 8 pixels"):
            export(translator(), tmp_path / "model.pte", size=size)
    assert not list(tmp_path.iterdir())


def test_a_file_that_computes_something_else_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers of another model in the file, and what stood under the name before is still there."""
    path = tmp_path / "model.pt2"
    path.write_bytes(b"earlier")
    module = importlib.import_module("cyclegan_fast.inference.export")
    other = module._plain(translator().G_B)
    monkeypatch.setattr(module, "_for_graph", lambda *_, **__: other)
    with pytest.raises(InputError, match=r"differs from the model at 1 x 64 x 64 by up to .* rounding"):
        export(translator(), path)
    assert path.read_bytes() == b"earlier"
    assert list(tmp_path.iterdir()) == [path]


def test_wrong_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = translator()
    with pytest.raises(InputError, match=r"the suffix of .*model.pb is not one of onnx, pt2, pte"):
        export(ours, tmp_path / "model.pb")
    with pytest.raises(InputError, match="precision 'int4' is not one of fp32, fp16"):
        export(ours, tmp_path / "model.pt2", precision="int4")
    with pytest.raises(InputError, match="direction 'CtoD'"):
        export(ours, tmp_path / "model.pt2", direction="CtoD")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*file"):
        export(ours, tmp_path / "file" / "model.pt2")
    with pytest.raises(InputError, match="has no layers called `model`"):
        export(Translator(torch.nn.Identity(), torch.nn.Identity(), device="cpu"), tmp_path / "model.pt2")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(InputError, match=r'pip install "cyclegan_fast\[export\]"'):
        export(ours, tmp_path / "model.onnx")
    assert not list(tmp_path.glob("*.pt2"))


def test_metadata_of_what_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(b"PK\x03\x04 and nothing more")
    with pytest.raises(InputError, match="is no exported model"):
        read_metadata(path)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = save_run(tmp_path / "flowers")
    out = tmp_path / "new" / "model.pt2"
    assert main(["export", str(run), "-o", str(out), "--direction", "BtoA", "--uint8"]) == 0
    printed = capsys.readouterr().out
    assert f"{out}: 0." in printed
    assert "2 x 70 x 45: differs from the model by at most" in printed
    assert read_metadata(out)["source"] == "flowers"
    assert main(["export", str(run), "-o", str(out), "--size", "640x480"]) == 2
    assert "a size is for the format pte" in capsys.readouterr().err
    assert _size("640x480") == (480, 640)
    assert _size("512") == (512, 512)
    with pytest.raises(SystemExit):
        main(["export", str(run), "-o", str(out), "--size", "big"])
    assert "'big' is no size such as 512 or 640x480" in capsys.readouterr().err
    assert main(["export", str(run), "-o", str(tmp_path / "model.xyz")]) == 2
    assert "is not one of onnx, pt2, pte" in capsys.readouterr().err
