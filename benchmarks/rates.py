"""Models at given firing rates: a network trained on digits, and norms shifted until layers fire at wanted rates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from sdt_blocks import ConvolutionBlock, MetaSpikeFormer, SpikeDrivenTransformer


@dataclass(frozen=True)
class Seat:
    """A layer of neurons that feeds a product, the norm in front of it, and the pooling behind it."""

    name: str
    neuron: nn.Module
    norm: nn.BatchNorm2d
    pool: nn.Module

    def pooled(self, spikes: Tensor) -> Tensor:
        return self.pool(spikes.flatten(0, 1))


def seats(model: SpikeDrivenTransformer | MetaSpikeFormer) -> Iterator[Seat]:
    """The layers of neurons in computing order, except those behind a mixer and the head's."""
    nothing = nn.Identity()
    if isinstance(model, MetaSpikeFormer):
        for name, neuron, norm in _seats_of_stages(model):
            yield Seat(name, neuron, norm, nothing)
        return
    patch = model.patch
    for i in range(4):
        yield Seat(f"patch.{i}", patch.neurons[i], patch.stages[i].norm, patch.pools[i] if i < 3 else nothing)
    before = patch.position.norm
    for i, block in enumerate(model.blocks):
        attention, mlp = block.attention.branch, block.mlp.branch
        yield Seat(f"{i}.membrane", attention.neuron, before, nothing)
        for name in "qkv":
            yield Seat(f"{i}.{name}", getattr(attention, f"{name}_neuron"), getattr(attention, name).norm, nothing)
        yield Seat(f"{i}.mlp", mlp.neuron1, attention.proj.norm, nothing)
        yield Seat(f"{i}.hidden", mlp.neuron2, mlp.fc1.norm, nothing)
        before = mlp.fc2.norm


def _seats_of_stages(model: MetaSpikeFormer) -> Iterator[tuple[str, nn.Module, nn.BatchNorm2d]]:
    norm = None
    for stage, (downsampling, blocks) in enumerate(zip(model.downsamplings, model.stages, strict=True)):
        if norm is not None:
            yield f"{stage}.downsampling", downsampling.neuron, norm
        norm = downsampling.conv.norm
        for i, block in enumerate(blocks):
            name = f"{stage}.{i}"
            if isinstance(block, ConvolutionBlock):
                separable = block.separable.branch
                yield f"{name}.separable", separable.neuron1, norm
                yield f"{name}.expanded", separable.neuron2, separable.expand.norm
                yield f"{name}.membrane", block.neuron1, separable.separable.norm
                yield f"{name}.hidden", block.neuron2, block.conv1.norm
                norm = block.conv2.norm
                continue
            attention, mlp = block.attention.branch, block.mlp.branch
            yield f"{name}.membrane", attention.neuron, norm
            for letter in "qkv":
                yield f"{name}.{letter}", getattr(attention, f"{letter}_neuron"), getattr(attention, letter).norm
            yield f"{name}.mlp", mlp.neuron1, attention.proj.norm
            yield f"{name}.hidden", mlp.neuron2, mlp.fc1.norm
            norm = mlp.fc2.norm


@torch.no_grad()
def set_rates(model: SpikeDrivenTransformer | MetaSpikeFormer, images: Tensor, rates: dict[str, float]) -> None:
    """Shift the norms, layer after layer, until each layer of neurons fires at its rate (after its pooling)."""
    hooks = [seat.neuron.register_forward_pre_hook(partial(_shift, seat, rates[seat.name])) for seat in seats(model)]
    model(images)
    for hook in hooks:
        hook.remove()


def _shift(seat: Seat, rate: float, neuron: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
    x, low, high = inputs[0], -20.0, 20.0
    for _ in range(18):
        middle = (low + high) / 2
        fired = seat.pooled(type(neuron).forward(neuron, x + middle)).mean().item()
        low, high = (low, middle) if fired > rate else (middle, high)
    seat.norm.bias += low
    # In place, since a shortcut carries this membrane on; but a still image's first stage is one frame for all steps.
    return (x + low if x.stride(0) == 0 else x.add_(low),)


@torch.no_grad()
def measured_rates(model: SpikeDrivenTransformer | MetaSpikeFormer, images: Tensor) -> dict[str, float]:
    """The firing rate of every layer of neurons, after its pooling."""
    rates: dict[str, float] = {}

    def note(seat: Seat, _: nn.Module, __: tuple[Tensor, ...], spikes: Tensor) -> None:
        rates[seat.name] = seat.pooled(spikes).mean().item()

    hooks = [seat.neuron.register_forward_hook(partial(note, seat)) for seat in seats(model)]
    model(images)
    for hook in hooks:
        hook.remove()
    return rates


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's handwritten digits as images `[1797, 1, 16, 16]` in [0, 1], and their labels."""
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16
    return F.interpolate(images, size=16, mode="bilinear"), torch.tensor(found.target)


def train_on_digits(train: int, *, depth: int, dim: int = 64, epochs: int = 7) -> SpikeDrivenTransformer:
    """A small network trained on the first `train` digits, in eval mode."""
    images, labels = digits()
    model = SpikeDrivenTransformer(depth=depth, dim=dim, num_heads=4, in_channels=1, num_classes=10, pooling="0011")
    size = 50
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, epochs * -(-train // size))
    with torch.enable_grad():
        for _ in range(epochs):
            for batch in torch.randperm(train).split(size):
                optimizer.zero_grad()
                F.cross_entropy(model(images[batch]), labels[batch]).backward()
                optimizer.step()
                schedule.step()
    return model.eval()
