"""One training step of sdt_v3_5m (E-SpikeFormer) at 224 x 224: integer neurons as one op and as separate operations.

The second is `SDT_BLOCKS_BACKEND=reference`: PyTorch's norm, then each of the neuron's equations separately.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from harness import Bench, ParityError, measure_memory
from torch import Tensor
from training import Step, same_gradients, training_step

from sdt_blocks import calibrate_norms, create_model
from sdt_blocks.neuron import IntegerNeuron
from sdt_blocks.ops.dispatch import forced

ALLOCATORS = ["default"]
OURS, SEPARATE = "sdt_blocks", "separate operations"
SMALL = {"dims": (8, 16, 32, 48), "depths": (1, 1, 1, 1, 1), "num_classes": 10, "num_heads": 4}


def run(bench: Bench) -> None:
    batch, side, size = bench.pick(cpu=(4, 224, 802816), cuda=(64, 224, 1 << 26), trial=(2, 32, 1000))
    images = torch.rand(batch, 3, side, side, device=bench.device)
    labels = torch.arange(batch, device=bench.device) % 10
    setting, figure = f"sdt_v3_5m, {side} x {side}, batch {batch}", "training step, peak memory"
    steps, peaks = {}, {}
    for title, wrap in ((OURS, lambda step: step), (SEPARATE, by_equations)):
        with bench.spared(figure, setting, title):
            model = create_model("sdt_v3_5m").to(bench.device)
            step = wrap(training_step(model, model, images, labels, False))
            # A first step keeps the optimizer's state out of the peak.
            step()
            peaks[title], steps[title] = measure_memory(bench.device, step)[0] / 1e9, step
    for title, peak in peaks.items():
        bench.record(figure, setting, title, peak, unit="GB", baseline=SEPARATE, ratio=peak / peaks[SEPARATE])
    parity = {OURS: partial(same_gradients, "sdt_v3_5m", images, labels, lambda: small_model(images[..., :64, :64]))}
    bench.race("training step", setting, steps, baseline=SEPARATE, parity=parity, rounds=7, warmup=1)
    neurons(bench, torch.randn(size, device=bench.device).mul_(2).requires_grad_())


def neurons(bench: Bench, x: Tensor) -> None:
    """A layer of neurons alone."""
    neuron = IntegerNeuron()
    grad = torch.randn_like(x)

    def step() -> Tensor:
        return torch.autograd.grad(neuron(x), x, grad)[0]

    def same() -> str:
        if not torch.equal(step(), by_equations(step)()):
            raise ParityError("the gradients differ")
        return "equal"

    contestants = {OURS: step, SEPARATE: by_equations(step)}
    setting = f"{x.numel() / 1e6:.1f} M neurons, float32"
    bench.race("integer neurons, forward + backward", setting, contestants, baseline=SEPARATE, parity={OURS: same})


def by_equations(step: Callable[[], object]) -> Step:
    def call() -> object:
        with forced("reference"):
            return step()

    return call


def small_model(images: Tensor) -> torch.nn.Module:
    """A small network in which the neurons fire."""
    model = create_model("sdt_v3_5m", **SMALL).to(images.device)
    calibrate_norms(model, images)
    return model
