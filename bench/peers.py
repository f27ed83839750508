"""What gen_fast is measured against, each as its own users run it: batches of 32, length-sorted.

All take the same prompt, texts and dtype. A provider is a function texts -> [n, d] float32 array.
"""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from workloads import Workload

from gen_fast.embed.adapter import Adapter

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
    backbone: Path,
    dtype: torch.dtype,
    work: Workload,
    int8: Sequence[str] = (),
    hint: str = "LATENCY",
) -> Callable:
    """OpenVINO: transformers' model converted, mean over all tokens of padded batches.

    int8: texts that NNCF calibrates weights and activations of 8 bits on, with its settings for
    transformers; none for the plain model. hint: its PERFORMANCE_HINT; "THROUGHPUT" runs batches
    side by side, as many as it finds best.
    """
    import openvino
    from transformers import AutoModel, AutoTokenizer

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

        samples = [dict(tokenizer([text], return_tensors="np")) for text in int8]
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


def llama_cpp_mean(file: Path, work: Workload) -> Callable:
    """llama.cpp on a GGUF file, with its own mean pooling: batches of at most 2,048 tokens."""
    import llama_cpp

    model = llama_cpp.Llama(
        str(file),
        embedding=True,
        pooling_type=llama_cpp.LLAMA_POOLING_TYPE_MEAN,
        n_ctx=2048,
        n_batch=2048,
        n_ubatch=2048,
        n_threads=torch.get_num_threads(),
        n_threads_batch=torch.get_num_threads(),
        verbose=False,
    )

    def run(texts: list[str]) -> np.ndarray:
        return np.array(model.embed([work.prompt + text for text in texts], normalize=False))

    return run
