"""The reference package llm2vec-gen 0.1.3, run by its own classes."""

import json
from pathlib import Path

import numpy as np
import torch

from gen_fast.embed.adapter import Adapter


def write_reference_checkpoint(backbone: Path, target: Path, n_special: int = 10) -> None:
    """Make a checkpoint with the reference package's own classes: random tokens and projections."""
    from llm2vec_gen.models import EncoderDecoderModel, ProjectionModel
    from peft import TrainableTokensConfig, get_peft_model
    from transformers import AutoModel, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    tokenizer.padding_side = "left"
    tokens = [f"<question{i + 1}>" for i in range(n_special)]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    model = AutoModel.from_pretrained(backbone, dtype=torch.float32)
    # Draws the new rows from N(mean, cov) of the table, as the reference's training starts.
    model.resize_token_embeddings(len(tokenizer))
    indices = tokenizer.convert_tokens_to_ids(tokens)
    student = get_peft_model(model, TrainableTokensConfig(token_indices=indices))
    h = model.config.hidden_size
    checkpoint = EncoderDecoderModel(
        student, model, f"last_{n_special}_tokens", ProjectionModel(h, h), ProjectionModel(h, 384)
    )
    target.mkdir(parents=True, exist_ok=True)
    checkpoint.save_pretrained(target)
    tokenizer.save_pretrained(target)
    run = {
        "model_name_or_path": str(backbone),
        "torch_dtype": "float32",
        "special_tokens": tokens,
        "max_input_length": 512,
        "encoding_mode": f"last_{n_special}_tokens",
        "add_reconstruction_mlp": True,
        "add_alignment_mlp": True,
    }
    (target / "run_config.yml").write_text("".join(f"{k}: {v}\n" for k, v in run.items()))


def load_reference(checkpoint: Path, dtype: torch.dtype):
    """Load the reference's model; what transformers 5 no longer has is put back from outside."""
    from llm2vec_gen import LLM2VecGenModel

    model = LLM2VecGenModel.from_pretrained(str(checkpoint))
    config = json.loads((checkpoint / "tokenizer_config.json").read_text())
    # llm2vec-gen 0.1.3 reads tokenizer.additional_special_tokens, gone since transformers 5.0.
    type(model.tokenizer).additional_special_tokens = config["extra_special_tokens"]
    # Its pooling takes the last columns; transformers 5 forgets the padding side on saving.
    model.tokenizer.padding_side = "left"
    model.model.to(dtype).eval()
    return model


class ReferenceTraining:
    """llm2vec-gen 0.1.3's own model and loss, stepped as its scripts/train.py configures it.

    Separate encoder and decoder, trainable tokens through PEFT, full logits, left padding, and
    gradient checkpointing unless told otherwise. Starts from `adapter`'s weights. The teacher's
    vectors are given, as in gen_fast.
    """

    def __init__(
        self, backbone: Path, adapter: Adapter, dtype: torch.dtype, checkpointing: bool = True
    ) -> None:
        from llm2vec_gen.models import EncoderDecoderModel, ProjectionModel
        from peft import TrainableTokensConfig, get_peft_model
        from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(backbone)
        k, h = adapter.special.shape
        encoder = AutoModel.from_pretrained(backbone, dtype=dtype)
        self.first_special = encoder.config.vocab_size
        encoder.resize_token_embeddings(self.first_special + k, mean_resizing=False)
        indices = list(range(self.first_special, self.first_special + k))
        encoder = get_peft_model(encoder, TrainableTokensConfig(token_indices=indices))
        encoder.config.num_special_tokens = k
        decoder = AutoModelForCausalLM.from_pretrained(backbone, dtype=dtype)
        decoder.requires_grad_(False)
        self.reconstruction = ProjectionModel(h, h, dtype=dtype)
        self.alignment = ProjectionModel(h, adapter.dimension, dtype=dtype)
        (self.tokens,) = (p for n, p in encoder.named_parameters() if "trainable_tokens_delta" in n)
        with torch.no_grad():
            self.tokens.copy_(adapter.special)
            for layer, (weight, bias) in (
                (self.reconstruction.projection, adapter.reconstruction),
                (self.alignment.projection, adapter.alignment),
            ):
                layer.weight.copy_(weight)
                layer.bias.copy_(bias)
        self.model = EncoderDecoderModel(
            encoder,
            decoder,
            f"last_{adapter.n_compression}_tokens",
            self.reconstruction,
            self.alignment,
        ).train()
        if checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.k, self.pad, self.dtype = k, tokenizer.eos_token_id, dtype
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=5e-4, weight_decay=0.0)

    def losses(self, examples: list) -> tuple[torch.Tensor, torch.Tensor]:
        """Reconstruction and alignment loss of a batch, as its trainer computes them."""
        specials = np.arange(self.first_special, self.first_special + self.k)
        queries, query_mask = self._padded([np.concatenate((e.query, specials)) for e in examples])
        answers, answer_mask = self._padded([e.answer for e in examples])
        labels = torch.where(answer_mask.bool(), answers, -100)
        states, outputs = self.model(queries, query_mask, answers, answer_mask, labels)
        vectors = torch.from_numpy(np.stack([e.vector for e in examples])).to(self.dtype)
        return outputs["loss"], torch.nn.functional.mse_loss(states.mean(dim=1), vectors)

    def step(self, examples: list) -> None:
        """One update."""
        self.optimizer.zero_grad()
        sum(self.losses(examples)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def _padded(self, rows: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        width = max(len(row) for row in rows)
        ids = np.full((len(rows), width), self.pad, dtype=np.int64)
        mask = np.zeros((len(rows), width), dtype=np.int64)
        for i, row in enumerate(rows):
            ids[i, width - len(row) :] = row
            mask[i, width - len(row) :] = 1
        return torch.from_numpy(ids), torch.from_numpy(mask)
