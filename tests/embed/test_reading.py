"""Soft prompts of an adapter and the text that they decode to, against the reference package."""

import pytest
import torch
from oracles import llm2vec_gen as oracle

import gen_fast
from gen_fast.embed.reading import Reader
from gen_fast.testing import relative_error

TEXTS = ["where do polar bears live", "a", "the cat in the hat sat on the mat and ran"]


def test_reading_equals_the_reference_package(tiny_model, tmp_path):
    oracle.write_reference_checkpoint(tiny_model, tmp_path, n_special=4)
    reference = oracle.load_reference(tmp_path, torch.float32)
    reference.tokenizer.pad_token = reference.tokenizer.eos_token
    _, expected = reference.encode(TEXTS, get_recon_hidden_states=True)
    encoder = gen_fast.load(tmp_path, dtype="float32", device="cpu")
    reader = Reader(encoder)
    soft = reader.soft_prompts(TEXTS)
    assert relative_error(soft, expected) <= 1e-4
    end = encoder.tokenizer.eos_token_id
    for row, answer in zip(soft, reader.read(soft, 12), strict=True):
        with torch.no_grad():
            ids = reference.model.decoder_model.generate(
                inputs_embeds=row[None],
                attention_mask=torch.ones(1, len(row), dtype=torch.int64),
                max_new_tokens=12,
                do_sample=False,
                eos_token_id=end,
                pad_token_id=end,
            )
        assert answer.text == encoder.tokenizer.decode(ids[0], skip_special_tokens=True)


def test_only_adapters_can_be_read(tiny_model):
    with pytest.raises(gen_fast.AdapterError, match="no adapter"):
        Reader(gen_fast.load(tiny_model))
