"""One training step of sdt_v2_15m (Meta-SpikeFormer) at 224 x 224, T = 4: time, and peak memory.

For comparison: the same network with SpikingJelly's neurons, and the V1 network of about its size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from harness import Bench, measure_memory
from inference import spikingjelly_installed
from peers import MetaArrangement
from torch import Tensor
from training import last, same_gradients, training_step
from v2 import PEER, PEER_LAST, small_model

from sdt_blocks import create_model

ALLOCATORS = ["default"]
OURS = "sdt_blocks"


def run(bench: Bench) -> None:
    batch, side = bench.pick(cpu=(2, 224), cuda=(16, 224), trial=(2, 32))
    images = torch.rand(batch, 3, side, side, device=bench.device)
    labels = torch.arange(batch, device=bench.device)
    setting, figure = f"sdt_v2_15m, {side} x {side}, T=4, batch {batch}", "training step, peak memory"
    steps, peaks = {}, {}
    for title, make in variants(bench).items():
        with bench.spared(figure, setting, title):
            step = make(images, labels)
            # A first step keeps compiling and the optimizer's state out of the peak.
            step()
            peaks[title], steps[title] = measure_memory(bench.device, step)[0] / 1e9, step
    baseline = PEER if PEER in steps else OURS
    for title, peak in peaks.items():
        ratio = peak / peaks[baseline]
        bench.record(figure, setting, title, peak, unit="GB", baseline=baseline, ratio=ratio)
    parity = {OURS: partial(same_gradients, "sdt_v2_15m", images, labels, lambda: small_model(images[..., :64, :64]))}
    bench.race("training step", setting, steps, baseline=baseline, parity=parity, rounds=5, warmup=1)


def variants(bench: Bench) -> dict[str, Callable[[Tensor, Tensor], Callable[[], object]]]:
    """Training steps by title."""

    def ours(name: str, reduced: bool = False) -> Callable[[Tensor, Tensor], Callable[[], object]]:
        def make(images: Tensor, labels: Tensor) -> Callable[[], object]:
            model = create_model(name).to(bench.device, memory_format=torch.channels_last)
            return training_step(model, model, last(images), labels, reduced)

        return make

    def peer(images: Tensor, labels: Tensor, channels_last: bool = False) -> Callable[[], object]:
        net = MetaArrangement(create_model("sdt_v2_15m")).to(bench.device)
        if channels_last:
            net.to(memory_format=torch.channels_last)
        return training_step(net, net, last(images) if channels_last else images, labels, False)

    found = {OURS: ours("sdt_v2_15m"), "sdt_blocks, bf16": ours("sdt_v2_15m", True), "V1: sdt_8_384": ours("sdt_8_384")}
    if spikingjelly_installed():
        found |= {PEER: peer, PEER_LAST: partial(peer, channels_last=True)}
    return found
