"""Train an adapter: `python training/train.py CONFIG.yaml [--flag value …]`, or under torchrun.

torchrun --nproc-per-node 8 training/train.py config.yaml --batch-size 256

CONFIG says `method: llm2vec-gen` (the default), `method: llm2vec` or `method: gem`. Flags are the
fields of gen_fast.training.config.TrainConfig, gen_fast.training.llm2vec_config.LLM2VecConfig or
gen_fast.training.gem_config.GEMConfig, with dashes.
"""

import logging
import sys

from gen_fast.cli.errors import code_of, fail
from gen_fast.errors import GenFastError
from gen_fast.training.config import parse_flags
from gen_fast.training.methods import read_run


def main(arguments: list[str]) -> None:
    """Read the settings and train."""
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    path = arguments[0] if arguments and not arguments[0].startswith("--") else None
    try:
        read_run(path, parse_flags(arguments[1 if path else 0 :]))(None)
    except GenFastError as error:
        fail(error, code_of(error))


if __name__ == "__main__":
    main(sys.argv[1:])
