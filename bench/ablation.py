"""What each loss and the thought tokens give: short runs of the same length, by validation.

    python bench/ablation.py RECIPE.yaml [--steps N] [--batch-size N] [--json FILE]

RECIPE.yaml is a training configuration; its data, seeds and validation rows are kept.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from measure import machine

from gen_fast.training.config import read_config
from gen_fast.training.report import summary
from gen_fast.training.trainer import train

VARIANTS = {
    "alignment only": {"reconstruction_weight": 0.0},
    "reconstruction only": {"alignment_weight": 0.0, "repeat_weight": 0.0},
    "both": {},
    "both, 10 thought tokens": {"n_thought": 10},
}


def main() -> None:
    """Run the variants one after another and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    for name, changes in VARIANTS.items():
        with tempfile.TemporaryDirectory() as folder:
            settings = {
                "out": folder,
                "steps": args.steps,
                "schedule_steps": args.steps,
                "warmup_steps": args.steps // 10,
                "batch_size": args.batch_size,
                "validate_every": args.steps,
                "checkpoint_every": args.steps,
                "report_to": "",
            }
            train(read_config(args.recipe, {**settings, **changes}))
            found = {key.split("/")[1]: value for key, value in summary(Path(folder))}
        rows.append({"variant": name, **found})
        cells = " | ".join(f"{value:.3f}" for value in found.values())
        if len(rows) == 1:
            print(f"| variant | {' | '.join(found)} |")
        print(f"| {name} | {cells} |", flush=True)
    if args.json:
        report = {"machine": machine(), "command": " ".join(sys.argv), "rows": rows}
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
