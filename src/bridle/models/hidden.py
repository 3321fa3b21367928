"""The hidden states that enter a causal language model's output layer, and the logits they become.

The auxiliary model reads these states, so a policy or anchor that has run once has already done nearly
all of the auxiliary's work.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from bridle.errors import UserError
from bridle.models.sharding import whole
from bridle.utils.distributed import from_main


def causal_lm(model: torch.nn.Module) -> PreTrainedModel:
    """The `transformers` causal language model inside any wrapping by `accelerate` or `peft`."""
    model = extract_model_from_parallel(model)
    return model.get_base_model() if isinstance(model, PeftModel) else model


class HiddenStates:
    """Holds the last hidden states of the most recent forward: `last`, [batch, time, hidden]."""

    last: Tensor | None = None

    def _keep(self, module: torch.nn.Module, inputs: object, output: object) -> None:
        self.last = output[0]  # type: ignore[index]


@contextmanager
def capture_hidden_states(model: torch.nn.Module) -> Iterator[HiddenStates]:
    """Keeps the hidden states of every forward inside the block, at no extra cost.

    A hook, because neither `generate` nor TRL's fused loss hands them out.
    """
    hidden = HiddenStates()
    handle = causal_lm(model).base_model.register_forward_hook(hidden._keep)
    try:
        yield hidden
    finally:
        handle.remove()


@contextmanager
def last_positions(model: torch.nn.Module) -> Iterator[list[Tensor]]:
    """Keeps the last position's hidden state of every forward inside the block, in turn: [batch, hidden] each."""
    states: list[Tensor] = []

    def keep(module: torch.nn.Module, inputs: object, output: ModelOutput) -> None:
        states.append(output[0][:, -1])

    handle = causal_lm(model).base_model.register_forward_hook(keep)
    try:
        yield states
    finally:
        handle.remove()


@contextmanager
def project_only(model: torch.nn.Module, positions: Tensor) -> Iterator[None]:
    """Inside the block only some positions go through the output layer, as one row.

    Where there is no Triton, TRL's fused head sends every position through the vocabulary: padding, prompts and
    rollouts too, which carry no label.

    Args:
        model: a causal language model whose forwards inside the block are of one batch.
        positions: [n] in the flattened [batch · time], those to keep.
    """
    with _before_output_layer(model, lambda states: states.flatten(0, 1)[positions][None]):
        yield


@contextmanager
def without_logits(model: torch.nn.Module) -> Iterator[None]:
    """Inside the block one position goes through the output layer: only the hidden states are wanted.

    One, since DDP looks for a parameter that took no part in a forward.
    """
    with _before_output_layer(model, lambda states: states[:1, -1:]):
        yield


@contextmanager
def _before_output_layer(model: torch.nn.Module, select: Callable[[Tensor], Tensor]) -> Iterator[None]:
    def cut(module: torch.nn.Module, inputs: object, output: ModelOutput) -> ModelOutput:
        output["last_hidden_state"] = select(output["last_hidden_state"])
        return output

    handle = causal_lm(model).base_model.register_forward_hook(cut)
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True)
class OutputLayer:
    """What makes logits of hidden states, as it stands: a linear map, and scale and soft cap of the architecture.

    Attributes:
        weight: [vocabulary, hidden], whole.
        bias: [vocabulary], or None.
        config: of the language model's text.
    """

    weight: Tensor
    bias: Tensor | None
    config: PreTrainedConfig

    @classmethod
    def of(cls, model: torch.nn.Module, dtype: torch.dtype | None = None) -> "OutputLayer":
        """That of a causal language model; gathered, where it is in shards.

        Args:
            model: the language model.
            dtype: in which the linear map is made; None for that of the weights.
        """
        lm = causal_lm(model)
        head = lm.get_output_embeddings()
        bias = getattr(head, "bias", None)
        weight, bias = whole(head.weight), None if bias is None else whole(bias)
        if dtype is not None:
            weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        return cls(weight, bias, lm.config.get_text_config())

    def detach(self, copy: bool = False) -> "OutputLayer":
        """The same values without a graph, which stay when the model's weights are exchanged.

        Args:
            copy: as a sharded model needs, whose gathered weights lie in memory that is used again.
        """
        weight, bias = (None if part is None else part.detach() for part in (self.weight, self.bias))
        assert weight is not None
        if copy:
            weight, bias = weight.clone(), None if bias is None else bias.clone()
        return replace(self, weight=weight, bias=bias)

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """[..., hidden] -> [..., vocabulary]"""
        return self.shape(torch.nn.functional.linear(hidden_states.to(self.weight.dtype), self.weight, self.bias))

    def shape(self, logits: Tensor) -> Tensor:
        """What the architecture does to the linear map's result; the same tensor if nothing. [..., vocabulary]"""
        if (scaling := getattr(self.config, "logits_scaling", None)) is not None:  # Granite divides
            logits = logits / scaling
        if (scale := getattr(self.config, "logit_scale", None)) is not None:  # Cohere multiplies
            logits = logits * scale
        if (cap := getattr(self.config, "final_logit_softcapping", None)) is not None:  # Gemma
            logits = torch.tanh(logits / cap) * cap
        return logits


def check_output_adapter(model: torch.nn.Module) -> None:
    """Refuses an adapter of the output layer, whose own weight alone is read, so that it would never be trained.

    Raises:
        UserError: there is one.
    """
    if isinstance(causal_lm(model).get_output_embeddings(), BaseTunerLayer):
        raise UserError(
            "target_modules: an adapter of the output layer would never be trained; leave lm_head out, or train the "
            "layer itself by modules_to_save"
        )


def project(model: torch.nn.Module, hidden_states: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Logits of hidden states, the linear map in `dtype`. [..., hidden] -> [..., vocabulary]"""
    return OutputLayer.of(model, dtype)(hidden_states)


@torch.no_grad()
def check_projection(model: torch.nn.Module) -> None:
    """Refuses a model whose logits are not what `project` makes of its hidden states.

    Raises:
        UserError: the architecture does something to its logits that Bridle does not know.
    """
    lm = causal_lm(model)
    probe = torch.arange(1, 4, device=lm.device)[None] % lm.config.get_text_config().vocab_size
    training = lm.training
    lm.eval()
    with capture_hidden_states(lm) as hidden:
        logits = lm(input_ids=probe, use_cache=False).logits
    lm.train(training)
    known = hidden.last is not None and torch.allclose(
        project(lm, hidden.last).float(), logits.float(), rtol=1e-2, atol=1e-2
    )
    if not from_main(known):  # the others may have been given no weights yet
        raise UserError(
            f"{lm.config.model_type}: this architecture makes its logits in a way Bridle does not know; "
            "please report it with the model's name"
        )
