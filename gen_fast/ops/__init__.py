"""The ops of the backbone. Each lives in kernels/<op> and is installed as gen_fast.ops.<op>.

An op has a pure-torch `reference` and may have faster implementations. The choice is made from
the device of the input; `impl=` or the environment variable GEN_FAST_IMPL forces one. GEN_FAST_IMPL
may list several, comma-separated: each op takes the first it has. A forced implementation that is
missing is an error: results are never silently computed another way.
"""

import logging
import os
from collections.abc import Callable, Iterable
from typing import Any

from gen_fast.errors import ImplementationError

logger = logging.getLogger(__name__)

OP_NAMES = ("append", "attention", "norm", "pool", "rope", "swiglu")


class Op:
    """One operation and its implementations, in order of preference.

    `register(name, devices, available)` adds an implementation; the last one registered for a
    device wins the automatic choice. `available` says why it cannot run, or None if it can.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._functions: dict[str, Callable[..., Any]] = {}
        self._devices: dict[str, tuple[str, ...]] = {}
        self._available: dict[str, Callable[[], str | None]] = {}
        self._chosen: dict[tuple[str, str | None], Callable[..., Any]] = {}

    def register(
        self,
        impl: str,
        devices: Iterable[str] = (),
        available: Callable[[], str | None] = lambda: None,
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Return a decorator that adds `impl`, for the given device types (all if empty)."""

        def add(function: Callable[..., Any]) -> Callable[..., Any]:
            self._functions[impl] = function
            self._devices[impl] = tuple(devices)
            self._available[impl] = available
            return function

        return add

    def implementations(self, device_type: str) -> list[str]:
        """Names of the implementations that can run on `device_type`, best first."""
        return [
            name
            for name in reversed(self._functions)
            if self._why_not(name, device_type) is None
        ]

    def choose(self, device_type: str, impl: str | None = None) -> Callable[..., Any]:
        """Return the function to call for an input on `device_type`.

        Raises ImplementationError if `impl`, or GEN_FAST_IMPL, names one that cannot run.
        """
        forced = impl or os.environ.get("GEN_FAST_IMPL")
        function = self._chosen.get((device_type, forced))
        if function is None:
            function = self._resolve(device_type, forced)
            self._chosen[device_type, forced] = function
        return function

    def _resolve(self, device_type: str, forced: str | None) -> Callable[..., Any]:
        if forced is None:
            name = self.implementations(device_type)[0]
            logger.info("%s on %s: %s", self.name, device_type, name)
            return self._functions[name]
        reasons = []
        for name in (part.strip() for part in forced.split(",")):
            why_not = self._why_not(name, device_type)
            if why_not is None:
                return self._functions[name]
            reasons.append(f"implementation {name!r} {why_not}")
        raise ImplementationError(f"op {self.name!r}: {'; '.join(reasons)}")

    def _why_not(self, name: str, device_type: str) -> str | None:
        if name not in self._functions:
            return f"does not exist; there are {', '.join(self._functions)}"
        devices = self._devices[name]
        if devices and device_type not in devices:
            return f"runs on {', '.join(devices)}, not on {device_type}"
        return self._available[name]()
