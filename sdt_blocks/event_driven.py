"""A Spike-Driven Transformer that computes where spikes are: the same answers in float32, from additions alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import ConvNorm, MaskMixer, MembraneShortcut, SpikeDrivenSelfAttention, SpikingMLP, SpikingPatchSplitting
from .blocks.mixers import PlanePool
from .models import SpikeDrivenBlock, SpikeDrivenTransformer
from .neuron import LIF
from .ops.packed import (
    Epilogue,
    EventWeight,
    PackedSpikes,
    Result,
    kernels_problem,
    pad_to_words,
    real_pool,
    spike_attention,
    spike_neuron,
    spike_pool,
    spike_product,
)
from .ops.spec import NeuronSpec
from .product import Product

CHUNK_BYTES = 8 << 20
"""Real values between a convolution and a pooling are kept this few, so that they stay in the cache."""


class EventDrivenTransformer(nn.Module):
    """`SpikeDrivenTransformer` in eval mode on the CPU, whose products add the weights of active inputs and no others.

    Spikes are kept at one bit each; real values are written only for the membrane of the shortcuts. Norms follow the
    sums as they do in the model, not folded into the weights: so a silent frame gives the same membrane to the last
    bit, and sums take the roundings of a channels-last convolution that adds input by input.

    Input and output are those of the model. A product whose input is denser than `break_even` of its layer is computed
    as a dense convolution instead, call by call.

    Raises `TypeError` for a model of other parts, `ValueError` for one that is not in float32 on the CPU, and
    `RuntimeError` where the kernels cannot be built.

    >>> fast, (images, labels) = EventDrivenTransformer(example_model()), example_images()
    >>> bool((fast(images).argmax(1) == labels).all())
    True
    """

    streams = False

    def __init__(self, model: SpikeDrivenTransformer) -> None:
        super().__init__()
        check_model(model)
        self.config = copy.deepcopy(model.config)
        self.in_channels, self.time_steps, self.per_step = model.in_channels, model.time_steps, model.per_step
        # The neuron on a membrane is computed with the product that completes it.
        blocks: list[Any] = list(model.blocks)
        first, *following = [block.attention.branch.neuron for block in blocks] + [None]
        self.patch = _PatchSplitting(model.patch, first)
        self.blocks = nn.ModuleList(_Block(block, neuron) for block, neuron in zip(blocks, following, strict=True))
        self.head_neuron, self.head = _frozen(model.head_neuron), _frozen(model.head)
        super().train(False)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        if x.ndim not in (4, 5) or x.shape[-3] != self.in_channels or 0 in x.shape:
            raise ValueError(
                f"expected images [B, {self.in_channels}, H, W] or frames [B, T, {self.in_channels}, H, W], "
                f"got {list(x.shape)}"
            )
        frames = x.unsqueeze(0) if x.ndim == 4 else x.transpose(0, 1)
        membrane, spikes = self.patch(frames.float(), self.time_steps if x.ndim == 4 else x.shape[1])
        for block in self.blocks:
            membrane, spikes = block(membrane, spikes)
        tokens = membrane.movedim(-1, 2).mean((-2, -1))
        logits: Tensor = self.head(self.head_neuron(tokens))
        return logits if self.per_step else logits.mean(0)

    def train(self, mode: bool = True) -> EventDrivenTransformer:
        """Raises `RuntimeError` for training mode: gradients do not flow."""
        if mode:
            raise RuntimeError("an event-driven model only evaluates; train the model it was made from")
        return self

    def products(self) -> Iterator[tuple[str, EventProduct]]:
        """The layers that spikes drive, by name: all products but the first convolution's."""
        for name, module in self.named_modules():
            if isinstance(module, EventProduct):
                yield name, module


class EventProduct(nn.Module):
    """A convolution of stride 1 on spikes, its norm, and what follows: a shortcut's sum, a neuron.

    `forward(spikes, residual, membrane)` is `spike_product`. `break_even` is the share of active inputs above which the
    sums come from a dense convolution instead; 1 never does that.
    """

    def __init__(self, weight: Tensor, epilogue: Epilogue) -> None:
        super().__init__()
        self.weight, self.epilogue = EventWeight(weight), epilogue
        self.convolution = Product(self.weight.weight, torch.zeros(len(weight)))
        self.break_even = 1.0

    def forward(
        self, spikes: PackedSpikes, *, residual: Tensor | None = None, membrane: bool | Tensor = False
    ) -> Result:
        by_events = self.break_even >= 1 or spikes.rate() <= self.break_even
        return (self.events if by_events else self.dense)(spikes, residual=residual, membrane=membrane)

    def events(
        self, spikes: PackedSpikes, *, residual: Tensor | None = None, membrane: bool | Tensor = False
    ) -> Result:
        """The sums from the weights of active inputs."""
        return spike_product(spikes, self.weight, self.epilogue, residual=residual, membrane=membrane)

    def dense(self, spikes: PackedSpikes, *, residual: Tensor | None = None, membrane: bool | Tensor = False) -> Result:
        """The sums from a dense convolution, by the fastest way of this machine, a few images at a time."""
        steps, images, height, width, _ = spikes.words.shape
        channels = self.epilogue.channels
        kept = torch.empty(steps, images, height, width, channels) if membrane is True else membrane
        words = []
        size = _chunk(steps * height * width, channels)
        for first in range(0, images, size):
            some = slice(first, first + size)
            part = PackedSpikes(spikes.words[:, some], spikes.channels)
            shape = torch.Size((part.words.shape[:2].numel(), height, width, spikes.channels))
            frames = part.unpack(self.convolution.input_dtype(shape)).movedim(2, -1).flatten(0, 1)
            _, fired = spike_neuron(
                self.convolution(frames).unflatten(0, part.words.shape[:2]),
                self.epilogue,
                steps,
                residual=None if residual is None else residual[:, some],
                membrane=kept[:, some] if isinstance(kept, Tensor) else False,
            )
            words += [] if fired is None else [fired.words]
        packed = PackedSpikes(words[0] if len(words) == 1 else torch.cat(words, dim=1), channels) if words else None
        return (kept if isinstance(kept, Tensor) else None), packed

    def extra_repr(self) -> str:
        out, into, kernel, _ = self.weight.weight.shape
        return f"{into}, {out}, kernel={kernel}, break_even={self.break_even:.3g}"


