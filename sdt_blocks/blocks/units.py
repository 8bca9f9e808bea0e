"""Units: weights followed by a batch normalization."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..checks import check_flag
from ..steps import Unit, has_hooks, is_affine, is_bare, is_plain
from ..surrogate import transformed
from .sizes import check_widths


class ConvNorm(Unit):
    """A convolution that keeps the frame's size (or divides it by the stride, rounded up), then a batch normalization.

    Shapes: frames `[N, in_channels, H, W] -> [N, out_channels, ceil(H / stride), ceil(W / stride)]`.

    >>> ConvNorm(3, 8, 3, stride=2)(torch.rand(4, 3, 9, 9)).shape
    torch.Size([4, 8, 5, 5])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        *,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
    ) -> None:
        super().__init__()
        check_widths(
            in_channels=in_channels, out_channels=out_channels, kernel_size=kernel_size, stride=stride, groups=groups
        )
        check_flag("bias", bias)
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=bias
        )
        self.norm = nn.BatchNorm2d(out_channels)


class SeparableConvNorm(Unit):
    """A depthwise convolution, a 1x1 convolution and a batch normalization.

    In training the 1x1 convolution sees sums of weights, not spikes; `kernel` merges both into one convolution of
    spikes.

    Shapes: frames `[N, in_channels, H, W] -> [N, out_channels, H, W]`.

    >>> SeparableConvNorm(16, 8)(torch.rand(4, 16, 9, 9)).shape
    torch.Size([4, 8, 9, 9])
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 7) -> None:
        super().__init__()
        check_widths(in_channels=in_channels, out_channels=out_channels, kernel_size=kernel_size)
        layers = {
            "depthwise": nn.Conv2d(
                in_channels, in_channels, kernel_size, padding=kernel_size // 2, groups=in_channels, bias=False
            ),
            "pointwise": nn.Conv2d(in_channels, out_channels, 1, bias=False),
        }
        self.conv = nn.Sequential(OrderedDict(layers))
        self.norm = nn.BatchNorm2d(out_channels)

    @torch.no_grad()
    def kernel(self) -> nn.Conv2d | None:
        layers = layers_of(self, ("depthwise", "pointwise"))
        if layers is None:
            return None
        depthwise, pointwise = layers
        if not (is_depthwise(depthwise) and is_bare(pointwise, 1)):
            return None
        return merged_convolution(pointwise.weight * depthwise.weight[:, 0], None, like=pointwise)


class RepConv(Unit):
    """A 3x3 convolution that is trained as 1x1, depthwise 3x3 and 1x1 (Yao et al., 2024, Meta-SpikeFormer).

        conv: 1x1 -> PaddedNorm -> depthwise 3x3 -> 1x1 -> BN

    In training only the output of the first 1x1 is kept for the gradient; the rest of `conv` is recomputed.

    There is no neuron in between, so in eval mode the chain is one 3x3 convolution, which `kernel` gives. This is
    exact, since `PaddedNorm` fills its border with what the first norm makes of the zeros around a frame.

    Shapes: frames `[N, in_channels, H, W] -> [N, out_channels, H, W]`.

    >>> RepConv(16, 16)(torch.rand(4, 16, 9, 9)).shape
    torch.Size([4, 16, 9, 9])
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        check_widths(in_channels=in_channels, out_channels=out_channels)
        layers = {
            "pointwise1": nn.Conv2d(in_channels, in_channels, 1, bias=False),
            "border": PaddedNorm(in_channels),
            "depthwise": nn.Conv2d(in_channels, in_channels, 3, groups=in_channels, bias=False),
            "pointwise2": nn.Conv2d(in_channels, out_channels, 1, bias=False),
            "norm": nn.BatchNorm2d(out_channels),
        }
        self.conv = Recomputed(OrderedDict(layers))
        self.norm = nn.BatchNorm2d(out_channels)

    @torch.no_grad()
    def kernel(self) -> nn.Conv2d | None:
        if not self._is_as_built():
            return None
        before, depthwise, after, bias, like = self._merged()
        return merged_convolution(torch.einsum("om,mhw,mi->oihw", after, depthwise, before), bias, like=like)

    @torch.no_grad()
    def chain(self) -> list[nn.Conv2d] | None:
        """1x1, depthwise 3x3 padded with zeros, and 1x1 with a bias: the norms are folded in."""
        if not self._is_as_built():
            return None
        before, depthwise, after, bias, like = self._merged()
        return [
            merged_convolution(before[..., None, None], None, like=like),
            merged_convolution(depthwise[:, None], None, like=like, groups=len(depthwise)),
            merged_convolution(after[..., None, None], bias, like=like),
        ]

    def _is_as_built(self) -> bool:
        layers = layers_of(self, ("pointwise1", "border", "depthwise", "pointwise2", "norm"))
        if layers is None:
            return False
        first, border, depthwise, last, norm = layers
        norms = type(border) is PaddedNorm and is_affine(border.norm) and is_affine(norm)
        return norms and is_bare(first, 1) and is_bare(last, 1) and is_depthwise(depthwise, 3)

    def _merged(self) -> tuple[Tensor, Tensor, Tensor, Tensor, nn.Conv2d]:
        """Weights of the three convolutions and the final bias, in float64, and the last of the layers.

        The first norm's offset is the same everywhere, on the border too, so it becomes part of the final bias.
        """
        conv: Any = self.conv
        (gain1, offset1), (gain2, offset2) = affine_of(conv.border.norm), affine_of(conv.norm)
        before = gain1[:, None] * conv.pointwise1.weight.double()[..., 0, 0]
        depthwise = conv.depthwise.weight.double()[:, 0]
        after = gain2[:, None] * conv.pointwise2.weight.double()[..., 0, 0]
        return before, depthwise, after, after @ (depthwise.sum((1, 2)) * offset1) + offset2, conv.pointwise2


