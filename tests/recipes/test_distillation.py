"""Both published stages of Meta-SpikeFormer: their tables, a teacher for a second head, and some steps of each.

E-SpikeFormer learns from a teacher in the same way.
"""

import json
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from common.config import CONFIGS, ConfigError, load_config, to_yaml
from common.optim import build_loss, build_optimizer, distilled, learning_rate
from common.schema import Derived
from launching import read_lines
from safetensors.torch import save_file
from torch import nn

from sdt_blocks import DataCard, calibrate_norms, create_model, load_model, save_model
from sdt_blocks.blocks.integer import LAYER_SCALE

TEACHER = "resnet10t"
FEW = (
    "data.img_size=64", "data.workers=0", "train.batch_size=8", "threads=1", "tracker=none",
    "train.mixed_precision=no", "optim.lr_batch=8",
)  # fmt: skip
SMALL = (*FEW, "model.name=sdt_v2_15m", "model.dims=[16,16,16,24]", "model.depths=[1,1,1,1,1]")


@pytest.mark.parametrize(
    ("name", "epochs", "warmup", "batch", "lr", "steps"),
    [("imagenet_v2_t1", 200, 10, 128, 6e-4, 1), ("imagenet_v2_t4", 20, 2, 24, 2e-5, 4)],
)
def test_configurations_are_the_tables(name, epochs, warmup, batch, lr, steps):
    config = load_config([f"config={name}"], default="digits")
    train, optim, data = config.train, config.optim, config.data
    assert (train.epochs, train.warmup_epochs, train.cooldown_epochs, train.batch_size) == (epochs, warmup, 0, batch)
    assert (optim.name, optim.trust_clip, optim.weight_decay, optim.clip_grad) == ("lamb", True, 0.05, None)
    assert (optim.lr, optim.lr_batch, optim.warmup_lr, train.warmup_prefix) == (lr, 256, 0.0, True)
    assert optim.min_lr * 8 * batch / 256 == pytest.approx(1e-6)
    assert (config.model.time_steps, train.label_smoothing, train.mixed_precision) == (steps, 0.1, "fp16")
    assert (data.auto_augment, data.random_erasing, data.erasing_mode) == ("rand-m9-mstd0.5-inc1", 0.25, "pixel")
    assert (data.mixup, data.cutmix, data.hflip, data.interpolation) == (0, 0, 0.5, "bicubic")
    assert data.img_size / data.crop_pct == 256 and train.ema_decay is None and config.seed == 0
    first_stage = load_config(["config=imagenet_v2_t1"], default="digits").output_dir
    distils = (train.teacher, train.distillation, train.init_checkpoint)
    assert distils == (("caformer_b36.sail_in22k_ft_in1k", "hard", first_stage) if steps == 4 else (None, "hard", None))
    first = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert first == f"# accelerate launch recipes/imagenet.py config={name} data.root=DIR"


def test_the_cosine_starts_after_the_warm_up():
    schedule = {"steps_per_epoch": 10, "epochs": 12, "warmup_epochs": 2, "lr": 1.0, "min_lr": 0.1, "warmup_lr": 0.0}
    rates = [learning_rate(step, warmup_prefix=True, **schedule) for step in (0, 10, 20, 70, 119, 120)]
    assert rates[:4] == pytest.approx([0, 0.5, 1, 0.55]) and 0.1 < rates[4] < 0.11 and rates[5] == 0.1
    assert learning_rate(20, **schedule) < 1


def test_trust_clipping_bounds_the_layers_step():
    """A weight of norm 100 with a small gradient: LAMB steps by lr * |w|, clipped by lr."""
    changes = []
    for trust_clip in (False, True):
        layer = nn.Linear(10, 10, bias=False)
        nn.init.ones_(layer.weight)
        layer.weight.data *= 10
        optimizer = build_optimizer(layer, name="lamb", lr=0.1, weight_decay=1e-6, trust_clip=trust_clip)
        layer.weight.grad = torch.full((10, 10), 1e-3)
        before = layer.weight.detach().clone()
        optimizer.step()
        changes.append((layer.weight - before).abs().max().item())
    assert changes == pytest.approx([1.0, 0.1], rel=1e-3)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_the_loss_of_two_heads(kind):
    torch.manual_seed(0)
    logits, second, taught = torch.randn(3, 4, 5)
    targets = torch.tensor([0, 1, 2, 3])
    got = distilled(build_loss(label_smoothing=0.1), kind)((logits, second), (targets, taught))
    student, teacher = second.softmax(-1), taught.softmax(-1)
    expected = {
        "hard": -student.gather(1, taught.argmax(-1, keepdim=True)).log().mean(),
        "soft": (teacher * (teacher / student).log()).sum() / second.numel(),
    }[kind]
    torch.testing.assert_close(got, 0.5 * F.cross_entropy(logits, targets, label_smoothing=0.1) + 0.5 * expected)
    with pytest.raises(ValueError, match="distillation 'warm' is unknown"):
        distilled(build_loss(), "warm")


