"""Model cards as the Hub reads them: metadata, then text, and tables of evaluation results."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gen_fast.model.sources import is_hub_id

if TYPE_CHECKING:
    from huggingface_hub import EvalResult


def with_results(card: str, name: str, results: Sequence["EvalResult"]) -> str:
    """A card with results in its metadata, as model-index of the model `name`, and as a table.

    A metric_args["standard_error"] stands behind the value. Without results the card is as it was.
    """
    if not results:
        return card
    from huggingface_hub import ModelCard

    parsed = ModelCard(card)
    parsed.data.model_name, parsed.data.eval_results = name, list(results)
    return f"{parsed}\n## Evaluation\n\n{_table(results)}"


def _table(results: Sequence["EvalResult"]) -> str:
    lines = ["| task | dataset | metric | value |", "|---|---|---|---|"]
    for result in results:
        error = (result.metric_args or {}).get("standard_error")
        value = f"{result.metric_value}" + ("" if error is None else f" ± {error}")
        task = result.task_name or result.task_type
        metric = result.metric_name or result.metric_type
        lines.append(f"| {task} | {result.dataset_name} | {metric} | {value} |")
    return "\n".join(lines) + "\n"


def sentence_transformers_card(backbone: str, method: str, prompts: Mapping[str, str]) -> str:
    """The card of an export for sentence-transformers; backbone: Hub id, known name or path."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        # The Hub refuses a card whose base model is none of its own.
        base_model=backbone if is_hub_id(backbone) else None,
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=["sentence-transformers", "feature-extraction", method],
    )
    listed = "\n".join(f"- {name}: `{prompt}`" for name, prompt in prompts.items() if prompt)
    return f"""---
{data.to_yaml()}
---
# {method} embeddings of {Path(backbone).name}

Exported by gen_fast. sentence-transformers runs this directory without code from it.

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("this-directory")
queries = model.encode_query(["what is disk cleanup?"])
documents = model.encode_document(["Disk Cleanup frees space by deleting temporary files."])
print(model.similarity(queries, documents))
```

Prompts:
{listed or "none"}
"""


def causal_lm_card(base: str, tags: tuple[str, ...]) -> str:
    """The card of a causal language model whose linears were trained; base: Hub id or path."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        # The Hub refuses a card whose base model is none of its own.
        base_model=base if is_hub_id(base) else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=list(tags),
    )
    return f"""---
{data.to_yaml()}
---
# {Path(base).name}, its linear weights trained

Queries, keys, values, output, gate, up and down of every layer, in float32; all else is that of
{base}. Trained by gen_fast.
"""
