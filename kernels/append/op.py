"""Choice of implementation for append."""

from torch import Tensor

from gen_fast.ops import Op

from . import reference

OP = Op("append")
OP.register("reference")(reference.append)


def append(
    table: Tensor, special: Tensor | None, ids: Tensor, *, impl: str | None = None
) -> Tensor:
    """Embed packed ids: [T, h] in the dtype of `table`.

    table [V, h]: the backbone's frozen embedding rows. ids [T]: int64; id V + j means row j of
    `special` [k, h], the trained special tokens, which are not part of any vocabulary and so can
    never be produced by tokenising text.

    Source: LLM2Vec-Gen, arXiv 2603.10913, §3 (special tokens appended to the query).
    """
    result: Tensor = OP.choose(impl, table, *(() if special is None else (special,)))(
        table, special, ids
    )
    return result
