"""Export of networks as NIR graphs, for other simulators and chips (Pedersen et al., 2024)."""

from __future__ import annotations

import graphlib
from collections.abc import Callable
from typing import Any

import numpy as np
import snntorch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import steps
from ..neuron import LIF, OverTime
from ..neuron.stepping import is_plain_leaky
from ..ops.spec import NeuronSpec
from .frames import options_of
from .passes import axes_of_mean, over_places
from .plan import (
    ADD,
    CALL,
    CHECK,
    FIRE,
    INPUT,
    MIX,
    OUTPUT,
    POOL,
    PRESENT,
    PROJECT,
    Node,
    computed,
    convolution,
    filled,
    fold,
)
from .trace import trace

DT = 1e-4
"""The length of a time step in seconds, as in snnTorch's own export."""

LEADING = 2
"""The number of axes for time and batch, which a graph does not have."""

Sources = tuple[str, ...]
"""The nodes of a graph whose sum is a value: NIR adds the values of several edges."""


@torch.no_grad()
def export_to_nir(model: nn.Module, x: Tensor) -> Any:
    """The NIR graph (`nir.NIRGraph`, https://doi.org/10.1038/s41467-024-52259-9) of a spiking network in eval mode.

    It can contain convolutions with their norms folded in, linear layers, flattening, average pooling, the mean over
    height and width, shortcuts, and neurons: `LIF`, `ParametricLIF`, and snnTorch's `Leaky` in `over_time` (with beta 1
    a `nir.IF`). Nodes have the names of the modules. Time constants assume steps of 0.1 ms; the reset is to 0. A neuron
    of NIR fires only above its threshold; for one that also fires at the threshold (`strict=False`) the exported
    threshold is the next smaller float32 number.

    The graph takes one frame and gives one output per step: show an image at every step, and take a mean over time
    after the last layer yourself. x is any input that the model takes; its values do not matter.

    Raises `ValueError` for a reset other than "zero", `TypeError` with the module's name for anything that NIR does not
    have, such as attention, and `ImportError` without the package nir.

    >>> net = nn.Sequential(nn.Linear(8, 5), LIF(tau=2.0), nn.Linear(5, 3))  # doctest: +SKIP
    >>> export_to_nir(net, torch.rand(4, 1, 8)).nodes["1"].r  # doctest: +SKIP
    array([1., 1., 1., 1., 1.], dtype=float32)
    """
    nir = _package()
    mixers = list(steps.find_mixers(model))
    if mixers:
        raise TypeError(
            f"NIR has no attention, nor any other product of spikes with spikes, and the network has {len(mixers)} "
            f"(the first is {mixers[0]}); use ONNX or torch.export"
        )
    traced = trace(model)
    if traced.opaque:
        name, why = next(iter(traced.opaque.items()))
        raise TypeError(f"{name or type(model).__name__} has no form in NIR, since its call cannot be traced: {why}")
    writer = _Writer(nir)
    for node in traced.plan.nodes:
        writer.write(node, x, traced.plan.users()[node])
    return nir.NIRGraph(nodes=writer.nodes, edges=writer.edges)


@torch.no_grad()
def simulate_nir(graph: Any, x: Tensor, dt: float = DT) -> dict[str, Tensor]:
    """The outputs of every node of a NIR graph for the sequence x, by name, `[T, B, ...]` each.

    `graph` comes from `export_to_nir` or `nir.read`; x `[T, B, ...]` goes to its only input. Neurons follow NIR's
    differential equations, `tau dv/dt = v_leak - v + r i` and `dv/dt = r i`, in Euler steps of `dt` seconds.

    Raises `TypeError` for a kind of node that `export_to_nir` does not write, and `ValueError` for a graph with a
    cycle, or with more or fewer inputs than one.
    """
    nir = _package()
    before: dict[str, list[str]] = {name: [] for name in graph.nodes}
    for source, target in graph.edges:
        before[target].append(source)
    inputs = [name for name, node in graph.nodes.items() if isinstance(node, nir.Input)]
    if len(inputs) != 1:
        raise ValueError(f"a graph with one input is expected, got {len(inputs)}")
    try:
        order = list(graphlib.TopologicalSorter(before).static_order())
    except graphlib.CycleError as error:
        raise ValueError(f"the graph has a cycle, so no order of its layers computes it: {error.args[1]}") from None
    values: dict[str, Tensor] = {inputs[0]: x}
    for name in order:
        if name not in values:
            total = sum((values[one] for one in before[name][1:]), start=values[before[name][0]])
            values[name] = _simulated(nir, name, graph.nodes[name], total, dt)
    return values


