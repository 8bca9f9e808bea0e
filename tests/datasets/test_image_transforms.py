"""Transforms held to timm's own pipelines and to closed forms, and the keys of their random draws."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import functional as TF

from sdt_datasets.image_transforms import LUMA, build_transforms, check_auto_augment, seeded, to_rgb

PLAIN = {"img_size": 32, "mean": (0.5,), "std": (0.25,)}


@pytest.mark.parametrize("auto_augment", ["rand-m9-n1-mstd0.4-inc1", "augmix-m3-w2", "original-mstd0.5", "3a", None])
def test_training_transform_is_timms_own(auto_augment, photograph):
    image = photograph("china", 3, (90, 120))
    options = {
        "scale": (0.3, 1.0),
        "ratio": (0.7, 1.4),
        "hflip": 0.5,
        "color_jitter": 0.4,
        "auto_augment": auto_augment,
    }
    mean, std = (0.48, 0.45, 0.40), (0.22, 0.23, 0.24)
    ours, _ = build_transforms(img_size=48, mean=mean, std=std, random_erasing=0.5, **options)
    timms = create_transform(48, is_training=True, interpolation="bicubic", mean=mean, std=std, re_prob=0.5, **options)
    for key in range(5):
        with seeded(key):
            expected = timms(image)
        with seeded(key):
            torch.testing.assert_close(ours(image), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("img_size", "crop_pct", "resized"), [(224, 0.95, 235), (288, 0.9, 320), (32, 1.0, 32)])
def test_evaluation_resizes_the_short_side_and_crops_the_center(img_size, crop_pct, resized, photograph):
    image = photograph("flower", 1, (200, 260))
    _, evaluation = build_transforms(img_size=img_size, mean=(0.0,), std=(1.0,), crop_pct=crop_pct)
    width = int(resized * 260 / 200)
    expected = TF.center_crop(TF.to_tensor(image.resize((width, resized), Image.Resampling.BICUBIC)), img_size)
    torch.testing.assert_close(evaluation(image), expected, rtol=0, atol=1e-6)


def test_random_resampling_is_for_training_alone(photograph):
    image = photograph("flower", 1, (200, 260))
    train, evaluation = build_transforms(**PLAIN, interpolation="random")
    fixed = {name: build_transforms(**PLAIN, interpolation=name) for name in ("bilinear", "bicubic")}
    assert torch.equal(evaluation(image), fixed["bicubic"][1](image))
    drawn = []
    for key in range(9):
        with seeded(key):
            result = train(image)
        drawn += [name for name, (of_training, _) in fixed.items() if torch.equal(of_training(image), result)]
    assert len(drawn) == 9 and set(drawn) == set(fixed)


def test_gray_images_become_three_channels_and_color_becomes_luma(photograph):
    array = np.array(photograph("china", 0, (32, 32)))
    three = build_transforms(img_size=32, in_channels=3, mean=(0.5,), std=(0.25,))[1]
    mean, std = np.array([0.3, 0.5, 0.8]), np.array([0.4, 0.25, 0.1])
    one = build_transforms(img_size=32, in_channels=1, mean=mean, std=std)[1]
    gray = three(Image.fromarray(array[..., 0]).convert("RGB"))
    assert torch.equal(gray[0], gray[1])
    assert torch.equal(gray[0], gray[2])
    torch.testing.assert_close(gray[0], torch.from_numpy((array[..., 0] / 255 - 0.5) / 0.25).float())
    assert LUMA == (0.299, 0.587, 0.114)
    expected = (array / 255 @ LUMA - mean @ LUMA) / (std @ LUMA)
    torch.testing.assert_close(one(Image.fromarray(array))[0], torch.from_numpy(expected).float())


def test_random_erasing_sets_a_rectangle_to_the_mean(photograph):
    image = photograph("china", 0, (32, 32))
    erased, _ = build_transforms(img_size=32, mean=(0.37,), std=(1.0,), random_erasing=1.0)
    plain, _ = build_transforms(img_size=32, mean=(0.37,), std=(1.0,))
    for key in range(5):
        with seeded(key):
            difference = (erased(image) != plain(image)).any(0)
        with seeded(key):
            result = erased(image)
        rows, columns = difference.any(1).nonzero().flatten(), difference.any(0).nonzero().flatten()
        rectangle = result[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert rectangle.numel() > 0
        assert not rectangle.any()


def test_random_erasing_may_leave_noise(photograph):
    image = photograph("china", 0, (32, 32))
    noise, mean = (
        build_transforms(img_size=32, mean=(0.37,), std=(1.0,), random_erasing=1.0, erasing_mode=mode)[0]
        for mode in ("pixel", "const")
    )
    for key in range(5):
        with seeded(key):
            erased = noise(image)
        with seeded(key):
            again = noise(image)
        with seeded(key):
            rectangle = mean(image) == 0
        assert torch.equal(erased, again) and rectangle.any()
        values = erased[rectangle]
        assert 0.5 < values.std() < 1.5 and len(values.unique()) > len(values) // 2


PIXELS = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
MODES = {
    "L": (Image.fromarray(PIXELS[..., 0]), np.repeat(PIXELS[..., :1], 3, 2)),
    "16 bits": (Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257), np.repeat(PIXELS[..., :1], 3, 2)),
    "RGBA": (Image.fromarray(np.dstack([PIXELS, PIXELS[..., 0]])), PIXELS),
    "1": (Image.fromarray(PIXELS[..., 0] > 99), np.repeat((PIXELS[..., :1] > 99) * np.uint8(255), 3, 2)),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_an_image_file_becomes_rgb(mode):
    image, expected = MODES[mode]
    file = io.BytesIO()
    image.save(file, "PNG")
    with Image.open(file) as stored:
        assert np.array_equal(np.asarray(to_rgb(stored)), expected)


def test_pixels_without_a_range_are_refused():
    with pytest.raises(ValueError, match="floating-point"):
        to_rgb(Image.fromarray(np.ones((4, 4), dtype=np.float32)))


POLICIES = ["rand", "augmix", "v0", "3a"]
SECTIONS = ["m9", "m", "m9.5", "n2", "n0", "n60", "p0.3", "pp", "mstd0.5", "mmax10", "inc1", "inc2", "tweights", "t3a"]
SECTIONS += ["tfoo", "w2", "w0", "d2", "b1", "", *POLICIES]


@given(
    text=st.text(max_size=12)
    | st.lists(st.sampled_from(SECTIONS), max_size=4).flatmap(
        lambda sections: st.sampled_from(["-".join([policy, *sections]) for policy in POLICIES])
    )
)
@settings(max_examples=150, deadline=None)
def test_an_augmentation_string_is_refused_or_works(text, photograph):
    try:
        transform, _ = build_transforms(img_size=16, mean=(0.5,), std=(0.5,), auto_augment=text)
    except ValueError as error:
        assert repr(text) in str(error)
    else:
        with seeded(7):
            assert transform(photograph("china", 1)).shape == (3, 16, 16)


@pytest.mark.parametrize("text", ["rand-m9-foo", "rand_m9", "rand-m9-n1-mstd", "randm9", "autoaugment", "rand-q3"])
def test_strings_that_timm_would_misread_are_refused(text):
    with pytest.raises(ValueError, match=r"auto_augment .* is unknown"):
        check_auto_augment(text)


CUT = [
    ("rand-m15-n2", "cut the magnitude to 10; say -m10 or a larger -mmax"),
    ("rand-m25-mmax20", "cut the magnitude to 20"),
    ("augmix-m11", "cut the magnitude to 10; say -m10$"),
    ("rand-m9-m5", "says m twice"),
    ("rand-p1.5", "p is a probability"),
]


@pytest.mark.parametrize(("text", "words"), CUT)
def test_values_that_timm_would_cut_or_drop_are_refused(text, words):
    with pytest.raises(ValueError, match=words):
        check_auto_augment(text)


@pytest.mark.parametrize("auto_augment", ["rand-m10-n1-p1.0-inc1", "rand-m0-n1-p1.0", "rand-m15-mmax20-n1-p1.0-inc1"])
def test_every_operation_works_at_its_strongest(photograph, auto_augment):
    """Among them posterize with no bit left, which recent Pillow refuses: the image is black."""
    transform, _ = build_transforms(img_size=16, mean=(0.0,), std=(1.0,), auto_augment=auto_augment)
    results = []
    for key in range(150):
        with seeded(key):
            results.append(transform(photograph("flower", key, (16, 16))))
    assert all(result.isfinite().all() for result in results)
    assert any(not result.any() for result in results)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"img_size": 0}, "img_size"),
        ({"in_channels": 2}, r"1 channel .* or 3"),
        ({"crop_pct": 0.0}, "crop_pct"),
        ({"crop_pct": 1.5}, "crop_pct"),
        ({"interpolation": "cubic"}, "'cubic' is unknown; choose one of bicubic"),
        ({"scale": (0.5, 0.2)}, "scale"),
        ({"scale": (0.5, 1.5)}, "scale"),
        ({"ratio": (0.0, 1.0)}, "ratio"),
        ({"hflip": 1.5}, "hflip"),
        ({"random_erasing": -0.1}, "random_erasing"),
        ({"erasing_mode": "rand"}, "erasing_mode 'rand' is unknown; choose one of const, pixel"),
        ({"color_jitter": -1.0}, "color_jitter"),
        ({"mean": (0.1, 0.2)}, "mean needs one finite value"),
        ({"mean": (float("nan"),)}, "mean needs one finite value"),
        ({"std": (0.0,)}, "std must be positive"),
        ({"std": (1e-40,)}, r"with mean \[0.5\] and std \[1e-40\] pixels are beyond float32"),
        ({"mean": (3e38,)}, "pixels are beyond float32"),
    ],
)
def test_settings_out_of_range_are_named(option, message):
    with pytest.raises(ValueError, match=message):
        build_transforms(**{**PLAIN, **option})
