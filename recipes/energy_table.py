"""The energy column of the Spike-Driven Transformer's ImageNet table, computed again: one table and what disagrees.

    python recipes/energy_table.py
    accelerate launch recipes/energy_table.py data.root=DIR 8_384.pth.tar 8_512.pth.tar

Without weights: for each row of the paper, the one firing rate that gives its Power column, and the formula with the
rates that have been published layer by layer. With weights (released files, saved models or runs) and a data set, each
gets a row of its own: its accuracy, and the energy at the rates measured on that data.
It prints the table and writes it as energy_table.md, .csv and .tex. The keys are at the end of --help.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from common.command_line import command
from common.config import ConfigError, load_config
from common.cpu_processes import join_processes
from common.options import split_options
from common.results import write_results
from common.schema import option
from common.trained import class_names, load, match_classes, with_run_config

from sdt_blocks.analysis.energy import CONVENTION
from sdt_blocks.analysis.energy_models import STEP
from sdt_blocks.analysis.tables import Column, as_files, markdown

RATES = Path(__file__).parent / "data" / "published_rates.csv"
"""Firing rates of layers' inputs that were published, or measured on published weights: one number, or one per step."""

IMAGE = (3, 224, 224)


class Published(NamedTuple):
    """A row of table 1 of the paper (Yao et al., 2023, https://arxiv.org/abs/2307.01694), all at T = 4."""

    energy_mj: float
    top1: float


PAPER = {
    "sdt_8_384": Published(3.90, 72.28),
    "sdt_6_512": Published(3.56, 74.11),
    "sdt_8_512": Published(4.50, 74.57),
    "sdt_10_512": Published(5.53, 74.66),
    "sdt_8_768": Published(6.09, 76.32),
}

COLUMNS = (
    Column("network", "network"),
    Column("rates", "rates"),
    Column("parameters", "parameters", ","),
    Column("top1", "top-1 (%)", ".2f"),
    Column("rate", "mean rate by operations (%)", ".1f"),
    Column("once_rate", "rate if first layer once (%)", ".1f"),
    Column("energy_mj", "formula (mJ)", ".2f"),
    Column("once_mj", "first layer once (mJ)", ".2f"),
    Column("published_mj", "paper (mJ)", ".2f"),
    Column("difference", "difference (%)", "+.0f"),
    Column("memory_mj", "with memory (mJ)", ".1f"),
    Column("ann_memory_mj", "as an ANN, with memory (mJ)", ".1f"),
)

FITTED = "one for all layers, fitted to the paper"
RELATED = "a Spikingformer's of the same shapes: after pooling, 50,000 images, mean of the steps"
STEM = "stem alone, all else silent: before pooling, one image, each step"


def published_rates(path: Path = RATES) -> dict[str, dict[str, list[float]]]:
    """The rates of each network by layer."""
    found: dict[str, dict[str, list[float]]] = {}
    with path.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["network"], {})[row["layer"]] = [float(rate) for rate in row["rates"].split()]
    return found


def report_of(model: Any, rates: Any) -> Any:
    """The formula's report of a model on the meta device at given rates."""
    from sdt_blocks.analysis import energy_from_rates

    if isinstance(rates, Mapping):
        # If only a mean over the steps is known, each step gets it: the sum is the same.
        steps = model.time_steps
        rates = {layer: one * steps if len(one) == 1 else one for layer, one in rates.items()} | {"*": 0.0}
    return energy_from_rates(model, rates, IMAGE)


def fitted_rate(all_fire: Any, published_mj: float, *, once: bool) -> float:
    """The rate that gives the published total if all layers fed by spikes have it."""
    total = all_fire.total_once_mj if once else all_fire.total_mj
    spikes = sum(layer.energy_mj for layer in all_fire.layers if layer.kind == "AC")
    return (published_mj - (total - spikes)) / spikes  # type: ignore[no-any-return]


def row_of(network: str, rates: str, model: Any, report: Any, paper: Published | None) -> dict[str, Any]:
    """A row of the table: the values of a report next to the published ones."""
    fed = [layer for layer in report.layers if layer.kind == "AC" and layer.type != "attention"]
    work = sum(layer.macs for layer in fed)
    mean = sum(layer.macs * sum(layer.rate) / len(layer.rate) for layer in fed) / work if work else None
    with_memory = report.estimates[STEP.name]
    return {
        "network": network,
        "rates": rates,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "rate": None if mean is None else 100 * mean,
        "energy_mj": report.total_mj,
        "once_mj": report.total_once_mj,
        "published_mj": None if paper is None else paper.energy_mj,
        "difference": None if paper is None else round(100 * (report.total_mj / paper.energy_mj - 1), 6) + 0.0,
        "memory_mj": with_memory.cost.total_mj,
        "ann_memory_mj": with_memory.ann.total_mj,
    }


