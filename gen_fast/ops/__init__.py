"""The ops of the backbone. Each lives in kernels/<op> and is installed as gen_fast.ops.<op>.

An op has a pure-torch `reference` and may have faster implementations. The choice is made from
device, dtype and need of gradients; `impl=` or the environment variable GEN_FAST_IMPL forces one.
GEN_FAST_IMPL may list several, comma-separated: each op takes the first it has. A forced
implementation that is missing is an error: results are never silently computed another way.
"""

import importlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gen_fast.errors import ImplementationError

logger = logging.getLogger(__name__)

OP_NAMES = ("append", "attention", "norm", "pool", "rope", "swiglu")


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op, and what it is for. Empty tuples mean any."""

    function: Callable[..., Any]
    devices: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    differentiable: bool = True
    missing: Callable[[], str | None] = lambda: None

    def why_not(self, device: str, dtype: torch.dtype | None, gradient: bool) -> str | None:
        """Why it cannot run for such an input, or None if it can."""
        if self.devices and device not in self.devices:
            return f"runs on {', '.join(self.devices)}, not on {device}"
        if self.dtypes and dtype is not None and dtype not in self.dtypes:
            return f"does not take {dtype}"
        if gradient and not self.differentiable:
            return "has no gradient"
        return self.missing()


class Op:
    """One operation and its implementations, in order of preference: the last registered wins."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._implementations: dict[str, Implementation] = {}
        self._chosen: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def register(
        self,
        impl: str,
        devices: tuple[str, ...] = (),
        dtypes: tuple[torch.dtype, ...] = (),
        differentiable: bool = True,
        missing: Callable[[], str | None] = lambda: None,
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Return a decorator that adds `impl`; `missing` says why it is not there, or None."""

        def add(function: Callable[..., Any]) -> Callable[..., Any]:
            self._implementations[impl] = Implementation(
                function, devices, dtypes, differentiable, missing
            )
            return function

        return add

    def implementations(self, device: str, dtype: torch.dtype | None = None) -> list[str]:
        """Names of what can run on `device`, best first."""
        return [
            name
            for name, implementation in reversed(self._implementations.items())
            if implementation.why_not(device, dtype, False) is None
        ]

    def choose(self, impl: str | None, *tensors: Tensor) -> Callable[..., Any]:
        """Return the function for these inputs, judged by the first one's device and dtype.

        Raises ImplementationError if `impl`, or GEN_FAST_IMPL, names one that cannot run.
        """
        first = tensors[0]
        gradient = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        forced = impl or os.environ.get("GEN_FAST_IMPL")
        key = (first.device.type, first.dtype, gradient, forced)
        function = self._chosen.get(key)
        if function is None:
            name = self.chosen(*key)
            logger.info("%s on %s in %s: %s", self.name, first.device.type, first.dtype, name)
            function = self._chosen[key] = self._implementations[name].function
        return function

    def chosen(
        self, device: str, dtype: torch.dtype, gradient: bool = False, forced: str | None = None
    ) -> str:
        """Name of the implementation for such an input; `forced` lists the only ones allowed.

        Raises ImplementationError if none can run.
        """
        names = list(reversed(self._implementations)) if forced is None else forced.split(",")
        reasons = []
        for name in map(str.strip, names):
            implementation = self._implementations.get(name)
            if implementation is None:
                reasons.append(
                    f"{name!r} does not exist; there are {', '.join(self._implementations)}"
                )
                continue
            reason = implementation.why_not(device, dtype, gradient)
            if reason is None:
                return name
            reasons.append(f"{name!r} {reason}")
        raise ImplementationError(f"op {self.name!r}: implementation {'; '.join(reasons)}")


def all_ops() -> dict[str, Op]:
    """Every op by name."""
    return {name: importlib.import_module(f"gen_fast.ops.{name}").OP for name in OP_NAMES}
