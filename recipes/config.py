"""The configuration of a run: one typed tree, filled from a YAML file and `key=value` arguments.

    config = load_config(["config=cifar10_2_256", "optim.lr=1e-3"], default="digits")

Every key stands below with its meaning, its default and its bounds; `--help` of any recipe prints the same list.
"""

# ruff: noqa: RUF009  `option` returns a dataclass field.

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sdt_blocks import list_models

CONFIGS = Path(__file__).with_name("configs")


class ConfigError(ValueError):
    """What the user asked for cannot be done; the message is one paragraph that says why and what would work."""

    def __init__(self, message: str) -> None:
        super().__init__(one_paragraph(message))


class RunError(RuntimeError):
    """A run cannot go on; the message is one paragraph that says why and what is safe."""

    def __init__(self, message: str) -> None:
        super().__init__(one_paragraph(message))


def option(default: Any, help: str, **bounds: Any) -> Any:
    """A field with its help text and bounds: `choices`, `least`, `most`, `above`, `below`, `length`."""
    metadata = {"help": help, **bounds}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class DataConfig:
    name: str = option("folder", "digits, folder, cifar10, ..., hfds/NAME, wds/NAME, dvs128_gesture, event_folder, ...")
    root: str | None = option(None, "the folder that holds the data")
    img_size: int = option(224, "side of the square image in pixels", least=1, most=4096)
    mean: list[float] = option([0.485, 0.456, 0.406], "mean of each channel, or one for all")
    std: list[float] = option(
        [0.229, 0.224, 0.225], "standard deviation of each channel, or one for all", above=0, most=1e6
    )
    crop_pct: float = option(0.95, "evaluation: resize to img_size / crop_pct, then crop the centre", above=0, most=1)
    interpolation: str = option("bicubic", "resampling", choices=("bicubic", "bilinear", "nearest", "random"))
    scale: list[float] = option([0.08, 1.0], "area of the random crop, least and most", length=2, above=0, most=1)
    ratio: list[float] = option(
        [0.75, 4 / 3], "aspect ratio of the random crop, least and most", length=2, above=0, most=100
    )
    hflip: float = option(0.5, "probability of a horizontal flip", least=0, most=1)
    color_jitter: float = option(0.4, "strength of color jitter (not used beside auto_augment)", least=0, most=1)
    auto_augment: str | None = option(None, "timm's string: rand-m9-n1-mstd0.4-inc1, augmix-m5-w4, v0, ...")
    random_erasing: float = option(0.0, "probability of random erasing", least=0, most=1)
    mixup: float = option(0.0, "alpha of mixup; 0 turns it off", least=0, most=1000)
    cutmix: float = option(0.0, "alpha of cutmix; 0 turns it off", least=0, most=1000)
    mixup_prob: float = option(1.0, "probability that a batch is mixed at all", least=0, most=1)
    mixup_switch_prob: float = option(0.5, "probability of cutmix where both are on", least=0, most=1)
    mixup_off_epoch: int = option(0, "epoch from which mixup and cutmix are off; 0: never", least=0, most=10**6)
    workers: int = option(4, "loader processes beside each training process; 0 loads within it", least=0, most=256)
    download: bool = option(False, "fetch the data into data.root if it is not there")
    on_error: str = option(
        "raise", "an unreadable sample stops the run, or is skipped and counted", choices=("raise", "skip")
    )
    train_samples: int | None = option(None, "train on the first N samples only", least=1, most=10**12)
    test_samples: int | None = option(None, "evaluate on the first N samples only", least=1, most=10**12)


@dataclass
class EventsConfig:
    time_steps: int = option(10, "frames a recording is divided into", least=1, most=4096)
    split_by: str = option("number", "equal frames by number of events or by time", choices=("number", "time"))
    size: int | None = option(
        None, "side of the square frame in pixels; null: 64 for CIFAR10-DVS, else the sensor's own", least=1, most=4096
    )
    augment: str | None = option(
        None,
        "of the training samples, separated by commas: hflip, roll, cutout, random_op, drop_by_time, drop_by_area, "
        "drop_at_random, event_drop",
    )
    cache: str | None = option("auto", "folder that keeps the frames; auto: data.root/.frames_cache; null: none does")
    sensor_size: list[int] | None = option(
        None, "width and height of the sensor of an event_folder; null: as the files say", length=2, least=1, most=4096
    )


