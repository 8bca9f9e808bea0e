"""From a configuration to a run that is ready to train: everything that can be rejected is rejected here."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, ProjectConfiguration, broadcast_object_list, gather_object
from safetensors import SafetensorError
from torch import Tensor, nn

from sdt_blocks import DataCard
from sdt_blocks.analysis.measured import processor
from sdt_blocks.analysis.tables import counted
from sdt_blocks.files import write_text
from sdt_blocks.ops.dispatch import forced

from .best import restore_best
from .config import Config, ConfigError, cannot_write, changed, flatten, to_yaml, trajectory
from .cpu_processes import use_cores
from .distillation import build_teacher
from .engine import Run
from .loading import EpochBatches, build_datasets, build_loader, evaluation_loader
from .models import build_model, fit_to_data, freeze_all_but_head, load_initial_weights, restore_optimizer
from .optim import BatchMixer, batch_scale, build_loss, build_optimizer, check_even_batch, distilled
from .progress import Display, choose_tracker, restore_metrics, warn
from .run_lock import lock_folder
from .run_state import Position, add_cards, check_settings, load_checkpoint, open_folder, set_aside_newer, tell_changes
from .schema import Derived, TrainConfig
from .trained import card_of, check_resumed_classes

T = TypeVar("T")


def set_up(config: Config) -> Run:
    """The run of a configuration, at the position given by `resume`. Raises `ConfigError`."""
    folder = Path(config.output_dir)
    accelerator, config = build_accelerator(config)
    check_machine(config, accelerator)
    train_set, test_set = open_data(config, accelerator)
    sample = at_the_door(train_set.__getitem__, 0)[0]
    num_classes = len(train_set.classes)
    if num_classes < 2:
        raise ConfigError(f"the data has one class, {train_set.classes[0]!r}; a classifier needs at least two")
    batches = build_batches(config, accelerator, len(train_set))
    derived = derive(config, accelerator, batches)
    if sample.ndim == 4:  # frames have their own number of time steps
        of_frames = {"model.time_steps": len(sample), "events.sensor_size": list(train_set.sensor_size[:2])}
        config = changed(config, of_frames)
    config = fit_to_data(config, in_channels=sample.shape[-3], num_classes=num_classes)
    plain = build_model(config)
    plain.card = card_of(config, train_set.classes, sample.shape[-2:])
    at_the_door(dry_run, plain, sample, accelerator.device)
    if config.train.compile and accelerator.is_main_process:
        print("compiling the model once, at the first step: this may take minutes", flush=True)
    teacher = build_teacher(config, accelerator, sample, num_classes)
    mixer = build_mixer(config, accelerator, sample, num_classes)
    keep = config.train.keep_checkpoints
    # Weights, two moments and perhaps an average, in each checkpoint and in the one being written; best and last.
    copies = (3 + (config.train.ema_decay is not None)) * (keep + 1) + 2
    needed = copies * sum(value.nbytes for value in plain.state_dict().values())
    lock = None

    def open_locked() -> Path | None:
        nonlocal lock
        lock = lock_folder(folder)
        return at_the_door(open_folder, folder, config.resume, needed=needed)

    checkpoint = agreed(accelerator, open_locked)
    if checkpoint is not None:
        check_resumed_classes(checkpoint, train_set.classes)
    if checkpoint is None and config.train.init_checkpoint is not None:
        note = at_the_door(load_initial_weights, plain, config.train.init_checkpoint, train_set.classes)
    else:
        note = f"from {checkpoint}" if checkpoint else "new weights"
    of_data = describe_data(config, train_set, test_set)
    model, plain, ema, optimizer, position = prepare(config, derived, accelerator, plain, checkpoint, of_data)
    if accelerator.is_main_process:
        bring_into_line(folder, checkpoint, position, plain.card, to_yaml(from_anywhere(config), derived))
    start_tracker(config, derived, accelerator)
    display = Display(derived.total_steps, position.step, active=accelerator.is_main_process)
    display.say(describe(config, derived, accelerator, plain, note))
    if cache := getattr(train_set, "cache", None):
        display.say(f"frames are kept in {cache.folder}: {cache.size()}")
    pin = accelerator.device.type == "cuda"
    return Run(
        config=config,
        derived=derived,
        accelerator=accelerator,
        folder=folder,
        model=model,
        plain=plain,
        ema=ema,
        optimizer=optimizer,
        loss=build_loss_of(config.train),
        teacher=teacher,
        mixer=mixer,
        batches=batches,
        train_loader=build_loader(train_set, batches, workers=config.data.workers, pin=pin),
        test_loader=evaluation_loader(test_set, config, accelerator),
        position=position,
        display=display,
        lock=lock,
    )


def from_anywhere(config: Config) -> Config:
    """The configuration with its data where they are found from any working directory."""
    root = config.data.root
    return config if root is None else changed(config, {"data.root": os.path.abspath(root)})


def bring_into_line(folder: Path, checkpoint: Path | None, position: Position, card: DataCard, text: str) -> None:
    """Make the content of the run folder that of a run at this position, with this text as its config.yaml.

    Raises `ConfigError` if it cannot be written.
    """
    try:
        set_aside_newer(folder, position.step)
        restore_metrics(folder, position.lines, position.closed)
        if checkpoint is not None:
            restore_best(folder, checkpoint, position)
        add_cards(folder, card)
        write_text(folder / "config.yaml", text)
    except (OSError, SafetensorError) as error:
        raise cannot_write(folder, error) from error


def build_loss_of(train: TrainConfig) -> Callable[[Any, Any], Tensor]:
    """The training loss of a configuration."""
    loss = build_loss(
        train.loss,
        label_smoothing=train.label_smoothing,
        tet=train.tet,
        tet_lambda=train.tet_lambda,
        tet_means=train.tet_means,
    )
    return loss if train.teacher is None else distilled(loss, train.distillation)


def start_tracker(config: Config, derived: Derived, accelerator: Accelerator) -> None:
    """Open the tracker's record of the run. Raises a `ConfigError` that names the tracker."""
    settings = flatten(config) | {f"derived.{key}": value for key, value in asdict(derived).items()}
    try:
        accelerator.init_trackers("sdt", config={key: str(value) for key, value in settings.items()})
    except Exception as error:  # the tracker's own code may raise anything: no account, no network, no space
        raise ConfigError(
            f"tracker={config.tracker}: the tracker cannot start ({type(error).__name__}: {error}); set it up, or "
            f"train without it: tracker=none"
        ) from error


