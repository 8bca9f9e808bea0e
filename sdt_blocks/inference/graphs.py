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


class Graphed(nn.Module):
    """Records the launches of an optimised network when a shape of input comes first, and replays them from then on.

    Input and output are those of the network; results are copies, and stay what they are. Each shape takes the memory
    of a pass, shared with the other shapes' where these are not running; beyond `most` shapes the first is dropped. In
    a stream, whose states are handed over between calls, the network is called as it is.

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
            self.recorded[key] = Recorded(*record(lambda: self.network(*held), held))
        replay, held, result = self.recorded[key]
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


def record(function: Callable[[], Any], inputs: list[Tensor]) -> tuple[Callable[[], None], list[Tensor], Any]:
    """What replays the launches of a function, the inputs that it reads, and its result.

    It runs a few times before, on a stream of its own as capturing asks for: kernels are built and ways of products
    compared then, which waits for the device.
    """
    current = torch.cuda.current_stream()
    aside = torch.cuda.Stream()
    aside.wait_stream(current)
    with torch.cuda.stream(aside):
        for _ in range(_WARM_UP):
            function()
    current.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph.replay, inputs, result
