"""Triton's interpreter as the tests have it computes what it computes by itself, bit by bit."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gen_fast.ops import gpu
from gen_fast.ops.attention import AttentionOptions, attention
from gen_fast.ops.norm import add_rms_norm

core = pytest.importorskip("triton.language").core
if not gpu.interpreted() or gpu.missing() is not None:
    pytest.skip("Triton compiles here, or is missing", allow_module_level=True)


def results() -> dict[str, Tensor]:
    torch.manual_seed(0)
    q, k, v, dout = torch.randn(4, 33, 2, 16).bfloat16()
    starts = torch.tensor([0, 5, 33]).int()
    options = AttentionOptions(starts, starts, window=7, dropout=0.3, seed=1)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attention(*leaves, options, impl="triton")
    gradients = torch.autograd.grad(out, leaves, dout)
    norms = add_rms_norm(*torch.randn(2, 5, 77), torch.randn(77), 1e-6, impl="triton")
    names = ("out", "dq", "dk", "dv", "normed", "total")
    return {n: x.detach() for n, x in zip(names, (out, *gradients, *norms), strict=True)}


def write(path: str) -> None:
    save_file(results(), path)


@pytest.mark.slow
def test_results_are_those_of_the_plain_interpreter(tmp_path: Path) -> None:
    assert core.tensor.__init__.__module__ == "faster_interpreter"
    program = "import sys; from test_faster_interpreter import write; write(sys.argv[1])"
    command = [sys.executable, "-c", program, str(tmp_path / "plain")]
    subprocess.run(command, cwd=Path(__file__).parent, check=True)
    plain, actual = load_file(tmp_path / "plain"), results()
    for name, expected in plain.items():
        assert torch.equal(actual[name], expected), name
