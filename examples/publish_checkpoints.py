#!/usr/bin/env python
"""Train, check and publish the reference checkpoints listed in model_cards/references.yaml.

    pip install -e ".[study]"
    python examples/publish_checkpoints.py OWNER  # in the folder with the data of the study
    python tests/hub.py python examples/publish_checkpoints.py OWNER  # a dry run with a local stand-in for the Hub

Each checkpoint is a run of a study. For each one, this program:

1. trains the run, unless its folder still exists;
2. loads and evaluates the checkpoint as users will, and compares the mIoU with its card and the study;
3. writes the model card, with the study's comparison, to model_cards/NAME;
4. pushes the checkpoint to OWNER/NAME, without pictures of the data. Without OWNER, nothing is pushed.

To render the cards again after a study has new results:

    python examples/publish_checkpoints.py --render_only
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import study_train
import yaml
from study_fractions import Results, comparison
from sweep import Cell, read_cells, read_results, run_cells

from pals_hf.cli.ending import ends_at_ctrl_c, fail
from pals_hf.cli.parser import to_argv
from pals_hf.cli.push import push
from pals_hf.errors import InputError, PushError
from pals_hf.model_card import CardData, pictures_in

REFERENCES = Path(__file__).parents[1] / "model_cards" / "references.yaml"
OF_THE_DATA = "predictions.png"  # shows images of the data set, which are not ours to publish
SAME = 0.02  # tolerance in mIoU between the study and a training on another machine
DATA_FLAGS = ("dataset_dir", "dataset_name", "void_labels", "id2label", "palette", "eval_calibration", "eval_window")


@dataclass(frozen=True)
class Reference:
    """A checkpoint to publish: a run of a study, and the folder of its card."""

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
        """The result of the run in the study.

        Raises:
            InputError: the study has no result of the run.
        """
        result = read_results(self.study, [self.cell]).get(self.cell.name)
        if result is None:
            raise InputError(f"{self.study} has no result of {self.cell.name}. Run it with study_fractions.py --run.")
        return result


def read_references(path: Path = REFERENCES) -> list[Reference]:
    """Read the list of references. Studies are relative to the parent of its folder, and cards are in its folder."""
    references = []
    for name, entry in yaml.safe_load(path.read_text(encoding="utf-8")).items():
        study = path.parents[1] / entry["study"]
        cell = next((cell for cell in read_cells(study / "recipe.yaml") if cell.place == entry["run"]), None)
        if cell is None:
            raise InputError(f"{path}: the run of {name} is not in {study / 'recipe.yaml'}: {entry['run']}.")
        references.append(Reference(path.parent / name, study, entry["study"], cell))
    return references


def trained(reference: Reference) -> Path:
    """Return the folder of the run. Train it first if it does not exist.

    Raises:
        InputError: the training failed.
    """
    if (reference.run_dir / "model.safetensors").exists():
        return reference.run_dir
    work = Path("runs") / "references"
    ((_, result),) = run_cells([reference.cell], work)
    if isinstance(result, Exception):
        raise InputError(f"{reference.name}: the training failed: {result}")
    return work / "runs" / reference.cell.name


def check(reference: Reference, run_dir: Path) -> None:
    """Load and evaluate a checkpoint as users will.

    Raises:
        InputError: the mIoU differs from that of its card, or by more than the tolerance from that of the study.
    """
    flags = {name: value for name, value in reference.cell.flags.items() if name in DATA_FLAGS}
    with tempfile.TemporaryDirectory() as folder:
        study_train.main(
            [*to_argv(flags), "--eval_only", "--model_name_or_path", str(run_dir), "--output_dir", folder]
        )
        again = json.loads((Path(folder) / "eval_results.json").read_text(encoding="utf-8"))["eval_mean_iou"]
    said = CardData.load(run_dir).metrics["eval_mean_iou"]
    studied = reference.result["metrics"]["eval_mean_iou"]
    if abs(again - said) > 1e-6 or abs(again - studied) > SAME:
        raise InputError(
            f"{reference.name}: the mIoU is {again:.4f}, but its card says {said:.4f} and the study {studied:.4f}. "
            f"Delete {run_dir} to train it again."
        )


def with_comparison(card: CardData, reference: Reference) -> CardData:
    place, results = reference.cell.place, Results(reference.study)
    found = comparison(results, place["train_fraction"], reference.study_name, own=place["method"])
    return replace(card, comparison=found)


def write_card(card: CardData, reference: Reference, run_dir: Path) -> None:
    """Write the card to model_cards/, with the pictures that may be published."""
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


@ends_at_ctrl_c
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("owner", nargs="?", help="Organisation or user on the Hub. Without it, nothing is pushed.")
    parser.add_argument(
        "--references", type=Path, default=REFERENCES, help="List of the checkpoints. Cards are written to its folder."
    )
    parser.add_argument("--render_only", action="store_true", help="Only render the committed cards again.")
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
