"""Augmentations: what they do to pixels, and that a batch's draw depends on seed, epoch, batch and rank alone."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_close, assert_equal

from klif_sj.training.data.augment import AUGMENTATIONS, Augmentation, crop, cutout, flip
from klif_sj.training.data.catalogue import DATASETS

pytestmark = pytest.mark.once

CIFAR10, EVENTS = DATASETS["cifar10"], DATASETS["n-mnist"]
DRAW = (0, 0, 0, 0)


def images(number: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 256, (number, *shape), generator=generator, dtype=torch.uint8)


def test_crop_is_a_window_of_the_padded_image() -> None:
    x = images(4, 3, 5, 5)
    offsets = torch.tensor([[2, 2], [0, 0], [4, 4], [1, 3]])
    out = crop(x, offsets, 2)
    assert_equal(out[0], x[0], "the middle is the image itself")
    for sample, (down, right) in enumerate(offsets.tolist()):
        for row in range(5):
            for column in range(5):
                source = (row + down - 2, column + right - 2)
                inside = all(0 <= place < 5 for place in source)
                expected = x[(sample, slice(None), *source)] if inside else torch.zeros(3, dtype=torch.uint8)
                assert_equal(out[sample, :, row, column], expected, f"sample {sample}, pixel {row}, {column}")


def test_flip_mirrors_the_chosen() -> None:
    x = images(2, 1, 2, 3)
    out = flip(x, torch.tensor([True, False]))
    assert out[0, 0].tolist() == [row[::-1] for row in x[0, 0].tolist()]
    assert_equal(out[1], x[1], "the other")


def test_cutout_erases_a_square_cut_off_at_the_border() -> None:
    out = cutout(torch.ones(3, 2, 6, 6), torch.tensor([[3, 2], [0, 0], [5, 3]]), 4)
    erased = [{(row, column) for row, column in (image[0] == 0).nonzero().tolist()} for image in out]
    assert erased[0] == {(row, column) for row in range(1, 5) for column in range(4)}
    assert erased[1] == {(row, column) for row in range(2) for column in range(2)}
    assert erased[2] == {(row, column) for row in range(3, 6) for column in range(1, 5)}
    assert_equal(out[:, 0], out[:, 1], "both channels")


def test_all_time_steps_are_augmented_alike() -> None:
    x = images(3, 1, 2, 8, 8).expand(3, 5, 2, 8, 8)
    out = Augmentation(("crop", "flip", "cutout"), EVENTS)(x, DRAW)
    assert out.shape == x.shape
    assert not torch.equal(out[:, 0], x[:, 0].float())
    for step in range(1, 5):
        assert_equal(out[:, step], out[:, 0], f"step {step}")


def test_without_augmentation_pixels_are_between_0_and_1_and_counts_stay() -> None:
    x = images(2, 3, 32, 32)
    assert_close(Augmentation((), CIFAR10)(x, DRAW), x.double().div(255).float(), "pixels")
    assert_equal(Augmentation((), EVENTS)(x, DRAW), x.float(), "counts")
    assert_equal(Augmentation((), CIFAR10)(x / 255, DRAW), x / 255, "pixels that are floating-point already")


def test_normalised_pixels_have_the_data_sets_mean_and_variance() -> None:
    # Two values a channel, one standard deviation on either side of the mean.
    mean, std = torch.tensor(CIFAR10.mean), torch.tensor(CIFAR10.std)
    x = torch.stack([mean - std, mean + std]).view(2, 3, 1, 1).expand(2, 3, 32, 32)
    for draw in (None, DRAW):
        out = Augmentation(("normalise",), CIFAR10)(x, draw)
        assert_close(out, torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 32, 32), "normalised")
    erased = Augmentation(("normalise", "cutout"), CIFAR10)(x, DRAW)
    assert set(erased.round(decimals=4).unique().tolist()) == {-1.0, 0.0, 1.0}, "erased to the mean"


def test_order_of_the_names_does_not_matter() -> None:
    x = images(4, 3, 32, 32)
    names = tuple(AUGMENTATIONS)
    assert_equal(Augmentation(names, CIFAR10)(x, DRAW), Augmentation(names[::-1], CIFAR10)(x, DRAW), "order")


def test_nothing_random_is_done_without_a_draw() -> None:
    x = images(8, 3, 32, 32)
    assert_equal(Augmentation(("crop", "flip", "cutout"), CIFAR10)(x, None), x.float() / 255, "as stored")


def test_draw_depends_on_seed_epoch_batch_and_rank_alone() -> None:
    x = images(16, 3, 32, 32)
    augmentation = Augmentation(("crop", "flip", "cutout"), CIFAR10)
    first = augmentation(x, DRAW)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert_equal(Augmentation(("crop", "flip", "cutout"), CIFAR10)(x, DRAW), first, "again")
    assert torch.equal(torch.get_rng_state(), state), "torch's own generator is left alone: it draws the dropout"
    for position in range(4):
        other = tuple(int(place == position) for place in range(4))
        assert not torch.equal(augmentation(x, other), first)


def test_one_augmentations_draw_is_not_anothers() -> None:
    """What is cropped stays so where a flip is added: comparisons of recipes differ in the recipe alone."""
    x = images(32, 3, 32, 32)
    cropped = Augmentation(("crop",), CIFAR10)(x, DRAW)
    both = Augmentation(("crop", "flip"), CIFAR10)(x, DRAW)
    flipped = [not torch.equal(a, b) for a, b in zip(cropped, both, strict=True)]
    assert 4 < sum(flipped) < 28
    assert_equal(flip(cropped, torch.tensor(flipped)), both, "the same windows")


def test_draws_are_uniform() -> None:
    """Every window of a crop is as likely as another, and so is every centre of a cutout."""
    marked = torch.zeros(8100, 1, 8, 8)
    marked[:, :, 4, 4] = 1
    rows, columns = Augmentation(("crop",), DATASETS["digits"])(marked, DRAW)[:, 0].nonzero()[:, 1:].T
    # Padding 4 moves the pixel at 4 to 0 .. 8, and out of the image at 8.
    windows = (rows * 8 + columns).bincount(minlength=64)
    assert windows.sum() == pytest.approx(8100 * 64 / 81, abs=4 * 8100**0.5 * 0.41)
    assert windows.min() > 100 - 50
    assert windows.max() < 100 + 50
    whole = cutout(torch.ones(8100, 1, 8, 8), torch.zeros(8100, 2, dtype=torch.long), 4).mean()
    random = Augmentation(("cutout",), DATASETS["digits"])(torch.ones(8100, 1, 8, 8), DRAW)
    assert whole == 1 - 4 / 64
    # Along one axis, centres 0 .. 7 erase 2, 3, 4, 4, 4, 4, 4, 3 pixels: 3.5 of 8 on average.
    assert random.mean().item() == pytest.approx(1 - 3.5**2 / 64, abs=0.003)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(
        ValueError, match="expected some of crop, flip, cutout, normalise, got 'cutoff'; did you mean 'cut"
    ):
        Augmentation(("crop", "cutoff"), CIFAR10)
    with pytest.raises(ValueError, match="'normalise' is for images; N-MNIST holds counts"):
        Augmentation(("normalise",), EVENTS)
