"""Event-driven inference at the firing rates of published networks: which form is faster for which of them.

Profiles on an sdt_8_384 with random weights: the rates that the authors of a Spikingformer 8-512 measured layer by
layer on ImageNet (recipes/data/published_rates.csv), and for two variants of the Spike-Driven Transformer the one rate
of all layers that gives their published energy (see recipes/energy_table.py).
"""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from harness import Bench
from peers import firing_model
from rates import seats, set_rates
from sparse import race_models

PUBLISHED = Path(__file__).parents[1] / "recipes" / "data" / "published_rates.csv"
MEASURED, OPEN = "spikingformer_8_512", 0.7
ENERGIES = {"sdt_8_384": 0.163, "sdt_8_512": 0.099}
"""The uniform rates that give the Power column of the paper, as printed by `python recipes/energy_table.py`."""
DEVICES = ["cpu"]


@torch.no_grad()
def run(bench: Bench) -> None:
    images = torch.rand(8, 3, 224, 224)
    model = firing_model("sdt_8_384", images[:1])
    names = [seat.name for seat in seats(model)]
    profiles = {"the rates of a Spikingformer 8-512, layer by layer": published_profile()}
    for name, rate in ENERGIES.items():
        profiles[f"every layer at {rate:.1%}, the published energy of {name}"] = dict.fromkeys(names, rate)
    for ending, rates in profiles.items():
        set_rates(model, images[:1], rates)
        race_models(bench, model, images, f"sdt_8_384, 224 x 224, T=4, {ending}")


def published_profile(path: Path = PUBLISHED, network: str = MEASURED) -> dict[str, float]:
    """The rate of every seat of a network of 8 blocks, from published rates of the layers that it feeds.

    q fires as often as the output projection's input, k and v so often that the mask passes nearly all of q.
    """
    with open(path, newline="", encoding="utf-8") as file:
        of = {row["layer"]: float(row["rates"]) for row in csv.DictReader(file) if row["network"] == network}
    rates = {f"patch.{i}": of[f"patch.stages.{i + 1}.conv"] for i in range(3)}
    rates["patch.3"] = of["patch.position.conv"]
    for block in range(8):
        layer = f"blocks.{block}"
        rates[f"{block}.membrane"] = of[f"{layer}.attention.branch.q.conv"]
        rates |= {f"{block}.q": of[f"{layer}.attention.branch.proj.conv"]}
        rates |= {f"{block}.{name}": OPEN for name in "kv"}
        rates[f"{block}.mlp"] = of[f"{layer}.mlp.branch.fc1.conv"]
        rates[f"{block}.hidden"] = of[f"{layer}.mlp.branch.fc2.conv"]
    return rates
