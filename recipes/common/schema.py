"""Every key of a run with its type, meaning, default and bounds; `config.py` fills the tree."""

# ruff: noqa: RUF009  `option` returns a dataclass field.

from __future__ import annotations

import typing
from collections.abc import Sequence
from dataclasses import dataclass, field, make_dataclass
from typing import TYPE_CHECKING, Any

from sdt_blocks import list_models
from sdt_blocks.models.registry import model_options
from sdt_blocks.neuron import NEURONS
from sdt_blocks.surrogate import KINDS as SURROGATES


def option(default: Any, help: str, **bounds: Any) -> Any:
    """A field with its help text and bounds: `choices`, `least`, `most`, `above`, `below`, `length`.

    With `path=True` a leading `~` that no shell has expanded, for example in a file, means the home folder.
    `images=True` means that recordings of events do not use the key, `training` that a trained model does not: for the
    sections `optim` and `train` this is the default.
    """
    metadata = {"help": help, **bounds}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


EVENT_DATA_SETS = ("dvs128_gesture", "cifar10_dvs", "cifar10_dvs_tet", "n_mnist", "event_folder")
"""The names of data that are recordings of events; all others are images."""


@dataclass(frozen=True)
class DataConfig:
    name: str = option("folder", "digits, folder, cifar10, ..., hfds/NAME, wds/NAME, dvs128_gesture, event_folder, ...")
    root: str | None = option(None, "the folder that holds the data", path=True)
    img_size: int = option(224, "side of the square image in pixels", least=1, most=4096, images=True)
    mean: list[float] = option([0.485, 0.456, 0.406], "mean of each channel, or one for all", images=True)
    std: list[float] = option(
        [0.229, 0.224, 0.225], "standard deviation of each channel, or one for all", above=0, most=1e6, images=True
    )
    crop_pct: float = option(
        0.95, "evaluation: resize to img_size / crop_pct, then crop the center", above=0, most=1, images=True
    )
    interpolation: str = option(
        "bicubic", "resampling", choices=("bicubic", "bilinear", "nearest", "random"), images=True
    )
    scale: list[float] = option(
        [0.08, 1.0], "area of the random crop, least and most", length=2, above=0, most=1, images=True, training=True
    )
    ratio: list[float] = option(
        [0.75, 4 / 3],
        "aspect ratio of the random crop, least and most",
        length=2,
        above=0,
        most=100,
        images=True,
        training=True,
    )
    hflip: float = option(0.5, "probability of a horizontal flip", least=0, most=1, images=True, training=True)
    color_jitter: float = option(
        0.4, "strength of color jitter (not used with auto_augment)", least=0, most=1, images=True, training=True
    )
    auto_augment: str | None = option(
        None, "timm's string: rand-m9-n1-mstd0.4-inc1, augmix-m5-w4, v0, ...", images=True, training=True
    )
    random_erasing: float = option(0.0, "probability of random erasing", least=0, most=1, images=True, training=True)
    erasing_mode: str = option(
        "const", "fill erased areas by mean or noise", choices=("const", "pixel"), images=True, training=True
    )
    mixup: float = option(0.0, "alpha of mixup; 0 turns it off", least=0, most=1000, training=True)
    cutmix: float = option(0.0, "alpha of cutmix; 0 turns it off", least=0, most=1000, training=True)
    mixup_prob: float = option(1.0, "probability that a batch is mixed at all", least=0, most=1, training=True)
    mixup_switch_prob: float = option(0.5, "probability of cutmix if both are on", least=0, most=1, training=True)
    mixup_off_epoch: int = option(
        0, "epoch from which mixup and cutmix are off; 0: never", least=0, most=10**6, training=True
    )
    workers: int = option(4, "loader processes per training process; 0 loads within it", least=0, most=256)
    download: bool = option(False, "fetch the data into data.root if it is not there", images=True)
    on_error: str = option(
        "raise", "an unreadable sample stops the run, or is skipped and counted", choices=("raise", "skip")
    )
    validation_samples: int | None = option(
        None,
        "evaluate on N of the training images, in equal shares of the classes, and train on the others; the test "
        "images are not looked at",
        least=1,
        most=10**12,
    )
    train_samples: int | None = option(None, "train on the first N samples only", least=1, most=10**12)
    test_samples: int | None = option(None, "evaluate on the first N samples only", least=1, most=10**12)


