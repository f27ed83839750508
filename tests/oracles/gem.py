"""GEM in plain transformers, with a dense mask built token by token from the paper's rules.

There is no reference package. Source: GEM, arXiv 2506.04344, §3.1.
"""

import torch


def seen(length, block):
    """Mask [n, n]: True where a row may attend. block: (first, after) of the special tokens."""
    first, after = block
    mask = torch.zeros(length, length, dtype=torch.bool)
    for row in range(length):
        for column in range(length):
            if column > row:
                continue  # causal
            if first <= row < after and first <= column < after and row != column:
                continue  # special tokens do not see each other
            if row >= after and column < first and after > first:
                continue  # the suffix does not see the prefix
            mask[row, column] = True
    return mask


def embedded(model, ids, special):
    """Rows [n, h] of ids, those from V on of `special`."""
    table = model.get_input_embeddings().weight
    return torch.cat((table, special.to(table.dtype)))[torch.as_tensor(ids, dtype=torch.int64)]


def states(model, ids, special, block):
    """Final-norm states [n, h] of one text, by a causal language model of transformers."""
    rows = embedded(model, ids, special)
    mask = torch.zeros(len(ids), len(ids), dtype=rows.dtype)
    mask.masked_fill_(~seen(len(ids), block), torch.finfo(rows.dtype).min)
    decoder = model.get_decoder()
    return decoder(
        inputs_embeds=rows[None],
        attention_mask=mask[None, None],
        position_ids=torch.arange(len(ids))[None],
        use_cache=False,
    ).last_hidden_state[0]
