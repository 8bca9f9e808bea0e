"""One training step of sdt_8_384 at 224 x 224, T = 4: time, and peak memory.

Weights and images are channels-last, which every convolution of ours uses as it is; the peer runs in both orders. The
floor has nothing but the convolutions, forward and backward.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from harness import Bench, ParityError, measure_memory
from inference import spikingjelly_installed
from peers import ConvolutionFloor, spikingjelly_model
from torch import Tensor, nn

from sdt_blocks import create_model
from sdt_blocks.inference.graphs import record

ALLOCATORS = ["default", "reused"]
Step = Callable[[], object]


def run(bench: Bench) -> None:
    name, side, batch = bench.pick(cpu=("sdt_8_384", 224, 4), cuda=("sdt_8_512", 224, 32), trial=("sdt_2_256", 32, 2))
    images = torch.rand(batch, 3, side, side, device=bench.device)
    labels = torch.arange(batch, device=bench.device)
    setting, figure = f"{name}, {side} x {side}, T=4, batch {batch}", "training step, peak memory"
    steps = {}
    for title, make in variants(bench).items():
        with bench.spared(figure, setting, title):
            step = make(name, images, labels)
            # A first step keeps compiling and the optimizer's state out of the peak.
            step()
            # What a graph works in is reserved when it is recorded.
            if bench.allocator == "default" and "graph" not in title:
                bench.record(figure, setting, title, measure_memory(bench.device, step)[0] / 1e9, unit="GB")
            steps[title] = step
    with torch.random.fork_rng():
        plain = create_model(name).to(bench.device).eval()
    for title, dtype in {"floor: bare convolutions, fp32": torch.float32, "floor in bf16": torch.bfloat16}.items():
        steps[title] = ConvolutionFloor(plain, images, dtype, gradients=True)
    baseline = "SpikingJelly, eager" if "SpikingJelly, eager" in steps else "sdt_blocks"
    parity = {"sdt_blocks": lambda: same_gradients(name, images[:1], labels[:1])}
    bench.race("training step", setting, steps, baseline=baseline, parity=parity, rounds=7, warmup=1)


def variants(bench: Bench) -> dict[str, Callable[[str, Tensor, Tensor], Step]]:
    """Training steps by title; compiled ones take minutes and are added by `--with compiled`."""
    device = bench.device

    def ours(compiled: bool, reduced: bool, mode: str | None = None) -> Callable[[str, Tensor, Tensor], Step]:
        def make(name: str, images: Tensor, labels: Tensor) -> Step:
            model = create_model(name).to(device, memory_format=torch.channels_last)
            return training_step(
                torch.compile(model, mode=mode) if compiled else model, model, last(images), labels, reduced
            )

        return make

    def graphed(name: str, images: Tensor, labels: Tensor) -> Step:
        model = create_model(name).to(device, memory_format=torch.channels_last)
        step = training_step(model, model, last(images), labels, True, capturable=True)
        return record(step, [images], None).replay

    found = {"sdt_blocks": ours(False, False), "sdt_blocks, bf16": ours(False, True)}
    if device.type == "cuda":
        found["sdt_blocks, bf16, one CUDA graph"] = graphed
    if spikingjelly_installed():
        found |= peers(bench)
    if "compiled" in bench.options:
        found |= {"sdt_blocks, compiled": ours(True, False), "sdt_blocks, compiled, bf16": ours(True, True)}
        if device.type == "cuda":
            found["sdt_blocks, compiled to CUDA graphs, bf16"] = ours(True, True, "reduce-overhead")
    return found


def peers(bench: Bench) -> dict[str, Callable[[str, Tensor, Tensor], Step]]:
    """SpikingJelly's model in both memory orders; on a GPU in bfloat16 too, and with its memory savings.

    `--with memopt` adds the levels from the second on, which search for minutes by the GPU's own count of its memory.
    """

    def peer(
        compiled: bool = False, channels_last: bool = False, reduced: bool = False, level: int = 0
    ) -> Callable[[str, Tensor, Tensor], Step]:
        def make(name: str, images: Tensor, labels: Tensor) -> Step:
            dim = int(name.split("_")[2])
            call = spikingjelly_model(device=bench.device, compiled=compiled, training=True, dim=dim)
            net: nn.Module = call.net  # type: ignore[attr-defined]
            if channels_last:
                net.to(memory_format=torch.channels_last)
            if level:
                save_memory(call, net, images, level)
            return training_step(call, net, last(images) if channels_last else images, labels, reduced)

        return make

    found = {"SpikingJelly, eager": peer(), "SpikingJelly, eager, channels-last": peer(channels_last=True)}
    if "spikingjelly-compiled" in bench.options:
        found["SpikingJelly, compiled"] = peer(compiled=True)
    if bench.device.type == "cuda" or bench.size == "trial":
        found["SpikingJelly, eager, bf16"] = peer(reduced=True)
        levels = (1, 2, 3, 4) if "memopt" in bench.options else (1,)
        found |= {f"SpikingJelly, memopt {level}": peer(level=level) for level in levels}
        if "spikingjelly-compiled" in bench.options:
            found["SpikingJelly, compiled, bf16"] = peer(compiled=True, reduced=True)
    return found


def save_memory(call: Callable[[Tensor], Tensor], net: nn.Module, images: Tensor, level: int) -> None:
    """SpikingJelly's optimize_memory, in place, with attentions, MLPs and patch stages to choose from."""
    from spikingjelly.activation_based import memopt, neuron

    blocks = [module for module in net.modules() if hasattr(module, "attn") and hasattr(module, "mlp")]
    targets = (nn.Sequential, *{type(part) for block in blocks for part in (block.attn, block.mlp)})
    memopt.optimize_memory(
        net,
        targets,
        lambda current: call(images),
        level=level,
        split_fn=lambda module: list(module.children()),
        can_chunk=lambda module: isinstance(module, neuron.BaseNode),
    )


def last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)


def training_step(
    forward: Callable[[Tensor], Tensor],
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    reduced: bool,
    *,
    capturable: bool = False,
) -> Step:
    """Forward, cross-entropy, backward and an AdamW step, in float32 or under bfloat16 autocast."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, capturable=capturable)

    def step() -> None:
        with torch.autocast(images.device.type, torch.bfloat16) if reduced else nullcontext():
            logits = forward(images)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def same_gradients(name: str, images: Tensor, labels: Tensor, small: Callable[[], Any] | None = None) -> str:
    """Parity of the fused step: a small model's loss and gradients compared with those of the equations, step by step.

    In float64: a membrane within rounding of its threshold would change a spike, and with it the gradient.
    """
    from block import backend

    with torch.random.fork_rng():
        torch.manual_seed(0)
        fresh = small() if small else create_model(name, depth=1, dim=64, num_classes=10)
        fresh.to(images.device, torch.float64).train()
    results = []
    for forced in (None, "reference"):
        backend(forced)
        # Each has its own pass: running statistics, which a step changes, may be seen by the next.
        model = copy.deepcopy(fresh)
        loss = F.cross_entropy(model(images[..., :64, :64].double()), labels.clamp(max=9))
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    backend(None)
    # A bias in front of a norm has no gradient but noise: it is compared on the scale of the others.
    least = 1e-4 * max(b.norm().item() for b in results[1])
    worst = max(((a - b).norm() / b.norm().clamp(min=least)).item() for a, b in zip(*results, strict=True))
    if worst > 1e-6:
        raise ParityError(f"a gradient of the small model is off by {worst:.1e} of its norm")
    return f"gradients of a small model within {worst:.0e}"
