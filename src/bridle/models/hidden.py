"""The hidden states that enter a causal language model's output layer, and the logits computed from them.

The auxiliary model reads these states, so one forward of the policy or the anchor serves it too. Forward hooks keep
them, because neither `generate` nor TRL's fused loss returns them.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from bridle.core.output_layer import OutputLayer
from bridle.errors import UserError
from bridle.models.sharding import whole
from bridle.utils.distributed import broadcast_object


def causal_lm(model: torch.nn.Module) -> PreTrainedModel:
    """The `transformers` causal language model inside any wrapping by `accelerate` or `peft`."""
    model = extract_model_from_parallel(model)
    return model.get_base_model() if isinstance(model, PeftModel) else model


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode inside the block."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


class HiddenStates:
    """Holds the last hidden states of the most recent forward: `last`, [batch, time, hidden]."""

    last: Tensor | None = None

    def _keep(self, module: torch.nn.Module, inputs: object, output: ModelOutput) -> None:
        self.last = output[0]


@contextmanager
def capture_hidden_states(model: torch.nn.Module) -> Iterator[HiddenStates]:
    """Keeps the hidden states of the most recent forward inside the block."""
    hidden = HiddenStates()
    with causal_lm(model).base_model.register_forward_hook(hidden._keep):
        yield hidden


@contextmanager
def last_positions(model: torch.nn.Module) -> Iterator[list[Tensor]]:
    """Keeps the last position's hidden state of every forward inside the block, in order: [batch, hidden] each."""
    states: list[Tensor] = []

    def keep(module: torch.nn.Module, inputs: object, output: ModelOutput) -> None:
        states.append(output[0][:, -1])

    with causal_lm(model).base_model.register_forward_hook(keep):
        yield states


def contiguous_states(model: torch.nn.Module) -> RemovableHandle:
    """Until the handle is removed, or inside its block, the output layer reads a contiguous copy of its input.

    `generate` projects a slice, the last position of each row. torch then copies a frozen weight, as that of a model
    with LoRA, once for each row: 15 GB for 256 rows of SmolLM2.
    """
    head = causal_lm(model).get_output_embeddings()
    return head.register_forward_pre_hook(lambda layer, inputs: (inputs[0].contiguous(), *inputs[1:]))


def project_only(model: torch.nn.Module, positions: Tensor) -> AbstractContextManager[object]:
    """Inside the block only some positions enter the output layer, as one row.

    Without Triton, TRL's fused head would project every position: padding, prompts and rollouts too, which have no
    label.

    Args:
        positions: [n] in the flattened [batch · time] of the block's forwards.
    """
    return _select_before_output_layer(model, lambda states: states.flatten(0, 1)[positions][None])


def without_logits(model: torch.nn.Module) -> AbstractContextManager[object]:
    """Inside the block a single position enters the output layer, for forwards whose hidden states alone are used.

    One position, because DDP expects every parameter to take part in a forward.
    """
    return _select_before_output_layer(model, lambda states: states[:1, -1:])


def _select_before_output_layer(
    model: torch.nn.Module, select: Callable[[Tensor], Tensor]
) -> AbstractContextManager[object]:
    def hook(module: torch.nn.Module, inputs: object, output: ModelOutput) -> ModelOutput:
        output["last_hidden_state"] = select(output["last_hidden_state"])
        return output

    return causal_lm(model).base_model.register_forward_hook(hook)


def output_layer(model: torch.nn.Module, dtype: torch.dtype | None = None) -> OutputLayer:
    """The output layer of a causal language model, gathered from its shards.

    Args:
        model: the language model.
        dtype: of the linear map; None for that of the weights.
    """
    lm = causal_lm(model)
    head = lm.get_output_embeddings()
    layer = OutputLayer(head.weight, getattr(head, "bias", None), lm.config.get_text_config()).each(whole)
    return layer if dtype is None else layer.each(lambda part: part.to(dtype))


def project(model: torch.nn.Module, hidden_states: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Logits of hidden states, the linear map in `dtype`. [..., hidden] -> [..., vocabulary]"""
    return output_layer(model, dtype)(hidden_states)


def check_output_adapter(model: torch.nn.Module) -> None:
    """Refuses an adapter of the output layer: Bridle reads only the layer's own weight and would never train it.

    Raises:
        UserError: there is one.
    """
    if isinstance(causal_lm(model).get_output_embeddings(), BaseTunerLayer):
        raise UserError(
            "target_modules: an adapter of the output layer would never be trained; leave lm_head out, or train the "
            "layer itself by modules_to_save"
        )


@torch.no_grad()
def check_projection(model: torch.nn.Module) -> None:
    """Refuses a model whose logits differ from what `project` computes from its hidden states.

    Raises:
        UserError: the architecture changes its logits in an unknown way.
    """
    lm = causal_lm(model)
    probe = torch.arange(1, 4, device=lm.device)[None] % lm.config.get_text_config().vocab_size
    with evaluation_mode(lm), capture_hidden_states(lm) as hidden:
        logits = lm(input_ids=probe, use_cache=False).logits.float()
    known, states = False, hidden.last
    if states is not None and states.shape[-1] == output_layer(lm).weight.shape[-1]:
        known = torch.allclose(project(lm, states).float(), logits, rtol=1e-2, atol=1e-2)
    if not broadcast_object(known):  # the other processes may have no weights yet
        raise UserError(
            f"{lm.config.model_type}: this architecture makes its logits in a way Bridle does not know; "
            "please report it with the model's name"
        )
