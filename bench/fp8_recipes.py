"""What an embedding loses to fp8 by how rows and weights are prepared for it, beside int8.

    python bench/fp8_recipes.py [--texts 120] [--json FILE]

SmolLM2 in float32 with the shipped adapter and with method `mean`, over the texts of
quantized_quality.py. Rows and weights are rounded as the ops round them, and multiplied in float32.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest import mock

from measure import arguments, reported, save
from quantized_quality import METHODS, MODEL, real_texts, row
from torch import Tensor
from torch.nn.functional import linear

from gen_fast.embed.loading import load
from gen_fast.model import backbone as backbones
from gen_fast.model.backbone import Backbone
from gen_fast.model.calibration_texts import CALIBRATION_TEXTS
from gen_fast.model.int8 import SMOOTHED, largest_inputs, smoothed, tokenized
from gen_fast.model.lora import MATRICES
from gen_fast.model.prefix import PrefixCache
from gen_fast.model.sources import resolve
from gen_fast.model.weights import load_backbone
from gen_fast.ops.qlinear import quantize_rows, rotate_rows
from gen_fast.ops.qlinear.reference import dequantize_rows
from gen_fast.testing import with_layers


@dataclass(frozen=True)
class Recipe:
    """What is done to rows and weights, and which of them are rounded."""

    format: str
    smooth: bool = False
    rotate: bool = False
    rows: bool = True
    weights: bool = True

    def rounded(self, x: Tensor, rounds: bool) -> Tensor:
        """Rows, or the rows of a weight, as a product meets them."""
        x = rotate_rows(x) if self.rotate else x
        if not rounds:
            return x
        return dequantize_rows(*quantize_rows(x, self.format, impl="reference"))

    def applied(self, plain: Backbone, largest: dict[tuple[int, str], Tensor]) -> Backbone:
        """A backbone whose weights are prepared, for `products` to multiply by."""
        layers = []
        for i, layer in enumerate(plain.layers):
            if self.smooth:
                layer = smoothed(layer, {name: largest[i, name] for name in SMOOTHED})
            matrices = {n: self.rounded(getattr(layer, n), self.weights) for n in MATRICES}
            layers.append(replace(layer, **matrices))
        return with_layers(plain, layers)

    @contextmanager
    def products(self) -> Iterator[None]:
        """Backbones multiply so meanwhile."""

        def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            return linear(self.rounded(x, self.rows), weight, bias)

        replaced: Callable[..., Tensor] = product
        with mock.patch.object(backbones, "linear", replaced):
            yield


RECIPES = {
    "plain": Recipe("fp8"),
    "rotated": Recipe("fp8", rotate=True),
    "smoothed": Recipe("fp8", smooth=True),
    "both": Recipe("fp8", smooth=True, rotate=True),
    "rows only": Recipe("fp8", weights=False),
    "weights only": Recipe("fp8", rows=False),
    "int8": Recipe("int8", smooth=True, rotate=True),
}


def main() -> None:
    """Measure and print; write the rows as JSON if asked."""
    parser = arguments(__doc__)
    parser.add_argument("--texts", type=int, default=120)
    args = parser.parse_args()

    texts, directory = real_texts(args.texts), resolve(MODEL)
    plain = load_backbone(directory)
    largest = largest_inputs(plain, tokenized(directory, CALIBRATION_TEXTS), "causal")
    rows = []
    for name, method in METHODS.items():
        encoder = load(MODEL, method=method, dtype="float32", device="cpu")
        truth = encoder.encode(texts, show_progress_bar=False)
        for part, recipe in RECIPES.items():
            encoder.backbone = recipe.applied(plain, largest)
            encoder.prefixes = PrefixCache(encoder.backbone)
            with recipe.products():
                vectors = encoder.encode(texts, show_progress_bar=False)
            rows.append(row(name, recipe.format, part, vectors, truth))
    save(args.json, reported(rows))


if __name__ == "__main__":
    main()
