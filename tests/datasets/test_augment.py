"""Frame augmentations against torchvision and their definitions; the same operation on every frame of a sample."""

import math

import numpy as np
import pytest
import torch
from torchvision.transforms import functional as tv

from sdt_datasets.augment import (
    EVENT_AUGMENTATIONS,
    FRAME_AUGMENTATIONS,
    Cutout,
    HorizontalFlip,
    RandomOperation,
    Roll,
    build_augmentations,
    transform_frames,
)


def make_frames(time_steps=3, height=24, width=32):
    return torch.rand(time_steps, 2, height, width, generator=torch.Generator().manual_seed(0)) + 0.1


@pytest.mark.parametrize("name", FRAME_AUGMENTATIONS)
def test_every_frame_of_a_sample_gets_the_same_operation(name):
    one = make_frames(1)
    augment = FRAME_AUGMENTATIONS[name]()
    for seed in range(12):
        repeated = augment(one.expand(5, -1, -1, -1), np.random.default_rng(seed))
        assert repeated.shape == (5, 2, 24, 32)
        torch.testing.assert_close(repeated, repeated[:1].expand_as(repeated), rtol=0, atol=0)
        torch.testing.assert_close(repeated[:1], augment(one, np.random.default_rng(seed)), rtol=0, atol=0)


@pytest.mark.parametrize("name", FRAME_AUGMENTATIONS)
def test_the_input_is_left_alone(name):
    frames = make_frames()
    before = frames.clone()
    for seed in range(5):
        FRAME_AUGMENTATIONS[name]()(frames, np.random.default_rng(seed))
    torch.testing.assert_close(frames, before, rtol=0, atol=0)


def test_flip():
    frames = make_frames()
    rng = np.random.default_rng(0)
    assert torch.equal(HorizontalFlip(1.0)(frames, rng), tv.hflip(frames))
    assert torch.equal(HorizontalFlip(0.0)(frames, rng), frames)
    flipped = sum(not torch.equal(HorizontalFlip()(frames, rng), frames) for _ in range(400))
    assert 150 < flipped < 250


def test_roll_covers_every_shift_up_to_its_limit():
    frames = torch.zeros(1, 1, 16, 16)
    frames[0, 0, 8, 8] = 1
    rng = np.random.default_rng(0)
    seen = {tuple((Roll(5)(frames, rng)[0, 0].nonzero()[0] - 8).tolist()) for _ in range(4000)}
    assert seen == {(down, right) for down in range(-5, 6) for right in range(-5, 6)}


def test_cutout_zeroes_one_clipped_square():
    frames = make_frames(2, 40, 48)
    heights, widths = set(), set()
    for seed in range(200):
        gone = Cutout(length=16)(frames, np.random.default_rng(seed)) == 0
        assert torch.equal(gone, gone[:1, :1].expand_as(gone))
        rows, columns = gone[0, 0].any(1).nonzero(), gone[0, 0].any(0).nonzero()
        assert gone[0, 0].sum() == len(rows) * len(columns)
        heights.add(len(rows))
        widths.add(len(columns))
    assert max(heights) == max(widths) == 16
    assert min(heights) >= 8
    assert min(widths) >= 8


def moved_by_hand(frames, inverse):
    """The nearest pixel of where each comes from, `inverse @ (x, y)` about the center; zero from outside."""
    height, width = frames.shape[-2:]
    y, x = np.mgrid[:height, :width]
    middle = np.array([(width - 1) / 2, (height - 1) / 2])
    source = np.stack([x - middle[0], y - middle[1]], axis=-1) @ np.asarray(inverse).T + middle
    columns, rows = np.rint(source).astype(int).transpose(2, 0, 1)
    inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    moved = frames.numpy()[..., rows.clip(0, height - 1), columns.clip(0, width - 1)]
    return torch.from_numpy(moved * inside)


def rotation(radians):
    cos, sin = math.cos(radians), math.sin(radians)
    return [[cos, -sin], [sin, cos]]


