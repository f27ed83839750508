"""The ops of the backbone. Each lives in kernels/<op> and is installed as gen_fast.ops.<op>.

An op has a pure-torch `reference` and may have faster implementations. The choice is made from
device and dtype; `impl=` forces one, and so does the environment variable GEN_FAST_IMPL, read when
this module is imported. It may list several, comma-separated: each op takes the first it has. A
forced implementation that is missing is an error: results are never silently computed another way.

Each op is also torch.ops.gen_fast.<name>, with a fake implementation and, where it has one, a
gradient: that is the way under torch.compile. Other calls go straight to the implementation, those
that need a gradient through an autograd function, because the dispatcher costs more than the
smallest calls do.
"""

import importlib
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gen_fast.errors import ImplementationError

logger = logging.getLogger(__name__)

OP_NAMES = (
    "append",
    "attention",
    "distill",
    "dropout",
    "lora_down",
    "norm",
    "pool",
    "qlinear",
    "rope",
    "swiglu",
)

# What runs, and the name users force it by: in `impl=`, in GEN_FAST_IMPL and in `gen-fast info`.
REFERENCE = "reference"  # plain torch, the oracle of the others
SDPA = "sdpa"  # torch's own attention kernel
SCALED_MM = "scaled_mm"  # torch's own product in fp8
CPP = "cpu"  # gen_fast._C
TRITON = "triton"
CUDA = "cuda"  # gen_fast._cuda, CUDA C++

# Read once: to look it up costs as much as a small call.
FORCED = os.environ.get("GEN_FAST_IMPL")

_LIBRARY = torch.library.Library("gen_fast", "FRAGMENT")


@dataclass(frozen=True)
class Case:
    """What an implementation is asked to compute, as far as the choice depends on it."""

    device: str  # torch.device.type of the first argument
    dtype: torch.dtype  # of the first argument
    option: str | None = None  # what the op's `option` takes from the arguments; None for any
    forced: bool = False  # whether the caller has named this implementation


def supports_any(case: Case) -> str | None:
    """What an implementation in plain torch supports."""
    return None


