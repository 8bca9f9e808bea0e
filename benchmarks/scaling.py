"""Growth of time and memory with time steps, tokens and batch, and memory over many calls."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence

import torch
from harness import Bench, Sample, resident_bytes
from torch import Tensor

from sdt_blocks import LIF, SpikeDrivenBlock, create_model, optimize_for_inference

ALLOCATORS = ["reused"]


def run(bench: Bench) -> None:
    device = bench.device
    neuron, block = LIF(), SpikeDrivenBlock(128).to(device)

    def train(part: torch.nn.Module) -> Callable[[Tensor], object]:
        return lambda x: part(x.requires_grad_()).backward(torch.ones_like(x))

    def frames(steps: int = 4, batch: int = 8, size: int = 14) -> Tensor:
        return torch.randn(steps, batch, 128, size, size, device=device)

    steps = (1, 2, 4, 8, 16, 32)
    grow(bench, "LIF, forward + backward", "time steps", steps, lambda n: frames(steps=n, batch=32), train(neuron))
    grow(bench, "block, forward + backward", "time steps", steps, lambda n: frames(steps=n), train(block))
    grow(bench, "block, forward + backward", "tokens", (49, 196, 784), lambda n: frames(size=int(n**0.5)), train(block))
    grow(bench, "block, forward + backward", "images", (2, 4, 8, 16, 32), lambda n: frames(batch=n), train(block))
    model = create_model("sdt_2_256").to(device).eval()
    fast = optimize_for_inference(model)

    def images(batch: int) -> Tensor:
        return torch.rand(batch, 3, 32, 32, device=device)

    with torch.no_grad():
        grow(bench, "sdt_2_256 optimized", "images", (8, 16, 32, 64, 128), images, fast)
    leak(bench, "block, forward + backward", lambda: train(block)(frames()))
    leak(bench, "sdt_2_256 optimized", lambda: fast(images(32)))


def grow(
    bench: Bench,
    what: str,
    along: str,
    sizes: Sequence[int],
    make: Callable[[int], Tensor],
    function: Callable[[Tensor], object],
) -> None:
    """Time per unit of size; the ratio is to that of the middle size, 1 if time grows linearly."""
    inputs = {size: make(size) for size in sizes}
    samples = bench.time({str(size): lambda x=x: function(x.detach()) for size, x in inputs.items()})
    middle = sizes[len(sizes) // 2]
    reference = samples[str(middle)].median / middle
    for size in sizes:
        per_unit = Sample([seconds / size for seconds in samples[str(size)].values])
        bench.record(
            f"{what}, time for each of the {along}",
            "sdt_blocks",
            f"{size} {along}",
            per_unit,
            baseline=f"{middle} {along}",
            ratio=per_unit.median / reference,
        )


def leak(bench: Bench, what: str, call: Callable[[], object], calls: int = 60) -> None:
    """Growth of the process's memory from a third of the calls to the last."""
    for done in range(calls):
        call()
        if done == calls // 3:
            gc.collect()
            start = memory(bench)
    gc.collect()
    grown = (memory(bench) - start) / 1e6
    bench.record(f"{what}, memory after {calls} calls", f"since call {calls // 3}", "sdt_blocks", grown, unit="MB")


def memory(bench: Bench) -> int:
    return torch.cuda.memory_allocated(bench.device) if bench.device.type == "cuda" else resident_bytes()
