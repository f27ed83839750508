"""Runs of a few steps over a tiny model: settings they share, and what they leave."""

from pathlib import Path

from gen_fast.training.records import read_records

# Of LoRA over texts: stopped and continued within four steps.
ADAPTED = {
    "dtype": "float32",
    "device": "cpu",
    "max_length": 24,
    "lora_rank": 4,
    "batch_size": 6,
    "steps": 4,
    "schedule_steps": 20,
    "learning_rate": 1e-3,
    "validation_rows": 8,
    "validate_every": 2,
    "checkpoint_every": 1,
    "log_every": 1,
    "report_to": (),
}


def losses(config):
    """The total loss by step."""
    rows = read_records(Path(config.out) / "metrics.jsonl")
    return {row["step"]: row["loss/total"] for row in rows if "loss/total" in row}
