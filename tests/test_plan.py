"""Plans of any network: what is traced, what is kept as it is, and the same answers in every form."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import snntorch
import torch
from torch import Tensor, nn

from sdt_blocks import (
    LIF,
    MembraneShortcut,
    ParametricLIF,
    SpikeDrivenSelfAttention,
    SpikeDrivenTransformer,
    SpikingMLP,
    SpikingPatchSplitting,
    calibrate_norms,
    create_model,
    optimize_for_inference,
    over_time,
)
from sdt_blocks.blocks import (
    AcrossImages,
    ConvNorm,
    ConvolutionBlock,
    Downsampling,
    LinearSpikeAttention,
    MaskMixer,
    QKMixer,
    RepConv,
)
from sdt_blocks.inference import Dense, Events, dense, plan
from sdt_blocks.neuron import IntegerNeuron
from sdt_blocks.neuron.replacing import InSteps
from sdt_blocks.steps import fire, pool, present, project, project_and_fire, project_and_mix, shortcut


class TimeFirst(nn.Module):
    """A network of one's own, mixed from the kit's blocks; its input is `[T, B, C, H, W]`."""

    def __init__(self, dim: int = 32, head: int = 3) -> None:
        super().__init__()
        self.patch = SpikingPatchSplitting(dim, in_channels=1, pooling="0001", neuron=ParametricLIF)
        self.blocks = nn.Sequential(
            MembraneShortcut(SpikingMLP(dim)),
            MembraneShortcut(SpikeDrivenSelfAttention(dim, num_heads=4, neuron=ParametricLIF), drop_path=0.1),
        )
        self.fire = LIF(tau=1.5, reset="subtract", surrogate="atan")
        self.head = nn.Linear(dim, head)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        membrane = self.blocks(self.patch(x)).mean((-2, -1))
        logits = self.head(self.fire(membrane)).mean(0)
        return logits if scale is None else logits * scale


class SoftmaxAttention(nn.Module):
    """A foreign attention, whose arithmetic is plain PyTorch."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.neuron, self.qkv = LIF(), nn.Linear(dim, 3 * dim)

    def forward(self, membrane: Tensor) -> Tensor:
        tokens = self.neuron(membrane).flatten(3).transpose(-1, -2)
        q, k, v = self.qkv(tokens).chunk(3, dim=-1)
        mixed = ((q @ k.transpose(-1, -2)) * 0.1).softmax(-1) @ v
        return mixed.transpose(-1, -2).reshape(membrane.shape)


class Convolutional(nn.Module):
    """A plain convolutional network of snnTorch's neurons, time steps folded into the batch for the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 12, 5), nn.Conv2d(12, 24, 3, stride=2)
        self.norm = nn.BatchNorm2d(24)
        self.fire1, self.fire2 = (over_time(snntorch.Leaky(beta=0.8)) for _ in range(2))
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        spikes = pool(self.pool, fire(self.fire1, project(self.conv1, x)))
        frames = self.norm(self.conv2(spikes.flatten(0, 1)))
        spikes = self.fire2(frames.unflatten(0, x.shape[:2]))
        return self.head(spikes.mean((-2, -1))).mean(0)


class PlainLayers(nn.Module):
    """Torch's own layers on frames, and every way back to the sequence."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        widths = [(2, dim), (dim, dim), (dim, dim), (dim, 5)]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1, bias=b == 5) for a, b in widths)
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for _, b in widths[:3])
        self.neurons = nn.ModuleList(LIF(tau=1.3) for _ in widths[:3])
        self.pool, self.mean = nn.MaxPool2d(2), nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        steps, batch = x.shape[:2]
        spikes = self.neurons[0](self.norms[0](self.convs[0](x.flatten(0, 1))).unflatten(0, x.shape[:2]))
        frames = self.pool(torch.flatten(spikes, 0, end_dim=1))
        membrane = torch.unflatten(self.norms[1](self.convs[1](frames)), 0, (steps, batch))
        membrane = self.norms[2](self.convs[2](self.neurons[1](membrane).flatten(0, 1))).unflatten(
            0, (x.size(0), x.shape[1])
        )
        spikes = self.mean(self.neurons[2](membrane).flatten(0, 1)).unflatten(dim=0, sizes=x.size()[0:2])
        return self.convs[3](spikes.flatten(0, 1)).unflatten(0, spikes.shape[:2]).mean((0, -2, -1))


