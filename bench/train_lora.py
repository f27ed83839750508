"""Speed and memory of training steps over LoRA against a plain loop of transformers and PEFT.

    python bench/train_lora.py [--step mntp simcse gem] [--case equal ragged] [--dtype fp32 bf16]
        [--texts N] [--tokens N] [--device NAME] [--rounds N] [--no-memory] [--json FILE]

SmolLM2-135M, LoRA of rank 16 on all linears with dropout 0.05; 16 texts of 96 tokens, or ragged
around it from a quarter to seven quarters. MNTP hides 20% of the tokens; SimCSE runs each text
twice with attention dropout 0.3. GEM has 10 special tokens and no dropout: of five texts one is
reconstructed, and each is embedded twice for the contrastive loss, once with 10% of its tokens
missing. Both sides take the same texts, masks, dtype, dropout rates and optimizer; neither
recomputes activations. The peer pads, and has masks of four dimensions, as transformers takes them.
They take turns, and ratios are medians over the rounds. Peak memory is that of a process that loads
its model and takes two steps; on a GPU, of its tensors.
"""

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from measure import DTYPES, arguments, interleaved, median_ratio, peak_memory_mb, reported, save

from gen_fast.model.device import matmul_peak
from gen_fast.model.lora import MODULES
from gen_fast.model.sources import resolve
from gen_fast.model.weights import load_backbone, load_head
from gen_fast.training.adapted_task import Data
from gen_fast.training.contrastive import ContrastiveTask, Match, View
from gen_fast.training.gem import GEMExample, GEMTask, drop_tokens, masked, plain
from gen_fast.training.gem_config import GEMConfig
from gen_fast.training.llm2vec_config import LLM2VecConfig
from gen_fast.training.mntp import MNTPTask, hide
from gen_fast.training.prediction import PredictedText
from gen_fast.training.records import Rejections
from gen_fast.training.trainer import Stepper

PROVIDERS = ("gen_fast", "transformers + PEFT")
CASES, STEPS = ("equal", "ragged"), ("mntp", "simcse", "gem")
RANK, DROPOUT = 16, 0.05
VOCABULARY, SPECIAL = 49152, 10


