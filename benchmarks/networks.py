"""Networks that are not part of the package, plain and after `optimize_for_inference`, dense and event-driven.

Weights are random, with norms fitted to the input by `calibrate_norms`, so that all neurons fire; the rate of each
network is printed. A form that is not faster than the plain network fails the suite.
"""

from __future__ import annotations

import itertools
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import snntorch
import torch
from harness import Bench, ParityError, same_bits
from peers import calibrated_model
from torch import Tensor, nn

from sdt_blocks import (
    LIF,
    MembraneShortcut,
    ParametricLIF,
    SpikeDrivenSelfAttention,
    SpikingMLP,
    SpikingPatchSplitting,
    calibrate_norms,
    create_model,
    optimize_for_inference,
    over_time,
)
from sdt_blocks.analysis import firing_rates
from sdt_blocks.ops.packed import PackedSpikes

PLAIN, DENSE, EVENTS = "plain", "dense", "event-driven"
STEPS, BATCH, SIDE = 4, 8, 32
DEVICES = ["cpu"]


class MyNetwork(nn.Module):
    """The network of README.md, with stochastic depth; its input is `[T, B, 1, H, W]`."""

    def __init__(self, dim: int = 256, part: nn.Module | None = None) -> None:
        super().__init__()
        self.patch = SpikingPatchSplitting(dim, in_channels=1, pooling="0001", neuron=ParametricLIF)
        self.blocks = nn.Sequential(
            MembraneShortcut(SpikingMLP(dim)),
            MembraneShortcut(SpikeDrivenSelfAttention(dim, num_heads=4, neuron=ParametricLIF), drop_path=0.1),
            *([] if part is None else [part]),
        )
        self.fire = LIF(tau=1.5, reset="subtract", surrogate="atan")
        self.head = nn.Linear(dim, 2)

    def forward(self, x: Tensor) -> Tensor:
        membrane = self.blocks(self.patch(x)).mean((-2, -1))
        logits: Tensor = self.head(self.fire(membrane)).mean(0)
        return logits


