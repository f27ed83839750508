"""The reference package llm2vec 0.2.3, run by its own classes: LLM2Vec and PEFT's adapters.

Its models subclass attention classes that transformers 5 no longer has, so importing them fails.
They are the family's own without the causal mask: here they are given that mask from outside, and
everything else is the package's code. `check_bidirectional` asserts that it has effect.
"""

import importlib
import json
import sys
import types
from pathlib import Path

import torch
import transformers

from gen_fast.testing import byte_tokenizer, edit_config, save_tiny_model

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def bidirectional(base: type) -> type:
    """A model of transformers that attends to everything but padding."""

    class Model(base):
        @classmethod
        def from_pretrained(cls, directory, **options):
            record = Path(directory) / "adapter_config.json"
            if not record.is_file():
                return super().from_pretrained(directory, **options)
            # As for a Hub id; transformers 5 looks for weights beside a local config.json instead.
            below = json.loads(record.read_text())["base_model_name_or_path"]
            model = super().from_pretrained(below, **options)
            model.load_adapter(directory)
            # Or save_pretrained writes merged weights under the adapter's names.
            model._weight_conversions = []
            return model

        def forward(self, input_ids=None, attention_mask=None, **options):
            length = input_ids.shape[1]
            # An all-ones 2-D mask becomes none at all in transformers 5, and attention causal.
            seen = torch.zeros(len(input_ids), 1, length, length, dtype=self.dtype)
            if attention_mask is not None:
                hidden = attention_mask[:, None, None] == 0
                seen = seen.masked_fill(hidden, torch.finfo(self.dtype).min)
            options["use_cache"] = False
            return super().forward(input_ids=input_ids, attention_mask=seen, **options)

    Model.__name__ = Model.__qualname__ = base.__name__.replace("Model", "BiModel")
    return Model


def reference() -> type:
    """The package's class LLM2Vec."""
    models = types.ModuleType("llm2vec.models")
    for name in ("LlamaModel", "MistralModel", "Qwen2Model", "GemmaModel"):
        model = bidirectional(getattr(transformers, name))
        setattr(models, model.__name__, model)
    sys.modules.setdefault("llm2vec.models", models)
    return importlib.import_module("llm2vec").LLM2Vec


def save_base(directory: Path, family: str, *, begin: bool) -> None:
    """A tiny random model; begin: its tokenizer puts a BOS before a text."""
    from tokenizers import processors

    save_tiny_model(directory, family, vocab_size=400)
    tokenizer = byte_tokenizer()
    added = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "</s>", "<|endoftext|>"]
    tokenizer.add_tokens([transformers.AddedToken(name, special=True) for name in added])
    if begin:
        bos = tokenizer.bos_token
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
        )
    tokenizer.save_pretrained(directory)


def with_random_adapter(model, seed: int):
    """PEFT's model with random factors over `model`."""
    from peft import LoraConfig, get_peft_model

    peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules=MODULES))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    return peft


def save_mntp(base: Path, directory: Path, model_name: str) -> None:
    """An MNTP checkpoint in the published layout: adapter, the base's config, tokenizer.

    model_name: what its config says the base is.
    """
    model = reference().from_pretrained(str(base)).model
    with_random_adapter(model, 1).save_pretrained(directory)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((base / name).read_bytes())
    family = json.loads((base / "config.json").read_text())["model_type"]
    encoder = f"{family.capitalize()}EncoderModel"
    edit_config(
        directory,
        _name_or_path=model_name,
        architectures=[encoder],
        auto_map={"AutoModel": f"modeling_{family}_encoder.{encoder}"},
    )


def save_over(mntp: Path, directory: Path, *, merge: bool = False, **settings) -> None:
    """What LLM2Vec.save writes after training over a merged MNTP checkpoint."""
    model = reference().from_pretrained(str(mntp), **settings)
    model.model = with_random_adapter(model.model, 2)
    model.save(str(directory), merge_before_save=merge)


def embed(directory: Path, over: Path | None, pairs: list[list[str]], batch_size: int = 32):
    """The reference's embeddings of [instruction, text] pairs, [n, h] float32.

    It pads the texts of a batch to the longest of them.
    """
    paths = [str(directory)] if over is None else [str(over), str(directory)]
    model = reference().from_pretrained(*paths)
    check_bidirectional(model)
    return model.encode(
        pairs, batch_size, show_progress_bar=False, convert_to_numpy=True, device="cpu"
    )


def check_bidirectional(model) -> None:
    """Assert that changing the last token changes the first state."""
    states = []
    for last in (9, 10):
        ids = torch.tensor([[5, 6, 7, 8, last]])
        with torch.no_grad():
            states.append(model.model(input_ids=ids, attention_mask=torch.ones_like(ids)))
    first, second = (state.last_hidden_state[0, 0] for state in states)
    assert (first - second).abs().max() > 1e-4