def main() -> None:
    """Measure and print; write the rows as JSON if asked."""
    parser = arguments(__doc__, rounds=5, dtype=True)
    parser.add_argument("--step", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--case", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=96, help="of a text, on average")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--peak-memory-of", choices=PROVIDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_memory_of:
        print(_peak_memory(args))
        return
    report = reported([])
    for dtype, step, case in product(args.dtype, args.step, args.case):
        report["rows"] += _compare(step, case, dtype, args)
        save(args.json, report)  # after every case: a peer may take more memory than there is


def make_batch(step: str, case: str, args: argparse.Namespace) -> list:
    """Examples of random ids, as the step takes them."""
    rng = np.random.default_rng(0)
    count = args.texts
    spread = np.linspace(0.25, 1.75, count) if case == "ragged" else np.ones(count)
    lengths = [round(args.tokens * share) for share in rng.permutation(spread)]
    texts = [rng.integers(1000, 40000, length) for length in lengths]
    if step == "gem":
        return [_gem_example(ids, i, rng) for i, ids in enumerate(texts)]
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


def _gem_example(ids: np.ndarray, number: int, rng: np.random.Generator) -> GEMExample:
    special = np.arange(VOCABULARY, VOCABULARY + SPECIAL)
    views = [ids, drop_tokens(ids, 0.1, np.empty(0), rng)]
    match = Match(
        *(
            View(np.concatenate((x, special)), SPECIAL, 3 * number + j, (len(x), len(x) + SPECIAL))
            for j, x in enumerate(views, 1)
        )
    )
    text = plain(ids, 3 * number) if number % 5 else masked(ids, ids, special, 3 * number)
    return GEMExample(text, match, 0)


def _tokens(examples: list) -> int:
    """That a step runs."""
    total = 0
    for example in examples:
        parts = [example.text, example.match] if isinstance(example, GEMExample) else [example]
        total += sum(x.tokens if isinstance(x, Match) else len(x.ids) for x in parts)
    return total


def _own(step: str, dtype: torch.dtype, args: argparse.Namespace) -> Stepper:
    directory = resolve("smollm2-135m")
    backbone = load_backbone(directory, dtype=dtype, device=args.device)
    shared = {"texts": ("-",), "out": "-", "batch_size": args.texts, "lora_rank": RANK}
    data, rejections = Data([], [], ""), Rejections(Path("-"))
    if step == "gem":
        gem = GEMConfig(**shared, n_special=SPECIAL, alpha_start_step=0)
        head = load_head(directory, backbone)
        return Stepper(GEMTask(backbone, head, gem, rejections, data, np.empty(0)))
    config = LLM2VecConfig(**shared, step=step, warmup_steps=0, lora_dropout=DROPOUT)
    if step == "simcse":
        return Stepper(ContrastiveTask(backbone, config, rejections, data))
    head = load_head(directory, backbone)
    return Stepper(MNTPTask(backbone, head, config, rejections, data, 79, np.array([1, 2])))


class Peer:
    """A loop as one writes it with transformers and PEFT: padded, logits for all tokens."""

    def __init__(self, step: str, dtype: torch.dtype, device: str) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModel, AutoModelForCausalLM

        kind = AutoModel if step == "simcse" else AutoModelForCausalLM
        model = kind.from_pretrained(
            resolve("smollm2-135m"),
            dtype=dtype,
            attention_dropout=0.3 if step == "simcse" else 0.0,
        )
        lora = LoraConfig(
            r=RANK,
            lora_alpha=32,
            lora_dropout=0.0 if step == "gem" else DROPOUT,
            target_modules=list(MODULES),
        )
        self._device = device
        self._model = get_peft_model(model.to(device), lora).train()
        self._parameters = [p for p in self._model.parameters() if p.requires_grad]
        if step == "gem":
            table = model.get_input_embeddings().weight
            self._special = torch.nn.Parameter(table.float().mean(0).repeat(SPECIAL, 1))
            self._log_scale = torch.nn.Parameter(torch.tensor(20.0, device=device).log())
            self._parameters += [self._special, self._log_scale]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=5e-5, weight_decay=0.0)
        self._step = step

    def step(self, examples: list) -> float:
        """One update."""
        self._optimizer.zero_grad()
        loss = {"mntp": self._mntp, "simcse": self._simcse, "gem": self._gem}[self._step](examples)
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
        ids, present = ids.to(self._device), present.to(self._device)
        dtype = next(self._model.parameters()).dtype
        mask = torch.zeros(len(texts), 1, longest, longest, dtype=dtype, device=self._device)
        mask.masked_fill_(~present[:, None, None, :], torch.finfo(dtype).min)
        out = self._model(input_ids=ids, attention_mask=mask, use_cache=False)
        return out, present

    def _run_gem(
        self, texts: list[np.ndarray], blocks: list[tuple[int, int]], *, head: bool
    ) -> torch.Tensor:
        """Logits or final states [B, n, …] with the dense mask of GEM."""
        longest = max(map(len, texts))
        ids = torch.zeros(len(texts), longest, dtype=torch.int64)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = torch.from_numpy(text)
        place = torch.arange(longest)
        query, key = place[:, None], place[None, :]
        first, after = (x[:, None, None] for x in torch.tensor(blocks).unbind(1))
        hidden = (query >= after) & (key < first)
        hidden = hidden | ((query >= first) & (query < after) & (key >= first) & (key != query))
        seen = (key <= query) & ~hidden
        model = self._model.base_model.model
        table = model.get_input_embeddings().weight
        dtype = table.dtype
        mask = torch.zeros(len(texts), 1, longest, longest, dtype=dtype)
        mask.masked_fill_(~seen[:, None], torch.finfo(dtype).min)
        rows = torch.nn.functional.embedding(
            ids.to(self._device), torch.cat((table, self._special.to(dtype)))
        )
        run = model if head else model.get_decoder()
        out = run(inputs_embeds=rows, attention_mask=mask.to(self._device), use_cache=False)
        return out.logits if head else out.last_hidden_state

    def _gem(self, examples: list[GEMExample]) -> torch.Tensor:
        texts = [example.text for example in examples]
        logits = self._run_gem([t.ids for t in texts], [t.block for t in texts], head=True)
        labels = torch.full(logits.shape[:2], -100)
        for row, text in enumerate(texts):
            labels[row, text.places] = torch.from_numpy(text.targets)
        told = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten().to(self._device)
        )
        means = []
        for name in ("anchor", "positive"):
            views = [example.match.views()[name] for example in examples]
            states = self._run_gem([v.ids for v in views], [v.block for v in views], head=False)
            rows = [states[i, slice(*view.block)].float().mean(0) for i, view in enumerate(views)]
            means.append(torch.nn.functional.normalize(torch.stack(rows), dim=-1))
        scores = self._log_scale.exp() * means[0] @ means[1].T
        own = torch.arange(len(views), device=self._device)
        return 0.5 * told + 0.5 * torch.nn.functional.cross_entropy(scores, own)

    def _mntp(self, texts: list[PredictedText]) -> torch.Tensor:
        out, _ = self._run([text.ids for text in texts])
        labels = torch.full(out.logits.shape[:2], -100)
        for row, text in enumerate(texts):
            labels[row, text.places] = torch.from_numpy(text.targets)
        logits = out.logits[:, :-1].flatten(0, 1).float()
        return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten().to(self._device))

    def _simcse(self, matches: list[Match]) -> torch.Tensor:
        means = []
        for name in ("anchor", "positive"):
            out, present = self._run([match.views()[name].ids for match in matches])
            weights = present.unsqueeze(-1).float()
            states = out.last_hidden_state.float()
            means.append(torch.nn.functional.normalize((states * weights).sum(1) / weights.sum(1)))
        scores = 20.0 * means[0] @ means[1].T
        own = torch.arange(len(matches), device=self._device)
        return torch.nn.functional.cross_entropy(scores, own)


