"""The short way past PyTorch's registry: the op's own results, taken only where nobody looks on."""

import copy
import pickle
from typing import ClassVar

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sdt_blocks import LIF
from sdt_blocks.ops import NeuronSpec, Norm, attend, batch_norm_lif, lif, max_pool
from sdt_blocks.ops import attention as attention_op
from sdt_blocks.ops.lif import lif_op
from sdt_blocks.ops.pool import max_pool_op
from sdt_blocks.ops.registered import RegisteredOp


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", "compiled")


def calls():
    """A function for each op with a gradient, and what it is a function of."""
    generator = torch.Generator().manual_seed(0)
    x, membrane = (
        torch.randn(*shape, generator=generator, requires_grad=True) for shape in ((4, 2, 8, 6, 5), (2, 8, 6, 5))
    )
    weight = torch.rand(8, generator=generator).requires_grad_()
    bias = torch.rand(8, generator=generator).requires_grad_()
    norm, spec = Norm(weight=weight, bias=bias, training=True), NeuronSpec()
    learned = spec._replace(inv_tau=weight)
    return {
        "lif": (lambda: lif(x, learned, membrane, return_membrane=True), (x, weight, membrane)),
        "norm": (lambda: (batch_norm_lif(x, norm, spec),), (x, weight, bias)),
        "attend": (lambda: (attend([x, x * 2, x + 1], [norm] * 3, [spec] * 4),), (x, weight, bias)),
        "pool": (lambda: (max_pool(x.flatten(0, 1)) ** 2,), (x,)),
    }


def outcome(function, leaves, create_graph=False):
    results = function()
    total = sum((result * torch.linspace(-1, 1, result.numel()).view_as(result)).sum() for result in results)
    gradients = torch.autograd.grad(total, leaves, create_graph=create_graph)
    if create_graph:
        gradients += torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves, allow_unused=True)
    return [*results, *(g for g in gradients if g is not None)]


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("name", calls())
def test_both_ways_give_the_same_bits(monkeypatch, name, twice):
    function, leaves = calls()[name]
    short = outcome(function, leaves, twice)
    assert all(result.count_nonzero() for result in short[: 1 + len(leaves)])
    monkeypatch.setattr(RegisteredOp, "__call__", lambda self, *arguments: self.overload(*arguments))
    registry = outcome(function, leaves, twice)
    assert len(short) == len(registry) and all(map(torch.equal, short, registry))


def way(result):
    return result.grad_fn.name()


class Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen = [*getattr(self, "seen", []), str(func)]
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen = [*getattr(self, "seen", []), str(func)]
        return func(*args, **(kwargs or {}))


class Own(torch.Tensor):
    """A subclass, which sees each op."""

    seen: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(str(func))
        return super().__torch_function__(func, types, args, kwargs or {})


def test_only_unwatched_calls_take_the_short_way():
    x, spec = torch.randn(4, 2, 3, requires_grad=True), NeuronSpec()
    assert way(lif(x, spec)) == "sdt_blocks_lifBackward"
    for mode in (Dispatched(), Functions()):
        with mode:
            lif(x, spec)
        assert any("sdt_blocks.lif" in name for name in mode.seen)
    lif(x.as_subclass(Own), spec)
    assert any("sdt_blocks.lif" in name for name in Own.seen)
    with torch.profiler.profile() as profiler:
        lif(x, spec)
    assert "sdt_blocks::lif" in {event.key for event in profiler.key_averages()}
    assert way(lif(x, spec)) == "sdt_blocks_lifBackward"


def test_without_a_gradient_there_is_no_graph():
    x, spec = torch.randn(4, 2, 3), NeuronSpec()
    assert lif(x, spec).grad_fn is None
    with torch.no_grad():
        assert lif(x.requires_grad_(), spec).grad_fn is None
    with torch.inference_mode():
        assert lif(x, spec).is_inference()


def test_a_compiler_sees_the_op():
    norm, neuron, seen = Norm(training=True), NeuronSpec(), []

    def look(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch._dynamo.reset()
    x = torch.randn(2, 2, 4, 3, 3, requires_grad=True)
    torch.compile(lambda x: batch_norm_lif(x, norm, neuron), fullgraph=True, backend=look)(x)
    assert {"sdt_blocks.lif.default", "sdt_blocks.channel_statistics.default"} <= set(seen)


def test_arguments_left_out_are_the_defaults():
    x, code = torch.randn(4, 2, 3, requires_grad=True), NeuronSpec().encode()
    spikes, last, _ = lif_op(x, 4, code)
    expected, *_ = lif_op.overload(x, 4, code)
    assert torch.equal(spikes, expected) and last.numel() == 0
    (gradient,) = torch.autograd.grad(spikes.sum(), x)
    assert torch.equal(gradient, torch.autograd.grad(expected.sum(), x)[0]) and gradient.count_nonzero()


def test_layers_that_call_an_op_are_copied_and_saved():
    neuron, x = LIF(), torch.randn(4, 2, 3, requires_grad=True)
    neuron(x)
    assert torch.equal(copy.deepcopy(neuron)(x), pickle.loads(pickle.dumps(neuron))(x))


def test_every_op_has_both_ways():
    for op in (lif_op, max_pool_op, attention_op.attend_op):
        assert issubclass(op.function, torch.autograd.Function) and op.overload.name() == f"{op.name}"