@dataclass(frozen=True)
class EventsConfig:
    time_steps: int = option(10, "number of frames per recording", least=1, most=4096)
    split_by: str = option("number", "equal frames by number of events or by time", choices=("number", "time"))
    size: int | None = option(
        None, "side of the square frame in pixels; null: 64 for CIFAR10-DVS, else the sensor's own", least=1, most=4096
    )
    augment: str | None = option(
        None,
        "augmentations in training, separated by commas: hflip, roll, cutout, random_op, random_op_wide, drop_by_time, "
        "drop_by_area, drop_at_random, event_drop",
        training=True,
    )
    cache: str | None = option(
        "auto", "folder for keeping the frames; auto: data.root/.frames_cache; null: do not keep them", path=True
    )
    sensor_size: list[int] | None = option(
        None, "width and height of the sensor of an event_folder; null: as the files say", length=2, least=1, most=4096
    )


def _model_keys() -> list[tuple[str, Any, Any]]:
    """`name`, and the keywords of the registered classes with their bounds; null means the named variant's value."""
    name = option("sdt_8_384", "a published variant", choices=tuple(list_models()))
    keys: list[tuple[str, Any, Any]] = [("name", str, name)]
    for key, keyword in model_options().items():
        kind, bounds = keyword.kind, keyword.option.bounds()
        if key == "neuron":
            kind, bounds = str, {"choices": tuple(NEURONS)}
        elif typing.get_origin(kind) is Sequence:
            kind = list[typing.get_args(kind)[0]]  # type: ignore[misc]
        keys.append((key, kind | None, option(None, keyword.option.help, **bounds)))
    return keys


if TYPE_CHECKING:
    ModelConfig = Any
else:
    ModelConfig = make_dataclass("ModelConfig", _model_keys(), frozen=True)


@dataclass(frozen=True)
class NeuronConfig:
    """Options of `model.neuron`; null means the neuron's default."""

    tau: float | None = option(None, "time constant of lif, in time steps", least=1, most=1e6)
    init_tau: float | None = option(None, "time constant that plif starts from", above=1, most=1e6)
    channels: bool | None = option(None, "plif: a time constant for each channel")
    threshold: float | None = option(None, "factor of each layer's threshold", above=0, most=1e6)
    reset: str | None = option(None, "reset of the membrane after a spike", choices=("zero", "subtract", "none"))
    surrogate: str | None = option(None, "derivative of the spike", choices=SURROGATES)
    alpha: float | None = option(None, "sharpness of the named surrogate", above=0, most=1e6)
    detach_reset: bool | None = option(None, "the reset carries no gradient")
    strict: bool | None = option(None, "a neuron at its threshold does not fire")


@dataclass(frozen=True)
class OptimConfig:
    name: str = option("adamw", "optimizer", choices=("adamw", "lamb", "sgd"))
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
    eps: float = option(1e-8, "the optimizer's epsilon", above=0, most=1)
    betas: list[float] = option(
        [0.9, 0.999], "the optimizer's decay rates (sgd: momentum is the first)", length=2, least=0, below=1
    )
    trust_clip: bool = option(False, "lamb: no layer's trust ratio above 1")
    clip_grad: float | None = option(None, "largest norm of the gradient", above=0, most=1e9)
    layer_decay: float | None = option(
        None, "factor of the learning rate from each block to the one before it", above=0, most=1
    )


