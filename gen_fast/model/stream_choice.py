"""How many streams are run: what the user says, or what a short measurement has shown."""

import logging
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from gen_fast.errors import ConfigError
from gen_fast.io.cache import keep, recalled
from gen_fast.model.backbone import Backbone
from gen_fast.model.batch import PackedBatch
from gen_fast.model.device import cpu_name, cpus
from gen_fast.model.streams import Streams, unsupported
from gen_fast.model.token_budget import CPU_TOKENS, activation_bytes_per_token
from gen_fast.version import __version__

logger = logging.getLogger(__name__)

# Less is within the noise of the measurement.
WORTH_IT = 1.05
# The measurement takes two layers, which stand for all, and texts of this length.
LAYERS = 2
TEXT_TOKENS = 128
# Rounds, in each of which every number of streams takes its turn: a fourth only in this time.
LEAST_ROUNDS, MOST_ROUNDS = 3, 5
LIMIT_SECONDS = 2.0
# The measurement is made once as much as this many times its own work has been asked for.
PATIENCE = 20
# Where threads are bound to cores, streams may get the same ones.
_BINDING = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY")


@dataclass(frozen=True)
class StreamChoice:
    """count: streams. gain: how many times as fast as one they were; 1 if that is not known."""

    count: int = 1
    gain: float = 1.0

    def side_by_side(self, batches: int) -> int:
        """How many of the first `batches` go to the streams; all threads run each of the rest.

        The last ones may not fill every stream. Then they take as long as if they did.
        """
        if self.count == 1:
            return 0
        rest = batches % self.count
        return batches if rest * self.gain > self.count else batches - rest


ONE = StreamChoice()


class StreamChooser:
    """Says how many streams the windows of an encoder are run in.

    streams: 1 is one for ever; None measures, once enough has been run that it pays, and
    keeps the result in the cache. batch_tokens: of the batches to come.
    Raises ConfigError for more streams than there are threads, or where streams cannot run.
    """

    def __init__(self, backbone: Backbone, streams: int | None, batch_tokens: int) -> None:
        self._backbone = backbone
        self._streams = streams
        self._batch_tokens = batch_tokens
        self._work = 0  # rows of a layer that have been computed
        self._measured: dict[int, StreamChoice] = {}
        if streams is None or streams == 1:
            return
        threads = torch.get_num_threads()
        if not 1 <= streams <= threads:
            raise ConfigError(f"streams {streams} is outside 1…{threads}, the threads of torch")
        if backbone.device.type != "cpu":
            raise ConfigError(f"{streams} streams: on {backbone.device} there is one")
        reason = unsupported()
        if reason is not None:
            raise ConfigError(f"{streams} streams cannot run: {reason}")

    def choose(self, batches: Sequence[int]) -> StreamChoice:
        """For batches of so many tokens."""
        if self._streams is not None:
            return StreamChoice(self._streams)
        backbone = self._backbone
        # The bits of other products depend on the number of threads.
        if backbone.device.type != "cpu" or not (backbone.packed or backbone.quantize):
            return ONE
        self._work += sum(batches) * backbone.config.num_layers
        if len(batches) < 2:
            return ONE
        threads = torch.get_num_threads()
        if threads not in self._measured:
            counts = candidates(backbone, self._batch_tokens)
            key = self._key(threads)
            choice = ONE if len(counts) == 1 or unsupported() else recalled_choice(key, counts)
            if choice is None:
                rows = (MOST_ROUNDS + 1) * len(counts) * LAYERS
                rows *= _calls(counts, self._batch_tokens) * self._batch_tokens
                if self._work < PATIENCE * rows:
                    return ONE
                choice = measure(backbone, self._batch_tokens, counts)
                keep(key, asdict(choice))
            self._measured[threads] = choice
        return self._measured[threads]

    def run_one_by_one(self) -> None:
        """From now on there is one stream: memory has not sufficed for more."""
        if self._streams != 1:
            logger.warning("out of memory with batches side by side: going on one by one")
        self._streams = 1

    def _key(self, threads: int) -> dict[str, Any]:
        """What the speed of streams depends on, as JSON."""
        return {
            "of": "streams",
            "cpu": cpu_name(),
            "cpus": cpus(),
            "threads": threads,
            "binding": {name: os.environ.get(name) for name in _BINDING},
            "config": asdict(self._backbone.config),
            "dtype": str(self._backbone.dtype),
            "quantize": self._backbone.quantize,
            "batch_tokens": self._batch_tokens,
            "torch": torch.__version__,
            "gen_fast": __version__,
        }


