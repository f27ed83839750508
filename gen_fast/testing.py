"""Devices, tolerances, input makers and tiny models, shared by tests and benchmarks."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gen_fast.io.checksums import CHECKSUMS
from gen_fast.ops import native

if TYPE_CHECKING:
    from gen_fast.model.backbone import Backbone, LayerWeights

# An implementation may err twice as much as the reference in its own dtype, plus this.
TOLERANCE = {torch.float32: 5e-4, torch.float16: 1e-3, torch.bfloat16: 1e-2}
# The same of each row, in units of the dtype's roundoff u = eps / 2. Set after a look at all ops:
# the most that one exceeded twice its reference's error by was 4.6 in bfloat16 and 162 in float32,
# both of attention's gradients. Of 16 bits that fits three roundings on a number's way (what is
# saved for it, what enters a product, the result) and some cancelling; of 32 sums of n terms, which
# err by about √n·u. Only what runs without a GPU was looked at.
ROW_ROUNDOFFS = {torch.float32: 256, torch.float16: 6, torch.bfloat16: 6}

FAMILY_OPTIONS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama3-rope": {
        "model_type": "llama",
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "mistral": {"sliding_window": None},
    "mistral-window": {"model_type": "mistral", "sliding_window": 8},
    "qwen2": {},
    "qwen2-window": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
    },
    "qwen3": {"head_dim": 24},
}

# Of `tiny_config`: sizes of whole blocks, as quantised linears need them.
WHOLE_BLOCKS = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "head_dim": 16,
}


def tiny_config(family: str, vocab_size: int = 384, **changes: Any) -> Any:
    """A transformers config of a three-layer random model; `family` is a key of FAMILY_OPTIONS.

    changes: other values of its keys, or of its rope_scaling's.
    """
    from transformers import AutoConfig

    options = {
        "model_type": family,
        "vocab_size": vocab_size,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **FAMILY_OPTIONS[family],
    }
    for key, value in changes.items():
        (options["rope_scaling"] if key in options.get("rope_scaling", ()) else options)[key] = (
            value
        )
    return AutoConfig.for_model(**options)


def save_tiny_model(
    directory: Path, family: str, *, shards: bool = False, seed: int = 0, **changes: Any
) -> Any:
    """Write a random model of `family` and a byte-level tokenizer; return transformers' model.

    changes: of `tiny_config`.
    """
    from transformers import AutoModelForCausalLM

    tokenizer = byte_tokenizer()
    torch.manual_seed(seed)
    changes = {"vocab_size": len(tokenizer), **changes}
    model = AutoModelForCausalLM.from_config(tiny_config(family, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Zero biases and unit norms, as initialised, would hide a missing term.
            if name.endswith(("bias", "norm.weight")):
                parameter.add_(0.3 * torch.randn_like(parameter))
    model = model.eval()
    model.save_pretrained(directory, max_shard_size="40KB" if shards else "1GB")
    tokenizer.save_pretrained(directory)
    return model


def save_tiny_adapter(directory: Path, model: Path, **options: Any) -> None:
    """Write a random adapter of five special tokens and 20 dimensions for a tiny model."""
    from gen_fast.embed.adapter import Adapter
    from gen_fast.model.weights import load_backbone

    backbone = load_backbone(model)
    size = backbone.config.hidden_size
    torch.manual_seed(0)
    Adapter(
        special=torch.randn(5, size),
        n_compression=3,
        backbone=str(model),
        fingerprint=backbone.fingerprint,
        reconstruction=(torch.randn(size, size), torch.randn(size)),
        alignment=(torch.randn(20, size), torch.randn(20)),
        **options,
    ).save(directory)


def with_layers(backbone: "Backbone", layers: Iterable["LayerWeights"]) -> "Backbone":
    """The same backbone with other layers."""
    return type(backbone)(
        backbone.config,
        backbone.embedding,
        tuple(layers),
        backbone.final_norm,
        backbone.fingerprint,
    )


def byte_tokenizer() -> Any:
    """A byte-level tokenizer with a few merges, special tokens and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ġ", "a"), ("i", "n")]
    tokens = special + letters + ["".join(pair) for pair in merges]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    rust = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=rust, unk_token=special[0], bos_token=special[1], eos_token=special[2]
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def forget_checksums(directory: Path) -> None:
    """Leave a directory as one of another writer's: no file of it is known to be changed."""
    (directory / CHECKSUMS).unlink(missing_ok=True)


def edit_config(directory: Path, **changes: Any) -> None:
    """Change keys of a model's config.json, on purpose; None deletes a key."""
    forget_checksums(directory)
    path = directory / "config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


class HostSyncError(AssertionError):
    """An operation that stops the host until the device is done, or a shape made of values."""


# Methods that read a tensor's values on the host, which on a CPU torch's dispatcher does not see.
_READING = frozenset(
    {
        "__bool__",
        "__complex__",
        "__contains__",
        "__float__",
        "__index__",
        "__int__",
        "cpu",
        "item",
        "numpy",
        "tolist",
    }
)
# Operations that read values on the host, or make a shape of them.
_STOPPING = frozenset(
    {
        "_local_scalar_dense",
        "_unique",
        "_unique2",
        "allclose",
        "equal",
        "is_nonzero",
        "item",
        "masked_select",
        "nonzero",
        "unique_consecutive",
        "unique_dim",
    }
)
_INDEXING = frozenset({"index", "index_put", "index_put_", "_index_put_impl_"})


@contextmanager
def instructions_up_to(isa: native.Isa) -> Iterator[None]:
    """C++ ops run the best instruction set that the processor has, up to this one."""
    native.module().limit_isa(isa)
    try:
        yield
    finally:
        native.module().limit_isa(max(native.Isa))