@dataclass
class ModelConfig:
    """`name` and the keywords of `SpikeDrivenTransformer`; null takes the named variant's value."""

    name: str = option("sdt_8_384", "a published variant", choices=tuple(list_models()))
    depth: int | None = option(None, "encoder blocks", least=0, most=1000)
    dim: int | None = option(None, "channels of a token", least=8, most=65536)
    num_heads: int | None = option(None, "attention heads", least=1, most=65536)
    mlp_ratio: float | None = option(None, "hidden width of the MLP over dim", above=0, most=64)
    in_channels: int | None = option(None, "channels of the input; null takes the data's", least=1, most=65536)
    num_classes: int | None = option(None, "null takes the data's", least=1, most=10**7)
    time_steps: int | None = option(None, "times an image is shown", least=1, most=1024)
    pooling: str | None = option(None, 'four flags, quoted in YAML: "0011"')
    neuron: str | None = option(None, "spiking neuron", choices=("lif", "plif"))
    event_pooling: bool | None = option(None, "3 x 3 max inside the attention")
    per_step: bool | None = option(None, "logits of every step; train.tet sets it")
    drop_path: float | None = option(None, "stochastic depth of the last block", least=0, below=1)


@dataclass
class OptimConfig:
    name: str = option("adamw", "optimiser", choices=("adamw", "lamb", "sgd"))
    lr: float = option(1e-3, "peak learning rate", above=0, most=1e4)
    lr_batch: int | None = option(
        None,
        "total batch that lr, min_lr and warmup_lr are stated for: all three are scaled by total batch / lr_batch",
        least=1,
        most=10**9,
    )
    min_lr: float = option(1e-5, "learning rate at the end of the cosine", least=0, most=1e4)
    warmup_lr: float = option(1e-6, "learning rate at the first step of the warm-up", least=0, most=1e4)
    weight_decay: float = option(0.05, "weight decay; biases and norms are left out", least=0, most=1e4)
    eps: float = option(1e-8, "the optimiser's epsilon", above=0, most=1)
    betas: list[float] = option(
        [0.9, 0.999], "the optimiser's decay rates (sgd: momentum is the first)", length=2, least=0, below=1
    )
    clip_grad: float | None = option(None, "largest norm of the gradient", above=0, most=1e9)


@dataclass
class TrainConfig:
    epochs: int = option(300, "epochs, warm-up included, cool-down not", least=1, most=10**6)
    warmup_epochs: int = option(20, "epochs of linear warm-up", least=0, most=10**6)
    cooldown_epochs: int = option(10, "epochs at min_lr after the cosine", least=0, most=10**6)
    batch_size: int = option(64, "samples of a process in one forward pass", least=1, most=10**6)
    accumulate: int = option(1, "forward passes added up into one update", least=1, most=10**6)
    max_steps: int | None = option(None, "stop after this many updates", least=1, most=10**12)
    label_smoothing: float = option(0.1, "label smoothing", least=0, below=1)
    loss: str = option("ce", "cross entropy, or binary cross entropy per class", choices=("ce", "bce"))
    tet: bool = option(False, "temporal efficient training: the loss at every time step")
    tet_lambda: float = option(0.001, "weight of TET's mean squared error", least=0, most=1)
    tet_means: float = option(1.0, "target of TET's mean squared error", least=-1e6, most=1e6)
    ema_decay: float | None = option(
        None, "decay of the averaged weights, evaluated beside the model's", above=0, below=1
    )
    mixed_precision: str = option("no", "the neurons' state stays float32", choices=("no", "bf16", "fp16"))
    channels_last: bool = option(False, "memory format of the convolutions")
    compile: bool = option(False, "torch.compile the model")
    sync_bn: bool = option(False, "batch statistics over all GPUs")
    linear_probe: bool = option(False, "train the head only")
    init_checkpoint: str | None = option(
        None, "start from these weights: a run folder, a saved model, a released .pth.tar"
    )
    skip_nonfinite: int = option(
        0, "updates with a non-finite loss that are left out before the run stops", least=0, most=10**9
    )
    checkpoint_every: int = option(1, "epochs between checkpoints", least=1, most=10**9)
    checkpoint_steps: int | None = option(None, "also a checkpoint every N updates", least=1, most=10**9)
    keep_checkpoints: int = option(2, "how many of the newest checkpoints are kept", least=1, most=10**9)
    eval_every: int = option(1, "epochs between evaluations", least=1, most=10**9)


