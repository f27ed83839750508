"""The commands of `gen-fast` for whole corpora: embed, verify, index, and search in an index."""

import logging
import re
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

import gen_fast.cli.options as options
from gen_fast.cli.errors import BAD_INPUT, fail
from gen_fast.embed.choices import DEFAULT_MODEL
from gen_fast.io.choices import Precision
from gen_fast.jobs.choices import (
    DEFAULT_MAX_TEXT_BYTES,
    DEFAULT_ROWS_PER_PART,
    DEFAULT_SPLIT,
    DEFAULT_STALL_TIMEOUT,
)
from gen_fast.search.choices import KINDS

if TYPE_CHECKING:
    from gen_fast.jobs.job import Summary
    from gen_fast.search.exact import Match


def embed(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="txt, jsonl, csv (also .gz, .zst), parquet, directories, globs, datasets:NAME.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Directory of the job; an unfinished one goes on.")],
    model: options.ModelOption = None,
    method: options.MethodOption = None,
    backbone: options.BackboneOption = None,
    dtype: options.DtypeOption = "auto",
    quantize: options.QuantizeOption = None,
    prompt: options.PromptOption = None,
    prompt_name: Annotated[
        list[str] | None,
        typer.Option(help="One of the model's prompts: query, document, … [one a --text-column]"),
    ] = None,
    normalize: options.NormalizeOption = False,
    truncate_dim: options.TruncateDimOption = None,
    precision: Annotated[
        options.Precision, typer.Option(help="What is stored; ubinary is a bit a dimension.")
    ] = "float32",
    text_column: Annotated[
        list[str] | None,
        typer.Option(
            help="Default: text, else the only one of strings. Several: a job each in OUT/COLUMN."
        ),
    ] = None,
    id_column: options.IdColumnOption = None,
    template: Annotated[
        str | None, typer.Option(help='Text of several columns, such as "{title}\\n{text}".')
    ] = None,
    file_format: options.FormatOption = None,
    split: options.SplitOption = DEFAULT_SPLIT,
    max_length: options.MaxLengthOption = None,
    deterministic: options.DeterministicOption = False,
    rows_per_part: Annotated[int, typer.Option(min=1, help="In a part.")] = DEFAULT_ROWS_PER_PART,
    max_text_bytes: Annotated[
        int, typer.Option(min=1, help="Longer texts are rejected.")
    ] = DEFAULT_MAX_TEXT_BYTES,
    append: Annotated[
        bool, typer.Option("--append", help="Add inputs that the job does not have.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at a row that cannot be embedded.")
    ] = False,
    devices: Annotated[
        str | None,
        typer.Option(help="all, a number, or cuda:0,cuda:1: a process each.  [default: one, here]"),
    ] = None,
    engine: Annotated[
        options.Engine, typer.Option(help="ray runs on a Ray cluster, --devices actors at a time.")
    ] = "local",
    stall_timeout: Annotated[
        float, typer.Option(min=1, help="Seconds without progress that end a process.")
    ] = DEFAULT_STALL_TIMEOUT,
    plan_only: Annotated[
        bool, typer.Option("--plan-only", help="Read the inputs, write the plan, embed nothing.")
    ] = False,
    quiet: options.QuietOption = False,
) -> None:
    """Embed a corpus of any size into parts, on one device or many; repeat to go on.

    Under torchrun every rank takes parts: torchrun --nproc-per-node 8 -m gen_fast.cli embed ...
    """
    from gen_fast.jobs.job import embed_columns, embed_corpus
    from gen_fast.jobs.settings import Settings

    logging.getLogger("gen_fast").setLevel(logging.ERROR if quiet else logging.WARNING)
    columns, names = text_column or [], prompt_name or []
    if prompt is not None and names:
        fail("give --prompt or --prompt-name, not both")
    if template is not None and columns:
        fail("give --template or --text-column, not both")
    if len(names) not in (0, 1, len(columns)) or len(set(columns)) < len(columns):
        fail("give each --text-column once, and one --prompt-name for all or one for each")
    settings = Settings(
        model=model or DEFAULT_MODEL,
        method=method and str(method),
        backbone=backbone,
        dtype=str(dtype),
        quantize=quantize and str(quantize),
        max_length=max_length,
        deterministic=deterministic,
        prompt=prompt,
        normalize_embeddings=normalize,
        truncate_dim=truncate_dim,
        precision=cast(Precision, str(precision)),
        id_column=id_column,
        # A shell gives a backslash and an n.
        template=template and template.replace("\\n", "\n"),
        file_format=file_format and str(file_format),
        split=split,
        max_text_bytes=max_text_bytes,
        rows_per_part=rows_per_part,
    )
    run: dict[str, Any] = {
        "append": append,
        "strict": strict,
        "devices": devices,
        "engine": str(engine),
        "stall_timeout": stall_timeout,
        "show_progress_bar": False if quiet else None,
        "plan_only": plan_only,
    }
    if len(columns) > 1:
        if prompt is not None:
            fail("give several --text-column their prompts by --prompt-name")
        each: list[str] = names * len(columns) if len(names) == 1 else names
        prompts = dict(zip_longest(columns, each))
        for column, summary in embed_columns(sources, out, prompts, settings, **run).items():
            if summary is not None and not quiet:
                _print_summary(f"{column}: ", summary, out / column)
        return
    summary = embed_corpus(
        sources,
        out,
        settings,
        prompt_name=next(iter(names), None),
        text_column=next(iter(columns), None),
        **run,
    )
    if summary is not None and not quiet:
        _print_summary("", summary, out)


