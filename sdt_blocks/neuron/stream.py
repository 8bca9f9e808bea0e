"""Runs a sequence in chunks: every neuron continues from the state in which the previous chunk left it."""

from __future__ import annotations

import copy
import inspect
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Samples = int | Sequence[int] | Tensor
"""Positions in a batch: one, several, or a mask over all."""


class Streamed:
    """A neuron whose state a `Stream` carries from chunk to chunk."""

    _carriers: dict[int, Stream] | None = None
    """The streams that the neuron runs in at present, by thread."""

    @property
    def carrier(self) -> Stream | None:
        """The stream that the neuron runs in at present; calls of other threads have theirs, or none."""
        return self._carriers.get(threading.get_ident()) if self._carriers else None

    @carrier.setter
    def carrier(self, stream: Stream | None) -> None:
        carriers = self.__dict__.setdefault("_carriers", {})
        if stream is None:
            carriers.pop(threading.get_ident(), None)
        else:
            carriers[threading.get_ident()] = stream

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A copy runs in no stream. nn.Module's own __getstate__ would hide one of this class.
        made: Any = super().__reduce_ex__(protocol)
        function, arguments, state, *rest = made
        return function, arguments, {name: value for name, value in state.items() if name != "_carriers"}, *rest

    def tensors_of(self, state: Any) -> dict[str, Tensor]:
        """The tensors of a state by name, each with the samples of the batch on its first axis."""
        return {"membrane": state}

    def state_of(self, tensors: Mapping[str, Tensor]) -> Any:
        """The state that consists of these tensors."""
        return tensors["membrane"]

    def initial(self, name: str) -> float:
        """The value of a state's tensor at the start."""
        return 0.0

    def settings(self) -> dict[str, Any]:
        """The classes, options and constants of the neuron and its parts, which a saved state must agree with.

        Of parameters, which are learned, dtype and shape.
        """
        assert isinstance(self, nn.Module)
        found: dict[str, Any] = {}
        for path, module in self.named_modules():
            makers = [vars(kind)["__init__"] for kind in type(module).__mro__ if "__init__" in vars(kind)]
            options = {name for maker in makers for name in inspect.signature(maker).parameters}
            held = {name: getattr(module, name, None) for name in sorted(options)}
            plain = {name: value for name, value in held.items() if isinstance(value, bool | int | float | str)}
            told = {"class": type(module).__name__, **plain}
            found |= {f"{path}.{name}".lstrip("."): value for name, value in told.items()}
        learned = {name: _described(value) for name, value in self.named_parameters()}
        return found | {name: value.clone() for name, value in self.state_dict().items()} | learned


