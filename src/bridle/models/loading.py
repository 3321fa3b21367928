"""Loading a causal language model, with or without LoRA, and its tokenizer, from a folder, the hub or a GGUF file."""

import logging
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.file_download import repo_folder_name
from jinja2 import TemplateError
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from bridle.constraints.options import Probability
from bridle.errors import UserError, first_line
from bridle.models.gguf import is_gguf, load_gguf
from bridle.models.hidden import causal_lm
from bridle.utils.distributed import broadcast_object, is_main
from bridle.utils.quiet import only_errors
from bridle.utils.safe_loading import ON_THE_HUB, holds, is_path, refusal

logger = logging.getLogger(__name__)


@dataclass
class LoraOptions:
    """Low-rank adapters (Hu et al., 2021) on the policy.

    Attributes:
        r: rank.
        alpha: scale; the update is multiplied by alpha / r.
        dropout: probability of dropping an input of the adapter.
        target_modules: "all-linear", or the names of the layers that get an adapter.
    """

    r: PositiveInt = 16
    alpha: PositiveFloat = 32.0
    dropout: Probability = 0.0
    target_modules: str | list[str] = "all-linear"

    def peft_config(self) -> LoraConfig:
        """These options as `peft` takes them."""
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.target_modules,
        )


def load_tokenizer(name: str, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, named as in `load_model`; without a pad token of its own it pads with the end token.

    Args:
        name: the model's.
        options: of `from_pretrained`, such as `revision`.

    Raises:
        UserError: nothing can be loaded from `name`, or the tokenizer has no end token.
    """
    holder, options = _holding("tokenizer_config.json", name, options)
    tokenizer = _load(AutoTokenizer, holder, what="tokenizer", **options)
    if tokenizer.eos_token_id is None:
        raise UserError(f"{name}: the tokenizer has no end-of-text token; set eos_token in tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(name: str) -> PretrainedConfig:
    """The configuration of a model, named as in `load_model`; an adapter's is its base's.

    Raises:
        UserError: nothing can be loaded from `name`.
    """
    holder, options = _holding("config.json", name, {})
    config: PretrainedConfig = _load(AutoConfig, holder, what="configuration", **options)
    return config


def load_model(
    name: str,
    *,
    dtype: str | torch.dtype = "float32",
    lora: LoraOptions | None = None,
    device: str | None = None,
    **options: Any,
) -> PreTrainedModel | PeftModel:
    """Loads a causal language model; of an adapter also its base model.

    Args:
        name: a folder written by `save_pretrained`, a hub name, or a GGUF file: `path/to/model.gguf`, or
            `hub/name:model.gguf` on the hub.
        dtype: of the weights; float32 by default, because training in half precision loses small updates.
        lora: adds new adapters to the model.
        device: by default the CPU, for a trainer to move.
        options: of `from_pretrained`. `revision` and `subfolder` are the adapter's; its configuration names the base's.

    Raises:
        UserError: `name` cannot be loaded or lacks weights; `lora` does not fit the model, or `name` is an adapter
            already; there is no such device.
    """
    if isinstance(dtype, str):
        dtype = torch_dtype(dtype)
    adapter = adapter_config(name, **options)
    if adapter is not None and lora is not None:
        raise UserError(f"{name}: is an adapter already; merge it first, or leave `lora` out of the recipe")
    base, of_base = (name, options) if adapter is None else _base(adapter, options)
    model, info = _load(AutoModelForCausalLM, base, what="model", dtype=dtype, output_loading_info=True, **of_base)
    if missing := sorted(info["missing_keys"]):  # transformers fills them with random numbers
        raise UserError(f"{base}: the model is incomplete: its weights lack '{missing[0]}'")
    _make_savable(model)
    if adapter is not None:
        model = _with_adapter(model, name, options)
    elif lora is not None:
        model = _with_lora(model, lora)
    try:
        return model.to(device) if device else model
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device: {device!r} cannot be used: {error}") from error


def merged(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The model with its adapters added to its weights; it may be changed in place.

    Tied embeddings part where one of them has an adapter: `peft` would add its change to the other one, too.
    """
    if not isinstance(model, PeftModel):
        return model
    lm = causal_lm(model)
    ends = lm.get_input_embeddings(), lm.get_output_embeddings()
    if lm.config.get_text_config().tie_word_embeddings and any(isinstance(end, BaseTunerLayer) for end in ends):
        untie(lm)
    return model.merge_and_unload()


def untie(model: PreTrainedModel) -> None:
    """Gives the output layer a weight of its own, apart from the embedding."""
    layer = model.get_output_embeddings()
    layer = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    layer.weight = torch.nn.Parameter(layer.weight.detach().clone(), layer.weight.requires_grad)
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
    model.all_tied_weights_keys = {}


def warn_if_emulated(model: PreTrainedModel | PeftModel) -> None:
    """Warns where a processor has no instructions for the model's half precision, so that float32 is faster."""
    is_half = model.dtype in (torch.bfloat16, torch.float16)
    if is_main() and is_half and model.device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        name = str(model.dtype).removeprefix("torch.")
        logger.warning("dtype: this processor has no instructions for %s; float32 is several times faster", name)


def load_for_inference(
    name: str, dtype: str | torch.dtype = "float32", device: str | None = None
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """A model on `device`, by default the GPU if there is one, and its tokenizer. Raises as `load_model`."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load_model(name, dtype=dtype, device=device).eval(), load_tokenizer(name)
    check_model(model, tokenizer, name)
    warn_if_emulated(model)
    return model, tokenizer


def check_model(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Refuses a model that is broken or does not fit the tokenizer.

    Raises:
        UserError: a weight is not finite, or the tokenizer has more tokens than the model.
    """
    broken = (name for name, weight in model.named_parameters() if weight.numel() and not _is_finite(weight))
    if found := broadcast_object(next(broken, None) if is_main() else None):  # others may have no weights yet
        raise UserError(f"{name}: the weights '{found}' hold numbers that are not finite; the model is broken")
    known = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > known:
        raise UserError(
            f"{name}: the tokenizer has {len(tokenizer)} tokens and the model's embedding {known}; take the tokenizer "
            "that the model was made with, or resize the embedding"
        )


def _is_finite(weight: Tensor) -> bool:
    weight = weight if weight.dtype.itemsize > 1 else weight.bfloat16()  # torch has no extremes of FP8
    return bool(torch.stack(weight.aminmax()).isfinite().all())


def context_length(model: PreTrainedModel | PeftModel) -> int | None:
    """The model's context in tokens; None if its configuration does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def prompt_room(model: PreTrainedModel | PeftModel, max_new_tokens: int) -> int | None:
    """The tokens of the longest prompt that leaves room for `max_new_tokens`; None where the context is unknown."""
    context = context_length(model)
    return context - max_new_tokens if context else None


def end_token_ids(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an output, the tokenizer's end token first.

    A chat model ends its turns by another token, which its configuration or chat template names.
    """
    lm = causal_lm(model)
    found = [tokenizer.eos_token_id]
    for config in (lm.generation_config, lm.config.get_text_config()):
        ids = getattr(config, "eos_token_id", None)
        found += ids if isinstance(ids, list | tuple) else [ids]
    return [token for token in dict.fromkeys([*found, end_of_turn(tokenizer)]) if token is not None]


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token by which the chat template closes an assistant's turn, if any."""
    said = "yes"
    try:
        chat = [{"role": "user", "content": "no"}, {"role": "assistant", "content": said}]
        text = str(tokenizer.apply_chat_template(chat, tokenize=False))
    except (TemplateError, ValueError, TypeError, KeyError):  # no template, or one that takes no such chat
        return None
    closing = tokenizer(text.rpartition(said)[2], add_special_tokens=False)["input_ids"]
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return next((token for token in closing if token in special), None)


def _load(factory: Any, name: str, what: str, **options: Any) -> Any:
    """`from_pretrained`, also of a GGUF file, that refuses pickles and remote code, and fails in one line."""
    if factory is AutoModelForCausalLM:
        options["use_safetensors"] = True
    try:
        if is_path(name) and not (is_gguf(name) or os.path.exists(name)):
            raise FileNotFoundError(name)
        with only_errors("transformers"):
            load = partial(load_gguf, factory) if is_gguf(name) else factory.from_pretrained
            return load(name, trust_remote_code=False, **options)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{name}: cannot load the {what}: {reason(name, error)}") from error


def _make_savable(model: PreTrainedModel) -> None:
    """Sets the `do_sample` that sampling settings imply; `save_pretrained` refuses them without it."""
    try:
        model.generation_config.validate(strict=True)
    except ValueError:
        model.generation_config.do_sample = True


def _with_adapter(model: PreTrainedModel, name: str, options: Mapping[str, Any]) -> PeftModel:
    """The model with an adapter, which must not be a pickle; `peft` would load one."""
    try:
        if (weights := _file("adapter_model.safetensors", name, options)) is None:
            raise FileNotFoundError("it holds no adapter_model.safetensors")
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(model, str(weights.parent))
    except Exception as error:
        why = reason(name, error) if os.path.isdir(name) else first_line(error)
        raise UserError(f"{name}: cannot load the adapter: {why}") from error


def _with_lora(model: PreTrainedModel, lora: LoraOptions) -> PeftModel:
    try:
        return get_peft_model(model, lora.peft_config())
    except ValueError as error:
        raise UserError(f"lora: {error}") from error


def reason(name: str | Path, error: Exception) -> str:
    """Why a folder or hub name could not be loaded, given the error that a library raised."""
    if refused := refusal(name, error):
        return refused
    if os.path.isdir(name) and not holds(name, "*.safetensors"):
        hint = "; name its GGUF file, not the folder" if holds(name, "*.gguf") else ""
        hint = f"; a run's model is {Path(name) / 'model'}" if holds(Path(name) / "model", "*.safetensors") else hint
        return f"the folder holds no weights (*.safetensors){hint}"
    if is_gguf(str(name)):
        return f"the file is damaged, or of a kind that transformers does not read: {first_line(error)}"
    if not os.path.exists(name):
        hub = "" if is_path(str(name)) else ", and no model of that name could be fetched from the hub"
        return f"no such folder{hub}"
    return " ".join(str(error).split())[:300]


def adapter_config(name: str, **options: Any) -> PeftConfig | None:
    """The configuration of an adapter, named as in `load_model`; None if `name` is not an adapter.

    Args:
        name: the model's.
        options: of `from_pretrained`, such as `revision`.

    Raises:
        UserError: it is damaged, or names no base model.
    """
    if (file := _file("adapter_config.json", name, options)) is None:
        return None
    try:
        config = PeftConfig.from_pretrained(str(file.parent))
    except Exception as error:
        raise UserError(f"{file}: is not the configuration of an adapter: {first_line(error)}") from error
    if not config.base_model_name_or_path:
        raise UserError(f"{file}: names no base model (key base_model_name_or_path)")
    return config


def _base(adapter: PeftConfig, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The base model of an adapter, and of the options of `from_pretrained` those that are not the adapter's alone."""
    shared = {key: value for key, value in options.items() if key not in ("revision", "subfolder")}
    pinned = {"revision": adapter.revision} if adapter.revision else {}
    return str(adapter.base_model_name_or_path), shared | pinned


def _holding(file: str, name: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """What holds a file, with the options of its loading: a model itself, or the base of an adapter that lacks it."""
    adapter = adapter_config(name, **options)
    return (name, options) if adapter is None or _file(file, name, options) else _base(adapter, options)


def _file(file: str, name: str, options: Mapping[str, Any]) -> Path | None:
    """A file of a model's folder, or of its repository on the hub, fetched if need be; None if it has no such file.

    Raises:
        UserError: the hub cannot be reached, and nothing of the model was fetched before.
    """
    if is_path(name) and not os.path.isdir(name):
        return None
    try:
        found = cached_file(name, file, **{key: options[key] for key in ON_THE_HUB & options.keys()})
    except OSError as error:
        if isinstance(error.__cause__, LocalEntryNotFoundError) and not _was_fetched(name, options):
            raise UserError(f"{name}: {reason(name, error)}") from error  # each further file would be retried as long
        return None
    return None if found is None else Path(found)


def torch_dtype(name: str) -> torch.dtype:
    """A floating-point type by torch's name. Raises UserError for any other name."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UserError(f"dtype: {name!r} is not a floating-point type; use float32, bfloat16 or float16")
    return dtype


def _was_fetched(name: str, options: Mapping[str, Any]) -> bool:
    """Whether the cache of the hub knows a model."""
    cache = Path(options.get("cache_dir") or constants.HF_HUB_CACHE)
    return (cache / repo_folder_name(repo_id=name, repo_type="model")).exists()
