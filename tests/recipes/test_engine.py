"""What a step of training does, against closed forms and sums made by hand."""

from __future__ import annotations

import json
import math
import shutil
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from common.config import ConfigError, RunError
from common.update import learning_rate_at
from launching import TINY, read_lines, read_summary
from omegaconf import OmegaConf
from torch.nn import functional as F

from sdt_blocks import load_model, load_released_checkpoint

QUIET = ("threads=1", "tracker=none")
PLAIN = (*TINY, "data.mixup=0", "data.cutmix=0", "data.auto_augment=null", "model.drop_path=0", "train.ema_decay=null")


def one_update(run):
    from common.loading import fetch
    from common.update import Clock, update

    run.train_loader.dataset.set_epoch(0)
    run.batches.seek(0, run.position.step)
    loss = update(run, fetch(run.train_loader), Clock(), 0)
    run.position.step += 1
    return loss


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def test_the_run_folder_holds_what_the_readme_says(train, tmp_path):
    run = train(*TINY, "output_dir=run", "train.epochs=2", "tracker=tensorboard")
    folder = tmp_path / "run"
    summary, lines = read_summary(folder), read_lines(folder)
    assert [line["epoch"] for line in lines] == [1, 2]
    for key in ("lr", "train_loss", "images_per_second", "data_wait", "peak_memory_mib", "firing_rate", "test_loss"):
        assert math.isfinite(lines[-1][key]), key
    assert 0 <= lines[-1]["data_wait"] <= 1 and 0 <= lines[-1]["firing_rate"] <= 1
    assert summary["test_top1"] == lines[-1]["test_top1"] and summary["loss"] == lines[-1]["test_loss"]
    assert summary["epochs"] == 2 and summary["steps"] == 16
    assert [line["lr"] for line in lines] == [learning_rate_at(run, step) for step in (7, 15)], "of its last update"
    assert summary["params"] == sum(p.numel() for p in load_model(folder / "last").parameters())
    from hashlib import sha256

    assert summary["weights_sha256"] == sha256((folder / "last" / "model.safetensors").read_bytes()).hexdigest()
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list(folder.glob("tensorboard/sdt/events.out.tfevents.*"))
    resolved = OmegaConf.load(folder / "config.yaml")
    assert resolved.model.num_classes == 10 and resolved.model.in_channels == 1
    assert resolved.derived.total_batch == 32 and resolved.derived.total_steps == 16
    assert load_model(folder).num_classes == 10
    assert run.position.best_top1 == max(max(line["test_top1"], line["ema_test_top1"]) for line in lines)


def test_the_reported_accuracy_is_that_of_the_saved_weights(train, tmp_path):
    run = train(*PLAIN, "output_dir=run", "train.epochs=2", "data.test_samples=50")
    model = load_model(tmp_path / "run" / "last")
    images, targets = zip(*(run.test_loader.dataset[i] for i in range(50)), strict=True)
    with torch.no_grad():
        logits = model(torch.stack(images))
    targets = torch.tensor(targets)
    summary = read_summary(tmp_path / "run")
    assert summary["test_top1"] == pytest.approx(100 * (logits.argmax(1) == targets).double().mean().item())
    in_five = (logits.argsort(1, descending=True)[:, :5] == targets[:, None]).any(1)
    assert summary["test_top5"] == pytest.approx(100 * in_five.double().mean().item())
    assert summary["loss"] == pytest.approx(F.cross_entropy(logits.double(), targets).item(), rel=1e-5)


def test_an_epoch_that_only_its_evaluation_is_left_of_has_no_rate(set_up, tmp_path, capsys):
    from common.engine import save, train, train_epoch

    settings = (*PLAIN, "output_dir=run", "train.epochs=1")
    run = set_up(*settings)
    train_epoch(run)
    save(run)
    run.lock.release()
    capsys.readouterr()
    train(set_up(*settings))
    (line,) = read_lines(tmp_path / "run")
    assert line["images_per_second"] is line["data_wait"] is None
    assert line["step"] == 8 and line["train_loss"] > 1 and "images/s" not in capsys.readouterr().out


