"""Trains a small model of each family in the same way and compares them.

    python recipes/compare_families.py
    python recipes/compare_families.py families=V1,V2 rates=1e-3,3e-3 seeds=1,2 train.epochs=10

All use the data, the schedule and the epochs of config=digits_families, and the same search: each learning rate of
`rates` trains once on the training images without `validation_samples` of them and is judged on those. The best one
trains with each of `seeds` on all training images, and those runs are judged on the test images.

It prints the table of `compare_models.py`, which explains the figures, and writes it as families.md, .csv and .tex, and
as bars in families.png. Finished runs are not trained again, and the same command continues after a stop. Keys of the
runs (train.epochs=..., data.name=...) and config=... are those of the other recipes; the keys of this one are at the
end of --help.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from common.command_line import command
from common.config import Config, ConfigError, changed, flatten, load_config, trajectory
from common.cpu_processes import join_processes
from common.options import read_options
from common.schema import option
from common.side_by_side import COLUMNS, Found, Options, compare, notes, read_model, summary_of, write_tables
from common.trained import RUN_CONFIG, same_place

from sdt_blocks.analysis.tables import Column, counted

DEFAULT = "digits_families"

_SPIKES = ("model.time_steps=2", "neuron.threshold=0.5")
SMALL: dict[str, tuple[str, ...]] = {
    "V1": ("model.name=sdt_8_384", "model.depth=2", "model.dim=64", *_SPIKES),
    "V2": ("model.name=sdt_v2_15m", "model.dims=[8,16,32,64]", "model.depths=[1,1,1,1,1]", *_SPIKES),
    "V3": ("model.name=sdt_v3_19m", "model.dims=[8,16,40,48]", "model.depths=[1,1,1,1,1]"),
    "Spikformer": ("model.name=spikformer_8_384", "model.depth=2", "model.dim=64", *_SPIKES),
    "QKFormer": ("model.name=qkformer_10_384", "model.depths=[1,1,1]", "model.dim=64", *_SPIKES),
}
"""The families' models with a similar number of parameters, small enough to train dozens of them on a CPU. With 2 x 2
tokens and few branches that add up, V2's attention with eight heads or a threshold of 1 does not fire, and the three
norms in a row behind it, which then see only zeros, amplify the gradient of all earlier layers up to ten million times.
"""

SEARCHED = (Column("lr", "learning rate", "g"), Column("validation_top1", "validation (%)", ".2f"))


@dataclass
class Search(Options):
    """The keys of this recipe."""

    output_dir: str = option("runs/families", "the folder to write, with a folder for each family", path=True)
    families: str = option(",".join(SMALL), "families to compare, separated by commas")
    rates: str = option("2e-3,5e-3,1.25e-2,3e-2", "learning rates to try for each family")
    seeds: str = option("1,2,3", "seeds for training with the best learning rate")
    search_seed: int = option(0, "seed of the search", least=0)
    validation_samples: int = option(287, "training images on which learning rates are judged", least=1)
    samples: int = option(32, "test images on which rates and energy are measured", least=2)


def listed(text: str, kind: type, name: str) -> list[Any]:
    """The values of a comma-separated list. Raises `ConfigError`."""
    try:
        values = [kind(part.strip()) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or len(set(values)) < len(values):
        raise ConfigError(f"{name}={text}: expected different values separated by commas")
    return values


JUDGED = (
    "train.batch_size", "train.accumulate", "train.max_steps", "train.init_checkpoint", "data.test_samples",
    "data.crop_pct",
)  # fmt: skip
"""Keys that may change when a run is resumed, although its figures depend on them."""


def ready(folder: Path, config: Config) -> bool:
    """Whether the folder has the finished run of this configuration. Raises `ConfigError` if the run had another."""
    if not (folder / "summary.json").is_file():
        return False
    done = load_config([f"config={folder / RUN_CONFIG}"], default="")
    asked, before = flatten(config), flatten(done)
    # Values that the data determines, such as the number of classes, are not compared.
    if any(value not in (None, before[key]) for key, value in asked.items() if key in trajectory(config)):
        return False
    different = [key for key in JUDGED if asked[key] != before[key]] + ["data.root"] * (not same_place(config, done))
    if other := [f"{key} is {asked[key]} and was {before[key]}" for key in different]:
        raise ConfigError(
            f"{folder} holds a finished run with other settings: {'; '.join(other)}. Use the same settings, or take "
            f"another output_dir"
        )
    return True


def train_once(config: Config) -> dict[str, Any]:
    """What is known of the run of a configuration, which is trained if it has not been."""
    folder = Path(config.output_dir)
    if not ready(folder, config):
        from common.seeds import train_anew

        train_anew(config)
    return summary_of(folder)


def train_family(name: str, arguments: Sequence[str], search: Search) -> dict[str, Any]:
    """Search and train one family, in its own folders; returns what was searched and found."""
    rates, seeds = listed(search.rates, float, "rates"), listed(search.seeds, int, "seeds")

    def run(rate: float, seed: int, where: str, *extra: str) -> dict[str, Any]:
        folder = Path(search.output_dir) / name / where
        asked = [*SMALL[name], *arguments, f"optim.lr={rate}", f"seed={seed}", f"output_dir={folder}", *extra]
        config = load_config(asked, default=DEFAULT)
        # Evaluated once, at the end: the best of several evaluations would be a choice by them.
        config = changed(config, {"train.eval_every": config.train.epochs + config.train.cooldown_epochs})
        print(f"{name}: learning rate {rate:g}, seed {seed}, in {folder}", flush=True)
        return train_once(config)

    held = f"data.validation_samples={search.validation_samples}"
    found = {rate: run(rate, search.search_seed, f"search/{rate:g}", held)["top1"] for rate in rates}
    best = max(rates, key=lambda rate: found[rate])  # the first of equal ones
    for seed in seeds:
        run(best, seed, f"seed_{seed}")
    return {"lr": best, "validation_top1": found[best], "searched": found}


def told(searches: Mapping[str, Mapping[str, Any]], config: Config, search: Search) -> str:
    """The text below the table on how the models were trained."""
    train, optim = config.train, config.optim
    whole = train.max_steps is None
    length = counted(train.epochs, "epoch") if whole else f"at most {counted(train.max_steps, 'update')}"
    lines = [
        f"Each family: {length} of {config.data.name} in batches of {train.batch_size}, {optim.name}, one "
        f"run for each learning rate judged on {search.validation_samples} images taken from the training images, then "
        f"seeds {search.seeds} of the best on all of them; top-1 of the test images, mean ± standard deviation.",
        "",
    ]
    for name, known in searches.items():
        tried = ", ".join(f"{top1:.2f} % at {rate:g}" for rate, top1 in known["searched"].items())
        lines.append(f"- {name}, validation: {tried}.")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    import torch

    own = {item.name for item in fields(Search)} - {"threads"}
    rest = [argument for argument in arguments if argument.partition("=")[0] not in own]
    search = read_options(Search, [argument for argument in arguments if argument not in rest])
    names = listed(search.families, str, "families")
    unknown = [name for name in names if name not in SMALL]
    if unknown:
        raise ConfigError(f"families={search.families}: {unknown[0]} is none of {', '.join(SMALL)}")
    taken = [argument for argument in rest if argument.partition("=")[0] in ("optim.lr", "seed", "model.name")]
    if taken:
        raise ConfigError(f"{taken[0]} is this recipe's own; set rates, seeds or families")
    join_processes()
    common = ["tracker=none", *rest]
    config = load_config(common, default=DEFAULT)
    found = {name: train_family(name, common, search) for name in names}
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    from sdt_blocks.analysis.measured import machine

    def read(name: str) -> Found:
        folders = [Path(search.output_dir) / name / f"seed_{seed}" for seed in listed(search.seeds, int, "seeds")]
        return [model for folder in folders for model in read_model(str(folder), samples=search.samples)]

    rows = [{**row, **found[row["name"]]} for row in compare(names, search, read)]
    note = f"{told(found, config, search)}\n\n{notes(rows, search, machine(torch.device('cpu')))}"
    columns = [*COLUMNS[:2], *SEARCHED, *COLUMNS[2:]]
    write_tables(rows, note, Path(search.output_dir) / "families", columns)


if __name__ == "__main__":
    command(main, options=Search)
