"""Writing a Llama model as a GGUF file, with the names and the order of numbers that llama.cpp's converter uses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import is_gguf_available

from bridle.errors import UserError
from bridle.utils.extras import to_install

SPLITS = {"ByteLevel": "gpt-2", "Digits ByteLevel": "smollm"}
"""Ways to split text before merges, by the steps of a byte-level tokenizer: llama.cpp's names."""


def check_writable(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses what a GGUF file of a Llama model cannot hold, or what this writer does not write.

    Raises:
        UserError: another architecture, biases, scaled positions, a tokenizer that is not byte-level, or the package
            `gguf` is missing.
    """
    if not is_gguf_available():
        raise UserError(f"--gguf: needs the package gguf; {to_install('gguf')}")
    config = model.config
    if config.model_type != "llama":
        raise UserError(f"--gguf: writes models of the Llama architecture, not {config.model_type}; export a folder")
    if biased := next((name for name, _ in model.named_parameters() if name.endswith(".bias")), None):
        raise UserError(f"--gguf: a Llama model's file has no biases, and this model has '{biased}'; export a folder")
    if (kind := config.rope_parameters["rope_type"]) != "default":
        raise UserError(f"--gguf: the model scales positions ({kind}), which is not written; export a folder")
    _split(tokenizer)


def write_gguf(path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str = "") -> None:
    """Writes a model that `check_writable` lets pass: matrices in the type of its weights, vectors in float32.

    Its name is that of the file if not given.
    """
    from gguf import MODEL_ARCH, GGUFWriter, get_tensor_name_map

    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_name(name or path.stem)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, tokenizer, config.vocab_size)
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue  # a reader takes the embedding
        known = names.get_name(name, try_suffixes=(".weight",))
        assert known is not None, name
        count = next((heads[part] for part in heads if part in name), None)
        _add_tensor(writer, known, _rotating_neighbours(tensor, count))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _rotating_neighbours(weight: Tensor, heads: int | None) -> Tensor:
    """The rows of a projection to rotated heads, paired as llama.cpp rotates: neighbours, and not halves."""
    if heads is None:
        return weight
    return weight.reshape(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _add_tensor(writer: Any, name: str, tensor: Tensor) -> None:
    from gguf import GGMLQuantizationType, quants

    kinds = {torch.float16: GGMLQuantizationType.F16, torch.bfloat16: GGMLQuantizationType.BF16}
    kind = kinds.get(tensor.dtype, GGMLQuantizationType.F32) if tensor.dim() == 2 else GGMLQuantizationType.F32
    values = np.ascontiguousarray(tensor.float().numpy(force=True))
    writer.add_tensor(name, quants.quantize(values, kind), raw_dtype=kind)


def _add_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    from gguf import TokenType

    texts = {token: text for text, token in tokenizer.get_vocab().items()}
    kinds = dict.fromkeys(texts, TokenType.NORMAL)
    for token, added in tokenizer.added_tokens_decoder.items():
        kinds[token] = TokenType.CONTROL if added.special else TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_split(tokenizer))
    writer.add_token_list([texts.get(token, f"[PAD{token}]") for token in range(vocab_size)])
    writer.add_token_types([kinds.get(token, TokenType.UNUSED) for token in range(vocab_size)])
    writer.add_token_merges([" ".join(pair) for pair in _state(tokenizer)["model"]["merges"]])
    for name in ("bos", "eos", "pad"):
        if (token := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(token)
    writer.add_add_bos_token(tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id])
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _split(tokenizer: PreTrainedTokenizerBase) -> str:
    """llama.cpp's name of how a tokenizer splits text before merges.

    Raises:
        UserError: it is not byte-level, or splits text in another way.
    """
    state = _state(tokenizer)
    split = state.get("pre_tokenizer") or {"type": "nothing"}
    steps = split.get("pretokenizers", [split])
    found, last = SPLITS.get(" ".join(step["type"] for step in steps)), steps[-1]
    one_by_one = all(step.get("individual_digits", True) for step in steps)
    if found is None or state["normalizer"] or last["add_prefix_space"] or not last["use_regex"] or not one_by_one:
        raise UserError(
            "--gguf: writes byte-level tokenizers that split text as GPT-2's or SmolLM's does, and this one does not; "
            "export a folder, and convert it by llama.cpp's convert_hf_to_gguf.py"
        )
    return found


def _state(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return dict(json.loads(tokenizer.backend_tokenizer.to_str()))
