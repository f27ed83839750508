"""What LLM2Vec's steps have in common, beside the factors that they train."""

from pathlib import Path
from typing import ClassVar

from torch import Tensor

from gen_fast.formats.llm2vec import write_settings
from gen_fast.model.backbone import Backbone
from gen_fast.training.adapted_task import AdaptedTask, Data, Parts
from gen_fast.training.backbone_pass import TrainedBackbone
from gen_fast.training.llm2vec_config import LLM2VecConfig
from gen_fast.training.records import Rejections
from gen_fast.training.world import World


class LLM2VecTask(AdaptedTask):
    """A step of LLM2Vec: LoRA factors alone, one loss, files that say how texts are embedded."""

    TAG: ClassVar[str] = "llm2vec"
    config: LLM2VecConfig

    def __init__(
        self,
        backbone: Backbone,
        config: LLM2VecConfig,
        rejections: Rejections,
        data: Data,
    ) -> None:
        super().__init__(backbone, config, rejections, data)
        self._trained = TrainedBackbone(
            backbone,
            self.linears.update,
            mask=config.mask,
            attention_dropout=config.attention_dropout or 0.0,
            recompute=config.recompute,
        )

    @property
    def title(self) -> str:
        """See AdaptedTask."""
        return f"LLM2Vec, {self.config.step}"

    def save(self, folder: Path) -> None:
        """See Task."""
        super().save(folder)
        if self.config.mask == "bidirectional":
            write_settings(folder, self.config.encoding)

    def _summed(self, loss: Tensor, world: World) -> dict[str, float]:
        """Sum gradients and this rank's share of the loss over the ranks."""
        parameters = list(self.parameters.parameters())
        total = float(world.sum_gradients(parameters, loss.detach().reshape(1))[0])
        return {"total": total, self.config.step: total}


def load_parts(config: LLM2VecConfig) -> Parts:
    """See Parts.load."""
    return Parts.load(config, bidirectional=config.mask == "bidirectional")
