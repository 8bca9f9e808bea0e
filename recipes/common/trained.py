"""A trained model for the recipes (`checkpoint=`): the model, how its data were prepared, its class names."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from .config import AS_ASKED, Config, ConfigError, changed, flatten, load_config, model_keywords, read_file, typed
from .options import split_options

if TYPE_CHECKING:
    from torch import Tensor

    from sdt_blocks import DataCard

T = TypeVar("T")

RUN_CONFIG = "config.yaml"
_INSIDE_A_RUN = ("best", "last", "ema")
_LISTED = 5
_NO_MATTER = {
    "data.workers", "data.download", "data.on_error", "events.cache", "train.batch_size", "threads", "output_dir",
    "resume", "tracker", "analyze",
}  # fmt: skip
"""Settings that change neither the answers of a trained model nor the data."""
_LONGEST = 100
"""Maximum length of a folder name made of settings, in characters; longer ones become a digest."""


def run_config(checkpoint: Path) -> Path | None:
    """The config.yaml of the run that a run folder, or a model or checkpoint in one, belongs to."""
    inside = checkpoint.name in _INSIDE_A_RUN or checkpoint.parent.name == "checkpoints"
    folders = [checkpoint, checkpoint.parent, checkpoint.parent.parent] if inside else [checkpoint]
    return next((folder / RUN_CONFIG for folder in folders if (folder / RUN_CONFIG).is_file()), None)


def with_run_config(checkpoint: Path | str | None, arguments: Sequence[str]) -> list[str]:
    """`AS_ASKED` and the arguments, on top of the run's own configuration if there is one and no other is named.

    Raises `ConfigError` if there is no checkpoint, or that configuration is empty.
    """
    if checkpoint is None:
        raise ConfigError("name the model: checkpoint=FOLDER of a run or a saved model, or checkpoint=FILE.pth.tar")
    written = run_config(Path(checkpoint))
    if written is None or any(argument.startswith("config=") for argument in arguments):
        return [*AS_ASKED, *arguments]
    if not read_file(written):
        raise ConfigError(f"{written} is empty; give the settings of the training with config=NAME or config=FILE.yaml")
    return [f"config={written}", *AS_ASKED, *arguments]


def read_trained(kind: type[T], arguments: Sequence[str]) -> tuple[T, Path, list[str]]:
    """A recipe's own options, the trained model that `checkpoint` names, and the arguments for `load_config`.

    Raises `ConfigError`.
    """
    options: Any
    options, rest = split_options(kind, arguments)
    settings = with_run_config(options.checkpoint, rest)
    return options, Path(options.checkpoint), settings


def load(checkpoint: Path, config: Config, arguments: Sequence[str], *, averaged: bool) -> tuple[Any, Config]:
    """The model in eval mode, overridden by the arguments, and the configuration with its channels.

    If the model says how its images were prepared, or that each class is judged by itself, the configuration is set
    accordingly, except for what the arguments set. Raises `ConfigError`, also for weights that are NaN.
    """
    from sdt_blocks import load_model, load_released_checkpoint
    from sdt_blocks.analysis.probe import check_weights

    overrides = asked_options(config, arguments)
    if not checkpoint.exists():
        raise ConfigError(
            f"checkpoint={checkpoint}: no such file or folder; name a run, a saved model, or a released .pth.tar"
        )
    if averaged and checkpoint.is_dir() and not (checkpoint / "ema").is_dir():
        raise ConfigError(
            f"checkpoint={checkpoint} holds no averaged weights, which a run keeps with train.ema_decay; leave ema out"
        )
    try:
        if checkpoint.is_dir():
            model = load_model(checkpoint / "ema" if averaged else checkpoint, **overrides)
        else:
            model = load_released_checkpoint(checkpoint, ema=averaged, **overrides)
        check_weights(model)
    except (ValueError, TypeError, OSError) as error:
        others = [str(place) for name in ("last", "checkpoints") if (place := checkpoint / name).is_dir()]
        hint = f"; the run's other models are in {' and '.join(others)}" if others else ""
        raise ConfigError(f"checkpoint={checkpoint}: {error}{hint}") from error
    config = changed(config, {"model.in_channels": model.in_channels})
    said = {argument.partition("=")[0] for argument in arguments}
    if model.card is not None and model.card.activation == "sigmoid" and "train.loss" not in said:
        config = changed(config, {"train.loss": "bce"})
    if model.card is not None and model.card.preparation:
        config = _prepared_alike(config, model.card, arguments)
    return model, config


def _prepared_alike(config: Config, card: DataCard, arguments: Sequence[str]) -> Config:
    from .progress import warn

    said = {argument.partition("=")[0] for argument in arguments}
    theirs = {"img_size": card.input_size and card.input_size[0], **card.preparation}
    ours = {"img_size": config.data.img_size, **card_of(config, None, None).preparation}
    other = [key for key, value in theirs.items() if f"data.{key}" not in said and value not in (None, ours.get(key))]
    if other and "config" in said:
        found = ", ".join(f"data.{key}={theirs[key]} instead of {ours.get(key)}" for key in other)
        warn(f"images are prepared as the model says: {found}; data.{other[0]}=... on the command line wins")
    values = {key: list(theirs[key]) if isinstance(theirs[key], tuple) else theirs[key] for key in other}
    return changed(config, {f"data.{key}": value for key, value in values.items()})


def card_of(config: Config, names: Sequence[str] | None, input_size: Sequence[int] | None) -> DataCard:
    """The card of a model that was trained on the data of a configuration."""
    from sdt_blocks import DataCard
    from sdt_datasets.image_transforms import evaluation_interpolation

    from .schema import EVENT_DATA_SETS

    data, activation = config.data, "sigmoid" if config.train.loss == "bce" else None
    if data.name in EVENT_DATA_SETS:
        return DataCard(names, input_size, activation=activation)
    return DataCard(
        names,
        input_size,
        mean=data.mean,
        std=data.std,
        interpolation=evaluation_interpolation(data.interpolation),
        crop_pct=data.crop_pct,
        activation=activation,
    )


def probabilities(logits: Tensor, config: Config) -> Tensor:
    """Of logits `[..., K]`. They sum to 1 except after binary cross entropy, which judges each class by itself."""
    return logits.sigmoid() if config.train.loss == "bce" else logits.softmax(-1)


def asked_options(config: Config, arguments: Sequence[str]) -> dict[str, Any]:
    """The model's keywords that the arguments set, which override those of the trained model."""
    keys = {argument.partition("=")[0] for argument in arguments}
    asked = {key.removeprefix("model.") for key in keys if key.startswith("model.")}
    if any(key.startswith("neuron.") for key in keys):
        asked.add("neuron")
    return {key: value for key, value in model_keywords(config).items() if key in asked}