def unsupported(case: Case, device: str, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why an implementation for one device and these dtypes cannot compute `case`, or None."""
    if case.device != device:
        return f"runs on {device}, not on {case.device}"
    return None if case.dtype in dtypes else f"does not take {case.dtype}"


def other_option(case: Case, option: str) -> str | None:
    """Why an implementation for this option alone cannot compute `case`, or None."""
    return None if case.option in (None, option) else f"does not compute {case.option!r}"


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op. `supports` says why it cannot compute a case, or None.

    inference: what runs where no gradient will be asked for: it may give None for a result that
    only the gradient needs.
    """

    name: str
    function: Callable[..., Any]
    inference: Callable[..., Any]
    supports: Callable[[Case], str | None]


class Op:
    """One operation and its implementations, in order of preference: the last registered wins."""

    def __init__(
        self,
        name: str,
        schema: str,
        fake: Callable[..., Any],
        backward: "Op | None" = None,
        check: Callable[..., None] = lambda *arguments: None,
        option: Callable[..., str] | None = None,
        options: type | None = None,
    ) -> None:
        """Define torch.ops.gen_fast.<name>.

        schema: arguments and results as torch.library writes them; `impl` is added. The first
        argument's device and dtype choose the implementation. fake(*arguments): empty results.
        backward: the op of its gradient. check(*arguments) raises OpError for what no
        implementation takes: some read and write by address alone. option(*arguments): what else
        the choice depends on, a mask or a format; it must be cheap.
        options: a dataclass whose fields are the last arguments of the schema. All functions of the
        op then take an instance in their place, and so does calling it; only torch.ops is flat.
        """
        self.name = name
        self.backward = backward
        self._check = check
        self._option = option
        self._options = options
        self._names = () if options is None else tuple(field.name for field in fields(options))
        self._implementations: dict[str, Implementation] = {}
        self._choices: dict[tuple[Any, ...], Implementation] = {}
        arguments, results = schema.split(" -> ")
        _LIBRARY.define(f"{name}{arguments.removesuffix(')')}, *, str? impl=None) -> {results}")
        _LIBRARY.impl(
            name,
            self._run_flat,
            "CompositeExplicitAutograd",
        )
        torch.library.register_fake(
            f"gen_fast::{name}",
            lambda *args, impl=None: fake(*self._structured(args)),
            lib=_LIBRARY,
        )
        self.torch_op = getattr(torch.ops.gen_fast, name).default

    def flat(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments as torch.ops takes them."""
        if self._options is None:
            return args
        options = args[-1]
        return *args[:-1], *[getattr(options, name) for name in self._names]

    def _structured(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The opposite of `flat`."""
        if self._options is None:
            return args
        count = len(args) - len(self._names)
        return args[:count] + (self._options(*args[count:]),)  # noqa: RUF005, twice as fast

    def differentiate(
        self,
        save: Callable[[Any, tuple[Any, ...], Any], None],
        gradient: Callable[..., tuple[Tensor | None, ...]],
    ) -> None:
        """Register the gradient: save(ctx, inputs, output), gradient(ctx, *grads) -> per input.

        Both count `options` as one input.
        """

        self._save, self._gradient = save, gradient

        def setup_context(
            ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any
        ) -> None:
            ctx.impl, ctx.dispatched = keyword_only_inputs["impl"], True
            save(ctx, self._structured(inputs), output)

        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            result = gradient(ctx, *grads)
            if self._options is None:
                return result
            return *result[:-1], *(None,) * len(self._names)

        torch.library.register_autograd(
            f"gen_fast::{self.name}", backward, setup_context=setup_context, lib=_LIBRARY
        )

    def __call__(self, *args: Any, impl: str | None = None, inplace: bool = False) -> Any:
        """Run the op on positional arguments; `impl` forces an implementation.

        inplace: the caller gives up the one argument that the op's function names (the residual of
        norm, x of rope), so the implementation may write a result over it. It need not: the
        reference of rope, an input whose rows are not adjacent, autograd and torch.compile all give
        a new tensor. So the caller must use the result and never read the argument again, nor any
        view that shares its memory; and the argument must not be saved for a gradient.
        Raises ImplementationError if `impl`, or GEN_FAST_IMPL, names one that cannot run.
        """
        if torch.compiler.is_compiling():
            return self.torch_op(*self.flat(args), impl=impl)
        if torch.is_grad_enabled() and needs_gradient(args):
            if self.backward is None:
                raise ImplementationError(f"op {self.name!r} has no gradient")
            # Better now than in the middle of the backward pass.
            self.backward._choice(args[0], self._option and self._option(*args), impl)
            return _Differentiated.apply(*args, (self, impl))  # type: ignore[no-untyped-call]
        function = self._checked(args, impl).inference
        return self._on_device(partial(function, inplace=True) if inplace else function, args)

    def in_backward(self, ctx: Any, *args: Any) -> Any:
        """Run this op for a `gradient`, on the way that its forward pass took."""
        if ctx.dispatched:
            return self.torch_op(*self.flat(args), impl=ctx.impl)
        return self(*args, impl=ctx.impl)

    def _run_flat(self, *args: Any, impl: str | None = None) -> Any:
        args = self._structured(args)
        return self._on_device(self._checked(args, impl).function, args)

    def _checked(self, args: tuple[Any, ...], impl: str | None) -> Implementation:
        self._check(*args)
        return self._choice(args[0], self._option and self._option(*args), impl)

    @staticmethod
    def _on_device(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        first = args[0]
        if first.is_cuda and first.device.index != torch.cuda.current_device():
            with torch.cuda.device(first.device):  # kernels go to the current one
                return function(*args)
        return function(*args)

    def register(
        self,
        impl: str,
        supports: Callable[[Case], str | None] = supports_any,
        inference: Callable[..., Any] | None = None,
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Return a decorator that adds `impl`; the arguments are those of Implementation.

        supports is asked once for each case.
        """

        def add(function: Callable[..., Any]) -> Callable[..., Any]:
            self._implementations[impl] = Implementation(
                impl, function, inference or function, supports
            )
            return function

        return add

    def implementations(self, device: str, dtype: torch.dtype = torch.float32) -> list[str]:
        """Names of what can run on `device`, forced if need be, best first."""
        case = Case(device, dtype, forced=True)
        return [
            name
            for name, implementation in reversed(self._implementations.items())
            if implementation.supports(case) is None
        ]

    def _choice(self, first: Tensor, option: str | None, impl: str | None) -> Implementation:
        # To ask a tensor for its device object is slow.
        device = "cpu" if first.is_cpu else first.device.type
        return self.choose(device, first.dtype, option, impl)

    def choose(
        self, device: str, dtype: torch.dtype, option: str | None = None, impl: str | None = None
    ) -> Implementation:
        """The best implementation for a first argument of that device and dtype.

        `impl`, or else GEN_FAST_IMPL, lists the only ones allowed. The choice is made once.
        Raises ImplementationError if none can run.
        """
        forced = impl or FORCED
        key = (device, dtype, option, forced)
        choice = self._choices.get(key)
        if choice is None:
            case = Case(device, dtype, option, forced is not None)
            choice = self._choices[key] = self._first_of(case, forced)
            logger.info("%s on %s in %s: %s", self.name, device, dtype, choice.name)
        return choice

    def _first_of(self, case: Case, forced: str | None) -> Implementation:
        names = list(reversed(self._implementations)) if forced is None else forced.split(",")
        reasons = []
        for name in map(str.strip, names):
            implementation = self._implementations.get(name)
            if implementation is None:
                reasons.append(
                    f"{name!r} does not exist; there are {', '.join(self._implementations)}"
                )
                continue
            reason = implementation.supports(case)
            if reason is None:
                return implementation
            reasons.append(f"{name!r} {reason}")
        raise ImplementationError(f"op {self.name!r}: implementation {'; '.join(reasons)}")


class _Differentiated(torch.autograd.Function):
    """Any op and its gradient; the last argument is (op, impl)."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        *args, (op, ctx.impl) = inputs
        ctx.op, ctx.dispatched = op, False
        output = op._on_device(op._checked(args, ctx.impl).function, args)
        op._save(ctx, tuple(args), output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.op._gradient(ctx, *grads), None


def needs_gradient(args: Iterable[Any]) -> bool:
    """Whether any of `args` is a tensor that requires a gradient."""
    return any(isinstance(x, Tensor) and x.requires_grad for x in args)


def all_ops() -> dict[str, Op]:
    """Every op by name."""
    return {name: importlib.import_module(f"gen_fast.ops.{name}").OP for name in OP_NAMES}
