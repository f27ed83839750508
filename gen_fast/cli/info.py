"""The command of `gen-fast` that says what there is: versions, device, implementations, a model."""

import json
import platform
from typing import Annotated, Any

import typer

import gen_fast.cli.options as options
from gen_fast.cli.models import load_encoder
from gen_fast.cli.output import print_line
from gen_fast.version import __version__


@options.grouped
def info(
    model: Annotated[str | None, typer.Option(help="Load this model and describe it.")] = None,
    method: options.MethodOption = None,
    loading: options.Loading = options.LOADING,
    as_json: options.JsonOption = False,
) -> None:
    """Print versions, device, dtype, instruction set, implementations and cache directory."""
    import torch

    from gen_fast import ops
    from gen_fast.io.cache import cache_directory
    from gen_fast.model.device import resolve_dtype
    from gen_fast.ops import native

    where = options.checked_device(loading.device)
    computed_in = resolve_dtype(loading.dtype, where)
    facts: dict[str, Any] = {
        "gen_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": str(where),
        "dtype": str(computed_in).removeprefix("torch."),
        "instructions": native.instructions(),
        "implementations": {
            name: op.choose(where.type, computed_in).name for name, op in ops.all_ops().items()
        },
        "cache": str(cache_directory()),
    }
    if model is not None:
        encoder = load_encoder(model, method, loading)
        facts |= {
            "model": encoder.name,
            "method": encoder.method,
            "dimension": encoder.dimension,
            "max_length": encoder.max_length,
            "prompts": encoder.prompts,
            "quantize": encoder.backbone.quantize,
            "weight_bytes": encoder.backbone.nbytes,
            "fingerprint": encoder.backbone.fingerprint,
        }
    if as_json:
        print_line(json.dumps(facts, ensure_ascii=False))
        return
    for name, value in facts.items():
        if isinstance(value, dict):
            print_line(f"{name}:")
            for key, inner in value.items():
                print_line(f"  {key}: {inner}")
        else:
            print_line(f"{name}: {value}")
