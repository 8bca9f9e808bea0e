"""`export.py` and the command `sdt`: what is written answers as the model does, what cannot be is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from common.config import ConfigError, RunError

from sdt_blocks import DataCard, calibrate_norms, create_model, example_images, save_model
from sdt_blocks.example import FOLDER, example_model


@pytest.fixture
def export(tmp_path, monkeypatch):
    """`export.py` in this process: what it says."""
    import export as recipe

    monkeypatch.chdir(tmp_path)
    return lambda *arguments: recipe.run([f"checkpoint={FOLDER}", *arguments])


def expected():
    with torch.no_grad():
        return example_model()(example_images()[0])


def test_a_program_of_torch_export(export, tmp_path):
    said = export("format=pt2", "output=digits.pt2")
    assert "digits.pt2 takes ['any', 1, 16, 16]" in said and "same class" in said
    program = torch.export.load(tmp_path / "digits.pt2").module()
    torch.testing.assert_close(program(example_images()[0]), expected(), atol=1e-4, rtol=0)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's device that is always full")
def test_a_full_disk_is_an_error_and_ends_no_process():
    import export as recipe

    with pytest.raises(OSError, match="No space left"):
        recipe.write_pt2(example_model(), example_images()[0], Path("/dev/full"), any_batch=False)


@pytest.mark.slow
def test_a_program_of_meta_spikeformer(tmp_path):
    import export as recipe

    torch.manual_seed(0)
    model = create_model("sdt_v2_15m", dims=(8, 8, 16, 16), depths=(1, 1, 1, 1, 0), in_channels=1, num_classes=10)
    calibrate_norms(model, example_images()[0])
    model.card = DataCard(input_size=(16, 16))
    save_model(model.eval(), tmp_path / "model")
    said = recipe.run([f"checkpoint={tmp_path / 'model'}", "format=pt2", "data.img_size=16"])
    assert "same class" in said and (tmp_path / "model" / "model.pt2").stat().st_size > 10_000


@pytest.mark.slow
def test_onnx(export, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert "takes ['any', 1, 16, 16]" in export("output=digits.onnx")
    session = runtime.InferenceSession(str(tmp_path / "digits.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": example_images()[0].numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected(), atol=1e-4, rtol=0)


@pytest.fixture
def convolutional(tmp_path, monkeypatch):
    """A saved model without attention and pooling, which fires, and the recipe for it."""
    import export as recipe

    torch.manual_seed(0)
    model = create_model("sdt_2_256", depth=0, dim=32, in_channels=1, pooling="0000")
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.bias, 0.7, 0.3)
    calibrate_norms(model, example_images()[0])
    save_model(model, tmp_path / "model")
    arguments = [f"checkpoint={tmp_path / 'model'}", "format=nir", "data.img_size=16"]
    return lambda: recipe.run(arguments)


def test_a_graph_of_nir_is_read_back(convolutional, tmp_path, capsys):
    nir = pytest.importorskip("nir")
    said = convolutional()
    assert (
        "model.nir takes frames [1, 16, 16] and answers, over 4 steps, as the model does: the same class for 8 images"
        in said
    )
    graph = nir.read(str(tmp_path / "model" / "model.nir"))
    assert graph.nodes["head"].weight.shape == (10, 32) and "did not fire" not in capsys.readouterr().err


def test_a_graph_of_nir_that_answers_otherwise_is_refused(convolutional, tmp_path, monkeypatch):
    nir = pytest.importorskip("nir")
    write = nir.write

    def damaged(path, graph):
        graph.nodes["head"].weight[:] = graph.nodes["head"].weight[::-1]
        write(path, graph)

    (tmp_path / "model" / "model.nir").write_bytes(b"an earlier one")
    monkeypatch.setattr(nir, "write", damaged)
    with pytest.raises(RunError, match="what was written answers otherwise"):
        convolutional()
    assert (tmp_path / "model" / "model.nir").read_bytes() == b"an earlier one"
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"model.nir", "model.safetensors", "config.json"}


def test_what_cannot_be_written_is_refused(export, monkeypatch):
    pytest.importorskip("nir")
    with pytest.raises(ConfigError, match=r"NIR has no attention.*\(the first is blocks.0.attention.branch.mixer"):
        export("format=nir", "output=digits.nir")
    with pytest.raises(ConfigError, match="format: 'tflite' is unknown; choose one of onnx, pt2, nir"):
        export("format=tflite")
    with pytest.raises(ConfigError, match="there is no folder nowhere"):
        export("format=pt2", "output=nowhere/model.pt2")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match=r"pip install 'sdt_blocks\[export\]'"):
        export("output=digits.onnx")


@pytest.mark.parametrize(
    ("card", "arguments", "shape"),
    [
        ((24, 32), (), [3, 2, 24, 32]),  # as in training
        ((24, 32), ("events.size=16", "events.time_steps=2"), [2, 2, 16, 16]),  # as asked for
        (None, ("events.sensor_size=[20,12]",), [3, 2, 12, 20]),
        (None, ("data.name=cifar10_dvs",), [3, 2, 64, 64]),
    ],
)
def test_a_model_of_events_is_written_for_the_frames_of_its_training(card, arguments, shape):
    import export as recipe
    from common.config import load_config

    model = create_model("sdt_2_256", depth=1, dim=32, in_channels=2, time_steps=3, pooling="0001")
    model.card = card and DataCard(input_size=card)
    config = load_config(arguments, default="imagenet_8_384")
    assert list(recipe.example_inputs(model, config, 5, arguments).shape) == [5, *shape]
    if card is None:
        with pytest.raises(ConfigError, match="nothing says the size of the frames; give events"):
            recipe.example_inputs(model, load_config([], default="imagenet_8_384"), 5, [])


def test_what_answers_otherwise_is_no_export():
    import export as recipe

    model, images = example_model(), example_images()[0]
    assert "same class" in recipe.check(model, model, images)
    with pytest.raises(RunError, match="answers otherwise than the model: logits differ by up to"):
        recipe.check(model, lambda x: model(x).roll(1, dims=1), images)
