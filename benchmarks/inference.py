"""Evaluation of sdt_8_384 at 224 x 224, T = 4, compared with its bare convolutions and other arrangements."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from harness import Bench, ParityError
from peers import AuthorsArrangement, ConvolutionFloor, firing_model, spikingjelly_model
from torch import Tensor

from sdt_blocks import MetaSpikeFormer, SpikeDrivenTransformer, optimize_for_inference

ALLOCATORS = ["default", "reused"]
FLOOR = "floor: bare convolutions, fp32"
Build = Callable[[Any], Callable[[Tensor], Tensor]]
WHOLE_NUMBERS: dict[str, Build] = {
    "sdt_blocks, optimized, int8": lambda model: optimize_for_inference(model, torch.int8),
    "sdt_blocks, optimized, exact": lambda model: optimize_for_inference(model, exact=True),
}
"""On a CPU only."""
GRAPHS: dict[str, Build] = {
    "sdt_blocks, optimized, CUDA graph": lambda model: optimize_for_inference(model, cuda_graph=True),
    "sdt_blocks, optimized, bf16, CUDA graph": lambda model: optimize_for_inference(
        model, torch.bfloat16, cuda_graph=True
    ),
}
"""On a GPU only."""


@torch.no_grad()
def run(bench: Bench) -> None:
    name, side = bench.pick(cpu=("sdt_8_384", 224), cuda=("sdt_8_384", 224), trial=("sdt_2_256", 32))
    model = firing_model(name, torch.rand(2, 3, side, side, device=bench.device))
    setting = f"{name}, {side} x {side}, T=4"
    for batch in bench.pick(cpu=(1, 8), cuda=(1, 32, 256), trial=(1, 3)):
        evaluate(bench, model, torch.rand(batch, 3, side, side, device=bench.device), setting)
    if bench.allocator == "default" and bench.size != "trial":
        cold_start(bench)


def evaluate(bench: Bench, model: SpikeDrivenTransformer, images: Tensor, setting: str) -> None:
    timed: dict[str, Callable[[], object]] = {
        FLOOR: ConvolutionFloor(model, images),
        "floor in bf16": ConvolutionFloor(model, images, torch.bfloat16),
    }
    parity: dict[str, Callable[[], str]] = {}
    for name, build in builds(bench).items():
        timed[name] = partial(build(model), images)
        parity[name] = partial(agreement, build, bench.device)
    for name, call in peers(bench).items():
        timed[name] = partial(call, images)
    figure = f"evaluation, batch {len(images)}"
    samples = bench.race(figure, setting, timed, baseline=FLOOR, parity=parity, rounds=15, warmup=1)
    if bench.device.type == "cuda" or bench.size == "trial":
        for title, sample in samples.items():
            bench.record(f"{figure}, images a second", setting, title, len(images) / sample.median, unit="images/s")


def builds(bench: Bench) -> dict[str, Build]:
    """Ways to evaluate one of our models."""
    found: dict[str, Build] = {
        "sdt_blocks, the model as trained": lambda model: model,
        "sdt_blocks, optimized, not compiled": lambda model: optimize_for_inference(model, compile=False),
        "sdt_blocks, optimized": optimize_for_inference,
        "sdt_blocks, optimized, bf16": lambda model: optimize_for_inference(model, torch.bfloat16),
        **(WHOLE_NUMBERS if bench.device.type == "cpu" else GRAPHS),
    }
    if spikingjelly_installed():
        found["authors' arrangement"] = lambda model: AuthorsArrangement(model).eval()
    return found


def peers(bench: Bench) -> dict[str, Callable[[Tensor], Tensor]]:
    """Models of other libraries: their own weights and settings, so no parity."""
    if not spikingjelly_installed():
        return {}
    call = spikingjelly_model(device=bench.device, compiled=False)
    found = {"SpikingJelly sdt_8_384, eager": call}
    if "spikingjelly-compiled" in bench.options:
        found["SpikingJelly sdt_8_384, compiled"] = spikingjelly_model(device=bench.device, compiled=True)
    return found


def spikingjelly_installed() -> bool:
    try:
        import spikingjelly  # noqa: F401
    except ImportError:
        print('  spikingjelly is not installed: pip install -e ".[bench]"')
        return False
    return True


def agreement(
    build: Build,
    device: torch.device,
    images: int = 200,
    small: Callable[[Tensor], SpikeDrivenTransformer | MetaSpikeFormer] | None = None,
) -> str:
    """Parity on a small model, image by image; with fewer bits as close to float32 as `torch.autocast` is.

    A membrane within rounding of its threshold fires with one library's sums and not with another's, and its spike
    travels on: so a few images may differ, even in float32. In a model with millions of neurons every image has such a
    membrane.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        x = torch.rand(images, 3, 64, 64, device=device)
        model = small(x[:64]) if small else firing_model("sdt_8_384", x[:64], depth=2, dim=64, num_classes=10)
    built = build(model)
    expected, found = model(x), built(x)
    classes = (found.argmax(1) == expected.argmax(1)).float().mean().item()
    if getattr(built, "dtype", torch.float32) == torch.float32:
        same = ((found - expected).abs().amax(1) < 1e-3).float().mean().item()
        text = f"{same:.1%} of a small model's images within 1e-3, {classes:.1%} of the same class"
        good = same > 0.95 and classes > 0.99
    else:
        with torch.autocast(device.type, torch.bfloat16):
            allowed = 1.25 * (model(x).float() - expected).abs().mean().item()
        error = (found - expected).abs().mean().item()
        text = f"{classes:.1%} of a small model's images of the same class, logits off by {error:.2g}"
        good = error <= allowed
    if not good:
        raise ParityError(text)
    return text


COLD_START = """
import sys, time, torch
sys.path.insert(0, sys.argv[1])
from sdt_blocks import create_model, optimize_for_inference
model, images = create_model("sdt_8_384").eval(), torch.rand(1, 3, 224, 224)
start = time.perf_counter()
optimize_for_inference(model, getattr(torch, sys.argv[2]))(images)
print(time.perf_counter() - start)
"""


def cold_start(bench: Bench) -> None:
    """Seconds from the model to its first answer in a fresh process, with empty caches and with filled ones."""
    if bench.device.type != "cpu":
        return
    for dtype in ("float32", "bfloat16"):
        with tempfile.TemporaryDirectory() as cache:
            environment = {**os.environ, "SDT_BLOCKS_CACHE": cache, "TORCHINDUCTOR_CACHE_DIR": cache}
            for start in ("first", "next"):
                command = [sys.executable, "-c", COLD_START, os.path.dirname(__file__), dtype]
                result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
                seconds = float(result.stdout.split()[-1])
                bench.record(f"{start} start of a process", f"sdt_8_384, {dtype}", "sdt_blocks, optimized", seconds)
