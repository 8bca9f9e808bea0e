"""Replaces every neuron of a network and keeps its weights."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import snntorch
import torch
from snntorch._neurons.neurons import SpikingNeuron
from torch import Tensor, nn

from ..evaluation import evaluating
from .lif import LIF, NeuronLike, make_neuron, neuron_spec, wants_channels
from .stepping import OverTime, fires, states_of, takes_sequence


def find_neurons(model: nn.Module, extra: Sequence[type[nn.Module]] = ()) -> dict[str, nn.Module]:
    """The neuron layers by name: the kit's, snnTorch's, and modules of the types in `extra`.

    A neuron inside another one, such as the one that `over_time` wraps, is not listed by itself.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        neuron = fires(module) or isinstance(module, tuple(extra))
        if neuron and not any(not outer or name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return found


def replace_neurons(
    model: nn.Module,
    neuron: NeuronLike,
    *,
    neurons: Sequence[type[nn.Module]] = (),
    inputs: Any = None,
) -> nn.Module:
    """Replaces every neuron of the model in place; weights and norms stay. Returns the model.

    `neuron` is what blocks take: a name, a name with options, or a factory, called with `threshold=`, the present
    threshold of the layer. A factory with an argument `old` gets the neuron that it replaces, and may take over
    anything from it; one that needs `channels` gets the layer's width, which is found by running the model on `inputs`
    if the old neurons do not tell it. Parameters with the same name and shape in the old and the new neuron keep their
    values (the `w` of `ParametricLIF`); everything else is the new neuron's. A neuron used in several places is
    replaced by one neuron. `neurons` are further types to replace, besides the kit's and snnTorch's, that are called
    with `[T, ...]`.

    If the network calls its neurons step by step, as snnTorch's do, a `LIF` or `ParametricLIF` is called like
    `snntorch.Leaky`, with the membrane passed or hidden, and `snntorch.utils.reset` resets it. Any other neuron of
    snnTorch can replace one with the same number of states; `init_hidden` and `output` are passed on.

    Raises `ValueError` if there is no neuron, if hooks, learned parameters or a threshold per channel would be lost, or
    if a width is unknown, and `TypeError` for a factory that does not fit the way in which the network calls its
    neurons. The model is then unchanged.

    >>> model = replace_neurons(create_model("sdt_2_256", dim=32), {"name": "plif", "init_tau": 3.0})
    >>> model.blocks[0].attention.branch.mixer.neuron
    ParametricLIF(w: scalar, threshold=0.5, reset='zero')
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"replace_neurons takes a torch.nn.Module, got {type(model).__name__}")
    neuron = neuron_spec(neuron)
    found = find_neurons(model, neurons)
    if not found:
        raise ValueError(f"{type(model).__name__} has no known neuron; name the types of its neurons in neurons=")
    if "" in found:
        raise ValueError(f"the model is itself a neuron, {type(model).__name__}: make the other neuron instead")
    widths = _widths(model, found, neuron, inputs) if wants_channels(neuron) else {}
    where = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(0))
    made = {old: _successor(name, old, neuron, widths.get(name), where) for name, old in found.items()}
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child in made:
                parent._modules[key] = made[child]
    return model


def _successor(name: str, old: nn.Module, neuron: NeuronLike, channels: int | None, where: Tensor) -> nn.Module:
    """The neuron that replaces the old one, on the device and in the dtype of `where`."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(part, kind) for part in old.modules() for kind in hooks):
        raise ValueError(f"{name} has hooks, which would be lost; remove them first, and hook the new neuron")
    parameters = inspect.signature(neuron).parameters if callable(neuron) else {}
    informed = "old" in parameters
    make: Any = partial(neuron, old=old) if informed and callable(neuron) else neuron
    stepwise = not takes_sequence(old)
    if stepwise:
        given = neuron.keywords if isinstance(neuron, partial) else {}
        flags = {flag: bool(getattr(old, flag, False)) for flag in ("init_hidden", "output")}
        options = {flag: value for flag, value in flags.items() if flag in parameters and flag not in given}
        make = partial(make, **options) if options else make
    new = make_neuron(make, channels=channels or 0, threshold=_threshold(name, old, informed))
    if stepwise:
        new = _in_steps(name, old, new)
    new.to(where.device, where.dtype).train(old.training)
    if not informed:
        _keep_learned(name, old, new)
    return new


def _in_steps(name: str, old: nn.Module, new: nn.Module) -> nn.Module:
    """The new neuron in a form that can be called once a step, as the old one is."""
    new = new.neuron if isinstance(new, OverTime) else new
    if not isinstance(old, SpikingNeuron):
        if takes_sequence(new):
            raise TypeError(
                f"{name}, {type(old).__name__}, takes one time step a call, {type(new).__name__} a sequence"
            )
        return new
    hidden, output, states = old.init_hidden, old.output, states_of(old)
    if isinstance(new, LIF) and states == 1:
        return InSteps(new, init_hidden=hidden, output=output)
    calls = f"init_hidden={hidden}, output={output} and {states} state(s)"
    if not isinstance(new, SpikingNeuron) or isinstance(new, LIF):
        raise TypeError(
            f"{name} is called once a time step, with {calls}, which {type(new).__name__} does not take: give a neuron "
            f"of snnTorch with as many, or where it is one, LIF or ParametricLIF"
        )
    if (new.init_hidden, new.output, states_of(new)) != (hidden, output, states):
        raise TypeError(
            f"{name} is called with {calls}; {type(new).__name__} has init_hidden={new.init_hidden}, "
            f"output={new.output} and {states_of(new)}"
        )
    return new


def _threshold(name: str, old: nn.Module, informed: bool) -> float:
    """The threshold of a neuron, 1 where it has none."""
    inner = old.neuron if isinstance(old, OverTime | InSteps) else old
    threshold = getattr(inner, "threshold", getattr(inner, "v_threshold", 1.0))
    if isinstance(threshold, Tensor) and threshold.numel() > 1:
        if not informed:
            raise ValueError(
                f"{name} has a threshold for each of {threshold.numel()} channels, which threshold= cannot hold; give "
                f"a factory with an argument old, the neuron that goes, and take it from there"
            )
        return 1.0
    return float(threshold.detach() if isinstance(threshold, Tensor) else threshold)


def _keep_learned(name: str, old: nn.Module, new: nn.Module) -> None:
    """Copies the old neuron's parameters to the new one. Raises `ValueError` for one that has no place there."""
    places = dict(new.named_parameters())
    for key, value in _bare(old).items():
        place = _bare(new).get(key)
        if place is None or place.shape != value.shape:
            raise ValueError(
                f"{name}, {type(old).__name__}, has learned {key} {list(value.shape)}, which has no place in "
                f"{type(new).__name__} ({', '.join(places) or 'nothing learned'}): give a factory with an argument "
                f"old, the neuron that goes, which takes it over or leaves it: lambda threshold, old: ..."
            )
        with torch.no_grad():
            place.copy_(value)
        place.requires_grad_(value.requires_grad)


def _bare(neuron: nn.Module) -> Mapping[str, nn.Parameter]:
    """A neuron's parameters by name, without the prefix of a wrapper."""
    wrapped = isinstance(neuron, OverTime | InSteps)
    return {key.removeprefix("neuron.") if wrapped else key: value for key, value in neuron.named_parameters()}


def _widths(model: nn.Module, found: Mapping[str, nn.Module], neuron: NeuronLike, inputs: Any) -> dict[str, int]:
    """The number of channels of each neuron layer: the third axis of a sequence, the second of a single step."""
    learned = {name: getattr(old, "w", None) for name, old in found.items()}
    seen = {name: w.numel() for name, w in learned.items() if isinstance(w, Tensor) and w.ndim}
    if len(seen) == len(found):
        return seen
    if inputs is None:
        raise ValueError(f"{neuron!r} needs the width of each layer: give inputs=, something that the model takes")
    handles = []
    for name, old in found.items():
        axis = 2 if takes_sequence(old) else 1

        def note(_: nn.Module, args: Any, name: str = name, axis: int = axis) -> None:
            seen[name] = args[0].shape[min(axis, args[0].ndim - 1)]

        handles.append(old.register_forward_pre_hook(note))
    try:
        with torch.no_grad(), evaluating(model):
            model(*(inputs if isinstance(inputs, tuple) else (inputs,)))
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for name in found if name not in seen]
    if missing:
        raise ValueError(f"inputs did not reach {', '.join(missing)}, so that their width is unknown")
    return seen


