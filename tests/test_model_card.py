"""Model cards: the Hub's own parser reads them, names cannot break them, the committed ones are what is rendered."""

import copy
import dataclasses
import functools
import json
import shutil

import pytest
from conftest import RAW_VOID, tiny_segformer
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

from pals_hf import PALSConfig, PALSTrainer, load_segmentation_dataset, model_card
from pals_hf.cli import train
from pals_hf.data import EvalTransform, TrainTransform, TransformedDataset
from pals_hf.errors import InputError
from pals_hf.model_card import CARD, CARD_DATA, CardData, CardFacts, Comparison, escape, render
from pals_hf.models import build_image_processor

METRICS = {
    "eval_mean_iou": 0.5,
    "eval_mean_accuracy": 0.625,
    "eval_overall_accuracy": 0.75,
    "eval_loss": 0.25,
    "eval_per_category_iou": [0.9, 0.1, None],
    "eval_per_category_accuracy": [0.95, 0.3, None],
    "eval_runtime": 3.0,
}


def card(**changes):
    known = {
        "model_name": "someone/streets",
        "architecture": "SegformerForSemanticSegmentation",
        "id2label": {0: "sky", 1: "car", 2: "pole"},
        "loss": "pals",
        "loss_settings": {"beta": 0.3, "affinity": {"tau": 0.3, "keys": 256, "pairs": "all"}},
        "settings": {"crop_size": [180, 240], "max_steps": 500},
        "base_model": "nvidia/mit-b0",
        "base_model_revision": "a" * 40,
        "step": 500,
        "epoch": 100.0,
        "metrics": METRICS,
        "history": [{"step": 500, "eval_loss": 0.25, "eval_mean_iou": 0.5}],
        "seconds": 300.0,
        "hardware": "2 threads of a processor",
        "versions": {"pals_hf": "0.1.0", "torch": "2.9.0"},
        "facts": CardFacts(
            license="apache-2.0",
            dataset="Streets",
            dataset_id="someone/streets-data",
            dataset_revision="b" * 40,
            dataset_license="cc-by-4.0",
            train_images=37,
            available_images=367,
            validation_images=101,
            split_method="random",
            split_seed=0,
            manifest_sha256="c" * 64,
        ),
    }
    return CardData(**{**known, **changes})


def test_a_card_says_when_no_pixels_were_compared():
    sentence = "pixels were not compared with each other"
    assert sentence in render(card(loss="self_distillation", loss_settings={"beta": 0.5}))
    assert sentence not in render(card())


def test_what_the_hub_reads():
    header = ModelCard(render(card())).data
    assert header.to_dict() | {"model-index": None} == {
        "library_name": "transformers",
        "pipeline_tag": "image-segmentation",
        "license": "apache-2.0",
        "base_model": "nvidia/mit-b0",
        "base_model_revision": "a" * 40,
        "datasets": ["someone/streets-data"],
        "metrics": ["mean_iou", "accuracy"],
        "tags": ["pals", "loss-pals", "fraction-0.1", "semantic-segmentation", "vision"],
        "model-index": None,
    }
    figures = {result.metric_name: result.metric_value for result in header.eval_results}
    assert figures == {"mean_iou": 0.5, "mean_accuracy": 0.625, "overall_accuracy": 0.75, "loss": 0.25}
    for result in header.eval_results:
        assert (result.task_type, result.dataset_split) == ("image-segmentation", "validation")
        assert (result.dataset_type, result.dataset_revision) == ("someone/streets-data", "b" * 40)


def test_what_people_read():
    text = ModelCard(render(card())).text
    first_screen = text[: text.index("## What PALS is")]
    for said in (
        "37 labelled images** of 367 of Streets",
        "| this checkpoint | 50.0 | 62.5 | 75.0 |",
        "No study compares",
    ):
        assert said in first_screen
    for said in (
        "| sky | 90.0 | 95.0 |",
        "| pole |  |  |",
        "SHA-256 `" + "c" * 64,
        "| `crop_size` | \\[180, 240\\] |",
        "classes with an IoU below 20 %: car.",
        "Training and evaluation took 5 min on 2 threads of a processor",
        "license of the training data may also apply to this model: cc-by-4.0",
        "doi     = {10.3390/s22072623}",
    ):
        assert said in text
    assert "curves.png" not in text
    assert "![Training loss" in render(card(pictures=("curves.png",)))


def test_comparison():
    rows = [
        {"method": "ce", "runs": 6, "mean_iou": "44.7", "difference": "", "ece": "3.1"},
        {"method": "pals", "runs": 6, "mean_iou": "44.9", "difference": "+0.2 [-0.5, 0.9]", "ece": "2.1"},
    ]
    text = render(card(comparison=Comparison("examples/studies/x", "6 pairs of draw and seed", rows)))
    assert "| pals | 6 | 44.9 | +0.2 [-0.5, 0.9] | 2.1 |" in text
    assert "No study compares" not in text


