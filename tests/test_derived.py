"""Leaves derived from what the kit knows, with code of their own, which no form may take for that of their parents."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import snntorch
import torch
from torch import Tensor, nn

from sdt_blocks import LIF, ParametricLIF, calibrate_norms, optimize_for_inference, over_time
from sdt_blocks.blocks import ConvNorm
from sdt_blocks.inference import dense
from sdt_blocks.neuron import OverTime
from sdt_blocks.steps import fire, pool, project, project_and_fire, shortcut


class HalvedMaximum(nn.MaxPool2d):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x)


class Tripled(nn.Identity):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * x


class Gate(nn.Identity):
    emits = "spikes"

    def forward(self, x: Tensor) -> Tensor:
        return (x > 0.3).to(x.dtype)


class Ternary(snntorch.Leaky):
    def forward(self, input_: Tensor, mem: Tensor | None = None) -> Any:
        spikes, mem = super().forward(input_, mem)
        return spikes - (input_ < -0.2).to(spikes.dtype), mem


class Twofold(snntorch.Leaky):
    def fire(self, mem: Tensor) -> Tensor:
        return 2 * super().fire(mem)


def one_and_a_half(shift: Tensor) -> Tensor:
    return 1.5 * (shift > 0).to(shift.dtype)


class Called(LIF):
    """Does more than its forward when it is called."""

    def __call__(self, x: Tensor) -> Any:
        return 2 * super().__call__(x)


class HalfThreshold(LIF):
    """Says in its `spec` what the ops are told."""

    @property
    def spec(self) -> Any:
        return super().spec._replace(threshold=0.5, reset="subtract", strict=True)


class Network(nn.Module):
    def __init__(self, neuron: nn.Module, pooling: nn.Module, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.second = ConvNorm(2, 16, 3), ConvNorm(16, 16, 3)
        self.neuron, self.pooling, self.last = neuron, pooling, LIF()
        self.second.norm = norm or self.second.norm

    def forward(self, x: Tensor) -> Tensor:
        membrane = project(self.second, pool(self.pooling, project_and_fire(self.first, self.neuron, x)))
        return membrane.mean((0, -2, -1)) + fire(self.last, membrane).mean((0, -2, -1))


LEAVES: dict[str, Callable[[], tuple[nn.Module, ...]]] = {
    "maximum": lambda: (LIF(), HalvedMaximum(2)),
    "nothing": lambda: (LIF(), Tripled()),
    "norm": lambda: (LIF(), nn.Identity(), Tripled()),
    "gate": lambda: (Gate(), nn.Identity()),
    "ternary": lambda: (over_time(Ternary(beta=0.7)), nn.Identity()),
    "twofold": lambda: (over_time(Twofold(beta=0.7)), nn.Identity()),
    "surrogate": lambda: (over_time(snntorch.Leaky(beta=0.7, spike_grad=one_and_a_half)), nn.Identity()),
    "spec": lambda: (HalfThreshold(), nn.Identity()),
    "call": lambda: (Called(), nn.Identity()),
}


@pytest.mark.parametrize("name", LEAVES)
@torch.no_grad()
def test_every_form_computes_what_a_derived_leaf_does(name: str) -> None:
    torch.manual_seed(0)
    model, x = Network(*LEAVES[name]()), torch.rand(4, 3, 2, 8, 7)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, 0.4, 0.2)
    calibrate_norms(model, [x])
    expected = model.eval()(x)
    plain = model.neuron(model.first(x.flatten(0, 1)).unflatten(0, x.shape[:2]))
    plain = model.second(model.pooling(plain.flatten(0, 1))).unflatten(0, x.shape[:2])
    torch.testing.assert_close(plain.mean((0, -2, -1)) + model.last(plain).mean((0, -2, -1)), expected)
    assert expected.std() > 0.05
    for options in ({"paths": "digits"}, {"compile": False}, {"sparse": True}):
        torch.testing.assert_close(optimize_for_inference(model, **options)(x), expected, atol=1e-5, rtol=1e-5)


def test_what_snntorch_fires_is_known_to_be_spikes() -> None:
    for spike_grad in (None, snntorch.surrogate.fast_sigmoid(), snntorch.surrogate.SSO()):
        assert OverTime(snntorch.Synaptic(alpha=0.8, beta=0.7, spike_grad=spike_grad)).emits == "spikes"
    assert OverTime(snntorch.Leaky(beta=0.7, surrogate_disable=True)).emits == "spikes"
    assert OverTime(Ternary(beta=0.7)).emits == OverTime(snntorch.Leaky(0.7, graded_spikes_factor=2.0)).emits == "real"


class Column(nn.Module):
    """Frames of one place, whose tokens lie in memory as the frames do, wanted again behind the shortcut."""

    def __init__(self, dim: int = 64) -> None:
        super().__init__()
        self.units = nn.ModuleList(ConvNorm(a, dim) for a in (3, dim, dim))
        self.neurons = nn.ModuleList(LIF() for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        membrane = project(self.units[0], x)
        membrane = membrane + project(self.units[1], fire(self.neurons[0], membrane))
        tokens = membrane.flatten(2)
        return tokens, shortcut(membrane, project(self.units[2], fire(self.neurons[1], membrane)))


class OfTwoBatches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unit, self.other, self.neuron = ConvNorm(2, 16, 3), ConvNorm(2, 16, 3), LIF()

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        spikes = fire(self.neuron, project(self.unit, x) + project(self.other, y))
        return spikes, spikes.mean((-2, -1)).mean((-2, -1))


@pytest.mark.parametrize("sparse", [False, True])
@torch.no_grad()
def test_memory_and_batches_are_kept_apart(sparse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shortcut's memory that others hold is not written into; one sample is added to all parts of a batch."""
    monkeypatch.setattr(dense, "_PASS_BYTES", 1)
    torch.manual_seed(0)
    frames = [torch.randn(4, batch, 2, 6, 5) for batch in (1, 6)]
    networks = (Column(), [torch.randn(4, 3, 3, 1, 1)]), (OfTwoBatches(), frames), (OfTwoBatches(), frames[::-1])
    for model, given in networks:
        expected = model.eval()(*given)
        fast = optimize_for_inference(model, sparse=sparse)
        assert all(one.std() > 1e-3 for one in expected)
        torch.testing.assert_close(fast(*given), expected, atol=1e-5, rtol=1e-5)


