"""The commands of `gen-fast` that make an adapter: generate, teach and train."""

import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import gen_fast.cli.options as options
from gen_fast.cli.errors import fail
from gen_fast.embed.choices import DEFAULT_MODEL
from gen_fast.jobs.choices import DEFAULT_SPLIT
from gen_fast.training.choices import GEM, LLM2VEC, TRAINED

if TYPE_CHECKING:
    from gen_fast.io.text_files import Texts
    from gen_fast.training.answers import Shard


@options.grouped
def generate(
    source: Annotated[
        str | None,
        typer.Argument(metavar="[QUERIES]", help="txt, jsonl, csv, parquet, -, or datasets:NAME."),
    ] = None,
    out: Annotated[Path, typer.Option(help="jsonl of answers; an existing one is continued.")] = (
        Path("answers.jsonl")
    ),
    model: options.ModelOption = None,
    device: options.DeviceOption = None,
    dtype: options.DtypeOption = "auto",
    quantize: options.QuantizeOption = None,
    self_queries: Annotated[
        int | None, typer.Option(min=1, help="Let the model write this many queries itself.")
    ] = None,
    max_new_tokens: options.MaxNewTokensOption = 500,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers at a time.")] = 64,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="0 is greedy.  [default: the model's own]")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Nucleus sampling.  [default: the model's own]")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=0, help="0 is all.  [default: the model's own]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    shard: Annotated[
        str, typer.Option(metavar="I/N", help="This machine's part of the queries, from 0/N.")
    ] = "0/1",
    texts_in: options.TextsIn = options.TEXTS_IN,
    split: options.SplitOption = DEFAULT_SPLIT,
    quiet: options.QuietOption = False,
) -> None:
    """Let the model answer queries: a row each, continued where it stopped."""
    from gen_fast.embed.loading import load_generator, locate_generator
    from gen_fast.model.sampling import own_sampling
    from gen_fast.training.answers import generate_answers, write_own_queries

    if (source is None) == (self_queries is None):
        fail("give a file of queries or --self-queries N")
    if out.suffix != ".jsonl":
        fail(f"--out {out} does not end in .jsonl")
    part = _shard(shard)
    logging.getLogger("gen_fast").setLevel(logging.ERROR if quiet else logging.WARNING)
    if source is not None:
        queries = _read_queries(source, texts_in, split)
    own = own_sampling(locate_generator(model or DEFAULT_MODEL).source, seed)
    chosen: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    sampling = replace(own, **{k: v for k, v in chosen.items() if v is not None})
    if not sampling.temperature and (top_p or top_k):
        fail("--top-p and --top-k need a --temperature above 0")
    generator = load_generator(
        model or DEFAULT_MODEL,
        device=options.checked_device(device),
        dtype=str(dtype),
        quantize=quantize and str(quantize),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        sampling=sampling,
    )
    if self_queries is not None:
        written = out.with_name(f"{out.stem}.queries.jsonl")
        queries = write_own_queries(self_queries, written, generator, show_progress_bar=not quiet)
    generate_answers(queries, out, generator, shard=part, show_progress_bar=not quiet)


def _read_queries(source: str, texts_in: options.TextsIn, split: str) -> "Texts":
    from gen_fast.io.text_files import read_texts

    return read_texts(source, **asdict(texts_in), split=split)


def _shard(text: str) -> "Shard":
    from gen_fast.training.answers import Shard

    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        fail(f"--shard {text} is not I/N with I below N")
    return Shard(int(match[1]), int(match[2]))


# Vectors to learn from are computed once: exactly.
_LOADING_TEACHER = options.Loading(dtype="float32")


@options.grouped
def teach(
    answers: Annotated[
        list[Path], typer.Argument(help="What generate wrote, one file or several.")
    ],
    teacher: Annotated[
        str, typer.Option(help="minilm, a sentence-transformers model, or with --method any model.")
    ] = "minilm",
    out: Annotated[
        Path | None, typer.Option(help=".parquet.  [default: beside the first file]")
    ] = None,
    method: options.MethodOption = None,
    loading: options.Loading = _LOADING_TEACHER,
    quiet: options.QuietOption = False,
) -> None:
    """Embed answers with a teacher, once, for training."""
    from gen_fast.training.teach import teach as embed_answers

    target = out or answers[0].with_suffix(".teacher.parquet")
    if target.suffix != ".parquet":
        fail(f"--out {target} does not end in .parquet")
    if not target.parent.is_dir():
        fail(f"--out {target} lies in no directory")
    logging.getLogger("gen_fast").setLevel(logging.ERROR if quiet else logging.WARNING)
    taught = embed_answers(
        answers,
        target,
        teacher,
        method=method and str(method),
        backbone=loading.backbone,
        device=str(options.checked_device(loading.device)),
        dtype=str(loading.dtype),
        quantize=loading.quantize and str(loading.quantize),
        show_progress_bar=not quiet,
    )
    if not quiet:
        cut = f"; the teacher truncated {taught.truncated} answers" if taught.truncated else ""
        typer.echo(f"{taught.vectors} vectors in {target}{cut}", err=True)


