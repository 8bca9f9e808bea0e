"""What each layer of a model computes: multiply-accumulates, and the share of its inputs that are not zero."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..attention import SpikeDrivenSelfAttention
from .probe import Batches, Clock, Forward, Hook, Probe, add_at, find_attention, gather

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)


@dataclass
class LayerOperations:
    """The work of one layer for one sample.

    `macs` are the multiply-accumulates of one step if every input counted, and `rate` the share of them that is charged
    at each step. `kind` is "AC" where the input is spikes, which only add, else "MAC". `repeated`: the layer sees the
    same analog input at every step. For a spike-driven attention of `tokens` and `channels`, `macs` are the additions
    of k * v, `rate` their coincidences, and `bound_rate` the firing rates of k and v added up.
    """

    name: str
    type: str
    kind: str
    macs: float
    rate: list[float]
    repeated: bool = False
    tokens: int = 0
    channels: int = 0
    bound_rate: list[float] = field(default_factory=list)


@dataclass
class Operations:
    """The layers' work in the order of the forward pass, for the mean of `samples`."""

    layers: list[LayerOperations]
    steps: int
    samples: int


@dataclass
class _Site:
    """Sums over samples for one layer, per step."""

    type: str
    nonzero: np.ndarray = field(default_factory=lambda: np.zeros(0))
    entries: np.ndarray = field(default_factory=lambda: np.zeros(0))
    dense: np.ndarray = field(default_factory=lambda: np.zeros(0))
    bound: np.ndarray = field(default_factory=lambda: np.zeros(0))
    first: bool = False
    analog: bool = False
    frames: bool = False
    tokens: int = 0
    channels: int = 0

    def add(self, other: _Site) -> None:
        for name in ("nonzero", "entries", "dense", "bound"):
            setattr(self, name, add_at(getattr(self, name), getattr(other, name)))
        for name in ("first", "analog", "frames", "tokens", "channels"):
            setattr(self, name, max(getattr(self, name), getattr(other, name)))


@dataclass
class _Call:
    """One call of a layer: non-zero inputs by row, the entries of a row, and the call's cost if all of them count."""

    type: str
    nonzero: Tensor
    entries: int
    dense: float
    spikes: Tensor
    kept_input: Tensor | None = None
    bound: Tensor | None = None
    size: tuple[int, int] = (0, 0)


def count_operations(
    model: nn.Module,
    batches: Batches,
    *,
    spike_input: bool = False,
    neurons: Sequence[type[nn.Module]] = (),
    forward: Forward | None = None,
) -> Operations:
    """The operations of every convolution, linear layer, matrix product and attention of the model, over all batches.

    Counts are summed in float64 over batches and processes. What comes before the first neuron is analog (kind "MAC")
    unless `spike_input` says that the data are spikes; any other layer is "AC" if its inputs are zeros and one positive
    value in every batch. For `neurons` and `forward` see `firing_rates`. Raises `ValueError` where there is no batch.
    """
    sites: dict[str, _Site] = {}
    samples = steps = 0
    with Probe(model, neurons, forward) as probe, _Recorder(probe) as recorder:
        for x in probe.run(batches):
            samples, steps = samples + probe.clock.batch, max(steps, probe.clock.steps)
            for name, calls in recorder.calls.items():
                site = _sum(name, calls, probe.clock, x)
                sites.setdefault(name, _Site(site.type)).add(site)
            recorder.calls.clear()
    return _merge(gather((sites, samples, steps)), spike_input)


