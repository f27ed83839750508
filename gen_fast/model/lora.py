"""LoRA: trained low-rank updates of a frozen backbone's linears.

y = x·Wᵀ + s·(x·Aᵀ)·Bᵀ for each linear (Hu et al., arXiv 2106.09685). The backbone multiplies
queries, keys and values by one matrix, and gate and up by one; every part of it has factors of its
own, so that they are the adapter that PEFT knows. The backbone's weights stay as they are, also
packed; gradients reach the factors and the input.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gen_fast.errors import AdapterError, BackboneMismatchError, ConfigError
from gen_fast.model.config import BackboneConfig
from gen_fast.model.dropout import RowDropout
from gen_fast.model.linear import linear, times

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


Drop = Callable[[Tensor], Tensor]


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
    """The factors of one adapter over a backbone of these sizes, float32, trainable.

    They begin as in PEFT: A uniform in ±1/√in, B zero, so that nothing is changed at first.
    names: every updated linear, as "layers.3.self_attn.q_proj", in a fixed order.
    """

    def __init__(
        self, config: LoraConfig, backbone: BackboneConfig, *, seed: int = 0, device: Any = "cpu"
    ) -> None:
        super().__init__()
        self.config = config
        self.names = tuple(linear_sizes(backbone, config.modules))
        generator = torch.Generator().manual_seed(seed)
        down, up = [], []
        for rows, columns in linear_sizes(backbone, config.modules).values():
            a = torch.empty(config.rank, columns)
            a.uniform_(-(columns**-0.5), columns**-0.5, generator=generator)
            down.append(nn.Parameter(a.to(device)))
            up.append(nn.Parameter(torch.zeros(rows, config.rank, device=device)))
        self.a = nn.ParameterList(down)
        self.b = nn.ParameterList(up)
        self._where = {name: i for i, name in enumerate(self.names)}
        self._widths = {
            name.removeprefix("layers.0."): out
            for name, (out, _) in linear_sizes(backbone).items()
            if name.startswith("layers.0.")
        }

    @classmethod
    def from_factors(
        cls, config: LoraConfig, backbone: BackboneConfig, factors: Mapping[str, Factors]
    ) -> "Lora":
        """An adapter with these factors by name. Raises AdapterError if they do not fit."""
        lora = cls(config, backbone)
        lora.copy_factors(factors)
        return lora

    def factors(self) -> dict[str, Factors]:
        """A and B of every linear, by name: views of the parameters."""
        return {
            name: (a.detach(), b.detach())
            for name, a, b in zip(self.names, self.a, self.b, strict=True)
        }

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

    def linear(
        self,
        layer: int,
        matrix: str,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        drop: RowDropout | None = None,
    ) -> Tensor:
        """x [T, in] through a frozen matrix of a layer and the updates of its parts: [T, out].

        matrix: a name of MATRICES; weight [out, in], plain or packed. Gradients reach x and the
        factors. drop: of x on the way to A, for each part anew.
        """
        tensors, spans, streams, start = [], [], [], 0
        for part in MATRICES[matrix]:
            name, width = f"layers.{layer}.{part}", self._widths[part]
            if name in self._where:
                place = self._where[name]
                tensors += [self.a[place], self.b[place]]
                spans.append((start, width))
                streams.append(layer * len(MODULES) + MODULES.index(part.split(".")[1]))
            start += width
        if not spans:
            return linear(x, weight, bias)
        drops = None if drop is None else [partial(drop, stream=stream) for stream in streams]
        result: Tensor = _LoraLinear.apply(
            x, weight, bias, spans, self.config.scale, drops, *tensors
        )  # type: ignore[no-untyped-call]
        return result


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
    """Saves x, and x·Aᵀ [T, r] of each part. What is dropped of x is dropped again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        spans: Sequence[tuple[int, int]],
        scale: float,
        drops: Sequence[Drop] | None,
        *factors: Tensor,
    ) -> Tensor:
        y = linear(x, weight, bias)
        downs, ups = ([f.to(x.dtype) for f in factors[i::2]] for i in (0, 1))
        if drops is None:
            inner = x @ torch.cat(downs).T  # one product for the parts that share their input
        else:
            inner = torch.cat([drop(x) @ a.T for drop, a in zip(drops, downs, strict=True)], 1)
        for (start, width), part, up in zip(
            spans, inner.split([len(a) for a in downs], 1), ups, strict=True
        ):
            y[:, start : start + width].addmm_(part, up.T, alpha=scale)
        ctx.weight, ctx.spans, ctx.scale, ctx.drops = weight, spans, scale, drops
        ctx.save_for_backward(x, inner, *factors)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, *factors = ctx.saved_tensors
        downs, ups = ([f.to(x.dtype) for f in factors[i::2]] for i in (0, 1))
        ranks = [len(a) for a in downs]
        dinner = torch.empty_like(inner)  # [T, parts · r]
        dups = []
        for (start, width), part, dpart, up in zip(
            ctx.spans, inner.split(ranks, 1), dinner.split(ranks, 1), ups, strict=True
        ):
            dy = grad[:, start : start + width]
            torch.mul(dy @ up, ctx.scale, out=dpart)
            dups.append((dy.T @ part).float().mul_(ctx.scale))
        dx = times(grad, ctx.weight) if ctx.needs_input_grad[0] else None
        if ctx.drops is None:
            ddowns = list((dinner.T @ x).float().split(ranks))
            if dx is not None:
                dx.addmm_(dinner, torch.cat(downs))
        else:
            ddowns = []
            for drop, dpart, a in zip(ctx.drops, dinner.split(ranks, 1), downs, strict=True):
                ddowns.append((dpart.T @ drop(x)).float())
                if dx is not None:
                    dx += drop(dpart @ a)
        pairs = (gradient for pair in zip(ddowns, dups, strict=True) for gradient in pair)
        return dx, None, None, None, None, None, *pairs
