"""Masks that number objects."""

import json

import annotation_sets
import numpy as np
import pytest
from PIL import Image

from pals_hf.errors import InputError


def test_older_masks_of_cellpose(tmp_path):
    """`NAME_masks.tif` of 16 bits."""
    root = annotation_sets.cellpose(tmp_path)
    for path in root.rglob("*_cp_masks.png"):
        Image.open(path).save(path.with_name(path.name.replace("_cp_masks.png", "_masks.tif")))
        path.unlink()
    source, labels = annotation_sets.read(root)
    assert source.classes.names == ("background", "cell")
    assert source.notes[0].startswith("the masks number objects, so every value above 0 is read as the class 'cell'")
    annotation_sets.assert_as_drawn(labels, {"car": 1, "road": 1})


def test_numbers_of_32_bits(tmp_path):
    """Programs around ImageJ number many objects by floats."""
    root = annotation_sets.imagej(tmp_path)
    about = {270: "ImageJ=1.54f\n"}
    for path in root.rglob("masks/*.tif"):
        Image.fromarray(np.asarray(Image.open(path)).astype(np.float32)).save(path, tiffinfo=about)
    annotation_sets.assert_as_drawn(annotation_sets.read(root)[1], {"car": 1, "road": 1})
    path = next(root.rglob("masks/*.tif"))
    Image.fromarray(np.asarray(Image.open(path)) + np.float32(0.5)).save(path, tiffinfo=about)
    with pytest.raises(InputError, match=r"this mask has mode F\. Save whole numbers"):
        annotation_sets.read(root)


def test_eight_bits_may_be_objects_or_classes(tmp_path):
    root = annotation_sets.imagej(tmp_path)
    for path in root.rglob("masks/*.tif"):
        values = (np.asarray(Image.open(path)) // 300).astype(np.uint8)
        Image.fromarray(values).save(path, tiffinfo={270: "ImageJ=1.54f\n"})
    with pytest.raises(InputError, match=r"may number objects or classes.*1-255.*for objects, or .*for classes"):
        annotation_sets.read(root)
    for names, values in (({"0": "ground", "1-255": "cell"}, (1, 1)), ({"0": "a", "1": "b", "2": "c"}, (1, 2))):
        (root / "id2label.json").write_text(json.dumps(names))
        source, labels = annotation_sets.read(root)
        assert source.notes == ()
        annotation_sets.assert_as_drawn(labels, dict(zip(("car", "road"), values, strict=True)))


def test_other_masks_need_names(tmp_path):
    root = annotation_sets.imagej(tmp_path)
    for path in root.rglob("masks/*.tif"):
        Image.fromarray(np.asarray(Image.open(path))).save(path)
    with pytest.raises(InputError, match=r"id2label\.json is missing"):
        annotation_sets.read(root)
