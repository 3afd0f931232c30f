"""COCO JSON: the masks of pycocotools, and what may be wrong with a file."""

import json

import annotation_sets
import numpy as np
import pytest
from annotation_sets import HEIGHT, WIDTH

from pals_hf.errors import InputError

pytest.importorskip("msgspec")
coco_mask = pytest.importorskip("pycocotools.mask")
coco_api = pytest.importorskip("pycocotools.coco")

FILE = "annotations/instances_train2017.json"


@pytest.fixture
def root(tmp_path):
    return annotation_sets.coco(tmp_path)


def change(root, edit):
    path = root / FILE
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def compressed_runs(points):
    encoded = coco_mask.encode(np.asfortranarray(annotation_sets.shape(points).astype(np.uint8)))
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}


def random_polygons(seed):
    """Polygons that cross themselves and reach over the edge."""
    generator = np.random.default_rng(seed)
    for _ in range(3):
        points = generator.random((generator.integers(3, 9), 2)) * [WIDTH * 1.3, HEIGHT * 1.3] - [7, 5]
        yield points.round(2).ravel().tolist()


def test_masks_equal_those_of_pycocotools(root):
    """`annToMask` of each annotation, in the order of the file."""

    def edit(content):
        for number, annotation in enumerate(content["annotations"]):
            points = np.reshape(annotation["segmentation"][0], (-1, 2)).tolist()
            kinds = (list(random_polygons(number)), annotation_sets.uncompressed_runs(points), compressed_runs(points))
            annotation["segmentation"] = kinds[number % 3]

    change(root, edit)
    source, labels = annotation_sets.read(root)
    api = coco_api.COCO(root / FILE)
    assert source.splits["train"]["id"] == [f"street{number}" for number in range(4)]
    for image in api.dataset["images"]:
        expected = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
        for annotation in api.imgToAnns[image["id"]]:
            expected[api.annToMask(annotation) > 0] = {3: 1, 7: 2}[annotation["category_id"]]
        assert np.array_equal(labels[image["file_name"].removesuffix(".jpg")], expected)
        assert expected.any()


def test_long_runs_of_the_compressed_string():
    """Runs of several characters, and differences below zero."""
    from pals_hf.data.annotations.coco import _decode_runs

    generator = np.random.default_rng(0)
    for share in (0.0, 0.001, 0.5, 1.0):
        pixels = np.asfortranarray(generator.random((300, 400)) < share, dtype=np.uint8)
        encoded = coco_mask.encode(pixels)
        runs = {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}
        assert np.array_equal(_decode_runs(runs, (400, 300), "x"), pixels)


def first(content):
    return content["annotations"][0]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: first(c).update(segmentation=[[1, 1, 5, 5]]), "annotation 1 has 2 corners, but needs at least 3"),
        (
            lambda c: first(c).update(segmentation=[[1, 1, 5, 5, 7]]),
            "annotation 1 has a polygon that is no list of x and",
        ),
        (lambda c: first(c).update(segmentation=[[1, 1, "a", 5, 7, 8]]), "corners that are not pairs of numbers"),
        (
            lambda c: first(c).update(segmentation=[[60, 1, 70, 1, 70, 9]]),
            "reaches from 60 to 70, but the image has a width",
        ),
        (lambda c: first(c).update(segmentation=[[1, 1, 1e6, 1, 7, 9]]), "reaches from 1 to 1e[+]06"),
        (lambda c: first(c).update(segmentation=[]), "annotation 1 has no segmentation, only a box"),
        (lambda c: first(c).pop("segmentation"), "annotation 1 has no segmentation, only a box"),
        (
            lambda c: first(c).update(segmentation={"size": [32, 48], "counts": "000"}),
            "run-length encoding that is damaged",
        ),
        (lambda c: first(c).update(segmentation={"size": [32, 48], "counts": [5, -5]}), "run-length encoding that is"),
        (lambda c: first(c).update(segmentation={"size": [9, 9], "counts": [81]}), r"mask of the size \[9, 9\]"),
        (lambda c: c["images"][0].update(width=10**9), "on an image of 1000000000x32 pixels, but the image has 48x32"),
    ],
)
def test_a_bad_sample_names_its_annotation(root, edit, message):
    change(root, edit)
    with pytest.raises(InputError, match=rf"instances_train2017\.json \(street0\.jpg\): .*{message}"):
        annotation_sets.read(root)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: first(c).update(category_id=9), r"annotation 1 has the category 9, .* categories \(3, 7\)"),
        (
            lambda c: first(c).update(image_id=99),
            "an annotation belongs to the image 99, which is not among the images",
        ),
        (lambda c: first(c).pop("image_id"), "annotation number 0 is not valid: .*image_id"),
        (lambda c: c.update(images=[]), "is an empty export: it names no images"),
        (lambda c: c.update(annotations=[]), "is an empty export: it has no annotations"),
        (lambda c: c.pop("categories"), "cannot be read: .*categories"),
        (lambda c: c["categories"][0].update(id=7), "has two categories of one id"),
        (lambda c: c["categories"][0].update(name="bus"), "have other categories"),
        (lambda c: c["images"][0].update(id=2), "has two images of one id"),
        (lambda c: c["images"][0].update(file_name="street1.jpg"), r"street1\.jpg twice"),
        (
            lambda c: c["images"][0].update(file_name="../../secret.jpg"),
            "names the image '../../secret.jpg', which is not",
        ),
    ],
)
def test_a_file_that_does_not_fit(root, edit, message):
    change(root, edit)
    with pytest.raises(InputError, match=rf"\.json.*{message}"):
        annotation_sets.read(root)


def test_a_truncated_file(root):
    path = root / FILE
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"instances_train2017\.json cannot be read: Input data was truncated"):
        annotation_sets.read(root)


def test_a_used_category_stays_though_it_is_a_parent(tmp_path):
    root = annotation_sets.roboflow_coco(tmp_path)
    path = root / "train" / "_annotations.coco.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["category_id"] = 0
    path.write_text(json.dumps(content), encoding="utf-8-sig")
    assert annotation_sets.read(root)[0].classes.names == ("background", "street", "car", "road")


def test_an_image_without_annotations_is_background(root):
    change(root, lambda content: content.update(annotations=content["annotations"][2:]))
    assert not annotation_sets.read(root)[1]["street0"].any()
    assert (annotation_sets.read(root, unlabelled="void")[1]["street0"] == 255).all()


def test_a_file_that_changes_after_it_was_opened(root):
    """A stream reads annotations where they were in the file."""
    source = annotation_sets.find_source(None, root, None, (None, None), (None, None, ()))
    change(root, lambda content: content.update(info={"description": "x" * 99}))
    row = next(iter(annotation_sets.to_stream(source.splits["train"])))
    with pytest.raises(InputError, match=r"an annotation is not valid: .* Was the file changed"):
        annotation_sets.read_pair(row, source.classes)


def test_a_large_file_stays_on_the_disk(root):
    """What is kept of an image does not grow with its polygons."""

    def edit(content):
        for annotation in content["annotations"]:
            annotation["segmentation"] = [annotation["segmentation"][0] * 500]

    change(root, edit)
    source = annotation_sets.find_source(None, root, None, (None, None), (None, None, ()))
    assert (root / FILE).stat().st_size > 100_000
    rows = list(annotation_sets.to_stream(source.splits["train"]))
    assert max(len(row["labels"]["bytes"]) for row in rows) < 1000
