"""Functions of arrays that are run again and again: on a GPU as CUDA graphs, one a shape.

A small batch is launch-bound: Python gives the GPU a few hundred kernels one by one, each of which
is done before the next is ready. A graph is launched whole. Its inputs lie in the same memory every
time, and go there in one copy.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# Graphs that are kept, those used last. The driver keeps some MB for each.
MOST_GRAPHS = 64
# What graphs take of torch's memory, all together: results, and activations, which they share.
MOST_BYTES = 1 << 30
# Where an input begins: as torch's own tensors do, for kernels that load 16 bytes at a time.
_ALIGNMENT = 256

Function = Callable[[Mapping[str, Tensor]], Tensor]


class Graphs:
    """Runs functions on one device, each a CUDA graph once it has been run before.

    A function is known by its key: with the same key it must compute the same of its arrays, and
    what else it reads must stay where it is. It may not stop the host, and no shape may depend on
    values (gen_fast.testing.no_host_sync). The first time it is run as it is, which compiles what
    it needs; the second time it is recorded. On a CPU it is always run as it is, on the same
    memory. Threads take turns.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        most_graphs: int = MOST_GRAPHS,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        self._device = device
        self._most_graphs, self._most_bytes = most_graphs, most_bytes
        self._kept: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._recorder = _Recorder(device) if device.type == "cuda" else None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    @torch.inference_mode()
    def run(self, key: Hashable, arrays: Mapping[str, np.ndarray], function: Function) -> Tensor:
        """What `function` gives for `arrays` as tensors: one tensor, the caller's own.

        Raises what the function raises, and RuntimeError for one that cannot be recorded.
        """
        shapes = tuple((name, x.shape, x.dtype.str) for name, x in arrays.items())
        with self._lock:
            graph = self._kept.pop((key, shapes), None)
            if graph is None:
                graph = _Graph(function, arrays, self._device)
            try:
                result = graph.run(arrays, self._recorder)
            except RuntimeError:
                # A recording that breaks off may leave the memory that all share in any state.
                self._drop_all()
                raise
            # Kept only now: one that has failed is not.
            self._kept[key, shapes] = graph
            self._drop_oldest()
        return result

    def _drop_oldest(self) -> None:
        if len(self._kept) > self._most_graphs:
            self._kept.popitem(last=False)
        if self._recorder is not None and self._recorder.nbytes > self._most_bytes:
            # They share their memory, which is free once all are gone.
            logger.info("%d CUDA graphs take %d bytes: dropped", len(self), self._recorder.nbytes)
            self._drop_all()

    def _drop_all(self) -> None:
        self._kept.clear()
        if self._recorder is not None:
            self._recorder = _Recorder(self._device)


class _Graph:
    """One function and the memory of its inputs; recorded when it is run for the second time."""

    def __init__(
        self, function: Function, arrays: Mapping[str, np.ndarray], device: torch.device
    ) -> None:
        self._function = function
        self._inputs = StaticInputs(arrays, device)
        self._has_run = False
        self._recorded: tuple[torch.cuda.CUDAGraph, Tensor] | None = None

    def run(self, arrays: Mapping[str, np.ndarray], recorder: "_Recorder | None") -> Tensor:
        if recorder is None:
            self._inputs.fill(arrays)
            return self._function(self._inputs.tensors)
        with recorder.turn():
            if self._has_run and self._recorded is None:
                self._recorded = recorder.record(self._function, self._inputs.tensors)
            self._inputs.fill(arrays)
            self._has_run = True
            if self._recorded is None:
                return self._function(self._inputs.tensors)
            graph, result = self._recorded
            graph.replay()
            return result.clone()


class _Recorder:
    """Records graphs on a GPU, which share their memory: they run one after another.

    nbytes: what torch has reserved for them.
    """

    def __init__(self, device: torch.device) -> None:
        self.nbytes = 0
        self._device = device
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream()
            self._done = torch.cuda.Event()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """The device is current, and what the turn before has launched is waited for, on the GPU.

        Turns of threads with streams of their own would overlap, in the same memory.
        """
        with torch.cuda.device(self._device):
            self._done.wait()
            yield
            self._done.record()

    def record(
        self, function: Function, tensors: Mapping[str, Tensor]
    ) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """A graph of `function`, and where its result will be."""
        before = torch.cuda.memory_reserved(self._device)
        graph = torch.cuda.CUDAGraph()
        with (
            # torch.cuda.graph leaves its own stream the current one where recording fails.
            torch.cuda.stream(torch.cuda.current_stream()),
            # Other threads may use the GPU meanwhile.
            torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ),
        ):
            result = function(tensors)
        self.nbytes += max(0, torch.cuda.memory_reserved(self._device) - before)
        return graph, result


class StaticInputs:
    """Tensors on a device that stay where they are, and are filled together in one copy."""

    def __init__(self, arrays: Mapping[str, np.ndarray], device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self._places: dict[str, slice] = {}
        end = 0
        for name, array in arrays.items():
            self._places[name] = slice(end, end + array.nbytes)
            end += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        self._memory = torch.empty(end, dtype=torch.uint8, device=device)
        self.tensors = {
            name: self._memory[place]
            .view(torch.from_numpy(arrays[name][:0]).dtype)
            .view(arrays[name].shape)
            for name, place in self._places.items()
        }

    def fill(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Copy `arrays`, of the same shapes and dtypes, without waiting for the device."""
        # Not the same memory every time: the copy of the time before may not have begun.
        host = torch.empty(self._memory.shape, dtype=torch.uint8, pin_memory=self._pinned)
        content = host.numpy()
        for name, place in self._places.items():
            content[place] = np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8)
        self._memory.copy_(host, non_blocking=True)