def test_the_average_follows_its_recurrence(set_up):
    run = set_up(*PLAIN, "output_dir=run", "train.ema_decay=0.7")
    expected = {key: value.double() for key, value in state(run.plain).items()}
    for step in range(4):
        one_update(run)
        # timm starts the average with the weights after the first update.
        decay = 0.7 if step else 0.0
        for key, value in run.plain.state_dict().items():
            expected[key] = decay * expected[key] + (1 - decay) * value.double()
    for key, value in run.ema.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), expected[key], rtol=1e-5, atol=1e-7)


def test_each_pass_has_draws_of_its_own_and_each_update_its_rate(set_up, monkeypatch):
    """Two epochs of two updates of two passes: order, augmentation, mixing, stochastic depth, learning rate, loss."""
    from common.engine import train
    from common.loading import EpochBatches

    options = ("data.train_samples=70", "data.test_samples=10", "train.batch_size=16", "train.accumulate=2")
    run = set_up(*PLAIN, *options, "output_dir=run", "train.epochs=2", "seed=7")
    dataset, labels, passes, seeds, losses = run.train_loader.dataset.dataset, [], [], [], []

    def mixer(inputs, targets, *, step, epoch):
        labels.append(targets.tolist())
        passes.append((step, epoch, int(dataset._epoch), run.optimizer.param_groups[0]["lr"]))
        return inputs, targets

    run.mixer = mixer
    run.display.advance = lambda step, *, epoch, loss, rate: losses.append(loss)
    monkeypatch.setattr("common.update.seed_step", lambda *key: seeds.append(key))
    train(run)
    assert passes == [(i, i // 4, i // 4, learning_rate_at(run, i // 2)) for i in range(8)]
    assert seeds == [(7, i, 0) for i in range(8)]
    order = EpochBatches(70, batch_size=16, accumulate=2, seed=7)
    for epoch in range(2):
        order.seek(epoch, 0)
        assert labels[4 * epoch : 4 * epoch + 4] == [dataset.targets[batch].tolist() for batch in order]
        assert read_lines(run.folder)[epoch]["train_loss"] == pytest.approx(sum(losses[2 * epoch : 2 * epoch + 2]) / 2)


def test_processes_agree_on_means_and_count_the_requests_to_stop():
    from common.update import exchange

    four = SimpleNamespace(num_processes=4, reduce=lambda values, how: {"sum": 4 * values}[how])
    assert exchange(four, torch.tensor(2.5), torch.tensor(3.0), torch.tensor(7.0), 1.0) == [2.5, 3.0, 7.0, 4.0]


def test_accumulation_gives_the_gradient_of_the_whole_batch(set_up, train, tmp_path):
    # The batch statistics are frozen in linear probing, so that a sample's gradient does not depend on its batch.
    train(*PLAIN, "output_dir=first", "train.epochs=2")
    probe = (*PLAIN, "train.linear_probe=true", "train.init_checkpoint=first", "resume=none")
    whole = set_up(*probe, "output_dir=whole", "train.batch_size=32")
    expected = [one_update(whole) for _ in range(3)]
    parts = set_up(*probe, "output_dir=parts", "train.batch_size=8", "train.accumulate=4")
    assert parts.derived.total_batch == 32
    assert [one_update(parts) for _ in range(3)] == pytest.approx(expected, rel=1e-5)
    for a, b in zip(whole.plain.head.parameters(), parts.plain.head.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_clipping_bounds_what_an_update_moves(set_up):
    options = ("optim.name=sgd", "optim.betas=[0.5,0.9]", "optim.weight_decay=0", "optim.warmup_lr=3e-3")
    moved = {}
    for clip in ("null", "1e-3"):
        run = set_up(*PLAIN, *options, f"optim.clip_grad={clip}", f"output_dir={clip}")
        before = torch.cat([p.detach().flatten().clone() for p in run.plain.parameters()])
        one_update(run)
        after = torch.cat([p.detach().flatten() for p in run.plain.parameters()])
        moved[clip] = (after - before).norm().item()
    # Nesterov's first step is (1 + momentum) times the gradient.
    assert moved["1e-3"] == pytest.approx(3e-3 * 1.5 * 1e-3, rel=1e-2)
    assert moved["null"] > 10 * moved["1e-3"]


def test_fine_tuning_replaces_the_head_only_where_the_classes_differ(set_up, train, tmp_path, photographs, capsys):
    train(*PLAIN, "output_dir=first", "train.epochs=2")
    folder = ("data.name=folder", f"data.root={photographs}", "model.in_channels=1")
    tuned = set_up(*PLAIN, *folder, "data.train_samples=null", "data.test_samples=null", "train.batch_size=8",
                   "train.init_checkpoint=first", "output_dir=tuned")  # fmt: skip
    old, new = load_model(tmp_path / "first").state_dict(), tuned.plain.state_dict()
    assert new["head.weight"].shape[0] == 2
    assert all(torch.equal(old[key], new[key]) for key in old if not key.startswith("head."))
    capsys.readouterr()
    same = set_up(*PLAIN, "train.init_checkpoint=first", "output_dir=same", "model.per_step=true")
    assert all(torch.equal(value, old[key]) for key, value in same.plain.state_dict().items())
    assert "weights from first)" in capsys.readouterr().out
    set_up(*PLAIN, "train.init_checkpoint=first", "output_dir=other", "model.num_heads=2", "neuron.tau=3")
    assert "weights from first; trained with num_heads=8 (here 2), neuron=lif (here {" in capsys.readouterr().out
    set_up(*PLAIN, "train.init_checkpoint=first", "output_dir=light", "data.mean=[0.25]", "data.interpolation=bicubic")
    out = capsys.readouterr().out
    assert "; trained with mean=[0.3] (here [0.25]), interpolation=bilinear (here bicubic))" in out


def test_linear_probing_moves_the_head_and_nothing_else(set_up, train):
    train(*PLAIN, "output_dir=first", "train.epochs=2")
    run = set_up(*PLAIN, "train.linear_probe=true", "train.init_checkpoint=first", "output_dir=probe")
    before = state(run.plain)
    for _ in range(2):
        one_update(run)
    for key, value in run.plain.state_dict().items():
        assert torch.equal(value, before[key]) != key.startswith("head."), key


def test_a_released_checkpoint_can_be_fine_tuned_and_another_architecture_is_refused(set_up, released_file):
    config = load_released_checkpoint(released_file).config
    same = [f"model.{key}={config[key]}" for key in ("depth", "dim", "num_heads", "mlp_ratio", "pooling", "time_steps")]
    options = ("data.img_size=64", f"train.init_checkpoint={released_file}", *QUIET, "data.train_samples=128")
    run = set_up(*same, *options, "model.in_channels=3", "output_dir=a", "data.mean=[0.3]", "data.std=[0.3]")
    weights = load_released_checkpoint(released_file).state_dict()
    key = "patch.stages.0.conv.weight"
    assert torch.equal(run.plain.state_dict()[key], weights[key])
    with pytest.raises(ConfigError, match=r"another architecture: .* set model.name"):
        set_up(*options, "output_dir=b")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("output", "the loss is nan"),
        ("gradient", "the gradient is nan (the loss is "),
        ("input", "patch.stages.0.norm.running_mean is no longer finite (the loss is "),
        ("statistics", "patch.stages.1.norm.running_var is no longer finite (the loss is "),
    ],
)
def test_a_non_finite_step_stops_with_its_number_rate_and_checkpoint(set_up, monkeypatch, what, message):
    from common.engine import train

    run = set_up(*PLAIN, "output_dir=run", "train.checkpoint_steps=2")
    spoil(run, what, at=[5], monkeypatch=monkeypatch)
    with pytest.raises(RunError) as caught:
        train(run)
    told = str(caught.value)
    assert told.startswith(message)
    assert "at step 5 (epoch 1, learning rate 0.00" in told
    assert "the last good checkpoint is run/checkpoints/step_00000004." in told
    assert "train.skip_nonfinite=K" in told


def test_a_first_step_that_is_not_finite_is_no_matter_of_its_rate(set_up, monkeypatch):
    from common.engine import train

    run = set_up(*PLAIN, "output_dir=run")
    spoil(run, "gradient", at=[0], monkeypatch=monkeypatch)
    with pytest.raises(RunError, match=r"at step 0 .*No update has changed a weight.* larger inputs") as caught:
        train(run)
    assert "optim.lr" not in str(caught.value)


def test_non_finite_steps_can_be_skipped_and_leave_no_trace(set_up, monkeypatch, tmp_path):
    from common.engine import train

    run = set_up(*PLAIN, "output_dir=run", "train.skip_nonfinite=2", "train.max_steps=8")
    spoil(run, "input", at=[3, 5], monkeypatch=monkeypatch)
    train(run)
    assert read_lines(tmp_path / "run")[-1]["nonfinite_steps"] == 2
    assert all(value.isfinite().all() for value in load_model(tmp_path / "run" / "last").state_dict().values())
    run = set_up(*PLAIN, "output_dir=more", "train.skip_nonfinite=2")
    spoil(run, "output", at=[3, 5, 6], monkeypatch=monkeypatch)
    with pytest.raises(RunError, match="at step 6"):
        train(run)


def spoil(run, what, at, monkeypatch):
    """Makes something not finite at these updates; all but the output leaves the loss finite."""
    forward = type(run.plain).forward

    def spoiled(model, inputs):
        if model is not run.plain or not model.training or run.position.step not in at:
            return forward(model, inputs)
        logits = forward(model, inputs * math.nan if what == "input" else inputs)
        if what == "statistics":
            run.plain.get_buffer("patch.stages.1.norm.running_var")[1] = math.inf
        if what == "gradient":
            logits.register_hook(lambda gradient: gradient * math.nan)
        return logits * math.nan if what == "output" else logits

    # The class's own, since a model with another forward than its class is not saved.
    monkeypatch.setattr(type(run.plain), "forward", spoiled)


def test_with_a_gradient_scaler_statistics_must_be_finite_and_gradients_need_not(set_up, monkeypatch):
    from accelerate.optimizer import AcceleratedOptimizer

    run = set_up(*PLAIN, "output_dir=run", "train.skip_nonfinite=1")
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    run.accelerator.scaler, run.optimizer = scaler, AcceleratedOptimizer(run.optimizer.optimizer, scaler=scaler)
    monkeypatch.setattr(run.accelerator, "unscale_gradients", lambda: scaler.unscale_(run.optimizer.optimizer))
    one_update(run)
    spoil(run, "statistics", at=[1], monkeypatch=monkeypatch)
    before = state(run.plain)
    assert math.isnan(one_update(run)) and run.position.nonfinite == 1
    for key, value in run.plain.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert scaler.get_scale() == 8
    spoil(run, "gradient", at=[2], monkeypatch=monkeypatch)
    assert math.isfinite(one_update(run)) and run.position.nonfinite == 1
    assert scaler.get_scale() == 4, "an overflow lowers the scale and is no fault"
    assert math.isfinite(one_update(run))
    assert not torch.equal(run.plain.head.weight, before["head.weight"])
    spoil(run, "statistics", at=[4], monkeypatch=monkeypatch)
    with pytest.raises(RunError, match="running_var is no longer finite"):
        one_update(run)


def test_chance_of_a_silent_network_is_neither_reported_nor_the_best(set_up, monkeypatch, tmp_path, capsys):
    from common import engine
    from common.evaluation import Evaluation

    answers = iter([(30.0, 0.0), (20.0, 0.1), (25.0, 0.1), (40.0, 0.0)])

    def evaluate(*_, **__):
        top1, rate = next(answers)
        return Evaluation(2.0, {"top1": top1}, torch.eye(10, dtype=torch.int64), rate, 10, (8, 8), "")

    monkeypatch.setattr(engine, "evaluate", evaluate)
    best, save_weights = [], engine.save_weights
    monkeypatch.setattr(
        engine,
        "save_weights",
        lambda run, name, model: best.append((name, run.epoch)) or save_weights(run, name, model),
    )
    engine.train(set_up(*PLAIN, "output_dir=run", "train.epochs=4"))
    summary = read_summary(tmp_path / "run")
    assert [number for name, number in best if name == "best"] == [0, 1, 2]
    assert summary["best_epoch"] == 3 and summary["best_top1"] == 25 and summary["best_silent"] is False
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("evaluation is still silent (no neuron fires") and "%" not in last


def test_the_best_model_is_the_averaged_one_where_that_is_the_better(set_up, monkeypatch, tmp_path):
    from common import engine
    from common.evaluation import Evaluation

    def evaluate(model, *_, **__):
        top1 = 50.0 if model is run.ema.module else 30.0
        return Evaluation(2.0, {"top1": top1}, torch.eye(10, dtype=torch.int64), 0.1, 10, (8, 8), "")

    monkeypatch.setattr(engine, "evaluate", evaluate)
    run = set_up(*PLAIN, "output_dir=run", "train.ema_decay=0.9", "train.max_steps=3")
    engine.train(run)
    best = load_model(tmp_path / "run" / "best").state_dict()
    assert all(torch.equal(value, best[key]) for key, value in run.ema.module.state_dict().items())
    assert not torch.equal(run.plain.head.weight, best["head.weight"]) and run.position.best_top1 == 50


def test_layers_that_never_fired_are_named_at_the_end(set_up, monkeypatch, capsys):
    from common import engine
    from common.evaluation import Evaluation

    counts = torch.eye(10, dtype=torch.int64)
    sentence = "1 of 12 neuron layers never fired: blocks.0.attention.branch.mixer.neuron"
    for rate, told in ((0.1, 1), (0.0, 0)):
        result = Evaluation(2.0, {"top1": 30.0}, counts, rate, 10, (8, 8), sentence)
        monkeypatch.setattr(engine, "evaluate", lambda *_, result=result, **__: result)
        engine.train(set_up(*PLAIN, f"output_dir=run_{told}", "train.epochs=2"))
        assert capsys.readouterr().out.count(sentence) == told


def test_weights_that_are_not_finite_are_never_saved(set_up):
    from common.engine import save

    run = set_up(*PLAIN, "output_dir=run")
    with torch.no_grad():
        run.plain.head.weight[0, 0] = math.inf
    with pytest.raises(RunError, match=r"head.weight is no longer finite; there is no earlier checkpoint"):
        save(run)


@pytest.mark.parametrize(
    "options",
    [
        ("train.mixed_precision=bf16",),
        ("train.channels_last=false", "optim.name=lamb", "data.random_erasing=0.5"),
        ("train.tet=true", "train.tet_lambda=0.05"),
        ("train.loss=bce", "data.mixup=0.2", "data.cutmix=1.0", "model.neuron=plif"),
        pytest.param(("train.compile=true", "train.compile_mode=reduce-overhead"), marks=pytest.mark.slow),
    ],
    ids=lambda options: options[0],
)
def test_options_train_and_save_float32_weights(train, tmp_path, options):
    train(*PLAIN, *options, "output_dir=run", "train.epochs=1", "train.warmup_epochs=0", "train.cooldown_epochs=1")
    lines = read_lines(tmp_path / "run")
    assert lines[1]["train_loss"] < lines[0]["train_loss"]
    model = load_model(tmp_path / "run" / "last")
    assert all(value.dtype in (torch.float32, torch.int64) for value in model.state_dict().values())


@pytest.mark.parametrize("given", ["null", "false"])
def test_convolutions_are_channels_last_on_a_cpu_unless_told_otherwise(set_up, given):
    run = set_up(*PLAIN, f"train.channels_last={given}", "train.ema_decay=0.9", "output_dir=run")
    expected = given == "null"
    assert OmegaConf.load(run.folder / "config.yaml").train.channels_last is expected
    weights = [w for net in (run.plain, run.ema) for w in net.parameters() if w.ndim == 4 and min(w.shape[1:]) > 1]
    assert len(weights) > 4
    assert {w.is_contiguous(memory_format=torch.channels_last) for w in weights} == {expected}


def test_the_model_is_compiled_in_the_mode_given(set_up, monkeypatch):
    given = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda _, **options: given.append(options))
    set_up(*PLAIN, "train.compile=true", "train.compile_mode=reduce-overhead", "output_dir=run")
    assert given == [{"mode": "reduce-overhead"}]


