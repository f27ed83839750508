"""Memory does not grow with the corpus."""

import pytest
import torch
from warm_processes import run_program

from gen_fast.model.device import has_native_bfloat16
from gen_fast.model.token_budget import is_out_of_memory
from gen_fast.ops import native

# Peak resident memory, in MB, while each number of texts is encoded, less that of the loaded model
# (after a first small call, which warms up the libraries) and the output array.
PROGRAM = """
import sys
from pathlib import Path
import numpy as np
import gen_fast

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(field)) / 1024

words = "the cat sat in a hat at noon while it was raining outside".split()
rng = np.random.default_rng(0)
counts = [int(count) for count in sys.argv[3:]]
choices = rng.integers(0, len(words), (max(counts), 8))
texts = [" ".join(words[i] for i in row) for row in choices]
encoder = gen_fast.load(sys.argv[1], dtype=sys.argv[2], device="cpu", max_length=64)
encoder.encode(texts[:16], prompt="Answer: ")
Path("/proc/self/clear_refs").write_text("5")  # loading peaked higher: forget that peak
before = resident("VmRSS")
for count in counts:
    output = encoder.encode(texts[:count], prompt="Answer: ")
    print(resident("VmHWM") - before - output.nbytes / 2**20)
"""


def growth(model, *counts, dtype="float32"):
    """Of each of the rising `counts`, in one process."""
    done = run_program(PROGRAM, model, dtype, *counts)
    return [float(line) for line in done.stdout.splitlines()]


def test_short_texts_take_what_makes_at_most_200_mb_for_100_000(tiny_model):
    """What is held whatever their number, and the slope, of which the next test has the sum."""
    first, more = growth(tiny_model, 10_000, 30_000)
    assert first + (more - first) / 20_000 * 90_000 <= 200, (first, more)


@pytest.mark.slow
def test_100_000_short_texts_take_at_most_200_mb(tiny_model):
    assert growth(tiny_model, 100_000)[0] <= 200


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_real_model_stays_within_200_mb(smollm2, dtype):
    """The windows are alike whatever the model; what a model adds is one batch's activations."""
    assert growth(smollm2, 8_000, dtype=dtype)[0] <= 200


# Peak resident memory, in MB, of a process that embeds a corpus file.
JOB = """
import sys
from pathlib import Path
from gen_fast.jobs.job import embed_corpus

embed_corpus(
    sys.argv[2], sys.argv[3], model=sys.argv[1], dtype="float32", id_column="id", max_length=32
)
lines = Path("/proc/self/status").read_text().splitlines()
print(next(int(x.split()[1]) for x in lines if x.startswith("VmHWM")) / 1024)
"""


def peak_of_job(model, corpus, out):
    """Megabytes that a process takes at most while it runs a job."""
    return float(run_program(JOB, model, corpus, out).stdout)


def test_a_job_of_ten_times_the_rows_takes_at_most_25_mb_more(tiny_model, tmp_path):
    peaks = []
    for count in (5_000, 50_000):
        corpus = tmp_path / f"{count}.jsonl"
        with corpus.open("w") as file:
            file.writelines(f'{{"id": "row-{i}", "text": "text {i}"}}\n' for i in range(count))
        peaks.append(peak_of_job(tiny_model, corpus, tmp_path / f"o{count}"))
    assert peaks[1] - peaks[0] < 25, peaks