def _package() -> Any:
    try:
        import nir
    except ImportError as error:
        raise ImportError(f"NIR needs the package nir (pip install 'sdt_blocks[export]'): {error}") from None
    return nir


class _Writer:
    """Builds the nodes and edges of a graph from the nodes of a plan, with shapes from an input."""

    def __init__(self, nir: Any) -> None:
        self.nir = nir
        self.nodes: dict[str, Any] = {}
        self.edges: list[tuple[str, str]] = []
        self.values: dict[Node, Any] = {}
        self.sources: dict[Node, Sources] = {}

    def write(self, node: Node, x: Tensor, users: list[Node]) -> None:
        """Writes one node of a plan, after those that it takes. Raises `TypeError` or `ValueError`."""
        before = self.sources.get(node.args[0]) if node.args and isinstance(node.args[0], Node) else None
        if node.op == OUTPUT:
            if before is None:
                raise TypeError("a graph of NIR has one output, and the network gives another")
            self._add("output", self.nir.Output(self._shape(node.args[0])), before)
        elif node.op == MIX:
            raise TypeError(f"NIR has no attention, and {node.name} is one; use ONNX or torch.export")
        elif node.op == INPUT:
            if any(one.op == INPUT for one in self.values):
                raise TypeError("a graph of NIR has one input here, and the network takes two")
            self.values[node] = x
            if not any(user.op == PRESENT for user in users):
                self.sources[node] = self._add("input", self.nir.Input(self._shape(node)), ())
        elif node.op != CHECK:
            self.values[node] = _value(node, self.values)
            if node.op == PRESENT:
                self.sources[node] = self._add("input", self.nir.Input(self._shape(node)), ())
            else:
                self.sources[node] = self._written(node, before, users)

    def _written(self, node: Node, before: Sources | None, users: list[Node]) -> Sources:
        if before is None:
            raise self._refused(node)
        target = node.target
        if node.op == ADD:
            terms = [self.sources[one] for one in node.args if isinstance(one, Node)]
            if len(terms) < 2 or set(terms[0]) & set(terms[1]):
                raise TypeError(f"{node.name}: NIR can only add the outputs of several nodes, each once")
            return terms[0] + terms[1]
        if node.op == FIRE or (node.op == CALL and isinstance(target, OverTime)):
            return self._add(node.name, _neuron(self.nir, node.name, target, self._shape(node)), before)
        if node.op == PROJECT:
            return self._add(node.name, self._convolution(node), before)
        if node.op == CALL and axes_of_mean(node) == [0] and all(user.op == OUTPUT for user in users):
            # The graph has one output per step; its user takes the mean over them.
            self.values[node] = self.values[node.args[0]]
            return before
        if node.op == CALL and over_places(node) and target in ("mean", torch.mean):
            size = np.array(self.values[node.args[0]].shape[-2:])
            pooled = self._add(f"{node.name}.pool", self._average(size, size), before)
            channels = np.array([self.values[node].shape[-1], 1, 1])
            return self._add(node.name, self.nir.Flatten({"input": channels}, 0, -1), pooled)
        return self._add(node.name, self._layer(node), before)

    def _layer(self, node: Node) -> Any:
        """Layers of PyTorch, and calls that do the same."""
        layer, given = node.target, self.values[node.args[0]]
        plain = isinstance(layer, nn.Module) and not steps.has_hooks(layer)
        flat = _flattened(node)
        if flat is not None and flat[0] >= LEADING:
            start, end = flat[0] - LEADING, flat[1] % given.ndim - LEADING
            return self.nir.Flatten({"input": np.array(given.shape[LEADING:])}, start, end)
        if plain and type(layer) is nn.Linear and given.ndim == LEADING + 1:
            weight = _numbers(layer.weight)
            return self.nir.Linear(weight) if layer.bias is None else self.nir.Affine(weight, _numbers(layer.bias))
        if plain and type(layer) is nn.AvgPool2d and given.ndim == LEADING + 3:
            padded = np.any(np.array(layer.padding))
            if padded or layer.ceil_mode or layer.divisor_override is not None:
                raise TypeError(f"{node.name}: NIR's average pooling has no padding, ceil_mode or divisor: {layer}")
            return self._average(layer.kernel_size, layer.stride)
        raise self._refused(node)

    def _convolution(self, node: Node) -> Any:
        known = convolution(node.target)
        if known is None:
            raise self._refused(node)
        conv, _ = known
        weight, bias = fold(*known)
        if conv.groups > 1:  # the package nir gets their channels wrong: write zeros between the groups instead
            weight = torch.stack(
                [torch.block_diag(*part.chunk(conv.groups)) for part in weight.flatten(2).unbind(2)], 2
            )
        weight = weight.reshape(*weight.shape[:2], *conv.kernel_size)
        size = tuple(self.values[node.args[0]].shape[-2:])
        made = self.nir.Conv2d(size, _numbers(weight), conv.stride, conv.padding, conv.dilation, 1, _numbers(bias))
        shape = self._shape(node)
        if not np.array_equal(made.output_type["output"], shape):
            raise TypeError(
                f"{node.name}: the package nir takes a kernel of {conv.kernel_size} for a square one, and its result "
                f"for {made.output_type['output'].tolist()} instead of {shape.tolist()}"
            )
        return made

    def _average(self, size: Any, stride: Any) -> Any:
        pair, step = (np.broadcast_to(np.array(value), (2,)) for value in (size, stride))
        return self.nir.AvgPool2d(kernel_size=pair, stride=step, padding=np.zeros(2, int))

    def _refused(self, node: Node) -> TypeError:
        kind = type(node.target).__name__ if isinstance(node.target, nn.Module) else node.name
        norm = isinstance(node.target, nn.modules.batchnorm._NormBase)
        more = "; norms fold into the convolution before them, where no other layer takes it" if norm else ""
        more = "; average pooling it has" if isinstance(node.target, nn.MaxPool2d) else more
        return TypeError(f"NIR has no {kind} as the network calls it ({node.name}){more}")

    def _shape(self, node: Node) -> np.ndarray:
        """The shape of one sample at one step."""
        return np.array(self.values[node].shape[LEADING:])

    def _add(self, name: str, made: Any, before: Sources) -> Sources:
        unique, again = name, 0
        while unique in self.nodes or (unique in ("input", "output") and not _is_end(made)):
            again += 1
            unique = f"{name}_{again}"
        self.nodes[unique] = made
        self.edges += [(source, unique) for source in before]
        return (unique,)