def _provider(
    name: str, step: str, dtype: torch.dtype, args: argparse.Namespace
) -> Callable[[list], object]:
    if name == PROVIDERS[0]:
        return _own(step, dtype, args).step
    return Peer(step, dtype, args.device).step


def _compare(step: str, case: str, dtype: str, args: argparse.Namespace) -> list[dict]:
    # First: what allocators keep of the timing leaves too little memory beside it.
    memory = {} if args.no_memory else _measure_memory(step, case, dtype, args)
    batch = make_batch(step, case, args)
    seconds, peak = _time(step, batch, dtype, args)
    rows = []
    for name in PROVIDERS:
        row = {"step": step, "case": case, "dtype": dtype, "provider": name}
        row |= {"texts": args.texts, "tokens": _tokens(batch), "seconds": seconds[name]}
        row["tokens_per_second"] = row["tokens"] / statistics.median(seconds[name])
        row["gen_fast_speedup"] = median_ratio(seconds[name], seconds["gen_fast"])
        row["matmul_peak_gflops"] = peak / 1e9
        if name in memory:
            row["peak_memory_mb"] = memory[name]
        rows.append(row)
        print(
            f"{step:<7} {case:<7} {dtype} {name:<20} {row['tokens_per_second']:7.0f} tokens/s"
            f" gen_fast is {row['gen_fast_speedup']:.2f}x"
            f" {row.get('peak_memory_mb', float('nan')):6.0f} MB",
            flush=True,
        )
    return rows


def _time(
    step: str, batch: list, dtype: str, args: argparse.Namespace
) -> tuple[dict[str, list[float]], float]:
    """Seconds of both sides, and the matmul peak."""
    sides = {name: _provider(name, step, DTYPES[dtype], args) for name in PROVIDERS}
    for run in sides.values():
        for _ in range(3 if args.device != "cpu" else 1):
            run(batch)  # warm-up
    peaks: list[float] = []
    seconds = interleaved(
        {name: partial(run, batch) for name, run in sides.items()},
        args.rounds,
        lambda: peaks.append(matmul_peak(DTYPES[dtype], args.device)),
    )
    return seconds, statistics.median(peaks)


def _measure_memory(step: str, case: str, dtype: str, args: argparse.Namespace) -> dict[str, float]:
    memory = {}
    for name in PROVIDERS:
        command = [sys.executable, __file__, "--peak-memory-of", name, "--step", step]
        command += ["--case", case, "--dtype", dtype, "--device", args.device]
        command += ["--texts", str(args.texts), "--tokens", str(args.tokens)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        memory[name] = float(done.stdout.split()[-1])
    return memory


def _peak_memory(args: argparse.Namespace) -> float:
    run = _provider(args.peak_memory_of, args.step[0], DTYPES[args.dtype[0]], args)
    batch = make_batch(args.step[0], args.case[0], args)
    for _ in range(2):
        run(batch)
    if args.device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**20
    return peak_memory_mb()


if __name__ == "__main__":
    main()