def open_data(config: Config, accelerator: Accelerator, *, evaluation_only: bool = False) -> tuple[Any, Any]:
    """The training and the evaluation set, as `build_datasets` gives them. Raises `ConfigError`.

    If they are downloaded, the first process does so, then one of each machine that does not find the files, since its
    folder is its own.
    """

    def read() -> tuple[Any, Any]:
        return at_the_door(build_datasets, config, evaluation_only=evaluation_only)

    if config.data.download and accelerator.num_processes > 1:
        first, of_machine = accelerator.is_main_process, accelerator.is_local_main_process
        for fetches in (first, of_machine and not first):
            trouble = None
            try:
                if fetches:
                    read()
            except ConfigError as error:
                trouble = str(error)
            if told := [one for one in gather_object([trouble]) if one is not None]:
                raise ConfigError(told[0])
    return read()


def build_accelerator(config: Config) -> tuple[Accelerator, Config]:
    """Accelerate's view of this process, and the configuration adapted to this machine, with its cores shared out.

    fp16 on a CPU becomes float32, with a warning. Raises `ConfigError` for other settings that are not possible here.
    """
    launcher_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true"
    if config.train.mixed_precision == "fp16" and (launcher_cpu or not torch.accelerator.is_available()):
        warn("train.mixed_precision=fp16 needs a GPU; training continues in float32 (train.mixed_precision=no)")
        config = changed(config, {"train.mixed_precision": "no"})
    precision = config.train.mixed_precision
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", precision):
        warn(f"the launcher's mixed precision {launched} is not used; train.mixed_precision={precision} decides")
    folder, trackers = Path(config.output_dir), choose_tracker(config.tracker)
    try:
        accelerator = Accelerator(
            mixed_precision=precision,
            gradient_accumulation_steps=config.train.accumulate,
            log_with=trackers,
            project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / "tensorboard")),
        )
    except ValueError as error:
        raise ConfigError(f"train.mixed_precision={precision}: {error}") from error
    on_cpu = accelerator.device.type == "cpu"
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    workers = use_cores(processes=processes, on_cpu=on_cpu, loaders=config.data.workers, threads=config.threads)
    channels_last = on_cpu if config.train.channels_last is None else config.train.channels_last
    return accelerator, changed(config, {"data.workers": workers, "train.channels_last": channels_last})


