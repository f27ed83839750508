"""Answers written by the backbone itself, through transformers' generate() over our own weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gen_fast.backbone import Backbone
from gen_fast.weights import load_head


class AnswerGenerator:
    """Greedy answers through the chat template, thinking off, length-sorted in batches.

    The transformers model is built over views of the backbone's tensors: no second copy.
    """

    def __init__(
        self,
        backbone: Backbone,
        directory: str | Path,
        tokenizer: Any,
        *,
        max_new_tokens: int = 128,
        batch_size: int = 32,
    ) -> None:
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self._tokenizer = tokenizer
        self._model = _as_transformers(backbone, Path(directory))

    @torch.inference_mode()
    def answers(self, questions: Sequence[str]) -> list[str]:
        """One answer a question, in order, of at most max_new_tokens tokens."""
        rows = [self._chat_ids(question) for question in questions]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        answers = [""] * len(rows)
        for start in range(0, len(order), self.batch_size):
            members = order[start : start + self.batch_size]
            for i, answer in zip(members, self._generate([rows[i] for i in members]), strict=True):
                answers[i] = answer
        return answers

    def _chat_ids(self, question: str) -> list[int]:
        text = question
        if self._tokenizer.chat_template:
            text = self._tokenizer.apply_chat_template(
                [{"role": "user", "content": question}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=False,
            )
        ids: list[int] = self._tokenizer(
            text, add_special_tokens=not self._tokenizer.chat_template
        ).input_ids
        return ids

    def _generate(self, rows: list[list[int]]) -> list[str]:
        device = self._model.device
        width = max(len(row) for row in rows)
        pad = self._tokenizer.eos_token_id
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        generated = self._model.generate(
            input_ids=ids,
            attention_mask=mask.to(device),
            max_new_tokens=self.max_new_tokens,
            min_new_tokens=1,
            do_sample=False,
            eos_token_id=pad,
            pad_token_id=pad,
        )
        answers: list[str] = self._tokenizer.batch_decode(
            generated[:, width:], skip_special_tokens=True
        )
        return answers


def _as_transformers(backbone: Backbone, directory: Path) -> Any:
    """Build transformers' causal LM on the meta device and give it views of our weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=backbone.dtype)
    state = named_weights(backbone)
    state["lm_head.weight"] = load_head(directory, backbone)
    model.load_state_dict(state, strict=True, assign=True)
    # RoPE's frequencies are buffers that no checkpoint holds: build them off the meta device.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config).to(backbone.device)
    return model.eval()


def named_weights(backbone: Backbone) -> dict[str, Tensor]:
    """The backbone's tensors under Hugging Face names; fused matrices are split into views."""
    config = backbone.config
    state = {
        "model.embed_tokens.weight": backbone.embedding,
        "model.norm.weight": backbone.final_norm,
    }
    widths = [config.q_size, config.kv_size, config.kv_size]
    for i, layer in enumerate(backbone.layers):
        block: dict[str, Tensor] = {
            "input_layernorm.weight": layer.attention_norm,
            "post_attention_layernorm.weight": layer.mlp_norm,
            "self_attn.o_proj.weight": layer.out,
            "mlp.down_proj.weight": layer.down,
        }
        for name, part in zip("qkv", layer.qkv.split(widths), strict=True):
            block[f"self_attn.{name}_proj.weight"] = part
        if layer.qkv_bias is not None:
            for name, part in zip("qkv", layer.qkv_bias.split(widths), strict=True):
                block[f"self_attn.{name}_proj.bias"] = part
        if layer.qk_norm is not None:
            block["self_attn.q_norm.weight"] = layer.qk_norm[0]
            block["self_attn.k_norm.weight"] = layer.qk_norm[config.num_heads]
        block["mlp.gate_proj.weight"], block["mlp.up_proj.weight"] = layer.gate_up.chunk(2)
        state |= {f"model.layers.{i}.{name}": tensor for name, tensor in block.items()}
    return state