def firing(name="sdt_v2_15m", dims=(16, 16, 16, 24), **options):
    """The small model of these tests with one time step, its norms fitted to noise so that its neurons fire."""
    torch.manual_seed(0)
    model = create_model(name, dims=dims, depths=[1] * (len(dims) + 1), num_classes=2, time_steps=1, **options)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.bias, 1.0, 0.5)
    calibrate_norms(model, torch.randn(8, 3, 64, 64))
    return model


@pytest.fixture(scope="module")
def teacher_weights(tmp_path_factory):
    """A teacher of two classes, sure of class 1."""
    torch.manual_seed(0)
    model = timm.create_model(TEACHER, num_classes=2)
    with torch.no_grad():
        model.get_classifier().bias.copy_(torch.tensor([-50.0, 50.0]))
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_file(model.state_dict(), path)
    torch.save({"state_dict": model.state_dict()}, path.with_suffix(".pth"))
    return path


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_both_stages_on_photographs(train, photographs, teacher_weights, tmp_path, kind):
    """One time step, then four from its weights with a new second head, in two parts; the network fires."""
    root = f"data.root={photographs}"
    save_model(firing(), "start")
    start = ("train.init_checkpoint=start", "train.epochs=2", "train.warmup_epochs=1")
    train(*SMALL, root, *start, "output_dir=t1", default="imagenet_v2_t1")
    first = load_model(tmp_path / "t1" / "last")
    assert first.time_steps == 1 and first.distillation_head is None
    stage = (
        *SMALL, root, "train.warmup_epochs=0", "train.init_checkpoint=t1/last", f"train.teacher={TEACHER}",
        "optim.lr=1e-2", f"train.teacher_weights={teacher_weights}", f"train.distillation={kind}", "output_dir=t4",
    )  # fmt: skip
    train(*stage, "train.epochs=4", "train.max_steps=4", default="imagenet_v2_t4")
    run = train(*stage, "train.epochs=4", default="imagenet_v2_t4")
    lines = read_lines(tmp_path / "t4")
    assert [line["step"] for line in lines] == [3, 4, 6, 9, 12]
    assert all(0 < line["train_loss"] < 5 and line["firing_rate"] > 0.05 for line in lines)
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]
    assert run.position.step == run.derived.total_steps == 12
    if kind == "hard":
        train(*stage, "train.epochs=4", "output_dir=whole", default="imagenet_v2_t4")
        files = [(tmp_path / name / "last" / "model.safetensors").read_bytes() for name in ("t4", "whole")]
        assert files[0] == files[1], "a run in two parts ends as an undisturbed one, bit for bit"
    last = load_model(tmp_path / "t4" / "last").train()
    assert last.time_steps == 4 and list(last.config["dims"]) == [16, 16, 16, 24]
    # The second head has learned what its teacher always says.
    images = torch.stack([run.test_loader.dataset[i][0] for i in range(8)])
    with torch.no_grad():
        _, second = last(images)
    assert (second[:, 1] > second[:, 0]).all()


def test_e_spikeformer_learns_from_a_teacher(train, photographs, teacher_weights, tmp_path):
    """From weights without a second head, on mixed images, in two parts; the averaged model has both heads too."""
    save_model(firing("sdt_v3_83m", (16, 16, 16)), "start")
    stage = (
        *FEW, f"data.root={photographs}", "model.dims=[16,16,16]", "model.depths=[1,1,1,1]", "train.epochs=2",
        "train.warmup_epochs=0", "train.init_checkpoint=start", f"train.teacher={TEACHER}", "optim.lr=1e-2",
        f"train.teacher_weights={teacher_weights}",
    )  # fmt: skip
    config = "imagenet_v3_large_distilled"
    train(*stage, "train.max_steps=4", "output_dir=parts", default=config)
    run = train(*stage, "output_dir=parts", default=config)
    train(*stage, "output_dir=whole", default=config)
    for kind in ("last", "ema"):
        files = [(tmp_path / name / kind / "model.safetensors").read_bytes() for name in ("parts", "whole")]
        assert files[0] == files[1], f"{kind}: a run in two parts ends as an undisturbed one, bit for bit"
    lines = read_lines(tmp_path / "parts")
    assert [line["step"] for line in lines] == [3, 4, 6]
    assert all(0 < line["train_loss"] < 5 and line["firing_rate"] > 0.05 for line in lines)
    last = load_model(tmp_path / "parts" / "last")
    assert last.config["distillation"] and last.config["drop_path"] == 0.1
    images = torch.stack([run.test_loader.dataset[i][0] for i in range(8)])
    with torch.no_grad():
        logits, second = last.train()(images)
        assert (second[:, 1] > second[:, 0]).all()
        answers = last.eval()(images)
    assert answers.shape == logits.shape == (8, 2)
    # Its factors have moved from where they started.
    scales = [p for name, p in last.named_parameters() if name.endswith(".scale")]
    assert scales and all((scale != LAYER_SCALE).any() for scale in scales)