def other_settings(checkpoint: Path, config: Config, arguments: Sequence[str]) -> dict[str, Any]:
    """The settings that differ from the configuration of the trained model's run.

    Without a run, they are compared with the configuration that the arguments name; the location of the data is then no
    difference.
    """
    written = run_config(checkpoint)
    named = [argument for argument in arguments if argument.startswith("config=")]
    source = named if written is None else [f"config={written}"]
    own = load_config([*source, *AS_ASKED], default="imagenet_8_384")
    passed = _NO_MATTER | ({"data.root"} if own.data.root is None or same_place(own, config) else set())
    before = flatten(own)
    return {key: value for key, value in flatten(config).items() if key not in passed and value != before[key]}


def same_place(one: Config, other: Config) -> bool:
    """Whether two configurations have their data in the same folder."""
    return os.path.realpath(one.data.root or "") == os.path.realpath(other.data.root or "")


def default_folder(checkpoint: Path, name: str, settings: Mapping[str, Any] | None = None) -> Path:
    """The folder `name` in a run folder or a saved model, or next to a released file under its name.

    Results with `settings` other than the run's are not results of the run: they have a folder of their own next to
    that one, named after the settings: `evaluation,data.img_size=288`.
    """
    name += _as_name(settings or {})
    if checkpoint.is_dir():
        return checkpoint / name
    return checkpoint.with_name(f"{checkpoint.name.removesuffix('.tar').removesuffix('.pth')}_{name}")