def _print_summary(name: str, summary: "Summary", out: Path) -> None:
    kinds = ", ".join(f"{count} {kind}" for kind, count in summary.rejected_by_kind.items())
    typer.echo(
        f"{name}{summary.rows} embeddings in {summary.parts} parts; "
        f"{summary.rejected} rows rejected"
        + (f" ({kinds}), see {out / 'rejected.jsonl'}" if kinds else "")
        + (f"; {summary.truncated} texts lost their tail" if summary.truncated else ""),
        err=True,
    )


def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What embed made.")],
) -> None:
    """Check every part of a finished job: checksums, rows, ids, values."""
    from gen_fast.jobs.verify import verify as find_problems

    problems = find_problems(folder)
    for problem in problems:
        typer.echo(problem)
    if problems:
        fail(
            f"{folder}: {len(problems)} problems; embed with the same arguments mends parts",
            BAD_INPUT,
        )
    typer.echo(f"{folder}: nothing is wrong", err=True)


def index(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What embed made.")],
    out: Annotated[Path, typer.Option(help="The index; one that is there gets what it lacks.")],
    kind: Annotated[
        options.IndexKind, typer.Option(help="auto goes by the number of rows and --memory.")
    ] = "auto",
    memory: Annotated[
        str | None,
        typer.Option(help="That it may take, like 4GB.  [default: half of what is free]"),
    ] = None,
    recall_queries: Annotated[
        int, typer.Option(min=0, help="Queries to measure recall@10 with; 0 measures nothing.")
    ] = 200,
    quiet: options.QuietOption = False,
) -> None:
    """Index the embeddings of a finished job with FAISS, and measure recall@10."""
    from gen_fast.io.embedding_files import EMBEDDING_SUFFIXES
    from gen_fast.search.build import build_index

    if out.suffix in EMBEDDING_SUFFIXES:
        fail(f"--out {out}: {out.suffix} is for what encode writes; take another, such as .faiss")
    if not out.parent.is_dir() or out.is_dir():
        fail(f"--out {out} is a directory, or lies in none")
    info = build_index(
        folder,
        out,
        kind=next((known for known in KINDS if known == kind), None),
        memory_bytes=None if memory is None else _bytes(memory),
        recall_queries=recall_queries,
        show_progress_bar=False if quiet else None,
    )
    if quiet:
        return
    recall = "not measured" if info.recall is None else f"{info.recall:.4f}"
    typer.echo(f"{info.kind}: {info.reason}", err=True)
    typer.echo(f"{info.rows} embeddings, recall@10 {recall}", err=True)


def _bytes(text: str) -> int:
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    if size is None:
        fail(f"--memory {text} is not a size like 4GB")
    return int(float(size[1]) * 1000 ** " KMGT".index(size[2].upper() or " "))


def search_index(
    path: str,
    queries: list[str],
    k: int,
    prompt: str | None,
    prompt_name: str | None,
    device: str | None,
) -> "list[list[Match]]":
    """The nearest rows of an indexed corpus to each query."""
    from gen_fast.search.corpus import open_index

    opened = open_index(path, device=str(options.checked_device(device)))
    return opened.search(queries, k, prompt=prompt, prompt_name=prompt_name)