@dataclass
class Derived:
    """Computed from the rest and from the number of processes; written into the run's config.yaml, never read."""

    processes: int = 1
    total_batch: int = 0
    steps_per_epoch: int = 0
    total_steps: int = 0
    lr: float = 0.0
    min_lr: float = 0.0
    warmup_lr: float = 0.0


@dataclass
class Config:
    data: DataConfig = field(default_factory=DataConfig)
    events: EventsConfig = field(default_factory=EventsConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    seed: int = option(42, "every random draw follows from it", least=0, most=2**31 - 1)
    output_dir: str = option("runs/run", "the run folder")
    resume: str = option(
        "auto", "auto: the newest good checkpoint of output_dir; none: start anew; or the path of a checkpoint"
    )
    tracker: str = option("auto", "auto: TensorBoard if installed", choices=("auto", "tensorboard", "wandb", "none"))
    threads: int | None = option(None, "CPU threads of a process; null divides the cores", least=1, most=1024)
    analyze: bool = option(False, "firing rates and energy of the final model at the end")
    derived: Derived = field(default_factory=Derived)


def load_config(arguments: Sequence[str], *, default: str) -> Config:
    """The configuration of a command line.

    `config=NAME` (a file of recipes/configs) or `config=FILE.yaml` replaces the recipe's `default`; any `key=value`
    overrides what it says. Raises `ConfigError`.
    """
    overrides: list[tuple[str, str]] = []
    source = default
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"cannot read the argument {argument!r}; write key=value, for example optim.lr=1e-3")
        if key == "config":
            source = value
        else:
            overrides.append((key, value))
    content = _read_yaml(_find(source))
    content.pop("derived", None)
    config = OmegaConf.structured(Config)
    try:
        for key, value in _leaves(content):
            _set(config, key, value)
        for key, text in overrides:
            _set(config, key, _parse(key, text))
        result: Config = OmegaConf.to_object(config)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise ConfigError(one_paragraph(error)) from None
    validate(result)
    return result


def _find(source: str) -> Path:
    path = Path(source)
    if path.is_file():
        return path
    named = CONFIGS / f"{source.removesuffix('.yaml')}.yaml"
    if source and "/" not in source and named.is_file():
        return named
    known = sorted(p.stem for p in CONFIGS.glob("*.yaml"))
    raise ConfigError(f"config={source}: no such file; give the path of a YAML file or one of {', '.join(known)}")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a readable YAML file ({one_paragraph(error)})") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping such as `train: {{epochs: 10}}`, found {type(content).__name__}")
    return {str(key): value for key, value in content.items()}


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
    """The type of a dotted key. Raises `ConfigError` that lists the valid ones."""
    kind: Any = Config
    *sections, last = key.split(".")
    for depth, part in enumerate([*sections, last]):
        hints = typing.get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
        if part not in hints:
            where = ".".join(key.split(".")[:depth])
            near = difflib.get_close_matches(key, all_keys(), n=1, cutoff=0.6)
            hint = f"did you mean {near[0]}? " if near else ""
            valid = f"{where or 'the top level'} has {', '.join(hints)}" if hints else f"{where} is a single value"
            raise ConfigError(f"unknown key {key!r}: {hint}{valid}")
        kind = hints[part]
    return kind


def _parse(key: str, text: str) -> Any:
    kinds = _alternatives(_lookup(key))
    if str in kinds:
        # As text whatever it looks like: YAML would read the pooling flags 0011 as the octal number 9.
        return None if text in ("null", "") and type(None) in kinds else text
    try:
        # OmegaConf's reader takes 3e-4 for the number it is.
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=True)["value"]  # type: ignore
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{key}={text}: cannot be read ({one_paragraph(error)})") from None


def _alternatives(kind: Any) -> tuple[Any, ...]:
    is_union = isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union
    return typing.get_args(kind) if is_union else (kind,)


def _set(config: Any, key: str, value: Any) -> None:
    kind = _lookup(key)
    if key.startswith("derived"):
        raise ConfigError(f"{key} is computed and cannot be set; set optim.lr, train.batch_size or train.epochs")
    if dataclasses.is_dataclass(kind):
        names = ", ".join(f"{key}.{f.name}" for f in dataclasses.fields(kind))
        raise ConfigError(f"{key} is a section; set one of its keys: {names}")
    try:
        OmegaConf.update(config, key, value)
    except OmegaConfBaseException:
        raise ConfigError(f"{key}: expected {_describe(kind)}, got {value!r}") from None


