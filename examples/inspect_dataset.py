#!/usr/bin/env python
"""Check a data set, and show its class shares and fractions: the same program as `pals-hf inspect`."""

from pals_hf.cli.inspect_data import *  # noqa: F403
from pals_hf.cli.inspect_data import main

if __name__ == "__main__":
    main()
