"""How loud each loss is where training starts: gradient norms under every alignment_scale.

    python bench/alignment_scale.py [--rows N] [--batch-size N] [--special-init mean]

SmolLM2-135M in float32, trivia questions that it answers itself, MiniLM as teacher (its vectors
have length 1); weights 1. The alignment is fitted in closed form to N rows, the batch is of others:
so most rows of a run are.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

from gen_fast.embed.loading import load_generator
from gen_fast.evaluate.corpora import trivia
from gen_fast.io.text_files import Texts
from gen_fast.model.sources import resolve
from gen_fast.model.tokenizing import load_tokenizer
from gen_fast.model.weights import load_backbone, load_head
from gen_fast.training.answers import generate_answers
from gen_fast.training.config import TrainConfig
from gen_fast.training.data import TrainingData
from gen_fast.training.fitting import fit_alignment
from gen_fast.training.records import Rejections
from gen_fast.training.step import accumulate
from gen_fast.training.student import Student
from gen_fast.training.teach import teach
from gen_fast.training.world import World


def main() -> None:
    """Print a line a loss: its value, and its gradient's norm at what is trained."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--special-init", choices=("draw", "mean"), default="draw")
    args = parser.parse_args()
    source = resolve("smollm2-135m")
    backbone = load_backbone(source)
    head, tokenizer = load_head(source, backbone), load_tokenizer(source)
    with tempfile.TemporaryDirectory() as folder:
        config = _write_data(Path(folder), args.rows, args.batch_size)
        config = replace(config, special_init=args.special_init)
        data = TrainingData(config, tokenizer, Rejections(Path(folder) / "rejected.jsonl"))
    examples = data.examples(data.validation)
    student = Student(backbone, head, data.dimension, config)
    fit_alignment(student, data.examples(data.train))
    print(f"{'loss':<24} {'value':>8} {'special':>8} {'R':>8}")
    _print_row("reconstruction", student, examples, replace(config, alignment_weight=0.0))
    for scale in ("variance", "dimension", "mean"):
        alone = replace(config, reconstruction_weight=0.0, alignment_scale=scale)
        student.alignment_factor = alone.alignment_factor(data.dimension, data.teacher_variance)
        _print_row(f"alignment, {scale}", student, examples, alone)


def _write_data(folder: Path, rows: int, batch_size: int) -> TrainConfig:
    answers, teacher = folder / "answers.jsonl", folder / "teacher.parquet"
    questions = [entry.question for entry in trivia()[: rows + batch_size]]
    queries = Texts([str(i) for i in range(len(questions))], questions)
    generate_answers(queries, answers, load_generator(max_new_tokens=48))
    teach([answers], teacher, "minilm", show_progress_bar=False)
    return TrainConfig(
        answers=(str(answers),),
        teacher=str(teacher),
        out=str(folder),
        validation_rows=batch_size,
    )


def _print_row(name: str, student: Student, examples: list, config: TrainConfig) -> None:
    losses, _ = accumulate(student, examples, config, World())
    norms = [float(p.grad.norm()) for p in (student.special, student.reconstruction.weight)]
    print(f"{name:<24} {losses.total:8.4f} {norms[0]:8.3f} {norms[1]:8.3f}", flush=True)


if __name__ == "__main__":
    main()
