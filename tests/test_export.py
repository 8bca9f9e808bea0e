"""What torch.export, ONNX, AOTInductor and torch.jit make of a model answers as it does, on networks that fire."""

import warnings

import numpy as np
import pytest
import torch

from sdt_blocks import example_images, example_model, optimize_for_inference
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


@pytest.mark.slow
@pytest.mark.parametrize("steps", [None, 1, 3], ids=["images", "1 frame", "3 frames"])
def test_every_family_exports_for_any_batch_and_steps(small, steps):
    x = small.images
    if steps is not None:
        x = torch.stack([x, *[x.flip(-1)] * (steps - 1)], dim=1)
    program = torch.export.export(small.model, (x[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    with torch.no_grad():
        expected = small.model(x)
    torch.testing.assert_close(program.module()(x), expected, atol=1e-5, rtol=1e-4)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [target for target in targets if "sdt_blocks" in target]


@pytest.mark.parametrize("steps", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_frames_of_any_number_of_steps(example, steps):
    model, images, _ = example
    frames = torch.stack([images, *[images.flip(-1)] * (steps - 1)], dim=1)
    program = torch.export.export(model, (frames[:3],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    with torch.no_grad():
        expected = model(frames)
    assert expected.std(0).min() > 0.01
    torch.testing.assert_close(program.module()(frames), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("sparse", [False, True])
def test_optimized_models_name_the_plain_one(example, sparse, tmp_path):
    model, images, logits = example
    fast = optimize_for_inference(model, sparse=sparse)
    assert_same(fast(images), logits)
    ways = [lambda: torch.export.export(fast, (images,)), lambda: torch.jit.trace(fast, images, check_trace=False)]
    for way in ways:
        with pytest.raises(RuntimeError, match="cannot be exported: export the plain model"):
            way()


@pytest.mark.slow
def test_aot_inductor(example, tmp_path):
    model, images, logits = example
    program = torch.export.export(model, (images[:4],), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    assert_same(torch._inductor.aoti_load_package(path)(images), logits)