def test_nothing_is_guessed():
    """Only what is always known: no license, no data, no results."""
    unknown = {"base_model": None, "base_model_revision": None, "metrics": {}, "history": [], "seconds": None}
    text = render(card(**unknown, facts=CardFacts(), settings={}, loss="ce", loss_settings={}))
    header = ModelCard(text).data.to_dict()
    assert header.keys() == {"library_name", "pipeline_tag", "metrics", "tags"}
    for said in ("not been evaluated", "started from random weights", "not recorded", "time was not measured"):
        assert said in text
    assert "None" not in text
    assert "trained with plain cross-entropy" in text


def test_a_folder_is_no_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    for name, public in (("runs/mine", "mine"), (str(tmp_path / "runs" / "mine"), "mine"), ("", None), ("a/b", "a/b")):
        assert model_card.public_name(name) == public
    assert "base_model" not in ModelCard(render(card(base_model="mine"))).data.to_dict()


HOSTILE = st.text(min_size=1, max_size=40) | st.sampled_from(
    [
        "a|b",
        "<script>",
        "---",
        "a\n---\nb",
        "{{ card }}",
        "{% raw %}",
        "`x`",
        "[a](http://b)",
        "![x](y)",
        "# h",
        "yes",
        "*b*",
    ]
)


@settings(max_examples=60, deadline=None)
@given(name=HOSTILE, label=HOSTILE, data=HOSTILE, license=HOSTILE)
def test_names_cannot_break_it(name, label, data, license):
    facts = CardFacts(license="mit", dataset=data, dataset_license=license)
    text = render(card(model_name=name, id2label={0: label, 1: "car", 2: "pole"}, facts=facts))
    read = ModelCard(text)
    assert str(read) == text
    assert len(read.data.eval_results) == 4
    (row,) = [line for line in text.splitlines() if line.endswith("| 90.0 | 95.0 |")]
    assert row == f"| {escape(label)} | 90.0 | 95.0 |"
    assert text.count("\n## ") == 8
    assert "<script" not in read.text


def test_escape():
    assert escape("a|b <i>_x_</i>\n[c](http://d)") == "a\\|b &lt;i&gt;\\_x\\_&lt;/i&gt; \\[c\\](http:\\//d)"
    assert escape(0.3) == "0.3"


def test_data_and_page(tmp_path):
    whole = card(pictures=("curves.png",), comparison=Comparison("s", "2 pairs", [{"method": "ce"}]))
    dataclasses.replace(whole, comparison=None).save(tmp_path)
    first = (tmp_path / CARD).read_bytes()
    assert CardData.load(tmp_path) == dataclasses.replace(whole, comparison=None)
    CardData.load(tmp_path).save(tmp_path)
    assert (tmp_path / CARD).read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == [CARD, CARD_DATA]


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"id2label": {}, "pictures": [], "facts": {"x": 1}}'])
def test_no_data_of_a_card(content, tmp_path):
    if content is not None:
        (tmp_path / CARD_DATA).write_text(content)
    with pytest.raises(InputError, match=r"model_card\.json cannot be read as the data of a model card"):
        CardData.load(tmp_path)


SCRIPT = "x`<script>alert(1)</script>"
ROWS = [{"method": "ce", "runs": 6, "mean_iou": "44.7", "difference": "+0.2 [-0.5, 0.9]", "ece": "3.1"}]
WHOLE = json.loads(
    json.dumps(dataclasses.asdict(card(comparison=Comparison("s", "2 pairs", ROWS), pictures=("curves.png",))))
)


