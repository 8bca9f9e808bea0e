"""The host's part of a training step on a GPU, which waits where the host takes longer than the kernels.

Launches are prepared as always, up to where Triton would hand them to the driver, and nothing runs on a GPU. Tensors
are so small that PyTorch's own ops, on the CPU here, take little more than their calls. The code is eager: a captured
graph needs none of this.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from harness import Bench, ParityError
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from sdt_blocks import create_model

# Imported before the environment says that kernels are interpreted, which is what Triton would then build them for.
from sdt_blocks.ops.triton import training  # noqa: F401

ALLOCATORS = ["default"]
DEVICES = ["cpu"]
DIM, STEPS = 32, 4


def run(bench: Bench) -> None:
    depth = bench.pick(cpu=8, cuda=8, trial=1)
    blocks: Any = create_model("sdt_8_384", dim=DIM, depth=depth).train().blocks
    x = torch.randn(STEPS, 1, 2, 2, DIM).movedim(-1, 2).requires_grad_()  # channels-last
    calls: dict[str, Callable[[], Tensor]] = {
        "PyTorch's convolutions, norms and sums": lambda: without_neurons(blocks, x),
        "sdt_blocks": lambda: through(blocks, x),
    }
    parameters = [x, *blocks.parameters()]
    both: dict[str, Callable[[], Any]] = {
        name: lambda call=call: torch.autograd.grad(call().sum(), parameters)  # type: ignore[misc]
        for name, call in calls.items()
    }
    setting = f"{depth} blocks of sdt_8_384 with {DIM} channels, 2 x 2, T={STEPS}, launches that do nothing"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with on_no_gpu() as launches:
            for figure, contestants in (("host, forward", calls), ("host, forward + backward", both)):
                parity = {"sdt_blocks": lambda ours=contestants["sdt_blocks"]: launched(ours, launches)}
                options: dict[str, Any] = {"parity": parity, "rounds": 300, "warmup": 10}
                bench.race(figure, setting, contestants, baseline="PyTorch's convolutions, norms and sums", **options)
    finally:
        torch.set_num_threads(threads)


def through(blocks: Any, x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


def without_neurons(blocks: Any, x: Tensor) -> Tensor:
    """The blocks' convolutions, norms and shortcuts alone, called as in plain PyTorch."""
    frames = x.flatten(0, 1)
    for block in blocks:
        attention, mlp = block.attention.branch, block.mlp.branch
        q, k, v = (unit.norm(unit.conv(frames)) for unit in (attention.q, attention.k, attention.v))
        frames = frames + attention.proj.norm(attention.proj.conv(q + k + v))
        hidden = mlp.fc1.norm(mlp.fc1.conv(frames))
        frames = frames + mlp.fc2.norm(mlp.fc2.conv(hidden))
    return frames.unflatten(0, x.shape[:2])


def launched(call: Callable[[], object], launches: list[str]) -> str:
    """How many of our launches a call makes. Raises `ParityError` if it makes none."""
    call()
    launches.clear()
    call()
    if not launches:
        raise ParityError("no Triton kernel was launched")
    return f"{len(launches)} launches of Triton kernels"


@contextlib.contextmanager
def on_no_gpu() -> Iterator[list[str]]:
    """Within it the Triton kernels are called for CPU tensors, as for an H100, and end before the driver.

    Yields the names of the kernels launched.
    """
    launches: list[str] = []

    class Driver:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)

    class Built:
        function, packed_metadata = 0, ()
        launch_metadata = staticmethod(lambda *arguments: None)

        def __init__(self, name: str) -> None:
            self.name = name

        def run(self, *arguments: Any) -> None:
            launches.append(self.name)

    def build(self: JITFunction, key: str, *settings: Any) -> Built:
        found: Built = self.device_caches[0][0].setdefault(key, Built(self.__name__))
        return found

    with (
        mock.patch.object(driver, "_active", Driver()),
        mock.patch.object(JITFunction, "_do_compile", build),
        mock.patch.dict(os.environ, SDT_BLOCKS_BACKEND="triton", TRITON_INTERPRET="1"),
    ):
        yield launches
