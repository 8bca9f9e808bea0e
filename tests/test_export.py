"""What torch.export, ONNX and torch.jit make of a model answers as the model does, on a network that fires."""

import warnings

import numpy as np
import pytest
import torch

from sdt_blocks import example_images, example_model
from sdt_blocks.analysis import firing_rates

OPSET = 18


@pytest.fixture(scope="module")
def example():
    """The trained model, its digits, and what it answers."""
    model, (images, labels) = example_model(), example_images()
    assert not firing_rates(model, images).silence
    with torch.no_grad():
        logits = model(images)
    assert (logits.argmax(1) == labels).all() and logits.std(0).min() > 0.1
    return model, images, logits


def assert_same(got, logits):
    torch.testing.assert_close(got, logits, atol=1e-4, rtol=0)
    assert torch.equal(got.argmax(1), logits.argmax(1))


def test_torch_export_of_any_batch(example):
    model, images, logits = example
    shapes = {"x": {0: torch.export.Dim("batch", min=2, max=64)}}
    program = torch.export.export(model, (images[:4],), dynamic_shapes=shapes)
    exported = program.module()
    assert_same(exported(images), logits)
    assert_same(exported(images[:2]), logits[:2])
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert targets and not [target for target in targets if "sdt_blocks" in target]


@torch.no_grad()
def test_torch_jit(example, tmp_path):
    model, images, logits = example
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(model, images, check_trace=False), str(tmp_path / "model.pt"))
        loaded = torch.jit.load(str(tmp_path / "model.pt"))
    assert_same(loaded(images), logits)


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
def test_onnx(example, tmp_path, dynamo):
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    if dynamo:
        pytest.importorskip("onnxscript")
    model, images, logits = example
    path = tmp_path / "model.onnx"
    names = {"input_names": ["x"], "output_names": ["logits"], "opset_version": OPSET}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (images,), str(path), dynamo=dynamo, **names)
    domains = {node.domain for node in onnx.load(str(path)).graph.node}
    assert domains <= {"", "ai.onnx"}
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"x": images.numpy()})
    assert got.dtype == np.float32
    assert_same(torch.from_numpy(got), logits)
