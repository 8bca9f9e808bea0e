"""Layers on spikes of one byte each with 8-bit weights, in evaluation on a GPU: exact sums, and the neurons on them.

The numbers are those of `ops.integers`: a weight is `integers * scale` with one scale per output channel, and sums of
whole numbers have no rounding. So the sums equal the CPU's to the bit, and the results differ at most by the rounding
in the epilogue.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .dense import Neuron, spec_of
from .dispatch import by_triton, of_triton
from .integers import Windows
from .levels import levels
from .lif import lif
from .spec import ByteLayer, LevelSpec

LARGEST = 127
"""The largest count or level that fits a byte."""
Result = tuple[Tensor | None, Tensor | None]
Firing = Neuron | LevelSpec


def spike_layer(
    x: Tensor,
    layer: ByteLayer,
    *,
    residual: Tensor | None = None,
    membrane: torch.dtype | None = None,
    neuron: Firing | None = None,
) -> Result:
    """`(u, spikes of u)` with `u = residual + sum * scale + shift`, each `None` if it is not asked for.

    `sum` is the convolution of spikes, counts or levels x, int8 `[T, B, H, W, in]`. u `[T, B, H', W', out]` is computed
    in float32, as is `residual`, and returned in the dtype `membrane`. Spikes are int8, and of integer neurons levels,
    whatever their norm. Neurons start at rest.

    If Triton's kernels run, the sums are computed by tensor cores, otherwise in float64.

    Raises `ValueError` for another dtype or shape.

    >>> ones = torch.ones(4, 1, 2, 2, 16, dtype=torch.int8)
    >>> u, _ = spike_layer(ones, ByteLayer(ones[:, :1, :1, 0], *torch.ones(2, 4)), membrane=torch.float32)
    >>> u.shape, u.unique()
    (torch.Size([4, 1, 2, 2, 4]), tensor([17.]))
    """
    size = check(x, layer, residual, neuron)
    if not by_triton(layer.scale):
        return _equations(x, layer, residual, membrane, neuron)
    held = None if residual is None else residual.contiguous()
    told = spec_of(neuron)._replace(inv_tau=neuron.inv_tau) if isinstance(neuron, Neuron) else neuron
    found: Result = of_triton("bytes").spike_layer(x.contiguous(), layer, size, held, membrane, told)
    return found


def check(x: Tensor, layer: ByteLayer, residual: Tensor | None, neuron: Firing | None) -> tuple[int, int]:
    """Height and width of the result; raises `ValueError` for arguments that do not fit."""
    weight, scale, shift, windows = layer
    if x.dtype != torch.int8 or weight.dtype != torch.int8 or x.ndim != 5 or weight.ndim != 4 or 0 in x.shape:
        raise ValueError(
            f"expected int8 [T, B, H, W, in] with nothing empty and an int8 weight [out, height, width, in], got "
            f"{x.dtype} {list(x.shape)} and {weight.dtype} {list(weight.shape)}"
        )
    if x.shape[-1] != weight.shape[-1] or scale.shape != (len(weight),) or shift.shape != scale.shape:
        raise ValueError(
            f"a weight {list(weight.shape)} needs {weight.shape[-1]} inputs and {len(weight)} scales and shifts, got "
            f"{x.shape[-1]}, {list(scale.shape)} and {list(shift.shape)}"
        )
    if isinstance(neuron, LevelSpec) and neuron.levels > LARGEST:
        raise ValueError(f"a byte holds levels up to {LARGEST}, the neurons have {neuron.levels}")
    if isinstance(neuron, Neuron) and (neuron.before is not None or neuron.after is not None):
        raise ValueError("neurons of a layer of bytes start at rest; keep the membrane, and fire on it by `dense.fire`")
    size = Windows(*windows).size(x.shape[2:4], weight.shape[1:3])
    if residual is not None and residual.shape != (*x.shape[:2], *size, len(weight)):
        raise ValueError(
            f"the shortcut must be {[*x.shape[:2], *size, len(weight)]} as the result is, got {list(residual.shape)}"
        )
    return size


def _equations(
    x: Tensor,
    layer: ByteLayer,
    residual: Tensor | None,
    membrane: torch.dtype | None,
    neuron: Firing | None,
) -> Result:
    images, weight = x.flatten(0, 1).permute(0, 3, 1, 2).double(), layer.weight.permute(0, 3, 1, 2).double()
    stride, padding, dilation = map(tuple, layer.windows)
    sums = F.conv2d(images, weight, None, stride, padding, dilation).permute(0, 2, 3, 1)
    u = torch.addcmul(layer.shift.double(), sums, layer.scale.double()).float().unflatten(0, x.shape[:2])
    u = u if residual is None else residual.float() + u
    spikes = None
    if isinstance(neuron, LevelSpec):
        # NaN has no level: silent, as in the kernels.
        spikes = levels(u, neuron._replace(norm=1.0)).nan_to_num(0.0).to(torch.int8)
    elif neuron is not None:
        fired = lif(u.flatten(1, 3), spec_of(neuron)._replace(inv_tau=neuron.inv_tau))
        assert isinstance(fired, Tensor)
        spikes = fired.view(u.shape).to(torch.int8)
    return (None if membrane is None else u.to(membrane)), spikes