class Stream:
    """Runs a model on one chunk of frames after another, as if they came in one piece.

    There are three ways to use it. `push` takes frames as they arrive and returns the answer so far. Called like the
    model, the stream returns the model's output for the chunk. As a context, it lets the model and its parts be called
    in any way. In each case membranes continue from the previous call, so that spikes and membranes are those of the
    whole sequence. The model's own average over time covers the chunk only, and anything else in it that depends on
    time steps (a parameter for each step, a delay, a difference) sees only those of the chunk: such a model answers
    differently in pieces, and so does one whose neurons are of an unknown type. There are no gradients.

    The model may be of any family, mixed, or one of the forms of `optimize_for_inference`. Neurons, additions of events
    and sums of whole numbers give the same bits as on the whole sequence, and with `exact=True` everything does. A
    library's matrix product may round differently for another number of rows, so that a membrane within rounding of its
    threshold could fire in one case and not in the other.

    A batch holds several streams; `reset` restarts one or all of them. `state_dict` and `load_state_dict` save and
    restore their states. With `window` the answer so far is that of the last `window` frames, and memory does not grow;
    without it the logits of all frames since the start are kept. `to_frames` turns anything that is not a tensor and is
    passed to `push` into frames `[n, C, H, W]`, such as raw events of one stream
    (`sdt_datasets.events.FramesOfEvents`).

    An error leaves the states as they were before the call, or before the context. Outside the stream the model has no
    memory, as usual. Threads may share a model, each with streams of its own.

    Shapes: those of the model; the batch size must be the same for all chunks.

    Raises `TypeError` for a model whose state cannot be carried over: it is compiled, has one neuron in two places or
    calls it twice, or has layers with a state of their own, such as `nn.LSTM`. Raises `ValueError` for a window below
    one frame, and `RuntimeError` in training mode, where a chunk's norms would differ from the sequence's, and while
    another thread is in this stream.

    >>> block = SpikingMLP(8).eval()
    >>> stream, x = Stream(block), torch.randn(4, 2, 8, 3, 3)
    >>> parts = torch.cat([stream(x[:1]), stream(x[1:])])
    >>> torch.equal(parts, block(x))
    True
    >>> model, frames = example_model(), example_images()[0][:, None].expand(-1, 4, -1, -1, -1)
    >>> stream = Stream(model)
    >>> answers = [stream.push(frame) for frame in frames.unbind(1)]
    >>> torch.allclose(answers[-1], model(frames), atol=1e-5)
    True
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        window: int | None = None,
        to_frames: Callable[[Any], Any] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"expected a torch.nn.Module to stream, got {model.__class__.__name__}")
        within: list[str] = []
        for name, module in model.named_modules():
            inner = any(name.startswith(outer) for outer in within)
            within += [f"{name}." if name else ""] if isinstance(module, Streamed) else []
            reason = None if inner else _obstacle(module)
            if reason:
                what = f"{type(module).__name__} {name}".rstrip()
                raise TypeError(f"{what} cannot be streamed: {reason}")
        if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
            raise ValueError(f"window must be a number of frames of at least 1, or None for all, got {window!r}")
        self.model, self.window, self.to_frames = model, window, to_frames
        everywhere = [(name, m) for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, Streamed)]
        self._names = {neuron: name for name, neuron in everywhere}
        self.neurons = list(self._names)
        without_memory = any(getattr(module, "states", None) == 0 for module in model.modules())
        if len(self.neurons) < len(everywhere) or not (self.neurons or without_memory):
            what = "one neuron in several places" if self.neurons else "no neuron whose state could be handed over"
            raise TypeError(f"{type(model).__name__} cannot be streamed: it has {what}")
        self._states: dict[Streamed, Any] = {}
        self._before = self._states
        self._asked: set[Streamed] | None = None
        self._thread: dict[str, int] = {}
        self.still: dict[Any, Tensor] | None = None
        """If the same images come in every call, one time step each: what a form keeps of its first layers."""
        self._logits: deque[tuple[Tensor, ...]] = deque(maxlen=window)
        self._seen = _none_seen(0)

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        with self:
            return self.model(*inputs, **options)

    def __enter__(self) -> Stream:
        if any(module.training for module in self.model.modules()):
            raise RuntimeError("streaming needs eval mode: in training a chunk's norms differ from the sequence's")
        if any(neuron.carrier is not None for neuron in self.neurons):
            raise RuntimeError("the model is within a stream already; leave that one first")
        self._check_thread(self._thread.setdefault("within", threading.get_ident()))
        for neuron in self.neurons:
            neuron.carrier = self
        begin = self.model.register_forward_pre_hook(lambda *_: self._note(set()))
        self._watching = begin, self.model.register_forward_hook(lambda *_: self._note(None), always_call=True)
        self._before = dict(self._states)
        self._no_grad = torch.no_grad()
        self._no_grad.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: Any) -> None:
        self._no_grad.__exit__(kind, *exception)
        if kind is not None:
            self._states = self._before
        for neuron in self.neurons:
            neuron.carrier = None
        for handle in self._watching:
            handle.remove()
        self._asked = None
        self._thread.clear()

    def _note(self, asked: set[Streamed] | None) -> None:
        """Sets which neurons the model has called during its present call; `None` outside a call."""
        if self._thread.get("within") == threading.get_ident():
            self._asked = asked

    @staticmethod
    def _check_thread(within: int | None) -> None:
        if within not in (None, threading.get_ident()):
            raise RuntimeError("another thread is in this stream; give each thread a Stream of its own")

    def another(self) -> Stream:
        """A new stream of the same model, without `to_frames`, in which events of this stream may wait."""
        stream = copy.copy(self)
        stream._states, stream._thread, stream._logits = {}, {}, deque(maxlen=self.window)
        stream._seen, stream.to_frames = _none_seen(0), None
        return stream

    # ---- the answer so far

    @property
    def seen(self) -> Tensor:
        """How many frames of each stream `push` has taken since its start `[B]`."""
        return self._seen

    def push(self, frames: Any) -> Any:
        """Takes the next frame `[B, C, H, W]` of each stream, or several `[B, T, C, H, W]`; returns the answer so far.

        That is the mean of the model's logits over all frames since the start, or over those of the `window`:
        `[B, K]`, or a tuple of such tensors if the model has several heads. If the input does not yet make a whole
        frame for `to_frames`, the previous answer is returned, `None` at first.

        Raises `ValueError` for frames of another shape or another number of streams, and for values that are not
        finite, which would silence neurons for good; `TypeError` for a model whose output is not logits.
        """
        if self.to_frames is not None and not isinstance(frames, Tensor):
            frames = torch.as_tensor(self.to_frames(frames)).unsqueeze(0)
            if frames.shape[1] == 0:
                return self.answer() if bool(self._seen.any()) else None
        if not isinstance(frames, Tensor) or frames.ndim not in (4, 5) or 0 in frames.shape:
            got = list(frames.shape) if isinstance(frames, Tensor) else f"{type(frames).__name__}; see to_frames="
            raise ValueError(f"expected a frame [B, C, H, W] of each stream, or frames [B, T, C, H, W], got {got}")
        if len(self._seen) not in (0, len(frames)):
            raise ValueError(
                f"this stream has a batch of {len(self._seen)}, got {len(frames)} frames; keep() takes some of its "
                f"samples, reset() starts with another batch"
            )
        finite = frames.isfinite().flatten(1).all(1)
        if not bool(finite.all()):
            raise ValueError(
                f"the frames of the streams {(~finite).nonzero().flatten().tolist()} hold values that are not finite "
                f"numbers; they would stay in the membranes, whose neurons would not fire again: leave such frames out"
            )
        self._check_thread(self._thread.get("within"))
        before = dict(self._states), list(self._logits), self._seen
        try:
            for frame in _one_by_one(frames):
                self._logits.append(_logits_of(self(frame), len(frames), type(self.model).__name__))
                self._seen = (self._seen if len(self._seen) else _none_seen(len(frames))) + 1
        except BaseException:
            self._states, kept, self._seen = before
            self._logits = deque(kept, maxlen=self.window)
            raise
        return self.answer()

    def answer(self) -> Any:
        """The answer so far. Raises `RuntimeError` until every stream has had its first frame."""
        if not self._logits or not bool((self._seen > 0).all()):
            waiting = (self._seen == 0).nonzero().flatten().tolist()
            raise RuntimeError(f"no frame has been pushed yet{f' to {waiting}' if waiting else ''}")
        heads = tuple(self._mean([logits[head] for logits in self._logits]) for head in range(len(self._logits[0])))
        return heads if len(heads) > 1 else heads[0]

    def _mean(self, logits: list[Tensor]) -> Tensor:
        """The mean over each stream's own frames, summed in the order in which the model sums its time steps."""
        mean = getattr(self.model, "mean_of_steps", None) or _mean
        result = torch.empty_like(logits[-1])
        counts = self._seen.clamp(max=len(logits))
        for count in counts.unique().tolist():
            of = (counts == count).to(result.device)
            result[of] = mean(torch.stack([one[of] for one in logits[len(logits) - count :]]))
        return result

    # ---- the streams of a batch

    def reset(self, samples: Samples | None = None) -> None:
        """Starts new sequences: for all streams, with any batch size from then on, or only for those at `samples`.

        If all are, `to_frames.reset()` is called too if there is such a method: events that wait for the rest of their
        frame are left out.

        Raises `IndexError` for a sample that is not in the batch.
        """
        at = None if samples is None else self._places(samples)
        forget = getattr(self.to_frames, "reset", None)
        if forget is not None and (at is None or 0 < len(self._seen) == len(at.unique())):
            forget()
        if at is None:
            self._states.clear()
            self._logits.clear()
            self._seen = _none_seen(0)
            return

        def rest(tensor: Tensor, value: float) -> Tensor:
            return tensor.index_fill(0, at.to(tensor.device), value)

        self._states = self._each(rest)
        if len(self._seen):
            self._seen = self._seen.index_fill(0, at, 0)

    def keep(self, samples: Samples) -> None:
        """Continues with only the streams at `samples`, in that order: the batch shrinks to them.

        Raises `IndexError` for a sample that is not in the batch.
        """
        at = self._places(samples)
        self._states = self._each(lambda tensor, _: tensor.index_select(0, at.to(tensor.device)))
        kept = [tuple(head.index_select(0, at.to(head.device)) for head in logits) for logits in self._logits]
        self._logits = deque(kept, maxlen=self.window)
        self._seen = self._seen[at] if len(self._seen) else self._seen

    def _each(self, change: Callable[[Tensor, float], Tensor]) -> dict[Streamed, Any]:
        """The states with `change(tensor, its initial value)` in the place of every tensor."""
        return {
            neuron: neuron.state_of(
                {name: change(tensor, neuron.initial(name)) for name, tensor in neuron.tensors_of(state).items()}
            )
            for neuron, state in self._states.items()
        }

    def _places(self, samples: Samples) -> Tensor:
        tensors = (tensor for neuron, state in self._states.items() for tensor in neuron.tensors_of(state).values())
        batch = len(self._seen) or next((len(tensor) for tensor in tensors), 0)
        if not batch:
            raise IndexError("no frame has come yet, so there are no samples")
        at = torch.as_tensor(samples).flatten()
        at = at if at.numel() else at.long()  # an empty list has no dtype of its own
        if at.dtype == torch.bool and len(at) == batch:
            at = at.nonzero().flatten()
        whole = not at.is_floating_point() and at.dtype != torch.bool
        if not whole or bool(((at < 0) | (at >= batch)).any()):
            raise IndexError(f"samples must lie between 0 and {batch - 1}, of a batch of {batch}, got {samples!r}")
        return at.long().cpu()

    def state_dict(self) -> dict[str, Any]:
        """The state of the streams as tensors and plain values, for `torch.save` and `load_state_dict`.

        It is without what waits in `to_frames` for the rest of a frame.
        """
        neurons = {self._names[neuron]: dict(neuron.tensors_of(state)) for neuron, state in self._states.items()}
        return {
            "model": type(self.model).__name__,
            "dtype": self._dtype(),
            "settings": {name: neuron.settings() for neuron, name in self._names.items()},
            "neurons": neurons,
            "logits": [list(logits) for logits in self._logits],
            "seen": self._seen,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a state that `state_dict` returned, on the model's device.

        Raises `ValueError` for that of another model or form, in another precision, with other neurons, or of a shorter
        window.
        """
        why = self._unlike(state)
        if why:
            raise ValueError(
                f"the state does not fit this stream: {why}; restore it to the model and form it came from"
            )
        held = self._held()

        def placed(tensor: Tensor) -> Tensor:
            return tensor if held is None else tensor.to(held.device)

        by_name = {name: neuron for neuron, name in self._names.items()}
        self._states = {
            by_name[name]: by_name[name].state_of({key: placed(tensor) for key, tensor in tensors.items()})
            for name, tensors in state["neurons"].items()
        }
        self._logits = deque((tuple(map(placed, logits)) for logits in state["logits"]), maxlen=self.window)
        self._seen = state["seen"].cpu()

    def _unlike(self, state: Mapping[str, Any]) -> str:
        """How a saved state differs from those of this stream, "" where it does not."""
        ours = self.state_dict()
        missing = sorted(ours.keys() - state.keys())
        if missing:
            return f"it lacks {', '.join(missing)}"
        if state["model"] != ours["model"]:
            return f"it is of a {state['model']}, not a {ours['model']}"
        unknown = (state["settings"].keys() | state["neurons"].keys()) - ours["settings"].keys()
        if unknown:
            return f"the model has no neuron {', '.join(sorted(unknown))}"
        for name, here in ours["settings"].items():
            if name not in state["settings"]:
                return f"it knows no neuron {name or '(the model)'}"
            saved = state["settings"][name]
            for key in (*here, *saved):
                both = saved.get(key, "nothing"), here.get(key, "nothing")
                if not _alike(*both):
                    was, now = map(_described, both)
                    return f"{name or 'the neuron'} was saved with {key} {was}, and has {now} here"
        if state["dtype"] != ours["dtype"]:
            return f"it is in {state['dtype']}, the model in {ours['dtype']}"
        frames = max(state["seen"].tolist(), default=0)
        wanted, held = min(frames, self.window or frames), len(state["logits"])
        if held < wanted:
            return f"it holds the logits of the last {held} frames, and the answer here is the mean of {wanted}"
        return ""

    def _dtype(self) -> str:
        """The dtype of the model, "" for one without parameters and buffers."""
        held = self._held()
        return "" if held is None else str(held.dtype)

    def _held(self) -> Tensor | None:
        """The first tensor of real numbers that the model holds, if it holds any."""
        held = (*self.model.parameters(), *self.model.buffers())
        return next((tensor for tensor in held if tensor.is_floating_point()), None)

    # ---- called by neurons

    def membrane_in_place(self, neuron: Streamed, shape: Sequence[int]) -> Tensor:
        """The neuron's membrane, for a kernel that overwrites it with the one after the chunk; zeros at the start."""
        before = self.membrane(neuron, shape)
        membrane = (
            torch.zeros(shape, dtype=torch.float32, device="cpu") if before is None else before.to("cpu", copy=True)
        )
        self.keep_state(neuron, membrane)
        return membrane

    def membrane(self, neuron: Streamed, shape: Sequence[int]) -> Tensor | None:
        """The neuron's membrane after the previous chunk, of this shape; `None` at the start."""
        membrane: Tensor | None = self.state(neuron)
        if membrane is not None and membrane.shape != tuple(shape):
            raise other_shape(membrane.shape, shape)
        return membrane

    def state(self, neuron: Streamed) -> Any:
        """The neuron's state after the previous chunk; `None` at the start."""
        if self._asked is not None:
            if neuron in self._asked:
                raise TypeError(
                    f"{type(self.model).__name__} cannot be streamed: it calls the neuron {self._names[neuron]} twice "
                    f"for one chunk, and each call would go on from the other; give each call a neuron of its own"
                )
            self._asked.add(neuron)
        return self._states.get(neuron)

    def keep_state(self, neuron: Streamed, state: Any) -> None:
        """Keeps a neuron's state for the next chunk."""
        self._states[neuron] = state


def _none_seen(batch: int) -> Tensor:
    return torch.zeros(batch, dtype=torch.int64, device="cpu")


def other_shape(before: Sequence[int], shape: Sequence[int]) -> ValueError:
    """The error for a neuron whose state has one shape and whose input has another."""
    return ValueError(
        f"a stream's chunks must have one shape but for their length: a neuron had {list(before)} and now gets "
        f"{list(shape)} a step; call reset() before another sequence"
    )


def _alike(saved: Any, here: Any) -> bool:
    """Whether two settings are the same, on whatever device they are."""
    if not isinstance(saved, Tensor) or not isinstance(here, Tensor):
        return type(saved) is type(here) and bool(saved == here)
    return saved.dtype == here.dtype and torch.equal(saved.cpu(), here.cpu())


def _described(setting: Any) -> str:
    if not isinstance(setting, Tensor):
        return str(setting)
    whole = f"{setting.dtype} {list(setting.shape)}"
    return whole if isinstance(setting, nn.Parameter) or setting.numel() != 1 else f"{setting.item():g}"


def _mean(steps: Tensor) -> Tensor:
    return steps.mean(0)


def _one_by_one(frames: Tensor) -> Sequence[Tensor]:
    """Frames `[B, C, H, W]` or `[B, T, C, H, W]` as chunks `[B, 1, C, H, W]`."""
    return [frames.unsqueeze(1)] if frames.ndim == 4 else frames.split(1, dim=1)


def _logits_of(output: Any, batch: int, owner: str) -> tuple[Tensor, ...]:
    """The logits `[B, K]` of each head for one frame; a model may return those of every step `[1, B, K]`."""
    heads = output if isinstance(output, tuple | list) else (output,)
    found = [head[0] if isinstance(head, Tensor) and head.ndim == 3 and len(head) == 1 else head for head in heads]
    if not found or not all(isinstance(head, Tensor) and head.ndim == 2 and len(head) == batch for head in found):
        got = [list(head.shape) if isinstance(head, Tensor) else type(head).__name__ for head in heads]
        raise TypeError(
            f"push needs logits [{batch}, K] of a frame, {owner} gave {got}; call the stream itself for other outputs"
        )
    return tuple(found)


def forget_of(neuron: nn.Module) -> Callable[[], Any] | None:
    """The method that clears a neuron's memory, snnTorch's or SpikingJelly's, if it has one."""
    clear = getattr(neuron, "reset" if hasattr(neuron, "step_mode") else "reset_mem", None)
    return clear if callable(clear) else None


def _obstacle(module: nn.Module) -> str | None:
    """Why a module cannot run in a stream, if it cannot."""
    if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
        return "it is compiled; stream the model that was compiled"
    if isinstance(module, nn.RNNBase):
        return "its state would be reset at every chunk"
    if forget_of(module) is not None and not isinstance(module, Streamed):
        return "it is called once a time step, and its state would stay out of sight: put over_time(...) in its place"
    return None
