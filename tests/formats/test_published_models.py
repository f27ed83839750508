"""Layouts of published models around tiny random weights: their vectors, or a refusal by name.

Files as the models' own pages and issue threads describe them; the models were not at hand.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_layouts import TEXTS, assert_same, edit_json, reference, save_random_model
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import AutoConfig

import gen_fast

TYPE = "sentence_transformers.models"
HIDDEN = 48
SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
POOLING = {
    "word_embedding_dimension": HIDDEN,
    "pooling_mode_cls_token": False,
    "pooling_mode_mean_tokens": False,
    "pooling_mode_max_tokens": False,
    "pooling_mode_mean_sqrt_len_tokens": False,
    "pooling_mode_weightedmean_tokens": False,
    "pooling_mode_lasttoken": True,
    "include_prompt": True,
}
# Texts that a wrong normalizer or pre-tokenizer splits otherwise.
ALL_TEXTS = [*TEXTS, "café 1234  two spaces\nand a line", " leading space", "日本語 text"]


def save_common(directory: Path, files: dict[str, Any]) -> None:
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    files = {
        "modules.json": [
            {"idx": i, "name": str(i), "path": path, "type": f"{TYPE}.{name}"}
            for i, (path, name) in enumerate(modules)
        ],
        "1_Pooling/config.json": POOLING,
        **files,
    }
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2))


def save_qwen_tokenizer(directory: Path, *, appends: bool) -> int:
    """tokenizer.json of Qwen2 and Qwen3; `appends` an end of text, as Qwen3-Embedding's does."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ġ", "a"), ("i", "n")]
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(pair) for pair in merges]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    rust = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    rust.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    rust.normalizer = normalizers.NFC()
    pieces = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    rust.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pieces), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    rust.decoder = decoders.ByteLevel()
    byte_level = processors.ByteLevel(trim_offsets=False)
    end = ("<|endoftext|>", rust.token_to_id("<|endoftext|>"))
    template = processors.TemplateProcessing(single="$A <|endoftext|>", special_tokens=[end])
    rust.post_processor = processors.Sequence([byte_level, template]) if appends else byte_level
    rust.save(str(directory / "tokenizer.json"))
    return rust.get_vocab_size()


def save_qwen3_embedding(directory: Path) -> None:
    """Qwen/Qwen3-Embedding-0.6B."""
    settings = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": None,
        "chat_template": "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    query = (
        "Instruct: Given a web search query, retrieve relevant passages that answer the query\n"
        "Query:"
    )
    save_common(
        directory,
        {
            "config_sentence_transformers.json": {
                "prompts": {"query": query, "document": ""},
                "default_prompt_name": None,
                "similarity_fn_name": "cosine",
            },
            "tokenizer_config.json": settings,
        },
    )
    config = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": 24,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "model_type": "qwen3",
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": save_qwen_tokenizer(directory, appends=True),
        **SIZES,
    }
    save_weights(directory, config, "Qwen3ForCausalLM")