@contextmanager
def no_host_sync() -> Iterator[None]:
    """What is run inside fails with HostSyncError where it would stop the host on a GPU.

    On any device, so that what is to be recorded as a CUDA graph can be tested without one: values
    read on the host (item, bool, tolist, numpy), tensors copied between devices without
    non_blocking, shapes made of values (nonzero, unique, masks as indices, repeat_interleave).
    What compiled ops do with addresses is not seen; on a GPU torch.cuda.set_sync_debug_mode is.
    """
    with _NoReading(), _NoStopping():  # type: ignore[no-untyped-call]
        yield


class _NoReading(TorchFunctionMode):
    """Refuses methods that read values without torch's dispatcher knowing, on a CPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in _READING:
            raise HostSyncError(f"{name} stops the host")
        return func(*args, **(kwargs or {}))


class _NoStopping(TorchDispatchMode):
    """Refuses operations that wait for a device, or whose result has a shape made of values."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in _STOPPING:
            raise HostSyncError(f"{func} stops the host")
        if name in _INDEXING and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        ):
            raise HostSyncError(f"{func} with a mask: its shape depends on values")
        if name == "repeat_interleave" and kwargs.get("output_size") is None:
            raise HostSyncError(f"{func} without output_size: its shape depends on values")
        result = func(*args, **kwargs)
        # aten.copy_(to, from, non_blocking), aten._to_copy(from, non_blocking=…)
        blocking = not (kwargs.get("non_blocking") or (name == "copy_" and args[2:3] == (True,)))
        if name in ("copy_", "_to_copy") and blocking:
            source = args[1] if name == "copy_" else args[0]
            if source.device != result.device:
                raise HostSyncError(f"{func} from {source.device} to {result.device} blocks")
        return result


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """max |actual - expected| / max |expected|, in float64; 0 for empty tensors."""
    if not expected.numel():
        return 0.0
    actual, expected = actual.detach().double(), expected.detach().double()
    difference = (actual - expected).abs().max()
    return float(difference / expected.abs().max().clamp(min=1e-30))


def assert_no_worse(
    actual: Tensor, reference: Tensor, exact: Tensor, *, cancelling: bool = False
) -> None:
    """Assert err(actual) ≤ 2·err(reference) + tolerance, both against the float64 result.

    Of the largest element, against TOLERANCE, and of each row (the last dimension) in L2, against
    ROW_ROUNDOFFS times the norm of that row: a row of zeros must be one. cancelling: rows are sums
    of terms much larger than they, as gradients of a softmax are; what rounding leaves of them is
    held against the root mean square of all rows' norms where that is more.
    """
    assert actual.shape == exact.shape, (actual.shape, exact.shape)
    assert actual.dtype == reference.dtype, (actual.dtype, reference.dtype)
    allowed = 2 * relative_error(reference, exact) + TOLERANCE.get(actual.dtype, 1e-12)
    error = relative_error(actual, exact)
    assert error <= allowed, f"error {error:.2e} exceeds {allowed:.2e} in {actual.dtype}"
    if exact.ndim and exact.numel() and actual.dtype in ROW_ROUNDOFFS:
        _assert_rows_no_worse(actual, reference, exact, cancelling)


def _assert_rows_no_worse(
    actual: Tensor, reference: Tensor, exact: Tensor, cancelling: bool
) -> None:
    a, r, e = (x.detach().double().reshape(-1, x.shape[-1]) for x in (actual, reference, exact))
    error, of_reference, scale = (x.norm(dim=-1) for x in (a - e, r - e, e))
    if cancelling:
        scale = scale.clamp(min=float(scale.square().mean().sqrt()))
    unit = torch.finfo(actual.dtype).eps / 2
    allowed = 2 * of_reference + ROW_ROUNDOFFS[actual.dtype] * unit * scale
    bad = (~(error <= allowed)).nonzero().flatten().tolist()
    assert not bad, (
        f"{len(bad)} of {len(scale)} rows, such as row {bad[0]}: error "
        f"{error[bad[0]]:.2e} exceeds {allowed[bad[0]]:.2e} in {actual.dtype}"
    )


def check_quantized(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Assert that quantised rows, scales and what else there is are equal but for rounding."""
    torch.testing.assert_close(actual[1:], expected[1:], rtol=1e-5, atol=1e-6)
    difference = (actual[0].int() - expected[0].int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.01


def check_gradients(
    function: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Sequence[Any],
    impl: str,
    device: str,
) -> None:
    """Assert that gradients of `function(*inputs, impl=impl)` are no worse than the reference's.

    The gradients of those `inputs` that require one are compared; outputs are weighted at random.
    """

    def moved(x: Any, dtype: torch.dtype | None = None) -> Any:
        if not isinstance(x, Tensor):
            return x
        # Strides stay: views of a fused projection are part of a test.
        copy = x.detach().to(device=device, dtype=dtype if x.is_floating_point() else None)
        return copy.requires_grad_(x.requires_grad)

    def gradients(run: Callable[..., Any], dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        leaves = [moved(x, dtype) for x in inputs]
        outputs = run(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        outputs = [x for x in outputs if x.requires_grad]
        torch.manual_seed(1)
        weights = [torch.randn(x.shape).to(x) for x in outputs]
        differentiable = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
        return torch.autograd.grad(outputs, differentiable, weights)

    exact, plain = gradients(reference, torch.float64), gradients(reference)
    actual = gradients(lambda *leaves: function(*leaves, impl=impl))
    for a, p, e in zip(actual, plain, exact, strict=True):
        assert_no_worse(a, p, e, cancelling=True)