@pytest.mark.parametrize(
    "operation, limit, inverse",
    [
        ("rotate", 30.0, lambda degrees: rotation(math.radians(degrees))),
        ("shear_x", 0.3, lambda radians: [[1, math.tan(radians)], [0, 1]]),
    ],
)
def test_rotation_and_shear_are_their_matrices(operation, limit, inverse):
    frames = make_frames()
    for magnitude in np.linspace(-limit, limit, 31).tolist():
        moved, expected = transform_frames(frames, operation, magnitude), moved_by_hand(frames, inverse(magnitude))
        # Nearest neighbor: at exact ties the two may round to different pixels.
        assert (moved != expected).float().mean() < 0.01, magnitude


@pytest.mark.parametrize("pixels", [-40, -5, -4.7, -1, 0, 2, 2.7, 5, 40])
def test_translation_moves_whole_pixels(pixels):
    """Fractions are dropped, as in torchvision's TrivialAugmentWide."""
    frames = make_frames()
    padded = torch.nn.functional.pad(frames, (40, 40, 40, 40))
    down, right = (padded.roll(math.trunc(pixels), axis)[..., 40:-40, 40:-40] for axis in (-2, -1))
    assert torch.equal(transform_frames(frames, "translate_x", pixels), right)
    assert torch.equal(transform_frames(frames, "translate_y", pixels), down)


def test_random_operation_draws_from_its_set():
    frames = make_frames()
    candidates = {"identity": [0.0]}
    for name, limit in (("shear_x", 0.3), ("translate_x", 5), ("rotate", 30)):
        candidates[name] = (limit * np.linspace(-1, 1, 31)).tolist()
    outcomes = {
        name: [transform_frames(frames, name, magnitude) for magnitude in magnitudes]
        for name, magnitudes in candidates.items()
    }
    rng = np.random.default_rng(0)
    drawn = [RandomOperation()(frames, rng) for _ in range(300)]
    matched = [{name for name, all_ in outcomes.items() if any(torch.equal(x, y) for y in all_)} for x in drawn]
    assert all(matched)
    assert set.union(*matched) == set(candidates)


def test_the_wide_set_moves_down_and_cuts_out_too():
    frames = torch.arange(1.0, 1 + 2 * 2 * 32 * 48).view(2, 2, 32, 48)
    rng = np.random.default_rng(0)
    drawn = [FRAME_AUGMENTATIONS["random_op_wide"]()(frames, rng) for _ in range(300)]
    shifts = [transform_frames(frames, "translate_y", pixels) for pixels in (-4.0, -3.0, 2.0, 5.0)]
    assert all(any(torch.equal(one, x) for x in drawn) for one in shifts)
    # Nothing has moved where a square is missing.
    cut = [(x == 0) for x in drawn if torch.equal(x, torch.where(x == 0, 0, frames)) and (x == 0).any()]
    squares = [gone for gone in cut if gone[0, 0].any(0).sum() == gone[0, 0].any(1).sum()]
    assert all(torch.equal(gone, gone[:1, :1].expand_as(gone)) for gone in squares)
    sides = [int(gone[0, 0].any(0).sum()) for gone in squares]
    assert [int(gone[0, 0].sum()) for gone in squares] == [side**2 for side in sides]
    assert 25 < len(squares) < 80 and min(sides) == 1 and max(sides) == round((0.11 * 32 * 48) ** 0.5)


def test_names_become_augmentations_in_their_order():
    events, frames = build_augmentations(["cutout", "drop_by_area", "hflip"], (64, 48, 2))
    assert [type(augmentation).__name__ for augmentation in events] == ["DropByArea"]
    assert [type(augmentation).__name__ for augmentation in frames] == ["Cutout", "HorizontalFlip"]
    assert events[0].sensor_size == (64, 48, 2)
    assert len(build_augmentations(list(EVENT_AUGMENTATIONS), (4, 4, 2))[0]) == 4


@pytest.mark.parametrize("names", [["flop"], "cutout"])
def test_unknown_names_are_refused(names):
    with pytest.raises(ValueError, match="augment must be a list of names among drop_by_time"):
        build_augmentations(names, (4, 4, 2))


@pytest.mark.parametrize(
    "build",
    [lambda: HorizontalFlip(1.5), lambda: Roll(-1), lambda: Cutout(0), lambda: RandomOperation(["shear_y"])],
)
def test_bad_settings_are_refused(build):
    with pytest.raises(ValueError, match="must be"):
        build()
