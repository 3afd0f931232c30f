"""Push a finished run, or one of its checkpoints, to the Hub.

    pals-hf push runs/mine --repo_id OWNER/NAME --license apache-2.0

The program uploads the weights, config, image processor, training arguments, fraction manifest, metrics, pictures and
model card of the run. Before the upload, the card gets the name of the repository and the license. The token is that
of `hf auth login` or HF_TOKEN. Transient errors are retried, and the same folder can be pushed again. `--leave_out
predictions.png` keeps pictures of the data private.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

from ..hub import create_repo, push_command, push_in_background
from ..inference import load_for_inference
from ..model_card import CardData, pictures_in
from .ending import one_line
from .parser import OneLineParser


def push(
    folder: Path,
    repo_id: str,
    license: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    leave_out: list[str] | None = None,
) -> str:
    """Check the folder of a run, complete its model card, and push it.

    Args:
        folder: a finished run, or one of its checkpoints.
        repo_id: OWNER/NAME, or NAME for a repository of the user.
        license: license of the checkpoint. Default: the license in the card.
        private: whether a new repository is private.
        revision: branch. Default: main.
        leave_out: patterns of files that are not pushed.

    Returns:
        The URL of the repository.

    Raises:
        InputError: the folder is not a finished run, or a file contains the token.
        PushError: the push failed.
    """
    card, leave_out = CardData.load(folder), leave_out or []
    load_for_inference(str(folder), "cpu")  # check that others can load it
    options = {"private": private, "license": license, "revision": revision, "leave_out": leave_out}
    later = push_command(folder, repo_id, **options)
    repo_id = create_repo(repo_id, folder, private, later=later)
    pictures = [name for name in pictures_in(folder) if not any(fnmatch(name, pattern) for pattern in leave_out)]
    facts = card.facts if license is None else replace(card.facts, license=license)
    replace(card, model_name=repo_id, facts=facts, pictures=tuple(pictures)).save(folder)
    push = push_in_background(folder, repo_id, revision=revision, leave_out=leave_out, later=later)
    return push.result().repo_url  # ctrl-C interrupts this wait, but not the push itself


@one_line()
def main(argv: list[str] | None = None) -> None:
    """Run the program on a command line, by default that of this process."""
    parser = OneLineParser(
        prog="pals-hf push", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="Folder of a finished run, or of one of its checkpoints.")
    parser.add_argument("--repo_id", required=True, help="Repository: OWNER/NAME, or NAME for one of your own.")
    parser.add_argument("--license", help="License of the checkpoint. Default: the license in the model card.")
    parser.add_argument("--private", action="store_true", default=None, help="Make a new repository private.")
    parser.add_argument("--revision", help="Branch to push to. Default: main.")
    parser.add_argument("--leave_out", nargs="*", default=[], help="Patterns of files that are not pushed.")
    print(f"pushed: {push(**vars(parser.parse_args(argv)))}")
