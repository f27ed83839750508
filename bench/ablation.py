"""What each loss, the thought tokens and a scale give: runs of the same length, side by side.

    python bench/ablation.py RECIPE.yaml [--steps N] [--batch-size N] [--only NAME …]
        [--out DIR [--scores RESULTS]] [--json FILE]

RECIPE.yaml is a training configuration; its data, seeds and validation rows are kept. With --out
runs stay there and go on after an interruption; with --scores their adapters are scored on the
local tasks, and each is compared with the first one on the same items.
"""

import argparse
import tempfile
from pathlib import Path

from measure import arguments, reported, save

from gen_fast.training.config import TrainConfig, read_config, read_settings
from gen_fast.training.llm2vec_gen import train
from gen_fast.training.report import summary

# Scale of the alignment and its weight are the recipe's unless a variant says otherwise.
DEFAULT_SCALE = {"alignment_scale": "variance", "alignment_weight": 1.0, "repeat_weight": 0.0}
VARIANTS = {
    "alignment only": {"reconstruction_weight": 0.0},
    "reconstruction only": {"alignment_weight": 0.0, "repeat_weight": 0.0},
    "both": {},
    "both, 10 thought tokens": {"n_thought": 10},
    "scaled by variance": DEFAULT_SCALE,
    "mean over dimensions": {**DEFAULT_SCALE, "alignment_scale": "mean"},
}


def main() -> None:
    """Run the variants one after another and print the table."""
    parser = arguments(__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS)[:4])
    parser.add_argument("--out", type=Path, help="keeps the runs")
    parser.add_argument("--scores", type=Path, help="folder of results of the local tasks")
    args = parser.parse_args()
    rows, differences = [], []
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.out or Path(scratch)
        for name in args.only:
            rows.append({"variant": name, **_trained(args, folder / name, VARIANTS[name])})
            cells = " | ".join(f"{v:.3f}" for v in rows[-1].values() if isinstance(v, float))
            if len(rows) == 1:
                print(f"| variant | {' | '.join(list(rows[0])[1:])} |")
            print(f"| {name} | {cells} |", flush=True)
        if args.scores:
            differences = _scored(args.only, folder, args.scores)
    save(args.json, reported(rows, differences=differences))


def _trained(args: argparse.Namespace, folder: Path, changes: dict) -> dict[str, float]:
    settings = {
        "out": str(folder),
        "steps": args.steps,
        "schedule_steps": args.steps,
        "warmup_steps": args.steps // 10,
        "batch_size": args.batch_size,
        "validate_every": args.steps,
        "checkpoint_every": min(args.steps, 50),
        "report_to": "",
    }
    train(read_config({**read_settings(args.recipe), **settings, **changes}, TrainConfig))
    return {key.split("/")[1]: value for key, value in summary(folder)}


def _scored(names: list[str], folder: Path, results: Path) -> list[dict]:
    """Score the adapters; print and return how far each is from the first, task by task."""
    from gen_fast.embed.loading import load
    from gen_fast.evaluate.items import difference
    from gen_fast.evaluate.runner import evaluate

    scores = {
        name: evaluate(load(folder / name / "adapter"), out=results, name=name).scores
        for name in names
    }
    rows = []
    for name, found in scores.items():
        for score, first in zip(found, scores[names[0]], strict=True):
            row = {
                "variant": name,
                "task": score.task,
                "score": score.score,
                "standard_error": score.standard_error,
            }
            line = f"{name}, {score.task}: {score.score:.3f} ± {score.standard_error:.3f}"
            if name != names[0]:
                less = difference(score.items, first.items)
                row |= {"less_first": less.value, "interval": [less.low, less.high]}
                line += f", less {names[0]}: {less.value:+.3f} [{less.low:+.3f}, {less.high:+.3f}]"
            rows.append(row)
            print(line, flush=True)
    return rows


if __name__ == "__main__":
    main()
