"""`bridle plan`: the memory of a run on each GPU, before one is rented.

The model is built of fake tensors, which have shapes and no data, so that one of any size takes seconds and no memory.
A forward of an update's rows then shows what autograd keeps for the backward, of this architecture with its adapters.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, PretrainedConfig

from bridle.core.loss import chunk_rows
from bridle.models.auxiliary import new_auxiliary
from bridle.models.hidden import causal_lm
from bridle.models.loading import adapter_config, load_config, torch_dtype
from bridle.models.sampling import row_bytes
from bridle.recipes.recipe import Recipe
from bridle.training.config import ConstrainedConfig
from bridle.training.examples import LOGITS_AT_ONCE

GIB = 2**30
RESERVED = 1.0  # GiB: the CUDA context, and what the allocator cannot use


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on each GPU.

    Attributes:
        held: what stays for the whole run, by what it is.
        phases: what each phase takes beside that, at its peak.
        reserved: what vLLM keeps for the whole run, colocated and without sleep.
    """

    held: dict[str, float]
    phases: dict[str, float]
    reserved: float = 0.0

    @property
    def peak(self) -> float:
        """The most that is taken at once, without what CUDA itself takes."""
        return sum(self.held.values()) + self.reserved + max(self.phases.values())

    def lines(self, gpus: int, memory: float) -> Iterator[str]:
        """The plan in words.

        Args:
            gpus: how many.
            memory: GiB of each.
        """
        yield f"each of {gpus} GPUs" if gpus > 1 else "on one GPU"
        for name, size in (self.held | ({"vLLM": self.reserved} if self.reserved else {})).items():
            yield f"  {size / GIB:8.2f} GiB  {name}"
        for name, size in self.phases.items():
            yield f"  {size / GIB:8.2f} GiB  while {name}"
        needed = self.needed
        verdict = "fits in" if needed <= memory else "does not fit in"
        yield f"about {needed:.1f} GiB at most, CUDA's own {RESERVED:g} included: {verdict} {memory:g} GiB"

    @property
    def needed(self) -> float:
        """GiB of a GPU at the peak."""
        return self.peak / GIB + RESERVED


def memory_plan(
    recipe: Recipe, *, gpus: int = 1, memory: float = 80.0, shard: bool = False, device: str = "cuda"
) -> MemoryPlan:
    """The memory that a recipe's run takes on each GPU.

    Args:
        recipe: its model's configuration is read, and no weights.
        gpus: processes that train the policy.
        memory: GiB of each GPU, of which a colocated vLLM takes its share.
        shard: whether FSDP2 shards the policy; with DDP each GPU has a whole one.
        device: "cuda", where updates are in bfloat16 unless the recipe says otherwise, or "cpu".

    Raises:
        UserError: the configuration cannot be read.
    """
    config = recipe.planned_config()
    dtype = torch_dtype(recipe.dtype)
    adapter = recipe.lora.peft_config() if recipe.lora else adapter_config(recipe.model)
    unfilled = meta_model(load_config(recipe.model), dtype, adapter)
    with torch.device("meta"):
        auxiliary = sum(map(_bytes, new_auxiliary(unfilled, **config.auxiliary.shape).parameters()))
    with faked(unfilled) as model:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        parts = gpus if shard else 1
        weights = sum(map(_bytes, model.parameters()))
        held = {"weights of the policy" + (", sharded" if shard else ""): weights / parts}
        held["gradients"] = sum(map(_bytes, trained)) / parts
        held["the optimiser's two moments (AdamW)"] = 2 * sum(map(_bytes, trained)) / parts
        regularisers = list(recipe.regularisers.values())
        anchors = sum(one.anchor == "previous" for one in regularisers)
        anchors += any(one.anchor == "initial" for one in regularisers)  # which all share
        if anchors:
            held["anchors"] = anchors * sum(map(_bytes, trained)) / parts
        learnt = sum(not one.is_retention for one in regularisers)
        if learnt:
            held["R"] = learnt * auxiliary
        phases = {
            "it updates": _update(model, config, recipe, autocast_of(recipe, device), torch.device(device))
            + (weights / _layers(model) if shard else 0)
        }
        if any(one.samples for one in regularisers):
            phases["it samples"] = _sampling(model, config, dtype)
        if learnt:
            phases["R is fitted"] = 4 * auxiliary + _fitting(model, config)  # its average, gradients, two moments
    sampler = config.sampler
    colocated = sampler.engine == "vllm" and sampler.mode == "colocate"
    of_engine = sampler.gpu_memory * memory * GIB if colocated else 0.0
    if colocated:
        phases["it samples"] = of_engine if sampler.sleep else 0.0
    return MemoryPlan(held, phases, 0.0 if sampler.sleep else of_engine)


