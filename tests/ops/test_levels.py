"""Integer neurons as one pass, alone and behind a norm: against their equations, PyTorch's norm and float64."""

import copy
import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sdt_blocks.neuron import IntegerNeuron
from sdt_blocks.ops import (
    LevelSpec,
    Norm,
    batch_norm_levels,
    batch_norm_levels_reference,
    levels,
    levels_reference,
)
from sdt_blocks.ops.levels import level_limits, levels_op, norm_levels_op
from sdt_blocks.steps import normalize_and_fire

NEURONS = {
    "base": LevelSpec(),
    "large": LevelSpec(rounding="up"),
    "events": LevelSpec(norm=1.0),
    "third": LevelSpec(8, 3.0, "up", 0.7),
    "many": LevelSpec(300, 7.0, "even", 0.3),
}
NOT_FINITE = [float("nan"), float("inf"), -float("inf")]


def inputs(shape, neuron, dtype=torch.float32):
    """Values in and around the window: its ends, halves, the largest below a half, and what is not finite."""
    x = torch.randn(shape) * neuron.levels * neuron.threshold
    ends = [0.0, -0.0, neuron.levels, neuron.levels + 0.5, 0.49999997, 0.498, 1e-45, 1e30, -1e30]
    special = torch.tensor([0.5, 1.5, 2.5, 3.5, *ends, *NOT_FINITE]) * neuron.threshold
    x.flatten()[: len(special)] = special[: x.numel()]
    return x.to(dtype)


@given(
    st.builds(
        LevelSpec,
        st.integers(1, 12),
        st.just(1.0),
        st.sampled_from(["even", "up"]),
        st.floats(0.0009765625, 1000, width=32),
    ),
    st.lists(st.floats(width=32, allow_nan=False), min_size=1),
)
@settings(max_examples=200, deadline=None)
def test_a_level_is_the_number_of_limits_that_are_reached(neuron, numbers):
    limits = level_limits(neuron)
    around = [torch.nextafter(limits, torch.full_like(limits, to)) for to in (-torch.inf, torch.inf)]
    x = torch.cat([torch.tensor(numbers), limits, *around])
    reached = (x.unsqueeze(1) >= limits).sum(1).float()
    assert torch.equal(levels_reference(x, neuron), reached) and reached.max() == neuron.levels


def run(function, x, neuron, weight):
    x = x.detach().requires_grad_()
    values = function(x, neuron)
    return values, *torch.autograd.grad(values, x, weight)


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("name", NEURONS)
def test_equations_to_the_bit(backend, device, name, dtype):
    neuron = NEURONS[name]
    x = inputs((3, 5, 7, 11), neuron, dtype).to(device)
    weight = torch.randn(x.shape).to(x)
    weight[0, 0, 0, :3] = torch.tensor(NOT_FINITE)
    expected = run(levels_reference, x, neuron, weight)
    assert expected[0].unique().numel() > neuron.levels / 2 and 0.1 < (expected[1] != 0).float().mean() < 0.9
    assert_same(run(levels, x, neuron, weight), expected)


@pytest.mark.parametrize("name", NEURONS)
def test_bfloat16(backend, device, name):
    """To the bit too: but Triton's interpreter cuts off what a GPU rounds."""
    neuron = NEURONS[name]
    x = inputs((4, 5, 7, 11), neuron, torch.bfloat16).to(device)
    expected = run(levels_reference, x, neuron, torch.ones_like(x))
    found = run(levels, x, neuron, torch.ones_like(x))
    if backend == "compiled" or device == "cuda":
        assert_same(found, expected)
    elif neuron.threshold == 1:
        # A half that rounding makes, of 0.498, is one level up.
        assert (found[0] != expected[0]).sum() <= (1 if neuron.rounding == "up" else 0) + len(NOT_FINITE)
        assert torch.equal(found[1], expected[1])


def orders(x):
    """x `[T, B, C, H, W]` as other ways to lie in memory."""
    return {
        "contiguous": x,
        "channels_last": x.movedim(2, -1).contiguous().movedim(-1, 2),
        "batch_first": x.transpose(0, 1).contiguous().transpose(0, 1),
        "gaps": torch.stack([x, x], 3)[:, :, :, 0],
        "every_second": torch.stack([x, x], -1)[..., 1],
        "shown": x[:1].expand(x.shape),
    }


