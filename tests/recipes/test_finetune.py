"""The configuration for fine-tuning on small data, on photographs of two classes."""

from __future__ import annotations

import torch
from common.config import CONFIGS, load_config
from launching import read_lines

from sdt_blocks import load_model, load_released_checkpoint


def test_its_settings_are_milder_than_those_of_training():
    tuned, trained = (load_config([f"config={name}"], default="digits") for name in ("finetune", "imagenet_8_384"))
    assert tuned.model.name == trained.model.name
    for key in ("img_size", "mean", "std", "crop_pct", "interpolation"):
        assert getattr(tuned.data, key) == getattr(trained.data, key), key
    assert tuned.train.epochs <= trained.train.epochs / 10 and tuned.optim.lr < trained.optim.lr
    assert tuned.data.scale[0] > trained.data.scale[0] and tuned.data.auto_augment is None
    assert tuned.data.mixup == tuned.data.cutmix == 0
    first = (CONFIGS / "finetune.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith(
        "# accelerate launch recipes/imagenet.py config=finetune data.root=DIR train.init_checkpoint="
    )


def test_a_released_model_learns_two_new_classes_in_a_few_steps(train, photographs, released_file, tmp_path):
    released = load_released_checkpoint(released_file)
    same = ("depth", "dim", "num_heads", "mlp_ratio", "pooling", "time_steps")
    train(
        f"data.root={photographs}", f"train.init_checkpoint={released_file}", "data.img_size=64", "data.workers=0",
        "train.batch_size=8", "train.epochs=6", "train.eval_every=6", "train.checkpoint_every=6", "threads=1",
        "tracker=none", "output_dir=run", *(f"model.{key}={released.config[key]}" for key in same),
        default="finetune",
    )  # fmt: skip
    lines = read_lines(tmp_path / "run")
    assert lines[-1]["train_loss"] < lines[0]["train_loss"] and lines[-1]["firing_rate"] > 0
    tuned = load_model(tmp_path / "run" / "last")
    assert tuned.num_classes == 2 and tuned.card.class_names == ("china", "flower")
    # A low learning rate: the convolutions are still those of the released model, but for a little.
    for name, weight in released.named_parameters():
        if weight.ndim == 4:
            change = (tuned.get_parameter(name) - weight).norm() / weight.norm()
            assert 0 < change < 0.2, name
    assert torch.isfinite(tuned.head.weight).all()
