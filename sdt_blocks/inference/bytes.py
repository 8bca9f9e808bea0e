"""The dense form of a plan on a GPU in 8 bits: spikes are a byte each, and products take and emit bytes themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..neuron import IntegerNeuron
from ..ops import dense as kernels
from ..ops.bytes import LARGEST, Result, spike_layer
from ..ops.integers import MOST_PLANES, quantize
from ..ops.spec import ByteLayer, LevelSpec, check_time_constants
from .dense import Dense, Firing, LevelFiring, Membrane, Spiking, side_by_side
from .forms import whole
from .passes import COUNTS, LEVELS, REAL, SPIKES, epilogues, kinds, most_counted
from .plan import PROJECT, Node, Plan
from .product import Geometry


class ByteProduct(nn.Module):
    """A convolution on bytes with 8-bit weights, and what follows it: `forward` is `ops.bytes.spike_layer`.

    `planes` is the largest value that a byte can have; a byte stands for its value divided by `norm`.
    """

    def __init__(self, weight: Tensor, bias: Tensor, geometry: Geometry, *, planes: int = 1, norm: float = 1.0) -> None:
        super().__init__()
        # Where the weights are rounded must not depend on the device.
        integers, scale = quantize(weight.cpu(), pieces=1, planes=planes)
        scale = (scale.double() / norm).float()
        self.windows, self.norm = geometry.windows, norm
        self.register_buffer("integers", integers.permute(0, 2, 3, 1).contiguous().to(weight.device))
        self.register_buffer("constants", torch.stack([scale, bias.cpu().float()]).to(weight.device))
        self.integers: Tensor
        self.constants: Tensor

    def forward(self, x: Tensor, **options: Any) -> Result:
        return spike_layer(x, ByteLayer(self.integers, self.constants[0], self.constants[1], self.windows), **options)

    def bytes_of(self, real: Tensor) -> Tensor:
        """Spikes, counts or levels in floating point as bytes."""
        return (real if self.norm == 1 else real * self.norm).round().to(torch.int8)

    def extra_repr(self) -> str:
        out, *kernel, into = self.integers.shape
        return f"{into}, {out}, kernel={kernel}, int8"


class AsItIs(nn.Module):
    """Takes the place of a layer of neurons if its input has already fired."""

    carrier = None

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("inv_tau", kernels.as_it_is(device).inv_tau, persistent=False)
        self.inv_tau: Tensor

    def neuron(self, shape: Sequence[int]) -> kernels.Neuron:
        return kernels.as_it_is("meta")._replace(inv_tau=self.inv_tau)


class Bytes(Dense):
    """The dense form with 8-bit weights for products of spikes, levels and counts, computed by Triton's kernels.

    Weights and sums are those of `optimize_for_inference(model, torch.int8)` on a CPU; products of real values stay in
    float32. A product also adds the shortcut and fires, unless the neurons are in a stream.

    Raises `ValueError` for a network that is not in float32 on one device, and for values that a byte cannot hold.
    """

    def __init__(self, plan: Plan) -> None:
        device = _check(plan)
        super().__init__(plan)
        self.dtype = torch.int8
        self.as_it_is = AsItIs(device).eval()

    def _kinds(self, plan: Plan) -> dict[Node, str]:
        found, self.counted = kinds(plan), most_counted(plan)
        self.epilogues = {} if self.in_place else epilogues(plan)
        # As on a CPU.
        return found | {node: REAL for node, most in self.counted.items() if most > MOST_PLANES}

    def _product(self, units: Any, node: Node, paths: str) -> Any:
        if not whole(node, self.kinds) or (node.op == PROJECT and self.in_place):
            return super()._product(units, node, paths)
        joined, given = side_by_side(units), node.inputs()[0]
        if joined is None:
            raise ValueError(
                f"the layers of {node.name} differ in their windows, which no kernel of bytes computes; leave "
                f"torch.int8 out"
            )
        levels = {"planes": given.target.levels, "norm": given.target.norm} if self.kinds[given] == LEVELS else {}
        options = {"planes": self.counted[given]} if self.kinds[given] == COUNTS else levels
        if options.get("planes", 1) > LARGEST:
            raise ValueError(
                f"{node.name} takes values up to {options['planes']}, and a byte holds {LARGEST}; leave torch.int8 out"
            )
        return ByteProduct(joined.weight, joined.bias, joined.geometry, **options), joined.channels

    def _bytes(self, node: Node, product: ByteProduct, x: Any) -> Tensor:
        frames = self._frames_of(node, x)
        return frames.real(torch.int8) if isinstance(frames, Spiking) else product.bytes_of(frames.real())

    def _project(self, node: Node, given: list[Any], values: dict[Node, Any]) -> Any:
        product = self.forms[node]
        if not isinstance(product, ByteProduct):
            return super()._project(node, given, values)
        x, after = self._bytes(node, product, given[0]), self.epilogues[node]
        residual: Tensor | None = None
        if after.residual is not None:
            before = self._frames(values.get(after.residual))
            residual = None if before is None else before.real(self.real_dtype)
            size = product.windows.size(x.shape[2:4], product.integers.shape[1:3])
            if residual is None or residual.shape != (*x.shape[:2], *size, len(product.integers)):
                # The shortcut is added, and the neuron fires, as nodes of their own.
                return Membrane(_kept(product(x, membrane=self.real_dtype)))
        neuron = None if after.fire is None else _as_one([self.forms[after.fire]], [len(product.integers)])
        membrane = self.real_dtype if after.keep or neuron is None else None
        kept, spikes = product(x, residual=residual, membrane=membrane, neuron=neuron)
        if spikes is not None and after.fire is not None:
            values[after.fire] = _spiking(spikes, neuron.norm if isinstance(neuron, LevelSpec) else 1.0)
        total = None if kept is None else Membrane(kept)
        if after.total is not node:
            values[after.total] = total
        return total if after.total is node else None

    def _mix(self, node: Node, given: list[Any], values: dict[Node, Any]) -> Any:
        form = self.forms[node]
        if form is None or not isinstance(form.product, ByteProduct):
            return super()._mix(node, given, values)
        x, fires, count = self._bytes(node, form.product, given[0]), list(form.fires), len(form.channels)
        neuron = _as_one(fires[:count], form.channels)
        if neuron is None:
            return self._mixed_of(node, _kept(form.product(x, membrane=self.real_dtype)), fires)
        _, spikes = form.product(x, neuron=neuron)
        as_they_are = fires[:count] if isinstance(neuron, LevelSpec) else [self.as_it_is] * count
        return self._mixed_of(node, spikes, as_they_are + fires[count:])

    def _fired(self, neuron: Any, membrane: Tensor) -> Tensor:
        if membrane.dtype != torch.int8:
            return super()._fired(neuron, membrane)
        # It has fired.
        real = membrane.movedim(-1, 2).to(self.real_dtype, memory_format=torch.contiguous_format)
        return real / neuron.norm if isinstance(neuron, IntegerNeuron) else real

    def _add(self, node: Node, given: list[Any], values: dict[Node, Any]) -> Any:
        held = self.kinds[node] == COUNTS and self.counted[node] <= LARGEST
        if held and all(isinstance(one, Spiking) for one in given) and len(given) == 2:
            a, b = (one.real(torch.int8) for one in given)
            if a.shape == b.shape:
                return _spiking(a + b)
        return super()._add(node, given, values)

    def _pooled(self, node: Node, frames: Spiking) -> Callable[[torch.dtype], Tensor]:
        if self.kinds[node.inputs()[0]] != SPIKES:
            return super()._pooled(node, frames)
        spikes = frames.real(torch.int8)
        neuron = self.as_it_is.neuron(spikes.shape)
        return lambda dtype: kernels.fire_and_pool(spikes, neuron, dtype, compiled=self.compiled)


def _check(plan: Plan) -> torch.device:
    """The device of a network; raises `ValueError` if it has several, or is not in float32."""
    held = plan.parameters()
    found = sorted({f"{p.dtype} on {p.device}" for p in held})
    if len(found) > 1 or any(p.dtype != torch.float32 for p in held):
        raise ValueError(
            f"torch.int8 takes a network in float32 on one device; the model has {', '.join(found)}: call model.float()"
        )
    return held[0].device


def _as_one(fires: list[Any], channels: list[int]) -> kernels.Neuron | LevelSpec | None:
    """The neurons on joined products as those of one layer.

    `None` if their constants differ, in a stream, and if a byte does not hold their levels.
    """
    if all(isinstance(one, LevelFiring | IntegerNeuron) for one in fires):
        specs = {one.spec for one in fires}
        return specs.pop() if len(specs) == 1 and fires[0].spec.levels <= LARGEST else None
    if not all(isinstance(one, Firing) and one.carrier is None for one in fires):
        return None
    if len({one.constants for one in fires}) > 1:
        return None
    for one, count in zip(fires, channels, strict=True):
        check_time_constants(one.inv_tau, (count,))
    inv_taus = [one.inv_tau.expand(count) for one, count in zip(fires, channels, strict=True)]
    return kernels.Neuron(fires[0].inv_tau if len(fires) == 1 else torch.cat(inv_taus), *fires[0].constants)


def _spiking(spikes: Tensor, norm: float = 1.0) -> Spiking:
    found = Spiking(spikes.shape, spikes.to, norm=norm)
    found.made = spikes
    return found


def _kept(result: Result) -> Tensor:
    membrane, _ = result
    assert membrane is not None
    return membrane
