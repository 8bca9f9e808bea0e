"""Every released image configuration: its values against the published table, and one update of it on real data."""

import pickle

import numpy as np
import pytest
import torch
from common.config import CONFIGS, load_config
from common.loading import fetch
from common.optim import learning_rate, set_learning_rate
from common.set_up import set_up
from PIL import Image
from sklearn.datasets import load_sample_images

from sdt_blocks import SpikeDrivenTransformer, create_model

# depth, dim, batch of a process, lr, its minimum, mixup's probability, auto-augment, least area of the crop
IMAGENET = {
    "imagenet_8_384": (8, 384, 48, 1.5e-3, 1.5e-5, 0.6, "rand-m5-mstd0.5-inc1", 0.2),
    "imagenet_6_512": (6, 512, 48, 1e-3, 2e-5, 0.6, "rand-m7-mstd0.5-inc1", 0.08),
    "imagenet_8_512": (8, 512, 48, 1.5e-3, 1.5e-5, 0.6, "rand-m5", 0.2),
    "imagenet_10_512": (10, 512, 36, 1e-3, 2e-5, 0.75, "rand-m7", 0.2),
    "imagenet_8_768": (8, 768, 36, 1e-3, 2e-5, 1.0, "rand-m7", 0.08),
}
# data, dim, TET
CIFAR = {
    "cifar10_2_256": ("cifar10", 256, False),
    "cifar10_2_512": ("cifar10", 512, False),
    "cifar10_2_512_tet": ("cifar10", 512, True),
    "cifar100_2_256": ("cifar100", 256, False),
    "cifar100_2_512": ("cifar100", 512, False),
}
ARCHITECTURE = {
    "num_heads": 8,
    "mlp_ratio": 4,
    "time_steps": 4,
    "neuron": "lif",
    "event_pooling": False,
    "drop_path": 0.0,
}
SCHEDULE = {"epochs": 300, "warmup_epochs": 20, "cooldown_epochs": 10, "label_smoothing": 0.1, "loss": "ce"}
UNUSED = {"accumulate": 1, "max_steps": None, "ema_decay": None, "sync_bn": False, "linear_probe": False}


def expect(section, **values):
    found = {key: getattr(section, key) for key in values}
    assert found == values


def architecture(config):
    with torch.device("meta"):
        return create_model(config.model.name).config


