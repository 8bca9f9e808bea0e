"""Units: the chains that are trained and the one convolution that they are."""

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sdt_blocks import LIF, optimize_for_inference
from sdt_blocks.blocks import ConvNorm, RepConv, SeparableConvNorm
from sdt_blocks.blocks.integer import LinearChain
from sdt_blocks.blocks.units import PaddedNorm
from sdt_blocks.inference.folded import folded
from sdt_blocks.steps import project, project_and_fire


def with_statistics(module):
    """The module in eval mode, its norms with weights and statistics far from those of a fresh one."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, 0, 0.5)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.2, 3)
    return module.eval()


@pytest.mark.parametrize(
    "make",
    [
        lambda: RepConv(6, 6),
        lambda: RepConv(4, 7),
        lambda: RepConv(1, 1),
        lambda: SeparableConvNorm(6, 4),
        lambda: SeparableConvNorm(3, 5, 3),
        lambda: ConvNorm(4, 6, 3, stride=2, bias=True),
    ],
)
@pytest.mark.parametrize("size", [(9, 7), (2, 5), (1, 1)])
def test_a_unit_is_one_convolution_borders_included(make, size):
    unit = with_statistics(make().double())
    kernel = unit.kernel()
    x = torch.rand(3, kernel.in_channels, *size, dtype=torch.float64)
    assert type(kernel) is nn.Conv2d and not kernel.training
    torch.testing.assert_close(unit.norm(kernel(x)), unit(x), rtol=0, atol=1e-10)
    chain = unit.chain()
    assert (chain is None) == isinstance(unit, ConvNorm)
    if chain is not None:
        assert all(type(layer) is nn.Conv2d for layer in chain)
        torch.testing.assert_close(unit.norm(nn.Sequential(*chain)(x)), unit(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConvNorm(0, 8), "in_channels must be positive, got 0"),
        (lambda: ConvNorm(3, "8"), "out_channels must be a whole number, got '8'"),
        (lambda: ConvNorm(3, 8, 4), "kernel_size must be odd and positive, got 4"),
        (lambda: ConvNorm(3, 8, bias="no"), "bias must be True or False, got 'no'"),
        (lambda: SeparableConvNorm(3, 8, 4), "kernel_size must be odd and positive, got 4"),
        (lambda: RepConv(4, 0), "out_channels must be positive, got 0"),
    ],
)
def test_what_no_unit_can_be_built_with_is_named(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_have_the_border_and_the_gradients_of_the_first_pass(reentrant):
    x = torch.rand(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    results = []
    for again in (False, True):
        network, inputs = Projecting(with_statistics(RepConv(4, 7).double())).train(), x.clone().requires_grad_()
        y = checkpoint(network, inputs, use_reentrant=reentrant) if again else network(inputs)
        y.sin().sum().backward()
        gradients = [p.grad for p in network.parameters()]
        assert all(gradient.any() for gradient in gradients)
        results.append([y, inputs.grad, *gradients, *network.unit.conv.border.buffers()])
    for plain, anew in zip(*results, strict=True):
        torch.testing.assert_close(anew, plain, rtol=1e-9, atol=1e-9)


class Adapted(nn.Module):
    """A layer with a low-rank one beside it, which shows the weight of the first as its own, as adapters do."""

    def __init__(self, base):
        super().__init__()
        self.base, self.down = base, nn.Conv2d(base.in_channels, 2, 1, bias=False)
        self.up = nn.Conv2d(2, base.out_channels, 1, bias=False)

    @property
    def weight(self):
        return self.base.weight

    def forward(self, frames):
        return self.base(frames) + self.up(self.down(frames))


def with_options(**options):
    """Makes a layer like another one but for these options."""

    def make(layer):
        like = {"padding": layer.padding, "groups": layer.groups, "bias": False}
        return nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size, **{**like, **options})

    return make


@pytest.mark.parametrize("make", [lambda: RepConv(6, 6), lambda: SeparableConvNorm(6, 6, 3), lambda: LinearChain(6, 8)])
@pytest.mark.parametrize(
    ("layer", "other"),
    [
        (-1, Adapted),
        (-1, with_options(bias=True)),
        (0, with_options(bias=True)),
        (-1, with_options(stride=2)),
        ("depthwise", with_options(bias=True)),
        ("depthwise", with_options(groups=2)),
        ("depthwise", with_options(dilation=2)),
        ("depthwise", with_options(padding_mode="circular")),
        (0, nn.utils.parametrizations.weight_norm),
        ("end", lambda _: nn.Hardtanh()),
    ],
)
@torch.no_grad()
def test_a_chain_with_other_layers_is_run_as_it_is(make, layer, other):
    """What its owner has put in the place of a layer is part of every answer."""
    unit = make()
    names = [name for name, part in unit.conv.named_children() if isinstance(part, nn.Conv2d)]
    if layer == "depthwise" and layer not in names:
        pytest.skip("has no such layer")
    name = names[layer] if isinstance(layer, int) else layer
    setattr(unit.conv, name, other(getattr(unit.conv, name, None)))
    unit, x = with_statistics(unit), (torch.rand(2, 3, 6, 5, 4) < 0.4).float()
    network = Projecting(unit).eval()
    before = [*map(id, unit.modules())]
    expected = network(x)
    assert unit.kernel() is None
    for options in ({}, {"sparse": True}, {"dtype": torch.int8}):
        fast = optimize_for_inference(network, compile=False, **options)
        torch.testing.assert_close(fast(x), expected, atol=1e-5, rtol=1e-5)
    with pytest.warns(UserWarning, match="cannot be folded: unit"), folded(network):
        assert [*map(id, unit.modules())] == before


class Projecting(nn.Module):
    def __init__(self, unit):
        super().__init__()
        self.unit = unit

    def forward(self, x):
        return project(self.unit, x)


@torch.no_grad()
def test_a_merged_kernel_is_a_copy_in_the_dtype_of_the_weights():
    unit = with_statistics(RepConv(4, 4))
    kernel, x = unit.kernel(), torch.rand(2, 4, 5, 5)
    before = unit(x)
    kernel.weight.zero_()
    assert kernel.weight.dtype == torch.float32 and torch.equal(unit(x), before)


class Louder(nn.BatchNorm2d):
    def forward(self, frames):
        return 2 * super().forward(frames)


@pytest.mark.parametrize(
    "norm", [Louder(4), nn.BatchNorm2d(4, track_running_stats=False), nn.BatchNorm2d(4, affine=False)]
)
def test_a_chain_with_a_norm_of_another_kind_is_no_kernel(norm):
    assert RepConv(4, 4).kernel() is not None
    for place in ("conv.border.norm", "conv.norm"):
        unit = RepConv(4, 4)
        unit.set_submodule(place, norm)
        assert unit.kernel() is None and unit.chain() is None


class Twice(nn.Sequential):
    def forward(self, frames):
        return super().forward(super().forward(frames))


def test_a_chain_with_a_forward_of_its_own_is_no_kernel():
    unit = SeparableConvNorm(4, 4)
    assert unit.kernel() is not None and unit.chain() is not None
    unit.conv = Twice(OrderedDict(unit.conv.named_children()))
    assert unit.kernel() is None and unit.chain() is None


def test_a_border_without_a_norm_to_make_it_is_refused():
    unit = RepConv(4, 4)
    for options in ({"affine": False}, {"track_running_stats": False}):
        unit.conv.border.norm = nn.BatchNorm2d(4, **options)
        with pytest.raises(ValueError, match="leave that norm its running statistics, weight and bias"):
            unit(torch.rand(2, 4, 5, 5))


class Doubled(ConvNorm):
    def forward(self, frames):
        return 2 * super().forward(frames)


class Inverted(LIF):
    def forward(self, membrane):
        return 1 - super().forward(membrane)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("unit", "neuron"), [(Doubled, LIF), (ConvNorm, Inverted)])
def test_a_forward_of_ones_own_is_called(unit, neuron, training):
    unit, neuron, x = with_statistics(unit(3, 4)).train(training), neuron(), 10 * torch.rand(2, 3, 3, 5, 5)
    expected = unit(x.flatten(0, 1)).unflatten(0, (2, 3))
    assert torch.equal(project(unit, x), expected)
    assert torch.equal(project_and_fire(unit, neuron, x), neuron(expected)) and neuron(expected).any()
    expected = unit.eval()(x.flatten(0, 1)).unflatten(0, (2, 3))
    for sparse in (False, True):
        fast = optimize_for_inference(Projecting(unit).eval(), compile=False, sparse=sparse)
        torch.testing.assert_close(fast(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_border_is_what_the_norm_makes_of_zero(training, memory_format):
    module = with_statistics(PaddedNorm(3).double()).train(training)
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
    padded = module(x)
    assert padded.shape == (2, 3, 6, 7) and padded.is_contiguous(memory_format=memory_format)
    # With the statistics that the step has left behind, in training as well.
    of_zero = module.eval().norm(torch.zeros(1, 3, 6, 7, dtype=torch.float64)).expand(2, -1, -1, -1)
    border = torch.ones(6, 7, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    assert of_zero.abs().min() > 0
    torch.testing.assert_close(padded[..., border], of_zero[..., border], rtol=0, atol=1e-12)
    gradients = torch.autograd.grad(padded[..., border].sum(), [x, *module.parameters()], retain_graph=True)
    assert all(not gradient.any() for gradient in gradients)
    inside = torch.autograd.grad(padded.square().sum(), module.norm.bias)[0]
    torch.testing.assert_close(inside, 2 * padded[..., 1:-1, 1:-1].sum((0, 2, 3)), rtol=0, atol=1e-10)


def test_compiled_training_has_the_same_border_and_gradients():
    results = []
    for compiled in (False, True):
        unit = with_statistics(RepConv(4, 4)).train()
        call = torch.compile(unit, backend="aot_eager") if compiled else unit
        x = torch.rand(2, 4, 5, 5, generator=torch.Generator().manual_seed(1))
        y = call(x)
        y.sin().sum().backward()
        results.append([y, *(p.grad for p in unit.parameters()), *unit.buffers()])
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager)


@pytest.mark.parametrize(
    "make",
    [
        lambda: RepConv(3, 4),
        lambda: SeparableConvNorm(3, 4, 3),
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_a_still_image_counts_at_every_step(make, training):
    """What is shown at every step leaves the norms within a chain as if it came each time."""
    once, repeated = (with_statistics(make()).train(training) for _ in range(2))
    x = torch.rand(1, 2, 3, 6, 6)
    a, b = project(once, x.expand(5, -1, -1, -1, -1)), project(repeated, x.repeat(5, 1, 1, 1, 1))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    for (name, a), b in zip(once.state_dict().items(), repeated.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


class Dropping(nn.Conv2d):
    def forward(self, x):
        return super().forward(nn.functional.dropout(x, 0.5, self.training))


def dropping_input(unit):
    unit.conv = Dropping(3, 4, 3)


def dropping_output(unit):
    unit.norm = nn.Sequential(unit.norm, nn.Dropout(0.5))


def with_noise(unit):
    unit.conv.register_forward_hook(lambda _, given, made: made + torch.randn_like(made))


@pytest.mark.parametrize("change", [dropping_input, dropping_output, with_noise])
def test_layers_that_draw_random_numbers_see_every_frame_of_a_still_image_in_training(change):
    unit = ConvNorm(3, 4, 3)
    change(unit)
    steps = project(unit.train(), torch.rand(1, 2, 3, 6, 6).expand(4, -1, -1, -1, -1))
    assert (steps[1:] != steps[0]).any()


def test_a_norm_within_a_container_counts_every_frame_of_a_still_image():
    x = torch.rand(1, 2, 3, 6, 6).expand(4, -1, -1, -1, -1)
    plain, contained = ConvNorm(3, 4, 3), ConvNorm(3, 4, 3)
    contained.load_state_dict(plain.state_dict())
    contained.norm = nn.Sequential(contained.norm)
    project(plain, x), project(contained, x)
    torch.testing.assert_close(contained.norm[0].state_dict(), plain.norm.state_dict())


@pytest.mark.parametrize("watched", ["depthwise", "border.norm"])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_chain_is_computed_anew_as_it_was(autocast, watched):
    """With a hook all is kept; without one the first layer's result alone, also with another pass in between."""
    torch.manual_seed(0)
    x, other = (torch.rand(2, 3, 4, 5, 6) < 0.4).float(), torch.rand(2, 3, 4, 5, 6)
    results, kept = [], []
    for hooked in (True, False):
        unit = with_statistics(RepConv(4, 7)).train()
        unit.conv.border.norm.eps = unit.conv.norm.eps = 0.5
        if hooked:
            unit.conv.get_submodule(watched).register_forward_hook(lambda *args: None)
        sizes = []

        def note(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        inputs = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                y = project(unit, inputs)
            project(unit, other)
        y.float().sin().sum().backward()
        gradients = {name: p.grad for name, p in unit.named_parameters()}
        results.append([y, inputs.grad, *gradients.values(), *unit.buffers()])
        assert gradients["conv.pointwise1.weight"].any() and gradients["conv.depthwise.weight"].any()
        kept.append(sum(sizes))
    assert kept[1] < 0.6 * kept[0]
    for of_all, anew in zip(*results, strict=True):
        assert torch.equal(anew, of_all)


def to_eval(unit):
    unit.eval()


def norms_to_eval(unit):
    unit.conv.border.eval()


@pytest.mark.parametrize("change", [to_eval, norms_to_eval])
def test_a_mode_set_before_the_backward_pass_changes_no_gradient(change):
    results = []
    for hooked in (True, False):
        unit = with_statistics(RepConv(4, 7)).train()
        if hooked:
            unit.conv.depthwise.register_forward_hook(lambda *args: None)
        y = unit(torch.rand(6, 4, 5, 6))
        change(unit)
        y.sin().sum().backward()
        results.append([p.grad for p in unit.parameters()])
    assert all(gradient.any() for gradient in results[0])
    for of_all, anew in zip(*results, strict=True):
        assert torch.equal(anew, of_all)


def test_weights_of_functional_call_are_those_of_the_backward_pass():
    results = []
    for hooked in (True, False):
        unit = with_statistics(RepConv(4, 7)).train()
        if hooked:
            unit.conv.depthwise.register_forward_hook(lambda *args: None)
        weights = {name: torch.randn_like(p).requires_grad_() for name, p in unit.named_parameters()}
        y = torch.func.functional_call(unit, weights, (torch.rand(6, 4, 5, 6),))
        results.append(torch.autograd.grad(y.sin().sum(), list(weights.values())))
    for of_all, anew in zip(*results, strict=True):
        assert of_all.any() and torch.equal(anew, of_all)


def test_a_weight_that_changes_before_the_backward_pass_is_an_error():
    unit = RepConv(4, 7)
    y = unit(torch.rand(6, 4, 5, 6))
    with torch.no_grad():
        unit.conv.depthwise.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified in place"):
        y.sum().backward()