def check_machine(config: Config, accelerator: Accelerator) -> None:
    """Raise `ConfigError` for settings that cannot be trained with here; a model trained so elsewhere is fine."""
    if accelerator.device.type == "cpu" and config.train.sync_bn:
        raise ConfigError("train.sync_bn: synchronized batch norm runs on GPUs only; leave it out on a CPU")
    if config.train.ema_decay is not None and accelerator.distributed_type == DistributedType.FSDP:
        raise ConfigError(
            "train.ema_decay: averaged weights are not kept under FSDP; leave it out or launch without FSDP"
        )


def build_batches(config: Config, accelerator: Accelerator, samples: int) -> EpochBatches:
    """This process's share of the training samples."""
    return EpochBatches(
        samples,
        batch_size=config.train.batch_size,
        accumulate=config.train.accumulate,
        rank=accelerator.process_index,
        processes=accelerator.num_processes,
        seed=config.seed,
    )


def derive(config: Config, accelerator: Accelerator, batches: EpochBatches) -> Derived:
    """Values that follow from the numbers of processes and samples, such as scaled learning rates."""
    total_batch = accelerator.num_processes * config.train.accumulate * config.train.batch_size
    scale = batch_scale(total_batch, config.optim.lr_batch)
    steps = (config.train.epochs + config.train.cooldown_epochs) * batches.updates
    return Derived(
        processes=accelerator.num_processes,
        total_batch=total_batch,
        steps_per_epoch=batches.updates,
        total_steps=min(steps, config.train.max_steps or steps),
        lr=config.optim.lr * scale,
        min_lr=config.optim.min_lr * scale,
        warmup_lr=config.optim.warmup_lr * scale,
    )


def build_mixer(config: Config, accelerator: Accelerator, sample: Tensor, num_classes: int) -> BatchMixer | None:
    """Mixup and cutmix, or None if both are off."""
    data = config.data
    if not (data.mixup or data.cutmix):
        return None
    if data.cutmix and sample.ndim != 3:
        raise ConfigError("data.cutmix pastes a rectangle of an image; it is not defined on event frames, set it to 0")
    at_the_door(check_even_batch, config.train.batch_size)
    return BatchMixer(
        mixup=data.mixup,
        cutmix=data.cutmix,
        prob=data.mixup_prob,
        switch_prob=data.mixup_switch_prob,
        off_epoch=data.mixup_off_epoch,
        label_smoothing=config.train.label_smoothing,
        num_classes=num_classes,
        seed=config.seed,
        process=accelerator.process_index,
    )


def dry_run(model: nn.Module, sample: Tensor, device: torch.device) -> None:
    """Pass one sample through the model on the CPU, so that parts that do not fit are reported before training starts.

    If training is on another device, this uses the equations: no kernel is built for the CPU, or missed there, and a
    backend that is forced for the device does not matter.
    """
    with nullcontext() if device.type == "cpu" else forced("reference"), torch.no_grad():
        model.eval()(sample[None])


