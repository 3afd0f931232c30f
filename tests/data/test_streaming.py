import data_sets
import numpy as np
import pytest
import torch
from conftest import RAW_VOID, tiny_segformer
from PIL import Image
from test_trainer import NO_RANDOMNESS
from torch.utils.data import DataLoader

from pals_hf import PALSConfig, PALSTrainer
from pals_hf.data import (
    EvalTransform,
    StreamedDataset,
    TrainTransform,
    TransformedDataset,
    collate,
    load_segmentation_dataset,
    stream_segmentation_dataset,
)
from pals_hf.errors import InputError
from pals_hf.models import build_image_processor


@pytest.fixture
def stream(folder):
    return stream_segmentation_dataset(dataset_dir=folder, void_labels=[RAW_VOID])


def streamed(stream, split="train", transform=None, **options):
    transform = transform or EvalTransform(build_image_processor(None))
    return StreamedDataset(getattr(stream, split), stream.classes, transform, **options)


def ids_of(dataset):
    return [pending.row["id"] for pending in dataset]


def test_gives_what_a_loaded_data_set_gives(folder, stream):
    data = load_segmentation_dataset(dataset_dir=folder, void_labels=[RAW_VOID])
    assert stream.id2label == data.id2label
    loaded = TransformedDataset(data.train, EvalTransform(build_image_processor(None)))
    for pending, expected in zip(streamed(stream), loaded, strict=True):
        example = pending.load()
        assert example.pop("id") == expected.pop("id")
        assert all(torch.equal(example[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", ["file", "folder", "saved"])
def test_columns(tmp_path, kind):
    root = data_sets.parquet(tmp_path / "set")
    if kind == "file":
        with pytest.raises(InputError, match=r"parquet has no validation split, and a stream cannot be split"):
            stream_segmentation_dataset(str(root / "train-00000-of-00001.parquet"))
        return
    if kind == "saved":
        from datasets import load_dataset

        load_dataset(str(root)).save_to_disk(tmp_path / "saved")
        (tmp_path / "saved" / "id2label.json").write_text((root / "id2label.json").read_text())
        root = tmp_path / "saved"
    stream = stream_segmentation_dataset(str(root))
    dataset = streamed(stream)
    ids = ids_of(dataset)
    assert len(set(ids)) == 4
    assert ids_of(dataset) == ids
    expected = data_sets.scene([0, 1, 2, 255], seed=[len("train"), 2])[1]
    assert np.array_equal(list(dataset)[2].load()["labels"].numpy(), expected)


def test_order_and_crops_change_with_the_epoch_and_come_back(stream):
    transform = TrainTransform(build_image_processor(None), (16, 16))
    dataset = streamed(stream, transform=transform, shuffle=True, seed=3)

    def epoch(number):
        dataset.set_epoch(number)
        return ids_of(dataset), {p.row["id"]: p.load()["pixel_values"] for p in dataset}

    (first, crops), (second, others), (again, same) = epoch(0), epoch(1), epoch(0)
    assert sorted(first) == sorted(second) == [f"street {index}" for index in range(8)]
    assert first == again != second
    assert all(torch.equal(crops[id], same[id]) for id in crops)
    assert any(not torch.equal(crops[id], others[id]) for id in crops)


def test_workers_share_the_stream(stream):
    dataset = streamed(stream, transform=TrainTransform(build_image_processor(None), (16, 16)))
    dataset.complete_to(3)
    batches = list(DataLoader(dataset, batch_size=3, num_workers=2, collate_fn=collate))
    assert [len(batch["labels"]) for batch in batches] == [3] * 4  # 4 and 2 fillers for each of two workers
    alone = next(iter(DataLoader(streamed(stream, transform=dataset.transform), batch_size=8, collate_fn=collate)))
    labels = torch.cat([batch["labels"] for batch in batches])
    labelled = labels[(labels != 255).any(dim=(1, 2))]
    assert len(labelled) == 8
    assert sorted(x.sum().item() for x in labelled) == sorted(x.sum().item() for x in alone["labels"])


def test_persistent_workers_see_the_epoch_change(stream):
    """They have a copy of the data set, made before the first epoch."""
    dataset = streamed(stream, transform=TrainTransform(build_image_processor(None), (16, 16)), ids=["street 3"])
    loader = DataLoader(dataset, num_workers=1, persistent_workers=True, collate_fn=collate)

    def crop(epoch):
        dataset.set_epoch(epoch)
        return next(iter(loader))["pixel_values"]

    first, second = crop(0), crop(1)
    assert not torch.equal(first, second)
    assert torch.equal(crop(0), first)


def test_bad_samples(folder, stream, caplog):
    (folder / "train" / "images" / "street 5.jpg").write_bytes(b"")
    with pytest.raises(InputError, match=r"street 5\.jpg is not a readable image: the file is empty"):
        [pending.load() for pending in streamed(stream)]
    skipping = streamed(stream, skip_bad_samples=True)
    for _ in range(2):  # the sample is named once
        assert ids_of(skipping) == [f"street {i}" for i in range(8) if i != 5]
    assert caplog.text.count("skipped street 5: ") == 1


class TestFirstLook:
    """A stream is looked at until its labels are enough."""

    def masks(self, folder, split, change):
        for path in (folder / split / "masks").iterdir():
            Image.fromarray(change(np.array(Image.open(path)))).save(path)

    @pytest.mark.parametrize(
        ("split", "change", "message"),
        [
            ("train", lambda m: m // 3 % 2 * np.uint8(255), "training images have labels of the class 'ground' only"),
            ("train", lambda m: np.full_like(m, RAW_VOID), "training images have no labels"),
            ("train", lambda m: np.full_like(m, 2), "training images have labels of the class 'sky' only"),
            ("val", lambda m: np.full_like(m, RAW_VOID), "validation images have no labels"),
            ("val", lambda m: m // 3 % 2 * np.uint8(255), "validation images have labels of the class 'ground' only"),
        ],
    )
    def test_labels_that_are_not_enough(self, folder, split, change, message):
        self.masks(folder, split, change)
        with pytest.raises(InputError, match=f"the {message}, but"):
            stream_segmentation_dataset(dataset_dir=folder, void_labels=[RAW_VOID])

    def test_ends_as_soon_as_labels_are_enough(self, folder):
        paths = sorted((folder / "train" / "masks").iterdir())
        Image.fromarray(np.full((32, 48), 2, dtype=np.uint8)).save(paths[0])
        paths[2].write_bytes(b"")  # is not reached
        stream_segmentation_dataset(dataset_dir=folder, void_labels=[RAW_VOID])
        paths[1].write_bytes(b"")
        with pytest.raises(InputError, match=r"street 1\.png is not a readable image"):
            stream_segmentation_dataset(dataset_dir=folder, void_labels=[RAW_VOID])
        stream_segmentation_dataset(dataset_dir=folder, void_labels=[RAW_VOID], skip_bad_samples=True)
        for path in paths:
            path.write_bytes(b"")
        with pytest.raises(InputError, match="no valid images: 8 samples failed a check"):
            stream_segmentation_dataset(dataset_dir=folder, void_labels=[RAW_VOID], skip_bad_samples=True)


def test_palettes_that_differ(folder):
    for name, color in (("street 1", (0, 0, 255)), ("street 2", (255, 0, 0))):
        path = folder / "train" / "masks" / f"{name}.png"
        mask = Image.open(path)
        mask.putpalette([0, 0, 0, *color, *range(40, 240)])
        mask.save(path)
    stream = stream_segmentation_dataset(dataset_dir=folder, void_labels=[RAW_VOID])
    with pytest.raises(InputError, match=r"street 2\.png shows the value 1 in the colour"):
        [pending.load() for pending in streamed(stream)]


def test_only_the_given_images(stream):
    assert ids_of(streamed(stream, ids=["street 3", "street 6"])) == ["street 3", "street 6"]


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_evaluation_scores_each_image_once(folder, stream, tmp_path, batch_size):
    """Five images of two sizes, in batches that do not divide them."""
    data = load_segmentation_dataset(dataset_dir=folder, void_labels=[RAW_VOID])
    model, transform = tiny_segformer(), EvalTransform(build_image_processor(None))
    config = PALSConfig(str(tmp_path), per_device_eval_batch_size=batch_size, use_cpu=True, report_to="none")
    results = [
        PALSTrainer(model, config, eval_dataset=dataset).evaluate()
        for dataset in (TransformedDataset(data.validation, transform), streamed(stream, "validation"))
    ]
    for name in ("eval_mean_iou", "eval_overall_accuracy", "eval_per_category_iou"):
        assert results[0][name] == results[1][name]
    assert results[0]["eval_loss"] == pytest.approx(results[1]["eval_loss"])


class TestTraining:
    """Eight images: an epoch of four batches of two."""

    def trainer(self, stream, output, **options):
        torch.manual_seed(0)
        transform = TrainTransform(build_image_processor(None), (32, 32))
        args = {"max_steps": 7, "per_device_train_batch_size": 2, "logging_steps": 1, "eval_strategy": "no"}
        args |= {"save_strategy": "no", "freeze_batch_norm": True, "disable_tqdm": True, "optim": "sgd", **options}
        examples = streamed(stream, transform=transform, shuffle=True, repeat=True)
        return PALSTrainer(tiny_segformer(**NO_RANDOMNESS), PALSConfig(str(output), **args), train_dataset=examples)

    def test_resumes_in_the_epoch_where_it_stopped(self, stream, tmp_path):
        whole = self.trainer(stream, tmp_path / "whole", save_strategy="steps", save_steps=1, save_total_limit=None)
        whole.train()
        for step in (3, 4, 6):
            resumed = self.trainer(stream, tmp_path / "resumed")
            resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
            weights = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
            assert all(torch.equal(one, other) for one, other in weights), step

    def test_a_batch_is_as_large_at_the_end_of_an_epoch(self, stream, tmp_path):
        """Accumulated from three batches of two, or one of six: eight images are no multiple of six."""
        cut = self.trainer(stream, tmp_path, gradient_accumulation_steps=3)
        whole = self.trainer(stream, tmp_path, per_device_train_batch_size=6)
        for trainer in (cut, whole):
            trainer.train()
        for name in ("loss", "grad_norm"):
            values = [[entry[name] for entry in t.state.log_history if name in entry] for t in (cut, whole)]
            assert len(values[0]) == 7
            assert values[0] == pytest.approx(values[1], rel=1e-4)

    def test_training_needs_a_stream_that_begins_again_and_evaluation_one_that_ends(self, stream, tmp_path):
        args = PALSConfig(str(tmp_path), max_steps=1, eval_strategy="no")
        with pytest.raises(InputError, match=r"must repeat: use StreamedDataset\(\.\.\., repeat=True"):
            PALSTrainer(tiny_segformer(), args, train_dataset=streamed(stream))
        with pytest.raises(InputError, match=r"must end: use StreamedDataset\(\.\.\., repeat=False"):
            PALSTrainer(tiny_segformer(), args, eval_dataset=streamed(stream, repeat=True))
        with pytest.raises(InputError, match=r"must end: use"):
            PALSTrainer(tiny_segformer(), args).evaluate(streamed(stream, repeat=True))

    @pytest.mark.parametrize("ids", [["elsewhere"], ["elsewhere", "street 3"]])
    def test_what_is_not_in_it(self, stream, ids):
        with pytest.raises(
            InputError, match=f"1 of {len(ids)} selected images are not in the stream, e.g. 'elsewhere'"
        ):
            ids_of(streamed(stream, ids=ids, repeat=True))

    def test_a_rehearsal_does_not_move_the_stream(self, stream, tmp_path):
        plain = self.trainer(stream, tmp_path)
        plain.train()
        rehearsed = self.trainer(stream, tmp_path)
        rehearsed.dry_run()
        rehearsed.train()
        weights = zip(plain.model.parameters(), rehearsed.model.parameters(), strict=True)
        assert all(torch.equal(one, other) for one, other in weights)
