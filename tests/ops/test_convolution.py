"""What torch.compile makes of layers that spikes drive: bits are kept as in eager code, and for spikes alone."""

import copy

import pytest
import torch
from functorch.compile import min_cut_rematerialization_partition
from torch import nn
from torch._dynamo import lookup_backend
from torch._dynamo.backends.common import aot_autograd

from sdt_blocks import LIF, SpikeDrivenSelfAttention, SpikeDrivenTransformer, SpikingMLP
from sdt_blocks.ops.bits import as_spikes
from sdt_blocks.ops.convolution import convolve_op, convolve_spikes, depthwise_convolution, has_own_gradient
from sdt_blocks.steps import per_frame, project


@pytest.fixture
def traced():
    """Compiles a function to one graph; and the names of the ops in it."""
    torch._dynamo.reset()
    names = []

    def look(graph, inputs):
        names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return lookup_backend("aot_eager")(graph, inputs)

    return lambda function: torch.compile(function, backend=look, fullgraph=True), names


def firing(block):
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.bias, 1.0)
    return block


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_gradients_and_bits(backend, device, dtype, channels_last):
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2).to(device, dtype)
    spikes = (torch.rand(4, 6, 7, 5, device=device) < 0.4).to(dtype)
    if channels_last:
        spikes = spikes.contiguous(memory_format=torch.channels_last)
    results = []
    for convolve in (lambda x: convolve_spikes(x, conv.weight, conv.bias, (2, 2), (1, 1), (1, 1), 2), conv):
        x, kept = spikes.clone().requires_grad_(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            y = convolve(x)
        (y * torch.linspace(-1, 1, y.numel(), device=device).view(y.shape)).sum().backward()
        gradients = [y, x.grad, *(p.grad.clone() for p in conv.parameters())]
        results.append((gradients, sum(t.numel() * t.element_size() for t in kept if t is not conv.weight)))
        conv.zero_grad()
    for ours, theirs in zip(results[0][0], results[1][0], strict=True):
        torch.testing.assert_close(ours, theirs)
    assert results[0][1] == (spikes.numel() + 7) // 8


def test_opcheck(monkeypatch):
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", "compiled")
    torch.manual_seed(0)
    spikes = (torch.rand(2, 4, 5, 5) < 0.5).float().requires_grad_()
    bits = torch.ops.sdt_blocks.pack(spikes.detach(), False)
    weight, bias = torch.randn(3, 4, 3, 3, requires_grad=True), torch.randn(3, requires_grad=True)
    given = (spikes, bits, weight, bias, [1, 1], [1, 1], [1, 1], 1, False)
    assert set(torch.library.opcheck(convolve_op.op, given).values()) == {"SUCCESS"}


@pytest.mark.parametrize("autocast", [False, True])
def test_a_compiled_network_keeps_bits_of_what_drives_its_layers(monkeypatch, traced, autocast):
    monkeypatch.delenv("SDT_BLOCKS_BACKEND", raising=False)
    torch.manual_seed(0)
    model = firing(SpikeDrivenTransformer(depth=1, dim=16, num_heads=2, pooling="0100"))
    compile, names = traced
    other = copy.deepcopy(model)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    shapes, images, kept = set(), torch.rand(2, 3, 16, 16), []
    for convolution in convolutions[1:]:
        convolution.register_forward_pre_hook(lambda module, given: shapes.add(given[0].shape))
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.detach()) or t, lambda t: t)
    for run in (model, compile(other)):
        kept.clear()
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = run(images)
        y.float().square().sum().backward()
    assert sum("convolve_spikes" in name for name in names) == len(convolutions) - 1
    driving = [t for t in kept if t.ndim > 3 and t.flatten(0, t.ndim - 4).shape in shapes and t.is_floating_point()]
    assert driving and not any(((t == 0) | (t == 1)).all() for t in driving)
    bits = [t.numel() for t in kept if t.dtype == torch.uint8 and t.ndim == 1]
    assert sum(bits) >= sum(shape.numel() for shape in shapes) // 8 > 0
    gradients = list(zip(other.parameters(), model.parameters(), strict=True))
    assert sum(theirs.grad.abs().sum() for _, theirs in gradients) > 1
    for ours, theirs in gradients:
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=2e-2 if autocast else 1e-3, atol=1e-3)


def tripled_by_a_hook(channels):
    block = SpikingMLP(channels, hidden=12)
    block.neuron2.register_forward_hook(lambda module, inputs, output: output.mul_(3))
    return block


