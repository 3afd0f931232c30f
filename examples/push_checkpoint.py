#!/usr/bin/env python
"""Push a finished run, or one of its checkpoints, to the Hub.

    python examples/push_checkpoint.py runs/mine --repo_id OWNER/NAME --license apache-2.0

pushes weights, config, image processor, training arguments, manifest, metrics, pictures and the model card, whose name
and license it settles first. The token is that of `hf auth login` or of HF_TOKEN. What may pass is tried again, and
the same folder can be pushed again. `--leave_out predictions.png` keeps pictures of the data to yourself.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

from run_seg_pals import fail

from pals_hf.errors import InputError, PushError
from pals_hf.hub import create_repo, push_command, push_folder
from pals_hf.inference import load_for_inference
from pals_hf.model_card import CardData, pictures_in


def push(
    folder: Path,
    repo_id: str,
    license: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    leave_out: list[str] | None = None,
) -> str:
    """Check a run's folder, settle its card and push it.

    Returns:
        The address of the repository.

    Raises:
        InputError: it is no finished run.
        PushError: it was not pushed.
    """
    card, leave_out = CardData.load(folder), leave_out or []
    load_for_inference(str(folder), "cpu")  # as everybody will
    options = {"private": private, "license": license, "revision": revision, "leave_out": leave_out}
    later = push_command(folder, repo_id, **options)
    repo_id = create_repo(repo_id, folder, private, later=later)
    pictures = [name for name in pictures_in(folder) if not any(fnmatch(name, pattern) for pattern in leave_out)]
    facts = card.facts if license is None else replace(card.facts, license=license)
    replace(card, model_name=repo_id, facts=facts, pictures=tuple(pictures)).save(folder)
    return push_folder(folder, repo_id, revision=revision, leave_out=leave_out, later=later).repo_url


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="Of the run, or of a checkpoint.")
    parser.add_argument("--repo_id", required=True, help="OWNER/NAME, or NAME for your own.")
    parser.add_argument("--license", help="License of the checkpoint, for its card. Default: what the card says.")
    parser.add_argument("--private", action="store_true", default=None, help="A new repository is private.")
    parser.add_argument("--revision", help="Branch. Default: main.")
    parser.add_argument("--leave_out", nargs="*", default=[], help="Patterns of files that are not pushed.")
    options = vars(parser.parse_args(sys.argv[1:] if argv is None else argv))
    try:
        print(f"pushed: {push(**options)}")
    except (InputError, PushError) as error:
        fail(error)


if __name__ == "__main__":
    main()
