"""timm's train.py and validate.py take the models: their calls in their order, and the scripts where they are."""

import copy
import json
import os
import subprocess
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import Mixup, create_dataset, create_loader, resolve_data_config
from timm.layers import convert_sync_batchnorm
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import load_checkpoint, model_parameters, resume_checkpoint, safe_model_name
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import CheckpointSaver, ModelEmaV3, accuracy, dispatch_clip_grad, reparameterize_model, update_summary
from torch import nn

import sdt_blocks.models.timm  # noqa: F401
from sdt_blocks import example_images
from sdt_blocks.analysis import firing_rates

# What the scripts' parsers give where nothing is said.
ARGUMENTS = Namespace(
    opt="adamw", lr=1e-2, weight_decay=0.05, momentum=0.9, layer_decay=0.9, sched="cosine", epochs=2, warmup_epochs=0,
    warmup_lr=1e-5, eval_metric="top1", model="", interpolation="", input_size=(3, 32, 32), img_size=None,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of digits in class folders, odd and even ones."""
    root = tmp_path_factory.mktemp("images")
    for split in ("train", "validation"):
        for i, (image, label) in enumerate(zip(*example_images(), strict=True)):
            place = root / split / str(label.item() % 2)
            place.mkdir(parents=True, exist_ok=True)
            gray = (image[0] - image.min()) / (image.max() - image.min()) * 255
            Image.fromarray(gray.numpy().astype(np.uint8)).save(place / f"{i}.png")
    return root


def loaders(data, folder):
    make = partial(create_loader, input_size=data["input_size"], batch_size=8, use_prefetcher=False, num_workers=0)
    sets = [create_dataset("", root=str(folder), split=split) for split in ("train", "validation")]
    prepared = {key: data[key] for key in ("interpolation", "mean", "std")}
    train = make(sets[0], is_training=True, color_jitter=0.4, re_prob=0.1, hflip=0.5, **prepared)
    return train, make(sets[1], is_training=False, crop_pct=data["crop_pct"], **prepared)


def validate(model, loader):
    model.eval()
    hits, total, losses = 0.0, 0, []
    with torch.inference_mode():
        model(torch.randn(8, 3, 32, 32).contiguous(memory_format=torch.channels_last))
        for images, labels in loader:
            output = model(images.contiguous(memory_format=torch.channels_last))
            losses.append(nn.functional.cross_entropy(output, labels).item())
            hits += accuracy(output, labels, topk=(1, 2))[0].item() * len(labels)
            total += len(labels)
    return {"loss": float(np.mean(losses)), "top1": hits / total}


def test_the_calls_of_the_scripts_in_their_order(small, folder, tmp_path):
    """create, checkpointed blocks, channels_last, optimizer, average, loaders, saver, schedule, epochs, validation."""
    torch.manual_seed(0)
    known = {
        "drop_rate": 0.0,
        "drop_path_rate": None,
        "drop_block_rate": None,
        "global_pool": None,
        "scriptable": False,
    }
    options = {key: value for key, value in small.options.items() if key != "num_classes"}
    model = timm.create_model(
        small.name,
        pretrained=False,
        in_chans=3,
        num_classes=2,
        bn_momentum=None,
        checkpoint_path="",
        **known,
        **options,
    )
    with torch.no_grad():
        model.get_classifier().weight.mul_(1.0)
        nn.init.constant_(model.get_classifier().bias, 0.1)
        for name, value in small.model.state_dict().items():
            if not name.startswith("head"):  # which fires
                model.state_dict()[name].copy_(value)
    model.set_grad_checkpointing(enable=True)
    assert safe_model_name(small.name) == small.name and model.num_classes == 2
    data = resolve_data_config(vars(ARGUMENTS), model=model)
    assert data["input_size"] == (3, 32, 32)
    model.to(device=torch.device("cpu")).to(memory_format=torch.channels_last)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=ARGUMENTS))
    average = ModelEmaV3(model, decay=0.5)
    train_loader, test_loader = loaders(data, folder)
    mixup = Mixup(mixup_alpha=0.2, cutmix_alpha=0.2, label_smoothing=0.1, num_classes=2)
    losses = {True: SoftTargetCrossEntropy(), False: LabelSmoothingCrossEntropy(smoothing=0.1)}
    arguments = Namespace(**{**vars(ARGUMENTS), "model": small.name})
    places = {"checkpoint_dir": str(tmp_path), "recovery_dir": str(tmp_path)}
    saver = CheckpointSaver(model=model, optimizer=optimizer, args=arguments, model_ema=average, **places)
    scheduler, epochs = create_scheduler_v2(
        optimizer, **scheduler_kwargs(ARGUMENTS), updates_per_epoch=len(train_loader)
    )
    before = {name: value.clone() for name, value in model.named_parameters()}
    for epoch in range(epochs):
        model.train()
        optimizer.zero_grad()
        for number, (images, labels) in enumerate(train_loader):
            if number == 0:
                images, labels = mixup(images, labels)
            output = model(images.contiguous(memory_format=torch.channels_last))
            losses[number == 0](output, labels).backward()
            dispatch_clip_grad(model_parameters(model, exclude_head=True), value=0.02, mode="agc")
            optimizer.step()
            optimizer.zero_grad()
            average.update(model, step=number)
            scheduler.step_update(num_updates=epoch * len(train_loader) + number)
        saver.save_recovery(epoch, batch_idx=0)
        metrics = validate(average.module, test_loader)
        update_summary(epoch, {"loss": 1.0}, metrics, filename=str(tmp_path / "summary.csv"), write_header=epoch == 0)
        best, best_epoch = saver.save_checkpoint(epoch, metric=metrics["top1"])
        scheduler.step(epoch + 1, metrics["top1"])
    assert epochs == 2 and best == max(best, metrics["top1"]) and 0 <= best_epoch < 2
    moved = [name for name, value in model.named_parameters() if not torch.equal(value, before[name])]
    assert len(moved) > 0.9 * len(before) and all(value.isfinite().all() for value in model.state_dict().values())
    assert firing_rates(model.eval(), small.images).mean > 0.01

    resumed = copy.deepcopy(model)
    for parameter in resumed.parameters():
        nn.init.zeros_(parameter)
    assert resume_checkpoint(resumed, str(tmp_path / "last.pth.tar"), optimizer=optimizer, log_info=False) == 2
    expected = model(small.images)
    assert torch.equal(resumed(small.images), expected) and expected.std() > 0
    load_checkpoint(resumed, str(tmp_path / "last.pth.tar"), use_ema=True)
    assert torch.equal(resumed.eval()(small.images), average.module(small.images))
    assert validate(reparameterize_model(resumed), test_loader) == metrics
    assert sum(isinstance(layer, nn.SyncBatchNorm) for layer in convert_sync_batchnorm(resumed).modules()) > 5


def run_script(script, *arguments):
    """A script as the documentation says to start it: what it prints."""
    command = [sys.executable, "-m", "sdt_blocks.models.timm", str(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=script.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_a_script_is_started_with_the_names_known(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys, timm; print(__name__, sys.argv[1:], timm.create_model('sdt_2_256').num_classes)")
    assert "__main__ ['--model', 'x'] 10" in run_script(script, "--model", "x")


@pytest.mark.skipif("TIMM_SCRIPTS" not in os.environ, reason="TIMM_SCRIPTS names no folder with timm's train.py")
def test_the_scripts_themselves(folder, tmp_path):
    """train.py and validate.py of timm's repository, of the version that is installed."""
    scripts = Path(os.environ["TIMM_SCRIPTS"]).resolve()
    model = ["--model", "sdt_2_256", "--num-classes", 2, "--model-kwargs", "dim=32", "time_steps=2"]
    small = ["--input-size", 3, 32, 32, "--batch-size", 10, "--workers", 0, "--no-prefetcher"]
    common = ["--data-dir", folder, "--device", "cpu", *model, *small]
    run = ["--epochs", 2, "--warmup-epochs", 0, "--opt", "adamw", "--lr", 1e-3, "--layer-decay", 0.9, "--model-ema"]
    more = ["--drop-path", 0.1, "--mixup", 0.2, "--grad-checkpointing", "--channels-last"]
    run_script(scripts / "train.py", *common, *run, *more, "--output", tmp_path, "--experiment", "run")
    assert len((tmp_path / "run" / "summary.csv").read_text().splitlines()) == 3
    said = run_script(
        scripts / "validate.py",
        *common,
        "--checkpoint",
        tmp_path / "run" / "last.pth.tar",
        "--use-ema",
    )
    result = json.loads(said.partition("--result\n")[2].partition("\n}")[0] + "\n}")
    assert result["model"] == "sdt_2_256" and result["img_size"] == 32 and 0 <= result["top1"] <= 100
