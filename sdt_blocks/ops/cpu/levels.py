"""Integer neurons' kernels for CPU tensors, in C++ (`levels.h`); see `LevelKernels`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec import Affine, Layout, LevelSpec
from . import bindings
from .training import _call, _run, _threads


def levels(x: Tensor, neuron: LevelSpec, values: Tensor, inside: Tensor | None) -> None:
    _run("levels", x, bindings.levels(neuron), x, x.numel(), _threads(x.numel()), values, inside)


def levels_backward(grad: Tensor, inside: Tensor, neuron: LevelSpec, grad_x: Tensor) -> None:
    size = grad.numel()
    _run("levels_backward", grad, bindings.levels(neuron), grad, inside, size, _threads(size), grad_x)


def norm_levels(x: Tensor, layout: Layout, neuron: LevelSpec, norm: Affine, values: Tensor) -> None:
    _call("norm_levels", x, layout, bindings.levels(neuron), x, norm.scale, norm.mean, _bias(norm), values)


def norm_levels_backward(
    grad: Tensor, x: Tensor, layout: Layout, neuron: LevelSpec, norm: Affine, grad_x: Tensor
) -> Tensor:
    sums = x.new_empty(1, 3, 1, layout.channels, dtype=torch.float64)
    affine = (norm.scale, norm.mean, _bias(norm))
    _call("norm_levels_backward", x, layout, bindings.levels(neuron), grad, grad.stride(0), x, *affine, grad_x, sums)
    return sums


def _bias(norm: Affine) -> Tensor | None:
    return None if norm.bias is None else norm.bias[0]
