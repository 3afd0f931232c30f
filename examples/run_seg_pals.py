#!/usr/bin/env python
"""Train a segmentation model with PALS on one or several processes: the same program as `pals-hf train`.

accelerate launch examples/run_seg_pals.py --train_fraction 0.5
"""

from pals_hf.cli.train import main

if __name__ == "__main__":
    main()
