"""The command line, `gen-fast`. Data goes to stdout, progress and errors go to stderr.

torch takes seconds to import, so each command imports what it needs when it runs.
"""

import importlib
import json
import logging
import platform
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import gen_fast.cli.options as options
from gen_fast.cli import jobs, training
from gen_fast.cli.errors import EPILOG, FAILURE, Commands, fail
from gen_fast.errors import GenFastError, InputError, TextError
from gen_fast.version import __version__

if TYPE_CHECKING:
    import numpy as np

    from gen_fast.embed.encoder import Encoder
    from gen_fast.search.exact import Match

app = typer.Typer(
    cls=Commands,
    help="Fast LLM text embeddings.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gen-fast {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Fast LLM text embeddings."""


@app.command()
def encode(
    source: Annotated[
        str, typer.Argument(metavar="INPUT", help="txt, jsonl, csv or parquet; - is stdin.")
    ],
    out: Annotated[str, typer.Option(help=".npy, .parquet or .safetensors; - is jsonl on stdout.")],
    model: options.ModelOption = None,
    method: options.MethodOption = None,
    backbone: options.BackboneOption = None,
    device: options.DeviceOption = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    prompt: options.PromptOption = None,
    prompt_name: options.PromptNameOption = None,
    normalize: options.NormalizeOption = False,
    text_column: options.TextColumnOption = None,
    id_column: options.IdColumnOption = None,
    file_format: options.FormatOption = None,
    max_length: options.MaxLengthOption = None,
    deterministic: options.DeterministicOption = False,
    truncate_dim: options.TruncateDimOption = None,
    quiet: options.QuietOption = False,
) -> None:
    """Embed the texts of a file, in its order."""
    from gen_fast.io.embedding_files import (
        EMBEDDING_SUFFIXES,
        EmbeddingMetadata,
        Embeddings,
        check_embedding_file,
        write_embeddings,
    )
    from gen_fast.io.text_files import read_texts
    from gen_fast.model.sources import lasting_name

    if prompt is not None and prompt_name is not None:
        fail("give --prompt or --prompt-name, not both")
    if out != "-":
        if Path(out).suffix not in EMBEDDING_SUFFIXES:
            fail(f"--out {out} is neither - nor one of {', '.join(EMBEDDING_SUFFIXES)}")
        if not Path(out).parent.is_dir() or Path(out).is_dir():
            fail(f"--out {out} is a directory, or lies in none")
    texts = read_texts(
        source, file_format=file_format, text_column=text_column, id_column=id_column
    )
    check_embedding_file(out, texts.ids, texts.texts)
    encoder = _load(model, method, backbone, device, dtype, max_length, deterministic, quiet)
    if truncate_dim is not None and truncate_dim > encoder.full_dimension:
        fail(f"--truncate-dim {truncate_dim}: embeddings have {encoder.full_dimension} dimensions")
    if prompt is None and prompt_name is None:
        prompt_name = encoder.default_prompt_name
    vectors = _embed(
        encoder,
        texts.texts,
        "stdin" if source == "-" else source,
        prompt=prompt,
        prompt_name=prompt_name,
        normalize_embeddings=normalize,
        truncate_dim=truncate_dim,
        show_progress_bar=False if quiet else None,
    )
    metadata = EmbeddingMetadata(
        model=lasting_name(encoder.name),
        method=encoder.method,
        prompt=encoder.prompts[prompt_name] if prompt_name else prompt or "",
        normalized=normalize,
        dimension=vectors.shape[1],
        model_dimension=encoder.dimension,
        dtype=str(encoder.backbone.dtype).removeprefix("torch."),
        backbone=lasting_name(backbone) if backbone else "",
        fingerprint=encoder.backbone.fingerprint,
    )
    write_embeddings(out, Embeddings(texts.ids, vectors, texts.texts, metadata))
    if not quiet:
        typer.echo(f"{len(vectors)} embeddings of {vectors.shape[1]} dimensions", err=True)


@app.command()
def search(
    embeddings: Annotated[
        str, typer.Argument(help="What encode wrote, or an index that index made.")
    ],
    query: Annotated[list[str] | None, typer.Argument(help="Texts to search for.")] = None,
    queries: Annotated[
        str | None, typer.Option(help="File of queries instead, or - for stdin.")
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Results a query.")] = 10,
    texts: Annotated[
        str | None, typer.Option(help="The file that was encoded; for .npy, which has no texts.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Default: the file's own; .npy has none.")
    ] = None,
    method: Annotated[options.Method | None, typer.Option(help="Default: the file's own.")] = None,
    backbone: options.BackboneOption = None,
    device: options.DeviceOption = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    prompt: options.PromptOption = None,
    prompt_name: Annotated[
        str | None, typer.Option(help="Default: query, if the model has it.")
    ] = None,
    center: Annotated[
        bool, typer.Option("--center", help="Subtract the corpus mean before the cosine.")
    ] = False,
    text_column: options.TextColumnOption = None,
    id_column: options.IdColumnOption = None,
    file_format: options.FormatOption = None,
    query_column: Annotated[
        str | None, typer.Option(help="Column of --queries; default as for --text-column.")
    ] = None,
    max_length: options.MaxLengthOption = None,
    as_json: options.JsonOption = False,
    quiet: options.QuietOption = False,
) -> None:
    """Print the nearest texts by cosine similarity: score, id and text between tabs.

    The results of several queries are separated by an empty line. --json prints an object a query.
    """
    from gen_fast.io.embedding_files import EMBEDDING_SUFFIXES, read_embeddings
    from gen_fast.io.text_files import read_texts
    from gen_fast.search.exact import check_same_model, is_normalized
    from gen_fast.search.exact import search as search_embeddings

    if (query is None) == (queries is None):
        fail("give queries as arguments or with --queries FILE")
    if prompt is not None and prompt_name is not None:
        fail("give --prompt or --prompt-name, not both")
    if Path(embeddings).is_file() and Path(embeddings).suffix not in EMBEDDING_SUFFIXES:
        given = (texts, model, method, backbone, center, max_length, text_column, id_column)
        if any((*given, file_format, dtype != options.Dtype.auto)):
            fail("an index has its own texts and model: only queries, prompt, -k and device")
        asked = query or read_texts(queries or "-", text_column=query_column).texts
        hits = jobs.search_index(embeddings, asked, k, prompt, prompt_name, device)
        _print_hits(asked, hits, as_json)
        return
    corpus = read_embeddings(embeddings)
    if texts is not None:
        read = read_texts(
            texts, file_format=file_format, text_column=text_column, id_column=id_column
        )
        if len(read.ids) != len(corpus.ids):
            raise InputError(f"{texts}: {len(read.ids)} texts for {len(corpus.ids)} embeddings")
        corpus = replace(corpus, ids=read.ids, texts=read.texts)
    wanted = query or read_texts(queries or "-", text_column=query_column).texts

    made = corpus.metadata
    if made is None and model is None:
        fail(f"{embeddings} does not say which model made it: give --model")
    # A model given by hand replaces the file's, and so its method and backbone do not apply.
    if made is not None and model is None:
        method = method or options.Method(made.method)
        backbone = backbone or made.backbone or None
    encoder = _load(
        model or (made.model if made else None), method, backbone, device, dtype, max_length,
        False, quiet,
    )  # fmt: skip
    check_same_model(embeddings, corpus, encoder)
    if prompt is None and prompt_name is None and "query" in encoder.prompts:
        prompt_name = "query"
    vectors = _embed(
        encoder,
        wanted,
        "queries",
        prompt=prompt,
        prompt_name=prompt_name,
        # Centring compares lengths too, so both sides need the same scale.
        normalize_embeddings=is_normalized(corpus),
        truncate_dim=corpus.vectors.shape[1],
        show_progress_bar=False,
    )
    _print_hits(wanted, search_embeddings(corpus, vectors, k, center=center), as_json)


@app.command()
def info(
    model: Annotated[str | None, typer.Option(help="Load this model and describe it.")] = None,
    method: options.MethodOption = None,
    backbone: options.BackboneOption = None,
    device: options.DeviceOption = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    as_json: options.JsonOption = False,
) -> None:
    """Print versions, device, dtype, implementations and cache directory."""
    import torch

    from gen_fast import ops
    from gen_fast.model.device import resolve_dtype
    from gen_fast.model.sources import cache_directory

    where = options.checked_device(device)
    computed_in = resolve_dtype(dtype, where)
    facts: dict[str, Any] = {
        "gen_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": str(where),
        "dtype": str(computed_in).removeprefix("torch."),
        "implementations": {
            name: op.choose(where.type, computed_in).name for name, op in ops.all_ops().items()
        },
        "cache": str(cache_directory()),
    }
    if model is not None:
        encoder = _load(model, method, backbone, device, dtype, None, False, quiet=False)
        facts |= {
            "model": encoder.name,
            "method": encoder.method,
            "dimension": encoder.dimension,
            "max_length": encoder.max_length,
            "prompts": encoder.prompts,
            "fingerprint": encoder.backbone.fingerprint,
        }
    if as_json:
        _print(json.dumps(facts, ensure_ascii=False))
        return
    for name, value in facts.items():
        if isinstance(value, dict):
            _print(f"{name}:")
            for key, inner in value.items():
                _print(f"  {key}: {inner}")
        else:
            _print(f"{name}: {value}")


@app.command()
def demo() -> None:
    """Search a small corpus with the model that needs no download from the Hub."""
    importlib.import_module("gen_fast.cli.demo").run()


app.command()(jobs.embed)
app.command()(jobs.verify)
app.command()(jobs.index)
app.command()(training.generate)
app.command()(training.teach)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(
    training.train
)


# ---------------------------------------------------------------------- shared by the commands


def _load(
    model: str | None,
    method: str | None,
    backbone: str | None,
    device: str | None,
    dtype: str,
    max_length: int | None,
    deterministic: bool,
    quiet: bool,
) -> "Encoder":
    from gen_fast.embed.loading import DEFAULT_MODEL, load

    logging.getLogger("gen_fast").setLevel(logging.ERROR if quiet else logging.WARNING)
    return load(
        model or DEFAULT_MODEL,
        method=method and str(method),
        backbone=backbone,
        device=options.checked_device(device),
        dtype=str(dtype),
        max_length=max_length,
        deterministic=deterministic,
    )


def _embed(encoder: "Encoder", texts: list[str], source: str, **settings: Any) -> "np.ndarray":
    """Embed texts; an error about one of them names `source`."""
    import numpy as np

    from gen_fast.model.token_budget import is_out_of_memory

    try:
        vectors = encoder.encode(texts, **settings)
    except TextError as error:
        raise InputError(f"{source}: {error}") from error
    except RuntimeError as error:
        if isinstance(error, GenFastError) or not is_out_of_memory(error):
            raise
        fail(f"out of memory; a smaller --max-length needs less: {error}", FAILURE)
    assert isinstance(vectors, np.ndarray)  # only convert_to_tensor gives anything else
    return vectors


def _print_hits(queries: list[str], found: "list[list[Match]]", as_json: bool) -> None:
    for number, (text, matches) in enumerate(zip(queries, found, strict=True)):
        if as_json:
            results = [asdict(match) for match in matches]
            _print(json.dumps({"query": text, "results": results}, ensure_ascii=False))
            continue
        if number:
            _print("")
        for match in matches:
            line = (f"{match.score:.4f}", match.id, match.text or "")
            _print("\t".join(" ".join(field.split()) for field in line))


def _print(line: str) -> None:
    # As UTF-8 whatever the locale: ids and texts may be in any script.
    sys.stdout.buffer.write(f"{line}\n".encode())


def main() -> None:
    """Run the command line: the entry point `gen-fast`."""
    app(prog_name="gen-fast")
