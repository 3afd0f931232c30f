"""Masks that number objects instead of classes, as cellpose and ImageJ write them."""

from __future__ import annotations

from ..errors import InputError
from ..files import read_bytes
from .layouts import Record
from .pictures import decode_picture

_IMAGE_DESCRIPTION = 270  # tag of TIFF, in which ImageJ names itself


def find_label_images(records: list[Record]) -> tuple[dict[str, str] | None, tuple[str, ...]]:
    """Return the classes of masks that number objects, and a sentence that says so, or `(None, ())`.

    cellpose marks its masks by their name, `NAME_cp_masks`. ImageJ and older versions of cellpose write TIFFs of 16 or
    32 bits. What a TIFF of 8 bits means cannot be told.

    Args:
        records: the training images, in a folder that does not name the classes. The first mask counts.

    Raises:
        InputError: the masks may number objects or classes.
    """
    path = records[0].labels
    if path.stem.endswith("_cp_masks"):
        name = "cell"
    elif path.suffix.lower() in (".tif", ".tiff"):
        picture = decode_picture(read_bytes(path), str(path))
        is_imagej = str(getattr(picture, "tag_v2", {}).get(_IMAGE_DESCRIPTION, "")).startswith("ImageJ=")
        if not is_imagej and not path.stem.endswith("_masks"):
            return None, ()
        if picture.mode in ("1", "L", "P"):
            raise InputError(
                f"{path} may number objects or classes: its program writes both as TIFF of 8 bits. Name the values in "
                'id2label.json, like {"0": "background", "1-255": "cell"} for objects, or {"0": "background", "1": '
                '"cell"} for classes.'
            )
        name = "object" if is_imagej else "cell"
    else:
        return None, ()
    note = (
        f"the masks number objects, so every value above 0 is read as the class {name!r}. To read them in another "
        "way, name the values in id2label.json."
    )
    return {"0": "background", "1-65535": name}, (note,)
