"""Gradients by every road of PyTorch: torch.func, gradients of gradients, checkpointed blocks."""

import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

from sdt_blocks import LIF, MembraneShortcut, ParametricLIF, SpikeDrivenSelfAttention, SpikingMLP, SpikingPatchSplitting
from sdt_blocks.neuron import IntegerNeuron
from sdt_blocks.ops import dispatch

DIM = 16


def blocks():
    torch.manual_seed(0)
    net = nn.Sequential(
        SpikingPatchSplitting(DIM, in_channels=2, pooling="0101", neuron=ParametricLIF),
        MembraneShortcut(SpikeDrivenSelfAttention(DIM, num_heads=4, neuron=ParametricLIF)),
        MembraneShortcut(SpikingMLP(DIM, neuron=LIF)),
    ).double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, 0.5, 0.5)
    return net, torch.rand(3, 4, 2, 8, 8, dtype=torch.float64)


@pytest.fixture
def told(monkeypatch):
    """The warnings of falling back, as if none had been given before."""
    monkeypatch.setattr(dispatch, "_warned", set())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lambda: [str(one.message) for one in caught if "reference runs" in str(one.message)]


def grads_of(model, images, labels, **options):
    model.zero_grad()
    nn.functional.cross_entropy(model(images), labels, **options).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_by_torch_func_of_every_family(small, told):
    model, images, labels = small.model.double(), small.images.double(), torch.tensor([0, 1, 2, 3])
    weights, buffers = dict(model.named_parameters()), dict(model.named_buffers())

    def loss(weights, images, labels):
        return nn.functional.cross_entropy(functional_call(model, (weights, buffers), (images,)), labels)

    def of_sample(weights, image, label):
        return loss(weights, image[None], label[None])

    expected = grads_of(model, images, labels)
    weights = {name: value.detach() for name, value in weights.items()}
    found = grad(loss)(weights, images, labels)
    each = vmap(grad(of_sample), in_dims=(None, 0, 0))(weights, images, labels)
    assert sum(value.abs().sum() > 0 for value in expected.values()) > len(expected) / 2
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, atol=1e-10, rtol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
        torch.testing.assert_close(
            each[name].mean(0), value, atol=1e-10, rtol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    alone = grads_of(model, images[2:3], labels[2:3])
    torch.testing.assert_close(each["head.weight"][2], alone["head.weight"])
    direction = {name: torch.randn_like(value) for name, value in weights.items()}
    _, slope = jvp(lambda weights: loss(weights, images, labels), (weights,), (direction,))
    torch.testing.assert_close(slope, sum((direction[name] * value).sum() for name, value in expected.items()))
    assert slope.abs() > 1e-6
    assert len(told()) == 1 and "torch.func and forward-mode gradients" in told()[0]


def test_grad_around_vmap_sees_the_surrogate():
    x = torch.linspace(0.2, 1.8, 12, dtype=torch.float64).view(3, 4)
    for neuron in (LIF(), ParametricLIF(), IntegerNeuron(levels=4)):
        (expected,) = torch.autograd.grad(neuron(leaf := x.clone().requires_grad_()).sum(), leaf)
        inside = grad(lambda x, neuron=neuron: vmap(neuron, in_dims=1)(x).sum())(x)
        assert expected.abs().sum() > 0
        torch.testing.assert_close(inside, expected)


def test_forward_mode_without_torch_func():
    from torch.autograd import forward_ad

    x, direction = torch.linspace(0.2, 1.8, 12).view(3, 4), torch.ones(3, 4)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(LIF()(forward_ad.make_dual(x, direction))).tangent
    expected = torch.func.jvp(LIF(), (x,), (direction,))[1]
    assert tangent.abs().sum() > 0
    torch.testing.assert_close(tangent, expected)


@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_gradients_are_those_of_the_equations(training, told, monkeypatch):
    net, x = blocks()
    net(x)  # statistics that a second pass in eval mode fires by
    net.train(training)
    found = {}
    for backend in ("compiled", "reference"):
        monkeypatch.setenv("SDT_BLOCKS_BACKEND", backend)
        state = {key: value.clone() for key, value in net.state_dict().items()}
        leaf = x.clone().requires_grad_()
        y = net(leaf)
        names, weights = zip(*net.named_parameters(), strict=True)
        first = torch.autograd.grad(
            (y * y.detach().cos()).sum(), (leaf, *weights), create_graph=True, allow_unused=True
        )
        penalty = sum(value.square().sum() for value in first if value is not None)
        second = torch.autograd.grad(penalty, (leaf, *weights), allow_unused=True)
        found[backend] = dict(zip(("x", *names), zip(first, second, strict=True), strict=True))
        net.load_state_dict(state)
    alive = 0
    for order in (0, 1):
        expected = {name: pair[order] for name, pair in found["reference"].items() if pair[order] is not None}
        got = {name: pair[order] for name, pair in found["compiled"].items() if pair[order] is not None}
        assert got.keys() == expected.keys()
        # A bias in front of a norm has no gradient but for rounding.
        close = {"atol": 1e-10 * max(value.abs().max().item() for value in expected.values()), "rtol": 1e-6}
        for name, value in expected.items():
            alive += bool(value.abs().max() > close["atol"])
            torch.testing.assert_close(got[name], value, msg=lambda text, name=name: f"{name}: {text}", **close)
    assert alive > len(found["reference"])
    assert [one for one in told() if "gradients of gradients" in one] and len(told()) == 1


def test_hessian_of_a_neuron():
    """Of the sum of spikes: the surrogate's own derivative, by two roads of torch.func."""
    x = torch.linspace(-1, 3, 9, dtype=torch.float64)
    neuron = LIF(tau=2.0)
    of = lambda x: neuron(x[None]).sum()  # noqa: E731
    p = torch.sigmoid(4 * (x / 2 - 1))
    expected = torch.diag(4 * 4 * p * (1 - p) * (1 - 2 * p) / 4)
    torch.testing.assert_close(hessian(of)(x), expected)
    torch.testing.assert_close(jacrev(jacrev(of))(x), expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_blocks(use_reentrant):
    net, x = blocks()
    patch, *rest = net
    found = []
    for again in (False, True):
        net.zero_grad()
        y = patch(x)
        for block in rest:
            y = checkpoint(block, y, use_reentrant=use_reentrant) if again else block(y)
        y.square().sum().backward()
        found.append({name: p.grad.clone() for name, p in net.named_parameters()})
    assert all(value.abs().sum() > 0 for name, value in found[0].items() if "fc" in name)
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, msg=lambda text, name=name: f"{name}: {text}")
