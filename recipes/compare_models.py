"""Compares models of any family: size, operations, energy, firing rate, spike-driven or not and why, latency.

    python recipes/compare_models.py
    python recipes/compare_models.py sdt_8_512 spikformer_8_512 qkformer_10_512 img_size=224
    python recipes/compare_models.py runs/digits_sdt runs/digits_spikformer runs/saved_model 8_512.pth.tar

A model is a published variant by its name, a run folder, a folder of runs with several seeds, a saved model, or a
released checkpoint; by default one of each family. A variant has random weights and norms calibrated on images, so that
it fires: its rate says nothing about a trained one. A run is judged by its last model, on images of its own data, next
to its accuracy, and several seeds by mean and standard deviation.

It prints the table in Markdown and writes it as models.md, .csv and .tex, and as bars in models.png. Energy is by the
papers' formula: 4.6 pJ where real values are multiplied, 0.9 pJ per addition; a level or a count of spikes is as many
additions. Latency is that of one image, dense and event-driven, measured in alternation, a median. The keys are at the
end of --help.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common.command_line import command
from common.cpu_processes import join_processes
from common.options import split_options
from common.schema import option
from common.side_by_side import Options, compare, notes, read_model, write_tables


@dataclass
class Models(Options):
    """The keys of this recipe."""

    img_size: int = option(224, "side of the images of variants, in pixels", least=16)
    seed: int = option(0, "seed of the random weights of variants", least=0)


ONE_OF_EACH = ("sdt_8_384", "sdt_v2_15m", "spikformer_8_384", "qkformer_10_384", "sdt_v3_19m")
"""Variants of similar size, one of each family."""


def main(arguments: Sequence[str]) -> None:
    import torch

    options, names = split_options(Models, arguments)
    join_processes()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    from sdt_blocks.analysis.measured import machine

    read = partial(read_model, samples=options.samples, img_size=options.img_size, seed=options.seed)
    rows = compare(list(dict.fromkeys(names)) or list(ONE_OF_EACH), options, read)
    note = notes(rows, options, machine(torch.device("cpu")))
    write_tables(rows, note, Path(options.output_dir) / "models")


if __name__ == "__main__":
    command(main, options=Models)
