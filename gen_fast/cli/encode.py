"""The commands of `gen-fast` for a file of texts: encode, and search in what it wrote."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import gen_fast.cli.options as options
from gen_fast.cli.errors import FAILURE, fail
from gen_fast.cli.jobs import search_index
from gen_fast.cli.models import load_encoder
from gen_fast.cli.output import print_line
from gen_fast.errors import GenFastError, InputError, TextError

if TYPE_CHECKING:
    import numpy as np

    from gen_fast.embed.encoder import Encoder
    from gen_fast.search.exact import Match


@options.grouped
def encode(
    source: Annotated[
        str, typer.Argument(metavar="INPUT", help="txt, jsonl, csv or parquet; - is stdin.")
    ],
    out: Annotated[str, typer.Option(help=".npy, .parquet or .safetensors; - is jsonl on stdout.")],
    model: options.ModelOption = None,
    method: options.MethodOption = None,
    loading: options.Loading = options.LOADING,
    prompt: options.PromptOption = None,
    prompt_name: options.PromptNameOption = None,
    normalize: options.NormalizeOption = False,
    texts_in: options.TextsIn = options.TEXTS_IN,
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
        if Path(out).exists() and not Path(out).is_file():
            fail(f"--out {out} is there and no file")
    texts = read_texts(source, **asdict(texts_in))
    check_embedding_file(out, texts.ids, texts.texts)
    encoder = load_encoder(
        model,
        method,
        loading,
        max_length=max_length,
        deterministic=deterministic,
        quiet=quiet,
    )
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
        quantize=str(loading.quantize or ""),
        backbone=lasting_name(loading.backbone) if loading.backbone else "",
        fingerprint=encoder.backbone.fingerprint,
    )
    write_embeddings(out, Embeddings(texts.ids, vectors, texts.texts, metadata))
    if not quiet:
        typer.echo(f"{len(vectors)} embeddings of {vectors.shape[1]} dimensions", err=True)


@options.grouped
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
    loading: options.Loading = options.LOADING,
    prompt: options.PromptOption = None,
    prompt_name: Annotated[
        str | None, typer.Option(help="Default: query, if the model has it.")
    ] = None,
    center: Annotated[
        bool, typer.Option("--center", help="Subtract the corpus mean before the cosine.")
    ] = False,
    texts_in: options.TextsIn = options.TEXTS_IN,
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
        for_files = (texts, model, method, center, max_length, texts_in != options.TEXTS_IN)
        if any(for_files) or replace(loading, device=None) != options.LOADING:
            fail("an index has its own texts and model: only queries, prompt, -k and device")
        query_texts = query or read_texts(queries or "-", text_column=query_column).texts
        hits = search_index(embeddings, query_texts, k, prompt, prompt_name, loading.device)
        _print_hits(query_texts, hits, as_json)
        return
    corpus = read_embeddings(embeddings)
    if texts is not None:
        read = read_texts(texts, **asdict(texts_in))
        if len(read.ids) != len(corpus.ids):
            raise InputError(f"{texts}: {len(read.ids)} texts for {len(corpus.ids)} embeddings")
        corpus = replace(corpus, ids=read.ids, texts=read.texts)
    query_texts = query or read_texts(queries or "-", text_column=query_column).texts

    metadata = corpus.metadata
    if metadata is None and model is None:
        fail(f"{embeddings} does not say which model made it: give --model")
    # A model given by hand replaces the file's, and so its method and backbone do not apply.
    if metadata is not None and model is None:
        method = method or metadata.method
        loading = replace(
            loading,
            backbone=loading.backbone or metadata.backbone or None,
            quantize=loading.quantize or metadata.quantize or None,
        )
    source = model or (metadata.model if metadata else None)
    encoder = load_encoder(source, method, loading, max_length=max_length, quiet=quiet)
    check_same_model(embeddings, corpus, encoder)
    if prompt is None and prompt_name is None and "query" in encoder.prompts:
        prompt_name = "query"
    vectors = _embed(
        encoder,
        query_texts,
        "queries",
        prompt=prompt,
        prompt_name=prompt_name,
        # Centring compares lengths too, so both sides need the same scale.
        normalize_embeddings=is_normalized(corpus),
        truncate_dim=corpus.vectors.shape[1],
        show_progress_bar=False,
    )
    _print_hits(query_texts, search_embeddings(corpus, vectors, k, center=center), as_json)


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


def _print_hits(queries: list[str], hits: "list[list[Match]]", as_json: bool) -> None:
    for number, (text, matches) in enumerate(zip(queries, hits, strict=True)):
        if as_json:
            results = [asdict(match) for match in matches]
            print_line(json.dumps({"query": text, "results": results}, ensure_ascii=False))
            continue
        if number:
            print_line("")
        for match in matches:
            line = (f"{match.score:.4f}", match.id, match.text or "")
            print_line("\t".join(" ".join(field.split()) for field in line))
