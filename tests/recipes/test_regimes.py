"""Every released image configuration: its values against the published table, and one update of it on real data."""

import json
import pickle

import numpy as np
import pytest
import timm
import torch
from common.config import CONFIGS, load_config
from common.engine import train_epoch
from common.loading import fetch, stop_loaders
from common.optim import learning_rate, set_learning_rate
from common.set_up import set_up as set_up_run
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images

from sdt_blocks import SpikeDrivenTransformer, create_model, save_model
from sdt_blocks.neuron import find_neurons, spikes_of

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


# Of the other families, at the total batch of eight processes (CIFAR: of one): variant, its parameters, batch,
# optimizer, lr, its minimum, lr at the start of the warm-up, weight decay
RATES = {
    "imagenet_spikformer": ("spikformer_8_512", 29_689_384, 192, "adamw", 5e-4, 1e-5, 1e-6, 0.05),
    "cifar10_spikformer": ("spikformer_4_384", 9_324_730, 128, "adamw", 5e-4, 1e-5, 1e-5, 0.06),
    "cifar100_spikformer": ("spikformer_4_384", 9_359_380, 128, "adamw", 5e-4, 1e-5, 1e-5, 0.06),
    "imagenet_qkformer": ("qkformer_10_384", 16_473_688, 512, "adamw", 1.2e-3, 1e-6, 0, 0.05),
    "imagenet_qkformer_768": ("qkformer_10_768", 64_962_760, 576, "adamw", 1.35e-3, 1e-6, 0, 0.05),
    "cifar10_qkformer": ("qkformer_4_384", 6_706_234, 64, "adamw", 1e-3, 1e-5, 1e-5, 0.06),
    "cifar100_qkformer": ("qkformer_4_384", 6_740_884, 64, "adamw", 1e-3, 1e-5, 1e-5, 0.06),
    "imagenet_v3_base": ("sdt_v3_19m", 18_987_504, 2048, "lamb", 4.8e-3, 1e-6, 0, 0.05),
    "imagenet_v3_large": ("sdt_v3_83m", 82_502_952, 1024, "lamb", 2.4e-3, 1e-6, 0, 0.05),
    "imagenet_v3_large_distilled": ("sdt_v3_83m", 83_015_952, 1568, "lamb", 6.125e-3, 1e-6, 0, 0.05),
}
# epochs, of which warm-up, then cool-down; seed; mixup, cutmix, the epoch that ends them; what is erased; crop's least
# area; size that is resized to for evaluation; levels, drop path, averaged weights, layer decay where there are any
OTHERS = {
    "imagenet_spikformer": (300, 20, 10, 42, 0.8, 1.0, 0, "const", 1.0, 224),
    "cifar10_spikformer": (300, 20, 10, 42, 0.5, 0.0, 200, "const", 1.0, 32),
    "cifar100_spikformer": (300, 20, 10, 42, 0.5, 0.0, 200, "const", 1.0, 32),
    "imagenet_qkformer": (200, 5, 0, 0, 0.0, 0.0, 0, "pixel", 0.08, 256),
    "imagenet_qkformer_768": (200, 5, 0, 0, 0.0, 0.0, 0, "pixel", 0.08, 256),
    "cifar10_qkformer": (400, 20, 10, 42, 0.5, 0.0, 200, "const", 1.0, 32),
    "cifar100_qkformer": (400, 20, 10, 42, 0.5, 0.0, 200, "const", 1.0, 32),
    "imagenet_v3_base": (200, 5, 0, 0, 0.0, 0.0, 0, "pixel", 0.08, 232, 4),
    "imagenet_v3_large": (150, 10, 0, 0, 0.8, 1.0, 0, "pixel", 0.08, 232, 4, 0.1, 0.99996, 0.75),
    "imagenet_v3_large_distilled": (100, 5, 0, 0, 0.5, 1.0, 0, "pixel", 0.08, 232, 4, 0.1, 0.99996, None),
}
TINY = {
    "spikformer": ("model.depth=1", "model.dim=32", "model.num_heads=4"),
    "qkformer": ("model.depths=[1,1,1]", "model.dim=32", "model.num_heads=4"),
    "sdt_v3_19m": ("model.dims=[8,16,16,16]", "model.depths=[1,1,1,1,1]"),
    "sdt_v3_83m": ("model.dims=[8,16,16]", "model.depths=[1,1,1,2]"),
}
TEACHER = "resnet10t"


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