def _describe(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    kinds = _alternatives(kind)
    return " or ".join(names.get(k, "a list of numbers such as [0.1, 0.9]") for k in kinds)


def all_keys() -> list[str]:
    """Every key that can be set."""
    return [key for key, _, _ in _walk(Config)]


def _walk(kind: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, its type, its dataclass field) for every leaf that can be set."""
    hints = typing.get_type_hints(kind)
    leaves: list[tuple[str, Any, Any]] = []
    for item in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[item.name]):
            if hints[item.name] is not Derived:
                leaves += _walk(hints[item.name], f"{prefix}{item.name}.")
        else:
            leaves.append((f"{prefix}{item.name}", hints[item.name], item))
    return leaves


def validate(config: Config) -> None:
    """Checks each value against its bounds and the values against each other. Raises `ConfigError`."""
    for key, _, item in _walk(Config):
        value = _get(config, key)
        for single in value if isinstance(value, list) else [value]:
            if isinstance(value, list) and not isinstance(single, int | float):
                raise ConfigError(f"{key}: expected a list of numbers such as [0.1, 0.9], got {value}")
            _check_bounds(key, single, item.metadata)
        length = item.metadata.get("length")
        if isinstance(value, list) and (not value or (length and len(value) != length)):
            raise ConfigError(f"{key}: expected {length or 'at least one'} number(s), got {value}")
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
        raise ConfigError(f'model.pooling: expected four flags 0 or 1, quoted in YAML ("0011"), got {pooling!r}')
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
    if train.linear_probe and train.init_checkpoint is None:
        raise ConfigError("train.linear_probe trains the head of a finished model; name it in train.init_checkpoint")


def _get(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = getattr(config, part)
    return config


def _check_bounds(key: str, value: Any, bounds: Mapping[str, Any]) -> None:
    if value is None:
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key}: expected a finite number, got {value}")
    choices = bounds.get("choices")
    if choices and value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"{key}: {value!r} is unknown; {hint}choose one of {', '.join(choices)}")
    wrong = (
        (("least" in bounds) and value < bounds["least"])
        or (("most" in bounds) and value > bounds["most"])
        or (("above" in bounds) and value <= bounds["above"])
        or (("below" in bounds) and value >= bounds["below"])
    )
    if wrong:
        raise ConfigError(f"{key}: expected a value {_range(bounds)}, got {value}")


def _range(bounds: Mapping[str, Any]) -> str:
    words = {"least": "of at least", "above": "above", "most": "at most", "below": "below"}
    return " and ".join(f"{word} {bounds[name]:g}" for name, word in words.items() if name in bounds)


# What a resumed run may change: it moves, watches or ends the run, and the weights at a given step stay the same.
_FREE = {
    "data.root", "data.workers", "data.download", "data.on_error", "data.test_samples", "data.crop_pct", "events.cache",
    "train.batch_size", "train.accumulate", "train.max_steps", "train.init_checkpoint", "train.skip_nonfinite",
    "train.checkpoint_every", "train.checkpoint_steps", "train.keep_checkpoints", "train.eval_every",
    "train.channels_last", "train.compile", "output_dir", "resume", "tracker", "threads", "analyze",
}  # fmt: skip


def flatten(config: Config) -> dict[str, Any]:
    """Every dotted key with its value, those of `derived` included."""
    values = {key: _get(config, key) for key, _, _ in _walk(Config)}
    return values | {f"derived.{key}": value for key, value in dataclasses.asdict(config.derived).items()}


def trajectory(config: Config) -> dict[str, Any]:
    """The settings that the weights at a given step depend on."""
    return {key: value for key, value in flatten(config).items() if key not in _FREE and not key.startswith("derived")}


def help_text(default: str) -> str:
    """Every key with its meaning and default, for `--help`."""
    lines = [
        f"Starts from config={default}; config=NAME takes another file of recipes/configs, config=FILE.yaml any file.",
        "The keys, with the value where no file says otherwise:",
    ]
    defaults = Config()
    for key, _, item in _walk(Config):
        value = _get(defaults, key)
        choices = f" ({', '.join(item.metadata['choices'])})" if "choices" in item.metadata else ""
        lines.append(f"  {key}={'null' if value is None else value}: {item.metadata['help']}{choices}")
    return "\n".join(lines)


def to_yaml(config: Config) -> str:
    """The whole tree as YAML; `load_config` reads it again."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def one_paragraph(error: object) -> str:
    """The message of an error without its line breaks."""
    return " ".join(str(error).split())