class Tripled(SpikingMLP):
    def forward(self, x):
        spikes = self.neuron1(x)
        spikes.mul_(3)
        return project(self.fc2, self.neuron2(project(self.fc1, spikes)))


@pytest.mark.parametrize("make", [tripled_by_a_hook, lambda channels: Tripled(channels, hidden=12)])
def test_what_changed_in_place_is_no_spike(monkeypatch, traced, make):
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", "compiled")
    torch.manual_seed(0)
    block = firing(make(8))
    other = copy.deepcopy(block)
    compile, names = traced
    x = torch.rand(2, 2, 8, 4, 4) * 4
    for run in (block, compile(other)):
        run(x).square().sum().backward()
    assert sum("convolve_spikes" in name for name in names) == 1
    for ours, theirs in zip(other.parameters(), block.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)
    assert block.fc1.conv.weight.grad.abs().sum() > 0


def doubled_by_a_hook(layer):
    layer.register_forward_hook(lambda module, inputs, output: 2 * output)
    return layer


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"),
        lambda: nn.Conv2d(6, 4, 3, padding="same", dilation=2),
        lambda: doubled_by_a_hook(nn.Conv2d(6, 4, 1)),
        lambda: doubled_by_a_hook(nn.Sequential(nn.Conv2d(6, 4, 1))),
        lambda: nn.Sequential(nn.Conv2d(6, 6, 3, 2, groups=3, bias=False), nn.Conv2d(6, 4, 1)),
        lambda: nn.Sequential(),
    ],
)
def test_any_layer_on_spikes_is_compiled_as_it_is(monkeypatch, traced, make):
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", "compiled")
    torch.manual_seed(0)
    layer, neuron, compile = make(), LIF(), traced[0]
    results = []
    for run in (lambda x: per_frame(layer, neuron(x)), compile(lambda x: per_frame(layer, neuron(x)))):
        x = (torch.rand(2, 2, 6, 7, 7, generator=torch.Generator().manual_seed(1)) * 3).requires_grad_()
        y = run(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)
        assert eager.any()


def test_of_what_comes_into_a_graph_nothing_is_known(monkeypatch, traced):
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", "compiled")
    compile, names = traced
    spikes = LIF()((torch.rand(2, 2, 6, 4, 4) * 3).requires_grad_())
    conv = nn.Conv2d(6, 2, 1)
    run = compile(lambda x: per_frame(conv, x))
    run(as_spikes(spikes))
    assert names and not any("convolve_spikes" in name for name in names)


