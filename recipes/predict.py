"""Classifies images or event recordings: labels with probabilities.

    python recipes/predict.py checkpoint=runs/digits IMAGE... [FOLDER...] [top=5] [--json]
    python recipes/predict.py checkpoint=8_512.pth.tar photo.jpg
    python recipes/predict.py checkpoint=runs/gesture recording.aedat4

It takes a run folder, a saved model or a released checkpoint, and files as well as folders, which are searched for
images (or for recordings, if the model takes event frames). Each is prepared as in the evaluation of the run. A saved
model knows how its images are prepared, and a released file with 1000 classes uses ImageNet's preparation; for any
other, and for recordings, set config=NAME. With `--json` or `json=true` only JSON is written to standard output;
`data.on_error=skip` leaves out files that cannot be read. This recipe's own keys: see the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.command_line import command
from common.config import Config, ConfigError, RunError, load_config
from common.options import split_options
from common.schema import option
from common.trained import class_names, load, probabilities, with_run_config

if TYPE_CHECKING:
    from torch import Tensor

EVENT_CHANNELS = 2
"""A model with this number of input channels takes event frames."""


@dataclass
class Options:
    """The keys of this recipe, in addition to those of a training run."""

    checkpoint: str | None = option(None, "a run folder, a saved model, or a released .pth.tar", path=True)
    top: int = option(5, "number of classes to show, the most probable first", least=1)
    json: bool = option(False, "print only JSON; the same as --json")
    ema: bool = option(False, "use the averaged weights")


def read_arguments(arguments: Sequence[str]) -> tuple[Options, list[str], list[str]]:
    """This recipe's options, the files and folders, and the arguments for `load_config`. Raises `ConfigError`.

    An argument `key=value` that names no file is a setting, all others are inputs.
    """
    arguments = ["json=true" if argument == "--json" else argument for argument in arguments]
    options, rest = split_options(Options, arguments)
    given = [argument for argument in rest if "=" in argument and not os.path.lexists(argument)]
    inputs = [argument for argument in rest if argument not in given]
    settings = with_run_config(options.checkpoint, given)
    if not inputs:
        raise ConfigError("name the images or recordings to classify, or folders of them")
    return options, inputs, settings


class Listed:
    """Files as a source of `sdt_datasets`, images or event recordings as `data_set` has them, without labels."""

    by_class, holds, classes = False, "events", ("",)

    def __init__(self, files: Sequence[str], sensor_size: Sequence[int] = (0, 0), data_set: str = "") -> None:
        import numpy as np

        from sdt_datasets.columns import Notes

        self.data, self.targets = list(files), np.zeros(len(files), dtype=np.int64)
        self.sensor_size, self.note, self.data_set = (*sensor_size, 2), Notes(), data_set

    def describe(self, index: int) -> str:
        return self.data[index]

    def load(self, index: int) -> Any:
        from sdt_datasets.files import check_regular
        from sdt_datasets.image_transforms import open_image

        check_regular(self.data[index])
        return open_image(self.data[index])

    def __getitem__(self, index: int) -> Any:
        from sdt_datasets.event_sources import read_recording_of

        return read_recording_of(self.data_set, self.data[index], self.note), 0


def find_files(inputs: Sequence[str], *, events: bool) -> list[str]:
    """The named files, and those in the named folders, in order. Raises `ConfigError` if a folder has none."""
    from common.progress import warn
    from torchvision.datasets.folder import IMG_EXTENSIONS

    from sdt_datasets.files import describe_files, walk_files
    from sdt_datasets.recordings import READERS

    endings = tuple(READERS) if events else IMG_EXTENSIONS
    files: list[str] = []
    for name in inputs:
        if not os.path.isdir(name):
            if not os.path.exists(name):
                raise ConfigError(f"{name}: no such file or folder")
            files.append(name)
            continue
        walked = sorted((os.path.join(name, file), trouble) for file, trouble in walk_files(Path(name)))
        taken = [file for file, trouble in walked if not trouble and file.lower().endswith(endings)]
        if not taken:
            raise ConfigError(f"{name} holds no file that ends in {', '.join(endings)}")
        if passed := [entry for entry in walked if entry[0] not in set(taken)]:
            warn(f"{name}: passed over {describe_files(passed)}")
        files += taken
    return files


def build_dataset(files: Sequence[str], model: Any, config: Config) -> Any:
    """The files, prepared as in the evaluation of the configuration. Raises `ValueError`."""
    data, events = config.data, config.events
    if model.in_channels != EVENT_CHANNELS:
        from sdt_datasets.image_transforms import build_evaluation
        from sdt_datasets.images import ImageDataset

        resize = build_evaluation(
            img_size=data.img_size,
            in_channels=model.in_channels,
            mean=data.mean,
            std=data.std,
            crop_pct=data.crop_pct,
            interpolation=data.interpolation,
        )
        source: Any = Listed(files)
        return ImageDataset(source, resize, training=False, on_error=data.on_error)
    from sdt_datasets.aedat4 import aedat4_sensor_size
    from sdt_datasets.event_data import RELEASED_SIZE, EventDataset
    from sdt_datasets.layouts import Part

    sensor_size = events.sensor_size
    if sensor_size is None:
        if not files[0].lower().endswith(".aedat4"):
            raise ConfigError("the configuration does not say the sensor's size; give events.sensor_size=[W,H]")
        sensor_size = list(aedat4_sensor_size(files[0])[:2])
    return EventDataset(
        Part(Listed(files, sensor_size, data.name), list(range(len(files)))),
        time_steps=events.time_steps,
        split_by=events.split_by,
        size=events.size or RELEASED_SIZE.get(data.name),
        on_error=data.on_error,
    )


def load_for(options: Options, rest: Sequence[str], config: Config) -> tuple[Any, Config]:
    """The model, overridden by the arguments, and the configuration of its data.

    Raises `ConfigError` if it is not known how the data were prepared.
    """
    model, config = load(Path(options.checkpoint or ""), config, rest, averaged=options.ema)
    said = any(argument.startswith("config=") for argument in rest)
    if not said and (model.card is None or not model.card.preparation):
        raise ConfigError(
            f"checkpoint={options.checkpoint} does not say how its data were prepared; name the configuration of its "
            f"training, such as config=cifar10_2_512 or config=FILE.yaml"
        )
    return model, config


def predict(model: Any, dataset: Any, config: Config, device: Any) -> dict[int, Tensor]:
    """The probabilities `[K]` of the samples that could be read, by index. Warns if no neuron fired.

    Raises `RunError`.
    """
    import torch
    from common.evaluation import Firing
    from common.loading import ShardBatches, build_loader, closing, fetch
    from common.progress import warn

    from sdt_blocks.analysis.silence import DEAD, silence

    batches = ShardBatches(len(dataset), batch_size=config.train.batch_size)
    workers = config.data.workers if len(batches) > 1 else 0
    loader = build_loader(dataset, batches, workers=workers, pin=False)
    found: dict[int, Tensor] = {}
    firing = Firing(model)
    with closing(loader), torch.no_grad():
        for rows, (inputs, targets) in zip(batches, fetch(loader), strict=True):
            with firing.watched(rated=0):
                logits = model(inputs.to(device)).float().cpu()
            logits = logits.mean(0) if logits.ndim == 3 else logits
            answers = probabilities(logits, config)
            found |= {row: one for row, one, known in zip(rows, answers, targets >= 0, strict=True) if known}
    if (told := silence(model, firing.fired)).startswith(DEAD):
        warn(told)
    broken = next((row for row, answer in found.items() if not answer.isfinite().all()), None)
    if broken is not None:
        raise RunError(f"the model's answer for {dataset._name(broken)} is not finite; its weights are damaged")
    return found


def best(answer: Tensor, names: Sequence[str], top: int) -> list[dict[str, Any]]:
    """The most probable classes, in descending order."""
    from sdt_blocks.models.card import words_of

    values, indices = answer.topk(min(top, len(names)))
    labels = words_of([names[index] for index in indices.tolist()])
    return [
        {"label": label, "class": names[index], "index": index, "probability": value}
        for label, index, value in zip(labels, indices.tolist(), values.tolist(), strict=True)
    ]


def as_table(found: Sequence[dict[str, Any]]) -> str:
    """One line per file: its name, then the classes with their probabilities in percent."""
    rows = [
        [one["file"], *(f"{100 * p['probability']:5.1f} %  {p['label']}" for p in one["predictions"])] for one in found
    ]
    # Names that are no valid text, or would break a line, are shown with backslashes.
    cells = [["".join(c if c.isprintable() else ascii(c)[1:-1] for c in cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("   ".join(map(str.ljust, row, widths)).rstrip() for row in cells)


def run(options: Options, inputs: Sequence[str], rest: Sequence[str]) -> list[dict[str, Any]]:
    """File and predictions of each input that could be read. Raises `ConfigError` or `RunError`."""
    config = load_config(rest, default="imagenet_8_384")
    from common.progress import warn
    from common.set_up import at_the_door, build_accelerator

    model, config = load_for(options, rest, config)
    names = class_names(Path(options.checkpoint or ""), model)
    if names is None:
        warn(f"{options.checkpoint} does not name its classes; they are given by number")
    accelerator, config = build_accelerator(config)
    if accelerator.num_processes > 1:
        raise ConfigError("one process makes the predictions: start it as python recipes/predict.py ...")
    files = find_files(inputs, events=model.in_channels == EVENT_CHANNELS)
    dataset = at_the_door(build_dataset, files, model, config)
    answers = predict(model.to(accelerator.device), dataset, config, accelerator.device)
    if not answers:
        raise RunError(f"none of the files can be read, {files[0]} for one")
    numbered = names or [str(number) for number in range(model.num_classes)]
    return [{"file": files[row], "predictions": best(one, numbered, options.top)} for row, one in answers.items()]


def main(arguments: list[str]) -> None:
    options, inputs, rest = read_arguments(arguments)
    with contextlib.redirect_stdout(sys.stderr):
        found = run(options, inputs, rest)
    print(json.dumps(found, indent=2) if options.json else as_table(found))


if __name__ == "__main__":
    command(main, default="imagenet_8_384", options=Options)
