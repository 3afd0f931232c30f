#!/usr/bin/env python
"""Compare two trained models in the browser: the same program as `pals-hf demo`, and the `app_file` of a Space."""

from pals_hf.cli.demo import *  # noqa: F403
from pals_hf.cli.demo import main, models_of_environment
from pals_hf.cli.page import *  # noqa: F403
from pals_hf.cli.page import build_demo

demo = build_demo(models_of_environment())

if __name__ == "__main__":
    main()
