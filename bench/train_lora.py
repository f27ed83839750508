"""Speed and memory of LLM2Vec's training steps against a plain loop of transformers and PEFT.

    python bench/train_lora.py [--step mntp simcse] [--case equal ragged] [--dtype fp32 bf16]
        [--texts N] [--tokens N] [--device NAME] [--rounds N] [--no-memory] [--json FILE]

SmolLM2-135M, LoRA of rank 16 on all linears with dropout 0.05; texts of equal length, or ragged
around it from a quarter to seven quarters. MNTP hides 20% of the tokens; SimCSE runs each text
twice with attention dropout 0.3. Both sides take the same texts, masks, dtype, dropout rates and
optimizer; neither recomputes activations. The peer pads, and drops its causal mask by a mask of
four dimensions, as transformers takes it. They take turns, and ratios are medians over the rounds.
Peak memory is that of a process that loads its model and takes two steps; on a GPU, of its tensors.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from measure import interleaved, machine, median_ratio

from gen_fast.model.device import matmul_peak
from gen_fast.model.lora import MODULES
from gen_fast.model.sources import resolve
from gen_fast.model.weights import load_backbone, load_head
from gen_fast.training.contrastive import ContrastiveTask, Match, View
from gen_fast.training.llm2vec_config import LLM2VecConfig
from gen_fast.training.lora_task import Data
from gen_fast.training.mntp import MNTPTask, hide
from gen_fast.training.prediction import PredictedText
from gen_fast.training.records import Rejections
from gen_fast.training.trainer import Stepper

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROVIDERS = ("gen_fast", "transformers + PEFT")
CASES, STEPS = ("equal", "ragged"), ("mntp", "simcse")
RANK, DROPOUT = 16, 0.05


def main() -> None:
    """Measure and print; write the rows as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--step", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--case", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=96, help="of a text, on average")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak-memory-of", choices=PROVIDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_memory_of:
        print(_peak_memory(args))
        return
    rows = [
        row
        for dtype in args.dtype
        for step in args.step
        for row in _compare(step, args.case, dtype, args)
    ]
    if args.json:
        report = {"machine": machine(), "command": " ".join(sys.argv), "rows": rows}
        args.json.write_text(json.dumps(report, indent=1) + "\n")


def make_batch(step: str, case: str, count: int, tokens: int) -> list[PredictedText] | list[Match]:
    """`count` texts of random ids, `tokens` each on average."""
    rng = np.random.default_rng(0)
    spread = np.linspace(0.25, 1.75, count) if case == "ragged" else np.ones(count)
    texts = [rng.integers(1000, 40000, round(tokens * share)) for share in rng.permutation(spread)]
    if step == "simcse":
        return [
            Match(*(View(ids, len(ids), 3 * i + j) for j in range(2)))
            for i, ids in enumerate(texts)
        ]
    return [
        hide(
            ids,
            key=i,
            probability=0.2,
            masking="bert",
            mask_id=79,
            vocabulary=40000,
            special=np.array([1, 2]),
            draws=rng,
        )
        for i, ids in enumerate(texts)
    ]


def _own(step: str, dtype: torch.dtype, device: str) -> Stepper:
    directory = resolve("smollm2-135m")
    backbone = load_backbone(directory, dtype=dtype, device=device)
    config = LLM2VecConfig(
        step=step,
        texts=("-",),
        out="-",
        warmup_steps=0,
        lora_rank=RANK,
        lora_dropout=DROPOUT,
    )
    data, rejections = Data([], [], ""), Rejections(Path("-"))
    if step == "simcse":
        return Stepper(ContrastiveTask(backbone, config, rejections, data))
    head = load_head(directory, backbone)
    return Stepper(MNTPTask(backbone, head, config, rejections, data, 79, np.array([1, 2])))


