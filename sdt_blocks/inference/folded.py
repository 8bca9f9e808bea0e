"""Folds the units of a network in place, for code that looks at its layers while it runs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .. import steps
from .frames import ConvAndNorm
from .plan import MIX, PROJECT, Plan, convolution, fold
from .trace import Traced, trace, unwrap


class FoldedConv2d(nn.Conv2d):
    """A convolution with its norm folded into the weights; `trained_as` names the layers that it replaces."""

    trained_as: tuple[str, ...] = ()


class FoldedNorm(nn.Identity):
    """The place of a norm that has been folded; it still tells how many batches the norm has seen."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.num_batches_tracked = getattr(norm, "num_batches_tracked", None)


@contextmanager
def folded(model: nn.Module) -> Iterator[None]:
    """A context in which every unit of the model is the one convolution that evaluation makes of it.

    Norms are folded into the weights before them, and a unit that is trained as several layers becomes one: in place,
    as `conv` and `norm` of the unit, so that hooks, names and the model's own code still work. Afterwards the model is
    restored. Units whose call cannot be traced stay as they are; one warning names the modules that contain them.

    Raises `TypeError` if the model is not a module.
    """
    swapped: list[tuple[Any, nn.Module, nn.Module]] = []
    try:
        for unit, conv, norm in _foldable(model):
            swapped.append((unit, unit.conv, unit.norm))
            unit.conv, unit.norm = conv, norm
        yield
    finally:
        for unit, conv, norm in reversed(swapped):
            unit.conv, unit.norm = conv, norm


def _foldable(model: nn.Module) -> list[tuple[Any, FoldedConv2d, FoldedNorm]]:
    """The units of the model, with the layers that replace theirs."""
    model = unwrap(model)
    if not _holds_units(model):
        return []
    try:
        traced = trace(model)
    except Exception as error:  # the network's own code may raise anything when it is copied or called
        _tell({type(model).__name__: str(error)})
        return []
    stay = _untouched(traced)
    names = {id(module): name for name, module in traced.network.named_modules()}
    found = []
    for unit in _units(traced.plan):
        known = convolution(unit)
        if known is None:
            hooked = any(map(steps.has_hooks, unit.modules()))
            stay[names[id(unit)]] = "it has hooks" if hooked else "it is no plain convolution and batch normalization"
        else:
            found.append((model.get_submodule(names[id(unit)]), _folded(unit, *known), FoldedNorm(unit.norm)))
    if stay:
        _tell(stay)
    return found


def _units(plan: Plan) -> list[Any]:
    """The units that a plan calls, each once."""
    called = [node.target for node in plan.nodes if node.op == PROJECT]
    called += [unit for node in plan.nodes if node.op == MIX for unit in node.target.units]
    return list({id(unit): unit for unit in called if _is_trained(unit)}.values())


def _is_trained(unit: Any) -> bool:
    """Whether a module of the network is a unit that is not folded yet; plain layers are left alone."""
    return (
        isinstance(unit, steps.Unit) and not isinstance(unit, ConvAndNorm) and not isinstance(unit.conv, FoldedConv2d)
    )


def _untouched(traced: Traced) -> dict[str, str]:
    """The opaque modules that contain units which the plan does not call, with the reason."""
    called = set(map(id, _units(traced.plan)))
    return {
        name: why
        for name, why in traced.opaque.items()
        if _holds_units(part := traced.network.get_submodule(name)) and id(part) not in called
    }


def _holds_units(module: nn.Module) -> bool:
    return any(_is_trained(part) for part in module.modules())


def _folded(unit: Any, conv: nn.Conv2d, norm: nn.BatchNorm2d | None) -> FoldedConv2d:
    weight, bias = fold(conv, norm)
    assert not isinstance(conv.padding, str)
    result = FoldedConv2d(
        conv.in_channels,
        conv.out_channels,
        (conv.kernel_size[0], conv.kernel_size[1]),
        stride=(conv.stride[0], conv.stride[1]),
        padding=(conv.padding[0], conv.padding[1]),
        dilation=(conv.dilation[0], conv.dilation[1]),
        groups=conv.groups,
        device="meta",
    )
    result.weight = nn.Parameter(weight.to(conv.weight.dtype), requires_grad=False)
    result.bias = nn.Parameter(bias.to(conv.weight.dtype), requires_grad=False)
    if not isinstance(unit.conv, nn.Conv2d):
        layers = [name for name, layer in unit.conv.named_modules() if not list(layer.children())]
        result.trained_as = tuple(layers)
    return result.eval()


def _tell(stay: dict[str, str]) -> None:
    by_reason: dict[str, list[str]] = {}
    for name, why in stay.items():
        by_reason.setdefault(why, []).append(name or "the network")
    told = "; ".join(f"{', '.join(names)} ({why})" for why, names in by_reason.items())
    warnings.warn(f"judged as it stands, since it cannot be folded: {told}", stacklevel=5)
