"""The command line: `pals-hf COMMAND`, and the programs of `examples/` that share its code."""

from __future__ import annotations

import sys
from importlib import import_module

from .. import __version__
from .ending import ends_at_ctrl_c

# Module and help text of each command. Modules are imported when a command runs, to keep `pals-hf --help` fast.
COMMANDS = {
    "train": ("train", "Train a segmentation model on images and masks, and score it."),
    "predict": ("predict", "Segment an image, a folder of images or a video with a trained model."),
    "inspect": ("inspect_data", "Check a data set, and show its class shares and fractions."),
    "calibrate": ("calibrate", "Calibrate a trained model, so that its probabilities say how often it is right."),
    "push": ("push", "Push a finished run to the Hub, with its model card."),
    "export": ("export", "Export a trained model to ONNX."),
    "demo": ("demo", "Compare two models on an image in the browser."),
}


@ends_at_ctrl_c
def main(argv: list[str] | None = None) -> None:
    """Run a command: the entry point of `pals-hf`."""
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in COMMANDS:
        import_module(f".{COMMANDS[name][0]}", __name__).main(arguments)
    elif name in ("-h", "--help"):
        print(overview())
    elif name == "--version":
        print(__version__)
    else:
        print(f"error: there is no command {name!r}. The commands are {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)


def overview() -> str:
    lines = [f"  {name:<11}{text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: pals-hf COMMAND ...",
            "",
            "Train segmentation models with few labelled images.",
            "",
            *lines,
            "",
            "`pals-hf COMMAND --help` shows the options of a command. To train on several processes or GPUs use",
            "`accelerate launch examples/run_seg_pals.py`, which takes the same options as `pals-hf train`.",
        ]
    )
