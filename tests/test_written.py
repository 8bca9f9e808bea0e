"""Networks that write into their values: every form answers as the network, whoever else looks at what is written."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdt_blocks import LIF, calibrate_norms, optimize_for_inference
from sdt_blocks.blocks import ConvNorm
from sdt_blocks.inference import Dense, plan
from sdt_blocks.steps import fire, pool, project, shortcut


class Network(nn.Module):
    """A membrane, and what the network's own code makes of it and of the spikes that were fired on it before."""

    leaf: nn.Module = nn.Identity()

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.first, self.second, self.third = ConvNorm(2, dim, 3), ConvNorm(dim, dim, 3), ConvNorm(dim, dim, 3)
        self.neurons = nn.ModuleList(LIF() for _ in range(3))
        if not isinstance(self.leaf, nn.Identity):
            self.part = self.leaf

    def forward(self, x: Tensor) -> Tensor:
        membrane = project(self.first, x)
        spikes = fire(self.neurons[0], membrane)
        changed = self.change(membrane, spikes)
        later = project(self.third, fire(self.neurons[1], membrane))
        return torch.stack([membrane, changed, later, project(self.second, spikes)]).mean((1, -2, -1))

    def change(self, membrane: Tensor, spikes: Tensor) -> Tensor:
        raise NotImplementedError


class Kept(Network):
    def change(self, membrane, spikes):
        kept = membrane
        membrane += project(self.second, spikes)
        membrane -= 0.1
        return kept


class Repeated(Network):
    def change(self, membrane, spikes):
        product = membrane * 2
        product *= membrane
        product /= 3
        return product.clamp_(max=0.7)


class Function(Network):
    def change(self, membrane, spikes):
        return F.leaky_relu(membrane, 0.2, True)


class Layer(Network):
    leaf = nn.ReLU(inplace=True)

    def change(self, membrane, spikes):
        return self.part(membrane)


class View(Network):
    def change(self, membrane, spikes):
        membrane.flatten(0, 1).mul_(0.5)
        return membrane[:, :, 1:2].neg_().expand_as(membrane)


class Parts(Network):
    def change(self, membrane, spikes):
        before, after = membrane.chunk(2, 2)
        before.add_(after)
        return membrane.mT.contiguous().mT


class Item(Network):
    def change(self, membrane, spikes):
        membrane[:, :, 0] = 0.5
        return membrane


class ItemOfCopy(Network):
    def change(self, membrane, spikes):
        copied = membrane.clone()
        copied[:, 1:, :3] = spikes[:, :-1, :3]
        return copied


class Spikes(Network):
    def change(self, membrane, spikes):
        spikes.mul_(0.5)
        return membrane


class Out(Network):
    def change(self, membrane, spikes):
        return torch.add(membrane, 1, out=membrane)


