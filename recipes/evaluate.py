"""Accuracy of a released checkpoint, a saved model or a finished run, on the validation part of a data set.

    accelerate launch recipes/evaluate.py checkpoint=8_768.pth.tar data.root=DIR img_size=288
    accelerate launch recipes/evaluate.py checkpoint=runs/digits

It prints the accuracy and writes a folder (output_dir=, by default `evaluation` in the run's): the accuracy of each
class (classes.csv), the confusion matrix (confusion.csv, confusion.png), and all figures (evaluation.json). With
settings other than the run's own, the folder is named after them: `evaluation,data.img_size=288`. Classes are matched
by name, whatever their order in the data; `match=position` matches them by order only.

For a run folder the data is the run's own unless set otherwise, else that of config=imagenet_8_384. `img_size=288`
resizes to 320 and crops 288, as published; `ema=true` uses the averaged weights; `model.time_steps=6` and similar keys
override the checkpoint. This recipe's own keys: see the end.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.command_line import command
from common.config import RunError, check_meant, load_config, make_folder
from common.cpu_processes import join_processes
from common.options import changed_options
from common.schema import option
from common.trained import class_names, default_folder, load, match_classes, other_settings, read_trained

from sdt_blocks.files import written_together

if TYPE_CHECKING:
    from common.evaluation import Evaluation

PUBLISHED_CROP = {288: 0.9}
"""Evaluation sizes with their own share of the resized image: 288 of 320."""

FIGURES = "evaluation.json"

MATCHES = ("name", "position")

MOST_CLASSES = 20
"""Number of classes up to which the accuracy of each is printed; if there are more, only the worst are."""


@dataclass
class Options:
    """The keys of this recipe, in addition to those of a training run."""

    checkpoint: str | None = option(None, "a run folder, a saved model, or a released .pth.tar", path=True)
    ema: bool = option(False, "use the averaged weights")
    img_size: int | None = option(None, "data.img_size; 288 also sets data.crop_pct=0.9, as published", least=1)
    match: str = option("name", "match the data's classes with the model's by name, or by position", choices=MATCHES)
    output_dir: str | None = option(None, "the folder to write; null: `evaluation` next to the checkpoint", path=True)


def main(arguments: list[str]) -> None:
    options, checkpoint, rest = read_trained(Options, arguments)
    if options.img_size is not None:
        crop = PUBLISHED_CROP.get(options.img_size)
        rest = [f"data.img_size={options.img_size}", *([f"data.crop_pct={crop}"] if crop else []), *rest]
    config = load_config(rest, default="imagenet_8_384")
    check_meant(config, rest)
    settings = other_settings(checkpoint, config, rest) | changed_options(options, "ema", "match")
    folder = Path(options.output_dir or default_folder(checkpoint, "evaluation", settings))
    join_processes()
    import torch
    from common.evaluation import evaluate
    from common.loading import closing, evaluation_loader
    from common.progress import warn
    from common.set_up import at_the_door, build_accelerator, open_data

    model, config = load(checkpoint, config, rest, averaged=options.ema)
    accelerator, config = build_accelerator(config)
    _, test_set = open_data(config, accelerator, evaluation_only=True)
    names = class_names(checkpoint, model)
    matched = match_classes(test_set, names, model, checkpoint=checkpoint, by=options.match)
    if names is None:
        warn(matched)
    if accelerator.is_main_process:
        make_folder(folder)
    loader = evaluation_loader(test_set, config, accelerator)
    with closing(loader):
        result = at_the_door(evaluate, model.to(accelerator.device), loader, accelerator)
    met = torch.tensor(len(test_set.unreadable), device=accelerator.device)
    unreadable = int(accelerator.reduce(met, "sum"))  # type: ignore[call-overload]
    if accelerator.is_main_process and result is not None:
        if result.silence:
            print(result.silence)
        print(describe(result, test_set.kind))
        if unreadable:
            print(f"{unreadable} of the {test_set.kind} could not be read; no figure includes such")
        print(matched)
        print("\n".join(describe_classes(result, test_set.classes)))
        write(result, test_set.classes, folder, unreadable, settings)
    accelerator.end_training()


def describe(result: Evaluation, kind: str) -> str:
    """The figures of an evaluation in one line."""
    from common.evaluation import describe_accuracies

    from sdt_blocks.analysis.tables import counted

    height, width = result.input_size
    samples = counted(result.samples, kind.removesuffix("s"))
    some = f" (of {result.rated} of them)" if result.rated < result.samples else ""
    return (
        f"{describe_accuracies(result.accuracies, ' | ')} | loss {result.loss:.4f} | "
        f"{samples} at {height} x {width} | firing rate {result.firing_rate:.4f}{some}"
    )


def describe_classes(result: Evaluation, names: Sequence[str]) -> list[str]:
    """A line for each class that has samples, or for the worst: accuracy, samples, and what it is mistaken for."""
    from sdt_blocks.models.card import words_of

    counts = result.confusion.sum(1).tolist()
    accuracy = result.class_accuracy.tolist()
    order = [index for index, count in enumerate(counts) if count]
    some = len(order) > MOST_CLASSES
    if some:
        order = sorted(order, key=lambda index: accuracy[index])[: MOST_CLASSES // 2]
    shown = words_of(names)
    width = max(len(shown[index]) for index in order)
    lines = [f"of {len(counts)} classes, the worst:"] if some else []
    for index in order:
        mistakes = result.confusion[index].clone()
        mistakes[index] = 0
        other = f", most often taken for {shown[int(mistakes.argmax())]}" if mistakes.any() else ""
        lines.append(f"  {shown[index]:{width}}  {accuracy[index]:6.2f} % of {counts[index]}{other}")
    return lines


def write(result: Evaluation, names: Sequence[str], folder: Path, unreadable: int, settings: Mapping[str, Any]) -> None:
    """Write classes.csv, confusion.csv, confusion.png and evaluation.json, all of them or none. Raises `RunError`.

    `settings` are those that differ from the run's own.
    """
    from common.pictures import draw_confusion

    from sdt_blocks.models.card import words_of

    confusion, accuracy = result.confusion.numpy(), result.class_accuracy.tolist()
    figures = {
        **result.accuracies,
        "loss": None if math.isnan(result.loss) else result.loss,
        "samples": result.samples,
        "unreadable": unreadable,
        "firing_rate": result.firing_rate,
        "firing_rate_samples": result.rated,
        "silence": result.silence,
        "input_size": list(result.input_size),
        "settings": dict(settings),
    }
    table: dict[str, Any] = {"newline": "", "encoding": "utf-8", "errors": "backslashreplace"}
    try:
        with written_together(folder, last=FIGURES) as drafts:
            with (drafts / "classes.csv").open("w", **table) as file:
                rows = zip(names, confusion, confusion.diagonal(), accuracy, strict=True)
                csv.writer(file).writerow(["class", "samples", "recognised", "accuracy"])
                csv.writer(file).writerows(
                    [name, row.sum(), correct, "" if math.isnan(share) else share] for name, row, correct, share in rows
                )
            with (drafts / "confusion.csv").open("w", **table) as file:
                csv.writer(file).writerow(["true \\ predicted", *names])
                csv.writer(file).writerows([name, *row] for name, row in zip(names, confusion.tolist(), strict=True))
            draw_confusion(confusion, words_of(names), drafts / "confusion.png")
            (drafts / FIGURES).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise RunError(f"{folder} cannot be written ({error})") from error
    print(f"classes.csv, confusion.csv, confusion.png and {FIGURES} are in {folder}")


if __name__ == "__main__":
    command(main, default="imagenet_8_384", options=Options)
