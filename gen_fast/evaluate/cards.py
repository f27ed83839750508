"""Scores as model cards have them."""

from collections.abc import Sequence

from huggingface_hub import EvalResult

from gen_fast.evaluate.runner import TaskScore


def card_results(scores: Sequence[TaskScore]) -> list[EvalResult]:
    """For `evaluation=` of what saves a model: main score in percent, with its standard error."""
    return [
        EvalResult(
            task_type=score.kind,
            dataset_type=score.task,
            dataset_name=f"{score.task} (in-domain)" if score.in_domain else score.task,
            metric_type="main_score",
            metric_name="main score, %",
            metric_value=round(100 * score.score, 2),
            metric_args=None
            if score.standard_error is None
            else {"standard_error": round(100 * score.standard_error, 2)},
        )
        for score in scores
    ]
