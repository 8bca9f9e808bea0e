"""Analyzes a model: firing rates, energy in millijoules, which operations multiply or only add, attention maps.

    accelerate launch recipes/analyze.py checkpoint=runs/digits
    accelerate launch recipes/analyze.py checkpoint=8_512.pth.tar data.root=DIR samples=1024

It writes a folder (output_dir=, by default `analysis` in the run's): rates.csv, energy.json, layers and time_steps as
.csv, .md and .tex, measured.json, audit.txt, plots as PNG, and index.html, one page with all of it. For a run folder
the data is the run's own unless set otherwise, else that of config=imagenet_8_384. This recipe's own keys: samples,
batch_size, images, layer, output_dir, as_trained, measure, seconds, energy_models, confidence, neurobench (see the
end).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.command_line import command
from common.config import ConfigError, RunError, check_meant, load_config, make_folder
from common.cpu_processes import join_processes
from common.options import changed_options
from common.schema import option
from common.trained import class_names, default_folder, load, match_classes, other_settings, read_trained
from torch import nn

from sdt_blocks.analysis import EnergyModel, analyze_model, read_energy_models
from sdt_blocks.analysis.report import ReportOptions
from sdt_blocks.models.card import words_of
from sdt_blocks.models.saved import WEIGHTS, find_saved
from sdt_blocks.neuron import find_neurons


@dataclass
class Options:
    """The keys of this recipe, in addition to those of a training run."""

    checkpoint: str | None = option(None, "a run folder, a saved model, or a released .pth.tar", path=True)
    samples: int = option(256, "largest number of samples of the evaluation set", least=1)
    batch_size: int = option(32, "samples per process in one forward pass", least=1)
    images: int = option(4, "number of images with attention overlays", least=0)
    layer: str | None = option(None, "the neuron layer whose membranes are drawn; null: the last")
    output_dir: str | None = option(None, "the folder to write; null: `analysis` next to the checkpoint", path=True)
    as_trained: bool = option(False, "judge the network as it is trained, not as it is deployed: norms unfolded")
    measure: bool = option(False, "measure joules per inference by the machine's energy counters, if it has any")
    seconds: float = option(0.5, "duration of each latency and throughput measurement; 0: none", least=0)
    energy_models: str | None = option(None, "a YAML file of energy models of your own: their constants", path=True)
    confidence: float = option(
        0.95, "the level of the confidence intervals of energy, rates and accuracy", above=0, below=1
    )
    neurobench: bool = option(False, "also NeuroBench's metrics, into neurobench.json")


def read_own_models(path: str | None) -> list[EnergyModel]:
    """The energy models of a YAML file. Raises `ConfigError`."""
    try:
        return [] if path is None else list(read_energy_models(path).values())
    except (ValueError, OSError) as error:
        raise ConfigError(f"energy_models={path}: {error}") from error


def run_neurobench(model: nn.Module, batches: Any, folder: Path) -> None:
    """Write NeuroBench's metrics of the same model, on this process's samples, to neurobench.json."""
    from neurobench import metrics
    from neurobench.benchmarks import Benchmark

    from sdt_blocks.analysis.neurobench_adapter import neurobench_model

    static = [metrics.static.Footprint, metrics.static.ConnectionSparsity, metrics.static.ParameterCount]
    workload = [metrics.workload.ActivationSparsity, metrics.workload.SynapticOperations]
    found = Benchmark(neurobench_model(model), batches, [], [], [static, workload]).run(quiet=True)
    text = json.dumps(found, indent=2, default=float) + "\n"
    (folder / "neurobench.json").write_text(text, encoding="utf-8")
    print(text, end="")


def main(arguments: list[str]) -> None:
    options, checkpoint, rest = read_trained(Options, arguments)
    own_models = read_own_models(options.energy_models)
    config = load_config(rest, default="imagenet_8_384")
    check_meant(config, rest)
    settings = other_settings(checkpoint, config, rest) | changed_options(options, "as_trained")
    folder = Path(options.output_dir or default_folder(checkpoint, "analysis", settings))
    join_processes()
    from common.analyzed import note_analyzed
    from common.loading import ReadableBatches, closing, evaluation_loader
    from common.progress import warn
    from common.set_up import build_accelerator, open_data

    model, config = load(checkpoint, config, rest, averaged=False)
    neurons = find_neurons(model)
    if options.layer is not None and options.layer not in neurons:
        raise ConfigError(f"layer={options.layer}: no such neuron layer; the model has {', '.join(neurons)}")
    accelerator, config = build_accelerator(config)
    _, test_set = open_data(config, accelerator, evaluation_only=True)
    test_set.keep_first(options.samples)
    loader = evaluation_loader(test_set, config, accelerator, batch_size=options.batch_size)
    names = class_names(checkpoint, model)
    try:
        matched = match_classes(test_set, names, model, checkpoint=checkpoint, by="name")
        labeled = True
    except ConfigError as error:
        matched, labeled = f"no accuracy is given: {error}", False
    if accelerator.is_main_process and (names is None or not labeled):
        warn(matched)
    batches = ReadableBatches(loader, labeled=labeled)
    model.to(accelerator.device)
    if accelerator.is_main_process:
        make_folder(folder)
    title = f"{checkpoint} on {config.data.name}"
    asked: dict[str, Any] = {"layer": options.layer, "images": options.images, "as_trained": options.as_trained}
    more = ReportOptions(
        class_names=words_of(names or test_set.classes) if labeled else (),
        seconds=1.0 if options.measure and not options.seconds else options.seconds,
        counters=options.measure,
        energy_models=own_models,
        confidence=options.confidence,
    )
    try:
        with closing(loader):
            analyze_model(model, batches, folder, title=title, options=more, **asked)
            if checkpoint.is_dir() and accelerator.is_main_process:
                note_analyzed(folder, find_saved(checkpoint) / WEIGHTS)
            if options.neurobench and accelerator.is_main_process:
                run_neurobench(model, batches, folder)
    except (ValueError, OSError, ImportError) as error:
        raise RunError(f"{folder}: {error}" if isinstance(error, OSError) else str(error)) from error
    accelerator.end_training()


if __name__ == "__main__":
    command(main, default="imagenet_8_384", options=Options)