class _PatchSplitting(nn.Module):
    """Frames `[1 or T, B, C, H, W]` to the membrane `[T, B, H', W', dim]` and its spikes."""

    first: nn.Conv2d

    def __init__(self, patch: Any, following: nn.Module | None) -> None:
        super().__init__()
        self.first = _frozen(patch.stages[0].conv).to(memory_format=torch.channels_last)
        self.pooling = [flag == "1" for flag in patch.pooling]
        self.first_epilogue = _epilogue(patch.stages[0].norm, patch.neurons[0])
        neurons = [*patch.neurons[1:3], None]
        self.products = nn.ModuleList(
            _product(stage, neuron) for stage, neuron in zip(patch.stages[1:], neurons, strict=True)
        )
        self.position_neuron = _epilogue(None, patch.neurons[3], channels=patch.dim)
        self.position = _product(patch.position, following)

    def forward(self, frames: Tensor, steps: int) -> Result:
        spikes = self._first_stage(frames, steps)
        for product, pooled in zip(self.products[:2], self.pooling[1:3], strict=True):
            _, spikes = product(spikes)
            spikes = spike_pool(spikes) if pooled else spikes
        u = self._pooled_membrane(spikes) if self.pooling[3] else self.products[2](spikes, membrane=True)[0]
        _, spikes = spike_neuron(u, self.position_neuron, len(u))
        return self.position(spikes, residual=u, membrane=u)

    def _first_stage(self, frames: Tensor, steps: int) -> PackedSpikes:
        """The dense convolution of the input and its spikes, a few images at a time."""
        parts = []
        for some in frames.split(_chunk(frames[:, 0, 0].numel(), self.first.out_channels), dim=1):
            x = self.first(some.flatten(0, 1).contiguous(memory_format=torch.channels_last))
            x = x.movedim(1, -1).unflatten(0, some.shape[:2])
            _, spikes = spike_neuron(x, self.first_epilogue, steps)
            parts.append(spike_pool(spikes) if self.pooling[0] else spikes)
        return PackedSpikes(torch.cat([part.words for part in parts], dim=1), self.first.out_channels)

    def _pooled_membrane(self, spikes: PackedSpikes) -> Tensor:
        """The maximum over windows of the last stage, a few frames at a time: no neuron joins its time steps."""
        product: Any = self.products[2]
        words = spikes.words.contiguous()
        frames = PackedSpikes(words.flatten(0, 1).unsqueeze(0), spikes.channels)
        size = _chunk(words[0, 0, ..., 0].numel(), product.epilogue.channels)
        parts = [
            real_pool(product(frames.images(first, first + size), membrane=True)[0])
            for first in range(0, frames.words.shape[1], size)
        ]
        return torch.cat(parts, dim=1).view(*words.shape[:2], *parts[0].shape[2:])


class _Block(nn.Module):
    """A block on a membrane `[T, B, H, W, dim]`, which it overwrites, and the membrane's spikes."""

    def __init__(self, block: Any, following: nn.Module | None) -> None:
        super().__init__()
        attention, mlp = block.attention.branch, block.mlp.branch
        self.shortcut_inside = mlp.hidden == mlp.dim
        self.attention = _Attention(attention)
        self.proj = _product(attention.proj, mlp.neuron1)
        self.fc1 = _product(mlp.fc1, mlp.neuron2)
        self.fc2 = _product(mlp.fc2, following)

    def forward(self, u: Tensor, spikes: PackedSpikes) -> Result:
        u, spikes = self.proj(self.attention(spikes), residual=u, membrane=u)
        if self.shortcut_inside:
            u, hidden = self.fc1(spikes, residual=u, membrane=u)
        else:
            _, hidden = self.fc1(spikes)
        return self.fc2(hidden, residual=u, membrane=u)


