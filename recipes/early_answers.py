"""Early answers of a trained model: accuracy against the mean number of time steps and the time per image.

    accelerate launch recipes/digits.py config=fashion_mnist data.root=DIR
    python recipes/early_answers.py checkpoint=runs/fashion_mnist

Still images are answered step by step, and each leaves when its answer is certain (`sdt_blocks.EarlyAnswers`). Half of
the evaluation set, drawn at random (or fit_samples=N samples), is used to choose the threshold for each tolerated loss
of accuracy; the rest is what the table shows, each row measured by running it: accuracy, mean steps, milliseconds per
image in batches, compared with all steps and with the model's own forward pass. It is written as early_answers.md, .csv
and .tex with a picture, early_answers.png. The keys are at the end of --help; all others are those of a training run.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from common.command_line import command
from common.config import ConfigError, RunError, check_meant, load_config, make_folder
from common.cpu_processes import join_processes
from common.results import write_results
from common.schema import option
from common.trained import class_names, default_folder, load, match_classes, other_settings, read_trained

from sdt_blocks.analysis.tables import HIGH, LOW, Column, as_files, counted

COLUMNS = (
    Column("form", "form"),
    Column("rule", "leaves when"),
    Column("threshold", "threshold", ".4f"),
    Column("accuracy", "accuracy (%)", ".2f"),
    Column("steps", "mean steps", ".2f"),
    Column("ms", "ms an image", ".3g"),
    Column("time", "time", ".2f"),
)

FORMS = ("dense", "events")
WHOLE, ALL_STEPS = "the whole model", "never: all steps"


@dataclass
class Options:
    """The keys of this recipe, in addition to those of a training run."""

    checkpoint: str | None = option(None, "a run folder or a saved model of still images", path=True)
    measure: str = option(
        "entropy", "certainty of an answer: by its entropy or its margin", choices=("entropy", "margin")
    )
    tolerances: str = option("0,0.005,0.01,0.02", "allowed losses of accuracy on the fitting samples, as shares")
    fit_samples: int | None = option(None, "samples for choosing the thresholds; null: half of them", least=1)
    batch_size: int = option(64, "images per batch", least=1)
    rounds: int = option(3, "measurements of each row's time, in alternation", least=1)
    output_dir: str | None = option(
        None, "the folder to write; null: `early_answers` next to the checkpoint", path=True
    )


def shares(tolerances: str) -> list[float]:
    """The tolerances as numbers. Raises `ConfigError`."""
    try:
        allowed = [float(one) for one in tolerances.strip("[]").split(",")]
    except ValueError:
        allowed = [-1.0]
    if not all(0 <= one < 1 for one in allowed):
        raise ConfigError(f"tolerances={tolerances}: expected shares of the samples from 0 to 1, such as 0,0.01")
    return allowed


def split(test_set: Any, options: Options) -> tuple[list[Any], list[Any]]:
    """Batches of (images, classes) to fit on, and those to judge by. Raises `ConfigError`."""
    import torch

    order = torch.randperm(len(test_set), generator=torch.Generator().manual_seed(0))  # folders are sorted by class
    samples = [sample for sample in map(test_set.__getitem__, order.tolist()) if sample[1] >= 0]  # the readable ones
    count = len(samples) // 2 if options.fit_samples is None else options.fit_samples
    if not 0 < count < len(samples):
        raise ConfigError(f"fit_samples={count} of {len(samples)} samples leave none to fit on, or none to judge by")
    images, targets = torch.stack([image for image, _ in samples]), torch.tensor([target for _, target in samples])
    parts = []
    for part in (slice(0, count), slice(count, None)):
        cut = (images[part].split(options.batch_size), targets[part].split(options.batch_size))
        parts.append(list(zip(*cut, strict=True)))
    return parts[0], parts[1]


def rows_of(model: Any, fitting: list[Any], judged: list[Any], allowed: list[float], options: Options) -> list[Any]:
    """The rows of the table, for each form: the whole model, all steps one by one, and each tolerance."""
    from sdt_blocks import EarlyAnswers, optimize_for_inference

    rows: list[dict[str, Any]] = []
    samples = sum(len(targets) for _, targets in judged)
    for name in FORMS:
        form = optimize_for_inference(model, sparse=name == "events")
        early = EarlyAnswers.fit(form, fitting, measure=options.measure)
        rules = {ALL_STEPS: math.inf}
        rules |= {f"{options.measure}, {100 * one:g} % lost at most": early.at(one).threshold for one in allowed}
        ways = {WHOLE: form}
        for rule, threshold in rules.items():
            ways[rule] = EarlyAnswers(form, threshold=threshold, measure=options.measure)
        found = {rule: judge(answer, judged) for rule, answer in ways.items()}
        times = [{rule: seconds_of(answer, judged) for rule, answer in ways.items()} for _ in range(options.rounds)]
        ms = {rule: 1000 * statistics.median(each[rule] for each in times) / samples for rule in ways}
        for rule, (right, steps) in found.items():
            row = {"form": name, "rule": rule, "threshold": rules.get(rule), "steps": steps, "samples": samples}
            rows.append(row | {"accuracy": 100 * right / samples, "ms": ms[rule], "time": ms[rule] / ms[WHOLE]})
    return rows


def judge(answer: Any, batches: list[Any]) -> tuple[int, float | None]:
    """The number of right answers, and the mean number of steps."""
    import torch

    right, steps, samples = 0, 0.0, 0
    for images, targets in batches:
        with torch.no_grad():
            found = answer(images)
        logits, taken = found if isinstance(found, tuple) else (found, None)
        logits = logits.mean(0) if logits.ndim == 3 else logits
        right += int((logits.argmax(1) == targets).sum())
        steps += 0.0 if taken is None else float(taken.sum())
        samples += len(targets)
    return right, steps / samples if steps else None


def seconds_of(answer: Any, batches: list[Any]) -> float:
    """The time for answering all batches, in seconds."""
    import torch

    start = time.perf_counter()
    with torch.no_grad():
        for images, _ in batches:
            answer(images)
    return time.perf_counter() - start


def main(arguments: list[str]) -> None:
    options, checkpoint, rest = read_trained(Options, arguments)
    allowed = shares(options.tolerances)
    config = load_config(rest, default="imagenet_8_384")
    check_meant(config, rest)
    settings = other_settings(checkpoint, config, rest)
    folder = Path(options.output_dir or default_folder(checkpoint, "early_answers", settings))
    join_processes()
    import torch
    from common.loading import build_datasets
    from common.pictures import draw_early
    from common.progress import warn
    from common.set_up import at_the_door

    from sdt_blocks.analysis.moments import share_interval

    model, config = load(checkpoint, config, rest, averaged=False)
    if config.threads:
        torch.set_num_threads(config.threads)
    _, test_set = at_the_door(build_datasets, config, evaluation_only=True)
    matched = match_classes(test_set, class_names(checkpoint, model), model, checkpoint=checkpoint, by="name")
    if "does not name" in matched:
        warn(matched)
    fitting, judged = at_the_door(split, test_set, options)
    make_folder(folder)
    try:
        rows = rows_of(model, fitting, judged, allowed, options)
    except (ValueError, TypeError) as error:
        raise RunError(str(error)) from error
    for row in rows:
        ends = share_interval(row["accuracy"] / 100, row["samples"], 0.95)
        if ends is not None:
            row |= {f"accuracy{end}": 100 * value for end, value in zip((LOW, HIGH), ends, strict=True)}
        row["threshold"] = None if row["rule"] in (WHOLE, ALL_STEPS) else row["threshold"]
    fitted, others = sum(len(targets) for _, targets in fitting), counted(rows[0]["samples"], "other")
    note = (
        f"{checkpoint}: thresholds from {counted(fitted, 'sample')}, all else of {others}. Accuracy with its "
        f"95 % interval; time: share of the same form's whole model, a median of {options.rounds}, in batches of "
        f"{options.batch_size}."
    )
    write_results(as_files(rows, COLUMNS, note), folder / "early_answers", partial(draw_early, rows))


if __name__ == "__main__":
    command(main, default="imagenet_8_384", options=Options)
