"""Train an adapter: `python training/train.py CONFIG.yaml [--flag value …]`, or under torchrun.

torchrun --nproc-per-node 8 training/train.py config.yaml --batch-size 256

Flags are the fields of gen_fast.training.config.TrainConfig, with dashes.
"""

import logging
import sys

from gen_fast.cli.errors import code_of, fail
from gen_fast.errors import GenFastError
from gen_fast.training.config import TrainConfig, parse_flags, read_config, read_settings
from gen_fast.training.llm2vec_gen import train


def main(arguments: list[str]) -> None:
    """Read the settings and train."""
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    path = arguments[0] if arguments and not arguments[0].startswith("--") else None
    try:
        flags = parse_flags(arguments[1 if path else 0 :])
        train(read_config({**read_settings(path), **flags}, TrainConfig))
    except GenFastError as error:
        fail(error, code_of(error))


if __name__ == "__main__":
    main(sys.argv[1:])