def paper_rows() -> tuple[list[dict[str, Any]], list[str]]:
    """The rows that need no weights, and sentences on where paper and formula disagree."""
    import torch

    from sdt_blocks import create_model

    known, rows = published_rates(), []
    fitted, once, left = {}, {}, 0.0
    for name, paper in PAPER.items():
        with torch.device("meta"):
            model = create_model(name)
        all_fire = report_of(model, 1.0)
        fitted[name], once[name] = (fitted_rate(all_fire, paper.energy_mj, once=only) for only in (False, True))
        row = row_of(name, FITTED, model, report_of(model, fitted[name]), paper)
        rows.append(row | {"top1": paper.top1, "once_rate": 100 * once[name]})
        if name == "sdt_8_512":
            related = row_of(name, RELATED, model, report_of(model, known["spikingformer_8_512"]), paper)
            rows.append(related)
        if name == "sdt_8_768":
            stem = row_of(name, STEM, model, report_of(model, known[name]), paper)
            stem |= {"rate": None, "memory_mj": None}
            rows.append(stem)
            others = [one for one in all_fire.layers if one.kind == "AC" and one.name not in known[name]]
            left = (paper.energy_mj - stem["energy_mj"]) / sum(one.energy_mj for one in others)
    low, high = (choice(fitted, key=fitted.__getitem__) for choice in (min, max))
    return rows, [
        f"No one rate explains the paper's column: it would have to be {fitted[low]:.1%} in {low} and "
        f"{fitted[high]:.1%} in {high}, networks of one kind (with the first layer charged once "
        f"{min(once.values()):.1%} to {max(once.values()):.1%}).",
        f"sdt_8_512 at the rates of a Spikingformer of the same shapes: {related['energy_mj']:.2f} mJ, "
        f"{related['difference']:+.0f} % beside the paper's {related['published_mj']:.2f}; its mean rate by operations "
        f"is {related['rate']:.1f} %, and {fitted['sdt_8_512']:.1%} is what the paper's figure asks for.",
        f"sdt_8_768: its stem alone takes {stem['energy_mj']:.2f} of the paper's {stem['published_mj']:.2f} mJ, at "
        f"rates taken before pooling, which are lower than those that the convolutions see; that leaves a rate of "
        f"{left:.1%} for all other layers.",
    ]


def measured_rows(checkpoints: Sequence[Path], arguments: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A row for each trained model: accuracy and energy over the evaluation set. Raises `ConfigError`."""
    from common.evaluation import evaluate
    from common.loading import ReadableBatches, closing, evaluation_loader
    from common.progress import warn
    from common.set_up import at_the_door, build_accelerator, open_data

    from sdt_blocks.analysis import energy

    for checkpoint in checkpoints:
        settings = with_run_config(checkpoint, arguments)
        model, config = load(checkpoint, load_config(settings, default="imagenet_8_384"), settings, averaged=False)
        accelerator, config = build_accelerator(config)
        _, test_set = open_data(config, accelerator, evaluation_only=True)
        matched = match_classes(test_set, class_names(checkpoint, model), model, checkpoint=checkpoint, by="name")
        if "does not name" in matched:
            warn(matched)
        loader = evaluation_loader(test_set, config, accelerator)
        model.to(accelerator.device)
        with closing(loader):
            result = at_the_door(evaluate, model, loader, accelerator)
            report = energy(model, ReadableBatches(loader))
        name = variant_of(model)
        rates = f"measured: {report.samples} {test_set.kind} of {config.data.name}"
        row = row_of(f"{name or type(model).__name__} ({checkpoint.name})", rates, model, report, PAPER.get(name or ""))
        yield row | {"top1": None if result is None else result.accuracies["top1"]}


def variant_of(model: Any) -> str | None:
    """The name under which `create_model` makes such a model, if the paper's table has one."""
    import torch

    from sdt_blocks import create_model

    shapes = [tuple(parameter.shape) for parameter in model.parameters()]
    for name in PAPER:
        with torch.device("meta"):
            known = create_model(name)
        if isinstance(model, type(known)) and shapes == [tuple(parameter.shape) for parameter in known.parameters()]:
            return name
    return None


@dataclass
class Options:
    """The keys of this recipe."""

    output_dir: str = option("energy_table", "the folder to write", path=True)
    samples: int | None = option(None, "the first N samples of the data set; null: all", least=1)


def read_arguments(arguments: Sequence[str]) -> tuple[Options, list[Path], list[str]]:
    """This recipe's options, the trained models, and the arguments for `load_config`. Raises `ConfigError`."""
    options, others = split_options(Options, arguments)
    checkpoints = [Path(argument) for argument in others if "=" not in argument]
    rest = [argument for argument in others if "=" in argument]
    if options.samples is not None:
        rest.append(f"data.test_samples={options.samples}")
    missing = [str(checkpoint) for checkpoint in checkpoints if not checkpoint.exists()]
    if missing:
        raise ConfigError(f"{', '.join(missing)}: no such file or folder")
    if rest and not checkpoints:
        raise ConfigError(f"{' '.join(rest)}: name the weights to measure, such as 8_512.pth.tar")
    return options, checkpoints, rest


def main(arguments: Sequence[str]) -> None:
    options, checkpoints, rest = read_arguments(arguments)
    join_processes()
    from sdt_blocks.analysis.probe import is_first_process

    rows, findings = paper_rows()
    rows += list(measured_rows(checkpoints, rest))
    if not is_first_process():
        return
    note = "\n".join([f"{CONVENTION} Rows that differ say so.", f"With memory: {STEP.source}.", *findings])
    listed = "\n".join(f"- {line}" for line in note.splitlines())
    texts = as_files(rows, COLUMNS, note) | {"md": markdown(rows, COLUMNS, listed)}
    write_results(texts, Path(options.output_dir) / "energy_table")


if __name__ == "__main__":
    command(main, options=Options)
