"""The folded form with the Triton kernels, in the interpreter where there is no GPU, against the plain model."""

import pytest
import torch

from sdt_blocks import optimize_for_inference
from sdt_blocks.ops import dense

pytestmark = pytest.mark.cuda
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels' launchers that are called; nothing is left to torch.compile, nor to the C++ kernels."""
    from sdt_blocks.ops.triton import dense as kernels
    from sdt_blocks.ops.triton import levels

    monkeypatch.setenv("SDT_BLOCKS_BACKEND", "triton")
    monkeypatch.setattr(dense, "_traced", None)
    monkeypatch.setattr(dense, "_native", None)
    names = []
    for name in ("fire", "fire_and_pool", "attend", "fire_levels"):
        module = levels if name == "fire_levels" else kernels
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, f=original, n=name: names.append(n) or f(*given))
    return names


@torch.no_grad()
def test_every_family(small, launched, monkeypatch):
    """In float64 no membrane is within rounding of its threshold, so that the answers are the model's."""
    model, images = small.model.to(DEVICE).double(), small.images[:1].to(DEVICE).double()
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", "reference")
    expected = model(images)
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", "triton")
    found = optimize_for_inference(model, torch.float64, paths="convolution")(images)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    if small.name == "sdt_2_256":
        assert {"fire", "fire_and_pool", "attend"} == set(launched)
    else:
        assert ("fire_levels" if "v3" in small.name else "fire") in launched


@pytest.mark.parametrize("name", ["sdt_2_256", "sdt_v2_15m"])
@torch.no_grad()
def test_bfloat16_is_that_of_the_equations(make_small, launched, monkeypatch, name):
    small = make_small(name)
    model, images = small.model.to(DEVICE), small.images[:1].to(DEVICE)
    fast, equations = (
        optimize_for_inference(model, torch.bfloat16, compile, paths="convolution") for compile in (True, False)
    )
    found = fast(images)
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", "reference")
    assert launched and torch.equal(found, equations(images)) and found.std() > 1e-4
