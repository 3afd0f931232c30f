#!/usr/bin/env python
"""Segment an image, a folder of images or a video with a trained model: the same program as `pals-hf predict`."""

from pals_hf.cli.predict import *  # noqa: F403
from pals_hf.cli.predict import main

if __name__ == "__main__":
    main()
