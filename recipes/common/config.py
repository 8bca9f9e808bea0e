"""The configuration of a run: one typed tree, filled from a YAML file and `key=value` arguments.

    config = load_config(["config=cifar10_2_256", "optim.lr=1e-3"], default="digits")

The keys are in `schema.py`; `--help` of any recipe prints the same list.
"""

from __future__ import annotations

import dataclasses
import difflib
import tempfile
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sdt_blocks import list_models
from sdt_blocks.models.registry import model_options
from sdt_blocks.neuron import neuron_spec

from .schema import EVENT_DATA_SETS, Config, Derived
from .values import convert, expand_home, read_yaml, shown

CONFIGS = Path(__file__).parents[1] / "configs"

AS_ASKED = ("train.mixed_precision=no", "tracker=none")
"""Settings for a trained model unless set otherwise: full precision, as in published figures."""


class ConfigError(ValueError):
    """The user's request cannot be fulfilled; the message is one paragraph that says why and what would work."""

    def __init__(self, message: str) -> None:
        super().__init__(one_paragraph(message))


class RunError(RuntimeError):
    """A run cannot continue; the message is one paragraph that says why and what is safe."""

    def __init__(self, message: str) -> None:
        super().__init__(one_paragraph(message))


def cannot_write(folder: Path, error: Exception) -> ConfigError:
    """The error for an output folder where no files can be written."""
    return ConfigError(
        f"output_dir={folder}: no files can be written there ({error}); make room or allow it, or choose another "
        f"output_dir"
    )


def make_folder(folder: Path) -> None:
    """Make an output folder, before what it will hold is computed. Raises `ConfigError` if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        raise cannot_write(folder, error) from error


def load_config(arguments: Sequence[str], *, default: str) -> Config:
    """The configuration of a command line.

    `config=NAME` (a file of recipes/configs) or `config=FILE.yaml` replaces the recipe's `default`; any `key=value`
    overrides a value of it. Raises `ConfigError`.
    """
    overrides: list[tuple[str, str]] = []
    source = default
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"cannot read the argument {shown(argument)}; write key=value, for example optim.lr=1e-3")
        if key == "config":
            source = value
        else:
            overrides.append((key, value))
    path = _find(source)
    content = read_file(path)
    content.pop("derived", None)
    try:
        written = {key: _converted(key, value) for key, value in _leaves(content)}
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    config = changed(Config(), written | {key: _converted(key, value) for key, value in overrides})
    validate(config)
    return config


def changed(config: Config, values: Mapping[str, Any]) -> Config:
    """The configuration with some values replaced, by dotted key."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        sections.setdefault(section, {})[name] = value
    whole = sections.pop("", {})
    parts = {name: dataclasses.replace(getattr(config, name), **some) for name, some in sections.items()}
    return dataclasses.replace(config, **parts, **whole)


def _find(source: str) -> Path:
    path = Path(expand_home(source))
    named = CONFIGS / f"{source.removesuffix('.yaml')}.yaml"
    try:
        if path.is_file():
            return path
        if source and "/" not in source and named.is_file():
            return named
    except (OSError, ValueError):  # a name that no file can have
        pass
    known = sorted(p.stem for p in CONFIGS.glob("*.yaml"))
    raise ConfigError(
        f"config={_plain(source)}: no such file; give the path of a YAML file or one of {', '.join(known)}"
    )


