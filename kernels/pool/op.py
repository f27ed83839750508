"""Choice of implementation for pool."""

from torch import Tensor

from gen_fast.ops import Op

from . import reference

OP = Op("pool")
OP.register("reference")(reference.pool)


def pool(
    hidden: Tensor,
    offsets: Tensor,
    norm_weight: Tensor,
    eps: float,
    row_weights: Tensor | None = None,
    projection: Tensor | None = None,
    bias: Tensor | None = None,
    normalize: bool = False,
    *,
    impl: str | None = None,
) -> Tensor:
    """Turn the needed rows of each text into its embedding: [B, d], float32 (float64 if given).

    hidden [R, h]: residual stream before the final norm. offsets [B + 1]: int, rows
    offsets[i]:offsets[i+1] belong to text i. norm_weight [h], eps: the final RMSNorm.
    row_weights [R]: weights that sum to 1 within a text; None takes the plain mean.
    projection [d, h], bias [d]: the collapsed W_A·W_R of LLM2Vec-Gen; None leaves the mean.
    normalize: divide by the L2 norm. A text without rows gives NaN: callers refuse it before.

    Source: LLM2Vec-Gen, arXiv 2603.10913, §3; both maps are linear, so one product suffices.
    """
    result: Tensor = OP.choose(impl, hidden)(
        hidden, offsets, norm_weight, eps, row_weights, projection, bias, normalize
    )
    return result