def prepare(
    config: Config,
    derived: Derived,
    accelerator: Accelerator,
    plain: Any,
    checkpoint: Path | None,
    of_data: dict[str, Any],
) -> tuple[Any, Any, Any, Any, Position]:
    """Model, the same without its wrapper, averaged model, optimizer and position; all as in the checkpoint."""
    evaluation = of_data["evaluation"]
    settings: dict[str, Any] = {
        "total_batch": derived.total_batch,
        "samples": of_data["samples"],
        "labels": of_data["labels"],
        "settings": trajectory(config),
    }
    keys = ("accumulate", "batch_size", "channels_last", "compile", "compile_mode")
    division = {
        "processes": accelerator.num_processes,
        **{f"train.{key}": getattr(config.train, key) for key in keys},
        "device": accelerator.device.type,
        "processor": processor(accelerator.device),
        "PyTorch": str(torch.__version__),
        "threads": torch.get_num_threads() if accelerator.device.type == "cpu" else None,
    }
    if config.train.channels_last:
        plain.to(memory_format=torch.channels_last)
    ema = None
    if config.train.ema_decay is not None:
        from timm.utils import ModelEmaV3

        plain.to(accelerator.device)
        ema = ModelEmaV3(plain, decay=config.train.ema_decay)
    training = None
    if checkpoint is not None:
        training = load_checkpoint(checkpoint, plain, ema and ema.module)
        check_settings(training["position"], source=checkpoint, **settings)
        tell_changes(training["position"], settings["settings"], division, evaluation)
        training["position"] = replace(training["position"], **settings, division=division, evaluation=evaluation)
    if config.train.linear_probe:
        freeze_all_but_head(plain)
    if config.train.sync_bn:
        plain = nn.SyncBatchNorm.convert_sync_batchnorm(plain)
    if config.train.compile:
        plain.compile(mode=config.train.compile_mode)
    optimizer = at_the_door(
        build_optimizer,
        plain,
        name=config.optim.name,
        lr=derived.lr,
        weight_decay=config.optim.weight_decay,
        eps=config.optim.eps,
        betas=config.optim.betas,
        trust_clip=config.optim.trust_clip,
        layer_decay=config.optim.layer_decay,
    )
    model, optimizer = accelerator.prepare(plain, optimizer)
    if training is None:
        position = Position(**settings, division=division, evaluation=evaluation, run=uuid.uuid4().hex)
        return model, accelerator.unwrap_model(model), ema, optimizer, position
    restore_optimizer(accelerator, model, optimizer, training["optimizer"])
    if accelerator.scaler is not None and training["scaler"] is not None:
        accelerator.scaler.load_state_dict(training["scaler"])
    return model, accelerator.unwrap_model(model), ema, optimizer, training["position"]


def describe_data(config: Config, train_set: Any, test_set: Any) -> dict[str, Any]:
    """What a position records of the data: `samples` and `labels` of the training set, and what is evaluated on."""
    keys = {f"data.{key}": getattr(config.data, key) for key in ("test_samples", "crop_pct")}
    return {
        "samples": len(train_set),
        "labels": hashlib.sha256(np.asarray(train_set.targets, dtype="<i8").tobytes()).hexdigest(),
        "evaluation": keys | {"the number of evaluation samples": len(test_set)},
    }


def describe(config: Config, derived: Derived, accelerator: Accelerator, plain: Any, note: str) -> str:
    """The first line of a run."""
    params = sum(p.numel() for p in plain.parameters())
    steps, batch = counted(derived.total_steps, "step"), counted(derived.total_batch, "sample")
    return (
        f"{config.model.name} ({params:,} parameters, {note}) on {config.data.name}: {steps} of {batch} "
        f"({derived.processes} x {config.train.accumulate} x {config.train.batch_size}), learning rate "
        f"{derived.lr:.3g}; {accelerator.device.type}, {torch.get_num_threads()} thread(s) and {config.data.workers} "
        f"loader process(es) each"
    )


def at_the_door(make: Callable[..., T], *args: Any, **options: Any) -> T:
    """Call `make(...)`, and turn its errors into `ConfigError`s."""
    try:
        return make(*args, **options)
    except (ValueError, OSError, ImportError) as error:
        raise error if isinstance(error, ConfigError) else ConfigError(str(error)) from error


def agreed(accelerator: Accelerator, decide: Callable[[], T]) -> T:
    """The result of `decide` on the first process, or its `ConfigError`, on all processes."""
    answer: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            answer[0] = decide()
        except ConfigError as error:
            answer[1] = str(error)
    broadcast_object_list(answer)
    if answer[1] is not None:
        raise ConfigError(answer[1])
    return answer[0]  # type: ignore[no-any-return]
