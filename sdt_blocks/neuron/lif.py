"""LIF and ParametricLIF: snnTorch neurons that take a whole sequence."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import snntorch
import torch
from snntorch._neurons.neurons import SpikingNeuron
from torch import Tensor, nn

from ..checks import check_flag, check_known, check_number, check_positive, check_whole
from ..ops import NeuronSpec, lif
from ..surrogate import Scheduled, Surrogate, SurrogateLike, fire, resolve, surrogate_spec
from .stepping import OverTime, remembers
from .stream import Streamed

NeuronFactory = Callable[..., nn.Module]
NeuronLike = str | Mapping[str, Any] | NeuronFactory
"""How a block is told which neurons to use: a name, a name with options, or a factory; see `make_neuron`."""


class LIF(snntorch.Leaky, Streamed):
    """Leaky integrate-and-fire over the leading time axis, without state between calls.

        h[t] = v[t-1] + (x[t] - v[t-1]) / tau;   s[t] = h[t] >= threshold;   v[t] = reset(h[t], s[t])

    It is snnTorch's `Leaky` with `beta = 1 - 1 / tau` and the input scaled by `1 / tau`; unlike there, a neuron whose
    membrane equals the threshold fires (`strict=True` restores snnTorch's `>`). Resets are snnTorch's: "zero",
    "subtract" (the next membrane is lowered by one threshold) and "none". `tau` is in time steps. `surrogate` is a
    name, a `Surrogate`, or any snnTorch `spike_grad`.

    A call takes a whole sequence: the first axis is time, never the batch, and the result is the spikes alone. For
    snnTorch's single step `spk, mem = lif(x, mem)` there is `step`. snnTorch's NIR export does not know the scaled
    input and rejects a `LIF`; use `sdt_blocks.inference.export_to_nir`.

    Shapes: `[T, ...] -> [T, ...]`. The state is float32 under mixed precision.

    Raises `ValueError` if tau < 1, threshold <= 0 or the reset is unknown, and `TypeError` if a constant is a tensor:
    only `ParametricLIF` learns one.

    >>> LIF(tau=2.0)(torch.ones(4, 8, 16)).shape
    torch.Size([4, 8, 16])
    """

    step_mode = "m"
    states = 1
    """How many numbers a neuron keeps from one time step to the next."""
    _scheduled: Scheduled | None = None
    """The surrogate and time constant as torch.compile sees them, once one of them has been changed."""

    def __init__(
        self,
        *,
        tau: float = 2.0,
        threshold: float = 1.0,
        reset: str = "zero",
        surrogate: SurrogateLike = "sigmoid",
        detach_reset: bool = True,
        strict: bool = False,
    ) -> None:
        check_number("tau", tau)
        check_positive("threshold", threshold)
        check_known("reset", reset, tuple(SpikingNeuron.reset_dict))
        for name, flag in (("detach_reset", detach_reset), ("strict", strict)):
            check_flag(name, flag)
        if not (tau >= 1 and math.isfinite(tau)):
            raise ValueError(f"tau must be at least 1 (one time step) and finite, got {tau!r}")
        chosen = resolve(surrogate)
        super().__init__(
            beta=1 - 1 / tau,
            threshold=threshold,
            spike_grad=_SpikeGradient(chosen, strict),
            reset_mechanism=reset,
        )
        # snnTorch's class-wide list would keep this module alive, and its memory with it.
        SpikingNeuron.instances[:] = [other for other in SpikingNeuron.instances if other is not self]
        self.tau = float(tau)
        self.surrogate = chosen
        self.detach_reset = detach_reset
        self.strict = strict

    # snnTorch keeps its constants in buffers of the state_dict. Here they are plain numbers: no read-back from a
    # device, nothing a half-precision cast could round, nothing in a checkpoint that is not learned.
    def _threshold_buffer(self, threshold: float, learn_threshold: bool) -> None:
        self.threshold = float(threshold)

    def _graded_spikes_buffer(self, graded_spikes_factor: float, learn_graded_spikes_factor: bool) -> None:
        self.graded_spikes_factor = float(graded_spikes_factor)

    def _reset_mechanism_buffer(self, reset_mechanism: str) -> None:
        self.reset_mechanism_val = SpikingNeuron.reset_dict[reset_mechanism]

    def _beta_buffer(self, beta: float, learn_beta: bool) -> None:
        pass

    @property
    def inv_tau(self) -> float | Tensor:
        """`1 / tau`, the share of the input in the new membrane."""
        return 1 / self.tau

    @property
    def spec(self) -> NeuronSpec:
        """The neuron's constants, as the ops take them."""
        if self._scheduled is not None and torch.compiler.is_compiling():
            inv_tau = 0.0 if type(self).inv_tau is LIF.inv_tau else self.inv_tau
            return NeuronSpec(
                self.threshold, self.reset_mechanism, self._scheduled, self.detach_reset, self.strict, inv_tau
            )
        return NeuronSpec(
            self.threshold, self.reset_mechanism, self.surrogate, self.detach_reset, self.strict, self.inv_tau
        )

    @property
    def told_surrogate(self) -> Surrogate | Scheduled | Callable[[Tensor], Tensor]:
        """The surrogate as a graph may hold it: `Scheduled`, whose numbers are inputs, once it has changed."""
        return self.surrogate if self._scheduled is None else self._scheduled

    def __setattr__(self, name: str, value: Any) -> None:
        known = self.__dict__.get(name)
        super().__setattr__(name, value)
        if name in ("tau", "surrogate") and known is not None and isinstance(self.surrogate, Surrogate):
            # What has never changed is a constant of a compiled graph; only the first change makes it compile again.
            if self._scheduled is None or self._scheduled.kind != self.surrogate.kind:
                self._scheduled = Scheduled(self.surrogate, self.tau)
            else:
                self._scheduled.change(self.surrogate, self.tau)

    @property
    def beta(self) -> Tensor:
        """snnTorch's decay rate, `1 - 1 / tau`."""
        return torch.as_tensor(1 - self.inv_tau)

    def forward(  # type: ignore[override]
        self, x: Tensor, membrane: Tensor | None = None, *, return_membrane: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Spikes `[T, ...]` for x `[T, ...]`; with `return_membrane` also the last membrane `x.shape[1:]`.

        The membrane is snnTorch's `mem`: the value before the reset. Passed to the next call, it continues the sequence
        exactly. Raises `ValueError` for an empty sequence or a membrane of another shape, such as a single step's.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"{type(self).__name__} takes a tensor [T, ...], got {type(x).__name__}")
        if membrane is not None and membrane.shape in (x.shape, (0,)) and membrane.shape != x.shape[1:]:
            raise ValueError(
                f"LIF takes a sequence [T, ...] and the membrane of one step; got {list(x.shape)} and "
                f"{list(membrane.shape)}, as for a single step of snnTorch: call step(x, membrane), or unsqueeze(0) x"
            )
        carrier = self.carrier if membrane is None else None
        if carrier is not None:
            membrane = carrier.membrane(self, x.shape[1:])
        result = lif(x, self.spec, membrane, return_membrane=return_membrane or carrier is not None)
        if carrier is None:
            return result
        carrier.keep_state(self, result[1])
        return result if return_membrane else result[0]

    def step(self, x: Tensor, membrane: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """snnTorch's own single step: `(spikes, membrane)` for one x `[...]` and the membrane of the step before.

        Raises `ValueError` for a membrane of another shape, with which snnTorch would start anew.
        """
        if membrane is not None and membrane.shape not in (x.shape, (0,)):
            raise ValueError(f"the membrane must have the shape {list(x.shape)} of x, got {list(membrane.shape)}")
        inv_tau = self.inv_tau
        if isinstance(inv_tau, Tensor) and inv_tau.ndim:
            raise ValueError("snnTorch's single step has one time constant a layer; run a sequence of length 1 instead")
        try:
            spikes, membrane = snntorch.Leaky.forward(
                self, x * inv_tau, torch.zeros_like(x) if membrane is None else membrane
            )
        finally:
            self.mem = torch.zeros(0)
            self.reset = None
        return spikes, membrane

    def mem_reset(self, mem: Tensor) -> Tensor:
        """snnTorch's reset of a single step, which it always detaches."""
        reset: Tensor = self.spike_grad(mem - self.threshold)
        return reset.detach() if self.detach_reset else reset

    def extra_repr(self) -> str:
        return f"tau={self.tau:g}, threshold={self.threshold:g}, reset={self.reset_mechanism!r}"


class ParametricLIF(LIF):
    """LIF whose time constant is learned: `1 / tau = sigmoid(w)` (Fang et al., 2021, https://arxiv.org/abs/2007.05785).

    `w` is one scalar for the layer, as in the released models, or with `channels=C` one for each channel of
    `[T, B, C, ...]`. Shapes and all other options are those of `LIF`.

    Raises `ValueError` if init_tau <= 1, for which no finite `w` exists, and `TypeError` for a `tau`.

    >>> ParametricLIF(init_tau=2.0).w
    Parameter containing:
    tensor(0., requires_grad=True)
    """

    def __init__(self, *, init_tau: float = 2.0, channels: int | None = None, **options: Any) -> None:
        if "tau" in options:
            raise TypeError(f"ParametricLIF learns its tau; init_tau={options['tau']!r} is what it starts from")
        check_number("init_tau", init_tau)
        if not (init_tau > 1 and math.isfinite(init_tau)):
            raise ValueError(f"init_tau must be a finite number above 1, got {init_tau!r}")
        if channels is not None:
            check_whole("channels", channels)
            check_positive("channels", channels)
        super().__init__(tau=init_tau, **options)
        w = -math.log(init_tau - 1) + 0.0
        self.w = nn.Parameter(torch.full(() if channels is None else (channels,), w))

    @property
    def inv_tau(self) -> Tensor:
        return self.w.sigmoid()

    def settings(self) -> dict[str, Any]:
        """Without the time constant that it started from."""
        return {name: value for name, value in super().settings().items() if name != "tau"}

    def extra_repr(self) -> str:
        shape = "scalar" if self.w.ndim == 0 else f"{self.w.numel()} channels"
        return f"w: {shape}, threshold={self.threshold:g}, reset={self.reset_mechanism!r}"


class _SpikeGradient:
    """The chosen surrogate as a snnTorch `spike_grad`; a class, since a closure could not be pickled."""

    def __init__(self, surrogate: Surrogate | Callable[[Tensor], Tensor], strict: bool) -> None:
        self.surrogate, self.strict = surrogate, strict

    def __call__(self, shift: Tensor) -> Tensor:
        return fire(shift, self.surrogate, self.strict)


NEURONS: dict[str, type[LIF]] = {"lif": LIF, "plif": ParametricLIF}


def make_neuron(neuron: NeuronLike, *, channels: int, threshold: float = 1.0) -> nn.Module:
    """One neuron layer from "lif", "plif", one of them with options, or a factory.

    Options are those of `LIF` or `ParametricLIF`, as in `{"name": "lif", "tau": 3.0, "surrogate": "atan"}`. Here
    `"threshold"` multiplies the layer's own threshold (1, and 0.5 for the mask of an attention), and `"channels": True`
    asks for one time constant per channel. A factory is called with `threshold=`; if it has a `channels` argument
    without a default, it gets the layer's width too. It may make a neuron of snnTorch or SpikingJelly, which is then
    wrapped by `over_time`.

    Raises `ValueError` for an unknown name or option and `TypeError` for a factory that cannot be called like this or
    does not make a module.
    """
    neuron = neuron_spec(neuron)
    if isinstance(neuron, str | Mapping):
        name, options = _parts(neuron)
        if options.get("channels") is True:
            options["channels"] = channels
        return NEURONS[name](**{**options, "threshold": threshold * options.get("threshold", 1.0)})
    if isinstance(neuron, partial):
        threshold *= neuron.keywords.get("threshold", 1.0)
    make = partial(neuron, threshold=threshold)
    if wants_channels(neuron):
        make = partial(make, channels=channels)
    try:
        inspect.signature(neuron).bind(**make.keywords)
    except TypeError as error:
        raise TypeError(f"the neuron factory {neuron!r} must accept threshold= as a keyword: {error}") from None
    made = make()
    if not isinstance(made, nn.Module):
        raise TypeError(f"the neuron factory {neuron!r} must make a torch.nn.Module, got {type(made).__name__}")
    return OverTime(made) if remembers(made) else made


def wants_channels(neuron: NeuronLike) -> bool:
    """Whether `make_neuron` uses the layer's width."""
    if isinstance(neuron, str | Mapping):
        return not isinstance(neuron, str) and neuron.get("channels") is True
    try:
        parameters = inspect.signature(neuron).parameters
    except ValueError:
        raise TypeError(
            f"the neuron factory {neuron!r} has arguments that its function does not take; give options by name, as in "
            "partial(LIF, tau=3.0)"
        ) from None
    return "channels" in parameters and parameters["channels"].default is inspect.Parameter.empty


def neuron_spec(neuron: NeuronLike) -> NeuronLike:
    """The neuron as plain data: a name, or a name with options; any other factory is returned unchanged.

    Raises `ValueError` for an unknown name or option and `TypeError` for anything that cannot make neurons.

    >>> neuron_spec(partial(LIF, tau=3.0))
    {'name': 'lif', 'tau': 3.0}
    """
    if isinstance(neuron, str | Mapping):
        name, options = _parts(neuron)
    elif not callable(neuron) or isinstance(neuron, nn.Module):
        raise TypeError(
            f"neuron must be a name, a name with options or a factory that makes a new module for each layer (a class, "
            f"a functools.partial, a function taking threshold=), got {type(neuron).__name__}"
        )
    else:
        factory = neuron.func if isinstance(neuron, partial) and not neuron.args else neuron
        options = dict(neuron.keywords) if isinstance(neuron, partial) and not neuron.args else {}
        found = next((name for name, kind in NEURONS.items() if kind is factory), None)
        if found is None:
            return neuron
        name = found
    _check_options(name, options)
    if "surrogate" in options:
        spec = surrogate_spec(options["surrogate"])
        if spec is None:  # a function, which cannot be saved
            return partial(NEURONS[name], **options)
        options["surrogate"] = spec
    return {"name": name, **options} if options else name


def _parts(neuron: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    options = {"name": neuron} if isinstance(neuron, str) else dict(neuron)
    name = options.pop("name", None)
    if name not in NEURONS:
        raise ValueError(f"neuron {name!r} is unknown; choose one of {', '.join(NEURONS)} or pass a factory")
    return name, options


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raises `ValueError` or `TypeError` for unknown options and for values that no layer accepts."""
    known = neuron_options(name)
    unknown = sorted(str(key) for key in options if key not in known)
    if unknown:
        raise ValueError(f"neuron {name!r} has no option {', '.join(unknown)}; its options are {', '.join(known)}")
    trial = {**options, "channels": None} if options.get("channels") is True else dict(options)
    NEURONS[name](**trial)


def neuron_options(name: str) -> list[str]:
    """The names of the options of a neuron of the kit."""
    own = inspect.signature(NEURONS[name]).parameters
    inherited = inspect.signature(LIF).parameters
    names = dict.fromkeys([*own, *(key for key in inherited if key != "tau" or NEURONS[name] is LIF)])
    names.pop("options", None)
    return list(names)
