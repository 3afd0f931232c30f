#!/usr/bin/env python
"""Train, check and publish the reference checkpoints that model_cards/references.yaml names.

    pip install -e ".[study]"
    python examples/publish_checkpoints.py OWNER        # run where the data of the study lies
    python tests/hub.py python examples/publish_checkpoints.py OWNER        # a dry run against a stand-in of the Hub

Each is a run of a study. It is trained, unless its folder is still there; loaded and scored again as others will load
it, and compared with the result of the study; its card, with the study's comparison, is written to model_cards/NAME;
and it is pushed to OWNER/NAME, without pictures of the data. Without OWNER everything but the push is done.

    python examples/publish_checkpoints.py --render_only

only renders the cards anew, with what the studies say now.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import run_seg_pals
import yaml
from push_checkpoint import push
from run_seg_pals import fail, to_argv
from study_fractions import Results, comparison
from sweep import Cell, read_cells, read_result, run_cells

from pals_hf.errors import InputError, PushError
from pals_hf.model_card import CardData, pictures_in

REFERENCES = Path(__file__).parents[1] / "model_cards" / "references.yaml"
OF_THE_DATA = "predictions.png"  # whose pictures are not ours to publish
SAME = 0.02  # mIoU: another machine trains another network, but not one of another kind
DATA_FLAGS = ("dataset_dir", "dataset_name", "void_labels", "id2label", "palette", "eval_calibration", "eval_window")


@dataclass(frozen=True)
class Reference:
    """A checkpoint to publish: the run of a study, and the folder of its card."""

    card_dir: Path
    study: Path
    study_name: str
    cell: Cell

    @property
    def name(self) -> str:
        return self.card_dir.name

    @property
    def run_dir(self) -> Path:
        return self.study / "runs" / self.cell.name

    @property
    def result(self) -> dict:
        """Of the study.

        Raises:
            InputError: the study has not got it.
        """
        result = read_result(self.study, self.cell)
        if result is None:
            raise InputError(f"{self.study} has no result of {self.cell.name}: study_fractions.py --run makes it")
        return result


def read_references(path: Path = REFERENCES) -> list[Reference]:
    """Studies are named from the folder above that of the list, cards lie beside it."""
    references = []
    for name, entry in yaml.safe_load(path.read_text(encoding="utf-8")).items():
        study = path.parents[1] / entry["study"]
        cell = next((cell for cell in read_cells(study / "recipe.yaml") if cell.place == entry["run"]), None)
        if cell is None:
            raise InputError(f"{path}: {name} is no run of {study / 'recipe.yaml'}: {entry['run']}")
        references.append(Reference(path.parent / name, study, entry["study"], cell))
    return references


def trained(reference: Reference) -> Path:
    """The folder of the run, trained if need be.

    Raises:
        InputError: it cannot be trained.
    """
    if (reference.run_dir / "model.safetensors").exists():
        return reference.run_dir
    work = Path("runs") / "references"
    ((_, result),) = run_cells([reference.cell], work)
    if isinstance(result, Exception):
        raise InputError(f"{reference.name} could not be trained: {result}")
    return work / "runs" / reference.cell.name


def check(reference: Reference, run_dir: Path) -> None:
    """Score it as others will load it.

    Raises:
        InputError: it is not what its card says, or far from the result of the study.
    """
    flags = {name: value for name, value in reference.cell.flags.items() if name in DATA_FLAGS}
    with tempfile.TemporaryDirectory() as folder:
        run_seg_pals.main(
            [*to_argv(flags), "--eval_only", "--model_name_or_path", str(run_dir), "--output_dir", folder]
        )
        again = json.loads((Path(folder) / "eval_results.json").read_text(encoding="utf-8"))["eval_mean_iou"]
    said = CardData.load(run_dir).metrics["eval_mean_iou"]
    studied = reference.result["metrics"]["eval_mean_iou"]
    if abs(again - said) > 1e-6 or abs(again - studied) > SAME:
        raise InputError(f"{reference.name}: mIoU {again:.4f}, its card says {said:.4f}, the study {studied:.4f}")


def with_comparison(card: CardData, reference: Reference) -> CardData:
    place, results = reference.cell.place, Results(reference.study)
    found = comparison(results, place["train_fraction"], reference.study_name, own=place["method"])
    return replace(card, comparison=found)


def write_card(card: CardData, reference: Reference, run_dir: Path) -> None:
    """The card in model_cards/, with the pictures that may be shown."""
    pictures = tuple(name for name in pictures_in(run_dir) if name != OF_THE_DATA)
    reference.card_dir.mkdir(exist_ok=True)
    for name in pictures:
        shutil.copy(run_dir / name, reference.card_dir / name)
    replace(card, model_name=reference.name, pictures=pictures).save(reference.card_dir)


def publish(reference: Reference, owner: str | None) -> None:
    run_dir = trained(reference)
    check(reference, run_dir)
    card = with_comparison(CardData.load(run_dir), reference)
    card.save(run_dir)
    write_card(card, reference, run_dir)
    print(f"checked: {reference.name}")
    if owner is not None:
        print(f"pushed: {push(run_dir, f'{owner}/{reference.name}', leave_out=[OF_THE_DATA])}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("owner", nargs="?", help="Organisation or user on the Hub. Default: nothing is pushed.")
    parser.add_argument(
        "--references", type=Path, default=REFERENCES, help="List of them. Cards are written beside it."
    )
    parser.add_argument("--render_only", action="store_true", help="Only render the committed cards anew.")
    options = parser.parse_args(sys.argv[1:] if argv is None else argv)
    try:
        for reference in read_references(options.references):
            if options.render_only:
                with_comparison(CardData.load(reference.card_dir), reference).save(reference.card_dir)
                print(f"rendered: {reference.card_dir / 'README.md'}")
            else:
                publish(reference, options.owner)
    except (InputError, PushError) as error:
        fail(error)


if __name__ == "__main__":
    main()