class Entangled(nn.Module):
    """Frames that do not go back to where they came from, or that others take too."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, dim, 3, padding=1), nn.Conv2d(dim, dim, 3, padding=1)
        self.norm, self.other, self.neuron, self.last = nn.BatchNorm2d(dim), nn.BatchNorm2d(dim), LIF(), LIF()

    def forward(self, x: Tensor) -> Tensor:
        frames = self.first(x.flatten(0, 1))
        membrane = (self.norm(frames) + 0.1 * frames).unflatten(0, x.shape[:2])
        swapped = self.neuron(membrane).flatten(0, 1).unflatten(0, (x.shape[1], x.shape[0]))
        height, width = swapped.shape[-2:]
        change = self.other(self.second(swapped.flatten(0, 1)).mul(height / width)).unflatten(0, (4, -1))
        return self.last(self.other(frames).unflatten(0, (x.size(0), -1)) + change).mean((0, -2, -1))


class SpikeResidual(nn.Module):
    """Spikes added to spikes are counts, which no product may take for spikes."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.first, self.second, self.down = ConvNorm(2, dim, 3), ConvNorm(dim, dim), ConvNorm(dim, dim, 3, stride=2)
        self.wide = ConvNorm(dim, dim, 7, groups=dim)
        self.fire1, self.fire2, self.fire3, self.fire4 = (LIF(tau=1.3) for _ in range(4))
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, dim).view(dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        spikes = project_and_fire(self.first, self.fire1, x)
        counts = spikes + project_and_fire(self.second, self.fire2, spikes)
        membrane = project(self.down, counts) * self.scale
        spikes = fire(self.fire3, membrane)
        return fire(self.fire4, shortcut(membrane, project(self.wide, spikes))).mean((0, -2, -1))


class Hierarchical(nn.Module):
    """Meta-SpikeFormer's blocks: strides, depthwise chains, re-parameterized 3x3, linear attention."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.down1 = Downsampling(2, dim, kernel_size=7, neuron=None)
        self.convolutions = ConvolutionBlock(dim, hidden=24, neuron=partial(LIF, tau=1.5))
        self.down2 = Downsampling(dim, 2 * dim)
        self.attention = MembraneShortcut(LinearSpikeAttention(2 * dim, num_heads=4, neuron=partial(LIF, tau=1.5)))
        self.fire, self.head = LIF(tau=1.5), nn.Linear(2 * dim, 5)

    def forward(self, x: Tensor) -> Tensor:
        membrane = self.down2(self.convolutions(self.down1(x)))
        return self.head(fire(self.fire, self.attention(membrane)).flatten(3).mean(3)).mean(0)


class Rearranged(nn.Module):
    """Spikes moved about by plain PyTorch, a position that is broadcast, options given by keyword."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.first, self.second, self.third = ConvNorm(2, dim, 3), ConvNorm(dim, dim), ConvNorm(dim, dim, 3)
        self.fire1, self.fire2, self.fire3 = (LIF(tau=1.3) for _ in range(3))
        self.position = nn.Parameter(torch.rand(1, 1, dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        spikes = project_and_fire(self.first, self.fire1, x=x)
        spikes = spikes.flatten(0, 1).roll(1, 1).unflatten(0, (4, -1))
        membrane = self.position + project(self.second, spikes)
        spikes = fire(self.fire2, membrane).transpose(-1, -2).contiguous()
        membrane = shortcut(membrane.mT, change=project(self.third, spikes), drop_path=0.0)
        return fire(self.fire3, membrane).mean((0, -2, -1))


class Branching(nn.Module):
    def forward(self, membrane: Tensor) -> Tensor:
        return membrane + 0.1 if membrane.mean() > -5 else membrane


def v1(attention: bool = False) -> nn.Module:
    model = SpikeDrivenTransformer(depth=2, dim=32, num_heads=4, num_classes=5, pooling="0011")
    if attention:
        model.blocks[0].attention.branch = SoftmaxAttention(32)
    return model


def opaque() -> nn.Module:
    network = TimeFirst()
    network.blocks.insert(1, Branching())
    return network


NETWORKS = {
    "v1": (v1, (6, 3, 16, 16)),
    "v1, foreign attention": (partial(v1, True), (6, 3, 16, 16)),
    "time first": (TimeFirst, (4, 6, 1, 12, 12)),
    "opaque part": (opaque, (4, 6, 1, 12, 12)),
    "snnTorch": (Convolutional, (5, 6, 1, 16, 16)),
    "plain layers": (PlainLayers, (4, 6, 2, 10, 9)),
    "entangled": (Entangled, (4, 6, 2, 8, 7)),
    "rearranged": (Rearranged, (4, 6, 2, 8, 7)),
    "hierarchical": (Hierarchical, (3, 6, 2, 17, 13)),
    "counts, strides, groups": (SpikeResidual, (4, 6, 2, 11, 9)),
}


def lively(name: str) -> tuple[nn.Module, Tensor]:
    """A network whose samples get different answers, and its input."""
    make, shape = NETWORKS[name]
    torch.manual_seed(3)
    model, x = make(), torch.rand(shape)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.6, 1.4)
            nn.init.normal_(module.bias, 0.4, 0.2)
    calibrate_norms(model, [x])
    return model.eval(), x


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_every_form_answers_as_the_network(name: str) -> None:
    model, x = lively(name)
    expected = model(x)
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        forms = {
            "dense": Dense(plan(model), compile=False),
            "compiled": Dense(plan(model)),
            "pinned": optimize_for_inference(model, paths="convolution"),
            "events": Events(plan(model)),
        }
    for form, fast in forms.items():
        torch.testing.assert_close(fast(x), expected, atol=1e-5, rtol=1e-5, msg=form)
    # The kernels know no 5x5 and no stride, and nobody knows what comes of frames that others take: all is dense there.
    assert (len(list(forms["events"].products())) > 0) == (name not in ("snnTorch", "entangled"))


class Scaled(nn.Module):
    """Spikes of another height than 1: a factor of the network's own between its neurons and its weights."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.first, self.second, self.third = ConvNorm(2, 16, 3), ConvNorm(16, 16), ConvNorm(16, 16, 3)
        self.fire1, self.fire2, self.factor = LIF(tau=1.3), LIF(tau=1.3), factor

    def forward(self, x: Tensor) -> Tensor:
        spikes = project_and_fire(self.first, self.fire1, x)
        masked = spikes * project_and_fire(self.second, self.fire2, torch.mul(spikes, self.factor))
        return project(self.third, self.factor * masked).mean((0, -2, -1))


@pytest.mark.parametrize("paths", ["linear", "integers", "digits"])
@torch.no_grad()
def test_scaled_spikes_are_no_spikes(paths: str) -> None:
    """Products that take whole numbers would round them to nothing."""
    torch.manual_seed(0)
    model, x = Scaled(0.4), torch.rand(3, 4, 2, 6, 6)
    calibrate_norms(model, [x])
    expected = model.eval()(x)
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    forms = {"pinned": {"paths": paths}, "events": {"sparse": True}, "exact": {"exact": True}}
    for form, options in forms.items():
        torch.testing.assert_close(
            optimize_for_inference(model, **options)(x), expected, atol=1e-5, rtol=1e-5, msg=form
        )


@pytest.mark.filterwarnings("ignore:kept as it is")
@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "snnTorch"])  # its neurons know no float64
@torch.no_grad()
def test_float64_is_exact(name: str) -> None:
    model, x = lively(name)
    model, x = model.double(), x.double()
    expected = model(x)
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    fast = optimize_for_inference(model, torch.float64)
    assert (fast(x) - expected).abs().max() <= 1e-12


@pytest.mark.filterwarnings("ignore:kept as it is")
@pytest.mark.parametrize("own", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["v1, foreign attention", "opaque part", "rearranged"])
@torch.no_grad()
def test_a_form_has_a_precision_of_its_own(name: str, own: torch.dtype) -> None:
    """Layers that run as they are take what folded ones make, whatever the model was kept in, and under autocast."""
    model, x = lively(name)
    model = model.to(own)
    exact = copy.deepcopy(model).double()(x.double())
    assert (exact[0] - exact[1]).abs().max() > 1e-3
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        fast = optimize_for_inference(model, dtype, compile=False)
        for given in (x, x.to(dtype)):
            found = fast(given)
            assert found.dtype == dtype
            torch.testing.assert_close(found.double(), exact, atol=tolerance, rtol=tolerance)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(fast(given), found)


@torch.no_grad()
def test_autocast_around_every_form_changes_nothing() -> None:
    model, x = lively("v1")
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(x)
    assert (rounded - model(x)).abs().max() > 1e-3
    for options in ({}, {"dtype": torch.bfloat16}, {"sparse": True}, {"dtype": torch.int8}, {"exact": True}):
        fast = optimize_for_inference(model, **options)
        expected = fast(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(fast(x), expected), options


@pytest.mark.parametrize("options", [{}, {"sparse": True}, {"exact": True}])
def test_a_form_is_not_cast(options: dict[str, bool]) -> None:
    """Weights are folded, packed or whole numbers by then: a cast would round what is said to be exact."""
    model, x = lively("v1")
    fast = optimize_for_inference(model, compile=False, **options)
    expected = fast(x)
    for cast in (fast.half, fast.double, lambda: fast.to(torch.bfloat16)):
        with pytest.raises(TypeError, match=r"keeps its torch\.float32.* build it again"):
            cast()
    assert torch.equal(fast.to("cpu").float()(x), expected)


def test_plain_layers_are_steps() -> None:
    model, _ = lively("plain layers")
    found = [node.op for node in plan(model).nodes]
    assert found == [
        "input", "project", "fire", "pool", "project", "fire", "project", "fire", "pool", "project", "call", "output",
    ]  # fmt: skip
    # The norm behind a convolution that others take stays, and one that stands apart from it.
    targets = [node.target for node in plan(lively("entangled")[0]).nodes]
    assert sum(isinstance(target, nn.BatchNorm2d) for target in targets) == 3


class Told(nn.Module):
    """A pooling, a convolution and a norm between two neurons, one of them with a setting that folds or runs apart."""

    def __init__(self, **setting: Any) -> None:
        super().__init__()
        of = {kind: setting.get(kind, {}) for kind in ("pool", "conv", "norm")}
        self.fire, self.last = LIF(), LIF(threshold=0.5)
        self.pool = nn.MaxPool2d(3, 2, 1, **of["pool"])
        self.conv = nn.Conv2d(4, 6, 3, **{"padding": 1, **of["conv"]})
        self.norm = nn.BatchNorm2d(6, **{"momentum": 1.0, **of["norm"]})

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pool(self.fire(x).flatten(0, 1))
        frames = self.norm(self.conv(pooled[0] if self.pool.return_indices else pooled))
        return self.last(frames.unflatten(0, x.shape[:2]))


@pytest.mark.parametrize("options", [{}, {"sparse": True}])
@pytest.mark.parametrize(
    "setting",
    [
        {"conv": {"padding_mode": "circular"}},
        {"conv": {"padding": "same"}},
        {"conv": {"dilation": 2, "padding": 2}},
        {"norm": {"affine": False}},
        {"norm": {"track_running_stats": False}},
        {"pool": {"return_indices": True}},
        {"pool": {"ceil_mode": True}},
    ],
    ids=str,
)
@torch.no_grad()
def test_settings_of_plain_layers(setting: dict[str, Any], options: dict[str, bool]) -> None:
    torch.manual_seed(0)
    network, x = Told(**setting), torch.randn(3, 2, 4, 6, 9) + 1
    network(x)
    network.eval()
    expected = network(x)
    fast = optimize_for_inference(network, compile=False, **options)
    assert torch.equal(fast(x), expected)
    assert 0.05 < expected.mean() < 0.95


class Nested(nn.Module):
    """A list, a dictionary and tuples, one within another."""

    class Pair(NamedTuple):
        spikes: Any
        others: Any

    def __init__(self) -> None:
        super().__init__()
        self.fire = LIF()

    def forward(self, x: Tensor) -> Any:
        spikes = self.fire(2 * x)
        return [spikes, {"list": [x, 1]}, (spikes, None), Nested.Pair(spikes, [x])]


@pytest.mark.parametrize("options", [{}, {"sparse": True}])
def test_an_output_has_the_types_of_the_network(options: dict[str, bool]) -> None:
    network, x = Nested(), torch.rand(4, 2, 3, 5, 5)
    made, expected = optimize_for_inference(network, compile=False, **options)(x), network(x)

    def compare(one: Any, other: Any) -> None:
        assert type(one) is type(other)
        if isinstance(one, Tensor):
            assert torch.equal(one, other)
        elif isinstance(one, list | tuple | dict):
            assert len(one) == len(other)
            pairs = zip(*(each.values() if isinstance(each, dict) else each for each in (one, other)), strict=True)
            for pair in pairs:
                compare(*pair)

    compare(made, expected)
    made.append(x)


class Late(nn.Module):
    """What a product is added to is computed after it."""

    def __init__(self) -> None:
        super().__init__()
        self.fire, self.last = LIF(), LIF(threshold=0.1)
        self.branch, self.before = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        spikes = fire(self.fire, x)
        change = project(self.branch, spikes)
        return fire(self.last, shortcut(4 * project(self.before, spikes), change))


@pytest.mark.parametrize("options", [{}, {"sparse": True}])
@torch.no_grad()
def test_a_shortcut_that_comes_after_its_branch(options: dict[str, bool]) -> None:
    torch.manual_seed(0)
    network, x = Late().eval(), torch.randn(3, 2, 4, 5, 6) + 1
    expected = network(x)
    assert torch.equal(optimize_for_inference(network, compile=False, **options)(x), expected)
    assert 0.05 < expected.mean() < 0.95


class Overwritten(PlainLayers):
    """Frames that are overwritten after their layers."""

    def forward(self, x: Tensor) -> Tensor:
        frames = self.convs[0](x.flatten(0, 1))
        self.norms[0](frames).mul_(2)
        frames.mul_(-1).add_(1)
        return self.neurons[0](frames.unflatten(0, x.shape[:2])).mean((0, -2, -1))


@torch.no_grad()
def test_frames_that_are_overwritten_are_left_alone() -> None:
    torch.manual_seed(0)
    model, x = Overwritten().eval(), torch.rand(3, 4, 2, 6, 6) * 4
    expected = model(x)
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    for fast in (optimize_for_inference(model), optimize_for_inference(model, sparse=True)):
        torch.testing.assert_close(fast(x), expected, atol=1e-5, rtol=1e-5)


def test_only_what_cannot_be_traced_is_kept_and_named_once() -> None:
    with pytest.warns(UserWarning) as caught:
        found = plan(opaque())
    assert len(caught) == 1 and "blocks.1 (symbolically traced" in str(caught[0].message)
    assert next(node.name for node in found.nodes if node.op == "call") == "blocks.1"
    assert sum(node.op in ("project", "mix") for node in found.nodes) == 9


class Asking(nn.Module):
    """Code that goes another way for what is no tensor, as a traced value is not yet."""

    def __init__(self, ask: Callable[[object], bool]) -> None:
        super().__init__()
        self.ask = ask

    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if self.ask(x) else x - 1


def matches(x: object) -> bool:
    match x:
        case Tensor():
            return True
    return False


@pytest.mark.parametrize(
    "ask",
    [
        torch.is_tensor,
        lambda x: isinstance(x, Tensor),
        lambda x: not isinstance(x, Sequence),
        matches,
        lambda x: x.__class__ is Tensor,
        lambda x: not hasattr(x, "mask"),
        lambda x: getattr(x, "mask", None) is None,
    ],
)
@torch.no_grad()
def test_what_asks_for_a_type_is_kept_as_it_is(ask: Callable[[object], bool]) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(ConvNorm(2, 4), Asking(ask), nn.Conv2d(4, 3, 1)).eval(), torch.rand(2, 2, 3, 3)
    with pytest.warns(UserWarning, match=r"1 \(it asks (for the type of|whether) a value"):
        fast = optimize_for_inference(model, compile=False)
    torch.testing.assert_close(fast(x), model(x))


def is_tensor(x: object) -> bool:
    return type(x) is Tensor


class AskingItself(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if type(x) in (Tensor, nn.Parameter) else x - 1


class AskingByAFunction(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return self.answer(x)

    def answer(self, x: Tensor) -> Tensor:
        return x + 1 if is_tensor(x) else x - 1


class AskingFirst(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        kind = type(x)
        y = x + 1
        return y if kind is Tensor else x - 1


class AskingATable(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + {Tensor: 1}.get(type(x), -1)


class AskingByAnAttribute(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.step = lambda x: 1 if type(x) is Tensor else -1

    def forward(self, x: Tensor) -> Tensor:
        return x + self.step(x)


class AskingOfItself(nn.Module):
    """Which a trace knows."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if type(self) is AskingOfItself else x - 1


class AskingForAName(nn.Module):
    """For a message, which is not written here."""

    def forward(self, x: Tensor, most: int = 1) -> Tensor:
        if most < 1:
            raise ValueError(f"a {type(x).__name__}, {type(x)}, {type(x)!r}")
        return x + most


KNOWN = (AskingOfItself, AskingForAName)


@pytest.mark.parametrize(
    "kind", [AskingItself, AskingByAFunction, AskingFirst, AskingATable, AskingByAnAttribute, *KNOWN]
)
@torch.no_grad()
def test_comparing_the_type_of_a_value_is_asking_for_it(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(ConvNorm(2, 4), kind(), nn.Conv2d(4, 3, 1)).eval(), torch.rand(2, 2, 3, 3)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fast = optimize_for_inference(model, compile=False)
    torch.testing.assert_close(fast(x), model(x))
    assert ["it asks for the type of a value" in str(one.message) for one in told] == [True] * (kind not in KNOWN)


@pytest.mark.parametrize("wrap", [partial(torch.compile, backend="eager"), nn.DataParallel])
@torch.no_grad()
def test_wrappers_are_looked_through(wrap: Callable[[nn.Module], nn.Module]) -> None:
    """Around the whole network and around a part of it."""
    model, x = lively("time first")
    expected, products = model(x), len(list(Events(plan(model)).products()))
    inner = copy.deepcopy(model)
    inner.blocks[0] = wrap(inner.blocks[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        forms = [optimize_for_inference(network, sparse=True) for network in (wrap(model).eval(), inner)]
    for fast in forms:
        assert len(list(fast.products())) == products > 0
        torch.testing.assert_close(fast(x), expected, atol=1e-5, rtol=1e-5)


class Summing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unit, self.neuron = ConvNorm(2, 8, 3), LIF(tau=1.3)

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return fire(self.neuron, project(self.unit, x) + project(self.unit, y) - project(self.unit, z))


class Greedy(Summing):
    def forward(self, x: Tensor, y: Tensor, z: Tensor, u: Tensor, v: Tensor) -> Tensor:
        return super().forward(x, y, z) + u + v


@torch.no_grad()
def test_several_inputs() -> None:
    torch.manual_seed(0)
    model, given = Summing().eval(), [torch.rand(3, 4, 2, 6, 6) * scale for scale in (6, 5, 4)]
    expected = model(*given)
    assert 0.01 < expected.mean() < 0.99
    for sparse in (False, True):
        torch.testing.assert_close(optimize_for_inference(model, sparse=sparse)(*given), expected)
    with pytest.raises(ValueError, match=r"at most four inputs.*Greedy\.forward requires 5"):
        optimize_for_inference(Greedy())


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen + x.mean()
        return x + self.seen


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand(1)


class InPlace(nn.Module):
    """What is written in place is seen by those who took the value before."""

    def __init__(self) -> None:
        super().__init__()
        self.unit, self.neuron, self.after = ConvNorm(2, 8, 3), LIF(), ConvNorm(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        membrane = project(self.unit, x)
        spikes = fire(self.neuron, membrane)
        membrane.mul_(0.5)
        return (membrane + project(self.after, spikes)).mean((0, -2, -1))


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.inner(x).float()


@torch.no_grad()
def test_autocast_within_is_kept() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Autocast(), nn.Conv2d(2, 3, 1)).eval(), torch.randn(4, 2, 5, 5)
    with pytest.warns(UserWarning, match=r"0 \(it sets autocast"):
        fast = optimize_for_inference(model)
    assert (model(x) - model[1](model[0].inner(x))).abs().max() > 1e-4
    torch.testing.assert_close(fast(x), model(x))


def test_what_a_product_cannot_take_is_refused_by_name() -> None:
    model, x = lively("counts, strides, groups")
    for fast in (optimize_for_inference(model), optimize_for_inference(model, sparse=True)):
        with pytest.raises(TypeError, match=r"first expects .* got torch.uint8"):
            fast((x * 255).to(torch.uint8))
    model, x = lively("time first")
    for fast in (optimize_for_inference(model), optimize_for_inference(model, sparse=True)):
        with pytest.raises(ValueError, match=r"\[T, B, 1, H, W\]"):
            fast(x[0])


class Counting(nn.Module):
    """A number that grows from call to call, as Python's own or as a buffer, written into or replaced."""

    def __init__(self, start: Any, in_place: bool = False) -> None:
        super().__init__()
        self.register_buffer("calls", start) if isinstance(start, Tensor) else setattr(self, "calls", start)
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        if self.in_place:
            self.calls += 1
        else:
            self.calls = self.calls + 1
        return x * self.calls


class Hoarding(nn.Module):
    """Keeps a state where no attribute shows it."""

    def __init__(self, state: Any, count: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.state, self.count = state, count

    def forward(self, x: Tensor) -> Tensor:
        return x * self.count(self.state, x)


def sum_of_all(state: list[Tensor], x: Tensor) -> Any:
    state.append(x)
    return sum(state)


class Shaken(nn.Module):
    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        return x + self.draw()


@torch.no_grad()
def test_a_counter_that_changes_nothing_costs_nothing() -> None:
    class Counted(Convolutional):
        calls, table = 0, None

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.table = torch.arange(4.0) if self.table is None else self.table
            return super().forward(x) * self.table

    torch.manual_seed(0)
    model, x = Counted().eval(), torch.rand(3, 2, 1, 16, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast = optimize_for_inference(model, compile=False)
    torch.testing.assert_close(fast(x), model(x), atol=1e-5, rtol=1e-5)
    assert model.calls == 1 and any(node.op == "project" for node in fast.plan.nodes)


UNLIKE = "another one from call to call"


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (Stateful, "keeps a state"),
        (partial(Counting, 0), "keeps a state"),
        (partial(Counting, torch.zeros(())), "keeps a state"),
        (partial(Counting, torch.zeros(()), in_place=True), "keeps a state"),
        (partial(Hoarding, {}, lambda state, x: state.setdefault(len(state), len(state))), UNLIKE),
        (partial(Hoarding, [], sum_of_all), UNLIKE),
        (partial(Hoarding, random.Random(0), lambda state, x: state.random()), UNLIKE),
        (partial(Hoarding, np.random.default_rng(0), lambda state, x: state.random()), UNLIKE),
        (Noisy, "random numbers"),
        (partial(Shaken, lambda: random.random()), "random numbers"),
        (partial(Shaken, lambda: np.random.rand()), "random numbers"),  # noqa: NPY002
    ],
)
def test_state_and_chance_are_not_frozen_into_a_plan(make, why: str) -> None:
    model = nn.Sequential(ConvNorm(2, 2), make()).eval()
    with pytest.warns(UserWarning, match=why):
        fast = optimize_for_inference(model)
    first, second = fast(torch.ones(1, 2, 3, 3)), fast(torch.ones(1, 2, 3, 3))
    assert not torch.equal(first, second)
    if why != "random numbers":
        torch.testing.assert_close([first, second], [model(torch.ones(1, 2, 3, 3)) for _ in range(2)])


@torch.no_grad()
def test_networks_of_the_kit_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody has put code of their own; each chain of layers is merged once in all."""
    calls: dict[Any, int] = {}

    def counted(kind: Any, name: str) -> None:
        whole = getattr(kind, name)

        def count(self: Any, *given: Any) -> Any:
            calls[name] = calls.get(name, 0) + 1
            return whole(self, *given)

        monkeypatch.setattr(kind, name, count)

    counted(RepConv, "kernel")
    counted(torch.fx.Tracer, "trace")
    model, x = create_model("sdt_v2_15m", dims=(8, 16, 24, 32)).eval(), torch.rand(1, 3, 32, 32)
    chains = sum(isinstance(module, RepConv) for module in model.modules())
    optimize_for_inference(model, compile=False)
    assert calls == {"trace": 1, "kernel": chains} and chains > 4
    seen: list[int] = []
    model.forward_head = lambda features: features.mean((0, 3, 4)) + (seen.append(0) or len(seen))
    with pytest.warns(UserWarning, match=UNLIKE):
        fast = optimize_for_inference(model, compile=False)
    given = [fast(x), fast(x)]
    torch.testing.assert_close(given[1] - given[0], torch.ones_like(given[0]))


class InLoop(nn.Module):
    """A layer and a neuron as in snnTorch's tutorials: one step at a time, from a membrane that each call resets."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.lif = nn.Linear(4, 8), InSteps(LIF(threshold=0.2))

    def forward(self, x: Tensor) -> Tensor:
        membrane, spikes = self.lif.reset_mem(), []
        for t in range(5):
            fired, membrane = self.lif(self.fc(x[t]), membrane)
            spikes.append(fired)
        return torch.stack(spikes)


@torch.no_grad()
def test_what_each_call_resets_is_no_state() -> None:
    model, x = InLoop().eval(), torch.rand(5, 3, 4)
    expected = model(x)
    assert expected.any() and not expected.all()
    model.lif.mem = torch.rand(3, 8)
    with pytest.warns(UserWarning, match="lif") as told:
        fast = optimize_for_inference(model)
    assert not any("keeps a state" in str(one.message) for one in told) and len(fast.plan.nodes) > 10
    for given in (x, 1 - x):
        torch.testing.assert_close(fast(given), model(given))


class Part(nn.Module):
    """Branches on a tensor; a network around it counts in it."""

    count = 0

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class CountingInAPart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = Part()

    def forward(self, x: Tensor) -> Tensor:
        self.part.count += 1
        return self.part(x) * self.part.count


def test_a_state_in_what_is_kept_as_it_is_keeps_the_network() -> None:
    with pytest.warns(UserWarning, match="CountingInAPart .it keeps a state"):
        fast = optimize_for_inference(CountingInAPart().eval())
    assert [fast(torch.ones(2)).sum().item() for _ in range(3)] == [2.0, 4.0, 6.0]


@torch.no_grad()
def test_changes_in_place_are_kept() -> None:
    torch.manual_seed(0)
    model, x = InPlace().eval(), torch.rand(3, 4, 2, 6, 6) * 4
    expected = model(x)
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    for fast in (optimize_for_inference(model), optimize_for_inference(model, sparse=True)):
        torch.testing.assert_close(fast(x), expected, atol=1e-5, rtol=1e-5)


def test_hooks_are_still_called_and_said() -> None:
    model, x = lively("time first")
    seen: list[float] = []
    model.blocks[0].branch.fc1.conv.register_forward_hook(lambda module, args, out: seen.append(out.mean().item()))
    with pytest.warns(UserWarning, match=r"blocks.0.branch.fc1 \(it has hooks, or a call of its own\)") as told:
        fast = optimize_for_inference(model)
    assert len(told) == 1
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), atol=1e-5, rtol=1e-5)
    assert len(seen) == 2


def test_options_keep_their_defaults_and_more_inputs_are_refused() -> None:
    model, x = lively("time first")
    fast = optimize_for_inference(model)
    with pytest.raises(TypeError, match=r"expected 1 input\(s\), got 2"):
        fast(x, torch.ones(3))


def test_a_batch_in_parts_is_answered_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = lively("time first")
    fast = optimize_for_inference(model, compile=False)
    whole = fast(x)
    monkeypatch.setattr(dense, "_PASS_BYTES", 1)
    torch.testing.assert_close(fast(x), whole, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("dtype", "images"), [(torch.float32, 1), (torch.bfloat16, 2), (torch.float64, 1)])
def test_parts_of_a_batch_are_as_large_in_every_precision(dtype, images, monkeypatch) -> None:
    model, _ = lively("v1")
    fast, frames = optimize_for_inference(model, dtype, compile=False), torch.rand(4, 2, 3, 32, 32)
    channels = next(layer.out_channels for layer in model.modules() if isinstance(layer, nn.Conv2d))
    monkeypatch.setattr(dense, "_PASS_BYTES", 4 * len(frames) * channels * 32 * 32)
    assert [part.stop - part.start for part in fast._parts([frames])] == [images] * (2 // images)


@pytest.mark.parametrize("layer", [nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2)], ids=["max", "mean"])
@pytest.mark.parametrize("frames", [1, 4])
def test_a_still_image_is_pooled_once(layer, frames) -> None:
    """Before its first neuron; other frames are all pooled."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unit, self.layer, self.neuron = ConvNorm(3, 8, 3), layer, LIF(tau=1.5, threshold=0.2)

        def forward(self, x: Tensor) -> Tensor:
            return fire(self.neuron, pool(self.layer, project(self.unit, present(x, 4, 3))))

    torch.manual_seed(0)
    network = Pooled().eval()
    x = torch.rand(2, 3, 9, 8) if frames == 1 else torch.rand(2, 4, 3, 9, 8)
    expected, fast, seen = network(x), optimize_for_inference(network, compile=False), []
    assert 0 < expected.mean() < 1
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((dense.steps, "max_pool"), (nn.AvgPool2d, "forward")):
            of = getattr(owner, name)
            noted = lambda *given, of=of, **options: (seen.append(given[-1].numel()), of(*given, **options))[1]  # noqa: E731
            patch.setattr(owner, name, noted)
        assert torch.equal(fast(x), expected)
    assert seen == [frames * 2 * 8 * 9 * 8]


def test_copies_hold_no_second_set_of_weights() -> None:
    model, x = lively("v1")
    fast = optimize_for_inference(model, compile=False)
    expected = fast(x)
    assert torch.equal(copy.deepcopy(fast)(x), expected)
    held = sum(tensor.numel() for tensor in fast.state_dict().values())
    assert held < 1.1 * sum(parameter.numel() for parameter in model.parameters())


def test_the_number_of_steps_may_be_read_from_the_frames():
    class Frames(nn.Module):
        def __init__(self):
            super().__init__()
            self.unit, self.neuron = ConvNorm(1, 4, 3), LIF(tau=1.5, threshold=0.1)

        def forward(self, x):
            return project_and_fire(self.unit, self.neuron, present(x, x.shape[1], 1))

    torch.manual_seed(0)
    network, frames = Frames().eval(), torch.rand(2, 5, 1, 6, 6)
    expected = network(frames)
    assert expected.shape == (5, 2, 4, 6, 6) and 0 < expected.mean() < 1
    for sparse in (False, True):
        assert torch.equal(optimize_for_inference(network, compile=False, sparse=sparse)(frames), expected)


@torch.no_grad()
def test_units_in_groups_and_of_other_widths_beside_each_other() -> None:
    """q, k and v in groups of channels, which no one product has, and a v that is wider than q and k."""
    torch.manual_seed(0)
    grouped, wide = LinearSpikeAttention(16, num_heads=4), LinearSpikeAttention(16, num_heads=4)
    for part in "qkv":
        setattr(grouped, part, ConvNorm(16, 16, groups=4))
    wide.q, wide.k, wide.v, wide.proj = (ConvNorm(*widths) for widths in ((16, 16), (16, 16), (16, 48), (48, 16)))
    wide.v_neuron = IntegerNeuron(levels=2)
    for attention in (grouped, wide):
        for norm in (module for module in attention.modules() if isinstance(module, nn.BatchNorm2d)):
            nn.init.normal_(norm.bias, 1.0, 0.5)
        x = torch.randn(2, 3, 16, 4, 5)
        calibrate_norms(attention, [x])
        expected = attention.eval()(x)
        assert expected.std() > 0.1
        for sparse in (False, True):
            fast = optimize_for_inference(attention, compile=False, sparse=sparse)
            torch.testing.assert_close(fast(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sparse", [False, True])
@torch.no_grad()
def test_a_unit_that_cannot_be_folded_is_named(sparse: bool) -> None:
    """A parametrization computes the weights anew in every call; the units around it are folded without a word."""
    mlp, x = SpikingMLP(16), torch.randn(2, 3, 16, 4, 5)
    calibrate_norms(mlp, [x])
    nn.utils.parametrizations.weight_norm(mlp.fc2.conv)
    with pytest.warns(UserWarning, match="kept as it is, since its convolution is parametrized .*: fc2$") as told:
        fast = optimize_for_inference(mlp, sparse=sparse)
    assert len(told) == 1
    expected = mlp.eval()(x)
    assert expected.std() > 0.1
    torch.testing.assert_close(fast(x), expected, atol=1e-5, rtol=1e-5)
    nn.utils.parametrize.remove_parametrizations(mlp.fc2.conv, "weight")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimize_for_inference(mlp, sparse=sparse)


class Transposed(MaskMixer):
    """A subclass, whose own forward none of the inherited forms computes."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return 0.5 * super().forward(k, q, v)


class Neighbors(nn.Module):
    """Spikes of one image that meet those of another."""

    emits = "spikes"

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q * k.flip(1)


class Attention(nn.Module):
    def __init__(self, mixer: nn.Module, neuron: Callable[[], nn.Module] = LIF) -> None:
        super().__init__()
        self.fire, self.mixer, self.proj = LIF(), mixer, ConvNorm(16, 16)
        self.units = nn.ModuleList(ConvNorm(16, 16) for _ in range(3))
        self.neurons = nn.ModuleList(neuron() for _ in range(3))

    def forward(self, membrane: Tensor) -> Tensor:
        mixed = project_and_mix(list(self.units), list(self.neurons), self.mixer, fire(self.fire, membrane))
        return project(self.proj, mixed)


class Half(nn.Module):
    """A neuron of one's own, which emits zeros and halves."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * (x >= 0.5)


def with_halves(mixer: nn.Module) -> nn.Module:
    mixer.neuron = Half()
    return mixer


class AllAttend(QKMixer):
    """Of q and k alone, where three are given."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().forward(q, k)

    emits = QKMixer.emits


@pytest.mark.parametrize(
    ("mixer", "neuron"),
    [
        (lambda: Transposed(16, num_heads=4), LIF),
        (lambda: with_halves(MaskMixer(16, num_heads=4)), LIF),
        (lambda: with_halves(AllAttend(16, num_heads=4)), LIF),
        (lambda: MaskMixer(16, num_heads=4), lambda: AcrossImages(Half())),
        (lambda: MaskMixer(16, num_heads=4), partial(IntegerNeuron, levels=2)),
        (Neighbors, LIF),
    ],
)
@torch.no_grad()
def test_what_was_said_of_another_forward_is_not_taken_for_its_own(mixer, neuron, monkeypatch) -> None:
    """Of the forward of the class above, or of spikes where levels come; images that meet stay in one batch."""
    torch.manual_seed(0)
    attention, x = Attention(mixer(), neuron), 2 * torch.randn(3, 4, 16, 5, 4)
    for norm in (module for module in attention.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.normal_(norm.bias, 0.8, 0.3)
    calibrate_norms(attention, [x])
    expected = attention.eval()(x)
    assert expected.std() > 0.1
    monkeypatch.setattr(dense, "_PASS_BYTES", 1)
    for options in ({}, {"paths": "digits"}, {"sparse": True}):
        fast = optimize_for_inference(attention, **options)
        torch.testing.assert_close(fast(x), expected, atol=1e-5, rtol=1e-5)
    if type(attention.mixer) is not MaskMixer:
        with pytest.raises(ValueError, match="needs sums in a fixed order"):
            optimize_for_inference(attention, exact=True)
