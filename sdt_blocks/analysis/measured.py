"""What a network really costs on this machine: latency, throughput, and joules if there are energy counters."""

from __future__ import annotations

import copy
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ..evaluation import evaluating, input_of, placed
from ..inference import optimize_for_inference
from ..neuron.replacing import replace_neurons
from .counters import Counter
from .probe import unwrap

DENSE, EVENTS, ANN = "dense", "event-driven", "ANN"

LEAST_RUNS = 5
"""The least number of runs for a latency, however long they take."""

MOST_SWEPT = 8
"""Up to this many time steps the latency of each number is measured; for more, only powers of two and the last."""

Run = Callable[[], object]
Key = TypeVar("Key", bound=Hashable)


@dataclass
class Energy:
    """Joules of one inference by counter, and what an idle machine uses in the same time."""

    joules: dict[str, float]
    idle_joules: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.joules.values())

    @property
    def above_idle(self) -> float:
        return self.total - sum(self.idle_joules.values())


@dataclass
class Form:
    """The measurements of one form of a network: median latency of a single sample, and samples per second in a batch.

    `energy` is per sample of the batch, None without counters; `missing` says why a form could not be measured at
    all.
    """

    name: str
    latency_ms: float = 0.0
    throughput: float = 0.0
    energy: Energy | None = None
    missing: str = ""


