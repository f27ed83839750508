"""Speed of a training step at the sizes of larger models, with random weights.

    python bench/train_shapes.py [--shape qwen3-0.6b qwen3-8b] [--rounds N] [--json FILE]
                                 [--profile SECONDS]

The peer is transformers' own model (SDPA) run as the reference package trains: left-padded,
gradient checkpointing, full logits; one copy of the weights serves it for both roles, which the
reference package does not do. Both start from the same weights, take the same batch, 128 query
and 192 answer tokens ragged around them, and update the same parameters. Ratios are medians over
interleaved rounds; peak memory is what a side's step allocates beyond the weights (CUDA only). The
FLOPs of an MFU are those of gen_fast's products with frozen weights (`Work.flops`), for both.
"""

import copy
import statistics
from collections.abc import Callable, Iterator

import numpy as np
import torch
from encode_shapes import Profiled, layer_products, make_models, run_shapes
from measure import interleaved, median_ratio
from torch import nn
from train import DIMENSION, make_batch

from gen_fast.model.device import matmul_peak
from gen_fast.training.config import TrainConfig
from gen_fast.training.data import Example
from gen_fast.training.llm2vec_gen import LLM2VecGenTask
from gen_fast.training.student import Student
from gen_fast.training.trainer import Stepper

TEXTS = {"qwen3-0.6b": 64, "qwen3-8b": 16, "tiny": 4}


class PaddedStep:
    """A step over transformers' model, from a copy of `student`'s parameters."""

    def __init__(self, model: nn.Module, student: Student) -> None:
        self.model = model.train().requires_grad_(False)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        self.compression = student.n_compression
        self.special = nn.Parameter(student.special.detach().clone())
        self.reconstruction = copy.deepcopy(student.reconstruction)
        self.alignment = copy.deepcopy(student.alignment)
        self.parameters = [self.special]
        self.parameters += [*self.reconstruction.parameters(), *self.alignment.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, weight_decay=0.0)

    def losses(self, examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
        """Reconstruction and alignment loss, means over answer tokens and over texts."""
        table, device = self.model.get_input_embeddings(), self.special.device
        special = self.special.to(table.weight.dtype).expand(len(examples), -1, -1)
        queries, mask = self._padded([e.query for e in examples], left=True)
        states = self._states(torch.cat((table(queries), special), 1), mask, special.shape[1], True)
        soft = self.reconstruction(states[:, -self.compression :].float())
        embedded = self.alignment(soft.mean(1))
        vectors = torch.from_numpy(np.stack([e.vector for e in examples])).to(device)

        answers, mask = self._padded([e.answer for e in examples], left=False)
        embeds = torch.cat((soft.to(table.weight.dtype), table(answers)), 1)
        states = self._states(embeds, mask, self.compression, False)
        logits = nn.functional.linear(states[:, self.compression - 1 : -1], table.weight)
        labels = torch.where(mask.bool(), answers, -100)
        recon = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        return recon, nn.functional.mse_loss(embedded, vectors)

    def step(self, examples: list[Example]) -> None:
        """One update."""
        self.optimizer.zero_grad()
        sum(self.losses(examples)).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()

    def _states(self, embeds: torch.Tensor, mask: torch.Tensor, extra: int, behind: bool):
        """Final states; `extra` rows that every text has stand behind or before the padded ones."""
        ones = mask.new_ones(len(mask), extra)
        mask = torch.cat((mask, ones) if behind else (ones, mask), 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        return self.model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state

    def _padded(self, rows: list[np.ndarray], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
        widest = max(map(len, rows))
        ids = torch.zeros(len(rows), widest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            where = slice(widest - len(row), None) if left else slice(None, len(row))
            ids[i, where] = torch.from_numpy(row)
            mask[i, where] = 1
        return ids.to(self.special.device), mask.to(self.special.device)


def measure_shape(shape: str, rounds: int, device: str, profiled: Profiled) -> Iterator[dict]:
    """The rows of both sides."""
    backbone, model = make_models(shape, device)
    config = TrainConfig(answers=("-",), teacher="-", out="-", warmup_steps=0)
    student = Student(backbone, backbone.embedding, DIMENSION, config)
    stepper = Stepper(LLM2VecGenTask(student, config))
    vocabulary = backbone.config.vocab_size
    examples = [
        Example(query=e.query % vocabulary, answer=e.answer % vocabulary, vector=e.vector)
        for e in make_batch("ragged", batch=TEXTS[shape])
    ]
    peer = PaddedStep(model, stepper.task.parameters)
    # Before the first update both compute the same losses.
    expected = [loss.item() for loss in peer.losses(examples)]
    found = stepper.step(examples)
    agreement = [
        abs(found[name] / value - 1)
        for name, value in zip(("reconstruction", "alignment"), expected, strict=True)
    ]
    sides: dict[str, Callable[[list[Example]], object]] = {
        "gen_fast": stepper.step,
        "transformers": peer.step,
    }
    memory = {name: _peak_memory(step, examples, device) for name, step in sides.items()}
    peaks: list[float] = []
    seconds = interleaved(
        {name: lambda step=step: _finished(step, examples, device) for name, step in sides.items()},
        rounds,
        lambda: peaks.append(matmul_peak(torch.bfloat16, device)),
    )
    flops = stepper.progress.flops  # of the work that there is, for both
    products = layer_products(backbone.config, 256 if shape == "tiny" else 16384, device)
    for name, times in seconds.items():
        median = statistics.median(times)
        row = {
            "shape": shape,
            "provider": name,
            "texts": len(examples),
            "seconds": times,
            "steps_per_second": 1 / median,
            "flops": flops,
            "mfu": flops / median / statistics.median(peaks),
            "product_tflops": products,
            "peak_memory_mb": memory[name],
            "gen_fast_speedup": median_ratio(times, seconds["gen_fast"]),
            "relative_difference_of_losses": max(agreement),
        }
        allocated = "" if memory[name] is None else f", {memory[name]:.0f} MB"
        print(
            f"{shape:<11} training {name:<13} {1 / median:.2f} steps/s, MFU {row['mfu']:.2f}"
            f"{allocated}, gen_fast is {row['gen_fast_speedup']:.2f}x"
            f" (losses differ by {max(agreement):.1e})",
            flush=True,
        )
        yield row
    profiled(f"train {shape}", lambda: stepper.step(examples))  # last: it is slow to read


def _finished(step: Callable, examples: list[Example], device: str) -> None:
    step(examples)
    if device == "cuda":
        torch.cuda.synchronize()


def _peak_memory(step: Callable, examples: list[Example], device: str) -> float | None:
    """MB that a warm step allocates at most, beyond what is there before it."""
    _finished(step, examples, device)
    if device != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _finished(step, examples, device)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


if __name__ == "__main__":
    run_shapes(measure_shape, __doc__, quantizes=False)
