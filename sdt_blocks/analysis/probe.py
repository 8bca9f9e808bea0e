"""Shared by all analyses: runs batches through a model with hooks, separates time steps, sums over processes."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ..evaluation import Batches, each_of, evaluating, input_of, placed
from ..inference.folded import folded
from ..inference.trace import unwrap
from ..neuron import clear_hidden, find_neurons, spikes_of, takes_sequence

Forward = Callable[[nn.Module, Tensor], Any]
"""How one batch runs through the model if that is not just `model(x)`, such as a loop over steps outside it."""

Hook = Callable[[nn.Module, tuple[Any, ...], Any], Any]
"""Called with a module, its inputs and its output."""

T_ = TypeVar("T_")


def check_weights(model: nn.Module) -> None:
    """Raises `ValueError` for weights with which nothing fires: on the meta device, or NaN."""
    name = next((name for name, weight in unwrap(model).named_parameters() if weight.is_meta), None)
    if name is not None:
        raise ValueError(
            f"{name} is on the meta device and holds no numbers, so nothing fires; build the model on a device, or "
            f"give rates of your own to energy_from_rates"
        )
    name = next((name for name, value in unwrap(model).state_dict().items() if _holds_nan(value)), None)
    if name is not None:
        raise ValueError(
            f"{name} holds values that are not numbers (NaN), with which nothing fires: the training went wrong before "
            "these weights were saved, take earlier ones"
        )


def _holds_nan(value: Any) -> bool:
    return isinstance(value, Tensor) and bool(value.isnan().any())


def is_within(name: str, owner: str) -> bool:
    """Whether a module is inside another one, by their names."""
    return name != owner and (not owner or name.startswith(f"{owner}."))


class Clock:
    """How many time steps and samples one forward pass had, found from the neurons' own tensors.

    `split` then sorts the calls of a layer that knows nothing of time: one call with `T * B` rows, T calls with B rows,
    or one call with B rows (a still image's first layer, computed once for all steps).
    """

    def __init__(self) -> None:
        self._steps: Counter[int] = Counter()
        self._batches: Counter[int] = Counter()
        self._calls: Counter[str] = Counter()

    @property
    def started(self) -> bool:
        """Whether any neuron has been called yet."""
        return bool(self._batches)

    def see(self, name: str, neuron: nn.Module, spikes: Tensor) -> None:
        """Notes one call of a neuron."""
        sequence = takes_sequence(neuron)
        if sequence:
            self._steps[spikes.shape[0]] += 1
        else:
            self._calls[name] += 1
        self._batches[spikes.shape[1] if sequence and spikes.ndim > 1 else spikes.shape[0] if spikes.ndim else 1] += 1

    def stop(self, x: Tensor) -> None:
        """Sets `steps`, `batch` and `looped` once the forward pass of the input x has ended."""
        steps = self._steps + Counter(self._calls.values())
        self.steps = steps.most_common(1)[0][0] if steps else 1
        self.looped = bool(self._calls)
        leading = x.shape[0] if x.ndim else 1
        known = not self._batches or leading in self._batches
        self.batch = leading if known else self._batches.most_common(1)[0][0]

    def split(self, calls: Sequence[Tensor], name: str) -> Tensor:
        """Values per row, one tensor per call, as sums per step and sample `[T, B]`; `[1, B]` if it ran only once."""
        flat = [self._rows(call) for call in calls]
        per_step = len(flat) % self.steps == 0 and all(len(rows) % self.batch == 0 for rows in flat)
        if per_step and (self.looped or self.steps == 1):
            return self._by_call(flat).view(self.steps, -1, self.batch).sum(1)
        if all(len(rows) % (self.steps * self.batch) == 0 for rows in flat):
            return torch.stack([rows.view(self.steps, self.batch, -1).sum(2) for rows in flat]).sum(0)
        if per_step:
            return self._by_call(flat).view(self.steps, -1, self.batch).sum(1)
        if any(len(rows) % self.batch for rows in flat):
            warnings.warn(
                f"{name}: its calls with {[len(rows) for rows in flat]} rows cannot be told apart into {self.steps} "
                f"steps of {self.batch} samples; they count as one value for all steps",
                stacklevel=2,
            )
            return torch.stack([rows.sum() for rows in flat]).sum().expand(1, self.batch) / self.batch
        return self._by_call(flat).sum(0, keepdim=True)

    def _by_call(self, calls: Sequence[Tensor]) -> Tensor:
        """The rows of each call as sums by sample `[calls, B]`."""
        return torch.stack([rows.view(self.batch, -1).sum(1) for rows in calls])

    def _rows(self, call: Tensor) -> Tensor:
        """`[d0]`, or `[d0, d1]` for a layer that acts on the last axis, as one row for each frame."""
        if call.ndim < 2:
            return call.reshape(-1)
        if call.shape[:2] == (self.steps, self.batch):
            return call.flatten(0, 1)
        return call.sum(1)


class Probe:
    """Hooks on a model during a `with` block; batches run through it in eval mode, without gradients.

    Unless `as_trained`, the block sees the network as it is deployed: norms folded, chains of layers merged.
    """

    def __init__(
        self,
        model: nn.Module,
        neurons: Sequence[type[nn.Module]] = (),
        forward: Forward | None = None,
        *,
        as_trained: bool = True,
    ) -> None:
        self.model = unwrap(model)
        for module in self.model.modules():
            if getattr(module, "rebuilt", False):
                raise TypeError(
                    f"{type(module).__name__} is rebuilt for speed and has no layers to look at; analyze the model "
                    f"that it was made from"
                )
        self.neurons = find_neurons(self.model, neurons)
        self.forward = forward
        self.as_trained = as_trained
        self._form = ExitStack()
        self.clock = Clock()
        self.path: list[str] = []
        self.shapes: list[torch.Size] = []
        self.modes: list[Any] = []
        self.looking = False
        self._fired: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Probe:
        if not self.as_trained:
            # Before there are hooks, since a layer with a hook is not folded.
            self._form.enter_context(folded(self.model))
        for name, neuron in self.neurons.items():
            self.watch(neuron, self._clocked(name))
        return self

    def _clocked(self, name: str) -> Hook:
        def seen(neuron: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            spikes = spikes_of(output)
            self.clock.see(name, neuron, spikes)
            if not spikes.is_meta:
                any_spike = (spikes != 0).any()
                self._fired[name] = any_spike | self._fired.get(name, any_spike)

        return seen

    @property
    def fired(self) -> dict[str, bool]:
        """Whether each neuron layer that was called has emitted anything but zeros so far."""
        return {name: bool(fired) for name, fired in self._fired.items()}

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._form.close()

    def watch(self, module: nn.Module, hook: Hook) -> None:
        """Calls `hook(module, inputs, output)` after each call of the module, until the block ends.

        Meanwhile `looking` is true: what the hook computes itself is not part of the model's work.
        """

        def call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self.looking:
                return
            self.looking = True
            try:
                hook(module, (*args, *kwargs.values()), output)
            finally:
                self.looking = False

        self._handles.append(module.register_forward_hook(call, with_kwargs=True))

    def follow(self, entered: Callable[[str], Any], left: Callable[[str, Any], Any]) -> None:
        """Keeps `path`, the names of the running modules, outermost first, and `shapes`, those of their inputs.

        Calls `entered(name)` and `left(name, output)` for each.
        """

        def enter(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if self.looking:
                    return
                self.path.append(name)
                first = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
                self.shapes.append(torch.Size() if first is None else first.shape)
                entered(name)

            return hook

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if self.looking:
                return
            # Still within the module, for anything that is noted about its output.
            left(self.path[-1], output)
            self.path.pop()
            self.shapes.pop()

        for name, module in self.model.named_modules():
            self._handles.append(module.register_forward_pre_hook(enter(name), with_kwargs=True))
            self._handles.append(module.register_forward_hook(leave, always_call=True))

    def run(self, batches: Batches) -> Iterator[Tensor]:
        """Runs each batch and yields its input; the hooks have run and `clock` is stopped by then."""
        with evaluating(self.model):
            for batch in each_of(batches):
                x = placed(input_of(batch), self.model)
                self.clock = Clock()
                clear_hidden(self.model)
                with _watchable(), ExitStack() as watching:
                    x = x.clone() if x.is_inference() else x
                    for mode in self.modes:
                        mode.start(x)
                        watching.enter_context(mode)
                    if self.forward is None:
                        self.model(x)
                    else:
                        self.forward(self.model, x)
                self.clock.stop(x)
                yield x


def batch_axis(
    model: nn.Module,
    x: Tensor,
    neurons: Sequence[type[nn.Module]] = (),
    forward: Forward | None = None,
    *,
    clock: Clock | None = None,
) -> int:
    """The axis of the samples in the input: 1 if the model takes `[T, B, ...]`, else 0.

    `clock` is that of an earlier pass of x, if there was one.
    """

    def clock_of(part: Tensor) -> Clock:
        with Probe(model, neurons, forward) as probe:
            for _ in probe.run(part):
                pass
        return probe.clock

    clock = clock or clock_of(x)
    if x.ndim < 3 or x.shape[:2] != (clock.steps, clock.batch):
        return 0
    # There are as many steps as samples: run one slice of the first axis alone to see which it is.
    alone = clock_of(x[:1]) if clock.steps == clock.batch else clock
    return 1 if alone.batch == clock.batch else 0


@contextmanager
def _watchable() -> Iterator[None]:
    """A pass without gradients in which every operation is visible.

    PyTorch's attention is computed from its products, not by one fused operation. Compiled code would bypass hooks that
    were added after its compilation, and inference mode the dispatcher.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.inference_mode(False), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def add_at(total: np.ndarray, value: np.ndarray) -> np.ndarray:
    """The sum of two arrays of any lengths, the shorter one padded with zeros."""
    longest = max(len(total), len(value))
    return np.pad(total, (0, longest - len(total))) + np.pad(value, (0, longest - len(value)))


def gather(value: T_) -> list[T_]:
    """`value` of every process, in order of rank, if `torch.distributed` is running; else only this one's."""
    if not _distributed() or torch.distributed.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def is_first_process() -> bool:
    """Whether this is the process that writes files."""
    return not _distributed() or torch.distributed.get_rank() == 0


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
