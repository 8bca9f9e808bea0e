"""Surrogate gradients: one definition each, shared by the reference op and the fused kernels.

A spike is a step function of the membrane; its derivative is zero almost everywhere. Training replaces it by a smooth
surrogate (Neftci et al., 2019, https://arxiv.org/abs/1901.09948). Every surrogate here is finite for any finite input.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .checks import check_known, check_positive

Function = TypeVar("Function", bound=Callable[..., Any])

KINDS = ("sigmoid", "atan", "fast_sigmoid", "triangular", "straight_through")


@dataclass(frozen=True)
class Surrogate:
    """A surrogate derivative of the spike with respect to `shift = membrane - threshold`.

    Called like a snnTorch `spike_grad`, it returns `1` where `shift >= 0`, else `0`.

    Raises `ValueError` for an unknown `kind` or an `alpha` that is not positive and finite, and `TypeError` for one
    that is not a number.
    """

    kind: str = "sigmoid"
    alpha: float = 4.0

    def __post_init__(self) -> None:
        check_known("surrogate", self.kind, KINDS)
        check_positive("surrogate alpha", self.alpha)

    def derivative(self, shift: Tensor) -> Tensor:
        """The surrogate's value at `shift`, same shape and dtype."""
        return _derivative(shift, self.kind, self.alpha)

    def __call__(self, shift: Tensor) -> Tensor:
        return fire(shift, self)


class Scheduled:
    """A surrogate whose `alpha` changes from step to step, and the time constant of its neurons, which may change too.

    Both are kept in `numbers`, `[alpha, 1 / tau]`, a float64 tensor on the CPU: a graph built by torch.compile takes it
    as an input, and so stays valid for all values.
    """

    def __init__(self, surrogate: Surrogate, tau: float) -> None:
        self.kind, self.fixed = surrogate.kind, Surrogate(surrogate.kind)
        self.numbers = torch.tensor([surrogate.alpha, 1 / tau], dtype=torch.float64, device="cpu")

    fixed: Surrogate
    """A surrogate of the same kind, with the default `alpha`."""

    @property
    def alpha(self) -> Tensor:
        return self.numbers[0]

    @property
    def inv_tau(self) -> Tensor:
        return self.numbers[1]

    def change(self, surrogate: Surrogate, tau: float) -> None:
        """Takes the numbers of another surrogate and time constant."""
        self.numbers.copy_(torch.tensor([surrogate.alpha, 1 / tau], dtype=torch.float64))

    def __call__(self, shift: Tensor) -> Tensor:
        return fire(shift, self)


def _derivative(shift: Tensor, kind: str, a: float | Tensor) -> Tensor:
    if kind == "sigmoid":
        p = torch.sigmoid(a * shift)
        return a * p * (1 - p)
    if kind == "atan":
        return (a / 2) / (1 + (math.pi / 2 * a * shift) ** 2)
    if kind == "fast_sigmoid":
        return 1 / (a * shift.abs() + 1) ** 2
    if kind == "triangular":
        return a * (1 - a * shift.abs()).clamp(min=0)
    return torch.ones_like(shift)


def transformed() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is active, which only the equations support."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def constant_in_graphs(function: Function) -> Function:
    """Marks a function whose result `torch.compile` may take as a constant.

    The same as `torch.compiler.assume_constant_result`, which imports the compiler: that takes several times as long as
    this package.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


class _Spike(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(shift: Tensor, kind: str, alpha: float | Tensor, strict: bool) -> Tensor:  # type: ignore[override]
        return heaviside(shift, strict)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        shift, ctx.kind, alpha, _ = inputs
        if isinstance(alpha, Tensor):
            ctx.save_for_backward(shift, alpha)
        else:
            ctx.save_for_backward(shift)
            ctx.alpha = alpha

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        shift, *alpha = ctx.saved_tensors
        return grad * _derivative(shift, ctx.kind, alpha[0] if alpha else ctx.alpha), None, None, None


class _ForwardSpike(_Spike):
    """With a rule for forward-mode gradients, which torch.compile does not accept in a function."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _Spike.setup_context(ctx, inputs, output)
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def jvp(ctx, tangent: Tensor, *_: None) -> Tensor:  # type: ignore[override]
        (shift,) = ctx.saved_tensors
        result: Tensor = tangent * _derivative(shift, ctx.kind, ctx.alpha)
        return result


