"""Comparison of models: each is read by its name, judged, written into tables and plotted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from sdt_blocks import list_models
from sdt_blocks.analysis.tables import Column, as_csv, counted, latex, markdown

from .analyzed import read_mapping
from .config import ConfigError, load_config
from .results import write_results
from .schema import option
from .trained import load, with_run_config

COLUMNS = (
    Column("name", "model"),
    Column("params", "parameters", ",.0f"),
    Column("top1", "top-1 (%)", ".2f"),
    Column("operations", "operations (M)", ".4g"),
    Column("energy_mj", "energy (mJ)", ".3g"),
    Column("memory_mj", "with memory (mJ)", ".3g"),
    Column("ann_mj", "as an ANN (mJ)", ".3g"),
    Column("firing_rate", "firing rate", ".3f"),
    Column("spike_driven", "spike-driven"),
    Column("dense_ms", "dense (ms)", ".3g"),
    Column("event_ms", "event-driven (ms)", ".3g"),
)
"""The columns of all tables."""

ALSO = tuple(Column(key, key) for key in ("family", "data", "multiplications", "why", "missing"))
"""Further columns of the CSV file, apart from the standard deviations."""


@dataclass
class Options:
    """How models are judged."""

    output_dir: str = option("model_comparison", "the folder to write", path=True)
    samples: int = option(8, "largest number of inputs of each model", least=2)
    latency: bool = option(True, "measure the latency of an inference, dense and event-driven")
    rounds: int = option(11, "measurements of each form, in alternation", least=1)
    threads: int | None = option(None, "CPU threads; null: PyTorch's number", least=1)


Found = list[tuple[Any, Any, dict[str, Any]]]
"""Models, one per seed, each with inputs and what is known of its run."""
Reader = Callable[[str], Found]


def read_model(name: str, *, samples: int, img_size: int = 224, seed: int = 0) -> Found:
    """The models that a name on the command line refers to, with at most `samples` inputs.

    A variant is judged at `img_size`, with random weights by `seed`. Raises `ConfigError`.
    """
    from .judging import sample_inputs, untrained

    path = Path(name)
    if not path.exists():
        if name in list_models():
            model, inputs = untrained(name, seed=seed, img_size=img_size, count=samples)
            return [(model, inputs, {})]
        raise ConfigError(
            f"{name} is neither a folder or file nor a variant; the variants are {', '.join(list_models())}"
        )
    seeds = sorted(path.glob("seed_*"), key=lambda folder: (len(folder.name), folder.name)) if path.is_dir() else []
    found = []
    for folder in seeds or [path]:
        arguments = with_run_config(folder, [])
        config = load_config(arguments, default="imagenet_8_384")
        # A run's accuracy is that of its last model, which was not chosen by test images.
        last = folder / "last"
        model, config = load(last if last.is_dir() else folder, config, arguments, averaged=False)
        of_a_run = arguments[0].startswith("config=")
        size = model.card.input_size[0] if model.card is not None and model.card.input_size else img_size
        inputs = data_of(config, samples) if of_a_run else sample_inputs(model, samples, size)
        found.append((model, inputs, summary_of(folder)))
    return found


def data_of(config: Any, samples: int) -> Any:
    """The first inputs of a run's evaluation set, at most `samples`, as one tensor. Raises `ConfigError`."""
    import torch

    from .loading import build_datasets
    from .set_up import at_the_door

    def read() -> Any:
        _, test = build_datasets(config, evaluation_only=True)
        test.keep_first(samples)
        readable = [inputs for inputs, target in map(test.__getitem__, range(len(test))) if target >= 0]
        if not readable:
            raise ConfigError(f"not one of the {len(test)} samples that the model is judged on could be read")
        return torch.stack(readable)

    return at_the_door(read)


def summary_of(folder: Path) -> dict[str, Any]:
    """The accuracy and the data of a finished run. Raises `ConfigError`."""
    path = folder / "summary.json"
    try:
        summary = read_mapping(path)
        top1 = summary.get("test_top1")
        return {"data": summary.get("data"), "top1": top1 if top1 is None else float(top1)} if summary else {}
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: not the summary of a run ({error})") from error


def compare(names: Sequence[str], options: Options, read: Reader) -> list[dict[str, Any]]:
    """A row for each model; `read` gets the model of a name. Raises `ConfigError`."""
    from sdt_blocks.analysis.measured import latencies

    from .judging import judge, latency_row, mean_row

    rows, models, inputs = [], {}, {}
    columns = TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None)

        def tick(text: str) -> None:
            progress.update(task, description=text)

        for name in names:
            tick(f"{name}: reading")
            found = read(name)
            judged = []
            for number, (model, batch, known) in enumerate(found):
                tick(f"{name}: rates, energy and audit" + f" ({number + 1} of {len(found)})" * (len(found) > 1))
                judged.append(judge(model, batch) | known)
            rows.append({"name": name, **mean_row(judged)})
            models[name], inputs[name] = found[0][0], found[0][1][:1]
        if options.latency:
            times = latencies(models, inputs, rounds=options.rounds, tick=tick)
            rows = [row | latency_row(times[row["name"]]) for row in rows]
    return rows


def notes(rows: Sequence[Mapping[str, Any]], options: Options, machine: str) -> str:
    """The text below the table: reasons, and how it was measured."""
    lines = []
    for row in rows:
        verdict = {"yes": "spike-driven", "no": "not spike-driven", "silent": "no neuron fired"}[row["spike_driven"]]
        reasons = [*row["why"], *([row["missing"]] if row.get("missing") else [])]
        lines.append(f"- {row['name']} ({row['family']}), {verdict}" + (f": {'; '.join(reasons)}." if reasons else "."))
    measured = f"one image, the median of {counted(options.rounds, 'call')} in alternation, on {machine}"
    lines += [f"\nLatency: {measured}."] if options.latency else []
    return "\n".join(lines)


def write_tables(rows: Sequence[Mapping[str, Any]], note: str, stem: Path, first: Sequence[Column] = COLUMNS) -> None:
    """Print the rows and write them as `stem` with .md, .csv, .tex and .png. Raises `RunError`."""
    from .pictures import draw_models

    written = [row | {"why": "; ".join(row["why"])} for row in rows]
    columns = [column for column in first if any(row.get(column.key) is not None for row in rows)]
    spread = [Column(f"{column.key}_std", "") for column in columns if any(f"{column.key}_std" in row for row in rows)]
    csv = as_csv(written, [*columns, *spread, *ALSO])
    texts = {"md": markdown(written, columns, note), "csv": csv, "tex": latex(written, columns)}
    write_results(texts, stem, partial(draw_models, rows))