def read_file(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises `ConfigError`."""
    try:
        content = read_yaml(path.read_bytes())
    except (yaml.YAMLError, OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a readable YAML file ({one_paragraph(error)})") from None
    except RecursionError:
        raise ConfigError(f"{path}: not a readable YAML file (it is nested too deeply)") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping such as `train: {{epochs: 10}}`, found {type(content).__name__}")
    return content


def _plain(text: str) -> str:
    return text if len(text) <= 60 and text.isprintable() else shown(text)


def _leaves(content: Mapping[Any, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and dataclasses.is_dataclass(_lookup(name)):
            pairs += _leaves(value, f"{name}.")
        else:
            pairs.append((name, value))
    return pairs


def _lookup(key: str) -> Any:
    """The type of a dotted key. Raises a `ConfigError` that lists the valid ones."""
    kind: Any = Config
    *sections, last = key.split(".")
    for depth, part in enumerate([*sections, last]):
        hints = typing.get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
        if part not in hints:
            where = ".".join(key.split(".")[:depth])
            near = difflib.get_close_matches(key[:100], list(KEYS), n=1, cutoff=0.6)
            hint = f"did you mean {near[0]}? " if near else ""
            valid = f"{where or 'the top level'} has {', '.join(hints)}" if hints else f"{where} is a single value"
            raise ConfigError(f"unknown key {shown(key)}: {hint}{valid}")
        kind = hints[part]
    return kind


def _converted(key: str, value: Any) -> Any:
    """A value converted to the type of its key. Raises `ConfigError`."""
    if key.partition(".")[0] == "derived":
        raise ConfigError(f"{key} is computed and cannot be set; set optim.lr, train.batch_size or train.epochs")
    kind = _lookup(key)
    if dataclasses.is_dataclass(kind):
        names = ", ".join(f"{key}.{f.name}" for f in dataclasses.fields(kind))
        raise ConfigError(f"{key} is a section; set one of its keys: {names}")
    return read_value(key, value, kind, KEYS[key])


def read_value(key: str, value: Any, kind: Any, metadata: Mapping[str, Any]) -> Any:
    """`convert` for the option of a key. Raises `ConfigError`."""
    try:
        return convert(value, kind, path=metadata.get("path", False))
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from None


def all_keys() -> list[str]:
    """Every key that can be set."""
    return list(KEYS)


def _walk(kind: Any, prefix: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    hints = typing.get_type_hints(kind)
    for item in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[item.name]):
            yield from _walk(hints[item.name], f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", item.metadata


KEYS = dict(_walk(Config))
"""Every dotted key that can be set, with its help and bounds."""


def validate(config: Config) -> None:
    """Check each value against its bounds, and the values against each other. Raises `ConfigError`."""
    for key, bounds in KEYS.items():
        value = _get(config, key)
        for single in value if isinstance(value, list) else [value]:
            check_bounds(key, single, bounds)
        length = bounds.get("length")
        if isinstance(value, list) and (not value or (length and len(value) != length)):
            raise ConfigError(f"{key}: expected {length or 'at least one'} number(s), got {shown(value)}")
    data, train, optim = config.data, config.train, config.optim
    for key in ("data.scale", "data.ratio"):
        low, high = _get(config, key)
        if low > high:
            raise ConfigError(f"{key}: the first value must not exceed the second, got [{low}, {high}]")
    if len(data.mean) != len(data.std):
        raise ConfigError(f"data.mean has {len(data.mean)} values and data.std {len(data.std)}; give as many of each")
    if not config.output_dir.strip():
        raise ConfigError("output_dir: expected the path of a folder, got nothing")
    pooling = config.model.pooling
    if pooling is not None and (len(pooling) != 4 or set(pooling) - {"0", "1"}):
        raise ConfigError(f'model.pooling: expected four flags 0 or 1, quoted in YAML ("0011"), got {shown(pooling)}')
    if train.warmup_epochs > train.epochs:
        raise ConfigError(f"train.warmup_epochs={train.warmup_epochs} exceeds train.epochs={train.epochs}")
    if optim.min_lr > optim.lr:
        raise ConfigError(f"optim.min_lr={optim.min_lr} exceeds optim.lr={optim.lr}")
    if optim.warmup_lr > optim.lr:
        raise ConfigError(f"optim.warmup_lr={optim.warmup_lr} exceeds optim.lr={optim.lr}")
    if train.tet and train.loss == "bce":
        raise ConfigError("train.tet is defined on cross entropy; set train.loss=ce")
    if train.tet and config.model.per_step is False:
        raise ConfigError("train.tet needs the logits of every step; leave model.per_step out")
    if train.teacher is not None and (train.tet or config.model.distillation is False):
        raise ConfigError("train.teacher needs a second head, and no TET; leave train.tet and model.distillation out")
    if train.teacher is None and (train.teacher_weights is not None or config.model.distillation):
        raise ConfigError("train.teacher_weights and model.distillation need a teacher; name it in train.teacher")
    if train.teacher is not None and train.linear_probe:
        raise ConfigError("train.linear_probe trains the head alone; leave train.teacher out")
    for key, wanted, option in (("train.teacher", train.teacher, "distillation"), ("train.tet", train.tet, "per_step")):
        if wanted and option not in model_options(config.model.name):
            able = ", ".join(name for name in list_models() if option in model_options(name))
            raise ConfigError(
                f"{key} needs a model with the option {option}, which {config.model.name} lacks; these have it: {able}"
            )
    if train.compile_mode != "default" and not train.compile:
        raise ConfigError(f"train.compile_mode={train.compile_mode} is for train.compile=true; give both, or none")
    if optim.trust_clip and optim.name != "lamb":
        raise ConfigError(f"optim.trust_clip is lamb's; leave it out with optim.name={optim.name}")
    model_keywords(config)
    if train.linear_probe and train.init_checkpoint is None:
        raise ConfigError("train.linear_probe trains the head of a finished model; name it in train.init_checkpoint")


def check_meant(config: Config, arguments: Sequence[str]) -> None:
    """Raise `ConfigError` for an argument that does not apply to the data of the configuration.

    A file may contain such keys: a run's file has all keys.
    """
    for key in (argument.partition("=")[0] for argument in arguments):
        if config.data.name in EVENT_DATA_SETS and KEYS.get(key, {}).get("images"):
            raise ConfigError(f"{key} is for images, and data.name={config.data.name} holds recordings: see events.*")
        if config.data.name not in EVENT_DATA_SETS and key.startswith("events."):
            raise ConfigError(f"{key} is for recordings of events, and data.name={config.data.name} holds images")


def of_training(key: str) -> bool:
    """Whether a key only changes how a model is trained, and nothing that can be asked of a trained one."""
    said: bool = KEYS[key].get("training", key.startswith(("optim.", "train.")))
    return said


def check_of_use(arguments: Sequence[str], own: Sequence[str]) -> None:
    """Raise `ConfigError` for an argument that only concerns training, except the recipe's `own`."""
    for key in (argument.partition("=")[0] for argument in arguments):
        if key in KEYS and of_training(key) and key not in own:
            raise ConfigError(f"{key} is for training, and changes nothing here; leave it out (--help lists the keys)")


def model_keywords(config: Config) -> dict[str, Any]:
    """The model's keywords that the configuration sets, the neuron with its options. Raises `ConfigError`."""
    options = {key: value for key, value in dataclasses.asdict(config.model).items() if value is not None}
    name = options.pop("name")
    neuron = {key: value for key, value in dataclasses.asdict(config.neuron).items() if value is not None}
    if "alpha" in neuron:
        if "surrogate" not in neuron:
            raise ConfigError("neuron.alpha is that of a surrogate; name it in neuron.surrogate")
        neuron["surrogate"] = {"kind": neuron["surrogate"], "alpha": neuron.pop("alpha")}
    if neuron:
        if "neuron" not in model_options(name):
            able = ", ".join(other for other in list_models() if "neuron" in model_options(other))
            raise ConfigError(
                f"neuron.{', neuron.'.join(neuron)}: the neurons of {name} have no such option; leave it out, or set "
                f"it to null where a file sets it. These models have it: {able}"
            )
        kind = options.get("neuron", model_options(name)["neuron"].default)
        try:
            options["neuron"] = neuron_spec({"name": kind, **neuron})
        except (ValueError, TypeError) as error:
            raise ConfigError(f"neuron.*: {error}") from None
    return options


def _get(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part)
    return config


def check_bounds(key: str, value: Any, bounds: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for a value that an `option` does not allow."""
    if value is None:
        return
    choices = bounds.get("choices")
    if choices and value not in choices:
        near = difflib.get_close_matches(str(value)[:100], choices, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"{key}: {shown(value)} is unknown; {hint}choose one of {', '.join(choices)}")
    wrong = (
        (("least" in bounds) and value < bounds["least"])
        or (("most" in bounds) and value > bounds["most"])
        or (("above" in bounds) and value <= bounds["above"])
        or (("below" in bounds) and value >= bounds["below"])
    )
    if wrong:
        raise ConfigError(f"{key}: expected a value {_range(bounds)}, got {shown(value)}")


def _range(bounds: Mapping[str, Any]) -> str:
    words = {"least": "of at least", "above": "above", "most": "at most", "below": "below"}
    return " and ".join(f"{word} {_shortest(bounds[name])}" for name, word in words.items() if name in bounds)


def _shortest(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


# Keys that may change when a run is resumed: they move, watch, end or divide it. `run_state.tell_changes` warns of
# those that change batch statistics or rounding.
_FREE = {
    "data.root", "data.workers", "data.download", "data.on_error", "data.test_samples", "data.crop_pct", "events.cache",
    "train.batch_size", "train.accumulate", "train.max_steps", "train.init_checkpoint", "train.skip_nonfinite",
    "train.checkpoint_every", "train.checkpoint_steps", "train.keep_checkpoints", "train.eval_every",
    "train.channels_last", "train.compile", "train.compile_mode", "output_dir", "resume", "tracker", "threads",
    "analyze",
}  # fmt: skip


def flatten(config: Config) -> dict[str, Any]:
    """Every dotted key with its value."""
    return {key: _get(config, key) for key in KEYS}


def trajectory(config: Config) -> dict[str, Any]:
    """The settings that the weights at a given step depend on."""
    return {key: value for key, value in flatten(config).items() if key not in _FREE}


def help_text(default: str, *, training: bool) -> str:
    """Every key with its meaning and its value in the configuration `default`, for `--help`.

    Without `training`, keys that do not matter for a trained model are left out.
    """
    lines = [
        f"config=NAME takes another file of recipes/configs, config=FILE.yaml any file. The keys, with their values in "
        f"config={default}:"
    ]
    config = load_config([] if training else AS_ASKED, default=default)
    shown = [key for key in KEYS if training or not of_training(key)]
    return "\n".join([*lines, *(help_line(key, _get(config, key), KEYS[key]) for key in shown)])


def help_line(key: str, value: Any, metadata: Mapping[str, Any]) -> str:
    """One key of `--help`: its value as it would be typed, its meaning, and its allowed values."""
    choices = f" ({', '.join(metadata['choices'])})" if "choices" in metadata else ""
    return f"  {key}={typed(value)}: {metadata['help']}{choices}"


def typed(value: Any) -> str:
    """A value as it would be typed behind `key=`."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text.replace(", ", ",") if isinstance(value, list) else text


def to_yaml(config: Config, derived: Derived | None = None) -> str:
    """The whole tree as YAML, with the values derived from it, which `load_config` ignores when it reads the text."""
    content = dataclasses.asdict(config) | ({} if derived is None else {"derived": dataclasses.asdict(derived)})
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def one_paragraph(error: object) -> str:
    """The message of an error without line breaks."""
    return " ".join(str(error).split())