def test_the_attention_shares_the_bits_of_its_input(monkeypatch):
    """q, k and v: three convolutions, and in the graph of the forward pass their input is packed once."""
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", "compiled")
    torch._dynamo.reset()
    graphs = []

    def look(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    block = SpikeDrivenSelfAttention(16, num_heads=2)
    # As torch.compile's own backend divides a step into its passes.
    backend = aot_autograd(fw_compiler=look, partition_fn=min_cut_rematerialization_partition)
    torch.compile(block, backend=backend, fullgraph=True)(torch.rand(2, 2, 16, 4, 4) * 3)
    forward = graphs[0]
    assert sum("sdt_blocks.convolve_spikes.default" in name for name in forward) == 4
    assert sum("sdt_blocks.pack" in name for name in forward) == 2
    assert not any("note_spikes" in name or "are_spikes" in name for name in forward)


# ---- depthwise convolutions

BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
FORMATS = [torch.contiguous_format, torch.channels_last]


def depthwise_arguments(shape, size, dtype, memory_format=torch.contiguous_format):
    """Input, weight, bias and the gradient of the result."""
    x = torch.randn(shape, dtype=dtype).contiguous(memory_format=memory_format)
    weight, bias = torch.randn(shape[1], 1, size, size, dtype=dtype), torch.randn(shape[1], dtype=dtype)
    return [tensor.requires_grad_() for tensor in (x, weight, bias)], torch.randn(shape, dtype=dtype)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(
    "shape, size", [((3, 20, 9, 6), 7), ((70, 16, 3, 2), 5), ((2, 33, 1, 14), 7), ((1, 7, 4, 1), 5)]
)
def test_gradients_of_a_depthwise_convolution(monkeypatch, shape, size, dtype, memory_format):
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", "compiled")
    given, grad = depthwise_arguments(shape, size, dtype, memory_format)
    found = torch.autograd.grad(depthwise_convolution(*given), given, grad)
    wide = [tensor.double() for tensor in given]
    expected = torch.autograd.grad(torch.conv2d(*wide, 1, size // 2, 1, shape[1]), wide, grad.double())
    assert found[0].is_contiguous(memory_format=memory_format)
    for ours, exact in zip(found, expected, strict=True):
        assert ours.dtype == dtype and (ours - exact).abs().max() <= BOUNDS[dtype] * exact.abs().max()


def test_depthwise_gradients_with_other_instructions(monkeypatch, instructions):
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", "compiled")
    given, grad = depthwise_arguments((3, 20, 9, 6), 7, torch.float32)
    found = torch.autograd.grad(depthwise_convolution(*given), given, grad)
    for ours, theirs in zip(found, torch.autograd.grad(torch.conv2d(*given, 1, 3, 1, 20), given, grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_depthwise_gradients_do_not_depend_on_threads(monkeypatch):
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", "compiled")
    given, grad = depthwise_arguments((40, 48, 8, 8), 7, torch.float32)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(torch.autograd.grad(depthwise_convolution(*given), given[1], grad)[0])
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_opcheck_of_a_depthwise_convolution(monkeypatch):
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", "compiled")
    for memory_format in FORMATS:
        given, _ = depthwise_arguments((2, 4, 5, 5), 5, torch.float32, memory_format)
        assert set(torch.library.opcheck(depthwise_convolution.op, tuple(given)).values()) == {"SUCCESS"}
    double, _ = depthwise_arguments((2, 2, 3, 3), 5, torch.float64)
    assert torch.autograd.gradgradcheck(depthwise_convolution, double)


def depthwise(size=7, channels=6, **options):
    return nn.Conv2d(channels, channels, size, **{"padding": size // 2, "groups": channels, **options})


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "make", [lambda: depthwise(bias=False), lambda: nn.Sequential(depthwise(), nn.Conv2d(6, 4, 1), depthwise(5, 4))]
)
@pytest.mark.parametrize("fires", [False, True])
def test_depthwise_layers_have_the_kit_s_gradient(monkeypatch, traced, make, autocast, fires):
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", "compiled")
    layer, neuron, (compile, names) = make(), LIF() if fires else nn.Identity(), traced
    plain, kept = copy.deepcopy(layer), []
    x = (torch.rand(2, 3, 6, 7, 7) * 3).requires_grad_()
    runs = (
        lambda: per_frame(layer, neuron(x)),
        lambda: compile(lambda x: per_frame(layer, neuron(x)))(x),
        lambda: plain(neuron(x).flatten(0, 1)).unflatten(0, (2, 3)),
    )
    results = []
    for run, weights in zip(runs, (layer, layer, plain), strict=True):
        kept.append([])
        with (
            torch.autograd.graph.saved_tensors_hooks(lambda t: kept[-1].append(t) or t, lambda t: t),
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        ):
            y = run()
        results.append([y, *torch.autograd.grad(y.float().square().sum(), [x, *weights.parameters()])])
    for eager, compiled, expected in zip(*results, strict=True):
        assert expected.any()
        for found in (eager, compiled):
            torch.testing.assert_close(found, expected, **({"rtol": 0.05, "atol": 0.05} if autocast else {}))
    assert any("convolve_spikes" in name or "depthwise" in name for name in names)
    # Spikes became bits.
    floats = [t for t in kept[0] if t.is_floating_point() and t.shape[-3:] == (6, 7, 7) and ((t == 0) | (t == 1)).all()]
    assert not floats


@pytest.mark.parametrize(
    "layer, own",
    [
        (depthwise(7), True),
        (depthwise(5, bias=False), True),
        (depthwise(3), False),
        (depthwise(6), False),
        (depthwise(9), False),
        (depthwise(5, stride=2), False),
        (depthwise(5, dilation=2), False),
        (depthwise(5, padding=1), False),
        (depthwise(5, groups=3), False),
        (nn.Conv2d(6, 12, 5, padding=2, groups=6), False),
        (nn.Conv2d(6, 6, (5, 7), padding=(2, 3), groups=6), False),
    ],
)
def test_which_convolutions_have_a_gradient_of_the_kit_s(monkeypatch, layer, own):
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", "compiled")
    given = layer.weight, layer.stride, layer.padding, layer.dilation, layer.groups
    assert has_own_gradient(torch.rand(2, 6, 9, 9), *given) == own
    with torch.no_grad():
        assert not has_own_gradient(torch.rand(2, 6, 9, 9), *given)
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", "reference")
    assert not has_own_gradient(torch.rand(2, 6, 9, 9), *given)
