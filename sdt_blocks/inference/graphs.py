"""An optimized network as one CUDA graph for each input shape: a call costs one launch instead of one per layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..neuron import Streamed

_WARM_UP = 3


class Recorded(NamedTuple):
    """A graph with the inputs that it reads and the result that it writes, at fixed addresses."""

    replay: Callable[[], None]
    inputs: list[Tensor]
    result: Any
    pool: Any
    """Its memory, which the graphs of other shapes share: only one may run at a time."""


class Graphed(nn.Module):
    """Records the launches of an optimized network for each new input shape, and replays them from then on.

    Input and output are those of the network; results are copies, which later calls do not change. All shapes share the
    memory of the largest, so calls must not overlap and must use one CUDA stream; beyond `most` shapes the oldest is
    dropped. In a `Stream` of frames, where states are carried from call to call, the network is called without a graph.

    Raises `ValueError` for input that is not on a CUDA device.
    """

    rebuilt = True
    """Layers are computed together, so there is nothing for a hook to see."""

    def __init__(self, network: nn.Module, *, most: int = 8) -> None:
        super().__init__()
        self.network, self.most = network, most
        self.recorded: dict[Any, Recorded] = {}
        self.streamed = [module for module in network.modules() if isinstance(module, Streamed)]
        super().train(False)

    @property
    def dtype(self) -> Any:
        """The dtype of the network's products."""
        return self.network.dtype

    @torch.no_grad()
    def forward(self, *inputs: Tensor) -> Any:
        if any(neuron.carrier is not None for neuron in self.streamed):
            return self.network(*inputs)
        others = {str(x.device) for x in inputs if x.device.type != "cuda"}
        if others:
            raise ValueError(
                f"a CUDA graph takes tensors on a CUDA device, got {', '.join(sorted(others))}; move the input there, "
                "or leave cuda_graph out"
            )
        return self._replayed(inputs)

    def _replayed(self, inputs: tuple[Tensor, ...]) -> Any:
        key = tuple((x.shape, x.dtype, x.device) for x in inputs)
        if key not in self.recorded:
            while len(self.recorded) >= self.most:
                del self.recorded[next(iter(self.recorded))]
            held = [x.contiguous().clone() for x in inputs]
            pools = (one.pool for one in self.recorded.values() if one.inputs[0].device == held[0].device)
            pool = next(pools, None)
            self.recorded[key] = record(lambda: self.network(*held), held, pool)
        replay, held, result, _ = self.recorded[key]
        for into, x in zip(held, inputs, strict=True):
            into.copy_(x)
        replay()
        return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, result)

    def train(self, mode: bool = True) -> Graphed:
        """Raises `RuntimeError` for training mode, as the network does."""
        self.network.train(mode)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Graphed:
        # A recorded graph reads the weights at their old addresses.
        self.recorded = {}
        super()._apply(fn, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "recorded": {}}


def record(function: Callable[[], Any], inputs: list[Tensor], pool: Any) -> Recorded:
    """Records the launches of a function that reads `inputs`, in the memory of `pool` or in memory of its own.

    The function first runs a few times on a stream of its own, as capturing requires: then kernels are built and ways
    of products compared, which waits for the device.
    """
    with torch.cuda.device(inputs[0].device):
        current, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UP):
                function()
        current.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            result = function()
    return Recorded(graph.replay, inputs, result, graph.pool())