def test_fp16_without_a_gpu_is_said_and_becomes_float32(set_up, capsys):
    run = set_up(*PLAIN, "train.mixed_precision=fp16", "output_dir=run")
    assert "train.mixed_precision=fp16 needs a GPU" in capsys.readouterr().err
    assert OmegaConf.load(run.folder / "config.yaml").train.mixed_precision == "no"


def test_a_corrupt_image_names_its_file_or_is_counted(train, photographs, tmp_path):
    root = shutil.copytree(photographs, tmp_path / "photographs")
    for broken in ("train/china/3.jpg", "val/flower/2.jpg"):
        content = (root / broken).read_bytes()
        (root / broken).write_bytes(content[: len(content) // 3])
    options = (*PLAIN, "data.name=folder", f"data.root={root}", "data.train_samples=null", "data.test_samples=null",
               "train.batch_size=8", "train.epochs=1", "output_dir=run")  # fmt: skip
    with pytest.raises(RunError, match=r"china/3\.jpg cannot be read .*data\.on_error=skip"):
        train(*options)
    train(*options, "data.on_error=skip")
    (line,) = read_lines(tmp_path / "run")
    assert line["unreadable"] == 2
    assert line["test_samples"] == 13


@pytest.mark.filterwarnings("ignore:.*it is left out")
def test_what_was_trained_outlasts_an_evaluation_that_fails(train, photographs, tmp_path):
    root = shutil.copytree(photographs, tmp_path / "photographs")
    images = sorted((root / "val").rglob("*.jpg"))
    contents = {image: image.read_bytes() for image in images}
    options = (*PLAIN, "data.name=folder", f"data.root={root}", "data.train_samples=null", "data.test_samples=null",
               "train.batch_size=8", "train.epochs=1", "output_dir=run")  # fmt: skip
    for image in images:
        image.write_bytes(b"")
    saved = "the last good checkpoint is run/checkpoints/step_00000003"
    with pytest.raises(RunError, match=rf"val/china/.*\.jpg cannot be read .*{saved}"):
        train(*options)
    with pytest.raises(RunError, match=f"not one sample of the evaluation set could be read.*{saved}"):
        train(*options, "data.on_error=skip")
    for image, content in contents.items():
        image.write_bytes(content)
    train(*options)
    (line,) = read_lines(tmp_path / "run")
    assert line["test_samples"] == 14 and line["images_per_second"] is None and line["train_loss"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("data.name=folder",), "data.root=DIR"),
        (("data.name=digit",), "did you mean digits?"),
        (("data.auto_augment=rnd-m5",), "'rnd-m5' is unknown"),
        (("train.batch_size=2000",), "do not fill one batch of train.batch_size=2000; lower it to 260 or less"),
        (("train.batch_size=31", "data.mixup=0.5"), "must be even, got 31"),
        (("model.num_classes=7",), "model.num_classes=7, but the data has 10"),
        (("model.dim=20",), "dim"),
        (("train.sync_bn=true",), "runs on GPUs only"),
        (("train.init_checkpoint=nowhere",), "train.init_checkpoint: nowhere: no such file"),
        (("resume=nowhere",), "resume=nowhere: not a good checkpoint"),
        (("data.train_samples=5000",), "data.train_samples: 5000 samples were asked for"),
    ],
)
def test_what_cannot_work_is_refused_before_training(set_up, tmp_path, arguments, message):
    with pytest.raises(ConfigError) as caught:
        set_up(*PLAIN, "output_dir=run", *arguments)
    assert message in str(caught.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_too_little_space_is_said_before_training(set_up, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ConfigError, match=r"output_dir=run: the checkpoints need about .* MB are free"):
        set_up(*PLAIN, "output_dir=run")


def test_the_manifest_lists_every_file_with_its_digest(train, tmp_path):
    train(*TINY, "output_dir=run", "train.max_steps=2")
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    files = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}
    assert set(manifest) == files - {"manifest.json"}
    from common.run_state import damage

    assert damage(checkpoint) == ""
    for name in manifest:
        (checkpoint / name).rename(tmp_path / "away")
        assert damage(checkpoint) == f"{name} is missing"
        (tmp_path / "away").rename(checkpoint / name)