def _is_end(node: Any) -> bool:
    return type(node).__name__ in ("Input", "Output")


def _value(node: Node, values: dict[Node, Any]) -> Any:
    """The value of a node of a plan, computed by the leaf itself."""
    args, kwargs = filled((node.args, node.kwargs), values.__getitem__)
    ways: dict[str, Callable[..., Any]] = {PROJECT: steps.project, FIRE: steps.fire, POOL: steps.pool}
    if node.op in ways:
        return ways[node.op](node.target, *args)
    return computed(node.target, args, kwargs)


def _flattened(node: Node) -> list[int] | None:
    """The first and the last axis that a layer or call flattens into one."""
    if isinstance(node.target, nn.Flatten):
        return [node.target.start_dim, node.target.end_dim]
    return options_of(node, "flatten", start_dim=0, end_dim=-1)


def _neuron(nir: Any, name: str, layer: Any, shape: np.ndarray) -> Any:
    neuron: Any = layer.neuron if isinstance(layer, OverTime) else layer
    leaky = type(neuron) is snntorch.Leaky and isinstance(layer, OverTime) and is_plain_leaky(neuron)
    if not leaky and not (isinstance(neuron, LIF) and steps.is_neuron(neuron)):
        raise TypeError(f"{name}: {type(neuron).__name__} has no form here; LIF, ParametricLIF and snnTorch's Leaky do")
    told = NeuronSpec(float(neuron.threshold), neuron.reset_mechanism, strict=True) if leaky else neuron.spec
    if told.reset != "zero":
        raise ValueError(f"{name}: a neuron of NIR is reset to zero, got one with reset={told.reset!r}")
    ones = np.ones(shape, dtype=np.float32)
    threshold = np.float32(told.threshold)
    if not told.strict:
        threshold = np.nextafter(threshold, np.float32(0))
    voltages = {"v_threshold": threshold * ones, "v_reset": 0 * ones}
    leak = torch.as_tensor(1 - neuron.beta.clamp(0, 1) if leaky else told.inv_tau, dtype=torch.float64)
    if leaky and leak == 0:
        return nir.IF(r=ones / np.float32(DT), **voltages)
    per_channel = leak.view(-1, *(1,) * (len(shape) - 1)) if leak.ndim else leak
    tau = (DT / per_channel).numpy() * ones.astype(np.float64)
    resistance = 1 / leak.item() if leaky else 1.0
    return nir.LIF(tau=tau.astype(np.float32), r=np.float32(resistance) * ones, v_leak=0 * ones, **voltages)