class _Recorder(TorchDispatchMode):
    """Notes every product of a forward pass: of the layers by hooks, of free functions as the dispatcher sees them."""

    def __init__(self, probe: Probe) -> None:
        super().__init__()
        self.probe = probe
        self.calls: dict[str, list[_Call]] = {}
        self.products: Counter[str] = Counter()
        self.hooked = set(probe.neurons)
        for name, module in probe.model.named_modules():
            if isinstance(module, (*CONVOLUTIONS, nn.Linear)):
                self.hooked.add(name)
                probe.watch(module, self._layer(name))
        for name, attention in find_attention(probe.model).items():
            self._watch_attention(name, attention)
        probe.follow(lambda name: self.products.pop(name, None))

    def _note(self, name: str, call: _Call) -> None:
        self.calls.setdefault(name, []).append(call)

    def _layer(self, name: str) -> Hook:
        def called(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            x: Tensor = inputs[0]
            weight: Tensor = module.weight  # type: ignore[assignment]
            if isinstance(module, nn.Linear):
                rows = x if x.ndim > 1 else x.unsqueeze(0)
                call = self._call(name, "linear", rows, min(rows.ndim - 1, 2), output.numel() * module.in_features)
            else:
                rows = x if x.ndim == weight.ndim else x.unsqueeze(0)
                positions = x.numel() if isinstance(module, TRANSPOSED) else output.numel()
                call = self._call(name, "conv", rows, 1, positions * weight[0].numel())
            self._note(name, call)

        return called

    def _call(self, name: str, kind: str, rows: Tensor, row_axes: int, dense: float) -> _Call:
        inner = rows.flatten(row_axes)
        before = self.calls.get(name)
        first = before[0].kept_input is not None if before else not self.probe.clock.started
        nonzero = _nonzero(inner)
        kept = rows if first else None
        return _Call(kind, nonzero, inner.shape[-1], float(dense), _is_spikes(rows, nonzero), kept)

    def _watch_attention(self, name: str, attention: SpikeDrivenSelfAttention) -> None:
        rates: list[Tensor] = []
        for part in (attention.k_pool, attention.v_pool):
            self.probe.watch(part, lambda m, inputs, output: rates.append(_nonzero(output.flatten(2))))

        def summed(module: nn.Module, inputs: tuple[Any, ...], kv: Tensor) -> None:
            added = attention._pool_tokens(kv).flatten(2)
            nonzero = _nonzero(added)
            size = (kv.shape[-2] * kv.shape[-1], kv.shape[2])
            bound = torch.stack(rates).sum(0) if rates else None
            rates.clear()
            dense = float(kv.numel())
            spikes = _is_spikes(added, nonzero)
            call = _Call("attention", nonzero, added.shape[-1], dense, spikes, None, bound, size)
            self._note(name, call)

        self.probe.watch(attention.coincidences, summed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        product = PRODUCTS.get(func.overloadpacket._qualified_op_name)
        if product is not None and not self.hooked.intersection(self.probe.path):
            owner = self.probe.path[-1] if self.probe.path else ""
            name = f"{owner}.{product}{self.products[owner] or ''}".lstrip(".")
            self.products[owner] += 1
            first, second = args[1:3] if "add" in func.overloadpacket.__name__ else args[:2]
            self._product(name, product, first, second, output)
        return output

    def _product(self, name: str, product: str, a: Tensor, b: Tensor, output: Any) -> None:
        if product == "conv":
            self._note(name, self._call(name, "conv", a, 1, output.numel() * b[0].numel()))
        elif product == "attention":
            # Both products of a fused softmax attention; what it multiplies by V is no spike.
            call = self._call(name, "matmul", a, 1, 2 * a.numel() * b.shape[-2])
            self._note(name, _Call("matmul", call.nonzero, call.entries, call.dense, torch.tensor(False)))
        else:
            dense = a.numel() * b.shape[-1]
            a_adds, b_adds = (bool(_is_spikes(x, x.count_nonzero())) for x in (a, b))
            if b_adds and not a_adds:
                a = b.t() if b.ndim == 2 else b
            self._note(name, self._call(name, "matmul", a, 1, dense))


PRODUCTS = {
    **dict.fromkeys(("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::addbmm"), "matmul"),
    "aten::convolution": "conv",
    **dict.fromkeys(
        (
            "aten::_scaled_dot_product_flash_attention_for_cpu",
            "aten::_scaled_dot_product_flash_attention",
            "aten::_scaled_dot_product_efficient_attention",
            "aten::_scaled_dot_product_cudnn_attention",
        ),
        "attention",
    ),
}
"""Products outside of hooked layers, as the dispatcher names them, and what they count as."""


def _nonzero(rows: Tensor) -> Tensor:
    """Non-zero entries along the last axis; zeros for a meta tensor, which has no values."""
    return torch.zeros(rows.shape[:-1], dtype=torch.int64) if rows.is_meta else rows.count_nonzero(dim=-1)


def _is_spikes(x: Tensor, nonzero: Tensor) -> Tensor:
    """Whether all entries are 0 or one and the same positive number; `nonzero` holds counts of the non-zero ones."""
    if x.is_meta:
        return torch.tensor(True)
    top = x.amax()
    return (x == top).sum().where(top > 0, 0) == nonzero.sum()


def _sum(name: str, calls: list[_Call], clock: Clock, x: Tensor) -> _Site:
    """The calls of one forward pass of the input x. A layer that ran once for all steps counts at each of them."""
    nonzero = clock.split([call.nonzero for call in calls], name)
    entries = clock.split([torch.full_like(call.nonzero, call.entries) for call in calls], name)
    once = len(nonzero) < clock.steps
    kept = [call.kept_input for call in calls if call.kept_input is not None]
    frames = bool(kept) and (x.ndim == 5 or (not once and _varies(kept, clock.steps)))
    dense = sum(call.dense for call in calls) / len(nonzero)
    bounds = [call.bound for call in calls if call.bound is not None]

    def per_step(values: Tensor) -> np.ndarray:
        array = values.cpu().numpy().astype(np.float64)
        return np.repeat(array, clock.steps) if once else array

    return _Site(
        calls[0].type,
        per_step(nonzero),
        per_step(entries),
        np.full(clock.steps if once else len(nonzero), dense),
        per_step(clock.split(bounds, name)) if bounds else np.zeros(0),
        first=bool(kept),
        analog=not all(bool(call.spikes) for call in calls),
        frames=frames,
        tokens=calls[0].size[0],
        channels=calls[0].size[1],
    )


def _varies(inputs: list[Tensor], steps: int) -> bool:
    """Whether the input of a layer, over the calls or along the leading axis of one, changes from step to step."""
    whole = torch.cat([x.flatten(0, -1) if x.ndim == 1 else x for x in inputs])
    if whole.is_meta or len(whole) % steps:
        return False
    by_step = whole.reshape(steps, -1)
    return bool((by_step != by_step[0]).any())


def _merge(parts: list[tuple[dict[str, _Site], int, int]], spike_input: bool) -> Operations:
    sites: dict[str, _Site] = {}
    for part, _, _ in parts:
        for name, site in part.items():
            sites.setdefault(name, _Site(site.type)).add(site)
    samples, steps = sum(part[1] for part in parts), max(part[2] for part in parts)
    if samples == 0:
        raise ValueError("there was no batch to run; check that the data is not empty")
    layers = []
    for name, site in sites.items():
        share = site.nonzero / site.entries
        analog = site.analog or (site.first and not spike_input)
        # A still image is charged in full, and so is an analog value inside the network.
        charged = share if not analog or (site.first and site.frames) else np.ones_like(share)
        layers.append(
            LayerOperations(
                name,
                site.type,
                "MAC" if analog else "AC",
                float(site.dense.sum() / (samples * len(share))),
                (charged * site.dense * len(share) / site.dense.sum()).tolist(),
                repeated=analog and site.first and not site.frames,
                tokens=site.tokens,
                channels=site.channels,
                bound_rate=(site.bound / site.entries).tolist() if len(site.bound) else [],
            )
        )
    return Operations(layers, steps, samples)