def candidates(backbone: Backbone, batch_tokens: int) -> list[int]:
    """Numbers of streams that share torch's threads evenly; 1 is the first.

    Their activations together take no more memory than the weights.
    """
    threads = torch.get_num_threads()
    most = backbone.nbytes // (batch_tokens * activation_bytes_per_token(backbone))
    return [1, *(count for count in range(2, min(threads, most) + 1) if threads % count == 0)]


def measure(backbone: Backbone, batch_tokens: int, counts: Sequence[int]) -> StreamChoice:
    """The fastest of these numbers of streams for batches of so many tokens."""
    start = time.perf_counter()
    run = _layers_run(backbone, batch_tokens)
    seconds = time_streams(run, counts, _calls(counts, batch_tokens))
    choice = fastest(seconds)
    logger.info(
        "streams: %d, %.2f times as fast as one (measured in %.1f s: %s)",
        choice.count,
        choice.gain,
        time.perf_counter() - start,
        ", ".join(f"{count} in {statistics.median(s):.3f} s" for count, s in seconds.items()),
    )
    return choice


def _calls(counts: Sequence[int], batch_tokens: int) -> int:
    """Batches that each number of streams runs in a round."""
    return max(counts) * max(1, CPU_TOKENS // batch_tokens)


def fastest(seconds: Mapping[int, Sequence[float]]) -> StreamChoice:
    """The number of streams with the largest gain over one, the median of the rounds.

    seconds: of each number of streams in each round. One, unless the gain is at least WORTH_IT.
    """
    best = ONE
    for count, times in seconds.items():
        gain = statistics.median(one / s for one, s in zip(seconds[1], times, strict=True))
        if count > 1 and gain >= max(WORTH_IT, best.gain):
            best = StreamChoice(count, gain)
    return best


def time_streams(
    run: Callable[[], object], counts: Sequence[int], calls: int
) -> dict[int, list[float]]:
    """Seconds that `calls` calls of `run` take in each number of streams, in each round.

    The numbers of streams take turns. The first of `counts` is 1: all threads for each call.
    """
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    begin: dict[int, Callable[..., Callable[[], object]]] = {1: partial}
    with ExitStack() as stack:
        for count in counts[1:]:
            begin[count] = stack.enter_context(Streams(count)).start
        for each in begin.values():  # threads begin, and oneDNN prepares its products
            _wait_for([each(run) for _ in range(max(counts))])
        start = time.perf_counter()
        for done in range(MOST_ROUNDS):
            if done >= LEAST_ROUNDS and time.perf_counter() - start > LIMIT_SECONDS:
                break
            for count in counts:
                begin[count](run)()  # until the idle threads of the turn before have gone to sleep
                before = time.perf_counter()
                _wait_for([begin[count](run) for _ in range(calls)])
                seconds[count].append(time.perf_counter() - before)
    return seconds


def _wait_for(results: Sequence[Callable[[], object]]) -> None:
    for result in results:
        result()


def _layers_run(backbone: Backbone, tokens: int) -> Callable[[], object]:
    """A function that runs a batch of so many tokens through the first layers."""
    config = replace(backbone.config, num_layers=min(LAYERS, backbone.config.num_layers))
    layers = backbone.layers[: config.num_layers]
    part = Backbone(config, backbone.embedding, layers, backbone.final_norm, backbone.fingerprint)
    texts = max(1, tokens // TEXT_TOKENS)
    ids = np.arange(texts * TEXT_TOKENS).reshape(texts, -1) % config.vocab_size
    return partial(_run, part, PackedBatch.pack(list(ids), needed=[1] * texts))


@torch.inference_mode()
def _run(backbone: Backbone, batch: PackedBatch) -> object:
    return backbone.forward(batch)


def recalled_choice(key: Mapping[str, Any], counts: Sequence[int]) -> StreamChoice | None:
    """What was measured for such a key, if it is one of `counts`."""
    known = recalled(key)
    return StreamChoice(**known) if known and known["count"] in counts else None
