"""What embeddings decode to: soft prompts as in the reference package, GEM as in transformers."""

import pytest
import torch
from gem_models import save_gem
from oracles import gem as gem_oracle
from oracles import llm2vec as llm2vec_oracle
from oracles import llm2vec_gen as oracle
from peft import PeftModel
from transformers import AutoModelForCausalLM

import gen_fast
from gen_fast.embed.reading import Reader
from gen_fast.formats.gem import read_special
from gen_fast.model.decoding import Decoder
from gen_fast.model.tokenizing import special_tokens_around
from gen_fast.testing import relative_error, save_tiny_adapter, save_tiny_model

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


def greedy(model, ids, special, block, end, count):
    """Each token from a pass over all, with the dense mask."""
    new = []
    for _ in range(count):
        with torch.no_grad():
            states = gem_oracle.states(model, [*ids, *new], special, block)
        token = int(model.lm_head(states[-1]).argmax())
        if token == end:
            break
        new.append(token)
    return new


@pytest.mark.parametrize("family", ["llama-tied", "qwen3"])
@pytest.mark.parametrize("starts", [None, ["the", "a ", ""]])
def test_reading_from_special_tokens_equals_transformers_with_a_dense_mask(
    tmp_path, family, starts
):
    base = tmp_path / "base"
    save_tiny_model(base, family)
    directory = save_gem(tmp_path / "gem", base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), directory)
    model = model.merge_and_unload().eval()
    encoder = gen_fast.load(directory, dtype="float32", device="cpu")
    tokenizer = encoder._tokenizer
    answers = Reader(encoder).read_texts(TEXTS, "Read: ", 12, starts=starts)
    special = read_special(directory).special
    for i, answer in enumerate(answers):
        ids = encoder._layout("Read: ")(TEXTS, 0).ids[i].tolist()
        start = tokenizer.core.encode(starts[i] if starts else "").ids
        block = len(ids) - 3, len(ids)
        new = greedy(model, ids + start, special, block, tokenizer.eos_token_id, 12)
        assert answer.text == tokenizer.decode(start + new)
        # What comes before the special tokens is not seen but through them.
        states = gem_oracle.seen(len(ids) + 1, block)[-1]
        assert states.tolist() == [False] * (len(ids) - 3) + [True] * 4


def test_a_beginning_token_of_the_tokenizer_begins_the_reading(tmp_path):
    llm2vec_oracle.save_base(tmp_path / "base", "llama", begin=True)
    directory = save_gem(tmp_path / "gem", tmp_path / "base")
    encoder = gen_fast.load(directory, dtype="float32", device="cpu")
    rows, seen = [], Decoder.decode

    def watched(self, sequences, *rest, **options):
        rows.extend(sequences)
        return seen(self, sequences, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "decode", watched)
        Reader(encoder).read_texts(["the cat"], max_new_tokens=2)
    before, _ = special_tokens_around(encoder._tokenizer.core)
    assert len(before) == 1
    assert rows[0][0] == rows[0][-1] == before[0]


def test_what_can_be_read_of_which_method(tiny_model, tmp_path):
    reader = Reader(gen_fast.load(save_gem(tmp_path / "gem", tiny_model), dtype="float32"))
    with pytest.raises(gen_fast.AdapterError, match="no soft prompts: give read_texts"):
        reader.soft_prompts(TEXTS)
    with pytest.raises(gen_fast.ConfigError, match="1 starts for 3 texts"):
        reader.read_texts(TEXTS, starts=["a"])
    save_tiny_adapter(tmp_path / "adapter", tiny_model)
    other = Reader(gen_fast.load(tmp_path / "adapter", dtype="float32"))
    read = other.read(other.soft_prompts(TEXTS), 4)
    assert other.read_texts(TEXTS, max_new_tokens=4) == read
    with pytest.raises(gen_fast.ConfigError, match="starts are for GEM"):
        other.read_texts(TEXTS, starts=["a"] * 3)
