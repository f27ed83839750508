"""LoRA: trained low-rank updates of a frozen backbone's linears.

y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ for each linear (Hu et al., arXiv 2106.09685). The backbone multiplies
queries, keys and values by one matrix, and gate and up by one; every part of it has factors of its
own, so that they are the adapter that PEFT knows. The backbone's weights stay as they are, also
packed; gradients reach the factors and the input.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gen_fast.errors import AdapterError, BackboneMismatchError, ConfigError
from gen_fast.model.config import BackboneConfig
from gen_fast.model.dropout import RowDropout
from gen_fast.model.linear import linear, times
from gen_fast.model.update import FrozenLinear
from gen_fast.ops.dense import product
from gen_fast.ops.lora_down import Dropped, lora_down, lora_down_backward

# The linears that can be updated, by the matrix of LayerWeights that each is a part of, in the
# order of its rows.
MATRICES = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
MODULES = tuple(module.split(".")[1] for parts in MATRICES.values() for module in parts)


@dataclass(frozen=True)
class LoraConfig:
    """Sizes of an adapter. The defaults are those of LLM2Vec (arXiv 2404.05961, appendix D).

    rank: r. alpha: the update is scaled by s = alpha / r, or by alpha / √r if rank_stabilized
    (arXiv 2312.03732). dropout: of the linears' inputs on the way to A, in training. modules: the
    linears that are updated, of MODULES. Raises ConfigError.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    modules: tuple[str, ...] = MODULES
    rank_stabilized: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 <= self.dropout < 1:
            raise ConfigError(
                f"LoRA: rank {self.rank} must be at least 1, dropout {self.dropout} in [0, 1)"
            )
        unknown = sorted(set(self.modules) - set(MODULES))
        if unknown or not self.modules:
            raise ConfigError(
                f"LoRA: modules must be some of {', '.join(MODULES)}, not {unknown or 'none'}"
            )

    @property
    def scale(self) -> float:
        """s."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)


Factors = tuple[Tensor, Tensor]
"""A [r, in] and B [out, r]."""


@dataclass(frozen=True)
class LoraWeights:
    """What one adapter adds to the linears of a backbone, apart from it.

    factors: A [r, in] and B [out, r], float32, of every updated linear, by name, such as
    "layers.3.self_attn.q_proj".
    """

    config: LoraConfig
    factors: Mapping[str, Factors]

    def check_backbone(self, backbone: BackboneConfig) -> None:
        """Raise BackboneMismatchError, naming what differs, if it belongs to another backbone."""
        sizes = linear_sizes(backbone, self.config.modules)
        foreign = sorted(set(self.factors) - set(sizes))
        missing = sorted(set(sizes) - set(self.factors))
        if foreign or missing:
            problem = f"updates {foreign[0]!r}" if foreign else f"does not update {missing[0]!r}"
            raise BackboneMismatchError(
                f"the adapter {problem}: it was trained for another backbone than this one of "
                f"{backbone.num_layers} layers"
            )
        for name, (rows, columns) in sizes.items():
            a, b = self.factors[name]
            if (len(b), a.shape[1]) != (rows, columns):
                raise BackboneMismatchError(
                    f"the adapter updates {name!r} as a matrix {[len(b), a.shape[1]]}, this "
                    f"backbone has {[rows, columns]}: it was trained for another one"
                )

    def sha256(self) -> str:
        """Tells one adapter from another: 16 hexadecimal digits over scale and factors."""
        digest = hashlib.sha256(f"{self.config.scale}".encode())
        for name, pair in sorted(self.factors.items()):
            digest.update(name.encode())
            for factor in pair:
                digest.update(factor.detach().cpu().float().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """W + s·B·A, at least float32, of a linear [out, in]; one that is not updated as it is."""
        if name not in self.factors:
            return weight
        a, b = self.factors[name]
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return wide + (b @ a).to(wide) * self.config.scale


class Lora(nn.Module):
    """The factors of one adapter over a backbone of these sizes, float32, trainable: an Update.

    They begin as in PEFT: A uniform in ±1/√in, B zero, so that nothing is changed at first.
    names: every updated linear, as "layers.3.self_attn.q_proj", in a fixed order.
    a, b: those of the linears that are parts of one matrix are one parameter, one below the other:
    A [parts · r, in] and B [their rows, r]. So a step has few tensors to launch work for.
    """

    def __init__(
        self, config: LoraConfig, backbone: BackboneConfig, *, seed: int = 0, device: Any = "cpu"
    ) -> None:
        super().__init__()
        self.config = config
        sizes = linear_sizes(backbone, config.modules)
        self.names = tuple(sizes)
        self._groups = {
            (layer, matrix): group
            for layer in range(backbone.num_layers)
            for matrix in MATRICES
            if (group := _Group.of(layer, matrix, linear_sizes(backbone), config.modules)).names
        }
        generator = torch.Generator().manual_seed(seed)
        self.a, self.b = nn.ParameterList(), nn.ParameterList()
        for group in self._groups.values():
            columns = sizes[group.names[0]][1]
            a = torch.empty(len(group.names) * config.rank, columns)
            a.uniform_(-(columns**-0.5), columns**-0.5, generator=generator)
            self.a.append(nn.Parameter(a.to(device)))
            rows = sum(group.widths)
            self.b.append(nn.Parameter(torch.zeros(rows, config.rank, device=device)))

    @classmethod
    def from_factors(
        cls, config: LoraConfig, backbone: BackboneConfig, factors: Mapping[str, Factors]
    ) -> "Lora":
        """An adapter with these factors by name. Raises AdapterError if they do not fit."""
        lora = cls(config, backbone)
        lora.copy_factors(factors)
        return lora

    @property
    def dropout(self) -> float:
        """See Update."""
        return self.config.dropout

    def factors(self) -> dict[str, Factors]:
        """A and B of every linear, by name: views of the parameters."""
        factors: dict[str, Factors] = {}
        for group, a, b in zip(self._groups.values(), self.a, self.b, strict=True):
            downs = a.detach().split(self.config.rank)
            ups = b.detach().split(group.widths)
            factors |= zip(group.names, zip(downs, ups, strict=True), strict=True)
        return factors

    def weights(self) -> LoraWeights:
        """The adapter apart from its backbone: the factors are views of the parameters."""
        return LoraWeights(self.config, self.factors())

    @torch.no_grad()
    def copy_factors(self, factors: Mapping[str, Factors]) -> None:
        """Take over the factors of another adapter. Raises AdapterError if they do not fit."""
        if set(factors) != set(self.names):
            differing = sorted(set(factors) ^ set(self.names))
            raise AdapterError(
                f"{len(differing)} linears are updated on one side only, such as {differing[0]!r}"
            )
        for name, own in self.factors().items():
            for letter, mine, other in zip("AB", own, factors[name], strict=True):
                if mine.shape != other.shape:
                    raise AdapterError(
                        f"{name}: {letter} has shape {list(other.shape)}, expected "
                        f"{list(mine.shape)}"
                    )
                mine.copy_(other)

    def cast(self, dtype: torch.dtype) -> "CastLora":
        """See Update."""
        return CastLora(self, dtype)


class CastLora:
    """A's and s·B's of a Lora in the dtype of a pass, made by a few launches for all linears."""

    def __init__(self, lora: Lora, dtype: torch.dtype) -> None:
        self._groups = {}
        with torch.no_grad():
            downs = _cast(list(lora.a), dtype)
            ups = _cast(list(lora.b), dtype, lora.config.scale)
        for place, (key, group) in enumerate(lora._groups.items()):
            tensors = lora.a[place], lora.b[place], downs[place], ups[place]
            self._groups[key] = group, tensors
        self._scale = lora.config.scale

    def linear(self, x: Tensor, frozen: FrozenLinear, drop: RowDropout | None = None) -> Tensor:
        """See CastUpdate. drop: of x on the way to A, for each part anew."""
        group, tensors = self._groups.get(frozen.key, (None, ()))
        if group is None:
            return linear(x, frozen.weight, frozen.bias)
        result: Tensor = _LoraLinear.apply(  # type: ignore[no-untyped-call]
            x, frozen.weight, frozen.bias, group, self._scale, drop, *tensors
        )
        return result


@dataclass(frozen=True)
class _Group:
    """The updated linears that are parts of one matrix.

    spans: (first row, rows) of each in the matrix. streams: of the dropout of each one's input.
    """

    names: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]
    streams: tuple[int, ...]

    @classmethod
    def of(
        cls,
        layer: int,
        matrix: str,
        sizes: Mapping[str, tuple[int, int]],
        modules: Sequence[str],
    ) -> "_Group":
        names, spans, streams, start = [], [], [], 0
        for part in MATRICES[matrix]:
            name, module = f"layers.{layer}.{part}", part.split(".")[1]
            width = sizes[name][0]
            if module in modules:
                names.append(name)
                spans.append((start, width))
                streams.append(layer * len(MODULES) + MODULES.index(module))
            start += width
        return cls(tuple(names), tuple(spans), tuple(streams))

    @property
    def widths(self) -> list[int]:
        """Rows of each linear."""
        return [width for _, width in self.spans]


def _cast(tensors: Sequence[Tensor], dtype: torch.dtype, scale: float = 1.0) -> list[Tensor]:
    """Scaled copies in `dtype`, views of one tensor."""
    flat = torch.cat([tensor.flatten() for tensor in tensors]).mul_(scale).to(dtype)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def linear_sizes(
    config: BackboneConfig, modules: Sequence[str] = MODULES
) -> dict[str, tuple[int, int]]:
    """(out, in) of the linears of these kinds, by name, layer by layer."""
    h, f = config.hidden_size, config.intermediate_size
    sizes = {
        "q_proj": (config.q_size, h),
        "k_proj": (config.kv_size, h),
        "v_proj": (config.kv_size, h),
        "o_proj": (h, config.q_size),
        "gate_proj": (f, h),
        "up_proj": (f, h),
        "down_proj": (h, f),
    }
    parts = [part for matrix in MATRICES.values() for part in matrix]
    return {
        f"layers.{layer}.{part}": sizes[part.split(".")[1]]
        for layer in range(config.num_layers)
        for part in parts
        if part.split(".")[1] in modules
    }


class _LoraLinear(torch.autograd.Function):
    """Saves x, and what A makes of it, [T, parts · r]. What is dropped of x is dropped again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        group: _Group,
        scale: float,
        drop: RowDropout | None,
        a: Tensor,
        b: Tensor,
        down: Tensor,
        up: Tensor,
    ) -> Tensor:
        """a, b: the parameters, for their gradients; down, up: A and s·B in x's dtype."""
        y = linear(x, weight, bias)
        # One product for the parts that share their input.
        if drop is None:
            inner = product(x, down)
        else:
            inner = lora_down(x, down, Dropped(*drop.settings, group.streams))
        for (start, width), part, rows in zip(
            group.spans, inner.chunk(len(group.spans), 1), up.split(group.widths), strict=True
        ):
            y[:, start : start + width].addmm_(part, rows.T)
        ctx.weight, ctx.group, ctx.scale, ctx.drop = weight, group, scale, drop
        ctx.down, ctx.up = down, up
        ctx.save_for_backward(x, inner)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, inner = ctx.saved_tensors
        group, down, up = ctx.group, ctx.down, ctx.up
        drop: RowDropout | None = ctx.drop
        dinner, db = torch.empty_like(inner), torch.empty_like(up)
        count = len(group.spans)
        for (start, width), part, dpart, rows, drows in zip(
            group.spans,
            inner.chunk(count, 1),
            dinner.chunk(count, 1),
            up.split(group.widths),
            db.split(group.widths),
            strict=True,
        ):
            dy = grad[:, start : start + width]
            torch.mm(dy, rows, out=dpart)
            torch.mm(dy.T, part, out=drows)
        dx = times(grad, ctx.weight) if ctx.needs_input_grad[0] else None
        if drop is None:
            da = product(dinner.T, x.T)
            if dx is not None:
                dx.addmm_(dinner, down)
        else:
            through, da = lora_down_backward(
                dinner, x, down, Dropped(*drop.settings, group.streams)
            )
            if dx is not None:
                dx += through
        wide = torch.promote_types(db.dtype, torch.float32)
        none = (None,) * 5
        return dx, *none, da.to(wide), db.to(wide).mul_(ctx.scale), None, None