@dataclass
class Measured:
    """The measurements on `machine`; `counters` says what the joules include, or why there are none.

    `latency_ms` is the dense form's by number of time steps, `latency_missing` says why some or all are missing.
    """

    machine: str
    batch: int
    counters: str
    forms: list[Form] = field(default_factory=list)
    latency_ms: dict[int, float] = field(default_factory=dict)
    latency_missing: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON data."""
        forms = [
            {
                "name": form.name,
                "latency_ms": form.latency_ms,
                "throughput": form.throughput,
                "joules": form.energy and form.energy.joules,
                "idle_joules": form.energy and form.energy.idle_joules,
                "missing": form.missing,
            }
            for form in self.forms
        ]
        steps = {str(step): latency for step, latency in self.latency_ms.items()}
        return {**vars(self), "forms": forms, "latency_ms": steps}


@torch.no_grad()
def measure(
    model: nn.Module,
    batch: Any,
    *,
    axis: int = 0,
    seconds: float = 0.5,
    counters: Sequence[Counter] = (),
    missing: str = "",
) -> Measured:
    """Latency, throughput and joules of a model on a batch, as it is deployed.

    The dense and the event-driven form of `optimize_for_inference` are measured, and the same layers as an ANN: clipped
    rectifiers for the neurons, one step. `axis` is that of the samples in the inputs; each figure takes `seconds`,
    those of the counters at least one second. `missing` says why there are no (more) counters.

    >>> found = measure(example_model(), example_images()[0], seconds=0.01)
    >>> [form.name for form in found.forms], found.forms[0].latency_ms > 0
    (['dense', 'event-driven', 'ANN'], True)
    """
    model = unwrap(model)
    x = placed(input_of(batch), model)
    seen = ", ".join(counter.name for counter in counters)
    told = "; ".join(part for part in (f"joules of {seen}, all programs together" if seen else "", missing) if part)
    result = Measured(machine(x.device), x.shape[axis], told or "the counters were not asked for")
    time_axis = 1 - axis if axis or x.ndim == 5 else None  # still images have none
    with evaluating(model):
        idle = _idle_watts(counters, max(seconds, 1.0)) if counters else {}
        for name in _FORMS:
            form, why = _built(name, model)
            given = x if name != ANN or time_axis is None else x.narrow(time_axis, 0, 1)
            result.forms.append(
                Form(name, missing=why) if form is None else _measured(name, form, given, axis, seconds, counters, idle)
            )
        one = x.narrow(axis, 0, 1)
        result.latency_ms, result.latency_missing = _latency_by_steps(model, one, time_axis, seconds)
    return result


@torch.no_grad()
def latencies(
    models: Mapping[str, nn.Module],
    inputs: Mapping[str, Tensor],
    *,
    rounds: int = LEAST_RUNS,
    tick: Callable[[str], None] = lambda _: None,
) -> dict[str, list[Form]]:
    """The dense and the event-driven form of each model with the latency of its inputs, by the model's name.

    The calls take turns, so that a disturbance of the machine hits all of them; `tick` is called with a progress text.
    """
    found: dict[str, list[Form]] = {}
    runs: dict[tuple[str, str], Run] = {}
    for model_name, model in models.items():
        found[model_name] = []
        for name in (DENSE, EVENTS):
            tick(f"{model_name}: {name}")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # parts that are not rebuilt run as they are, and are timed like that
                form, why = _built(name, model)
                why = why if form is None else _fails(form, inputs[model_name])
            found[model_name].append(Form(name, missing=why))
            if form is not None and not why:
                runs[model_name, name] = partial(_run, form, inputs[model_name])
    times = _times_in_turns(runs, rounds=rounds, tick=tick)
    for model_name, forms in found.items():
        for one in forms:
            if not one.missing:
                one.latency_ms = 1e3 * statistics.median(times[model_name, one.name])
    return found


def as_ann(model: nn.Module) -> nn.Module:
    """A copy of the model whose neurons are clipped rectifiers, for one step.

    Raises `ValueError` if the model has no `time_steps` to set to one.
    """
    copied = cast(Any, copy.deepcopy(model))
    if not hasattr(copied, "time_steps"):
        raise ValueError(f"{type(model).__name__} has no time_steps to set to one, so there is no ANN of its layers")
    copied.time_steps = 1
    return replace_neurons(cast(nn.Module, copied), lambda threshold: _ClippedRectifier())


class _ClippedRectifier(nn.Module):
    """Clips to 0..1, like a spike: an unclipped rectifier may overflow with weights that were trained for spikes."""

    def forward(self, membrane: Tensor) -> Tensor:
        return membrane.clamp(0, 1)


_FORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    DENSE: lambda model: optimize_for_inference(model),
    EVENTS: lambda model: optimize_for_inference(model, sparse=True),
    ANN: lambda model: optimize_for_inference(as_ann(model)),
}


def _built(name: str, model: nn.Module) -> tuple[nn.Module | None, str]:
    """One form of a network, or None and the reason."""
    try:
        return _FORMS[name](model), ""
    except (ValueError, TypeError, RuntimeError) as error:
        return None, _words(error)


def _fails(form: nn.Module, x: Tensor) -> str:
    """Why a form cannot run these inputs, "" if it can."""
    try:
        _run(form, x)
    except (ValueError, TypeError, RuntimeError) as error:
        return _words(error)
    return ""


def _words(error: Exception) -> str:
    return " ".join(str(error).split())


def _measured(
    name: str,
    form: nn.Module,
    x: Tensor,
    axis: int,
    seconds: float,
    counters: Sequence[Counter],
    idle: dict[str, float],
) -> Form:
    one = x.narrow(axis, 0, 1).contiguous()
    why = _fails(form, one) or _fails(form, x)
    if why:
        return Form(name, missing=why)
    samples = x.shape[axis]
    latency, batch = (statistics.median(_times(form, given, seconds)) for given in (one, x))
    result = Form(name, 1e3 * latency, samples / batch)
    if counters:
        before = [counter.joules() for counter in counters]
        times = _times(form, x, max(seconds, 1.0), warm=False)
        taken, inferences = sum(times), samples * len(times)
        joules = {c.name: (c.joules() - b) / inferences for c, b in zip(counters, before, strict=True)}
        result.energy = Energy(joules, {key: watts * taken / inferences for key, watts in idle.items()})
    return result


def _times(form: nn.Module, x: Tensor, seconds: float, *, warm: bool = True) -> list[float]:
    """The duration in seconds of each run, for as many runs as fill the given time."""
    return _times_in_turns({"": partial(_run, form, x)}, seconds=seconds, warm=warm)[""]


def _times_in_turns(
    runs: Mapping[Key, Run],
    *,
    rounds: int = LEAST_RUNS,
    seconds: float = 0.0,
    warm: bool = True,
    tick: Callable[[str], None] = lambda _: None,
) -> dict[Key, list[float]]:
    """The durations of the runs, in turns, for at least that many rounds and until they have filled the given time.

    With `warm` two rounds are run before and not counted: shapes are seen, ways are measured, memory is touched.
    """
    for run in list(runs.values()) * (2 if warm else 0):
        run()
    times: dict[Key, list[float]] = {key: [] for key in runs}
    done = 0
    while runs and (done < rounds or sum(map(sum, times.values())) < seconds):
        done += 1
        tick(f"round {done} of {rounds}")
        for key, run in runs.items():
            start = time.perf_counter()
            run()
            times[key].append(time.perf_counter() - start)
    return times


def _run(form: nn.Module, x: Tensor) -> None:
    form(x)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def _idle_watts(counters: Sequence[Counter], seconds: float) -> dict[str, float]:
    start, before = time.perf_counter(), [counter.joules() for counter in counters]
    time.sleep(seconds)
    after = [counter.joules() for counter in counters]
    taken = time.perf_counter() - start
    return {c.name: (b - a) / taken for c, a, b in zip(counters, before, after, strict=True)}


def _latency_by_steps(
    model: nn.Module, one: Tensor, time_axis: int | None, seconds: float
) -> tuple[dict[int, float], str]:
    """The dense form's latency of a single sample for 1, 2, ... steps, and why others are missing ("" if none is)."""
    if time_axis is None and not hasattr(model, "time_steps"):
        return {}, f"{type(model).__name__} has no time_steps to set, and its inputs are no frames [B, T, C, H, W]"
    copied = cast(Any, copy.deepcopy(model))
    steps = copied.time_steps if time_axis is None else one.shape[time_axis]
    swept = range(1, steps + 1) if steps <= MOST_SWEPT else {2**k for k in range(steps.bit_length())} | {steps}
    found: dict[int, float] = {}
    for count in sorted(swept):
        if time_axis is None:
            copied.time_steps = count
        given = (one if time_axis is None else one.narrow(time_axis, 0, count)).contiguous()
        try:
            found[count] = 1e3 * statistics.median(_times(optimize_for_inference(copied), given, seconds))
        except (ValueError, TypeError, RuntimeError) as error:
            return found, f"with {count} step(s), {_words(error)}"
    return found, ""


def machine(device: torch.device) -> str:
    """The name of the processor or GPU, and the number of threads used on a processor."""
    name = processor(device)
    if device.type == "cuda":
        return name
    return f"{name}, {torch.get_num_threads()} thread(s) of {os.cpu_count()} cores, PyTorch {torch.__version__}"


def processor(device: torch.device) -> str:
    """The name of the processor or GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (names or [platform.processor()])[0] or platform.machine()