@dataclass(frozen=True)
class TrainConfig:
    epochs: int = option(300, "epochs, warm-up included, cool-down not", least=1, most=10**6)
    warmup_epochs: int = option(20, "epochs of linear warm-up", least=0, most=10**6)
    warmup_prefix: bool = option(False, "the cosine starts after the warm-up, not with it")
    cooldown_epochs: int = option(10, "epochs at min_lr after the cosine", least=0, most=10**6)
    batch_size: int = option(64, "samples per process in one forward pass", least=1, most=10**6, training=False)
    accumulate: int = option(1, "forward passes added up into one update", least=1, most=10**6)
    max_steps: int | None = option(None, "stop after this many updates", least=1, most=10**12)
    label_smoothing: float = option(0.1, "label smoothing", least=0, below=1)
    loss: str = option("ce", "cross entropy, or binary cross entropy per class", choices=("ce", "bce"), training=False)
    tet: bool = option(False, "temporal efficient training: the loss at every time step")
    tet_lambda: float = option(0.001, "weight of TET's mean squared error", least=0, most=1)
    tet_means: float = option(1.0, "target of TET's mean squared error", least=-1e6, most=1e6)
    teacher: str | None = option(
        None, "timm model that a second head learns from: caformer_b36.sail_in22k_ft_in1k, ..."
    )
    teacher_weights: str | None = option(None, "file with the teacher's weights; null: timm fetches them", path=True)
    distillation: str = option("hard", "learn the teacher's class, or its probabilities", choices=("hard", "soft"))
    ema_decay: float | None = option(
        None, "decay of the averaged weights, evaluated in addition to the model's", above=0, below=1
    )
    mixed_precision: str = option(
        "no", "the neurons' state stays float32", choices=("no", "bf16", "fp16"), training=False
    )
    channels_last: bool | None = option(None, "memory order of the convolutions; null: channels-last on a CPU")
    compile: bool = option(False, "torch.compile the model")
    compile_mode: str = option(
        "default",
        "torch.compile's mode; reduce-overhead replays CUDA graphs, which small batches on a GPU gain from",
        choices=("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    )
    sync_bn: bool = option(False, "batch statistics over all GPUs")
    linear_probe: bool = option(False, "train the head only")
    init_checkpoint: str | None = option(
        None, "start from these weights: a run folder, a saved model, a released .pth.tar", path=True
    )
    skip_nonfinite: int = option(
        0, "updates with a non-finite loss that are skipped before the run stops", least=0, most=10**9
    )
    checkpoint_every: int = option(1, "epochs between checkpoints", least=1, most=10**9)
    checkpoint_steps: int | None = option(None, "also a checkpoint every N updates", least=1, most=10**9)
    keep_checkpoints: int = option(2, "number of newest checkpoints to keep", least=1, most=10**9)
    eval_every: int = option(1, "epochs between evaluations", least=1, most=10**9)


@dataclass(frozen=True)
class Derived:
    """Values that follow from a configuration, the data and the number of processes.

    They are written next to the configuration into the run's config.yaml, and never read back.
    """

    processes: int = 1
    total_batch: int = 0
    steps_per_epoch: int = 0
    total_steps: int = 0
    lr: float = 0.0
    min_lr: float = 0.0
    warmup_lr: float = 0.0


TRACKERS = (
    "auto", "none", "all", "tensorboard", "wandb", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab",
    "trackio",
)  # fmt: skip
"""After the first three, the trackers that Accelerate knows, which have the names of their packages."""


@dataclass(frozen=True)
class Config:
    data: DataConfig = field(default_factory=DataConfig)
    events: EventsConfig = field(default_factory=EventsConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    neuron: NeuronConfig = field(default_factory=NeuronConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    seed: int = option(42, "seed of every random draw", least=0, most=2**31 - 1)
    output_dir: str = option("runs/run", "the run folder", path=True, training=True)
    resume: str = option(
        "auto",
        "auto: the newest good checkpoint of output_dir; none: start again; or the path of a checkpoint",
        path=True,
        training=True,
    )
    tracker: str = option("auto", "auto: TensorBoard if installed; all: all installed", choices=TRACKERS, training=True)
    threads: int | None = option(None, "CPU threads per process; null: share the cores", least=1, most=1024)
    analyze: bool = option(False, "firing rates and energy of the final model at the end", training=True)
