import pytest
import torch
from torch.library import opcheck

import gen_fast
from gen_fast.ops.distill import ALIGNMENT, OP, distill
from gen_fast.ops.distill import alignment as alignment_op
from gen_fast.ops.distill import reconstruction as reconstruction_op
from gen_fast.ops.distill.chunked import chunk_rows
from gen_fast.ops.distill.reference import alignment, reconstruction
from gen_fast.testing import assert_no_worse, check_gradients


def plain(hidden, head, targets, student, teacher, kind="mse"):
    return (
        reconstruction(hidden, head, targets) / max(1, len(hidden)),
        alignment(student, teacher, kind) / max(1, len(student)),
    )


def inputs(rows, size, vocabulary, dtype):
    torch.manual_seed(0)
    hidden, head = torch.randn(rows, size).to(dtype), torch.randn(vocabulary, size).to(dtype)
    targets = torch.randint(0, vocabulary, (rows,))
    student, teacher = torch.randn(2, 5, 12).unbind()
    return hidden.requires_grad_(), head, targets, student.detach().requires_grad_(), teacher


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["mse", "cosine"])
@pytest.mark.parametrize("rows", [0, 1, 37])
@pytest.mark.parametrize("vocabulary", [7, 5003])
def test_losses_and_gradients_match_float64(vocabulary, rows, kind, dtype, device, impl):
    tensors = inputs(rows, 24, vocabulary, dtype)
    moved = [x.detach().to(device) for x in tensors]
    wide = [x.double() if x.is_floating_point() else x for x in moved]
    # 40 kB: several chunks of the larger vocabulary, the last one shorter.
    actual = distill(*moved, alignment=kind, memory=40_000, impl=impl)
    for a, p, e in zip(actual, plain(*moved, kind), plain(*wide, kind), strict=True):
        assert_no_worse(a, p, e)

    def run(*leaves, impl):
        return distill(*leaves, alignment=kind, memory=40_000, impl=impl)

    check_gradients(run, lambda *leaves: plain(*leaves, kind), tensors, impl, device)


@pytest.mark.parametrize("bad", [-100, -1, 7])
def test_a_target_that_is_no_row_of_the_head(bad):
    """Refused where asking costs nothing; on a GPU the loss cannot be mistaken for one."""
    hidden, head, targets, *rest = (x.detach() for x in inputs(5, 24, 7, torch.float32))
    targets[3] = bad
    if "cpu" in OP.implementations("cpu"):
        with pytest.raises(gen_fast.OpError, match=rf"target {bad} is not one of 0 … 6"):
            distill(hidden, head, targets, *rest, impl="cpu")
    if "triton" in OP.implementations("cpu"):
        assert distill(hidden, head, targets, *rest, impl="triton")[0].isnan()


def test_without_gradients_the_losses_are_the_same(device, impl):
    tensors = [x.detach().to(device) for x in inputs(20, 8, 30, torch.float32)[:3]]
    alone = OP.torch_op(*tensors, 20.0, 1000, False, impl=impl)
    whole = OP.torch_op(*tensors, 20.0, 1000, True, impl=impl)
    assert torch.equal(alone[0], whole[0])
    assert (alone[1].shape, whole[1].shape) == ((0, 8), (20, 8))


def test_targets_may_be_strided(device, impl):
    hidden, head, targets, *rest = (x.detach().to(device) for x in inputs(5, 24, 7, torch.float32))
    strided = torch.stack((targets, targets + 100), 1)[:, 0]
    expected = distill(hidden, head, targets, *rest, impl=impl)
    assert torch.equal(distill(hidden, head, strided, *rest, impl=impl)[0], expected[0])


def test_parts_of_a_batch_add_up_to_the_whole(device, impl):
    hidden, head, targets, student, teacher = (
        x.detach().to(device) for x in inputs(20, 8, 30, torch.float32)
    )
    whole = distill(hidden, head, targets, student, teacher, impl=impl)
    parts = [
        distill(
            hidden[rows],
            head,
            targets[rows],
            student[texts],
            teacher[texts],
            tokens=20,
            texts=5,
            impl=impl,
        )
        for rows, texts in ((slice(0, 7), slice(0, 4)), (slice(7, 20), slice(4, 5)))
    ]
    for i in range(2):
        torch.testing.assert_close(parts[0][i] + parts[1][i], whole[i])


def test_huge_logits_stay_finite(device, impl):
    hidden = torch.tensor([[200.0], [-200.0]], device=device)
    head = torch.arange(64.0, device=device).unsqueeze(1)
    targets = torch.tensor([63, 63], device=device)
    student = torch.zeros(1, 1, device=device)
    losses = distill(hidden, head, targets, student, student, tokens=1, impl=impl)
    torch.testing.assert_close(losses[0].cpu(), torch.tensor(200.0 * 63))


def test_chunks_follow_the_memory_and_not_the_vocabulary():
    assert chunk_rows(1536, 49152, 4, 64 << 20) == 308  # five chunks, about equal
    assert chunk_rows(100, 151936, 2, 1) == 1
    assert chunk_rows(4096, 151936, 2, 1 << 30) == 2048


def test_what_does_not_fit_together_is_refused():
    hidden, head, targets, student, teacher = inputs(3, 8, 30, torch.float32)
    with pytest.raises(gen_fast.OpError, match="must have one shape"):
        distill(hidden, head, targets, student, teacher[:, 1:])
    with pytest.raises(gen_fast.OpError, match="do not fit together"):
        distill(hidden, head, targets[1:], student, teacher)
    with pytest.raises(gen_fast.OpError, match="mse, cosine, not 'l1'"):
        distill(hidden, head, targets, student, teacher, alignment="l1")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_instruction_set(isa, dtype):
    for vocabulary in (7, 5003):
        test_losses_and_gradients_match_float64(vocabulary, 37, "mse", dtype, "cpu", "cpu")
    test_huge_logits_stay_finite("cpu", "cpu")


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_one_loss_alone_is_that_of_both(kind, device, impl):
    hidden, head, targets, student, teacher = (
        x.detach().to(device).requires_grad_(x.requires_grad)
        for x in inputs(20, 8, 30, torch.float32)
    )
    both = distill(hidden, head, targets, student, teacher, alignment=kind, impl=impl)
    alone = (
        reconstruction_op(hidden, head, targets, impl=impl),
        alignment_op(student, teacher, kind=kind),
    )
    leaves = (hidden, student)
    for x, y, leaf in zip(both, alone, leaves, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(torch.autograd.grad(x, leaf)[0], torch.autograd.grad(y, leaf)[0])


def test_opcheck():
    hidden, head, targets, student, teacher = inputs(3, 8, 30, torch.float32)
    opcheck(OP.torch_op, (hidden, head, targets, 3.0, 1 << 20, True))
    opcheck(OP.torch_op, (hidden.detach(), head, targets, 3.0, 1 << 20, False))
    opcheck(ALIGNMENT.torch_op, (student, teacher, 5.0, "mse"))
