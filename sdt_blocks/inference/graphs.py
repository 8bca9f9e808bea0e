"""An optimised network as one CUDA graph a shape of its input: a call costs one launch, not one for each layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..neuron import Streamed

_WARM_UP = 3


class Recorded(NamedTuple):
    """A graph, the inputs that it reads and the result that it writes, which stay where they are."""

    replay: Callable[[], None]
    inputs: list[Tensor]
    result: Any
    pool: Any
    """Its memory, in which the graphs of other shapes work too: one at a time."""


class Graphed(nn.Module):
    """Records the launches of an optimised network when a shape of input comes first, and replays them from then on.

    Input and output are those of the network; results are copies, and stay what they are. All shapes work in the
    memory of the largest, so calls have to come one after the other, from one stream of CUDA; beyond `most` shapes the
    first is dropped. In a stream of frames, whose states are handed over between calls, the network is called as it
    is.

    Raises `ValueError` for input that is not on a CUDA device.
    """

    rebuilt = True
    """Layers are computed together: there is nothing for a hook to see."""

    def __init__(self, network: nn.Module, *, most: int = 8) -> None:
        super().__init__()
        self.network, self.most = network, most
        self.recorded: dict[Any, Recorded] = {}
        self.streamed = [module for module in network.modules() if isinstance(module, Streamed)]
        super().train(False)

    @property
    def dtype(self) -> Any:
        """That of the network's products."""
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
        # What was recorded reads the weights where they were.
        self.recorded = {}
        super()._apply(fn, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "recorded": {}}


def record(function: Callable[[], Any], inputs: list[Tensor], pool: Any) -> Recorded:
    """The launches of a function that reads `inputs`, in the memory of `pool`, or of one of its own.

    It runs a few times before, on a stream of its own as capturing asks for: kernels are built and ways of products
    compared then, which waits for the device.
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
