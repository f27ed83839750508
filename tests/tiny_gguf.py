"""GGUF files of tiny models, as llama.cpp's converter writes them."""

import gguf
import torch

KINDS = gguf.GGMLQuantizationType


def write_gguf(path, model, *, kind=KINDS.F32, sentencepiece=False, **more):
    """The file that llama.cpp's converter makes of a model of transformers; more: other keys."""
    config = model.config
    architecture = {"mistral": "llama"}.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    if config.num_key_value_heads != config.num_attention_heads:
        writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if config.model_type == "mistral" and config.sliding_window:
        writer.add_sliding_window(config.sliding_window)
    for key, value in more.items():
        getattr(writer, f"add_{key}")(value)
    (add_sentencepiece if sentencepiece else add_tokenizer)(writer, config)
    names = gguf.get_tensor_name_map(
        next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture),
        config.num_hidden_layers,
    )
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        module, _, suffix = name.rpartition(".")
        values = tensor.float()
        if architecture == "llama" and module.endswith(("q_proj", "k_proj")):
            heads = len(values) // head_dim
            values = values.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        stored = f"{names.get_name(module)}.{suffix}"
        plain = values.ndim == 1 or values.shape[-1] % 32
        chosen = KINDS.F32 if plain else kind
        data = gguf.quantize(values.contiguous().numpy(), chosen)
        writer.add_tensor(stored, data, raw_dtype=chosen)
    if config.rope_parameters.get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", rope_factors(config, head_dim))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_sentencepiece(writer, config):
    """A vocabulary with scores, as of Llama 2 and Mistral."""
    words = [
        "\u2581the",
        "\u2581t",
        "\u2581a",
        "th",
        "he",
        "the",
        "\u2581c",
        "at",
        "cat",
        "\u2581cat",
    ]
    letters = ["\u2581", *"abcdefghijklmnopqrstuvwxyz"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words, *letters]
    kinds = [2, 3, 3, *[6] * 256, *[1] * (len(words) + len(letters))]
    more = config.vocab_size - len(tokens)
    tokens, kinds = tokens + [f"<filler{i}>" for i in range(more)], kinds + [5] * more
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) for i in range(len(tokens))])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)


def add_tokenizer(writer, config):
    letters = list(gguf_alphabet())
    tokens = ["<unk>", "<|im_start|>", "<|im_end|>", *letters, "th"]
    tokens += [f"<filler{i}>" for i in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, *[1] * (len(tokens) - 3)])
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def gguf_alphabet():
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def rope_factors(config, head_dim):
    """What transformers' own inverse frequencies are divided by."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    theta = config.rope_parameters["rope_theta"]
    plain = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    return (plain / scaled).numpy()
