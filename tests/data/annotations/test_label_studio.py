"""Label Studio's JSON: its own run-length encoding, and what may be wrong with a task."""

import json

import annotation_sets
import numpy as np
import pytest
from annotation_sets import HEIGHT, WIDTH
from PIL import Image

from pals_hf.data.annotations.bitmaps import decode_brush
from pals_hf.errors import InputError

pytest.importorskip("msgspec")

# Written by `encode_rle` of label_studio_sdk 2.1.2 for 3x5 RGBA pixels.
CODES = [0, 0, 0, 60, 57, 27, 254, 23, 0, 183, 255, 133, 192, 0]


@pytest.fixture
def root(tmp_path):
    return annotation_sets.label_studio(tmp_path)


def change(root, edit):
    path = next(root.glob("project-*.json"))
    tasks = json.loads(path.read_text())
    edit(tasks)
    path.write_text(json.dumps(tasks))


def test_the_encoding_of_the_tool():
    expected = np.zeros((3, 5), dtype=bool)
    expected[1, 1:4] = True
    assert np.array_equal(decode_brush(CODES, (5, 3), "x"), expected)
    pixels = np.random.default_rng(0).random((HEIGHT, WIDTH)) < 0.3
    assert np.array_equal(decode_brush(annotation_sets.brush_codes(pixels), (WIDTH, HEIGHT), "x"), pixels)


def test_values_that_are_not_repeated():
    """A run of values with a length of its own: `0`, the width of the length, the length less one, the values."""
    bits = (
        f"{16:032b}{7:05b}" + "0010" * 4 + "0" + "00" + "111" + "".join(f"{value:08b}" for value in [0, 0, 0, 255] * 2)
    )
    bits += "1" + "00" + "111" + f"{0:08b}"
    codes = [int(bits[at : at + 8].ljust(8, "0"), 2) for at in range(0, len(bits), 8)]
    assert decode_brush(codes, (4, 1), "x").tolist() == [[True, True, False, False]]


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (CODES[:-4], "it ends too early"),
        ([], "it ends too early"),
        ([0, 0, 1, 0, *CODES[4:]], "it has 256 values instead of 60"),
        ([300], "bytes must be in range"),
        (["a"], "cannot be interpreted as an integer"),
        (None, "cannot convert"),
    ],
)
def test_a_damaged_brush_mask(codes, message):
    with pytest.raises(InputError, match=f"x has a brush mask that is damaged: .*{message}"):
        decode_brush(codes, (5, 3), "x")


def test_brush_masks_as_png_are_the_same(root):
    """They are not read, because they do not name their images."""
    source, labels = annotation_sets.read(root)
    assert f"{root} has 6 images that are not used" in source.notes
    for number in range(6):
        shown = np.asarray(Image.open(next(root.glob(f"task-{number + 1}-*.png")))) > 0
        covered = labels[f"street{number}"] == 1  # by the car, which was drawn later
        assert np.array_equal((labels[f"street{number}"] == 2) | (shown & covered), shown)
    next(root.glob("project-*.json")).unlink()
    with pytest.raises(
        InputError, match=r"-0\.png is a brush mask of Label Studio, which does not name its image. Export"
    ):
        annotation_sets.read(root)


def result(tasks):
    return tasks[0]["annotations"][0]["result"][0]


def test_rectangles_and_their_rotation(root):
    def edit(tasks):
        shape = {"x": 25, "y": 25, "width": 25, "height": 50, "rotation": 90, "rectanglelabels": ["road"]}
        tasks[0]["annotations"][0]["result"] = [{**result(tasks), "type": "rectanglelabels", "value": shape}]

    change(root, edit)
    rows, columns = np.nonzero(annotation_sets.read(root)[1]["street0"])
    # Turned by 90 degrees around its upper left corner at column 12 and row 8.
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (8, 20, 0, 12)


@pytest.mark.parametrize(
    "address",
    ["s3://bucket/a%20b/street0.jpg", "/data/local-files/?d=a/street0.jpg", "http://x/street0.jpg?x=1", "street0.jpg"],
)
def test_addresses_of_images(root, address):
    change(root, lambda tasks: tasks[0]["data"].update(image=address))
    annotation_sets.assert_as_drawn(annotation_sets.read(root)[1])


def test_which_annotation_of_a_task_counts(root):
    def edit(tasks):
        wrong = {**tasks[0]["annotations"][0], "result": []}
        tasks[0]["annotations"][0]["ground_truth"] = True
        tasks[0]["annotations"].append(wrong)
        tasks[1]["annotations"].append({**wrong, "was_cancelled": True})

    change(root, edit)
    annotation_sets.assert_as_drawn(annotation_sets.read(root)[1])
    change(root, lambda tasks: tasks[0]["annotations"][0].update(ground_truth=False))
    with pytest.raises(InputError, match="task 1 has 2 annotations, and each of them may be the right one"):
        annotation_sets.read(root)


def test_tasks_without_an_annotation_are_not_used(root):
    change(root, lambda tasks: tasks[0].update(annotations=[]))
    source, labels = annotation_sets.read(root)
    assert len(labels) == 5
    assert any("has 1 tasks without an annotation, which are not used" in note for note in source.notes)
    change(root, lambda tasks: [task.update(annotations=[]) for task in tasks])
    with pytest.raises(InputError, match="is an empty export: it has no task with an annotation"):
        annotation_sets.read(root)
    change(root, lambda tasks: tasks.clear())
    with pytest.raises(InputError, match="is an empty export"):
        annotation_sets.read(root)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda r: r["value"].update(rle=[1, 2]), "region 1 has a brush mask that is damaged"),
        (lambda r: r.update(image_rotation=90), "region 1 was drawn on an image turned by 90 degrees"),
        (lambda r: r.update(original_width=99), "on an image of 99x32 pixels, but the image has 48x32"),
        (lambda r: r.pop("original_width"), "region 1 is not valid: .*original_width"),
        (lambda r: r["value"].update(brushlabels=["car", "road"]), "a region has the labels 'car' and 'road'"),
        (
            lambda r: r.update(value={"x": 1, "width": 3, "labels": ["car"]}),
            "is a rectangle without position and size",
        ),
        (
            lambda r: r.update(value={"radiusX": 3, "ellipselabels": ["car"]}, type="ellipselabels"),
            "which is not read",
        ),
    ],
)
def test_a_bad_region(root, edit, message):
    change(root, lambda tasks: edit(result(tasks)))
    with pytest.raises(InputError, match=message):
        annotation_sets.read(root)