def test_analyze_writes_its_page_into_the_run_folder(train, tmp_path):
    train(*PLAIN, "output_dir=run", "train.max_steps=2", "analyze=true", "data.test_samples=40")
    written = {path.name for path in (tmp_path / "run" / "analysis").iterdir()}
    assert {"index.html", "energy.json", "rates.csv", "audit.txt"} <= written


def test_a_stop_amid_the_passes_of_an_update_leaves_it_untaken(set_up, monkeypatch):
    from common.engine import train

    run = set_up(*PLAIN, "output_dir=run", "train.batch_size=8", "train.accumulate=4")
    before, forward, passes = state(run.plain), type(run.plain).forward, []

    def counting(model, inputs):
        passes.append(1)
        if len(passes) == 2:
            run.stop._received = 15
        return forward(model, inputs)

    monkeypatch.setattr(type(run.plain), "forward", counting)
    with pytest.raises(SystemExit) as end:
        train(run)
    assert end.value.code == 143 and len(passes) == 2
    assert (run.folder / "checkpoints" / "step_00000000").is_dir()
    for key, value in run.plain.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_a_tracker_that_fails_is_blamed(set_up, monkeypatch, capsys, tmp_path):
    from accelerate import Accelerator
    from common.engine import train

    def fail(*_, **__):
        raise RuntimeError("no account")

    monkeypatch.setattr(Accelerator, "log", fail)
    train(set_up(*PLAIN, "output_dir=run", "train.max_steps=1"))
    assert "tracker=none failed (RuntimeError: no account); the run continues without it" in capsys.readouterr().err
    assert len(read_lines(tmp_path / "run")) == 1
    monkeypatch.setattr(Accelerator, "init_trackers", fail)
    with pytest.raises(ConfigError, match=r"tracker=none: the tracker cannot start \(RuntimeError: no account\)"):
        set_up(*PLAIN, "output_dir=other")
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"^tracker=wandb needs the package wandb"):
        set_up(*PLAIN, "output_dir=third", "tracker=wandb")


