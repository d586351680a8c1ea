"""What is random in a run: the order of images, crops and mirror images, and their seeds."""

import torch

from revlib.train.randomness import BORDER, augment, derive_seed, shuffled


def test_every_place_in_a_run_has_a_seed_of_its_own():
    places = [(seed, kind, step) for seed in (0, 1) for kind in ("a", "b") for step in range(50)]

    assert len({derive_seed(*place) for place in places}) == len(places)


def test_order_holds_every_image_once():
    assert sorted(shuffled(100, seed=3).tolist()) == [*range(100)]


def test_order_follows_from_its_seed_alone():
    first = shuffled(100, seed=3)
    torch.rand(1)

    assert torch.equal(shuffled(100, seed=3), first)
    assert not torch.equal(shuffled(100, seed=4), first)


def test_order_leaves_the_global_generator_alone():
    before = torch.get_rng_state()

    shuffled(100, seed=3)

    assert torch.equal(torch.get_rng_state(), before)


def test_augmented_image_is_a_crop_or_its_mirror_image():
    x = torch.randint(1, 255, (64, 3, 5, 7), dtype=torch.uint8)
    padded = torch.nn.functional.pad(x, (BORDER,) * 4)

    for image, border, got in zip(x, padded, augment(x), strict=True):
        crops = [
            border[:, top : top + 5, left : left + 7]
            for top in range(2 * BORDER + 1)
            for left in range(2 * BORDER + 1)
        ]
        assert any(torch.equal(got, other) for crop in crops for other in (crop, crop.flip(2)))
        assert got.shape == image.shape


def test_augmentation_reaches_every_crop_and_both_directions():
    # One bright pixel, left of the middle, tells the crop and the direction.
    x = torch.zeros(20_000, 1, 9, 31)
    x[:, :, 4, 4] = 1

    places = augment(x).nonzero()[:, 2:].unique(dim=0)

    shifts = 2 * BORDER + 1
    assert len(places) == shifts * shifts * 2
