"""A corpus job from its inputs to its manifest: plan, run with an engine, publish."""

import logging
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from gen_fast.device import resolve_dtype
from gen_fast.errors import ConfigError, JobError, PromptError
from gen_fast.jobs.claims import PLANNING, Claims
from gen_fast.jobs.columns import parse_template
from gen_fast.jobs.engines import Engine, progress, run_local, run_ray, torchrun_ranks
from gen_fast.jobs.parts import PartStore
from gen_fast.jobs.plan import (
    DEFAULT_MAX_TEXT_BYTES,
    DEFAULT_ROWS_PER_PART,
    Plan,
    Settings,
    prepare,
    unpublish,
)
from gen_fast.jobs.worker import Worker, load_encoder
from gen_fast.loading import DEFAULT_MODEL, identify
from gen_fast.precision import PRECISIONS, Precision
from gen_fast.sources import lasting_name

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Summary:
    """What a finished job has: rows embedded and rejected (also by kind), texts cut, parts."""

    rows: int
    rejected: int
    rejected_by_kind: dict[str, int]
    truncated: int
    parts: int


def embed_corpus(
    sources: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    model: str | Path = DEFAULT_MODEL,
    method: str | None = None,
    backbone: str | Path | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    max_length: int | None = None,
    deterministic: bool = False,
    prompt: str | None = None,
    prompt_name: str | None = None,
    normalize_embeddings: bool = False,
    truncate_dim: int | None = None,
    precision: Precision = "float32",
    text_column: str | None = None,
    id_column: str | None = None,
    template: str | None = None,
    file_format: str | None = None,
    split: str = "train",
    rows_per_part: int = DEFAULT_ROWS_PER_PART,
    max_text_bytes: int = DEFAULT_MAX_TEXT_BYTES,
    append: bool = False,
    strict: bool = False,
    devices: str | int | Sequence[str] | None = None,
    engine: Literal["local", "ray"] = "local",
    stall_timeout: float | None = None,
    show_progress_bar: bool | None = None,
) -> Summary | None:
    """Embed the rows of files into parts of parquet in the directory `out`.

    sources: txt, jsonl, csv (also .gz, .zst) and parquet files, directories, glob patterns,
    "datasets:NAME". Called again with the same arguments it goes on where it stopped; a part's
    bytes do not depend on how often that was, nor on the number of processes.
    model to deterministic: as for `gen_fast.load`. prompt to truncate_dim: as for Encoder.encode.
    precision: float32, float16, int8 (with a column "scale") or ubinary (signs as bits).
    text_column, id_column, template: see gen_fast.jobs.plan.Settings.
    append: add sources that the job does not have yet. strict: a row that would be rejected is an
    error. devices: "cuda:0", …; a number; or "all"; one process each; None is one, here.
    engine: "ray" runs on a Ray cluster, `devices` actors at a time. Under torchrun every rank
    takes parts, and only the first returns a Summary.
    stall_timeout: seconds without progress after which a process gives up, its parts going to
    others; None means ten minutes for processes of their own, and never for this one.

    Raises ConfigError, InputError, JobError, and what `load` raises.
    """
    given = [sources] if isinstance(sources, str | Path) else list(sources)
    folder = Path(out)
    ranks = all(name in os.environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"))
    chosen = Engine.choose("all" if ranks and devices is None else devices, engine)
    if prompt is not None and prompt_name is not None:
        raise PromptError("give prompt or prompt_name, not both")
    if precision not in PRECISIONS:
        raise ConfigError(f"precision {precision!r} is not one of {', '.join(PRECISIONS)}")
    if template is not None:
        if text_column is not None:
            raise ConfigError("give a text column or a template, not both")
        parse_template(template)
    identity = identify(model, method=method, backbone=backbone, revision=revision)
    if prompt_name is not None and prompt_name not in identity["prompts"]:
        raise PromptError(
            f"no prompt named {prompt_name!r}; there are {', '.join(identity['prompts'])}"
        )
    if truncate_dim is not None and not 1 <= truncate_dim <= identity["dimension"]:
        raise ConfigError(f"truncate_dim {truncate_dim} is outside 1…{identity['dimension']}")
    settings = Settings(
        model=lasting_name(model),
        method=method,
        backbone=None if backbone is None else lasting_name(backbone),
        revision=revision,
        dtype=str(resolve_dtype(dtype, torch.device(chosen.devices[0]))).removeprefix("torch."),
        max_length=max_length,
        deterministic=deterministic,
        prompt=identity["prompts"][prompt_name] if prompt_name else prompt or "",
        normalize=normalize_embeddings,
        truncate_dim=truncate_dim,
        precision=precision,
        text_column=text_column,
        id_column=id_column,
        template=template,
        file_format=file_format,
        split=split,
        max_text_bytes=max_text_bytes,
        rows_per_part=rows_per_part,
        identity=identity,
    )
    shown = sys.stderr.isatty() if show_progress_bar is None else show_progress_bar
    if ranks:
        rank, count, first_ahead = torchrun_ranks()
        with first_ahead:
            if rank == 0:
                _prepare(folder, given, settings, append, shown)
        plan = Plan.load(folder)
        device = chosen.devices[int(os.environ["LOCAL_RANK"]) % len(chosen.devices)]
        _work(folder, plan, device, rank, count, strict, stall_timeout, shown and rank == 0)
        return _published(folder, plan) if rank == 0 else None

    plan = _prepare(folder, given, settings, append, shown)
    if not PartStore(folder, plan).is_published():
        if chosen.name == "ray":
            run_ray(folder, plan, chosen, strict, stall_timeout, shown)
        elif devices is not None:
            run_local(folder, plan, chosen, strict, stall_timeout, shown)
        else:
            _work(folder, plan, chosen.devices[0], 0, 1, strict, stall_timeout, shown)
    return _published(folder, plan)


def _prepare(
    folder: Path, sources: Sequence[str | Path], settings: Settings, append: bool, shown: bool
) -> Plan:
    """The job's plan, after checking what is there of it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with closing(Claims(folder)) as claims:
            claims.wait(PLANNING)
            plan = prepare(folder, sources, settings, append=append)
            store = PartStore(folder, plan)
            store.remove_temporaries(claims)
            for problem in store.remove_damaged(shown):
                logger.warning("%s: this part is made again", problem)
            if not store.is_published():
                unpublish(folder)
    except OSError as error:
        raise JobError(f"{folder} cannot be used: {error}") from error
    return plan


def _work(
    folder: Path,
    plan: Plan,
    device: str,
    index: int,
    count: int,
    strict: bool,
    stall_timeout: float | None,
    shown: bool,
) -> None:
    """Be a worker of the job."""
    finished = list(PartStore(folder, plan).finished())
    if len(finished) == len(plan.parts):
        return
    encoder = load_encoder(plan.settings, device)
    with ExitStack() as stack:
        if count > 1:
            refresh = stack.enter_context(progress(folder, plan, shown))
        else:
            there = sum(record.all_rows for record in finished)
            bar = tqdm(total=plan.rows, initial=there, unit="text", disable=not shown)
            stack.enter_context(bar)
        worker = Worker(
            folder,
            plan,
            encoder,
            index=index,
            count=count,
            strict=strict,
            on_texts=(lambda _: refresh()) if count > 1 else bar.update,
            stall_timeout=stall_timeout,
        )
        stack.enter_context(worker).run()


def _published(folder: Path, plan: Plan) -> Summary:
    store = PartStore(folder, plan)
    try:
        with closing(Claims(folder)) as claims:
            claims.wait(PLANNING)  # for who began later, and is looking at what is there
            manifest = store.manifest() if store.is_published() else store.publish()
    except OSError as error:
        raise JobError(f"{folder}: cannot be published: {error}") from error
    return Summary(
        manifest["rows"],
        manifest["rejected"],
        manifest["rejected_by_kind"],
        manifest["truncated"],
        len(manifest["parts"]),
    )