class _Attention(nn.Module):
    """Spikes of the membrane to the masked spikes of q."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        # With event pooling, which mixes channels, q, k and v are unpacked for the module's own equations.
        self.pooled = _frozen(attention.mixer) if attention.event_pooling else None
        self.dim = attention.dim
        units = (attention.q, attention.k, attention.v)
        specs, leaks = zip(
            *(_neuron(getattr(attention, f"{name}_neuron"), attention.dim) for name in "qkv"), strict=True
        )
        if len({(spec.threshold, spec.reset, spec.strict) for spec in specs}) > 1:
            raise TypeError("the neurons of q, k and v must have the same threshold and reset")
        weights = torch.cat([pad_to_words(unit.conv.weight.detach()) for unit in units])
        scales, shifts = zip(*(_affine(unit.norm) for unit in units), strict=True)
        rows = {
            name: torch.cat([pad_to_words(row) for row in parts])
            for name, parts in {"scale": scales, "shift": shifts, "inv_tau": leaks}.items()
        }
        self.qkv = EventProduct(weights, Epilogue(len(weights), neuron=specs[0], **rows))
        self.spec, self.leak = _neuron(attention.mixer.neuron, attention.dim)
        self.leak = pad_to_words(self.leak)

    def forward(self, spikes: PackedSpikes) -> PackedSpikes:
        _, qkv = self.qkv(spikes)
        if self.pooled is None:
            return PackedSpikes(spike_attention(qkv, self.spec, self.leak).words, self.dim)
        q, k, v = (part[:, :, : self.dim] for part in qkv.unpack().chunk(3, dim=2))
        return PackedSpikes.pack(self.pooled(q, k, v))


KINDS = (
    SpikeDrivenTransformer,
    SpikingPatchSplitting,
    SpikeDrivenBlock,
    MembraneShortcut,
    SpikeDrivenSelfAttention,
    SpikingMLP,
    ConvNorm,
    MaskMixer,
    PlanePool,
    LIF,
    nn.BatchNorm2d,
    nn.Conv2d,
    nn.Linear,
    nn.MaxPool2d,
    nn.Identity,
    nn.ModuleList,
    nn.Sequential,
)


def check_model(model: nn.Module) -> None:
    """Raises what `EventDrivenTransformer` raises for a model that it cannot run."""
    if not isinstance(model, SpikeDrivenTransformer):
        raise TypeError(f"event-driven inference knows SpikeDrivenTransformer, got {type(model).__name__}")
    for name, module in model.named_modules():
        if not any(isinstance(module, kind) and type(module).forward is kind.forward for kind in KINDS):
            raise TypeError(
                f"event-driven inference does not know {type(module).__name__} ({name or 'the model itself'}); "
                "evaluate such a model densely"
            )
    others = {
        f"{p.dtype} on {p.device}" for p in model.parameters() if p.device.type != "cpu" or p.dtype != torch.float32
    }
    if others:
        raise ValueError(
            f"event-driven inference runs in float32 on the CPU; the model has {', '.join(sorted(others))}"
        )
    problem = kernels_problem()
    if problem is not None:
        raise RuntimeError(f"the event-driven kernels cannot run: {problem}")


def _frozen(module: Any) -> Any:
    return copy.deepcopy(module).eval().requires_grad_(False)


def _product(unit: Any, neuron: nn.Module | None) -> EventProduct:
    return EventProduct(unit.conv.weight, _epilogue(unit.norm, neuron, bias=unit.conv.bias))


def _epilogue(
    norm: nn.BatchNorm2d | None, neuron: nn.Module | None, *, bias: Tensor | None = None, channels: int = 0
) -> Epilogue:
    scale, shift = (None, None) if norm is None else _affine(norm)
    channels = channels if norm is None else norm.num_features
    spec, leak = (None, None) if neuron is None else _neuron(neuron, channels)
    return Epilogue(channels, bias=bias, scale=scale, shift=shift, neuron=spec, inv_tau=leak)


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Scale and shift of a norm in eval mode, rounded as PyTorch rounds them."""
    if norm.running_mean is None or norm.running_var is None:
        raise TypeError(
            "a BatchNorm2d without running statistics depends on its batch; it cannot be applied afterwards"
        )
    ones = torch.ones_like(norm.running_mean)
    weight, bias = (ones, ones * 0) if norm.weight is None else (norm.weight.detach(), norm.bias.detach())
    scale = weight * torch.rsqrt(norm.running_var + norm.eps)
    return scale, (bias.double() - norm.running_mean.double() * scale.double()).float()


def _neuron(neuron: nn.Module, channels: int) -> tuple[NeuronSpec, Tensor]:
    assert isinstance(neuron, LIF)
    spec = NeuronSpec(threshold=neuron.threshold, reset=neuron.reset_mechanism, strict=neuron.strict)
    return spec, torch.as_tensor(neuron.inv_tau, dtype=torch.float32).detach().expand(channels)


def _chunk(pixels: int, channels: int) -> int:
    """How many images of so many pixels are worked on at a time, for `channels` real values a pixel."""
    return max(1, CHUNK_BYTES // (4 * channels * pixels))
