"""Ops that PyTorch knows by name, and a shortcut past its registry for calls that do not need the name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..surrogate import transformed

_PLAIN = {Tensor, torch.nn.Parameter, type(None), bool, int, float, str, list}
"""The types of arguments whose behavior nobody has overridden."""


class RegisteredOp:
    """An op `sdt_blocks::name` of PyTorch, called by position.

    Whatever traces, compiles, transforms or records PyTorch's calls sees the op, and so do tensors of a subclass. All
    other calls, which is almost every one, use the same function and the same gradient without the registry, whose
    layers take longer than the kernels of a small layer: `gradients` then belongs to an autograd function of the op.
    """

    def __init__(self, name: str, compute: Callable[..., Any]) -> None:
        self.op = torch.library.custom_op(name, compute, mutates_args=())
        self.compute, self.name = compute, name
        namespace, _, short = name.partition("::")
        self.overload = getattr(getattr(torch.ops, namespace), short).default
        parameters = inspect.signature(compute).parameters.values()
        self.defaults = tuple(parameter.default for parameter in parameters)
        self.function: Any = None

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """Compute shapes and dtypes of the results without data, as for any op."""
        self.op.register_fake(fake)
        return fake

    def register_autograd(self, gradients: Callable[..., Any], *, keep: Callable[..., None]) -> None:
        """`keep(ctx, inputs, output)` saves what `gradients(ctx, *arriving)` needs; one gradient for every argument."""
        self.op.register_autograd(gradients, setup_context=keep)
        compute = self.compute

        def forward(ctx: Any, *arguments: Any) -> Any:
            output = compute(*arguments)
            keep(ctx, arguments, output)
            return output

        members = {"forward": staticmethod(forward), "backward": staticmethod(gradients)}
        self.function = type(self.name.replace("::", "_"), (torch.autograd.Function,), members)

    def __call__(self, *arguments: Any) -> Any:
        if watched() or not _PLAIN.issuperset(map(type, arguments)):
            return self.overload(*arguments)
        arguments += self.defaults[len(arguments) :]
        if self.function is not None and torch.is_grad_enabled() and any(map(_has_gradient, arguments)):
            return self.function.apply(*arguments)
        return self.compute(*arguments)


def registered(name: str) -> Callable[[Callable[..., Any]], RegisteredOp]:
    """Make a function of tensors, numbers and lists of numbers a `RegisteredOp`."""
    return lambda compute: RegisteredOp(name, compute)


def _has_gradient(argument: Any) -> bool:
    return isinstance(argument, Tensor) and argument.requires_grad


def watched() -> bool:
    """Whether a compiler, a mode, a transform or the profiler is watching the calls of PyTorch's ops."""
    return (
        torch.compiler.is_compiling()
        or transformed()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._autograd._profiler_enabled()
    )
