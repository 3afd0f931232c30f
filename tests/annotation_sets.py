"""Small data sets as annotation tools export them: the same seeded scenes, with polygons for the objects.

Each function writes a training split of 4 images, and of 2 for validation unless the tool has no splits.
"""

import base64
import io
import json
import zlib

import numpy as np
from data_sets import save
from PIL import Image as PILImage
from PIL import ImageDraw, TiffImagePlugin

from pals_hf.data.checking import read_pair
from pals_hf.data.columns import to_stream
from pals_hf.data.sources import find_source

WIDTH, HEIGHT = 48, 32
CLASSES = ("car", "road")
COLORS = {"background": (0, 0, 0), "car": (128, 0, 0), "road": (0, 128, 0)}
SPLITS = {"train": 4, "valid": 2}


def objects(seed):
    """The objects of a scene: (class, corners), a triangle and a quadrilateral that overlap."""
    generator = np.random.default_rng(seed)
    x, y = generator.integers(2, 20), generator.integers(2, 10)
    road = [[x, y], [x + 24, y + 2], [x + 22, y + 18], [x + 2, y + 16]]
    car = [[x + 5, y + 3], [x + 18, y + 6], [x + 8, y + 15]]
    return [("road", np.asarray(road, dtype=float).tolist()), ("car", np.asarray(car, dtype=float).tolist())]


def scenes(count, start=0):
    """Yield (name, picture, objects) of scenes."""
    for seed in range(start, start + count):
        found = objects(seed)
        tint = np.asarray(drawn(found)) * 60 + np.random.default_rng(seed).integers(0, 40, (HEIGHT, WIDTH))
        picture = PILImage.fromarray(np.repeat(tint[..., None], 3, axis=2).astype(np.uint8))
        yield f"street{seed}", picture, found


def drawn(found, values=None):
    """A mask of the objects, filled by PIL: 1 for a car and 2 for a road."""
    mask = PILImage.new("L", (WIDTH, HEIGHT))
    for name, points in found:
        value = (values or {"car": 1, "road": 2})[name]
        ImageDraw.Draw(mask).polygon([tuple(point) for point in points], fill=value, outline=value)
    return mask


def shape(points):
    """The pixels of a polygon."""
    return np.asarray(drawn([("car", points)])) > 0


def splits(names=SPLITS):
    start = 0
    for split, count in names.items():
        yield split, list(scenes(count, start))
        start += count


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def coco_content(found, segmentation=None):
    """COCO's three lists for scenes; the categories have gaps in their ids."""
    ids = {"car": 3, "road": 7}
    images, annotations = [], []
    for number, (name, _, shapes) in enumerate(found, start=1):
        images.append({"id": number, "file_name": f"{name}.jpg", "width": WIDTH, "height": HEIGHT})
        for label, points in shapes:
            flat = [coordinate for point in points for coordinate in point]
            entry = [flat] if segmentation is None else segmentation(points)
            number_of = len(annotations) + 1
            annotations.append(
                {"id": number_of, "image_id": number, "category_id": ids[label], "segmentation": entry, "iscrowd": 0}
            )
    categories = [{"id": value, "name": label, "supercategory": "street"} for label, value in ids.items()]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def coco(root):
    """COCO's own folders: `annotations/instances_train2017.json` and `train2017`."""
    for (_, found), split in zip(splits(), ("train2017", "val2017"), strict=True):
        for name, picture, _ in found:
            save(picture, root / split / f"{name}.jpg")
        write_json(root / "annotations" / f"instances_{split}.json", coco_content(found))
    return root


def uncompressed_runs(points):
    """COCO's run-length encoding, column by column, as a list."""
    pixels = shape(points).T.ravel()
    ends = np.flatnonzero(np.diff(pixels)) + 1
    runs = np.diff([0, *ends, len(pixels)]).tolist()
    return {"size": [HEIGHT, WIDTH], "counts": [0, *runs] if pixels[0] else runs}


def roboflow_coco(root):
    """`train/_annotations.coco.json` beside the images, and a category that is the parent of the others."""
    for split, found in splits():
        for name, picture, _ in found:
            save(picture, root / split / f"{name}.jpg")
        content = coco_content(found, uncompressed_runs)
        content["categories"].insert(0, {"id": 0, "name": "street", "supercategory": "none"})
        write_json(root / split / "_annotations.coco.json", content)
    return root


def roboflow_masks(root):
    """Images and `NAME_mask.png` in one folder, `_classes.csv` in each split."""
    for split, found in splits():
        for name, picture, shapes in found:
            save(picture, root / split / f"{name}_jpg.rf.1.jpg")
            save(drawn(shapes), root / split / f"{name}_jpg.rf.1_mask.png")
        (root / split / "_classes.csv").write_text("Pixel Value, Class\n0, background\n1, car\n2, road\n")
    return root


def in_colors(shapes):
    table = np.array([COLORS[name] for name in ("background", *CLASSES)], dtype=np.uint8)
    return PILImage.fromarray(table[np.asarray(drawn(shapes))])