TRACKED = """
class Run:
    def __init__(self, project):
        self.project, self.config, self.lines, self.finished = project, {}, [], False

    def log(self, values, step=None):
        self.lines.append((step, values))

    def finish(self):
        self.finished = True


def init(project, **options):
    global run, config
    run = Run(project)
    config = run.config = Config()
    return run


class Config(dict):
    def update(self, values, allow_val_change=False):
        super().update(values)
"""
"""What Accelerate calls of wandb, which is not installed here."""


def test_every_tracker_that_accelerate_knows_is_a_choice():
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS
    from common.progress import choose_tracker
    from common.schema import TRACKERS

    assert set(TRACKERS) == {"auto", "none", "all", *LOGGER_TYPE_TO_CLASS}
    assert choose_tracker("none") is None and choose_tracker("auto") == ["tensorboard"]
    missing = [name for name in LOGGER_TYPE_TO_CLASS if not find_spec(name)]
    assert missing
    for name in missing:
        with pytest.raises(ConfigError, match=rf"tracker={name} needs the package {name}.*pip install {name}"):
            choose_tracker(name)


def test_all_trackers_are_those_that_are_installed(set_up, tmp_path, monkeypatch, capsys):
    from accelerate import tracking
    from accelerate.utils import LoggerType
    from common.engine import train

    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / "wandb.py").write_text(TRACKED)
    (packages / "trackio.py").write_text("raise RuntimeError('half installed')")
    monkeypatch.syspath_prepend(packages)
    monkeypatch.setattr(
        tracking, "_available_trackers", [LoggerType(name) for name in ("tensorboard", "trackio", "wandb")]
    )
    train(set_up(*PLAIN, "output_dir=run", "tracker=all", "train.max_steps=1"))
    import wandb

    (line,) = read_lines(tmp_path / "run")
    ((step, values),) = wandb.run.lines
    assert step == 1 and values == {key: value for key, value in line.items() if isinstance(value, int | float)}
    assert wandb.run.finished and wandb.config["train.max_steps"] == "1" and wandb.config["derived.total_steps"] == "1"
    assert list((tmp_path / "run").glob("tensorboard/sdt/events.out.tfevents.*"))
    assert "package trackio, which cannot be imported (half installed)" in capsys.readouterr().err
    monkeypatch.delitem(sys.modules, "wandb")
    monkeypatch.setattr(tracking, "_available_trackers", [])
    with pytest.raises(ConfigError, match="tracker=all finds no tracker"):
        set_up(*PLAIN, "output_dir=other", "tracker=all")
    monkeypatch.delitem(tracking.LOGGER_TYPE_TO_CLASS, "swanlab")
    with pytest.raises(ConfigError, match="tracker=swanlab needs a newer Accelerate"):
        set_up(*PLAIN, "output_dir=other", "tracker=swanlab")


def test_a_line_appears_however_long_a_step_takes(monkeypatch, capsys):
    import time

    from common import progress

    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.05)
    with progress.Display(10, 0, active=True) as display:
        time.sleep(0.4)
        display.advance(1, epoch=0, loss=2.0, rate=5.0)
        time.sleep(0.4)
    lines = capsys.readouterr().out.splitlines()
    assert "the first step is under way | step 0/10" in lines
    later = [line for line in lines if line.startswith("epoch 1 | loss 2.0000 | 5 images/s | step 1/10 | 0:00:")]
    assert len(later) > 1 and len(set(later)) == 1  # what no step takes does not make the others longer
