"""A corpus job from its inputs to its manifest: plan, run with an engine, publish."""

import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gen_fast.errors import ConfigError, JobError
from gen_fast.io.tables import DATASETS
from gen_fast.jobs.choices import DEFAULT_STALL_TIMEOUT, LONGEST_STALL_TIMEOUT, EngineName
from gen_fast.jobs.claims import IN_USE, PLANNING, Claims
from gen_fast.jobs.engines import Engine, Run, progress, run_local, run_ray, torchrun_ranks
from gen_fast.jobs.parts import PartStore
from gen_fast.jobs.plan import Plan, open_input, prepare, unpublish
from gen_fast.jobs.settings import PlanSettings, Settings
from gen_fast.jobs.sources import PLAN
from gen_fast.jobs.watchdog import Watchdog
from gen_fast.jobs.worker import Worker
from gen_fast.model.device import device_of_rank, make_current

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
    settings: Settings | None = None,
    *,
    append: bool = False,
    strict: bool = False,
    devices: str | int | Sequence[str] | None = None,
    engine: EngineName = "local",
    stall_timeout: float | None = None,
    show_progress_bar: bool | None = None,
    plan_only: bool = False,
    **shorthands: Any,
) -> Summary | None:
    """Embed the rows of files into parts of parquet in the directory `out`.

    sources: txt, jsonl, csv (also .gz, .zst) and parquet files, directories, glob patterns,
    "datasets:NAME". Called again with the same arguments it goes on where it stopped; a part's
    bytes do not depend on how often that was, nor on the number of processes.
    settings: all that decides the output. shorthands: fields of Settings by their names, such as
    model, prompt_name, precision, text_column, id_column; they replace those of `settings`, and
    what excludes them (see Settings.replaced).
    append: add sources that the job does not have yet. strict: a row that would be rejected is an
    error. devices: "cuda:0", …; a number; or "all"; one process each; None is one, here.
    engine: "ray" runs on a Ray cluster, `devices` actors at a time. Under torchrun every rank
    takes parts, and only the first returns a Summary.
    stall_timeout: seconds without progress after which a process ends itself, its parts going to
    others; None means ten minutes, and never for this process unless it is one of torchrun's.
    plan_only: read the inputs and write the plan, embed nothing and return None.

    Raises ConfigError, InputError, JobError, and what `load` raises; TypeError for a shorthand
    that is no field of Settings.
    """
    if stall_timeout is not None and not 0 < stall_timeout <= LONGEST_STALL_TIMEOUT:
        raise ConfigError(
            f"stall_timeout must be above 0 and at most {LONGEST_STALL_TIMEOUT} seconds, "
            f"not {stall_timeout}"
        )
    source_list = [sources] if isinstance(sources, str | Path) else list(sources)
    folder = Path(out)
    ranks = all(name in os.environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"))
    engine_choice = Engine.choose("all" if ranks and devices is None else devices, engine)
    chosen = (settings or Settings()).replaced(**shorthands)
    plan_settings = chosen.resolved(engine_choice.devices[0])
    shown = sys.stderr.isatty() if show_progress_bar is None else show_progress_bar
    if ranks:
        device = device_of_rank(int(os.environ["LOCAL_RANK"]), engine_choice.devices)
        rank, count, first_ahead = torchrun_ranks()
        stall_timeout = stall_timeout or DEFAULT_STALL_TIMEOUT
        with ExitStack() as planned:
            with first_ahead:
                if rank == 0:
                    planned.enter_context(
                        _planned(folder, source_list, plan_settings, append, stall_timeout, shown)
                    )
            if plan_only:
                return None
            shown = shown and rank == 0
            run = Run(folder, Plan.load(folder), engine_choice, strict, stall_timeout, shown)
            make_current(device)
            _work(run, device, rank, count)
            return _published(run) if rank == 0 else None

    with _planned(folder, source_list, plan_settings, append, stall_timeout, shown) as plan:
        if plan_only:
            return None
        run = Run(folder, plan, engine_choice, strict, stall_timeout, shown)
        if not PartStore(folder, plan).is_published():
            if engine_choice.name == "ray":
                run_ray(run)
            elif devices is not None:
                run_local(run)
            else:
                _work(run, engine_choice.devices[0])
        return _published(run)


def embed_columns(
    sources: str | Path | Sequence[str | Path],
    out: str | Path,
    columns: Mapping[str, str | None],
    settings: Settings | None = None,
    **options: Any,
) -> dict[str, Summary | None]:
    """Embed several columns of the same rows, each with a prompt of its own.

    columns: the name of the prompt of each column, None for no prompt. settings, options: as for
    embed_corpus. Each column becomes a job of its own, one after the other, in the directory of
    `out` that has its name; a row may be rejected in one and not in another.

    A prompt, column or plan that is wrong is found before anything is embedded. Raises what
    embed_corpus does, and ConfigError for no columns, or for one that begins with "." or "_" or
    has a letter that some system does not allow in names.
    """
    for column in columns:
        if not column or column[0] in "._" or set(column) & set('/\\:*?"<>|\0'):
            raise ConfigError(f"column {column!r} cannot name a directory on every system")
    if not columns:
        raise ConfigError("no columns are given")
    shared = settings or Settings()
    for option in ("text_column", "template", "prompt", "prompt_name"):
        if options.get(option, getattr(shared, option)) is not None:
            raise ConfigError(f"{option} is not for several columns: each has its own")
    if (Path(out) / PLAN).exists():
        raise JobError(f"{out} holds a job of one text a row: take another directory for columns")

    def embed(column: str, plan_only: bool) -> Summary | None:
        of_column = {**options, "text_column": column, "prompt_name": columns[column]}
        return embed_corpus(sources, Path(out) / column, shared, **of_column, plan_only=plan_only)

    only = bool(options.pop("plan_only", False))
    for column in columns:
        embed(column, plan_only=True)
    return {column: None if only else embed(column, plan_only=False) for column in columns}


@contextmanager
def _planned(
    folder: Path,
    sources: Sequence[str | Path],
    settings: PlanSettings,
    append: bool,
    stall_timeout: float | None,
    shown: bool,
) -> Iterator[Plan]:
    """The job's plan, after checking what is there of it; within, no other process replaces it."""
    for source in map(str, sources):
        if source.startswith(DATASETS):
            open_input(source, settings)  # may download for long; the Hub has timeouts of its own
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            claims = stack.enter_context(closing(Claims(folder)))
            with Watchdog(stall_timeout) as watchdog:
                claims.wait(PLANNING, watchdog.heartbeat)
                with tqdm(desc="planning", unit="row", leave=False, disable=not shown) as bar:

                    def on_rows(count: int) -> None:
                        watchdog.heartbeat()
                        bar.update(count)

                    in_use = not claims.take(IN_USE)
                    plan = prepare(
                        folder, sources, settings, append=append, in_use=in_use, on_rows=on_rows
                    )
                    claims.share(IN_USE)
                store = PartStore(folder, plan, watchdog.heartbeat)
                store.remove_temporaries(claims)
                _mend(store, shown)
                claims.release(PLANNING)
        except OSError as error:
            raise JobError(f"{folder} cannot be used: {error}") from error
        yield plan


def _mend(store: PartStore, shown: bool) -> None:
    """Have damaged parts made again. Raises JobError for parts that the plan does not have."""
    for stray in store.strays():
        raise JobError(
            f"{stray} is none of the {len(store.plan.parts)} parts of {PLAN}, which may have been "
            "replaced by that of a smaller job: put the right one back, or move the part away"
        )
    for problem in store.remove_damaged(shown):
        logger.warning("%s: this part is made again", problem)
    if not store.is_published():
        unpublish(store.folder)


def _work(run: Run, device: str, index: int = 0, count: int = 1) -> None:
    """Be a worker of the job."""
    plan = run.plan
    finished = list(PartStore(run.folder, plan).finished())
    if len(finished) == len(plan.parts):
        return
    encoder = plan.settings.load_encoder(device)
    with ExitStack() as stack:
        if count > 1:
            refresh = stack.enter_context(progress(run))
        else:
            rows_done = sum(record.all_rows for record in finished)
            bar = tqdm(total=plan.rows, initial=rows_done, unit="text", disable=not run.shown)
            stack.enter_context(bar)
        worker = Worker(
            run.folder,
            plan,
            encoder,
            index=index,
            count=count,
            strict=run.strict,
            on_texts=(lambda _: refresh()) if count > 1 else bar.update,
            stall_timeout=run.stall_timeout,
        )
        stack.enter_context(worker).run()


def _published(run: Run) -> Summary:
    store = PartStore(run.folder, run.plan)
    try:
        with closing(Claims(run.folder)) as claims:
            claims.wait(PLANNING)  # for who began later, and is looking at what is there
            if Plan.load(run.folder) != run.plan:
                raise JobError(
                    f"{run.folder}: {PLAN} has been extended since this process began; the parts "
                    "are intact: run again to go on"
                )
            manifest = store.manifest() if store.is_published() else store.publish()
    except OSError as error:
        raise JobError(f"{run.folder}: cannot be published: {error}") from error
    return Summary(
        manifest["rows"],
        manifest["rejected"],
        manifest["rejected_by_kind"],
        manifest["truncated"],
        len(manifest["parts"]),
    )