def heaviside(shift: Tensor, strict: bool = False) -> Tensor:
    """`1` where `shift >= 0` (`shift > 0` if `strict`), else `0`, in the dtype of `shift`."""
    return (shift > 0 if strict else shift >= 0).to(shift.dtype)


def fire(shift: Tensor, surrogate: Surrogate | Callable[[Tensor], Tensor], strict: bool = False) -> Tensor:
    """Spikes of `shift`, with the gradient of a `Surrogate` or of any snnTorch `spike_grad`."""
    if isinstance(surrogate, (Surrogate, Scheduled)):
        forward = transformed()
        if not forward and not (torch.is_grad_enabled() and shift.requires_grad):
            return heaviside(shift, strict)  # a plain operation, so that a traced model can be saved
        # Alpha is an argument of its own: torch.compile only accepts a changing number as an input of the graph.
        function = _ForwardSpike if forward else _Spike
        spikes: Tensor = function.apply(shift, surrogate.kind, surrogate.alpha, strict)
        return spikes
    soft = surrogate(shift)
    return soft + (heaviside(shift, strict) - soft).detach()


def sigmoid(alpha: float = 4.0) -> Surrogate:
    """`alpha * p * (1 - p)` with `p = sigmoid(alpha * shift)`: the released models' surrogate."""
    return Surrogate("sigmoid", alpha)


def atan(alpha: float = 2.0) -> Surrogate:
    """`(alpha / 2) / (1 + (pi / 2 * alpha * shift)^2)` (Fang et al., 2021, https://arxiv.org/abs/2007.05785)."""
    return Surrogate("atan", alpha)


def fast_sigmoid(alpha: float = 25.0) -> Surrogate:
    """`1 / (1 + alpha * |shift|)^2` (Zenke & Ganguli, 2018, https://arxiv.org/abs/1705.11146)."""
    return Surrogate("fast_sigmoid", alpha)


def triangular(alpha: float = 1.0) -> Surrogate:
    """`alpha * max(0, 1 - alpha * |shift|)` (Bellec et al., 2018, https://arxiv.org/abs/1803.09574)."""
    return Surrogate("triangular", alpha)


def straight_through() -> Surrogate:
    """`1` everywhere (Bengio et al., 2013, https://arxiv.org/abs/1308.3432)."""
    return Surrogate("straight_through", 1.0)


SurrogateLike = str | Mapping[str, Any] | Surrogate | Callable[[Tensor], Tensor]


def resolve(surrogate: SurrogateLike) -> Surrogate | Callable[[Tensor], Tensor]:
    """The surrogate that a name (`"atan"`), a name with its alpha, a `Surrogate` or a snnTorch `spike_grad` stands for.

    Raises `ValueError` or `TypeError` for anything else, such as a function that has to be called to get a
    `spike_grad`.

    >>> resolve({"kind": "atan", "alpha": 3.0})
    Surrogate(kind='atan', alpha=3.0)
    """
    if isinstance(surrogate, str):
        check_known("surrogate", surrogate, KINDS)
        made: Surrogate = globals()[surrogate]()
        return made
    if isinstance(surrogate, Mapping):
        if surrogate.keys() != {"kind", "alpha"}:
            raise ValueError(f'a surrogate with its alpha is {{"kind": ..., "alpha": ...}}, got {dict(surrogate)!r}')
        return Surrogate(**surrogate)
    if not callable(surrogate):
        raise TypeError(f"surrogate must be a name, a Surrogate or a snnTorch spike_grad callable, got {surrogate!r}")
    if _makes_surrogates(surrogate):
        name = getattr(surrogate, "__name__", "")
        raise TypeError(f"surrogate must be what {name} makes, not {name} itself: call it, as in {name}()")
    return surrogate


def _makes_surrogates(surrogate: Callable[..., Any]) -> bool:
    """Whether a callable is a class, or one of the functions here or in snnTorch that make a surrogate."""
    if not inspect.isfunction(surrogate):
        return isinstance(surrogate, type)
    ours = surrogate.__module__ == __name__ and surrogate.__name__ in KINDS
    return ours or (surrogate.__module__ == "snntorch.surrogate" and "<locals>" not in surrogate.__qualname__)


def surrogate_spec(surrogate: SurrogateLike) -> str | dict[str, Any] | None:
    """The surrogate as plain data: its name, with its alpha if that is not the default; None for a function."""
    chosen = resolve(surrogate)
    if not isinstance(chosen, Surrogate):
        return None
    return chosen.kind if chosen == resolve(chosen.kind) else {"kind": chosen.kind, "alpha": chosen.alpha}
