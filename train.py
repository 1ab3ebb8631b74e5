"""Train a CycleGAN: ``python train.py --config FILE [section.field=value ...]``, or the same under ``torchrun``."""

import sys

from cyclegan_fast.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