@pytest.mark.parametrize("name", RATES)
def test_configurations_of_the_other_families_are_their_tables(name):
    variant, params, batch, optimizer, lr, min_lr, warmup_lr, weight_decay = RATES[name]
    epochs, warmup, cooldown, seed, mixup, cutmix, off, erasing, scale, resized, *of_v3 = OTHERS[name]
    levels, drop_path, ema_decay, layer_decay = (*of_v3, *(None,) * (4 - len(of_v3)))
    config = load_config([f"config={name}"], default="digits")
    data, optim, train, imagenet = config.data, config.optim, config.train, name.startswith("imagenet")
    classes = 1000 if imagenet else int(data.name.removeprefix("cifar"))
    with torch.device("meta"):
        distils = {"distillation": True} if train.teacher is not None else {}
        model = create_model(config.model.name, num_classes=classes, **distils)
    assert config.model.name == variant and sum(weight.numel() for weight in model.parameters()) == params
    total = (8 if imagenet else 1) * train.batch_size * train.accumulate
    assert total == batch
    rates = [rate * total / optim.lr_batch for rate in (optim.lr, optim.min_lr, optim.warmup_lr)]
    assert rates == pytest.approx([lr, min_lr, warmup_lr])
    expect(optim, name=optimizer, weight_decay=weight_decay, betas=[0.9, 0.999], clip_grad=None)
    expect(optim, trust_clip=optimizer == "lamb", layer_decay=layer_decay)
    expect(train, epochs=epochs, warmup_epochs=warmup, cooldown_epochs=cooldown, warmup_prefix=cooldown == 0)
    expect(train, label_smoothing=0.1, loss="ce", tet=False, mixed_precision="fp16", ema_decay=ema_decay)
    expect(data, mixup=mixup, cutmix=cutmix, mixup_off_epoch=off, mixup_prob=1.0, mixup_switch_prob=0.5)
    expect(data, random_erasing=0.25, erasing_mode=erasing, scale=[scale, 1.0], hflip=0.5, interpolation="bicubic")
    expect(data, auto_augment="rand-m9-mstd0.5-inc1" if imagenet else "rand-m9-n1-mstd0.4-inc1")
    expect(data, ratio=[3 / 4, 4 / 3] if imagenet else [1.0, 1.0])
    assert data.img_size / data.crop_pct == resized and config.seed == seed
    expect(config.model, levels=levels, drop_path=drop_path, time_steps=None if levels else 4)
    whole = "caformer_b36.sail_in22k_ft_in1k", "hard", "runs/imagenet_v3_large"
    distils = (train.teacher, train.distillation, train.init_checkpoint)
    assert distils == (whole if name.endswith("distilled") else (None, "hard", None))


@pytest.mark.parametrize("name", [*IMAGENET, *CIFAR, *RATES])
def test_the_first_line_is_the_command(name):
    recipe = "imagenet" if name.startswith("imagenet") else "cifar"
    first = (CONFIGS / f"{name}.yaml").read_text().splitlines()[0]
    assert first == f"# accelerate launch recipes/{recipe}.py config={name} data.root=DIR"
    assert (CONFIGS.parent / f"{recipe}.py").is_file()


def test_the_tables_cover_the_files():
    files = {path.stem for path in CONFIGS.glob("*.yaml")}
    published = {name for name in files if name.startswith(("imagenet", "cifar")) and "dvs" not in name}
    assert {name for name in published if not name.startswith("imagenet_v2")} == {*IMAGENET, *CIFAR, *RATES}
    assert list(RATES) == list(OTHERS)


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
    run = set_up_run(config)
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


@pytest.fixture(scope="module")
def teacher_weights(tmp_path_factory):
    """A teacher of two classes with random weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_file(timm.create_model(TEACHER, num_classes=2).state_dict(), path)
    return path


@pytest.mark.parametrize("name", RATES)
def test_a_few_updates_of_a_small_model(name, data_root, teacher_weights, set_up, tmp_path):
    config = load_config([f"config={name}"], default="digits")
    small = next(options for family, options in TINY.items() if config.model.name.startswith(family))
    arguments = [
        f"data.root={data_root}", "data.img_size=32", "data.workers=0", "train.batch_size=4", "train.accumulate=1",
        "train.max_steps=3", "tracker=none", "threads=1", "train.mixed_precision=no", "optim.lr_batch=4", *small,
    ]  # fmt: skip
    if config.train.teacher is not None:
        start = {option.removeprefix("model.").partition("=")[0]: option.partition("=")[2] for option in small}
        options = {key: json.loads(value) for key, value in start.items()}
        save_model(create_model(config.model.name, num_classes=2, **options), tmp_path / "start")
        arguments += [f"train.teacher={TEACHER}", f"train.teacher_weights={teacher_weights}"]
        arguments += ["train.init_checkpoint=start"]
    run = set_up(*arguments, default=name)
    before = {key: value.clone() for key, value in run.plain.named_parameters()}
    fired = dict.fromkeys(find_neurons(run.plain).values(), 0.0)
    for neuron in fired:
        neuron.register_forward_hook(
            lambda module, _, output: fired.update({module: fired[module] + float(spikes_of(output).detach().sum())})
        )
    train_epoch(run)
    assert run.position.step == 3 and run.position.loss_count == 3
    assert 0 < run.position.loss_sum / 3 < 20
    assert sum(spikes > 0 for spikes in fired.values()) > len(fired) / 2
    moved = [key for key, value in run.plain.named_parameters() if not torch.equal(value, before[key])]
    assert {"head.weight", next(iter(before))} <= set(moved)
    assert all(value.isfinite().all() for value in run.plain.parameters())
    stop_loaders(run.train_loader, run.test_loader)
    run.lock.release()