class Peer:
    """A loop as one writes it with transformers and PEFT: padded, logits for all tokens."""

    def __init__(self, step: str, dtype: torch.dtype, device: str) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModel, AutoModelForCausalLM

        kind = AutoModelForCausalLM if step == "mntp" else AutoModel
        model = kind.from_pretrained(
            resolve("smollm2-135m"),
            dtype=dtype,
            attention_dropout=0.3 if step == "simcse" else 0.0,
        )
        lora = LoraConfig(r=RANK, lora_alpha=32, lora_dropout=DROPOUT, target_modules=list(MODULES))
        self._model = get_peft_model(model, lora).train().to(device)
        self._parameters = [p for p in self._model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=5e-5, weight_decay=0.0)
        self._step = step

    def step(self, examples: list) -> float:
        """One update."""
        self._optimizer.zero_grad()
        loss = self._mntp(examples) if self._step == "mntp" else self._simcse(examples)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        return float(loss)

    def _run(self, texts: list[np.ndarray]) -> tuple[object, torch.Tensor]:
        longest = max(map(len, texts))
        ids = torch.zeros(len(texts), longest, dtype=torch.int64)
        present = torch.zeros(len(texts), longest, dtype=torch.bool)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = torch.from_numpy(text)
            present[row, : len(text)] = True
        weight = next(self._model.parameters())
        ids, present = ids.to(weight.device), present.to(weight.device)
        mask = weight.new_zeros(len(texts), 1, longest, longest)
        mask.masked_fill_(~present[:, None, None, :], torch.finfo(weight.dtype).min)
        out = self._model(input_ids=ids, attention_mask=mask, use_cache=False)
        return out, present

    def _mntp(self, texts: list[PredictedText]) -> torch.Tensor:
        out, _ = self._run([text.ids for text in texts])
        labels = torch.full(out.logits.shape[:2], -100)
        for row, text in enumerate(texts):
            labels[row, text.places] = torch.from_numpy(text.targets)
        logits = out.logits[:, :-1].flatten(0, 1).float()
        labels = labels[:, 1:].flatten().to(logits.device)
        return torch.nn.functional.cross_entropy(logits, labels)

    def _simcse(self, matches: list[Match]) -> torch.Tensor:
        means = []
        for name in ("anchor", "positive"):
            out, present = self._run([match.views()[name].ids for match in matches])
            weights = present.unsqueeze(-1).float()
            states = out.last_hidden_state.float()
            means.append(torch.nn.functional.normalize((states * weights).sum(1) / weights.sum(1)))
        scores = 20.0 * means[0] @ means[1].T
        places = torch.arange(len(matches), device=scores.device)
        return torch.nn.functional.cross_entropy(scores, places)


def _provider(name: str, step: str, dtype: str, device: str) -> Callable[[list], object]:
    return (_own if name == PROVIDERS[0] else Peer)(step, DTYPES[dtype], device).step


def _compare(step: str, cases: tuple[str, ...], dtype: str, args: argparse.Namespace) -> list[dict]:
    sides = {name: _provider(name, step, dtype, args.device) for name in PROVIDERS}
    rows = []
    for case in cases:
        batch = make_batch(step, case, args.texts, args.tokens)
        for run in sides.values():
            run(batch)  # warm-up
        peaks: list[float] = []
        seconds = interleaved(
            {name: lambda run=run, b=batch: run(b) for name, run in sides.items()},
            args.rounds,
            lambda peaks=peaks: peaks.append(matmul_peak(DTYPES[dtype], args.device)),
        )
        tokens = sum(
            match.tokens if isinstance(match, Match) else len(match.ids) for match in batch
        )
        for name in PROVIDERS:
            row = {"step": step, "case": case, "dtype": dtype, "provider": name}
            row |= {"texts": args.texts, "tokens": tokens, "seconds": seconds[name]}
            row["tokens_per_second"] = tokens / statistics.median(seconds[name])
            row["gen_fast_speedup"] = median_ratio(seconds[name], seconds["gen_fast"])
            row["matmul_peak_gflops"] = statistics.median(peaks) / 1e9
            if not args.no_memory:
                row["peak_memory_mb"] = _measure_memory(name, step, case, dtype, args)
            rows.append(row)
            print(
                f"{step:<7} {case:<7} {dtype} {name:<20} {row['tokens_per_second']:7.0f} tokens/s"
                f" gen_fast is {row['gen_fast_speedup']:.2f}x"
                f" {row.get('peak_memory_mb', float('nan')):6.0f} MB",
                flush=True,
            )
    return rows


def _measure_memory(name: str, step: str, case: str, dtype: str, args: argparse.Namespace) -> float:
    command = [sys.executable, __file__, "--peak-memory-of", name, "--step", step]
    command += ["--case", case, "--dtype", dtype, "--device", args.device]
    command += ["--texts", str(args.texts), "--tokens", str(args.tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def _peak_memory(args: argparse.Namespace) -> float:
    run = _provider(args.peak_memory_of, args.step[0], args.dtype[0], args.device)
    batch = make_batch(args.step[0], args.case[0], args.texts, args.tokens)
    for _ in range(2):
        run(batch)
    if args.device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / (1 << 20)
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024


if __name__ == "__main__":
    main()