def test_evaluation_and_prediction_take_the_mean_of_both_heads(photographs, tmp_path, monkeypatch, capsys):
    """Heads that differ by sign and a bias: their mean is (0, 1) for every photograph. No teacher is looked for."""
    import evaluate
    import predict
    from accelerate.state import AcceleratorState, GradientState

    model = firing(distillation=True)
    with torch.no_grad():
        model.distillation_head.weight.copy_(-model.head.weight)
        model.distillation_head.bias.copy_(torch.tensor([0.0, 2.0]) - model.head.bias)
    config = load_config(
        [*SMALL, f"train.teacher={TEACHER}", "train.teacher_weights=gone.pth"], default="imagenet_v2_t4"
    )
    model.card = DataCard(class_names=["china", "flower"])
    save_model(model, tmp_path / "run" / "best")
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(config, Derived()), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for recipe, arguments in (
        (evaluate, [f"data.root={photographs}"]),
        (predict, ["--json", str(photographs / "val")]),
    ):
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        recipe.main(["checkpoint=run", "threads=1", *arguments])
        out, err = capsys.readouterr()
        assert "no neuron" not in err
    answer = torch.tensor([0.0, 1.0]).softmax(0).tolist()
    predictions = [one["predictions"] for one in json.loads(out)]
    assert len(predictions) == 14 and {one[0]["label"] for one in predictions} == {"flower"}
    assert [p["probability"] for one in predictions for p in one] == pytest.approx(answer[::-1] * 14, abs=1e-5)
    figures = json.loads((tmp_path / "run" / "evaluation" / "evaluation.json").read_text())
    assert figures["loss"] == pytest.approx(-sum(map(math.log, answer)) / 2, abs=1e-4) and figures["firing_rate"] > 0.05


def test_what_cannot_teach_is_refused(set_up, photographs, teacher_weights, tmp_path):
    def refused(message, *arguments):
        with pytest.raises(ConfigError, match=message):
            set_up(*SMALL, f"data.root={photographs}", "output_dir=run", *arguments, default="imagenet_v2_t1")
        assert not (tmp_path / "run" / "config.yaml").exists()

    weights = f"train.teacher_weights={teacher_weights}"
    refused("train.teacher=resnet10x: ", "train.teacher=resnet10x", weights)
    refused("train.teacher_weights=nowhere.pth", f"train.teacher={TEACHER}", "train.teacher_weights=nowhere.pth")
    refused("does not hold the teacher's weights", "train.teacher=resnet18", weights)
    refused(r"trained with data.mean=\[0.485", f"train.teacher={TEACHER}", weights, "data.mean=[0.5,0.5,0.5]")
    refused("leave train.tet", f"train.teacher={TEACHER}", weights, "train.tet=true")
    refused("name it in train.teacher", weights)
    refused("name it in train.teacher", "model.distillation=true")
    refused("distillation, which sdt_8_384 lacks", f"train.teacher={TEACHER}", weights, "model.name=sdt_8_384")
    run = set_up(*SMALL, f"data.root={photographs}", "output_dir=run", f"train.teacher={TEACHER}",
                 f"train.teacher_weights={teacher_weights.with_suffix('.pth')}", default="imagenet_v2_t1")  # fmt: skip
    assert run.plain.distillation and run.teacher(torch.zeros(1, 3, 64, 64)).argmax() == 1
    assert not any(p.requires_grad for p in run.teacher.model.parameters())
    assert not any(part.training for part in run.teacher.model.modules()), "no dropout, no statistics of a batch"
