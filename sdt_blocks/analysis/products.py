"""Products of two tensors: which of PyTorch's operations compute one, of which rows, and how much they multiply."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dataflow import OUTER, SUMMED


class Window(NamedTuple):
    """How a convolution's kernel covers its input: for each axis, how many products each input takes part in."""

    uses: tuple[Tensor, ...]
    fan_out: int

    def executed(self, x: Tensor, *, whole: bool) -> tuple[Tensor, float]:
        """Products of the non-zero entries of each row of x `[N, C, ...]`, and those of all rows if all counted.

        If entries are `whole` numbers of additions, they count that many times.
        """
        dense = float(x.shape[0] * x.shape[1] * self.fan_out)
        for uses in self.uses:
            dense *= float(uses.sum())
        if x.is_meta:
            return torch.zeros(len(x), dtype=torch.float64), dense
        found = x.sum(1, dtype=torch.float64) if whole else x.count_nonzero(dim=1).double()
        for uses in reversed(self.uses):
            found = found @ uses.to(found.device)
        return found * self.fan_out, dense


def window(x: Tensor, weight: Tensor, output: Tensor, convolution: Sequence[Any]) -> Window:
    """The window of a call of PyTorch's `convolution`, whose arguments are given from the strides on."""
    strides, paddings, dilations, transposed, _, groups = convolution[:6]
    # A transposed convolution spreads its input over its output, where a plain one gathers its output from its input.
    inner, outer = (output, x) if transposed else (x, output)
    uses = []
    for axis, kernel in enumerate(weight.shape[2:]):
        stride, padding, dilation = (each[axis % len(each)] for each in (strides, paddings, dilations))
        taps = torch.arange(kernel) * dilation - padding
        places = torch.arange(outer.shape[axis + 2])[:, None] * stride + taps
        inside = (places >= 0) & (places < inner.shape[axis + 2])
        found = inside.sum(1) if transposed else torch.bincount(places[inside], minlength=inner.shape[axis + 2])
        uses.append(found.double())
    return Window(tuple(uses), weight.shape[1] if transposed else weight.shape[0] // groups)


class Factors(NamedTuple):
    """A product of two tensors, its multiply-accumulates, and each factor as the rows that are multiplied.

    `window` is that of a convolution of a, which does not multiply on its padding.
    """

    a: Tensor
    b: Tensor
    macs: float
    kind: str
    a_rows: Tensor
    b_rows: Tensor
    window: Window | None = None


def _matrices(a: Tensor, b: Tensor) -> list[Factors]:
    return [Factors(a, b, a.numel() * b.shape[-1], "matmul", a, b.mT)]


def _vector(a: Tensor, b: Tensor) -> list[Factors]:
    return [Factors(a, b, a.numel(), "matmul", a if a.ndim > 1 else a[None], b[None])]


def _outer(a: Tensor, b: Tensor, product: Tensor) -> list[Factors]:
    rows = torch.broadcast_tensors(a, b)
    a_rows, b_rows = (row if row.ndim > 1 else row[None] for row in rows)
    return [Factors(a, b, product.numel(), "matmul", a_rows, b_rows)]


def _convolution(args: Sequence[Any], output: Tensor) -> list[Factors]:
    x, weight, transposed = args[0], args[1], args[6]
    positions = x.numel() if transposed else output.numel()
    covered = window(x, weight, output, args[3:])
    return [Factors(x, weight, positions * weight[0].numel(), "conv", x, weight, covered)]


def _linear(args: Sequence[Any], output: Tensor) -> list[Factors]:
    x, weight = args[:2]
    return [Factors(x, weight, x.numel() * len(weight), "matmul", x, weight)]


def _softmax_attention(args: Sequence[Any], output: Any) -> list[Factors]:
    """Both products of a fused softmax attention; the factor of V in the second is not spikes."""
    q, k, v = args[:3]
    first = q.numel() * k.shape[-2]
    second = first // q.shape[-1] * v.shape[-1]
    return [Factors(q, k, first, "matmul", q, k), Factors(_analog(q), v, second, "matmul", _analog(q), _analog(q))]


def _bilinear(args: Sequence[Any], output: Tensor) -> list[Factors]:
    """Each pair of rows x and y gives x W y: x W first, then its product with y."""
    x, weight, y = args[:3]
    first = len(x) * weight.numel()
    return [
        Factors(x, weight, first, "matmul", x, weight),
        Factors(_analog(y), y, first // x.shape[-1], "matmul", _analog(y), y),
    ]


def _recurrent(args: Sequence[Any], output: Any) -> list[Factors]:
    x, from_input, from_hidden = args[:3]
    hidden = output[0]
    steps = x.numel() // x.shape[-1]
    return [
        Factors(x, from_input, steps * from_input.numel(), "matmul", x, from_input),
        Factors(hidden, from_hidden, steps * from_hidden.numel(), "matmul", hidden, from_hidden),
    ]


FUSED_ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)

UNCOUNTED = {**dict.fromkeys(FUSED_ATTENTION, ("_softmax",)), "mkldnn_rnn_layer": ("sigmoid", "tanh", "mul")}
"""Operations inside others, besides the products that a rule counts, under the names that they have alone."""

RULES: dict[str, Callable[[Sequence[Any], Any], list[Factors]]] = {
    **dict.fromkeys(("mm", "bmm", "matmul"), lambda args, output: _matrices(*args[:2])),
    **dict.fromkeys(("addmm", "baddbmm", "addbmm"), lambda args, output: _matrices(*args[1:3])),
    **dict.fromkeys(("mv", "dot", "vdot"), lambda args, output: _vector(*args[:2])),
    "addmv": lambda args, output: _vector(*args[1:3]),
    "addr": lambda args, output: _outer(args[1][:, None], args[2], output),
    **dict.fromkeys((OUTER, SUMMED), lambda args, output: _outer(args[0], args[1], output)),
    "linear": _linear,
    **dict.fromkeys(("convolution", "convolution_overrideable"), _convolution),
    **dict.fromkeys(FUSED_ATTENTION, _softmax_attention),
    "_trilinear": _bilinear,
    "mkldnn_rnn_layer": _recurrent,
}
"""How the work of each operation is counted; any other that may multiply is reported as not counted."""


def _analog(like: Tensor) -> Tensor:
    """Rows like those of another factor, but not spikes."""
    return torch.full_like(like, -1.0)