def _numbers(value: Tensor) -> np.ndarray:
    numbers: np.ndarray = value.detach().float().cpu().numpy()
    return numbers


def _simulated(nir: Any, name: str, node: Any, x: Tensor, dt: float) -> Tensor:
    """The output of one node for the whole sequence."""

    def tensor(values: Any) -> Tensor:
        return torch.as_tensor(np.asarray(values)).to(x)

    def framewise(function: Callable[..., Tensor], *args: Any, **options: Any) -> Tensor:
        return function(x.flatten(0, 1), *args, **options).unflatten(0, x.shape[:LEADING])

    if isinstance(node, nir.Output):
        return x
    if isinstance(node, nir.Conv2d):
        padding = node.padding if isinstance(node.padding, str) else _pair(node.padding)
        options = {"padding": padding, "stride": _pair(node.stride), "dilation": _pair(node.dilation)}
        return framewise(F.conv2d, tensor(node.weight), tensor(node.bias), groups=int(node.groups), **options)
    if isinstance(node, nir.Linear | nir.Affine):
        return F.linear(x, tensor(node.weight), tensor(node.bias) if isinstance(node, nir.Affine) else None)
    if isinstance(node, nir.AvgPool2d):
        return framewise(F.avg_pool2d, _pair(node.kernel_size), _pair(node.stride), _pair(node.padding))
    if isinstance(node, nir.Flatten):
        end = int(node.end_dim)
        return x.flatten(int(node.start_dim) + LEADING, end + LEADING if end >= 0 else end)
    if not isinstance(node, nir.LIF | nir.IF):
        raise TypeError(f"{name}: a {type(node).__name__} is none of the nodes that export_to_nir writes")
    threshold, reset, resistance = (tensor(values) for values in (node.v_threshold, node.v_reset, node.r))
    share = dt / tensor(node.tau) if isinstance(node, nir.LIF) else torch.full_like(threshold, dt)
    v, spikes = torch.zeros_like(x[0]), []
    for x_t in x:
        drive = resistance * x_t
        v = v + share * (tensor(node.v_leak) - v + drive if isinstance(node, nir.LIF) else drive)
        fired = v > threshold
        v = torch.where(fired, reset, v)
        spikes.append(fired.to(x))
    return torch.stack(spikes)


def _pair(value: Any) -> tuple[int, int]:
    first, second = np.broadcast_to(np.asarray(value), (2,))
    return int(first), int(second)
