"""What a user does with the Hub, in a process of its own: `hub_client.py WHAT FOLDER`. The environment says which Hub.

A process of its own, because the client reads its environment when it is imported. What a part returns is written to
`FOLDER/result.json`; the repositories it made are deleted where they are on the real Hub.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import sys
import time
import uuid
from pathlib import Path

import data_sets
from huggingface_hub import HfApi, get_session, whoami

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

IS_REAL = "PALS_HF_TESTS_ON_REAL_HUB" in os.environ
NUMBER = f"-{uuid.uuid4().hex[:8]}" if IS_REAL else ""
REFUSED = '{"errors": [{"message": "license must be one of ..."}], "warnings": []}'
SHORT = ["--train_count", "4", "--per_device_train_batch_size", "2", "--logging_steps", "1", "--disable_tqdm", "True"]


def name_of(what):
    """A repository of the user's own."""
    return f"{whoami()['name']}/{what}{NUMBER}"


def push_and_load_a_model(folder):
    """A network of more than 10 MB, private; then a second push with other weights."""
    import torch
    from conftest import tiny_segformer
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, pipeline

    from pals_hf.models import build_image_processor

    repo_id = name_of("street-model")
    network = tiny_segformer(hidden_sizes=[32, 64, 128, 256], decoder_hidden_size=256, depths=[2, 2, 2, 2]).eval()
    for wanted in (1.0, 2.0):
        network.decode_head.classifier.bias.data.fill_(wanted)
        network.push_to_hub(repo_id, private=True)
        build_image_processor(repo_id).push_to_hub(repo_id)  # at first there is none
    loaded = AutoModelForSemanticSegmentation.from_pretrained(repo_id)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), network.parameters(), strict=True))
    assert AutoImageProcessor.from_pretrained(repo_id).do_resize is False
    assert HfApi().model_info(repo_id).private
    segment = pipeline("image-segmentation", model=repo_id)
    return {"labels": [found["label"] for found in segment(Image.new("RGB", (64, 64)))]}


def push_and_load_a_data_set(folder):
    """Images and masks, with the class names; loaded whole, as a stream, and a fraction by its manifest."""
    from datasets import load_dataset

    from pals_hf import load_segmentation_dataset
    from pals_hf.data import EvalTransform, FractionManifest, StreamedDataset, stream_segmentation_dataset
    from pals_hf.models import build_image_processor

    repo_id = name_of("streets")
    root = data_sets.parquet(folder / "set")
    load_dataset(str(root)).push_to_hub(repo_id, private=True)
    local = load_segmentation_dataset(str(root))
    drawn = FractionManifest.draw(local.train, 0.5)
    drawn.save(folder / "train_fraction.json")
    for path in (root / "id2label.json", folder / "train_fraction.json"):
        HfApi().upload_file(path_or_fileobj=path, path_in_repo=path.name, repo_id=repo_id, repo_type="dataset")
    hub = load_segmentation_dataset(repo_id)
    assert hub.id2label == local.id2label
    assert hub.train["labels_sha256"] == local.train["labels_sha256"]
    assert hub.revision == HfApi().dataset_info(repo_id).sha
    assert local.revision is None
    published = HfApi().hf_hub_download(repo_id, "train_fraction.json", repo_type="dataset")
    fraction = FractionManifest.load(published, hub.train).select(hub.train)
    assert fraction["image_sha256"] == drawn.select(local.train)["image_sha256"]
    assert FractionManifest.draw(hub.train, 0.5).ids == drawn.ids
    stream = stream_segmentation_dataset(repo_id)
    dataset = StreamedDataset(stream.train, stream.classes, EvalTransform(build_image_processor(None)))
    streamed = [pending.load()["labels"].sum().item() for pending in dataset]
    return {
        "train": len(hub.train),
        "validation": len(hub.validation),
        "fraction": len(fraction),
        "streamed": len(streamed),
        "same revision": stream.revision == hub.revision,
    }


def train_and_push(folder):
    """A run that pushes as it goes, whose card is then followed, and which another machine goes on from."""
    from huggingface_hub import ModelCard
    from PIL import Image

    from pals_hf.cli import train

    repo_id, run = name_of("trained"), folder / "run"
    flags = [*SHORT, "--max_steps", "4", "--save_steps", "2", "--eval_steps", "2", "--license", "apache-2.0"]
    pushing = ["--push_to_hub", "True", "--hub_model_id", repo_id, "--hub_token", os.environ["HF_TOKEN"]]
    pushing += ["--hub_private_repo", "True", "--hub_strategy", "checkpoint"]
    train.main([*flags, *pushing, "--output_dir", str(run)])
    card = ModelCard.load(repo_id)
    assert card.data.to_dict() == ModelCard((run / "README.md").read_text()).data.to_dict()
    assert card.data.license == "apache-2.0"
    assert card.data.model_name == repo_id
    scored = json.loads((run / "eval_results.json").read_text())["eval_mean_iou"]
    assert scored == next(result.metric_value for result in card.data.eval_results if result.metric_type == "mean_iou")
    # What the card says is what runs.
    os.chdir(folder)
    Image.new("RGB", (64, 48), "grey").save("street.jpg")
    (code,) = re.findall(r"^```python\n(.*?)^```", card.text, re.MULTILINE | re.DOTALL)
    found = io.StringIO()
    with contextlib.redirect_stdout(found):
        exec(code, {})
    # Another machine, which has nothing but the repository.
    other = folder / "other"
    train.main([*flags, "--max_steps", "6", "--resume_from_checkpoint", repo_id, "--output_dir", str(other)])
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.suppress(SystemExit):
        train.main([*flags, "--max_steps", "7", "--resume_from_checkpoint", repo_id, "--output_dir", str(run)])
    history = json.loads((other / "trainer_state.json").read_text())["log_history"]
    return {
        "found": found.getvalue(),
        "files": sorted(HfApi().list_repo_files(repo_id)),
        "again": said.getvalue(),
        "steps": sorted({entry["step"] for entry in history if "loss" in entry}),
        "history": [entry["loss"] for entry in history if "loss" in entry],
        "first history": [
            entry["loss"]
            for entry in json.loads((run / "trainer_state.json").read_text())["log_history"]
            if "loss" in entry
        ],
    }


