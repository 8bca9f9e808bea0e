"""Models rebuilt for evaluation: norms folded, neurons fused with what stands beside them, the same answers."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import event_costs
from .blocks import MembraneShortcut, SpikeDrivenSelfAttention, SpikingMLP, SpikingPatchSplitting
from .blocks.mixers import MaskMixer
from .blocks.patch import WIDTHS
from .blocks.units import ConvNorm
from .event_driven import EventDrivenTransformer
from .models import SpikeDrivenBlock, SpikeDrivenTransformer
from .neuron import LIF
from .ops import dense as firing
from .product import Product
from .steps import present

DTYPES = (torch.float32, torch.bfloat16)
_PASS_BYTES = 48 << 20


def optimize_for_inference(
    model: SpikeDrivenTransformer,
    dtype: torch.dtype = torch.float32,
    compile: bool = True,
    *,
    sparse: bool | str = False,
    calibrate: Iterable[Any] = (),
) -> nn.Module:
    """A new module that answers as `model.eval()` does, faster; the model itself stays untouched.

    Norms are folded into the convolutions, q, k and v are one, a still image's first layer is computed once, and every
    product takes the way that is fastest on this machine (see `Product`; measured when a shape comes first). With
    `compile`, neurons run fused with the pooling, mask or shortcut beside them: on a CPU in C++ kernels that are built
    once, in a few seconds, elsewhere through `torch.compile`. Without a compiler one warning says so.

    The membranes of neurons and shortcuts are float32 for both dtypes, and so are the logits. A spike can differ where
    a membrane lies within rounding of its threshold, as it can between two libraries' convolutions. Blocks of other
    makes stay as they are, in float32.

    With `sparse=True`, on a CPU and in float32, products add the weights of active inputs instead, and spikes are one
    bit each (see `EventDrivenTransformer`). `sparse="auto"` returns the faster of the two models on the batches of
    `calibrate` (tensors, or what a data loader gives), which should be of the size that is evaluated later; its
    `calibration` lists each layer's firing rate and choice.

    Raises `TypeError` for another kind of model and `ValueError` for a dtype that is not float32 or bfloat16, or where
    `sparse` does not fit the other arguments.

    >>> fast, (images, labels) = optimize_for_inference(example_model(), compile=False), example_images()
    >>> bool((fast(images).argmax(1) == labels).all())
    True
    """
    if not _runs_as(model, SpikeDrivenTransformer, "forward", "forward_features"):
        raise TypeError(
            f"optimize_for_inference knows SpikeDrivenTransformer with its own forward, got {type(model).__name__}; "
            "evaluate such a model as it is, or under torch.compile"
        )
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be torch.float32 or torch.bfloat16, got {dtype}")
    if sparse not in (False, True, "auto"):
        raise ValueError(f'sparse must be True, False or "auto", got {sparse!r}')
    if sparse is True:
        if dtype != torch.float32:
            raise ValueError(f"event-driven inference computes in float32; leave sparse out for {dtype}")
        return EventDrivenTransformer(model)
    with torch.no_grad():
        dense = OptimizedTransformer(model, dtype, compile)
    return event_costs.choose(model, dense, calibrate) if sparse else dense


class OptimizedTransformer(nn.Module):
    """What `optimize_for_inference` makes: input and output are those of `SpikeDrivenTransformer` in eval mode.

    Logits are float32. There is no training mode; gradients do not flow.
    """

    streams = False

    def __init__(self, model: SpikeDrivenTransformer, dtype: torch.dtype, compile: bool) -> None:
        super().__init__()
        self.config, self.dtype = copy.deepcopy(model.config), dtype
        self.in_channels, self.time_steps, self.per_step = model.in_channels, model.time_steps, model.per_step
        self.patch = _patch(model.patch, dtype, compile)
        self.blocks = nn.ModuleList(half for block in model.blocks for half in _halves(block, dtype, compile))
        self.head_neuron = _frozen(model.head_neuron)
        self.head = _frozen(model.head)
        super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        present(x, self.time_steps, self.in_channels)
        if not x.is_floating_point():
            raise TypeError(f"images and frames must be floating-point tensors, got {x.dtype}")
        # Tensors are ordinary ones even inside inference_mode: nothing compiles twice, and the result can go anywhere.
        with torch.inference_mode(False), torch.no_grad():
            logits = torch.cat([self._logits(part) for part in x.chunk(self._passes(x))], dim=1)
            return logits if self.per_step else logits.mean(0)

    def _passes(self, x: Tensor) -> int:
        """In how many parts a batch is answered: on a CPU a few images stay in its caches and in reused memory."""
        if x.device.type != "cpu":
            return 1
        steps = self.time_steps if x.ndim == 4 else x.shape[1]
        image_bytes = 4 * steps * x.shape[-2:].numel() * self.config["dim"] // WIDTHS[0]
        return math.ceil(len(x) / max(1, _PASS_BYTES // image_bytes))

    def _logits(self, x: Tensor) -> Tensor:
        """Logits of every step `[T, B, classes]`."""
        frames = x.unsqueeze(0) if x.ndim == 4 else x.transpose(0, 1)
        membrane = self.patch(frames.float(), self.time_steps if x.ndim == 4 else x.shape[1])
        for block in self.blocks:
            membrane = block(membrane)
        tokens = [part.mean((2, 3), dtype=torch.float32) for part in membrane if part is not None]
        logits: Tensor = self.head(self.head_neuron(torch.stack(tokens).sum(0)))
        return logits

    def train(self, mode: bool = True) -> OptimizedTransformer:
        """Raises `RuntimeError` for training mode: norms are folded and gradients do not flow."""
        if mode:
            raise RuntimeError("an optimised model only evaluates; train the model it was made from")
        return self


Membrane = tuple[Tensor, Tensor | None]
"""A membrane `[T, B, H, W, C]` as the shortcut in float32 and what the last product adds to it, if anything."""


class Firing(nn.Module):
    """A layer of neurons of an optimised model; `compile` says whether its steps are compiled (see `ops.firing`)."""

    def __init__(self, neuron: nn.Module, compile: bool) -> None:
        super().__init__()
        assert isinstance(neuron, LIF)
        self.compiled = compile
        self.register_buffer("inv_tau", torch.as_tensor(neuron.inv_tau, dtype=torch.float32).detach().clone())
        self.inv_tau: Tensor
        self.constants = (neuron.threshold, neuron.reset_mechanism, neuron.strict)

    @property
    def neuron(self) -> firing.Neuron:
        """As the ops take it."""
        return firing.Neuron(self.inv_tau, *self.constants)

    def forward(self, membrane: Membrane, consumer: Product) -> tuple[Tensor, Tensor]:
        """The membrane's sum, and its spikes as the product they are for wants them."""
        u, change = membrane
        dtype = _wanted(consumer, u.shape)
        if change is None:
            return firing.fire(u, self.neuron, dtype, compiled=self.compiled)
        return firing.fire(change, self.neuron, dtype, shortcut=u, compiled=self.compiled)

    def pooled(self, x: Tensor, consumer: Product) -> Tensor:
        """Spikes of x after a 3x3 maximum of stride 2."""
        steps, batch, height, width, channels = x.shape
        dtype = _wanted(consumer, (steps, batch, (height + 1) // 2, (width + 1) // 2, channels))
        return firing.fire_and_pool(x, self.neuron, dtype, compiled=self.compiled)


class OptimizedPatchSplitting(nn.Module):
    """`SpikingPatchSplitting` of frames `[1 or T, B, C, H, W]` into a membrane `[T, B, H', W', dim]`."""

    def __init__(self, patch: SpikingPatchSplitting, dtype: torch.dtype, compile: bool) -> None:
        super().__init__()
        self.dtype, self.pooling = dtype, [flag == "1" for flag in patch.pooling]
        self.products = nn.ModuleList(
            _product(stage.conv, stage.norm, dtype, spikes=i > 0) for i, stage in enumerate(patch.stages)
        )
        self.neurons: Any = nn.ModuleList(Firing(neuron, compile) for neuron in patch.neurons)
        self.position = _product(patch.position.conv, patch.position.norm, dtype)

    def forward(self, frames: Tensor, steps: int) -> Membrane:
        consumers = [*self.products[1:], self.position]
        x = _per_frame(self.products[0], frames.movedim(2, -1).contiguous().to(self.dtype))
        x = x.expand(steps, *x.shape[1:])
        for neuron, pooled, consumer in zip(self.neurons[:3], self.pooling, consumers, strict=False):
            spikes = neuron.pooled(x, consumer) if pooled else neuron((x, None), consumer)[1]
            x = _per_frame(consumer, spikes)
        x = (firing.pool(x) if self.pooling[3] else x).float()
        return x, _per_frame(self.position, self.neurons[3]((x, None), self.position)[1])


class OptimizedAttention(nn.Module):
    """`SpikeDrivenSelfAttention` and its shortcut on membranes `[T, B, H, W, dim]`; q, k and v are one product."""

    def __init__(self, attention: SpikeDrivenSelfAttention, dtype: torch.dtype, compile: bool) -> None:
        super().__init__()
        self.compiled, self.heads = compile, attention.num_heads if attention.event_pooling else None
        parts = [_fold(unit.conv, unit.norm) for unit in (attention.q, attention.k, attention.v)]
        weight, bias = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        self.qkv = Product(weight, bias, dtype=dtype)
        self.proj = _product(attention.proj.conv, attention.proj.norm, dtype)
        self.neuron = Firing(attention.neuron, compile)
        inner = (attention.q_neuron, attention.k_neuron, attention.v_neuron, attention.mixer.neuron)
        self.inner_neurons: Any = nn.ModuleList(Firing(neuron, compile) for neuron in inner)

    def forward(self, membrane: Membrane) -> Membrane:
        u, spikes = self.neuron(membrane, self.qkv)
        qkv = _per_frame(self.qkv, spikes)
        neurons = [inner.neuron for inner in self.inner_neurons]
        masked = firing.attend(qkv, neurons, _wanted(self.proj, u.shape), heads=self.heads, compiled=self.compiled)
        return u, _per_frame(self.proj, masked)


class OptimizedMLP(nn.Module):
    """`SpikingMLP` and its shortcut on membranes `[T, B, H, W, dim]`."""

    def __init__(self, mlp: SpikingMLP, dtype: torch.dtype, compile: bool) -> None:
        super().__init__()
        self.shortcut_inside = mlp.hidden == mlp.dim
        self.fc1, self.fc2 = _product(mlp.fc1.conv, mlp.fc1.norm, dtype), _product(mlp.fc2.conv, mlp.fc2.norm, dtype)
        self.neuron1, self.neuron2 = Firing(mlp.neuron1, compile), Firing(mlp.neuron2, compile)

    def forward(self, membrane: Membrane) -> Membrane:
        u, spikes = self.neuron1(membrane, self.fc1)
        hidden = _per_frame(self.fc1, spikes)
        inner, spikes = self.neuron2((u, hidden) if self.shortcut_inside else (hidden, None), self.fc2)
        return inner if self.shortcut_inside else u, _per_frame(self.fc2, spikes)


class Kept(nn.Module):
    """A block of another make, as it is, on membranes `[T, B, H, W, dim]`."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = _frozen(block)

    def forward(self, membrane: Membrane) -> Membrane:
        u, change = membrane
        changed = self.block((u if change is None else u + change).movedim(-1, 2).contiguous())
        return changed.movedim(2, -1).contiguous(), None


class KeptPatchSplitting(Kept):
    """A patch splitting of another make, as it is."""

    def forward(self, frames: Tensor, steps: int) -> Membrane:  # type: ignore[override]
        membrane = self.block(frames.expand(steps, *frames.shape[1:]))
        return membrane.movedim(2, -1).contiguous(), None


def _wanted(consumer: Product, shape: Sequence[int]) -> torch.dtype:
    """The dtype that a product wants for spikes `[T, B, H, W, C]`."""
    return consumer.input_dtype(torch.Size((shape[0] * shape[1], *shape[2:])))


def _per_frame(product: nn.Module, x: Tensor) -> Tensor:
    frames: Tensor = product(x.flatten(0, 1))
    return frames.unflatten(0, x.shape[:2])


def _frozen(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).eval().requires_grad_(False)


def _product(conv: Any, norm: Any, dtype: torch.dtype, spikes: bool = True) -> Product:
    return Product(*_fold(conv, norm), dtype=dtype, spikes=spikes)


def _fold(conv: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias of `norm(conv(x))`, computed in float64."""
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    bias = -norm.running_mean.double() if conv.bias is None else conv.bias.double() - norm.running_mean.double()
    bias = bias * scale if norm.bias is None else bias * scale + norm.bias.double()
    return (conv.weight.double() * scale.view(-1, 1, 1, 1)).float(), bias.float()


def _runs_as(module: nn.Module, known: type[nn.Module], *methods: str) -> bool:
    """Whether the module is of the known class and computes as that class does: a subclass may add, not change."""
    names = methods or ("forward",)
    return isinstance(module, known) and all(getattr(type(module), m) is getattr(known, m) for m in names)


def _foldable(module: nn.Module) -> bool:
    """Whether every part is a plain convolution, a norm with running statistics, a LIF, a pooling or a container."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            kernel, stride = part.kernel_size[0], part.stride
            plain = stride == part.dilation == (1, 1) and part.groups == 1 and part.padding_mode == "zeros"
            known = _runs_as(part, nn.Conv2d) and plain and part.padding == (kernel // 2, kernel // 2)
        elif isinstance(part, nn.BatchNorm2d):
            known = _runs_as(part, nn.BatchNorm2d) and part.running_var is not None
        elif isinstance(part, LIF):
            known = _runs_as(part, LIF)
        elif isinstance(part, nn.MaxPool2d):
            known = (part.kernel_size, part.stride, part.padding, part.dilation) == (3, 2, 1, 1)
        elif isinstance(part, MaskMixer | ConvNorm):
            known = _runs_as(part, type(part)) and type(part) in (MaskMixer, ConvNorm)
        else:
            known = part is module or isinstance(part, nn.Identity | nn.ModuleList)
        if not known:
            return False
    return True


def _patch(patch: Any, dtype: torch.dtype, compile: bool) -> nn.Module:
    if _runs_as(patch, SpikingPatchSplitting) and _foldable(patch):
        return OptimizedPatchSplitting(patch, dtype, compile)
    return KeptPatchSplitting(patch)


def _halves(block: Any, dtype: torch.dtype, compile: bool) -> list[nn.Module]:
    """The parts of an encoder block, each optimised where it is known."""
    if not _runs_as(block, SpikeDrivenBlock):
        return [Kept(block)]
    return [_half(shortcut, dtype, compile) for shortcut in (block.attention, block.mlp)]


def _half(shortcut: Any, dtype: torch.dtype, compile: bool) -> nn.Module:
    if _runs_as(shortcut, MembraneShortcut) and _foldable(shortcut.branch):
        if _runs_as(shortcut.branch, SpikeDrivenSelfAttention):
            return OptimizedAttention(shortcut.branch, dtype, compile)
        if _runs_as(shortcut.branch, SpikingMLP):
            return OptimizedMLP(shortcut.branch, dtype, compile)
    return Kept(shortcut)
