#!/usr/bin/env python
"""Export a trained model to ONNX: the same program as `pals-hf export`."""

from pals_hf.cli.export import *  # noqa: F403
from pals_hf.cli.export import main

if __name__ == "__main__":
    main()