class SoftmaxAttention(nn.Module):
    """An attention of another library: plain PyTorch on spikes."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.neuron, self.qkv = LIF(), nn.Linear(dim, 3 * dim)

    def forward(self, membrane: Tensor) -> Tensor:
        q, k, v = self.qkv(self.neuron(membrane).flatten(3).mT).chunk(3, dim=-1)
        return ((q @ k.mT).softmax(-1) @ v).mT.reshape(membrane.shape)


class Convolutional(nn.Module):
    """A convolutional network with snnTorch's neurons and PyTorch's layers; its input is `[T, B, 2, H, W]`."""

    def __init__(self, widths: tuple[int, ...] = (2, 64, 128, 256)) -> None:
        super().__init__()
        pairs = list(itertools.pairwise(widths))
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in pairs)
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for _, b in pairs)
        self.neurons = nn.ModuleList(over_time(snntorch.Leaky(beta=0.5)) for _ in pairs)
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm, neuron in zip(self.convs, self.norms, self.neurons, strict=True):
            spikes = neuron(norm(conv(x.flatten(0, 1))).unflatten(0, x.shape[:2]))
            x = self.pool(spikes.flatten(0, 1)).unflatten(0, x.shape[:2])
        logits: Tensor = self.head(x.mean((-2, -1))).mean(0)
        return logits


class Gate(nn.Module):
    """A part whose forward cannot be traced."""

    def forward(self, membrane: Tensor) -> Tensor:
        return membrane if membrane.mean() > -1e6 else -membrane


@dataclass(frozen=True)
class Subject:
    """A network, its input, and the required speedup of its best form."""

    network: nn.Module
    inputs: Tensor
    least: float = 1.0


def subjects() -> dict[str, Subject]:
    """The networks by name."""
    foreign = create_model("sdt_2_256")
    foreign.blocks[0].attention.branch = SoftmaxAttention(256)
    frames = torch.rand(STEPS, BATCH, 1, SIDE, SIDE)
    return {
        "README's MyNetwork, dim 256": Subject(MyNetwork(), frames, least=1.5),
        "sdt_2_256 with a softmax attention": Subject(foreign, torch.rand(BATCH, 3, SIDE, SIDE)),
        "snnTorch, convolutional": Subject(Convolutional(), torch.rand(STEPS, BATCH, 2, SIDE, SIDE)),
        "MyNetwork with an opaque part": Subject(MyNetwork(part=Gate()), frames),
    }


@torch.no_grad()
def run(bench: Bench) -> None:
    for name, subject in subjects().items():
        network, inputs = subject.network, subject.inputs
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.constant_(module.bias, 0.3)
        calibrate_norms(network.eval(), inputs)
        rates = firing_rates(network, inputs)
        if rates.silence:
            raise ParityError(f"{name}: {rates.silence}")
        setting = f"{name}, {STEPS} steps, {BATCH} x {SIDE} x {SIDE}"
        bench.record("firing rate, mean over the neurons", setting, PLAIN, rates.mean, unit="share")
        race(bench, setting, subject)
    if bench.device.type == "cpu":
        for name in ("spikformer_4_384", "qkformer_4_384"):
            race_counts(bench, name)


@torch.no_grad()
def race_counts(bench: Bench, name: str) -> None:
    """Time a network whose shortcuts sum spikes, with weights in float32 and in 8 bits."""
    torch.manual_seed(0)
    images = torch.rand(BATCH, 3, SIDE, SIDE)
    network = calibrated_model(name, images, bias=-0.3)
    setting = f"{name}, {STEPS} steps, {BATCH} x {SIDE} x {SIDE}"
    forms = {
        DENSE: optimize_for_inference(network),
        EVENTS: optimize_for_inference(network, sparse=True),
        f"{DENSE}, 8 bits": optimize_for_inference(network, torch.int8),
        f"{EVENTS}, 8 bits": optimize_for_inference(network, torch.int8, sparse=True),
    }
    spikes, counts = inputs_of(forms[f"{EVENTS}, 8 bits"], images)
    bench.record("spikes, mean over the inputs of products", setting, EVENTS, spikes, unit="share")
    bench.record("counts, mean over the inputs of products", setting, EVENTS, counts, unit="")

    contestants = {form: partial(network, images) for form, network in forms.items()}
    parity = {f"{EVENTS}, 8 bits": partial(same_bits, forms[f"{EVENTS}, 8 bits"], forms[f"{DENSE}, 8 bits"], images)}
    bench.race("evaluation, sums of spikes", setting, contestants, baseline=DENSE, parity=parity, rounds=9)


def inputs_of(form: Any, images: Tensor) -> tuple[float, float]:
    """Means of the inputs that are spikes and of those that are counts, over the products of a form."""
    means: dict[bool, list[float]] = {True: [], False: []}

    def note(product: Any, given: tuple[PackedSpikes, ...]) -> None:
        means[product.planes == 1].append(given[0].rate() * product.planes)

    hooks = [product.register_forward_pre_hook(note) for _, product in form.products()]
    form(images)
    for hook in hooks:
        hook.remove()
    return statistics.mean(means[True]), statistics.mean(means[False])


def race(bench: Bench, setting: str, subject: Subject) -> None:
    """Time the forms of one network in alternation."""
    network, inputs = subject.network, subject.inputs
    forms: dict[str, Callable[..., Any]] = {PLAIN: network}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="kept as it is")  # the opaque part, which is intended
        forms[DENSE] = optimize_for_inference(network)
        if bench.device.type == "cpu":
            forms[EVENTS] = optimize_for_inference(network, sparse=True)
    expected = network(inputs)
    samples = bench.race(
        "evaluation of any network",
        setting,
        {name: partial(form, inputs) for name, form in forms.items()},
        baseline=PLAIN,
        parity={name: partial(agreement, form, inputs, expected) for name, form in forms.items() if name != PLAIN},
        rounds=25,
    )
    ratios = {
        row["contestant"]: float(row["ratio"]) for row in bench.rows if row["setting"] == setting and row["ratio"]
    }
    fastest = min((ratio, name) for name, ratio in ratios.items() if name != PLAIN)
    if fastest[0] > 1 / subject.least or len(samples) < len(forms):
        bench.failures.append(f"{setting}: {fastest[1]} takes {fastest[0]:.2f} of the plain time")


def agreement(form: Callable[[Tensor], Tensor], inputs: Tensor, expected: Tensor) -> str:
    """Share of images with the plain network's logits: a spike within rounding of its threshold may differ."""
    off = (form(inputs) - expected).abs().amax(-1) / expected.abs().max()
    same = (off < 1e-3).float().mean().item()
    if not off.max().item() < 0.2:
        raise ParityError(f"logits off by {off.max().item():.2g} of the largest")
    return f"{same:.1%} of the images within 1e-3"