def push_through_faults(folder):
    """A finished run, pushed while the server does all sorts of things; what each attempt ended in."""
    from conftest import tiny_segformer
    from trained import enliven

    from pals_hf.cli import push, train
    from pals_hf.data.hub_facts import names_on_hub
    from pals_hf.errors import InputError
    from pals_hf.hub import download_checkpoint
    from pals_hf.models import build_image_processor

    network = enliven(tiny_segformer(hidden_sizes=[32, 64, 128, 256], decoder_hidden_size=256, depths=[2, 2, 2, 2]))
    network.save_pretrained(folder / "start")
    run = folder / "run"
    train.main([*SHORT, "--max_steps", "1", "--model_name_or_path", str(folder / "start"), "--output_dir", str(run)])
    weights, results = (run / "model.safetensors").read_bytes(), {}

    def attempt(what, repo_id, *faults, flags=()):
        inject(*faults)
        out, begin = io.StringIO(), time.monotonic()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            try:
                push.main([str(run), "--repo_id", repo_id, *flags])
                code = 0
            except SystemExit as stop:
                code = stop.code
        inject()
        assert (run / "model.safetensors").read_bytes() == weights
        lines = [line for line in out.getvalue().splitlines() if line.startswith(("error: ", "pushed: "))]
        results[what] = {"code": code, "lines": lines, "seconds": time.monotonic() - begin}

    commit, create = {"method": "POST", "path": "/commit/"}, {"method": "POST", "path": "/api/repos/create"}
    put, check = {"method": "PUT", "path": "/_lfs/"}, {"method": "POST", "path": "/api/validate-yaml"}
    private = ("--private", "--leave_out", "predictions.png", "*.bin")
    attempt("401", "maintainer/a", {**create, "status": 401, "times": 9}, flags=private)
    attempt("403 for a large file", "maintainer/b", {**put, "status": 403, "times": 9})
    attempt("cut in a large file", "maintainer/f", put)  # before the server has it
    attempt("403", "maintainer/b", {**commit, "status": 403, "times": 9})
    attempt("a card it refuses", "maintainer/b", {**check, "status": 400, "body": REFUSED, "times": 9})
    attempt("a page for JSON", "maintainer/c", {**check, "status": 503, "body": "<html>busy</html>"})
    attempt("500 once", "maintainer/c", {**commit, "status": 500})
    attempt("500 for long", "maintainer/d", {**create, "status": 500, "times": 9})
    attempt("503", "maintainer/e", {**commit, "status": 503, "headers": {"Retry-After": "2"}})
    attempt("cut while committing", "maintainer/g", commit)
    token = os.environ.pop("HF_TOKEN")
    attempt("no token", "maintainer/h")
    os.environ["HF_TOKEN"] = token
    (run / "train_results.json").write_text(json.dumps({"token": token}))
    attempt("a token in a file", "maintainer/i")
    # One that the Hub has, and does not give.
    inject({"method": "HEAD", "path": "/preprocessor_config", "status": 403, "times": 9})
    try:
        build_image_processor("maintainer/c")
    except InputError as error:
        results["processor"] = str(error)
    inject()
    build_image_processor("maintainer/c")
    for what, fault, fetch in (
        ("checkpoint", "/api/models/maintainer/c", lambda: download_checkpoint("maintainer/c", folder / "other")),
        ("names", "/datasets/maintainer/c/resolve/", lambda: names_on_hub("maintainer/c")),
    ):
        inject(*({"method": method, "path": fault, "status": 403, "times": 9} for method in ("HEAD", "GET")))
        try:
            fetch()
        except InputError as error:
            results[what] = str(error)
    inject()
    try:
        download_checkpoint("maintainer/hostile", folder / "runs" / "hostile")
    except InputError as error:
        results["a step that is a path"] = str(error)
    return {**results, "sha256": hashlib.sha256(weights).hexdigest()}


def inject(*faults):
    get_session().post(f"{os.environ['HF_ENDPOINT']}/_faults", json=list(faults)).raise_for_status()


def clean_up():
    for repo_type in ("model", "dataset"):
        for what in ("street-model", "trained") if repo_type == "model" else ("streets",):
            HfApi().delete_repo(name_of(what), repo_type=repo_type, missing_ok=True)


if __name__ == "__main__":
    what, folder = sys.argv[1], Path(sys.argv[2])
    try:
        (folder / "result.json").write_text(json.dumps(globals()[what](folder)))
    finally:
        if IS_REAL:
            clean_up()
