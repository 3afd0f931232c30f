#!/usr/bin/env python
"""Push a finished run, or one of its checkpoints, to the Hub: the same program as `pals-hf push`."""

from pals_hf.cli.push import *  # noqa: F403
from pals_hf.cli.push import main

if __name__ == "__main__":
    main()