class OutOfSight(nn.Module):
    """Cannot be traced, and writes into what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x):
            x.clamp_(max=0.4)
        return x


class Opaque(Network):
    leaf = OutOfSight()

    def change(self, membrane, spikes):
        return self.part(membrane)


class Projected(Network):
    leaf = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(16, 16, 3, padding=1))

    def change(self, membrane, spikes):
        return project(self.part, membrane)


class Pooled(Network):
    leaf = OutOfSight()

    def change(self, membrane, spikes):
        return pool(self.part, membrane)


class Fired(Network):
    leaf = OutOfSight()

    def change(self, membrane, spikes):
        return fire(self.part, membrane)


class BeforeItFires(Opaque):
    """The neuron on a product, and the sum with a shortcut, come only after it has been written into."""

    def change(self, membrane, spikes):
        product, kept = project(self.second, spikes), membrane * 2
        self.part(product)
        change = project(self.second, spikes)
        self.part(kept)
        return fire(self.neurons[2], shortcut(kept, change)) + product


class OfTheInput(Opaque):
    def forward(self, x):
        self.part(x)
        return super().forward(x)

    def change(self, membrane, spikes):
        return membrane + 1


ALONE = (Kept, Repeated, Function, Layer, Item, ItemOfCopy, Spikes, Out)
"""In which nobody looks at what is written but by the name that was written to."""
OTHERS = (View, Parts, Opaque, Projected, Pooled, Fired, BeforeItFires, OfTheInput)


@pytest.mark.filterwarnings("ignore:kept as it is")
@pytest.mark.parametrize("size", [(6, 5), (1, 1)])
@pytest.mark.parametrize("kind", [*ALONE, *OTHERS])
@torch.no_grad()
def test_what_is_written_is_seen_in_every_form(kind: type[Network], size: tuple[int, int]) -> None:
    torch.manual_seed(1)
    model, x = kind(), torch.rand(4, 5, 2, *size)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, 0.4, 0.3)
    calibrate_norms(model, [x.clone()])
    expected = model.eval()(x.clone())
    assert (expected.std((1, 2)) > 1e-3).all()
    for options in ({}, {"compile": False}, {"sparse": True}):
        fast = optimize_for_inference(model, **options)
        for _ in range(2):
            torch.testing.assert_close(fast(x.clone()), expected, atol=1e-5, rtol=1e-5)
        with torch.inference_mode():
            torch.testing.assert_close(fast(x.clone()), expected, atol=1e-5, rtol=1e-5)
        assert options or kind in OTHERS or not fast.in_place
    if kind in (Kept, Item, ItemOfCopy):
        torch.testing.assert_close(optimize_for_inference(model, exact=True)(x), expected, atol=1e-4, rtol=1e-4)


class OfAView(Opaque):
    def change(self, membrane, spikes):
        self.part(membrane.flatten(0, 1))
        return membrane


class OfAPart(Opaque):
    def change(self, membrane, spikes):
        self.part(membrane[:, :, 1:3])
        return membrane


class OfSpikes(Opaque):
    def change(self, membrane, spikes):
        return self.part(spikes)


class OfSpikesSeen(Opaque):
    def change(self, membrane, spikes):
        self.part(spikes.flatten(0, 1))
        return spikes


class OfACopy(Opaque):
    def change(self, membrane, spikes):
        return self.part(spikes.transpose(0, 1).contiguous()).transpose(0, 1)


@pytest.mark.filterwarnings("ignore:kept as it is")
@pytest.mark.parametrize("kind", [OfAView, OfAPart, OfSpikes, OfSpikesSeen, OfACopy])
@torch.no_grad()
def test_no_write_out_of_sight_is_lost_without_a_word(kind: type[Network]) -> None:
    torch.manual_seed(1)
    model, x, refused = kind(), torch.rand(4, 5, 2, 6, 5), 0
    calibrate_norms(model, [x])
    expected = model.eval()(x)
    for options in ({}, {"compile": False}, {"sparse": True}):
        fast = optimize_for_inference(model, **options)
        try:
            torch.testing.assert_close(fast(x), expected, atol=1e-5, rtol=1e-5)
        except RuntimeError as error:
            assert "part writes " in str(error) and "or write into a clone" in str(error)
            refused += 1
    assert (kind is OfACopy) == (refused == 0)


def test_a_sum_in_place_is_a_shortcut() -> None:
    form = Dense(plan(Kept()))
    assert [node.op for node in form.plan.nodes].count("add") >= 1 and form.together


class Numbers(nn.Module):
    """Numbers and the network's own tensors: the first are never written into, the others are for good."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[0]
        before = size
        size += 1
        self.seen.add_(x.sum((0, 1)))
        return x * size / before + self.seen


@torch.no_grad()
def test_numbers_are_not_written_into_and_what_the_network_holds_is() -> None:
    model, x = Numbers(), torch.rand(2, 4, 3)
    forms = [optimize_for_inference(model, sparse=sparse) for sparse in (False, True)]
    for _ in range(3):
        expected = model(x)
        for fast in forms:
            torch.testing.assert_close(fast(x), expected)
