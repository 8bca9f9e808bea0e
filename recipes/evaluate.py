"""Top-1 and top-5 of a released checkpoint, a saved model or a finished run, on the validation part of a data set.

    accelerate launch recipes/evaluate.py checkpoint=8_768.pth.tar data.root=DIR img_size=288
    accelerate launch recipes/evaluate.py checkpoint=runs/digits

For a run folder the data is the run's own unless said otherwise, else that of config=imagenet_8_384. `img_size=288`
resizes to 320 and crops 288, as published; `ema=true` takes the averaged weights; `model.time_steps=6` and the like
override what the checkpoint says.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from command_line import print_help, short_errors
from config import ConfigError, load_config
from cpu_processes import start_cpu_processes

PUBLISHED_CROP = {"288": "0.9"}
"""Evaluation sizes with their own share of the resized image: 288 of 320."""


def read_arguments(arguments: list[str]) -> tuple[Path, bool, list[str]]:
    """The checkpoint, whether its average is asked for, and the arguments that `load_config` takes."""
    own = {"checkpoint": "", "ema": "false", "img_size": ""}
    rest = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and key in own:
            own[key] = value
        else:
            rest.append(argument)
    if not own["checkpoint"]:
        raise ConfigError("name the model: checkpoint=FILE.pth.tar or checkpoint=FOLDER")
    if own["ema"] not in ("true", "false"):
        raise ConfigError(f"ema: expected true or false, got {own['ema']!r}")
    if own["img_size"]:
        crop = PUBLISHED_CROP.get(own["img_size"])
        rest = [f"data.img_size={own['img_size']}", *([f"data.crop_pct={crop}"] if crop else []), *rest]
    # Training may have been in half precision; the published figures are in full, unless asked otherwise.
    rest.insert(0, "train.mixed_precision=no")
    checkpoint = Path(own["checkpoint"])
    written = checkpoint / "config.yaml"
    if written.is_file() and not any(argument.startswith("config=") for argument in rest):
        rest.insert(0, f"config={written}")
    return checkpoint, own["ema"] == "true", rest


def load(checkpoint: Path, *, averaged: bool, overrides: dict[str, Any]) -> Any:
    """The model in eval mode. Raises `ConfigError`."""
    from sdt_blocks import load_model, load_released_checkpoint

    try:
        if checkpoint.is_dir():
            return load_model(checkpoint / "ema" if averaged else checkpoint, **overrides)
        return load_released_checkpoint(checkpoint, ema=averaged, **overrides)
    except (ValueError, TypeError, OSError) as error:
        raise ConfigError(f"checkpoint={checkpoint}: {error}") from error


def main(arguments: list[str]) -> None:
    checkpoint, averaged, rest = read_arguments(arguments)
    asked = {argument.partition("=")[0].removeprefix("model.") for argument in rest if argument.startswith("model.")}
    config = load_config(rest, default="imagenet_8_384")
    start_cpu_processes()
    from evaluation import evaluate
    from loading import ShardBatches, build_datasets, build_loader, stop_loaders
    from set_up import at_the_door, build_accelerator

    model = load(checkpoint, averaged=averaged, overrides={k: v for k, v in asdict(config.model).items() if k in asked})
    config.model.in_channels = model.in_channels
    config.tracker = "none"
    accelerator = build_accelerator(config)
    _, test_set = at_the_door(build_datasets, config, evaluation_only=True)
    if len(test_set.classes) != model.num_classes:
        raise ConfigError(
            f"checkpoint={checkpoint} tells {model.num_classes} classes apart, the data has {len(test_set.classes)}"
        )
    shard = ShardBatches(
        len(test_set),
        batch_size=config.train.batch_size,
        rank=accelerator.process_index,
        processes=accelerator.num_processes,
    )
    loader = build_loader(test_set, shard, workers=config.data.workers, pin=accelerator.device.type == "cuda")
    try:
        result = at_the_door(evaluate, model.to(accelerator.device), loader, accelerator)
    finally:
        stop_loaders(loader)
    if accelerator.is_main_process and result is not None:
        print(
            f"top-1 {result['top1']:.2f} % | top-5 {result['top5']:.2f} % | loss {result['loss']:.4f} | "
            f"{result['samples']} images at {config.data.img_size} x {config.data.img_size} | "
            f"firing rate {result['firing_rate']:.4f}"
        )
    accelerator.end_training()


if __name__ == "__main__":
    if not print_help(sys.argv[1:], "imagenet_8_384"):
        with short_errors():
            main(sys.argv[1:])