def cvat(root):
    """CVAT's "Segmentation mask 1.1": VOC's folders, masks that hold colours, `labelmap.txt` and `default.txt`."""
    names = []
    for name, picture, shapes in scenes(6):
        names.append(f"my {name}")
        save(picture, root / "JPEGImages" / f"my {name}.png")
        for folder in ("SegmentationClass", "SegmentationObject"):
            save(in_colors(shapes), root / folder / f"my {name}.png")
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "default.txt").write_text("\n".join(names) + "\n")
    lines = [f"{name}:{','.join(map(str, color))}::" for name, color in COLORS.items()]
    (root / "labelmap.txt").write_text("\n".join(["# label:color_rgb:parts:actions", *lines]) + "\n")
    return root


def as_png(pixels):
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, format="png")
    return buffer.getvalue()


def labelme_shapes(shapes):
    """The last object as a mask in its bounding box, the others as polygons."""
    *others, (label, points) = shapes
    left, top = np.min(points, axis=0).astype(int).tolist()
    right, bottom = np.max(points, axis=0).astype(int).tolist()
    pixels = shape(points)[top : bottom + 1, left : right + 1]
    box = [[left, top], [right, bottom]]
    mask = base64.b64encode(as_png(pixels.astype(np.uint8) * 255)).decode()
    entries = [{"label": name, "points": corners, "shape_type": "polygon", "mask": None} for name, corners in others]
    return [*entries, {"label": label, "points": box, "shape_type": "mask", "mask": mask}]


def labelme(root):
    """A file beside each image."""
    for split, found in splits():
        for name, picture, shapes in found:
            save(picture, root / split / f"{name}.jpg")
            content = {"version": "6.3.1", "flags": {}, "shapes": labelme_shapes(shapes), "imagePath": f"{name}.jpg"}
            content |= {"imageData": None, "imageHeight": HEIGHT, "imageWidth": WIDTH}
            write_json(root / split / f"{name}.json", content)
    return root


def labelme_voc(root):
    """labelme's `labelme2voc.py`: palette masks, `class_names.txt` and no lists."""
    for name, picture, shapes in scenes(6):
        save(picture, root / "JPEGImages" / f"{name}.jpg")
        mask = drawn(shapes)
        mask.putpalette([channel for color in COLORS.values() for channel in color])
        save(mask, root / "SegmentationClass" / f"{name}.png")
        save(picture, root / "SegmentationClassVisualization" / f"{name}.jpg")
    (root / "class_names.txt").write_text("_background_\ncar\nroad\n")
    return root


def brush_codes(pixels):
    """Label Studio's run-length encoding of RGBA pixels, as `encode_rle` of label_studio_sdk writes it."""
    values = np.repeat(np.where(pixels, 255, 0).ravel(), 4)
    starts = np.flatnonzero(np.diff(values, prepend=-1))
    bits = f"{len(values):032b}{7:05b}" + "".join(f"{size - 1:04b}" for size in (3, 4, 8, 16))
    for length, value in zip(np.diff([*starts, len(values)]), values[starts], strict=True):
        width, size = next((index, size) for index, size in enumerate((3, 4, 8, 16)) if length <= 2**size)
        bits += f"1{width:02b}{length - 1:0{size}b}{value:08b}"
    bits += "0" * (-len(bits) % 8)
    return [int(bits[at : at + 8], 2) for at in range(0, len(bits), 8)]


def label_studio_tasks(found):
    """The first object as a brush mask, the others as polygons in percent."""
    tasks = []
    for number, (name, _, shapes) in enumerate(found, start=1):
        results = []
        for place, (label, points) in enumerate(shapes):
            size = {"original_width": WIDTH, "original_height": HEIGHT, "image_rotation": 0}
            if place == 0:
                value = {"format": "rle", "rle": brush_codes(shape(points)), "brushlabels": [label]}
            else:
                percent = [[x / WIDTH * 100, y / HEIGHT * 100] for x, y in points]
                value = {"points": percent, "closed": True, "polygonlabels": [label]}
            results.append({**size, "id": f"r{place}", "type": list(value)[-1], "value": value, "to_name": "image"})
        results.append({"id": "c", "type": "choices", "value": {"choices": ["day"]}, "to_name": "image"})
        annotation = {"id": 10 + number, "result": results, "was_cancelled": False, "ground_truth": False}
        data = {"image": f"/data/upload/1/0123abcd-{name}.jpg"}
        tasks.append({"id": number, "annotations": [annotation], "predictions": [], "data": data})
    return tasks


def label_studio(root):
    """The JSON export beside the images, and the brush masks as PNG."""
    found = list(scenes(6))
    for number, (name, picture, shapes) in enumerate(found, start=1):
        save(picture, root / "images" / f"{name}.jpg")
        label, points = shapes[0]
        mask = PILImage.fromarray(np.where(shape(points), 255, 0).astype(np.uint8))
        save(mask, root / f"task-{number}-annotation-{10 + number}-by-1-tag-{label}-0.png")
    write_json(root / "project-1-at-2026-01-01-00-00-0123abcd.json", label_studio_tasks(found))
    return root