def places(value, path=()):
    """Yield the path of everything in JSON."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield from places(part, (*path, key))


def changed(change, path):
    """Return the data of a card with one change."""
    whole = copy.deepcopy(WHOLE)
    parent = functools.reduce(lambda value, key: value[key], path[:-1], whole)
    change(parent, path[-1])
    return whole


def rename(parent, key):
    if isinstance(parent, dict):
        parent[SCRIPT] = parent.pop(key)


def put(value):
    return lambda parent, key: parent.__setitem__(key, value)


@pytest.mark.parametrize(
    "change",
    [
        *map(
            put,
            [SCRIPT, [SCRIPT], {SCRIPT: SCRIPT}, "a\n---\nb: c", None, -1, 10**400, True, 0.5, "1", [], {}],
        ),
        lambda parent, key: parent.pop(key),
        rename,
    ],
)
def test_any_change_of_the_data_is_refused_or_shown_as_text(change, tmp_path):
    for path in list(places(WHOLE))[1:]:
        (tmp_path / CARD_DATA).write_text(json.dumps(changed(change, path)))
        try:
            page = ModelCard(render(CardData.load(tmp_path)))
        except InputError:
            continue
        assert "<script" not in page.text, path
        assert page.text.count("\n## ") == 8, path
        assert page.data.library_name == "transformers"


def test_a_wrong_field_is_named(tmp_path):
    wrong = {"loss": "foo", "metrics": None, "history": [{"x": 1}], "seconds": "1", "step": SCRIPT, "versions": {}}
    for name, value in wrong.items():
        (tmp_path / CARD_DATA).write_text(json.dumps({**WHOLE, name: value}))
        with pytest.raises(InputError, match=rf"cannot be read as the data of a model card: {name}"):
            CardData.load(tmp_path)
    (tmp_path / CARD_DATA).write_text("[" * 100_000)
    with pytest.raises(InputError, match="nested too deeply"):
        CardData.load(tmp_path)


def test_a_trainer_without_a_script(tmp_path):
    """What it knows by itself is in the card: settings that differ, no token, no way to a folder."""
    tiny_segformer().save_pretrained(tmp_path / "start")
    network = type(tiny_segformer()).from_pretrained(tmp_path / "start")
    changed = {"loss": "label_smoothing", "learning_rate": 1e-3, "seed": 7}
    args = PALSConfig(str(tmp_path / "run"), **changed, eval_strategy="no", hub_token="hf_secret")
    trainer = PALSTrainer(network, args)
    trainer.create_model_card(license="mit", model_name="me/mine", tags=["ignored"])
    data = CardData.load(tmp_path / "run")
    assert (data.loss, data.said_settings) == ("label_smoothing", {"smoothing": 0.1})
    assert data.settings == {"learning_rate": 1e-3, "seed": 7}
    assert (data.base_model, data.facts.license, data.model_name) == ("start", "mit", "me/mine")
    for path in (tmp_path / "run").iterdir():
        assert "hf_secret" not in path.read_text()
        assert str(tmp_path) not in path.read_text()


def test_every_checkpoint_has_its_own(folder, tmp_path):
    """With the figures of its weights, or none; time adds up over a resumption; the end shows what came last."""
    flags = [
        "--dataset_dir",
        folder,
        "--void_labels",
        "11",
        "--crop_size",
        "32",
        "32",
        "--per_device_train_batch_size",
        "2",
    ]
    flags += ["--save_steps", "1", "--eval_steps", "2", "--save_total_limit", "9", "--disable_tqdm", "True"]
    flags += ["--license", "mit", "--train_count", "4", "--max_steps", "4", "--output_dir", tmp_path / "run"]
    train.main(list(map(str, flags)))
    cards = {step: CardData.load(tmp_path / "run" / f"checkpoint-{step}") for step in (1, 2, 3, 4)}
    assert [card.step for card in cards.values()] == [1, 2, 3, 4]
    assert [bool(card.metrics) for card in cards.values()] == [False, True, False, True]
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    scored = {entry["step"]: entry["eval_mean_iou"] for entry in state["log_history"] if "eval_mean_iou" in entry}
    assert {step: cards[step].metrics["eval_mean_iou"] for step in (2, 4)} == scored
    assert cards[3].history == cards[2].history
    assert [card.seconds for card in cards.values()] == sorted(card.seconds for card in cards.values())
    last = CardData.load(tmp_path / "run")
    assert last.metrics == json.loads((tmp_path / "run" / "eval_results.json").read_text())
    assert last.facts.manifest_sha256 == json.loads((tmp_path / "run" / "train_fraction.json").read_text())["sha256"]
    assert (last.facts.license, last.facts.train_images, last.facts.validation_images) == ("mit", 4, 5)
    assert last.settings["void_labels"] == [11]
    assert set(last.pictures) == {"curves.png", "predictions.png"}
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    train.main([*map(str, flags), "--resume_from_checkpoint", "last"])
    assert CardData.load(tmp_path / "run" / "checkpoint-4").seconds > cards[3].seconds


def test_the_best_checkpoint(folder, tmp_path):
    """The card of a training that ends with its best weights says which those are, without scoring them again."""
    data = load_segmentation_dataset(dataset_dir=folder, void_labels=[RAW_VOID])
    processor = build_image_processor(None)
    schedule = {"eval_steps": 1, "save_steps": 1, "max_steps": 4, "load_best_model_at_end": True}
    trainer = PALSTrainer(
        tiny_segformer(),
        PALSConfig(str(tmp_path), **schedule, learning_rate=0.5, greater_is_better=False, disable_tqdm=True),
        train_dataset=TransformedDataset(data.train, TrainTransform(processor, (32, 32))),
        eval_dataset=TransformedDataset(data.validation, EvalTransform(processor)),
    )
    trainer.train()
    best = CardData.load(trainer.state.best_model_checkpoint)
    card = trainer.card_data()
    assert (card.step, card.best_of) == (trainer.state.best_global_step, 4)
    assert card.metrics == best.metrics
    assert f"{card.step} steps" in render(card)
    assert "the best checkpoint of 4 steps" in render(card)
    trainer.evaluate(TransformedDataset(data.train, EvalTransform(processor)))  # other images are not in the card
    assert trainer.card_data().metrics == best.metrics
    assert trainer.card_data().history == card.history
    trainer.evaluate()  # the best weights are not those of the last step
    assert trainer.card_data().history == card.history
