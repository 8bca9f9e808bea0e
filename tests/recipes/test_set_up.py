"""What a configuration says reaches the part that it is about."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from common import set_up as module
from common.config import ConfigError, load_config
from common.engine import save
from common.loading import build_datasets
from common.optim import build_loss, distilled
from common.set_up import build_batches, build_loss_of, build_mixer, check_machine
from common.update import learning_rate_at
from launching import TINY

SECOND = SimpleNamespace(process_index=1, num_processes=2)


def test_the_optimizer_and_its_schedule(set_up):
    run = set_up(
        *TINY, "output_dir=run", "optim.name=lamb", "optim.weight_decay=0.3", "optim.eps=1e-5", "optim.betas=[0.7,0.8]",
        "optim.trust_clip=true", "optim.layer_decay=0.5", "optim.lr=4e-3", "optim.min_lr=1e-3", "optim.warmup_lr=5e-4",
        "optim.lr_batch=16", "train.epochs=4", "train.warmup_epochs=1", "train.cooldown_epochs=1",
        "train.warmup_prefix=true",
    )  # fmt: skip
    decayed = [group for group in run.optimizer.param_groups if group["weight_decay"]]
    for group in decayed:
        found = [group[key] for key in ("weight_decay", "eps", "betas", "trust_clip")]
        assert found == [0.3, 1e-5, (0.7, 0.8), True]
    assert sorted(group["lr_scale"] for group in decayed)[-2:] == [0.5, 1.0]
    # Eight updates of 32 samples an epoch: every rate is twice that of 16. The cosine starts after the first epoch.
    assert run.derived.total_steps == 40
    rates = [learning_rate_at(run, step) for step in (0, 4, 8, 20, 32, 39)]
    assert rates == pytest.approx([1e-3, 4.5e-3, 8e-3, 5e-3, 2e-3, 2e-3])


@pytest.mark.parametrize(
    ("process", "of_machine", "steps"),
    [
        (0, True, ["read", "meet", "meet", "read"]),
        (1, False, ["meet", "meet", "read"]),
        (2, True, ["meet", "read", "meet", "read"]),
    ],
)
def test_one_process_of_each_machine_downloads_before_the_others_read(monkeypatch, process, of_machine, steps):
    """Where machines have one folder, that of the second finds what the first has downloaded."""
    found, told = [], []
    accelerator = SimpleNamespace(num_processes=4, is_main_process=process == 0, is_local_main_process=of_machine)
    config = load_config(["data.download=true"], default="cifar10_2_512")
    monkeypatch.setattr(module, "build_datasets", lambda *_, **__: found.append("read"))
    monkeypatch.setattr(module, "gather_object", lambda mine: found.append("meet") or mine + told)
    module.open_data(config, accelerator)
    assert found == steps
    told.append("cannot fetch it into /data/there")
    with pytest.raises(ConfigError, match="cannot fetch it into /data/there"):
        module.open_data(config, accelerator)
    assert found[len(steps) :] == (["read", "meet"] if process == 0 else ["meet"])


def test_the_mixer():
    arguments = ["data.mixup=0.3", "data.cutmix=0.6", "data.mixup_prob=0.4", "data.mixup_switch_prob=0.2"]
    arguments += ["data.mixup_off_epoch=9", "train.label_smoothing=0.25", "seed=7"]
    mixer = build_mixer(load_config(arguments, default="digits"), SECOND, torch.zeros(1, 8, 8), num_classes=6)
    assert (mixer.off_epoch, mixer.seed, mixer.process) == (9, 7, 1)
    names = ("mixup_alpha", "cutmix_alpha", "mix_prob", "switch_prob", "label_smoothing", "num_classes")
    assert [getattr(mixer.mix, name) for name in names] == [0.3, 0.6, 0.4, 0.2, 0.25, 6]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train.loss=bce"], build_loss("bce", label_smoothing=0.25)),
        (
            ["train.tet=true", "train.tet_lambda=0.3", "train.tet_means=2"],
            build_loss(label_smoothing=0.25, tet=True, tet_lambda=0.3, tet_means=2.0),
        ),
        (
            ["model.name=sdt_v2_15m", "model.dim=null", "model.pooling=null", "train.teacher=resnet18",
             "train.distillation=soft"],
            distilled(build_loss(label_smoothing=0.25), "soft"),
        ),
    ],
)  # fmt: skip
def test_the_loss(arguments, expected):
    train = load_config([*arguments, "train.label_smoothing=0.25"], default="digits").train
    one, two = torch.randn(2, 3, 4, 5)[:, 0 if not train.tet else slice(None)]
    targets = torch.tensor([0, 4, 2, 2])
    given = ((one, two), (targets, two.flip(0))) if train.teacher else (one, targets)
    assert build_loss_of(train)(*given) == expected(*given)


def test_each_process_has_its_share_of_the_training_samples():
    config = load_config(["train.batch_size=4", "train.accumulate=3", "seed=7"], default="digits")
    batches = build_batches(config, SECOND, samples=100)
    assert (batches.rank, batches.processes, batches.accumulate, batches.seed) == (1, 2, 3, 7)
    assert batches.updates == 4 and len(next(iter(batches))) == 4


@pytest.mark.parametrize(
    ("device", "kind", "arguments", "words"),
    [
        ("cuda", DistributedType.FSDP, ["train.ema_decay=0.9"], "averaged weights are not kept under FSDP"),
        ("cuda", DistributedType.FSDP, ["train.sync_bn=true"], None),
        ("cuda", DistributedType.MULTI_GPU, ["train.ema_decay=0.9", "train.sync_bn=true"], None),
        ("cpu", DistributedType.MULTI_CPU, ["train.sync_bn=true"], "runs on GPUs only"),
    ],
)
def test_what_a_machine_cannot_train_is_refused(device, kind, arguments, words):
    accelerator = SimpleNamespace(device=torch.device(device), distributed_type=kind)
    with pytest.raises(ConfigError, match=words) if words else nullcontext():
        check_machine(load_config(arguments, default="digits"), accelerator)


def test_a_gradient_scaler_goes_on_with_its_scale(set_up, monkeypatch):
    build = module.build_accelerator

    def with_scaler(config):
        accelerator, config = build(config)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        return accelerator, config

    monkeypatch.setattr(module, "build_accelerator", with_scaler)
    run = set_up(*TINY, "output_dir=run")
    scaler = run.accelerator.scaler
    scaler.load_state_dict(scaler.state_dict() | {"scale": 32.0, "_growth_tracker": 7})
    save(run)
    again = set_up(*TINY, "output_dir=run").accelerator.scaler
    assert again is not scaler and again.state_dict() == scaler.state_dict() and again.get_scale() == 32


def test_another_processor_or_version_is_said_on_resuming(set_up, monkeypatch, capsys):
    save(set_up(*TINY, "output_dir=run"))
    capsys.readouterr()
    set_up(*TINY, "output_dir=run")
    assert "warning" not in capsys.readouterr().err
    monkeypatch.setattr(module, "processor", lambda device: f"another {device.type}")
    set_up(*TINY, "output_dir=run")
    assert "computed otherwise than before (processor is another cpu and was " in capsys.readouterr().err


def test_one_class_is_nothing_to_train_on_and_may_be_judged(set_up, photographs, tmp_path):
    root = shutil.copytree(photographs, tmp_path / "photographs")
    for split in ("train", "val"):
        shutil.rmtree(root / split / "flower")
    arguments = [*TINY, "data.name=folder", f"data.root={root}", "data.train_samples=null", "data.test_samples=null"]
    with pytest.raises(ConfigError, match="the data has one class, 'china'; a classifier needs at least two"):
        set_up(*arguments, "output_dir=run")
    _, test = build_datasets(load_config(arguments, default="digits"), evaluation_only=True)
    assert test.classes == ["china"] and len(test) == 7
