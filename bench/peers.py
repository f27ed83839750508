"""What gen_fast is measured against, each as its own users run it: batches of 32, length-sorted.

All take the same prompt, texts and dtype. A provider is a function texts -> [n, d] float32 array.
"""

import importlib.util
import logging
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from workloads import Workload

from gen_fast.embed.adapter import Adapter
from gen_fast.model.calibration_texts import CALIBRATION_TEXTS
from gen_fast.model.sources import packaged_file, resolve

BATCH = 32


def _oracle(name: str) -> ModuleType:
    """A module of tests/oracles: what is compared with for its numbers is measured here too."""
    path = Path(__file__).parents[1] / "tests" / "oracles" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"oracles.{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


llm2vec_gen = _oracle("llm2vec_gen")


def reference(checkpoint: Path, dtype: torch.dtype, work: Workload) -> Callable:
    """(a) llm2vec-gen 0.1.3, as its own MTEB script drives it."""
    model = llm2vec_gen.load_reference(checkpoint, dtype)

    def run(texts: list[str]) -> np.ndarray:
        full = [work.prompt.strip() + " " + text.strip() for text in texts]
        order = np.argsort([-len(text) for text in full])
        parts = [
            model.encode([full[i] for i in order[s : s + BATCH]], max_length=work.max_length)
            for s in range(0, len(full), BATCH)
        ]
        return torch.cat(parts)[np.argsort(order)].float().numpy()

    return run


