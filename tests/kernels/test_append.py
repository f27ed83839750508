import pytest
import torch
from torch.library import opcheck

import gen_fast
from gen_fast.ops.append import BACKWARD, OP, append
from gen_fast.ops.append.reference import append as reference
from gen_fast.testing import check_gradients


@pytest.mark.parametrize("size", [1, 5, 64, 130, 576])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_come_from_both_tables(dtype, size, device, impl):
    table, special = (torch.randn(n, size).to(device, dtype) for n in (7, 3))
    ids = torch.tensor([6, 0, 7, 9, 8, 1, 9], device=device)
    expected = torch.stack([torch.cat((table, special))[i] for i in ids])
    assert torch.equal(append(table, special, ids, impl=impl), expected)


def test_triton_gives_zeros_for_an_id_of_neither_table():
    if "triton" not in OP.implementations("cpu"):
        pytest.skip("needs Triton's interpreter")
    table, special, ids = torch.ones(7, 5), torch.ones(2, 5), torch.tensor([8, 9, -1, 1 << 40])
    rows = append(table, special, ids, impl="triton").sum(1)
    assert rows.tolist() == [5, 0, 0, 0]


def test_what_does_not_fit_is_refused():
    table, ids = torch.ones(7, 5), torch.tensor([1])
    for arguments, message in (
        ((table, torch.ones(2, 4), ids), "as wide as"),
        ((table, None, ids.int()), "int64"),
        ((table, None, ids[None]), "vector"),
    ):
        with pytest.raises(gen_fast.OpError, match=message):
            append(*arguments)


@pytest.mark.parametrize("n_special", [None, 2])
def test_no_ids_give_no_rows(n_special, device, impl):
    special = None if n_special is None else torch.randn(n_special, 5, device=device)
    ids = torch.empty(0, dtype=torch.int64, device=device)
    assert append(torch.randn(7, 5, device=device), special, ids, impl=impl).shape == (0, 5)


def test_without_special_tokens(device, impl):
    table, ids = torch.randn(7, 5, device=device), torch.tensor([6, 0], device=device)
    assert torch.equal(append(table, None, ids, impl=impl), table[ids])


@pytest.mark.parametrize("checked", ["reference", "cpu"])
def test_an_id_of_neither_table_is_an_error(checked):
    error = gen_fast.OpError if checked == "cpu" else IndexError
    for bad in (9, -1):
        with pytest.raises(error):
            append(torch.randn(7, 5), torch.randn(2, 5), torch.tensor([1, bad]), impl=checked)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 3, 600])  # 16 · 32 rows are one turn of Triton's loop
def test_gradient_reaches_the_special_rows_only(rows, dtype, device, grad_impl):
    torch.manual_seed(0)
    table, special = torch.randn(7, 130).to(dtype), torch.randn(4, 130).to(dtype)
    ids = torch.randint(0, 10, (rows,))  # the last special token is never used
    inputs = (table, special.requires_grad_(), ids)
    check_gradients(append, reference, inputs, grad_impl, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_instruction_set(isa, dtype):
    for rows in (0, 3, 1000):
        test_gradient_reaches_the_special_rows_only(rows, dtype, "cpu", "cpu")


def test_opcheck():
    table, special = torch.randn(7, 5), torch.randn(2, 5, requires_grad=True)
    ids = torch.tensor([1, 7, 7, 8])
    opcheck(OP.torch_op, (table, special, ids))
    opcheck(OP.torch_op, (table, None, ids[:1]))
    opcheck(BACKWARD.torch_op, (torch.randn(4, 5), ids, 7, 2))
