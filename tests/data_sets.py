"""Small data sets in the exact layout of those people download: seeded pictures whose colours follow the classes."""

import json

import numpy as np
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage

SIZE = (32, 48)


def scene(values, seed=0, size=SIZE):
    """An RGB picture and a mask of the given raw values, in rectangles, the first of them the background."""
    generator = np.random.default_rng(seed)
    mask = np.full(size, values[0], dtype=np.int32)
    shown = np.zeros(size, dtype=np.int32)
    for index, value in enumerate(values[1:], start=1):
        top, left = generator.integers(0, size[0] - 8), generator.integers(0, size[1] - 8)
        mask[top : top + 10, left : left + 14] = value
        shown[top : top + 10, left : left + 14] = index
    noise = generator.integers(0, 40, (*size, 3))
    tint = np.array([37, 71, 113])
    picture = ((shown[..., None] + 1) * tint) % 200 + noise
    return PILImage.fromarray(picture.astype(np.uint8)), mask


def save(picture, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, **({"quality": 95} if path.suffix == ".jpg" else {}))


def save_palette(mask, path):
    """A palette PNG, as Pascal VOC's."""
    picture = PILImage.fromarray(mask.astype(np.uint8))
    picture.putpalette([value for index in range(256) for value in (index * 37 % 256, index * 91 % 256, index)])
    save(picture, path)


def cityscapes(root, train=4, val=3, test=2):
    """`leftImg8bit` and `gtFine` with labelIds: road 7, car 26, sky 23, and void 3 and 4."""
    cities = {"train": ("aachen", train), "val": ("frankfurt", val), "test": ("berlin", test)}
    for split, (city, count) in cities.items():
        for index in range(count):
            stem = f"{city}/{city}_{index:06d}_000019"
            picture, mask = scene([7, 26, 23, 3, 4], seed=[len(split), index])
            save(picture, root / "leftImg8bit" / split / f"{stem}_leftImg8bit.png")
            mask = mask if split != "test" else np.zeros_like(mask)
            for kind in ("labelIds", "instanceIds"):
                value = mask if kind == "labelIds" else mask * 1000
                name = root / "gtFine" / split / f"{stem}_gtFine_{kind}.png"
                save(PILImage.fromarray(value.astype(np.uint8 if kind == "labelIds" else np.uint16)), name)
            save(picture, root / "gtFine" / split / f"{stem}_gtFine_color.png")
    return root


def voc2012(root, trainaug=False):
    """`VOCdevkit/VOC2012` with palette masks; 255 is the border. With `trainaug` also the SBD images."""
    home = root / "VOCdevkit" / "VOC2012"
    lists = {"train": ["2007_000032", "2007_000039", "2007_000063"], "val": ["2007_000033", "2007_000042"]}
    sbd = ["2008_000002", "2008_000003"] if trainaug else []
    for number, identifier in enumerate([*lists["train"], *lists["val"], *sbd]):
        picture, mask = scene([0, 1 + number % 3, 15, 255], seed=number)
        save(picture, home / "JPEGImages" / f"{identifier}.jpg")
        if identifier not in sbd:
            save_palette(mask, home / "SegmentationClass" / f"{identifier}.png")
        if trainaug:
            save(PILImage.fromarray(mask.astype(np.uint8)), home / "SegmentationClassAug" / f"{identifier}.png")
    save(scene([0, 1], seed=99)[0], home / "JPEGImages" / "2008_000001.jpg")
    lists |= {"test": ["2008_000001"]} | ({"trainaug": [*lists["train"], *sbd]} if trainaug else {})
    (home / "ImageSets" / "Segmentation").mkdir(parents=True)
    for name, ids in lists.items():
        (home / "ImageSets" / "Segmentation" / f"{name}.txt").write_text("\n".join(ids) + "\n")
    return root


def ade20k(root):
    """`ADEChallengeData2016`: 0 is void, 1 to 150 are the classes."""
    for split, count in (("training", 3), ("validation", 2)):
        for index in range(count):
            name = f"ADE_{'train' if split == 'training' else 'val'}_{index + 1:08d}"
            picture, mask = scene([1, 3, 150, 0], seed=[len(split), index])
            home = root / "ADEChallengeData2016"
            save(picture, home / "images" / split / f"{name}.jpg")
            save(PILImage.fromarray(mask.astype(np.uint8)), home / "annotations" / split / f"{name}.png")
    return root


def camvid(root):
    """SegNet's split: `train` and `trainannot`, 0 to 10 are the classes, 11 is void."""
    for split, count in (("train", 4), ("val", 2), ("test", 2)):
        for index in range(count):
            picture, mask = scene([3, 0, 8, 11], seed=[len(split), index])
            save(picture, root / split / f"0001TP_{index:06d}.png")
            save(PILImage.fromarray(mask.astype(np.uint8)), root / f"{split}annot" / f"0001TP_{index:06d}.png")
    return root


PALETTE = {"ground": [128, 64, 128], "wall": "#ff0000", "sky": [70, 130, 180], "void": [0, 0, 0]}


def color_folder(root):
    """`images/SPLIT` and `labels/SPLIT` in nested folders, masks that hold colours, and `palette.json`."""
    colors = np.array([[128, 64, 128], [255, 0, 0], [70, 130, 180], [0, 0, 0]], dtype=np.uint8)
    for split, count in (("train", 4), ("val", 2)):
        for index in range(count):
            picture, mask = scene([0, 1, 2, 3], seed=[len(split), index])
            name = f"day {index % 2}/straße {index}"
            save(picture, root / "images" / split / f"{name}.jpg")
            save(PILImage.fromarray(colors[mask]), root / "labels" / split / f"{name}_mask.png")
    (root / "palette.json").write_text(json.dumps(PALETTE))
    return root


def parquet(root):
    """`train` and `validation` in Parquet files, as the Hub keeps data sets, and `id2label.json`."""
    root.mkdir(parents=True)
    pictures = root.parent / "pictures"
    features = Features({"image": Image(), "annotation": Image(), "place": Value("string")})
    for split, count in (("train", 4), ("validation", 2)):
        images, masks = [], []
        for index in range(count):
            picture, mask = scene([0, 1, 2, 255], seed=[len(split), index])
            for kind, value in (("image", picture), ("mask", PILImage.fromarray(mask.astype(np.uint8)))):
                save(value, pictures / f"{split}-{index}-{kind}.png")
            images.append(str(pictures / f"{split}-{index}-image.png"))
            masks.append(str(pictures / f"{split}-{index}-mask.png"))
        columns = {"image": images, "annotation": masks, "place": ["here"] * count}
        table = Dataset.from_dict(columns, features=features)
        table.map(lambda row: row).to_parquet(root / f"{split}-00000-of-00001.parquet")
    (root / "id2label.json").write_text(json.dumps(["ground", "wall", "sky"]))
    return root