@pytest.mark.parametrize("name", orders(torch.zeros(1, 1, 1, 1, 1)))
def test_orders_of_memory(backend, device, name):
    torch.manual_seed(1)
    x, neuron = orders(torch.randn(2, 3, 5, 4, 3, device=device) * 3)[name], LevelSpec(norm=3.0)
    weight = orders(torch.randn(2, 3, 5, 4, 3, device=device))["batch_first"]
    expected = run(levels_reference, x, neuron, weight)
    found = run(levels, x, neuron, weight)
    assert_same(found, expected)
    assert found[0].stride() == expected[0].stride() and expected[0].count_nonzero() and expected[1].count_nonzero()


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(0, 9), max_size=5),
    order=st.randoms(use_true_random=False),
    threads=st.integers(1, 3),
    up=st.booleans(),
)
def test_any_shape(shape, order, threads, up):
    axes = list(range(len(shape)))
    order.shuffle(axes)
    x = torch.randn([shape[axis] for axis in axes]).mul(3).permute([axes.index(i) for i in range(len(shape))])
    neuron, before = LevelSpec(rounding="up" if up else "even"), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = run(levels, x, neuron, torch.ones_like(x))
    finally:
        torch.set_num_threads(before)
    assert list(found[0].shape) == shape
    assert_same(found, run(levels_reference, x, neuron, torch.ones_like(x)))


@pytest.mark.parametrize(("behind_a_norm", "bytes_kept"), [(False, 1 / 8), (True, 4)])
def test_what_is_kept(backend, device, behind_a_norm, bytes_kept):
    """A bit an element, or the input of the norm; what belongs to channels is little."""
    kept = []
    x = torch.randn(1, 2, 8, 16, 16, device=device, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        if behind_a_norm:
            normalize_and_fire(nn.BatchNorm2d(8).to(device), IntegerNeuron(), x)
        else:
            IntegerNeuron()(x)
    assert sum(tensor.nbytes for tensor in kept if tensor.numel() > 8) == bytes_kept * x.numel()
    with torch.no_grad():
        assert levels_op(x, LevelSpec().encode())[1].numel() == 0


@pytest.mark.parametrize("name", ["reference", "compiled"])
def test_an_unknown_rounding_is_refused(monkeypatch, name):
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", name)
    for op in (levels, lambda x, neuron: batch_norm_levels(x, Norm(training=True), neuron)):
        with pytest.raises(ValueError, match="rounding 'down' is unknown; choose one of even, up"):
            op(torch.rand(1, 2, 3, 4, 4), LevelSpec(rounding="down"))


# ---- behind a norm


@pytest.mark.parametrize("time_steps", [None, 3])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("name", "channels"), [("base", 20), ("third", 5)])
def test_modules(backend, device, name, channels, training, time_steps):
    """Against `nn.BatchNorm2d` and the equations; near a half alone may levels differ."""
    torch.manual_seed(0)
    spec = NEURONS[name]
    neuron = IntegerNeuron(levels=spec.levels, norm=spec.norm, rounding=spec.rounding, threshold=spec.threshold)
    norm = nn.BatchNorm2d(channels).to(device).train(training)
    nn.init.uniform_(norm.weight, 0.5, 2.0)
    nn.init.normal_(norm.bias, 1.0)
    other = copy.deepcopy(norm)
    for order in ("contiguous", "channels_last"):
        x = orders(torch.randn(1 if time_steps else 2, 2, channels, 3, 5, device=device) * 2 + 1)[order]
        fused, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
        values = normalize_and_fire(norm, neuron, fused, time_steps)
        frames = plain.expand(time_steps or 2, *x.shape[1:]).flatten(0, 1)
        expected = levels_reference(other(frames), spec).unflatten(0, values.shape[:2])
        assert values.stride()[1:] == x.stride()[1:] and expected.unique().numel() > 4
        assert (values != expected).sum() <= 1 and (values - expected).abs().max() <= 1.01 / spec.norm
        weight = torch.randn_like(values)
        (values * weight).sum().backward()
        (expected * weight).sum().backward()
        torch.testing.assert_close(fused.grad, plain.grad, rtol=1e-3, atol=1e-4)
        assert plain.grad.count_nonzero()
    for (of, a), b in zip(norm.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3, msg=of)
    for of, b in other.named_buffers():
        torch.testing.assert_close(norm.get_buffer(of), b, rtol=1e-5, atol=1e-6, msg=of)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_half_precision_is_rounded_once(backend, device, dtype):
    """Inside the op all is float32 (float64 of float64): levels are those of the norm of the same input in there."""
    torch.manual_seed(0)
    x = (torch.randn(2, 2, 6, 5, 5, device=device) * 2).to(dtype)
    for neuron in (LevelSpec(), LevelSpec(rounding="up")):
        values = batch_norm_levels(x, Norm(training=True), neuron)
        expected = batch_norm_levels_reference(x.double(), Norm(training=True), neuron)
        assert values.dtype == dtype and expected.unique().numel() >= 3
        assert (values.double() != expected).sum() <= (1 if dtype == torch.bfloat16 else 0)