def layers_of(unit: Unit, names: Sequence[str]) -> list[Any] | None:
    """The layers of a unit's chain, `None` if they are not the ones named."""
    layers = dict(unit.conv.named_children())
    own = type(unit.conv) in (nn.Sequential, Recomputed) and list(layers) == list(names)
    return list(layers.values()) if own else None


def is_depthwise(layer: Any, size: int | None = None) -> bool:
    """Whether a layer is a depthwise `nn.Conv2d`, of this size without padding or of any that keeps the size."""
    if type(layer) is not nn.Conv2d or layer.in_channels != layer.out_channels:
        return False
    side, padding = (layer.kernel_size[0], layer.kernel_size[0] // 2) if size is None else (size, 0)
    return is_bare(layer, side, padding=padding, groups=layer.in_channels)


class PaddedNorm(nn.Module):
    """Batch normalization, surrounded by a border of one pixel that holds what the norm makes of zero.

    The border is computed from the running statistics, in training as they are after the step, and carries no gradient.
    When `torch.utils.checkpoint` recomputes a batch, the norm does not count it again, and the border is that of the
    last pass: of this batch's first one, unless another pass came in between.

    Shapes: `[N, channels, H, W] -> [N, channels, H + 2, W + 2]`.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, frames: Tensor) -> Tensor:
        normalized = self.normalized(frames)
        return self.pad(normalized, self.of_zero())

    def normalized(self, frames: Tensor) -> Tensor:
        """The normalized frames, without a border."""
        result: Tensor = _anew(self.norm)(frames) if _is_repeated(self.norm) else self.norm(frames)
        return result

    @torch.no_grad()
    def of_zero(self) -> Tensor:
        """What the norm makes of zero by its running statistics, `[channels]`. Raises `ValueError` if it has none."""
        norm = self.norm
        if norm.running_mean is None or norm.running_var is None or norm.weight is None or norm.bias is None:
            raise ValueError(
                "the border of a RepConv is what its norm makes of zero: leave that norm its running statistics, "
                "weight and bias"
            )
        weight, bias = norm.weight.detach(), norm.bias.detach()  # forward-mode gradients pass no_grad
        return bias - norm.running_mean * weight / (norm.running_var + norm.eps).sqrt()

    @staticmethod
    def pad(normalized: Tensor, of_zero: Tensor) -> Tensor:
        """Frames with a border of these values."""
        padded = F.pad(normalized, (1, 1, 1, 1))
        with torch.no_grad():
            for edge in (padded[..., 0, :], padded[..., -1, :], padded[..., 0], padded[..., -1]):
                edge.copy_(of_zero[:, None])
        return padded


class Recomputed(nn.Sequential):
    """Layers without a neuron between them: training keeps the output of the first one and recomputes the rest.

    When recomputing, norms use the same batch statistics and do not update the running ones. With a hook on a layer,
    under `torch.compile` and within transforms of `torch.func`, everything is kept instead.
    """

    def forward(self, frames: Tensor) -> Tensor:
        known = (nn.Conv2d, nn.BatchNorm2d, PaddedNorm)
        plain = all(is_plain(layer, *known) for layer in self) and not any(map(has_hooks, self.modules()))
        if not (plain and self.training and torch.is_grad_enabled()) or torch.compiler.is_compiling() or transformed():
            return super().forward(frames)
        first, *rest = self
        anew = {layer: _anew(layer.norm if isinstance(layer, PaddedNorm) else layer) for layer in rest}
        weights = [weight for layer in rest for weight in layer.parameters()]
        versions = [weight._version for weight in weights]
        again = False
        of_zero: dict[nn.Module, Tensor] = {}

        def compute(x: Tensor) -> Tensor:
            nonlocal again
            if again and versions != [weight._version for weight in weights]:
                raise RuntimeError(
                    "a weight that the gradient needs was modified in place between the forward and the backward pass"
                )
            for layer in rest:
                if isinstance(layer, PaddedNorm):
                    x = anew[layer](x) if again else layer.normalized(x)
                    # The border is that of the running statistics of the first pass.
                    x = layer.pad(x, of_zero[layer] if again else of_zero.setdefault(layer, layer.of_zero()))
                else:
                    x = anew[layer](x) if again else layer(x)
            again = True
            return x

        made: Tensor = checkpoint(compute, first(frames), use_reentrant=False, preserve_rng_state=False)
        return made


@contextmanager
def statistics_aside(norms: Sequence[nn.Module], before: Sequence[dict[str, Tensor | None]]) -> Iterator[None]:
    """A context in which norms have the running statistics `before`, which borders use; their own stay unchanged."""
    kept = [dict(norm._buffers) for norm in norms]
    for norm, buffers in zip(norms, before, strict=True):
        norm._buffers.update(buffers)
    _aside.update(norms)
    try:
        yield
    finally:
        _aside.difference_update(norms)
        for norm, buffers in zip(norms, kept, strict=True):
            norm._buffers.update(buffers)


_aside: WeakSet[nn.Module] = WeakSet()


def _is_repeated(norm: nn.Module) -> bool:
    """Whether a norm in training sees a batch for the second time: recomputed within a backward pass."""
    if not norm.training or torch.compiler.is_compiling() or norm in _aside:
        return False
    return torch._C._current_graph_task_id() != -1


def _anew(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """A convolution or norm with its present weights and mode, whatever it holds when this is called.

    A norm that counts batches in training has already counted this one: new statistics go into copies.
    """
    assert isinstance(layer, nn.Conv2d | nn.BatchNorm2d)
    weight, bias = layer.weight, layer.bias
    if isinstance(layer, nn.Conv2d):
        return lambda x: layer._conv_forward(x, weight, bias)
    mean, variance, eps = layer.running_mean, layer.running_var, layer.eps
    if mean is None or variance is None:
        return lambda x: F.batch_norm(x, None, None, weight, bias, training=True, eps=eps)
    if not layer.training:
        return lambda x: F.batch_norm(x, mean, variance, weight, bias, eps=eps)
    return lambda x: F.batch_norm(x, mean.clone(), variance.clone(), weight, bias, training=True, eps=eps)


def affine_of(norm: Any) -> tuple[Tensor, Tensor]:
    """Gain and offset per channel of an `nn.BatchNorm2d` in eval mode, in float64."""
    gain = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return gain, norm.bias.double() - norm.running_mean.double() * gain


def merged_convolution(weight: Tensor, bias: Tensor | None, like: nn.Conv2d, groups: int = 1) -> nn.Conv2d:
    """A convolution that keeps the frame's size, with this weight and bias in the dtype of `like`."""
    out_channels, in_channels, size, _ = weight.shape
    conv = nn.Conv2d(
        in_channels * groups, out_channels, size, padding=size // 2, groups=groups, bias=bias is not None, device="meta"
    )
    conv.weight = nn.Parameter(weight.to(like.weight.dtype))
    if bias is not None:
        conv.bias = nn.Parameter(bias.to(like.weight.dtype))
    return conv.train(like.training)
