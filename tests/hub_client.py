"""What a user does with the Hub, in a process of its own: `hub_client.py WHAT FOLDER`. The environment says which Hub.

A process of its own, because the client reads its environment when it is imported.
"""

import json
import sys
from pathlib import Path

import data_sets


def push_and_load_a_model(folder):
    """A network of more than 10 MB, private; then a second push with other weights."""
    import torch
    from conftest import tiny_segformer
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, pipeline

    from pals_hf.models import build_image_processor

    network = tiny_segformer(hidden_sizes=[32, 64, 128, 256], decoder_hidden_size=256, depths=[2, 2, 2, 2]).eval()
    for wanted in (1.0, 2.0):
        network.decode_head.classifier.bias.data.fill_(wanted)
        network.push_to_hub("street-model", private=True)
        build_image_processor(None).push_to_hub("street-model")
    loaded = AutoModelForSemanticSegmentation.from_pretrained("maintainer/street-model")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), network.parameters(), strict=True))
    assert AutoImageProcessor.from_pretrained("maintainer/street-model").do_resize is False
    segment = pipeline("image-segmentation", model="maintainer/street-model")
    return {"labels": [found["label"] for found in segment(Image.new("RGB", (64, 64)))]}


def push_and_load_a_data_set(folder):
    """Images and masks, with the class names; loaded whole and as a stream, and a fraction drawn twice."""
    from datasets import load_dataset
    from huggingface_hub import HfApi

    from pals_hf import load_segmentation_dataset
    from pals_hf.data import EvalTransform, FractionManifest, StreamedDataset, stream_segmentation_dataset
    from pals_hf.models import build_image_processor

    root = data_sets.parquet(folder / "set")
    load_dataset(str(root)).push_to_hub("maintainer/streets")
    HfApi().upload_file(
        path_or_fileobj=root / "id2label.json",
        path_in_repo="id2label.json",
        repo_id="maintainer/streets",
        repo_type="dataset",
    )
    local, hub = load_segmentation_dataset(str(root)), load_segmentation_dataset("maintainer/streets")
    assert hub.id2label == local.id2label
    assert hub.train["labels_sha256"] == local.train["labels_sha256"]
    manifests = [FractionManifest.draw(data.train, 0.5) for data in (local, hub)]
    assert manifests[0].ids == manifests[1].ids
    stream = stream_segmentation_dataset("maintainer/streets")
    dataset = StreamedDataset(stream.train, stream.classes, EvalTransform(build_image_processor(None)))
    streamed = [pending.load()["labels"].sum().item() for pending in dataset]
    return {"train": len(hub.train), "validation": len(hub.validation), "streamed": len(streamed)}


if __name__ == "__main__":
    what, folder = sys.argv[1], Path(sys.argv[2])
    (folder / "result.json").write_text(json.dumps(globals()[what](folder)))