def test_evaluation_on_a_cpu_is_that_of_the_modules(monkeypatch):
    """The norm's roundings are PyTorch's, which multiplies and adds at once where the processor can."""
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", "compiled")
    torch.manual_seed(0)
    norm, neuron = nn.BatchNorm2d(24).eval(), IntegerNeuron(levels=8)
    for value in (norm.running_mean, norm.weight, norm.bias):
        nn.init.normal_(value)
    x = torch.randn(3, 4, 24, 17, 19) * 3
    with torch.no_grad():
        found, expected = normalize_and_fire(norm, neuron, x), levels_reference(norm(x.flatten(0, 1)), neuron.spec)
    # Below one in a million, were it rounded otherwise, and on one processor none.
    assert (found.flatten(0, 1) != expected).sum() <= 1 and expected.unique().numel() == 9


@pytest.mark.parametrize("value", NOT_FINITE)
def test_what_is_not_finite_is_seen(backend, device, value):
    norm, neuron = nn.BatchNorm2d(3).to(device), IntegerNeuron()
    other = copy.deepcopy(norm)
    x = torch.randn(2, 2, 3, 4, 4, device=device)
    x[0, 1, 2, 3, 3] = value
    fused, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    values = normalize_and_fire(norm, neuron, fused)
    expected = levels_reference(other(plain.flatten(0, 1)), neuron.spec).unflatten(0, (2, 2))
    values.sum().backward()
    expected.sum().backward()
    assert torch.equal(values.isnan(), expected.isnan()) and values.isnan().any()
    assert torch.equal(fused.grad.isfinite(), plain.grad.isfinite()) and not fused.grad.isfinite().all()
    assert norm.running_mean.isfinite().tolist() == [True, True, False]


# ---- every road of PyTorch


def test_opcheck(monkeypatch):
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", "compiled")
    torch.manual_seed(0)
    x, code = torch.randn(2, 4, 5, 3).transpose(1, 3).requires_grad_(), LevelSpec().encode()
    assert set(torch.library.opcheck(levels_op.op, (x, code, True)).values()) == {"SUCCESS"}
    affine = [torch.rand(5).requires_grad_(i > 1) for i in range(4)]
    assert set(torch.library.opcheck(norm_levels_op.op, (x, code, *affine, True)).values()) == {"SUCCESS"}


@pytest.mark.parametrize("training", [True, False])
def test_whole_graph_compiles(monkeypatch, training):
    """Without a break, for any size; with the statistics of the batch it is one op there too."""
    monkeypatch.delenv("SDT_BLOCKS_BACKEND", raising=False)
    torch.manual_seed(0)
    norm, neuron, bare = nn.BatchNorm2d(4).train(training), IntegerNeuron(), IntegerNeuron(rounding="up", norm=3.0)
    seen = []

    def look(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    def step(x):
        return normalize_and_fire(norm, neuron, x) + bare(x * 2)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=look)
    for batch in (2, 3):
        x = torch.randn(3, batch, 4, 5, 5, requires_grad=True)
        y, expected = compiled(x), step(x)
        assert (y != expected).sum() <= 1 and expected.unique().numel() > 4
        weight = torch.randn_like(y)
        (a,), (b,) = (torch.autograd.grad((out * weight).sum(), x) for out in (y, expected))
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert ("sdt_blocks.norm_levels.default" in seen) == training and "sdt_blocks.levels.default" not in seen


def test_ops_in_a_graph_of_the_compiler(backend, device, monkeypatch):
    """As a GPU's tensors are traced: the ops themselves, with their shapes and strides without data."""
    monkeypatch.setattr(importlib.import_module("sdt_blocks.ops.levels"), "fused", lambda x, even_traced=True: True)
    torch._dynamo.reset()
    norm, neuron = Norm(training=True), LevelSpec()
    step = lambda x: batch_norm_levels(x, norm, neuron) * levels(x + 1, neuron)  # noqa: E731
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 2, 6, 4, 3, device=device).mul(3).requires_grad_()
    y, expected = compiled(x), step(x)
    assert torch.equal(y, expected) and y.any()
    (a,), (b,) = (torch.autograd.grad(out.square().sum(), x) for out in (y, expected))
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_gradients(monkeypatch, training):
    torch.manual_seed(0)
    norm, neuron = nn.BatchNorm2d(3).double().train(training), IntegerNeuron(norm=3.0, threshold=0.7)
    x, found = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64), []
    for backend in ("reference", "compiled"):
        monkeypatch.setenv("SDT_BLOCKS_BACKEND", backend)
        leaf = x.clone().requires_grad_()
        y = normalize_and_fire(copy.deepcopy(norm), neuron, leaf) + neuron(leaf.sin() * 4)
        (first,) = torch.autograd.grad((y * y.detach().cos()).sum(), leaf, create_graph=True)
        found.append((first, *torch.autograd.grad(first.square().sum(), leaf)))
    for a, b in zip(*found, strict=True):
        assert a.count_nonzero()
        torch.testing.assert_close(b, a)
