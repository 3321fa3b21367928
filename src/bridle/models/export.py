"""A model on its own, as other programs read it: a folder of `save_pretrained`, or a GGUF file."""

from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bridle.errors import UserError
from bridle.models.gguf import is_gguf
from bridle.models.gguf_writer import check_writable, write_gguf
from bridle.models.loading import check_model, load_model, load_tokenizer, torch_dtype
from bridle.utils.files import atomic_file, atomic_files, check_output


def export(name: str | Path, out: Path, *, gguf: bool = False, dtype: str = "float32") -> None:
    """Writes a model with its adapters merged, and its tokenizer.

    Args:
        name: a run's folder, whose `model/` is taken, or a model as `load_model` takes it.
        out: a folder, which must not exist or be empty; or a file.
        gguf: write a GGUF file.
        dtype: of the weights in the file; they are merged in float32.

    Raises:
        UserError: there is no such model, a GGUF file cannot hold it, or `out` exists or cannot be written.
    """
    kept = torch_dtype(dtype)
    if gguf != is_gguf(str(out)):
        raise UserError(f"{out}: " + ("name a file NAME.gguf" if gguf else "a GGUF file is written with --gguf"))
    _check_new(out) if not gguf else check_output(out)
    model, tokenizer = _load(str(Path(name) / "model" if (Path(name) / "model").is_dir() else name), "float32")
    model = merged(model).to(kept)
    if not gguf:
        _save(model, tokenizer, out)
        return
    check_writable(model, tokenizer)
    with atomic_file(out) as unfinished:
        write_gguf(unfinished, model, tokenizer)


def merged(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The model with its adapters added to its weights; it may be changed in place."""
    return model.merge_and_unload() if isinstance(model, PeftModel) else model


def convert_gguf(name: str, folder: Path, dtype: str = "float32") -> None:
    """Writes a GGUF file's model and tokenizer to a folder, as `save_pretrained` does.

    Raises:
        UserError: `name` is no GGUF file or cannot be loaded, or `folder` is not empty or cannot be written.
    """
    if not is_gguf(name):
        raise UserError(f"{name}: is no GGUF file (NAME.gguf); transformers reads any other model as it is")
    _check_new(folder)
    model, tokenizer = _load(name, dtype)
    _save(merged(model), tokenizer, folder)


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
