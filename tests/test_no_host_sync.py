"""Nothing in a step waits for the device: a CUDA graph can capture training and evaluation, forward and backward.

Without a GPU the models stand on the meta device, where a value that is read back is an error by itself, and a mode
looks at every operation: our ops run their bodies, whose launches are dropped, and nothing crosses between devices.
"""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sdt_blocks import LIF, ParametricLIF, SpikeDrivenSelfAttention, optimize_for_inference, steps
from sdt_blocks.ops import bits, dense, dispatch
from sdt_blocks.ops.registered import RegisteredOp

triton = pytest.importorskip("triton")

READS = {
    *("_local_scalar_dense", "item", "is_nonzero", "nonzero", "argwhere", "equal", "masked_select"),
    *("unique", "_unique2", "unique_dim", "unique_consecutive", "bincount", "repeat_interleave.Tensor"),
}
"""What cannot be done before the values are there."""
OPS = {
    op.name: op
    for name in ("attention", "convolution", "levels", "lif", "norm_lif", "pool")
    for op in vars(importlib.import_module(f"sdt_blocks.ops.{name}")).values()
    if isinstance(op, RegisteredOp)
}


class NothingWaits(TorchDispatchMode):
    """Refuses what waits for the device; `launched` counts the kernels' launches."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        assert name not in READS and f"{name}.{func._schema.overload_name}" not in READS, f"{func} waits"
        if name.startswith("index"):
            indices = [leaf for leaf in tree_leaves(args[1]) if isinstance(leaf, Tensor)]
            assert all(index.dtype not in (torch.bool, torch.uint8) for index in indices), f"{func} waits for a mask"
        if func._schema.name in OPS:
            return OPS[func._schema.name].compute(*args, **kwargs)
        result = func(*args, **kwargs)
        given = {leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim}
        made = {leaf.device for leaf in tree_leaves(result) if isinstance(leaf, Tensor)}
        assert len(given | made) <= 1, f"{func} copies between {given} and {made}"
        return result


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that are launched; none runs, and what they are given is on the device."""
    names = []

    class Launcher:
        def __init__(self, function):
            self.function = function

        def __call__(self, *args, **kwargs):
            given = {leaf.device.type for leaf in (*args, *kwargs.values()) if isinstance(leaf, Tensor)}
            assert given == {"meta"}, f"{self.function.__name__} is given tensors on {given}"
            names.append(self.function.__name__)

    from sdt_blocks.ops.triton import training

    for kind in {type(value) for value in vars(training.lif).values() if hasattr(value, "fn")}:
        monkeypatch.setattr(kind, "__getitem__", lambda self, grid: Launcher(self))
    monkeypatch.setattr(dispatch, "_backend", lambda device, dtype: "triton")
    monkeypatch.setattr(dense, "by_triton", lambda x: True)
    # Tensors without data have no address.
    monkeypatch.setattr(bits, "_holds_all", lambda tensor, spikes: tensor is spikes)
    return names


def on_meta(module):
    return copy.deepcopy(module).to("meta")


def test_the_mode_sees_what_waits():
    x = torch.rand(3)
    for wait in (lambda: x.sum().item(), lambda: x.nonzero(), lambda: bool(x.any()), lambda: x[x > 0.5]):
        with pytest.raises((AssertionError, RuntimeError)), NothingWaits():
            wait()
    with pytest.raises(AssertionError, match="copies"), NothingWaits():
        torch.ones(3).to("meta")


@pytest.mark.parametrize("autocast", [False, True])
def test_a_training_step(small, launched, autocast):
    model, images = on_meta(small.model).train(), small.images.to("meta")
    target = torch.zeros(len(images), dtype=torch.long, device="meta")
    with NothingWaits():
        # Autocast has no meta device: the casts are those of a model in bfloat16.
        logits = model.bfloat16()(images.bfloat16()) if autocast else model(images)
        nn.functional.cross_entropy(logits.float(), target).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    kernels = {"norm_levels_kernel", "levels_gradient_kernel"} if "v3" in small.name else {"forward", "backward"}
    assert len(launched) > 20 and kernels <= set(launched)


def test_a_norm_that_averages_and_mixed_neurons(launched):
    """What is told of neurons and norms in numbers is filled in on the device."""
    block = on_meta(SpikeDrivenSelfAttention(16, num_heads=2, neuron=ParametricLIF))
    block.mixer.neuron = LIF(threshold=0.5)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with NothingWaits():
        x = torch.empty(2, 2, 16, 4, 4, device="meta").requires_grad_()
        steps.project_and_mix(
            (block.q, block.k, block.v), (block.q_neuron, block.k_neuron, block.v_neuron), block.mixer, x
        )
    assert "attend" in launched


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_evaluation(small, launched, dtype):
    with torch.no_grad():
        plain = on_meta(small.model)
        # Ways are compared when a shape comes first, before anything is captured.
        fast = optimize_for_inference(plain, dtype, paths="convolution")
        images = small.images.to("meta")
        with NothingWaits():
            logits = fast(images)
    assert logits.shape == (4, 5)
    assert ("levels_kernel" if "v3" in small.name else "fire_kernel") in launched
