"""The ops of the backbone. Each lives in kernels/<op> and is installed as gen_fast.ops.<op>.

An op has a pure-torch `reference` and may have faster implementations. The choice is made from
device and dtype; `impl=` forces one, and so does the environment variable GEN_FAST_IMPL, read when
this module is imported. It may list several, comma-separated: each op takes the first it has. A
forced implementation that is missing is an error: results are never silently computed another way.

Each op is also torch.ops.gen_fast.<name>, with a fake implementation and, where it has one, a
gradient: that is the way under torch.compile and wherever a gradient is asked for. A call that
needs neither goes straight to the implementation, because the dispatcher costs more than the
smallest calls do.
"""

import importlib
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gen_fast.errors import ImplementationError

logger = logging.getLogger(__name__)

OP_NAMES = ("append", "attention", "distill", "norm", "pool", "qlinear", "rope", "swiglu")

# Read once: to look it up costs as much as a small call.
FORCED = os.environ.get("GEN_FAST_IMPL")

_LIBRARY = torch.library.Library("gen_fast", "FRAGMENT")


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op, and what it is for. Empty tuples mean any."""

    function: Callable[..., Any]
    devices: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    variants: tuple[str, ...] = ()
    only_forced: tuple[str, ...] = ()
    missing: Callable[[], str | None] = lambda: None
    refuses: Callable[[str, str], str | None] = lambda device, variant: None

    def why_not(
        self, device: str, dtype: torch.dtype | None, variant: str, forced: bool
    ) -> str | None:
        """Why it cannot run for such an input, or None if it can."""
        if forced and device in self.only_forced:
            return self.missing()
        if self.devices and device not in self.devices:
            return f"runs on {', '.join(self.devices)}, not on {device}"
        if self.dtypes and dtype is not None and dtype not in self.dtypes:
            return f"does not take {dtype}"
        if self.variants and variant and variant not in self.variants:
            return f"does not compute {variant!r}"
        return self.missing() or self.refuses(device, variant)


class Op:
    """One operation and its implementations, in order of preference: the last registered wins."""

    def __init__(
        self,
        name: str,
        schema: str,
        fake: Callable[..., Any],
        backward: "Op | None" = None,
        check: Callable[..., None] = lambda *arguments: None,
    ) -> None:
        """Define torch.ops.gen_fast.<name>.

        schema: arguments and results as torch.library writes them; `impl` is added. The first
        argument's device and dtype choose the implementation; a str argument named `variant` may
        narrow the choice. fake(*arguments): empty results. backward: the op of its gradient.
        check(*arguments) raises OpError for what no implementation takes: some read and write by
        address alone.
        """
        self.name = name
        self.backward = backward
        self._check = check
        self._implementations: dict[str, Implementation] = {}
        self._chosen: dict[tuple[Any, ...], Callable[..., Any]] = {}
        arguments, results = schema.split(" -> ")
        _LIBRARY.define(f"{name}{arguments.removesuffix(')')}, *, str? impl=None) -> {results}")
        _LIBRARY.impl(name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(
            f"gen_fast::{name}", lambda *args, impl=None: fake(*args), lib=_LIBRARY
        )
        self.torch_op = getattr(torch.ops.gen_fast, name).default
        names = [argument.name for argument in self.torch_op._schema.arguments]
        self._variant = names.index("variant") if "variant" in names else None

    def differentiate(
        self,
        save: Callable[[Any, tuple[Any, ...], Any], None],
        gradient: Callable[..., tuple[Tensor | None, ...]],
    ) -> None:
        """Register the gradient: save(ctx, inputs, output), gradient(ctx, *grads) -> per input."""

        def setup_context(
            ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any
        ) -> None:
            ctx.impl = keyword_only_inputs["impl"]
            save(ctx, inputs, output)

        torch.library.register_autograd(
            f"gen_fast::{self.name}", gradient, setup_context=setup_context, lib=_LIBRARY
        )

    def __call__(self, *args: Any, impl: str | None = None, inplace: bool = False) -> Any:
        """Run the op on positional arguments; `impl` forces an implementation.

        inplace: the caller no longer needs the tensor that the op's function names, so the result
        may be written into it. Under autograd and torch.compile the result is always new.
        Raises ImplementationError if `impl`, or GEN_FAST_IMPL, names one that cannot run.
        """
        if torch.compiler.is_compiling():
            return self.torch_op(*args, impl=impl)
        if torch.is_grad_enabled() and needs_gradient(args):
            if self.backward is None:
                raise ImplementationError(f"op {self.name!r} has no gradient")
            # Better now than in the middle of the backward pass.
            self.backward.choose_for(impl, args[0], self._variant_of(args))
            return self.torch_op(*args, impl=impl)
        return self._run(*args, impl=impl, inplace=inplace)

    def _run(self, *args: Any, impl: str | None = None, inplace: bool = False) -> Any:
        self._check(*args)
        first = args[0]
        function = self.choose_for(impl, first, self._variant_of(args))
        if inplace:
            function = partial(function, inplace=True)
        if first.is_cuda and first.device.index != torch.cuda.current_device():
            with torch.cuda.device(first.device):  # kernels go to the current one
                return function(*args)
        return function(*args)

    def register(
        self,
        impl: str,
        devices: tuple[str, ...] = (),
        dtypes: tuple[torch.dtype, ...] = (),
        variants: tuple[str, ...] = (),
        only_forced: tuple[str, ...] = (),
        missing: Callable[[], str | None] = lambda: None,
        refuses: Callable[[str, str], str | None] = lambda device, variant: None,
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Return a decorator that adds `impl`.

        only_forced: devices where it runs if asked for and is never chosen (an emulation).
        missing() says why it is not there, or None; refuses(device, variant) why the device cannot
        compute a variant, or None.
        """

        def add(function: Callable[..., Any]) -> Callable[..., Any]:
            self._implementations[impl] = Implementation(
                function, devices, dtypes, variants, only_forced, missing, refuses
            )
            return function

        return add

    def implementations(self, device: str, dtype: torch.dtype | None = None) -> list[str]:
        """Names of what can run on `device`, best first."""
        return [
            name
            for name, implementation in reversed(self._implementations.items())
            if implementation.why_not(device, dtype, "", True) is None
        ]

    def _variant_of(self, args: tuple[Any, ...]) -> str:
        return "" if self._variant is None else args[self._variant]

    def choose_for(self, impl: str | None, first: Tensor, variant: str = "") -> Callable[..., Any]:
        """Return the function for a first argument, by its device and dtype, and a variant.

        Raises ImplementationError if `impl`, or GEN_FAST_IMPL, names one that cannot run.
        """
        forced = impl or FORCED
        device = "cpu" if first.is_cpu else first.device.type  # a device is slow to ask
        key = (device, first.dtype, variant, forced)
        function = self._chosen.get(key)
        if function is None:
            name = self.chosen(*key)
            logger.info("%s on %s in %s: %s", self.name, device, first.dtype, name)
            function = self._chosen[key] = self._implementations[name].function
        return function

    def chosen(
        self, device: str, dtype: torch.dtype, variant: str = "", forced: str | None = None
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
            reason = implementation.why_not(device, dtype, variant, forced is not None)
            if reason is None:
                return name
            reasons.append(f"{name!r} {reason}")
        raise ImplementationError(f"op {self.name!r}: implementation {'; '.join(reasons)}")


def needs_gradient(args: Iterable[Any]) -> bool:
    """Whether any of `args` is a tensor that requires a gradient."""
    return any(isinstance(x, Tensor) and x.requires_grad for x in args)


def all_ops() -> dict[str, Op]:
    """Every op by name."""
    return {name: importlib.import_module(f"gen_fast.ops.{name}").OP for name in OP_NAMES}