class InSteps(snntorch.Leaky):
    """A `LIF` that is called like snnTorch's `Leaky`, once a time step: `spikes, membrane = neuron(x, membrane)`.

    With `init_hidden` it keeps the membrane itself, until `reset_mem` or `snntorch.utils.reset`, and returns the spikes
    alone unless `output` is set. A membrane that is kept starts anew with a batch of another shape, as in snnTorch.

    Shapes: x, spikes and membrane `[B, ...]`. Raises `ValueError` for a membrane of another shape.

    >>> InSteps(LIF(tau=2.0))(torch.ones(1, 3))
    (tensor([[0., 0., 0.]]), tensor([[0.5000, 0.5000, 0.5000]]))
    """

    mem: Tensor

    def __init__(self, neuron: LIF, *, init_hidden: bool = False, output: bool = False) -> None:
        nn.Module.__init__(self)  # the constants of a Leaky are the neuron's
        SpikingNeuron.instances.append(self)  # where snntorch.utils.reset looks
        self.neuron, self.init_hidden, self.output = neuron, init_hidden, output
        self.graded_spikes_factor = 1.0
        self._init_mem()

    @property
    def threshold(self) -> float:  # type: ignore[override]
        return self.neuron.threshold

    def forward(self, input_: Tensor, mem: Tensor | None = None) -> Any:  # type: ignore[override]
        if self.init_hidden and mem is not None:
            raise TypeError("the membrane is kept inside (init_hidden=True) and cannot be given")
        if mem is None and self.mem.shape == input_.shape:
            mem = self.mem
        spikes, mem = self.neuron.step(input_, mem)
        if not self.init_hidden:
            return spikes, mem
        self.mem = mem
        return (spikes, mem) if self.output else spikes