# Options of `train` that are about answers and their teacher, or about how queries are read.
_OF_ANSWERS = (
    "self_queries",
    "teacher",
    "teacher_method",
    "max_new_tokens",
    "answer_batch",
    "file_format",
    "split",
)


def _train_alone(settings: Mapping[str, Any], quiet: bool) -> None:
    """Train what settings say, without the stages before it."""
    from gen_fast.training.methods import read_run

    logging.getLogger("gen_fast").setLevel(logging.ERROR if quiet else logging.WARNING)
    folder = read_run(None, settings)(False if quiet else None)
    typer.echo(f"adapter: {folder}")


def _was_given(context: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line, be it with its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _given(flags: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in flags.items() if value is not None}


@options.grouped
def train(
    context: typer.Context,
    source: Annotated[
        str | None,
        typer.Argument(metavar="[QUERIES]", help="txt, jsonl, csv, parquet, -, or datasets:NAME."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Directory for everything that is made.")] = Path("run"),
    method: Annotated[
        options.TrainedMethod | None,
        typer.Option(help=f"What is trained.  [default: that of --config, else {TRAINED[0]}]"),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML of training settings; --learning-rate 1e-3 … too.")
    ] = None,
    model: options.ModelOption = None,
    full: Annotated[
        bool,
        typer.Option("--full", help="Of gem: train the linear weights, not LoRA factors."),
    ] = False,
    teacher: Annotated[
        str, typer.Option(help="minilm, a sentence-transformers model, or with a method any model.")
    ] = "minilm",
    teacher_method: Annotated[
        options.Method | None, typer.Option(help="How a language model embeds as teacher.")
    ] = None,
    device: options.DeviceOption = None,
    dtype: Annotated[
        options.Dtype | None, typer.Option(help="What the backbone computes in.  [default: auto]")
    ] = None,
    self_queries: Annotated[
        int | None, typer.Option(min=1, help="Let the model write this many queries itself.")
    ] = None,
    max_new_tokens: options.MaxNewTokensOption = 500,
    answer_batch: Annotated[int, typer.Option(min=1, help="Answers at a time.")] = 64,
    texts_in: options.TextsIn = options.TEXTS_IN,
    split: options.SplitOption = DEFAULT_SPLIT,
    quiet: options.QuietOption = False,
) -> None:
    """Make an adapter from queries: generate answers, teach, train, evaluate.

    Answers, teacher's vectors and adapter go to --out, whatever --config says of them. Run again
    after an interruption to go on. Training settings are also taken as flags; on several GPUs run
    the stages one by one, the last with torchrun and training/train.py.

    With --method llm2vec the file has texts, for --step mntp or simcse, or jsonl rows of query,
    answer and negative_answer, for --step supervised; --model may be the step before. With --method
    gem it has texts, and --full trains the model's linear weights in place of LoRA factors.
    """
    from gen_fast.training.config import TrainConfig, parse_flags, read_config, read_settings

    values = {**read_settings(config), **parse_flags(context.args)}
    chosen = str(method or values.pop("method", TRAINED[0]))
    values.pop("method", None)
    if full and chosen != GEM:
        fail(f"--full means nothing with --method {chosen}")
    if chosen in (LLM2VEC, GEM):
        for name in _OF_ANSWERS:
            if _was_given(context, name):
                fail(f"--{name.replace('_', '-')} means nothing with --method {chosen}")
        flags: dict[str, Any] = {
            "texts": source and [source],
            "backbone": model,
            "device": device and str(options.checked_device(device)),
            "dtype": dtype and str(dtype),
            "text_column": texts_in.text_column,
            "id_column": texts_in.id_column,
            "full": full or None,
        }
        if _was_given(context, "out"):
            flags["out"] = str(out)
        _train_alone({"out": str(out), **values, **_given(flags), "method": chosen}, quiet)
        return
    from gen_fast.embed.loading import load_generator
    from gen_fast.training.answers import write_own_queries
    from gen_fast.training.recipe import run_recipe

    if (source is None) == (self_queries is None):
        fail("give a file of queries or --self-queries N")
    logging.getLogger("gen_fast").setLevel(logging.ERROR if quiet else logging.WARNING)
    shown = False if quiet else None
    flags = {
        "backbone": model,
        "device": device and str(options.checked_device(device)),
        "dtype": dtype and str(dtype),
    }
    outputs = {
        "answers": [str(out / "answers.jsonl")],
        "teacher": str(out / "teacher.parquet"),
        "out": str(out),
    }
    settings = read_config({**values, **_given(flags), **outputs}, TrainConfig)
    if source is not None:
        queries = _read_queries(source, texts_in, split)
    generator = load_generator(
        settings.backbone,
        device=options.checked_device(settings.device),
        dtype=settings.dtype,
        quantize=settings.quantize,
        revision=settings.backbone_revision,
        max_new_tokens=max_new_tokens,
        batch_size=answer_batch,
    )
    if self_queries is not None:
        own = out / "queries.jsonl"
        queries = write_own_queries(self_queries, own, generator, show_progress_bar=shown)
    figures = run_recipe(
        queries,
        settings,
        generator,
        teacher,
        teacher_method=teacher_method and str(teacher_method),
        show_progress_bar=shown,
    )
    for key, value in figures.items():
        if key != "examples":
            typer.echo(f"{key}: {value}")