def _as_name(settings: Mapping[str, Any]) -> str:
    whole = "".join(f",{key}={typed(value)}" for key, value in settings.items())
    short = "".join(f",{key}={typed(value).rstrip('/').rpartition('/')[2]}" for key, value in settings.items())
    name = re.sub(r"[^\w.,=+-]", "_", short)[:_LONGEST]
    return name if name == whole else f"{name}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def class_names(checkpoint: Path, model: Any) -> list[str] | None:
    """The names of the model's classes, in the order of its logits; None if they are not known.

    They are saved with the model; in older runs the config.yaml has them. Those of a released ImageNet model are its
    identifiers (n01440764, ...). Raises `ConfigError` if their number is not that of the classes.
    """
    if model.card is not None and model.card.class_names is not None:
        return list(model.card.class_names)
    written = run_config(checkpoint)
    names = _written_names(written) if written is not None else None
    if names is not None and len(names) != model.num_classes:
        raise ConfigError(
            f"{written}: derived.class_names must be a list of {model.num_classes} names, one for each class of the "
            f"model; found {_listed(names)}"
        )
    return names


def check_resumed_classes(checkpoint: Path, names: Sequence[str]) -> None:
    """Raise `ConfigError` if a run continues with data of other classes than those of its checkpoint."""
    from sdt_blocks import load_model

    try:
        before = class_names(checkpoint, load_model(checkpoint))
    except (ValueError, OSError) as error:
        raise ConfigError(f"cannot resume from {checkpoint}: {error}") from error
    if before is not None and before != list(names):
        raise ConfigError(
            f"{checkpoint} belongs to a run on the classes {_listed(before)}, the data has {_listed(names)}; name and "
            f"order the classes as before, or take another output_dir with train.init_checkpoint={checkpoint}"
        )


def _written_names(config: Path) -> list[str] | None:
    derived = read_file(config).get("derived")
    names = derived.get("class_names") if isinstance(derived, dict) else None
    if names is not None and not isinstance(names, list):
        raise ConfigError(f"{config}: derived.class_names must be a list of names, found {str(names)[:200]}")
    return [str(name) for name in names] if names else None


def match_classes(dataset: Any, names: Sequence[str] | None, model: Any, *, checkpoint: Path, by: str) -> str:
    """Give a data set the model's classes in the model's order; returns a sentence on how they were matched.

    Classes are the same if their names are, in any order; the data may lack some of the model's. With `by="position"`
    only the order counts. Raises `ConfigError` for a class that the model does not have, and if classes are matched by
    order and their numbers differ.
    """
    theirs, count = list(dataset.classes), model.num_classes
    if names is None or by == "position":
        if len(theirs) != count:
            raise ConfigError(f"checkpoint={checkpoint} has {count} classes, the data has {len(theirs)}")
        dataset.classes = list(names or theirs)
        if names is None:
            return f"{checkpoint} does not name its classes: the data's are taken in their own order"
        different = [pair for pair in zip(names, theirs, strict=True) if _same(pair[0]) != _same(pair[1])]
        return "classes are matched by position" + "".join(f", {a} is {b}" for a, b in different[:_LISTED])
    position = {_same(name): index for index, name in enumerate(names)}
    twice = [name for name, times in Counter(map(_same, [*names])).items() if times > 1]
    unknown = [name for name in theirs if _same(name) not in position]
    if unknown or twice:
        known = [name for name in names if _same(name) not in set(map(_same, theirs))]
        raise ConfigError(
            f"checkpoint={checkpoint} and the data do not name the same classes: "
            + (f"{_listed(unknown)} of the data is no class of the model" if unknown else f"{_listed(twice)} is twice")
            + (f", whose {_listed(known)} the data lacks" if known else "")
            + ". Name the class folders as in training, or set match=position if their order is the model's"
        )
    rows = np.array([position[_same(name)] for name in theirs], dtype=np.int64)
    readable = dataset.targets >= 0
    dataset.targets = np.where(readable, rows[np.where(readable, dataset.targets, 0)], dataset.targets)
    dataset.classes = list(names)
    order = "" if rows.tolist() == sorted(rows.tolist()) else ", which the data has in another order"
    some = f": {len(theirs)} of the model's {count}" if len(theirs) < count else ""
    return f"classes are matched by name{order}{some}"


def _same(name: str) -> str:
    # File systems differ in how they compose accents.
    return unicodedata.normalize("NFC", name)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