def save_mistral_embedding(directory: Path, *, appends: bool) -> None:
    """e5-mistral-7b-instruct, whose tokenizer.json does not append the end; others `appends` it."""
    special = ["<unk>", "<s>", "</s>"]
    letters = sorted({c for text in ALL_TEXTS for c in text if c.isascii()} | set("Instruc:Query"))
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "a"), ("i", "n")]
    tokens = special + [f"<0x{byte:02X}>" for byte in range(256)] + ["▁"]
    tokens += [c for c in letters if not c.isspace()] + ["".join(pair) for pair in merges]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    rust = Tokenizer(
        models.BPE(
            vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    rust.add_special_tokens(special)
    rust.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    rust.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    rust.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if appends else "<s> $A", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    directory.mkdir(parents=True)
    rust.save(str(directory / "tokenizer.json"))
    added = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    settings = {
        "add_bos_token": True,
        "add_eos_token": True,
        "added_tokens_decoder": {
            str(i): {"content": token, "special": True, **added} for i, token in enumerate(special)
        },
        "additional_special_tokens": [],
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "legacy": True,
        "model_max_length": 1000000000000000019884624838656,
        "pad_token": "</s>",
        "sp_model_kwargs": {},
        "spaces_between_special_tokens": False,
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
        "use_default_system_prompt": False,
    }
    task = "Given a web search query, retrieve relevant passages that answer the query"
    save_common(
        directory,
        {
            "config_sentence_transformers.json": {
                "prompts": {
                    "web_search_query": f"Instruct: {task}\nQuery: ",
                    "sts_query": "Instruct: Retrieve semantically similar text\nQuery: ",
                }
            },
            "sentence_bert_config.json": {"max_seq_length": 4096, "do_lower_case": False},
            "tokenizer_config.json": settings,
        },
    )
    config = {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "pad_token_id": 2,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "use_cache": False,
        "vocab_size": len(vocabulary),
        **SIZES,
    }
    save_weights(directory, config, "MistralModel")


def save_gte_qwen2(directory: Path) -> None:
    """Alibaba-NLP/gte-Qwen2-1.5B-instruct; NovaSearch/stella_en_1.5B_v5 has the same code."""
    directory.mkdir(parents=True)
    size = save_qwen_tokenizer(directory, appends=False)
    save_common(
        directory,
        {
            "config_sentence_transformers.json": {"prompts": {"query": "Instruct: Find\nQuery: "}},
            "sentence_bert_config.json": {"max_seq_length": 8192, "do_lower_case": False},
            "tokenizer_config.json": {
                "add_eos_token": True,
                "auto_map": {"AutoTokenizer": ["tokenization_qwen.Qwen2Tokenizer", None]},
                "eos_token": "<|endoftext|>",
                "pad_token": "<|endoftext|>",
                "tokenizer_class": "Qwen2Tokenizer",
            },
        },
    )
    config = {
        "max_position_embeddings": 131072,
        "model_type": "qwen2",
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "vocab_size": size,
        **SIZES,
    }
    save_weights(directory, config, "Qwen2ForCausalLM")
    code = {"AutoModel": "modeling_qwen.Qwen2Model"}
    edit_json(directory / "config.json", {"is_causal": False, "auto_map": code})


def save_weights(directory: Path, config: dict[str, Any], architecture: str) -> None:
    """Random weights under `config`, kept as the published file spells it."""
    save_random_model(directory, AutoConfig.for_model(**config))
    (directory / "config.json").write_text(json.dumps({"architectures": [architecture], **config}))


def load(directory: Path, **options: Any) -> gen_fast.Encoder:
    return gen_fast.load(directory, dtype="float32", device="cpu", **options)


def test_qwen3_embedding(tmp_path):
    (tmp_path / "model").mkdir()
    save_qwen3_embedding(tmp_path / "model")
    encoder, expected = load(tmp_path / "model"), reference(tmp_path / "model")
    assert encoder.method == "sentence-transformers"
    assert encoder.max_length == expected.max_seq_length == 32768
    assert encoder.prompts == expected.prompts
    assert_same(encoder.encode(ALL_TEXTS), expected.encode(ALL_TEXTS))
    assert_same(encoder.encode_query(ALL_TEXTS), expected.encode_query(ALL_TEXTS))
    assert_same(encoder.encode_document(ALL_TEXTS), expected.encode_document(ALL_TEXTS))
    short = {"truncate_dim": 16, "normalize_embeddings": True}
    assert_same(encoder.encode(ALL_TEXTS, **short), expected.encode(ALL_TEXTS, **short))
    expected.max_seq_length = 24
    shorter = load(tmp_path / "model", max_length=24)
    assert_same(shorter.encode(ALL_TEXTS), expected.encode(ALL_TEXTS))


@pytest.mark.parametrize("appends", [False, True], ids=["e5", "end in tokenizer.json"])
def test_mistral_embedding_models(appends, tmp_path, caplog):
    """e5-mistral-7b-instruct, SFR-Embedding-Mistral and Linq-Embed-Mistral.

    Their embedding is the state of </s>. Where only tokenizer_config.json asks for it,
    transformers 5 drops it, and with it sentence-transformers, unless it is told again.
    """
    save_mistral_embedding(tmp_path / "model", appends=appends)
    encoder = load(tmp_path / "model")
    assert ("puts no </s> behind a text" in caplog.text) == (not appends)
    told = {"processor_kwargs": {"add_bos_token": True, "add_eos_token": True}}
    expected = reference(tmp_path / "model", **({} if appends else told))
    assert expected.preprocess(["the cat"])["input_ids"][0, [0, -1]].tolist() == [1, 2]
    assert encoder.max_length == expected.max_seq_length == 4096
    for name in ({}, {"prompt_name": "web_search_query"}, {"prompt_name": "sts_query"}):
        assert_same(encoder.encode(ALL_TEXTS, **name), expected.encode(ALL_TEXTS, **name))
    expected.max_seq_length = 24
    shorter = load(tmp_path / "model", max_length=24)
    assert_same(shorter.encode(ALL_TEXTS), expected.encode(ALL_TEXTS))


def test_gte_qwen2_is_refused(tmp_path):
    """Each of the three reasons: own code, attention to later tokens, own code of the tokenizer."""
    directory = tmp_path / "model"
    save_gte_qwen2(directory)
    for method in (None, "last-token"):
        with pytest.raises(gen_fast.UnsupportedModelError, match=r"auto_map .* AutoModel"):
            load(directory, method=method)
    edit_json(directory / "config.json", {"auto_map": None})
    with pytest.raises(gen_fast.UnsupportedModelError, match="is_causal"):
        load(directory)
    edit_json(directory / "config.json", {"is_causal": None})
    with pytest.raises(gen_fast.UnsupportedModelError, match="tokenizer's own"):
        load(directory)
    edit_json(directory / "tokenizer_config.json", {"auto_map": None})
    assert np.isfinite(load(directory).encode("the cat")).all()