def sentence_transformers(backbone: Path, dtype: torch.dtype, work: Workload) -> Callable:
    """(b) sentence-transformers over the same backbone with mean pooling (no special tokens)."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    body = Transformer(str(backbone), model_args={"dtype": dtype})
    body.max_seq_length = work.max_length
    pooling = Pooling(body.get_word_embedding_dimension(), "mean")
    model = SentenceTransformer(modules=[body, pooling], device="cpu")

    def run(texts: list[str]) -> np.ndarray:
        return model.encode(
            texts, prompt=work.prompt, batch_size=BATCH, show_progress_bar=False
        ).astype(np.float32)

    return run


def transformers_sdpa(
    backbone: Path, adapter: Adapter, dtype: torch.dtype, work: Workload
) -> Callable:
    """(c) transformers' own model with SDPA and padding; the method written out by hand.

    In float32 this is the truth that the centred cosines are measured against.
    """
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(backbone, dtype=dtype, attn_implementation="sdpa").eval()
    tokenizer = AutoTokenizer.from_pretrained(backbone, padding_side="left")
    special = adapter.special.to(dtype)
    weight, bias = adapter.projection()

    @torch.inference_mode()
    def batch(texts: list[str]) -> torch.Tensor:
        room = work.max_length - len(special)
        tokens = tokenizer(
            texts, padding=True, truncation=True, max_length=room, return_tensors="pt"
        )
        embeds = model.get_input_embeddings()(tokens.input_ids)
        embeds = torch.cat((embeds, special.expand(len(texts), -1, -1)), dim=1)
        ones = torch.ones(len(texts), len(special), dtype=torch.long)
        mask = torch.cat((tokens.attention_mask, ones), dim=1)
        states = model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
        ).last_hidden_state
        mean = states[:, -adapter.n_compression :].float().mean(1)
        return torch.nn.functional.linear(mean, weight, bias)

    return _sorted_batches(lambda texts: batch(texts).numpy(), work)


def _sorted_batches(batch: Callable[[list[str]], np.ndarray], work: Workload) -> Callable:
    """`batch` over all texts behind the prompt, 32 of like length at a time."""
    return _by_length(lambda parts: [batch(part) for part in parts], work)


def _by_length(
    batches: Callable[[list[list[str]]], list[np.ndarray]], work: Workload
) -> Callable[[list[str]], np.ndarray]:
    """`batches` over parts of 32 texts of like length behind the prompt, the longest first."""

    def run(texts: list[str]) -> np.ndarray:
        full = [work.prompt + text for text in texts]
        order = np.argsort([-len(text) for text in full])
        starts = range(0, len(full), BATCH)
        parts = batches([[full[i] for i in order[s : s + BATCH]] for s in starts])
        return np.concatenate(parts)[np.argsort(order)]

    return run


def openvino_mean(
    packaged: str,
    dtype: torch.dtype,
    work: Workload,
    int8: bool = False,
    hint: str = "LATENCY",
) -> Callable:
    """OpenVINO: transformers' model converted, mean over all tokens of padded batches.

    int8: weights and activations of 8 bits by NNCF, with its settings for transformers, calibrated
    on the texts that we calibrate on. hint: its PERFORMANCE_HINT; "THROUGHPUT" runs batches side by
    side, as many as it finds best.
    """
    import openvino
    from transformers import AutoModel, AutoTokenizer

    backbone = resolve(packaged)
    tokenizer = AutoTokenizer.from_pretrained(backbone, padding_side="right")

    class States(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = AutoModel.from_pretrained(
                backbone, dtype=torch.float32, attn_implementation="sdpa"
            ).eval()

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.model(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False
            ).last_hidden_state

    example = dict(tokenizer(["a few words", "two"], padding=True, return_tensors="pt"))
    with torch.no_grad():
        converted = openvino.convert_model(States(), example_input=example)
    if int8:
        import nncf

        samples = [dict(tokenizer([text], return_tensors="np")) for text in CALIBRATION_TEXTS]
        converted = nncf.quantize(
            converted,
            nncf.Dataset(samples, lambda sample: [sample["input_ids"], sample["attention_mask"]]),
            model_type=nncf.ModelType.TRANSFORMER,
            preset=nncf.QuantizationPreset.MIXED,
        )
    settings = {
        "INFERENCE_PRECISION_HINT": {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": hint,
    }
    queue = openvino.AsyncInferQueue(openvino.compile_model(converted, "CPU", settings))

    def batches(parts: list[list[str]]) -> list[np.ndarray]:
        results: dict[int, np.ndarray] = {}

        def mean(request: openvino.InferRequest, what: tuple[int, np.ndarray]) -> None:
            number, mask = what
            results[number] = (request.get_output_tensor().data * mask).sum(1) / mask.sum(1)

        queue.set_callback(mean)
        for number, texts in enumerate(parts):
            tokens = tokenizer(
                texts,
                padding=True,
                truncation=True,
                max_length=work.max_length,
                return_tensors="np",
            )
            inputs = [tokens.input_ids, tokens.attention_mask]
            queue.start_async(inputs, (number, tokens.attention_mask[..., None]))
        queue.wait_all()
        return [results[number] for number in range(len(parts))]

    return _by_length(batches, work)


def llama_cpp_mean(
    packaged: str, dtype: torch.dtype, work: Workload, kind: str | None = None
) -> Callable:
    """llama.cpp on a GGUF file, with its own mean pooling; texts share a batch up to its tokens.

    kind: the type of number that its weights have, as llama.cpp itself converts them: Q8_0, or
    Q4_1, which is the packaged file's; None for the dtype's. Flash attention and 1,024 tokens a
    batch were the fastest of what was tried on queries and documents; a longer text takes a larger
    batch.
    """
    import llama_cpp

    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    # Its pooling fails where a batch is no multiple of its 256 sequences.
    tokens = max(1024, -(-work.max_length // 256) * 256)
    kind = kind or {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]
    file = packaged_file(packaged)
    with tempfile.TemporaryDirectory() as folder:
        if kind != "Q4_1":
            file = _requantized(file, kind, Path(folder))
        model = llama_cpp.Llama(  # maps the file, which needs its name no more
            str(file),
            embedding=True,
            pooling_type=llama_cpp.LLAMA_POOLING_TYPE_MEAN,
            flash_attn=True,
            n_ctx=tokens,
            n_batch=tokens,
            n_ubatch=tokens,
            n_threads=torch.get_num_threads(),
            n_threads_batch=torch.get_num_threads(),
            verbose=False,
        )

    def run(texts: list[str]) -> np.ndarray:
        return np.array(model.embed([work.prompt + text for text in texts], normalize=False))

    return run


def _requantized(file: Path, kind: str, folder: Path) -> Path:
    """A copy of a GGUF file with all its matrices in numbers of this type, in the folder."""
    import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    # Of llama.h's llama_ftype; the package names none of them.
    options.ftype = {"F32": 0, "Q8_0": 7, "BF16": 32}[kind]
    options.allow_requantize = options.pure = True
    made = folder / f"{kind}.gguf"
    failed = llama_cpp.llama_model_quantize(str(file).encode(), str(made).encode(), options)
    if failed:
        raise RuntimeError(f"llama.cpp could not put {file} into {kind}")
    return made


# Engines that take the mean over all tokens, of one of PACKAGED_MODELS, a dtype and a workload; the
# weights are of the dtype, or as the name says. Not among our extras: pip install openvino nncf
# llama-cpp-python (which compiles it).
ENGINES: dict[str, Callable[[str, torch.dtype, Workload], Callable]] = {
    "openvino": openvino_mean,
    "openvino-streams": partial(openvino_mean, hint="THROUGHPUT"),
    "openvino-int8": partial(openvino_mean, int8=True),
    "llama.cpp": llama_cpp_mean,
    "llama.cpp-q8_0": partial(llama_cpp_mean, kind="Q8_0"),
    "llama.cpp-q4_1": partial(llama_cpp_mean, kind="Q4_1"),
}