def yolo(root):
    """Ultralytics' folders: `images/train`, `labels/train` and `data.yaml`."""
    for split, found in splits({"train": 4, "val": 2}):
        for name, picture, shapes in found:
            save(picture, root / "images" / split / f"{name}.jpg")
            lines = []
            for label, points in shapes:
                shares = [f"{x / WIDTH:.8f} {y / HEIGHT:.8f}" for x, y in points]
                lines.append(" ".join([str(CLASSES.index(label)), *shares]))
            text = root / "labels" / split / f"{name}.txt"
            text.parent.mkdir(parents=True, exist_ok=True)
            text.write_text("\n".join(lines) + "\n")
    (root / "data.yaml").write_text("path: ../datasets/x\ntrain: images/train\nval: images/val\nnames: [car, road]\n")
    return root


def supervisely(root):
    """A project: the last object as a bitmap, the others as polygons."""
    for split, found in splits():
        for name, picture, shapes in found:
            save(picture, root / split / "img" / f"{name}.jpg")
            *others, (label, points) = shapes
            entries = [
                {"classTitle": title, "geometryType": "polygon", "points": {"exterior": corners, "interior": []}}
                for title, corners in others
            ]
            rows, columns = np.nonzero(shape(points))
            top, left = int(rows.min()), int(columns.min())
            pixels = shape(points)[top : rows.max() + 1, left : columns.max() + 1]
            data = base64.b64encode(zlib.compress(as_png(pixels))).decode()
            bitmap = {"data": data, "origin": [left, top]}
            entries.append({"classTitle": label, "geometryType": "bitmap", "bitmap": bitmap})
            content = {"description": "", "size": {"height": HEIGHT, "width": WIDTH}, "objects": entries}
            write_json(root / split / "ann" / f"{name}.jpg.json", content)
    classes = [{"title": name, "shape": "any", "color": "#80FF00"} for name in CLASSES]
    write_json(root / "meta.json", {"classes": classes, "tags": []})
    return root


def numbered(shapes):
    """A mask of 16 bits that numbers the objects, from 300 on."""
    return PILImage.fromarray(np.asarray(drawn(shapes)).astype(np.uint16) * 300)


def cellpose(root):
    """`NAME.tif` and `NAME_cp_masks.png` in one folder."""
    for split, found in splits():
        for name, picture, shapes in found:
            save(picture, root / split / f"{name}.tif")
            save(numbered(shapes), root / split / f"{name}_cp_masks.png")
    return root


def imagej(root):
    """Label images that ImageJ wrote, in a folder of their own."""
    about = TiffImagePlugin.ImageFileDirectory_v2()
    about[270] = "ImageJ=1.54f\nmin=0.0\nmax=600.0\n"
    for split, found in splits():
        for name, picture, shapes in found:
            save(picture, root / split / "images" / f"{name}.tif")
            (root / split / "masks").mkdir(parents=True, exist_ok=True)
            numbered(shapes).save(root / split / "masks" / f"{name}.tif", tiffinfo=about)
    return root


def kaggle(root):
    """`train`, `train_labels` with `NAME_L.png` in colours, and `class_dict.csv`."""
    for split, found in splits({"train": 4, "val": 2}):
        for name, picture, shapes in found:
            save(picture, root / split / f"{name}.png")
            save(in_colors(shapes), root / f"{split}_labels" / f"{name}_L.png")
    rows = [f"{name},{','.join(map(str, color))}" for name, color in COLORS.items()]
    (root / "class_dict.csv").write_text("name,r,g,b\n" + "\n".join(rows) + "\n")
    return root


# By the name of the folder in the table of `docs/data.md`.
WRITERS = {
    "my_coco": coco,
    "my_roboflow_coco": roboflow_coco,
    "my_roboflow_masks": roboflow_masks,
    "my_cvat": cvat,
    "my_labelme": labelme,
    "my_labelme_voc": labelme_voc,
    "my_label_studio": label_studio,
    "my_yolo": yolo,
    "my_supervisely": supervisely,
    "my_cellpose": cellpose,
    "my_imagej": imagej,
    "my_kaggle": kaggle,
}


def read(root, **options):
    """Read a data set without the cache: its source, and the labels of each image by its id."""
    names = tuple(
        options.pop(name, default) for name, default in (("id2label", None), ("palette", None), ("void", ()))
    )
    source = find_source(None, root, None, (None, None), names, **options)
    labels = {}
    for split in ("train", "validation"):
        if split in source.splits:
            for row in to_stream(source.splits[split]):
                labels[row["id"]] = read_pair(row, source.classes).labels
    return source, labels


def expected(found, values=None):
    """The labels of scenes, by the last part of their names."""
    return {name: np.asarray(drawn(shapes, values)) for name, _, shapes in found}


def assert_as_drawn(labels, values=None):
    """Every image has the labels of its scene, filled by PIL."""
    masks = expected(scenes(6), values)
    assert len(labels) == 6
    for id, found in labels.items():
        name = next(name for name in masks if name in id)
        assert np.array_equal(found, masks[name]), id
