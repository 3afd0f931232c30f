"""Class names, licence and revision of a data set on the Hub."""

from __future__ import annotations

import re
from pathlib import Path

from datasets import Dataset, IterableDataset
from httpx2 import HTTPError

from ..errors import InputError, first_line


def names_on_hub(dataset_name: str) -> Path:
    """Download `id2label.json`, the class names of a data set.

    Raises:
        InputError: the file does not exist, or cannot be downloaded.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        return Path(hf_hub_download(dataset_name, "id2label.json", repo_type="dataset"))
    except Exception as error:  # the client's errors have no common base class
        is_missing = isinstance(error, RemoteEntryNotFoundError)
        reason = "does not exist" if is_missing else f"cannot be downloaded ({first_line(error)})"
        raise InputError(f"{dataset_name}: id2label.json {reason}. Give the class names with id2label.") from error


def license_on_hub(dataset_name: str) -> str | None:
    """Return the licence that the data set's card names, or None."""
    from huggingface_hub import DatasetCard

    try:
        license = DatasetCard.load(dataset_name).data.get("license")
    except Exception:  # there is no card, no connection, or a header that is no YAML
        return None
    return ", ".join(map(str, license)) if isinstance(license, list) else license and str(license)


def revision_on_hub(dataset_name: str, split: Dataset | IterableDataset) -> str | None:
    """Return the commit of a loaded split, or None if it is unknown.

    In the cache, the commit is the name of the data set's folder. A stream always reads the newest commit.
    """
    from huggingface_hub import HfApi

    if isinstance(split, IterableDataset):
        try:
            return HfApi().dataset_info(dataset_name).sha
        except (HTTPError, OSError):  # the data could be read, only its commit could not
            return None
    folders = [Path(file["filename"]).parent.name for file in split.cache_files]
    return next((name for name in folders if re.fullmatch("[0-9a-f]{40}", name)), None)
