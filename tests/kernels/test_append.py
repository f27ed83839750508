import pytest
import torch

from gen_fast.ops.append import OP, append


@pytest.mark.parametrize("impl", OP.implementations("cpu"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_come_from_both_tables(dtype, impl):
    table, special = torch.randn(7, 5).to(dtype), torch.randn(3, 5).to(dtype)
    ids = torch.tensor([6, 0, 7, 9, 8, 1, 9])
    expected = torch.stack([torch.cat((table, special))[i] for i in ids])
    assert torch.equal(append(table, special, ids, impl=impl), expected)


@pytest.mark.parametrize("impl", OP.implementations("cpu"))
@pytest.mark.parametrize("n_special", [None, 2])
def test_no_ids_give_no_rows(n_special, impl):
    special = None if n_special is None else torch.randn(n_special, 5)
    result = append(torch.randn(7, 5), special, torch.empty(0, dtype=torch.int64), impl=impl)
    assert result.shape == (0, 5)


def test_gradient_reaches_the_special_rows_only():
    table, special = torch.randn(7, 5), torch.randn(2, 5, requires_grad=True)
    append(table, special, torch.tensor([1, 7, 7, 8]), impl="reference").sum().backward()
    torch.testing.assert_close(special.grad, torch.tensor([2.0, 1.0]).unsqueeze(1).expand(2, 5))
