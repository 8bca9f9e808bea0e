"""Evaluation of every family in every form: which form is the fastest for which network.

Weights are random, with norms fitted to the images by `calibrate_norms`, so that all neurons fire; the mean rate of
each network is printed.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from harness import Bench, ParityError, same_bits
from peers import calibrated_model

from sdt_blocks import optimize_for_inference
from sdt_blocks.analysis import firing_rates

ALLOCATORS = ["reused"]
DEVICES = ["cpu"]
NAMES = ("sdt_8_384", "sdt_v2_15m", "sdt_v3_19m", "spikformer_8_384", "qkformer_10_384")
SMALL = ("sdt_2_256", "spikformer_2_384")
TRAINED = "the model as trained"
FORMS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "exact": {"exact": True},
    "8 bits": {"dtype": torch.int8},
    "by events, float32": {"sparse": True},
    "by events, exact": {"sparse": True, "exact": True},
    "by events, 8 bits": {"sparse": True, "dtype": torch.int8},
}
SAME_BITS = {"by events, exact": "exact", "by events, 8 bits": "8 bits"}


@torch.no_grad()
def run(bench: Bench) -> None:
    side, batch = bench.pick(cpu=(224, 8), cuda=(224, 8), trial=(32, 2))
    for name in bench.pick(cpu=NAMES, cuda=NAMES, trial=SMALL):
        torch.manual_seed(0)
        images = torch.rand(batch, 3, side, side)
        model = calibrated_model(name, images[:2], bias=0.1)
        rates = firing_rates(model, images[:2])
        if rates.silence:
            raise ParityError(f"{name}: {rates.silence}")
        setting = f"{name}, {side} x {side}, {batch} images"
        bench.record("firing rate, mean over the neurons", setting, TRAINED, rates.mean, unit="share")
        forms: dict[str, Any] = {form: optimize_for_inference(model, **options) for form, options in FORMS.items()}
        parity = {form: partial(same_bits, forms[form], forms[of], images) for form, of in SAME_BITS.items()}
        contestants = {title: partial(form, images) for title, form in {TRAINED: model, **forms}.items()}
        bench.race("evaluation, every form", setting, contestants, baseline=TRAINED, parity=parity, rounds=7)
