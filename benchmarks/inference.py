"""Whole-model evaluation of sdt_8_384 at 224 x 224, T = 4, against its bare convolutions and other arrangements."""

from __future__ import annotations

import torch
from harness import Bench, close
from peers import AuthorsArrangement, ConvolutionFloor, firing_model

FLOOR = "floor: bare convolutions, fp32"


@torch.no_grad()
def run(bench: Bench) -> None:
    model = firing_model("sdt_8_384", torch.rand(2, 3, 224, 224, device=bench.device))
    for batch in (1, 8):
        images = torch.rand(batch, 3, 224, 224, device=bench.device)
        expected = model(images)
        authors = AuthorsArrangement(model).eval()
        bench.race(
            f"evaluation, batch {batch}",
            "sdt_8_384, 224 x 224, T=4",
            {
                FLOOR: ConvolutionFloor(model, images),
                "floor in bf16": ConvolutionFloor(model, images, torch.bfloat16),
                "sdt_blocks model, as trained": lambda images=images: model(images),
                "authors' arrangement": lambda authors=authors, images=images: authors(images),
            },
            baseline=FLOOR,
            parity={"authors' arrangement": lambda a=authors, i=images, e=expected: close(a(i), e, 1e-5)},
            rounds=7,
            warmup=1,
        )
