import numpy as np

from pals_hf.data.synthetic import CLASSES, NUM_IMAGES, SIZE, VOID, generate_scene, generate_split


def test_scenes_are_a_function_of_the_seed():
    (image, mask), (again, mask_again) = generate_scene((0, 0, 5)), generate_scene((0, 0, 5))
    assert np.array_equal(image, again)
    assert np.array_equal(mask, mask_again)
    other, _ = generate_scene((1, 0, 5))
    assert not np.array_equal(image, other)


def test_a_split_is_a_usable_data_set():
    scenes = generate_split("validation")
    assert len({name for name, _, _ in scenes}) == len(scenes) == NUM_IMAGES["validation"]
    masks = np.stack([np.asarray(mask) for _, _, mask in scenes])
    assert masks.shape[1:] == SIZE
    assert all(image.size == mask.size and image.mode == "RGB" for _, image, mask in scenes)
    assert (masks[:, 0] == VOID).all()
    shares = np.bincount(masks[masks != VOID], minlength=len(CLASSES)) / (masks != VOID).sum()
    assert len(shares) == len(CLASSES)
    assert (shares > 0).all()
    assert shares.min() < 0.03 < 0.15 < shares.max()  # a long tail


def test_splits_share_no_scene():
    train, validation = ({np.asarray(image).tobytes() for _, image, _ in generate_split(s)} for s in NUM_IMAGES)
    assert not train & validation
