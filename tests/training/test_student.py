"""What training starts from."""

import torch

from gen_fast.training.special import special_rows


def test_special_tokens_start_like_rows_of_the_embedding_table():
    torch.manual_seed(0)
    table = torch.randn(5000, 6) @ torch.randn(6, 6) + torch.arange(6.0)
    drawn = special_rows(table.bfloat16(), 20_000, "draw", torch.Generator().manual_seed(0))
    spread = torch.cov(table.T)
    assert drawn.dtype == torch.float32
    assert ((drawn.mean(0) - table.mean(0)).abs() <= 0.05 * spread.diagonal().sqrt()).all()
    assert (torch.cov(drawn.T) - spread).abs().max() <= 0.05 * spread.abs().max()
