#!/usr/bin/env python
"""Calibrate a trained model: the same program as `pals-hf calibrate`."""

from pals_hf.cli.calibrate import *  # noqa: F403
from pals_hf.cli.calibrate import main

if __name__ == "__main__":
    main()
