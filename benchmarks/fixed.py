"""The fixed cost of an event-driven evaluation before anything is added: sdt_8_384 silent, and at low published rates.

A silent network's lists are empty, so its time is that of the first layer, of listing, of neurons and of stores.
"""

from __future__ import annotations

from functools import partial

import torch
from harness import Bench
from peers import ConvolutionFloor, firing_model
from rates import seats, set_rates
from sparse import EVENTS, EVENTS_INT8, FLOOR

from sdt_blocks import optimize_for_inference

DEVICES = ["cpu"]
RATES = (0.0, 0.05, 0.1)


@torch.no_grad()
def run(bench: Bench) -> None:
    images = torch.rand(8, 3, 224, 224)
    model = firing_model("sdt_8_384", images[:1])
    names = [seat.name for seat in seats(model)]
    for rate in RATES:
        set_rates(model, images[:1], dict.fromkeys(names, rate))
        fast, fast_int8 = (optimize_for_inference(model, dtype, sparse=True) for dtype in (torch.float32, torch.int8))
        for batch in (1, len(images)):
            some = images[:batch]
            bench.race(
                f"evaluation, batch {batch}",
                f"sdt_8_384, 224 x 224, T=4, every layer at {rate:.0%}",
                {
                    FLOOR: ConvolutionFloor(model, some),
                    EVENTS: partial(fast, some),
                    EVENTS_INT8: partial(fast_int8, some),
                },
                baseline=FLOOR,
                rounds=20 if batch == 1 else 6,
                warmup=1,
            )
