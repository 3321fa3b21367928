"""GGUF files as models: dequantised weights, with the tokenizer and the chat template that the file holds."""

import json
import logging
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import hf_hub_download
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoConfig, AutoTokenizer, GgufConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import is_gguf_available

from bridle.errors import UserError, first_line
from bridle.utils.extras import to_install
from bridle.utils.safe_loading import ON_THE_HUB

logger = logging.getLogger(__name__)

AS_GPT2 = {"gpt-2", "phi-2", "mpt", "olmo", "jais"}
DIGIT_BY_DIGIT = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
"""How byte-level tokenizers split text, by llama.cpp's names; `transformers` lets all of them split it as GPT-2's."""


def is_gguf(name: str) -> bool:
    """Whether a model's name is a GGUF file: "path/to/model.gguf", or "hub/name:model.gguf" on the hub."""
    return name.lower().endswith(".gguf") and not os.path.isdir(name)


def hub_file(name: str) -> tuple[str, str | None]:
    """The repository and the file of "hub/name:model.gguf"; any other name as it is, and None."""
    repository, _, file = name.rpartition(":")
    return (repository, file) if repository and is_gguf(file) else (name, None)


def load_gguf(factory: Any, name: str, **options: Any) -> Any:
    """`factory.from_pretrained` of a GGUF file, as if it were a folder that `save_pretrained` wrote.

    Args:
        factory: an auto class of `transformers`.
        name: as `is_gguf` takes it.
        options: of `from_pretrained`; for a model with `output_loading_info`.

    Returns:
        A tokenizer, a configuration, or a model in `dtype` and what `output_loading_info` reports.

    Raises:
        UserError: the package `gguf` is missing, there is no such file, or it is not a whole GGUF file.
        Exception: of `transformers`, which cannot load it.
    """
    if not is_gguf_available():
        raise UserError(f"{name}: a GGUF file needs the package gguf; {to_install('gguf')}")
    if options.get("quantization_config") is not None:
        raise UserError(f"{name}: the weights of a GGUF file are dequantised; leave out quantization_config")
    from transformers.integrations.gguf import read_gguf_metadata  # here: no promised part of `transformers`

    file = _local_file(name, {key: options.pop(key) for key in ON_THE_HUB & options.keys()})
    try:
        metadata, tensors = read_gguf_metadata(str(file))
    except Exception as error:  # a damaged file may raise anything
        raise UserError(f"{name}: is not a GGUF file, or is damaged; fetch it again") from error
    with TemporaryDirectory() as empty:  # nothing that lies beside the file belongs to it
        load = partial(factory.from_pretrained, empty, gguf_file=str(file), **options)
        if factory is AutoTokenizer:
            return _as_trained(load(), metadata, name)
        if factory is AutoConfig:
            config = load()
            config.name_or_path = name
            return config
        model, info = load(quantization_config=GgufConfig(dequantize=True))  # the result is an ordinary model
    if _scales_positions(metadata) or any(tensor.startswith("rope_") for tensor in tensors):
        logger.warning("%s: transformers does not read its scaling of positions; prefer the model's own folder", name)
    model.name_or_path = model.config.name_or_path = name
    return model, info


def _local_file(name: str, options: Mapping[str, Any]) -> Path:
    """The file's absolute path, after a download if it is on the hub."""
    if os.path.isfile(name):
        return Path(name).absolute()
    repository, file = hub_file(name)
    if file is None:
        raise UserError(f"{name}: no such file; of a file on the hub, write hub/name:file.gguf")
    try:
        return Path(hf_hub_download(repository, file, **options))
    except Exception as error:
        raise UserError(
            f"{name}: no such file, and it could not be fetched from the hub: {first_line(error)}"
        ) from error


def _scales_positions(metadata: Mapping[str, Any]) -> bool:
    architecture = metadata["general.architecture"]
    scaling = metadata.get(f"{architecture}.rope.scaling.type", "none")
    return scaling != "none" and architecture != "gpt-oss"  # whose scaling `transformers` reads


def _as_trained(tokenizer: PreTrainedTokenizerBase, metadata: Mapping[str, Any], name: str) -> PreTrainedTokenizerFast:
    """The tokenizer with the tokens that the file has and no others, and with its way to split text before merges."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    known = metadata["tokenizer.ggml.tokens"]  # their number; `transformers` adds GPT-2's end token to them
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < known]
    backend, kind = Tokenizer.from_str(json.dumps(state)), metadata.get("tokenizer.ggml.pre")
    as_gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind in DIGIT_BY_DIGIT:
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), as_gpt2])
    elif kind not in AS_GPT2 and isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        logger.warning("%s: its tokenizer is of an unknown kind (%s); text is split as GPT-2's does", name, kind)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        name_or_path=name,
        chat_template=tokenizer.chat_template,
        model_max_length=metadata.get(f"{metadata['general.architecture']}.context_length"),
        **tokenizer.special_tokens_map,
    )