def autocast_of(recipe: Recipe, device: str) -> torch.dtype | None:
    """The dtype of an update's matrix products; by default bfloat16 on a GPU, and the weights' own on a CPU."""
    if recipe.training.get("fp16"):
        return torch.float16
    return torch.bfloat16 if recipe.training.get("bf16", device == "cuda") else None


def meta_model(config: PretrainedConfig, dtype: torch.dtype, adapter: PeftConfig | None) -> Any:
    """A model without data, with adapters that are trained."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if adapter is None:
            return model
        adapter.inference_mode = False  # as it is saved
        return get_peft_model(model, adapter)


@contextmanager
def faked(model: nn.Module) -> Iterator[nn.Module]:
    """A model of `meta_model` with fake tensors; inside the block all tensors that are made are fake."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            model.to_empty(device="cpu")
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(before)
        yield model.train()


def kept_for_backward(model: nn.Module, rows: int, length: int, autocast: torch.dtype | None) -> int:
    """Bytes that autograd keeps from a forward of the backbone over rows of tokens, without the weights."""
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no storage's address is used twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    ids = torch.zeros(rows, length, dtype=torch.long)
    mixed = torch.autocast("cpu", dtype=autocast, enabled=autocast is not None)
    with mixed, saved_tensors_hooks(keep, lambda tensor: tensor):
        causal_lm(model).base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return sum(kept.values())


def _update(
    model: nn.Module, config: ConstrainedConfig, recipe: Recipe, autocast: torch.dtype | None, device: torch.device
) -> float:
    """Activations of a micro-batch: its rows of the corpus, and the rollouts beside each."""
    own = causal_lm(model).config.get_text_config()
    longest = min(config.max_length or own.max_position_embeddings, own.max_position_embeddings)
    acting = [one for one in recipe.regularisers.values() if one.weight > 0]
    looking = [one.domains(recipe.corpus) for one in acting if one.kl_on != "corpus"]
    rollouts = max(sum(name in domains for domains in looking) for name in recipe.corpus)
    rows = config.per_device_train_batch_size * (1 + rollouts)
    kept = float(kept_for_backward(model, rows, longest, autocast))
    states = rows * longest * own.hidden_size
    if config.gradient_checkpointing:  # a layer's inputs, and one whole layer that is computed again
        kept = kept / _layers(model) + _layers(model) * states * (autocast or model.dtype).itemsize
    vocabulary = len(causal_lm(model).get_output_embeddings().weight)
    chunk = min(rows * longest, chunk_rows(device, vocabulary)) * vocabulary
    return kept + 3 * 4 * chunk + 2 * 4 * states


def _sampling(model: nn.Module, config: ConstrainedConfig, dtype: torch.dtype) -> float:
    """Keys, values and probabilities of the rollouts that are drawn at a time."""
    lm = causal_lm(model)
    longest = config.prompt_tokens[1] or (config.max_length or lm.config.get_text_config().max_position_embeddings)
    rows = min(config.rollout_batch_size, config.rollouts_per_round)
    return rows * float(row_bytes(lm.config.get_text_config(), longest + config.max_new_tokens, dtype))


def _fitting(model: nn.Module, config: ConstrainedConfig) -> float:
    """A step's rollouts: their states, and R's probabilities of all tokens, with their gradients."""
    own = causal_lm(model).config.get_text_config()
    tokens = config.auxiliary.batch_size * config.max_new_tokens
    return 4.0 * (8 * tokens * own.hidden_size + 6 * min(LOGITS_AT_ONCE, tokens * own.vocab_size))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _layers(model: nn.Module) -> int:
    return int(causal_lm(model).config.get_text_config().num_hidden_layers)