def test_a_line_of_150_mb_is_rejected_without_being_held(tiny_model, tmp_path):
    peaks = []
    for size in (10, 150_000_000):
        corpus = tmp_path / f"{size}.jsonl"
        with corpus.open("w") as file:
            file.write('{"id": "a", "text": "one"}\n{"id": "b", "text": "')
            file.write("x " * (size // 2))
            file.write('"}\n{"id": "c", "text": "two"}\n')
        peaks.append(peak_of_job(tiny_model, corpus, tmp_path / f"o{size}"))
    assert peaks[1] - peaks[0] < 60, peaks
    (rejected,) = (tmp_path / "o150000000" / "rejected.jsonl").read_text().splitlines()
    assert "a line of more than" in rejected


def test_a_quote_that_is_never_closed_is_said_without_holding_the_file(tmp_path):
    corpus = tmp_path / "open.csv"
    with corpus.open("w") as file:
        file.write('id,text\na,one\nb,"open\n')
        file.writelines(f"r{i},some text of row {i}\n" for i in range(3_000_000))
    program = f"""
from pathlib import Path
from gen_fast.errors import InputError
from gen_fast.io.text_files import read_texts
def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(field)) / 1024
before = resident("VmRSS")
try:
    read_texts({str(corpus)!r})
except InputError as error:
    print(resident("VmHWM") - before, str(error).replace(" ", "_"))
"""
    grown, message = run_program(program).stdout.split()
    assert "line_3" in message
    assert float(grown) <= 200


# Peak resident memory, in MB, beyond that of a loaded model, while a text of each sample is
# embedded.
ONE_TEXT = """
import sys
from pathlib import Path
import gen_fast

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(field)) / 1024

encoder = gen_fast.load(sys.argv[1], device="cpu", dtype="float32")
texts = [sample * (5_000_000 // len(sample.encode())) for sample in sys.argv[2:]]
for text in texts:
    encoder.encode(text[:2000])
before = resident("VmRSS")  # once: what one text leaves behind counts for the next
for text in texts:
    Path("/proc/self/clear_refs").write_text("5")
    encoder.encode(text)
    print(resident("VmHWM") - before)
"""


# The last two of the first, and the last of the others, have no place where they could be cut
# without a proof.
@pytest.mark.parametrize(
    "samples",
    [
        ["words of a text, and more. ", "x", "\u4ed6"],
        pytest.param(["\u4ed6\u5728\u5317\u4eac\uff0c", "12"], marks=pytest.mark.slow),
    ],
)
def test_a_text_of_5_mb_takes_what_its_first_tokens_do(smollm2, samples):
    done = run_program(ONE_TEXT, smollm2, *samples)
    # The prompt is joined to the text, and the tokenizer's description is read once.
    grown = [float(line) for line in done.stdout.splitlines()]
    assert len(grown) == len(samples)
    assert max(grown) <= 120, grown


# The same for the losses of 8 answers of 192 tokens against SmolLM2's vocabulary.
DISTILL = """
import sys
from pathlib import Path
import torch
from gen_fast.ops.distill import distill

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(field)) / 1024

dtype = getattr(torch, sys.argv[1])
size = int(sys.argv[2])
hidden = torch.randn(1536, size).to(dtype).requires_grad_()
head = torch.randn(49152, size).to(dtype)
targets = torch.randint(0, 49152, (1536,))
student = torch.randn(8, 384, requires_grad=True)

def step(rows):
    losses = distill(hidden[:rows], head, targets[:rows], student, student.detach(), impl="cpu")
    sum(losses).backward()
    hidden.grad = student.grad = None

step(8)
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
step(1536)
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(native.missing() is not None, reason="needs the C++ ops")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_distill_takes_an_eighth_of_the_logits_at_most(dtype):
    # Products in bfloat16 take minutes where the processor has none; the logits do not change.
    native = dtype == "float32" or has_native_bfloat16(torch.device("cpu"))
    size = "576" if native else "64"
    done = run_program(DISTILL, dtype, size)
    logits = 1536 * 49152 * getattr(torch, dtype).itemsize / 2**20
    assert float(done.stdout) <= logits / 8


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", True),
        ("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`", True),
        ("Triton Error [CUDA]: out of memory", True),
        ("[enforce fail] DefaultCPUAllocator: can't allocate memory", True),
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`", False),
        ("Triton Error [CUDA]: an illegal memory access was encountered", False),
        ("CUDA error: device-side assert triggered", False),
    ],
)
def test_every_library_s_failure_to_allocate_is_known(message, expected):
    assert is_out_of_memory(RuntimeError(message)) == expected
    assert is_out_of_memory(torch.OutOfMemoryError(""))