@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet_configurations_are_the_tables(name):
    depth, dim, batch, lr, min_lr, mixup_prob, auto_augment, scale = IMAGENET[name]
    config = load_config([f"config={name}"], default="digits")
    assert architecture(config).items() >= {**ARCHITECTURE, "depth": depth, "dim": dim, "pooling": "1111"}.items()
    # Eight processes: lr is stated for their total batch.
    expect(config.optim, name="lamb", lr=lr, min_lr=min_lr, warmup_lr=1e-5, weight_decay=0.01, lr_batch=8 * batch)
    expect(config.optim, eps=1e-6, betas=[0.9, 0.999], clip_grad=None)
    expect(config.train, batch_size=batch, mixed_precision="fp16", tet=False, **SCHEDULE, **UNUSED)
    expect(config.data, name="folder", img_size=224, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    expect(config.data, crop_pct=0.95, interpolation="bicubic", scale=[scale, 1.0], ratio=[3 / 4, 4 / 3], hflip=0.5)
    expect(config.data, color_jitter=0.4, auto_augment=auto_augment, random_erasing=0.0)
    expect(config.data, mixup=0.2, mixup_prob=mixup_prob, mixup_switch_prob=0.5, mixup_off_epoch=0, cutmix=1.0)
    assert config.seed == 42


@pytest.mark.parametrize("name", CIFAR)
def test_cifar_configurations_are_the_tables(name):
    data, dim, tet = CIFAR[name]
    config = load_config([f"config={name}"], default="digits")
    assert architecture(config).items() >= {**ARCHITECTURE, "depth": 2, "dim": dim, "pooling": "0011"}.items()
    expect(config.optim, name="adamw", lr=3e-4, min_lr=1e-5, warmup_lr=1e-6, weight_decay=0.06, lr_batch=64)
    expect(config.optim, eps=1e-8, betas=[0.9, 0.999], clip_grad=None)
    expect(config.train, batch_size=64, mixed_precision="no", tet=tet, **SCHEDULE, **UNUSED)
    expect(config.train, tet_lambda=0.001, tet_means=1.0)
    expect(config.data, name=data, img_size=32, mean=[0.4914, 0.4822, 0.4465], std=[0.2470, 0.2435, 0.2616])
    expect(config.data, crop_pct=1.0, interpolation="bicubic", scale=[1.0, 1.0], ratio=[1.0, 1.0], hflip=0.5)
    expect(config.data, color_jitter=0.5, auto_augment="rand-m9-n1-mstd0.4-inc1", random_erasing=0.0)
    expect(config.data, mixup=0.5, mixup_prob=1.0, mixup_switch_prob=0.5, mixup_off_epoch=200, cutmix=0.0)
    assert config.seed == 42


@pytest.mark.parametrize("name", [*IMAGENET, *CIFAR])
def test_the_first_line_is_the_command(name):
    recipe = "imagenet" if name.startswith("imagenet") else "cifar"
    first = (CONFIGS / f"{name}.yaml").read_text().splitlines()[0]
    assert first == f"# accelerate launch recipes/{recipe}.py config={name} data.root=DIR"
    assert (CONFIGS.parent / f"{recipe}.py").is_file()


def test_the_tables_cover_the_files():
    files = {path.stem for path in CONFIGS.glob("*.yaml")}
    published = {name for name in files if name.startswith(("imagenet", "cifar10_2", "cifar100_2"))}
    assert {name for name in published if not name.startswith("imagenet_v2")} == {*IMAGENET, *CIFAR}


@pytest.mark.parametrize("number", ["3e-4", "0.0003", "3.0e-4"])
def test_exponents_are_numbers_in_files_and_on_the_command_line(tmp_path, number):
    """YAML 1.1 has 3e-4 as text."""
    file = tmp_path / "mine.yaml"
    file.write_text(f"optim:\n  lr: {number}\n  min_lr: 1.0e-6\n  warmup_lr: 1e-6\n")
    for arguments in ([f"config={file}"], [f"optim.lr={number}"]):
        assert load_config(arguments, default="cifar10_2_256").optim.lr == 3e-4


# One update of each


@pytest.fixture(scope="module")
def photographs():
    """Crops of scikit-learn's two photographs, uint8 `[N, 32, 32, 3]`."""
    pictures = load_sample_images().images
    return np.stack([pictures[i % 2][i : i + 32, 7 * i : 7 * i + 32] for i in range(48)])


@pytest.fixture(scope="module")
def data_root(tmp_path_factory, photographs):
    """ImageNet-style folders of PNG files, and both CIFAR archives, in one folder."""
    root = tmp_path_factory.mktemp("data")
    for split in ("train", "val"):
        for label, name in enumerate(("china", "flower")):
            (root / split / name).mkdir(parents=True)
            for i in range(label, 12, 2):
                Image.fromarray(photographs[i]).resize((80, 72)).save(root / split / name / f"{i}.png")
    write_cifar(root / "cifar-10-batches-py", photographs, "labels", "label_names", 10)
    write_cifar(root / "cifar-100-python", photographs, "fine_labels", "fine_label_names", 100)
    return root


def write_cifar(folder, images, label_key, names_key, classes):
    folder.mkdir()
    ten = classes == 10
    rows = images.transpose(0, 3, 1, 2).reshape(len(images), 3072)
    parts = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"] if ten else ["train", "test"]
    for part in parts:
        content = {b"data": rows, label_key.encode(): [i % classes for i in range(len(rows))]}
        (folder / part).write_bytes(pickle.dumps(content, protocol=2))
    meta = {names_key: [f"class {i}" for i in range(classes)]}
    (folder / ("batches.meta" if ten else "meta")).write_bytes(pickle.dumps(meta, protocol=2))


@pytest.mark.parametrize("name", [*IMAGENET, *CIFAR])
def test_one_update_on_real_data(name, data_root, tmp_path):
    overrides = ["train.batch_size=2", "data.workers=0", "train.mixed_precision=no", "tracker=none", "threads=2"]
    if name in IMAGENET:  # the smallest size that sixteen-fold pooling leaves more than one token of
        overrides.append("data.img_size=32")
    config = load_config(
        [f"config={name}", f"data.root={data_root}", f"output_dir={tmp_path}", *overrides], default="digits"
    )
    run = set_up(config)
    steps_per_epoch, total_batch = run.batches.updates, 2
    assert run.derived.total_batch == total_batch
    assert run.derived.lr == pytest.approx(config.optim.lr * total_batch / config.optim.lr_batch)
    assert run.derived.total_steps == 310 * steps_per_epoch
    assert isinstance(run.plain, SpikeDrivenTransformer)
    assert type(run.optimizer.optimizer).__name__.lower() == config.optim.name
    assert len(run.test_loader.dataset.dataset.classes) == run.plain.num_classes

    images, targets = next(iter(fetch(run.train_loader)))
    assert images.shape == (2, 3, config.data.img_size, config.data.img_size)
    mixed, soft = run.mixer(images.clone(), targets, step=0, epoch=0)
    before = {key: value.clone() for key, value in run.plain.named_parameters()}
    run.model.train()
    logits = run.model(mixed)
    assert logits.shape == ((4,) if config.train.tet else ()) + (2, run.plain.num_classes)
    loss = run.loss(logits, soft)
    run.accelerator.backward(loss)
    rate = learning_rate(
        5 * steps_per_epoch,
        steps_per_epoch=steps_per_epoch,
        epochs=config.train.epochs,
        warmup_epochs=config.train.warmup_epochs,
        lr=run.derived.lr,
        min_lr=run.derived.min_lr,
        warmup_lr=run.derived.warmup_lr,
    )
    set_learning_rate(run.optimizer, rate)
    run.optimizer.step()
    assert loss.isfinite()
    moved = [key for key, value in run.plain.named_parameters() if not torch.equal(value, before[key])]
    assert "head.weight" in moved
    assert any(key.startswith("patch.") for key in moved)
    assert all(value.isfinite().all() for value in run.plain.parameters())
