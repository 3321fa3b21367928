"""A model on its own, as other programs read it: a folder of `save_pretrained`, or a GGUF file."""

from math import prod
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bridle.core.output_layer import MULTIPLIERS
from bridle.errors import UserError
from bridle.models.auxiliary import AuxiliaryModel
from bridle.models.card import write_export_card
from bridle.models.gguf import is_gguf
from bridle.models.gguf_writer import check_writable, write_gguf
from bridle.models.guidance import check_scale, load_guide
from bridle.models.loading import check_model, end_token_ids, load_model, load_tokenizer, merged, torch_dtype, untie
from bridle.utils.files import atomic_file, atomic_files, check_output


def export(
    name: str | Path,
    out: Path,
    *,
    auxiliary: str | Path | None = None,
    guidance_scale: float = 1.0,
    gguf: bool = False,
    dtype: str = "float32",
) -> None:
    """Writes a model with its adapters merged, and its tokenizer; to a folder also a card.

    Args:
        name: a run's folder, whose `model/` is taken, or a model as `load_model` takes it.
        out: a folder, which must not exist or be empty; or a file.
        auxiliary: folder of an R that is folded into the output layer.
        guidance_scale: η, the strength of its guidance.
        gguf: write a GGUF file.
        dtype: of the weights in the file; they are merged and folded in float32.

    Raises:
        UserError: there is no such model or R, R cannot be folded, a GGUF file cannot hold the model, or `out` exists
            or cannot be written.
    """
    kept = torch_dtype(dtype)
    check_scale(guidance_scale)
    if gguf != is_gguf(str(out)):
        raise UserError(f"{out}: " + ("name a file NAME.gguf" if gguf else "a GGUF file is written with --gguf"))
    _check_new(out) if not gguf else check_output(out)
    folder = Path(name) / "model" if (Path(name) / "model").is_dir() else Path(name)
    model, tokenizer = _load(str(folder) if folder.is_dir() else str(name), "float32")
    guide = None if auxiliary is None else load_guide(auxiliary, model)
    model = merged(model)
    if guide is not None:
        fold(model, guide, guidance_scale)
    model = model.to(kept)
    _sample_from_all(model)
    _stop_at_every_end(model, tokenizer)
    if not gguf:
        _save(model, tokenizer, out)
        scale = None if guide is None else guidance_scale
        write_export_card(out, folder, name=str(name), dtype=dtype, guidance_scale=scale)
        return
    check_writable(model, tokenizer)
    with atomic_file(out) as unfinished:
        write_gguf(unfinished, model, tokenizer, out.stem)


def _sample_from_all(model: PreTrainedModel) -> None:
    """Servers then sample as Bridle does where the model says nothing else; `transformers` would take 50 tokens."""
    config = model.generation_config
    if config.do_sample is None:
        config.do_sample = True
    if config.do_sample and config.top_k is None:
        config.top_k = 0


def _stop_at_every_end(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Servers then end a turn as Bridle does, where the chat template closes it by a token of its own."""
    if ends := end_token_ids(model, tokenizer):
        model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]


@torch.no_grad()
def fold(model: PreTrainedModel, auxiliary: AuxiliaryModel, guidance_scale: float = 1.0) -> None:
    """Makes guided decoding the model's own: W + η·U·V is its output layer, apart from the embedding.

    Raises:
        UserError: R is not log-linear, or the model caps its logits.
    """
    if not auxiliary.is_log_linear:
        raise UserError(
            "fold: R has the sigmoid form, which is not an output layer; fit one with auxiliary.form: log-linear, or "
            "guide while decoding (bridle generate --guide)"
        )
    config, layer = model.config.get_text_config(), model.get_output_embeddings()
    if getattr(config, "final_logit_softcapping", None) is not None:
        raise UserError(
            f"fold: {config.model_type} caps its logits (final_logit_softcapping), and no output layer does the same "
            "as guidance; guide while decoding (bridle generate --guide)"
        )
    # Of some architectures the logits are divided or multiplied after the layer.
    multiplied = prod(getattr(config, name, None) or 1.0 for name in MULTIPLIERS)
    unit = (getattr(config, "logits_scaling", None) or 1.0) / multiplied
    change = guidance_scale * unit * auxiliary.output_change()
    untie(model)
    layer.weight.add_(change.to(layer.weight))


def convert_gguf(name: str, folder: Path, dtype: str = "float32") -> None:
    """Writes a GGUF file's model and tokenizer to a folder, as `save_pretrained` does.

    Raises:
        UserError: `name` is not a GGUF file or cannot be loaded, or `folder` is not empty or cannot be written.
    """
    if not is_gguf(name):
        raise UserError(f"{name}: is not a GGUF file (NAME.gguf); transformers reads any other model as it is")
    _check_new(folder)
    model, tokenizer = _load(name, dtype)
    model = merged(model)
    _stop_at_every_end(model, tokenizer)
    _save(model, tokenizer, folder)


def _check_new(folder: Path) -> None:
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder}: exists already; name another folder")
    check_output(folder / "config.json")


def _load(name: str, dtype: str) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    model, tokenizer = load_model(name, dtype=dtype), load_tokenizer(name)
    check_model(model, tokenizer, name)
    return model, tokenizer


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    with atomic_files(folder) as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