class Wrong(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.unit, self.neuron = ConvNorm(2, 16, 3), ParametricLIF(channels=channels)

    def forward(self, x: Tensor) -> Tensor:
        return fire(self.neuron, project(self.unit, x))


@pytest.mark.parametrize("channels", [1, 8, 32])
def test_time_constants_of_another_number_of_channels_are_refused(channels: int) -> None:
    model, x = Wrong(channels).eval(), torch.rand(2, 1, 2, 4, 4)
    with pytest.raises(ValueError, match="one value for each channel"):
        model(x)
    for options in ({}, {"compile": False}, {"sparse": True}):
        with pytest.raises(ValueError, match="one value for each channel"):
            optimize_for_inference(model, **options)(x)


def test_threads_that_share_a_neuron_with_a_memory_take_turns() -> None:
    neuron = over_time(snntorch.Synaptic(alpha=0.8, beta=0.7))
    given = [3 * torch.rand(6, 64, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(8)]
    expected = [neuron(x) for x in given]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(neuron, given * 4))
    assert all(torch.equal(*pair) for pair in zip(found, expected * 4, strict=True)) and expected[0].any()


def test_what_fx_has_written_is_looked_into() -> None:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4))
    model, x = nn.Sequential(torch.fx.symbolic_trace(inner), nn.ReLU()).eval(), torch.rand(2, 2, 8, 8)
    fast = optimize_for_inference(model)
    assert not any(isinstance(module, torch.fx.GraphModule) for module in fast.modules())
    torch.testing.assert_close(fast(x), model(x))
