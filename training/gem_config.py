"""Settings of GEM's training (arXiv 2506.04344)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from gen_fast.errors import ConfigError
from gen_fast.formats.gem import POOLINGS, Settings
from gen_fast.training.adapted_config import AdaptedConfig
from gen_fast.training.choices import FORMS, SPECIAL_INITS

# Of e to the power of λ, the scale of the cosines. Source: CLIP, arXiv 2103.00020.
LARGEST_SCALE = 100.0
# The paper's, of LoRA factors and of special tokens.
LEARNING_RATE = 1e-4
# Of the weights themselves: Llama 2's for supervised fine-tuning, with a cosine (arXiv 2307.09288,
# §3.1). Weights take rates about a tenth of those of LoRA factors (Biderman et al.,
# arXiv 2405.09673).
FULL_LEARNING_RATE = 2e-5


@dataclass(frozen=True)
class GEMConfig(AdaptedConfig):
    """Settings of a run of GEM: LoRA factors and special tokens, over texts.

    The defaults are those of the paper but for `alpha`, which there is 1 and drops the next-token
    loss, for LoRA, whose sizes it does not say, and for `full`.

    full: train the weights of the linears (queries, keys, values, output, gate, up, down) in place
    of LoRA factors; embedding, norms and head stay frozen. learning_rate is then
    FULL_LEARNING_RATE by default, and special_learning_rate LEARNING_RATE: special tokens are as
    new as beside factors. weight_decay stays 0: it draws weights to 0, not to where they began.

    n_special: special tokens, m. special_init: where their embeddings begin, see special_rows.
    max_length: tokens of a text with its special tokens; where it is reconstructed it follows once
    more. form: "reconstruct" puts the special tokens between a text and the same text, "insert" at
    a random place in it. plain_probability: of a text that is read as it is, with the causal mask.
    alpha: weight of the contrastive loss beside 1 - alpha of the next-token loss: 0 in the first
    alpha_start_step steps, then rising over alpha_ramp_steps; 0 of these is a step.
    base_weight: of KL(base‖model) of the next token in plain texts, beside these two losses: the
    model goes on telling them as before it was trained. It takes one more pass over them; 0 leaves
    it out, and so does the paper.
    drop_rate: share of the tokens that the other view of a text lacks. contrastive_scale: of the
    cosines at first; it is trained. pooling: of the special tokens' states, "mean" or "concat".
    special_learning_rate: of the special tokens; None is learning_rate, but with full.
    contrastive_learning_rate: learning_rate from alpha_start_step on, to which the others keep
    their ratio; None leaves them.
    schedule_steps: None is `steps`.
    """

    full: bool = False
    n_special: int = 10
    special_init: str = "draw"
    form: str = "reconstruct"
    plain_probability: float = 0.8
    alpha: float = 0.5
    alpha_start_step: int = 100
    alpha_ramp_steps: int = 0
    base_weight: float = 0.0
    drop_rate: float = 0.1
    contrastive_scale: float = 20.0
    pooling: str = "mean"
    special_learning_rate: float | None = None
    contrastive_learning_rate: float | None = None
    max_length: int = 512
    learning_rate: float = None  # type: ignore[assignment]
    schedule: str = "cosine"
    schedule_steps: int = None  # type: ignore[assignment]

    LORA: ClassVar[Mapping[str, float]] = {**AdaptedConfig.LORA, "lora_dropout": 0.0}
    CHOICES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **AdaptedConfig.CHOICES,
        "form": FORMS,
        "pooling": POOLINGS,
        "special_init": SPECIAL_INITS,
    }
    POSITIVE = (
        "n_special",
        "special_learning_rate",
        "contrastive_learning_rate",
        *AdaptedConfig.POSITIVE,
    )

    def __post_init__(self) -> None:
        if self.schedule_steps is None:
            object.__setattr__(self, "schedule_steps", self.steps)
        if self.learning_rate is None:
            rate = FULL_LEARNING_RATE if self.full else LEARNING_RATE
            object.__setattr__(self, "learning_rate", rate)
        if self.special_learning_rate is None and self.full:
            object.__setattr__(self, "special_learning_rate", LEARNING_RATE)
        super().__post_init__()
        for name in ("plain_probability", "alpha"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be in [0, 1], not {getattr(self, name)}")
        if not 0 < self.drop_rate < 1:
            raise ConfigError(
                f"drop_rate must be between 0 and 1, not {self.drop_rate}: two views that are the "
                "same teach nothing"
            )
        for name in ("alpha_start_step", "alpha_ramp_steps", "base_weight"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, not {getattr(self, name)}")
        if not 1 <= self.contrastive_scale <= LARGEST_SCALE:
            raise ConfigError(
                f"contrastive_scale must be in [1, {LARGEST_SCALE:g}], not {self.contrastive_scale}"
            )
        if self.max_length < self.n_special + 2:
            raise ConfigError(
                f"{self.n_special} special tokens leave no two of a text in max_length "
                f"{self.max_length}"
            )

    def alpha_at(self, step: int) -> float:
        """Weight of the contrastive loss in a step, counted from 0."""
        since = step - self.alpha_start_step
        if since < 0:
            return 0.0
        return self.alpha * min(1.0, (since + 1) / max(1, self.alpha_ramp_steps))

    @property
    def trains_lora(self) -> bool:
        """See AdaptedConfig."""
        return not self.full

    @property
    def encoding(self) -> Settings:
        """How texts are embedded with what is trained."""
        return Settings(self.n_special, self.pooling, self.max_length, self.form)
