"""The auxiliary model R (NADO): one output for every prefix and next token, in the shape of a language model's logits.

It is a small trunk over the hidden states of the model that it guides, and a vocabulary head. A memory keeps what the
states of the completion so far have shown. Optionally it has a body of its own ("a separate network"), which reads
tokens instead of those hidden states. In the log-linear form the vocabulary head reads the guided model's states alone,
so that it can be folded into that model's output layer.
"""

import os
from copy import deepcopy
from dataclasses import field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from bridle.core import log_linear
from bridle.core.decomposition import log_target
from bridle.errors import UserError
from bridle.models.forward import disable_dropout
from bridle.models.hidden import causal_lm
from bridle.models.loading import merged, reason
from bridle.models.sharding import in_shards, weights_digest, whole
from bridle.utils.files import read_json

FINGERPRINT = 256  # numbers of each parameter


class AuxiliaryConfig(PreTrainedConfig):
    """Shape of an auxiliary model.

    Attributes:
        hidden_size, vocab_size: those of the model that it guides.
        depth: residual blocks in the trunk.
        expansion: inner width of a block, in multiples of `hidden_size`.
        head_rank: rank of the vocabulary head; None for a full one.
        memory: width of the memory; 0 for none.
        form: "sigmoid", or "log-linear" (`core.log_linear`).
        network: configuration of a body of its own, as a dictionary; None to read the guided model's hidden states.
        provenance: what it was fitted with: constraint, round, `tilt`, the w of a share or None, and under `fitted_on`
            and `trained_model` the fingerprints of the models that it fits.
    """

    model_type = "bridle-auxiliary"

    hidden_size: int = 0
    vocab_size: int = 0
    depth: int = 1
    expansion: float = 2.0
    head_rank: int | None = None
    memory: int = 0
    form: str = "sigmoid"
    network: dict[str, Any] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)


class Block(nn.Module):
    """A residual block over each position alone. [..., hidden] -> [..., hidden]."""

    def __init__(self, hidden_size: int, inner_size: int):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.up = nn.Linear(hidden_size, inner_size)
        self.down = nn.Linear(inner_size, hidden_size)

    def forward(self, states: Tensor) -> Tensor:
        return states + self.down(nn.functional.silu(self.up(self.norm(states))))


class Memory(nn.Module):
    """What R keeps of a completion: the largest value so far of each of some learned features of its states.

    The state at a prefix's last token serves the next token, and forgets what a completion said before. It does not
    know where the completion began either, while the constraint judges what was written since.
    """

    def __init__(self, hidden_size: int, width: int):
        super().__init__()
        self.write = nn.Linear(hidden_size, width)
        self.read = nn.Linear(width, hidden_size)

    def entries(self, states: Tensor) -> Tensor:
        """What each state adds, in (-1, 1). [..., hidden] -> [..., width]"""
        return self.write(states).tanh()

    def forward(self, states: Tensor, kept: Tensor) -> Tensor:
        """States with what is kept. [..., hidden], [..., width] -> [..., hidden]"""
        return states + self.read(kept)


def largest_so_far(entries: Tensor, begins: Tensor | None) -> Tensor:
    """The largest entry since the completion began.

    Args:
        entries: [batch, time, width], in (-1, 1).
        begins: [batch, time], true at the empty prefix of each completion; None where rows are completions.
    """
    if begins is None:
        return entries.cummax(dim=1).values
    lifted = 2.0 * begins.cumsum(dim=1)[..., None]  # any entry of a completion then exceeds all those before it
    return (entries + lifted).cummax(dim=1).values - lifted


class AuxiliaryModel(PreTrainedModel):
    """R for every prefix and next token, as logits before the sigmoid (NADO, NeurIPS 2022).

    `r_logits[..., t, v]` scores the prefix up to t followed by v. It is made of the prefix's value (one number) and the
    token's (a vocabulary head that starts at zero, so that a new auxiliary does not change the guided model). In the
    sigmoid form it is their sum. In the log-linear form the value is the logit of the prefix's own R, and the token's
    is the logarithm of a factor.
    """

    config_class = AuxiliaryConfig
    base_model_prefix = "auxiliary"
    config: AuxiliaryConfig

    def __init__(self, config: AuxiliaryConfig):
        super().__init__(config)
        self.network = None
        if config.network is not None:
            self.network = AutoModel.from_config(AutoConfig.for_model(**config.network), trust_remote_code=False)
        size, rank = config.hidden_size, config.head_rank
        self.norm = nn.LayerNorm(size)
        self.memory = Memory(size, config.memory) if config.memory else None
        self.trunk = nn.Sequential(*(Block(size, int(config.expansion * size)) for _ in range(config.depth)))
        self.value = nn.Linear(size, 1)
        self.down = nn.Identity() if rank is None else nn.Linear(size, rank, bias=False)
        self.head = nn.Linear(size if rank is None else rank, config.vocab_size, bias=not self.is_log_linear)
        if self.is_log_linear:
            self.scale = nn.Buffer(torch.ones(size))
        self.post_init()
        nn.init.zeros_(self.head.weight)
        if self.head.bias is not None:
            nn.init.zeros_(self.head.bias)
        if self.memory is not None:
            nn.init.zeros_(self.memory.read.weight)

    @property
    def is_log_linear(self) -> bool:
        """Whether R has the log-linear form; then R of a next token depends on p_a's whole distribution."""
        return self.config.form == "log-linear"

    @property
    def reads_rows(self) -> bool:
        """Whether what it reads at a prefix depends on more than the guided model's state there."""
        return self.network is not None or self.memory is not None

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, features: Tensor, tokens: Tensor | None = None, anchor_logits: Tensor | None = None) -> Tensor:
        """R of all next tokens of each prefix, or of one: r_logits [..., vocabulary], or [...] with `tokens`.

        Args:
            features: [..., width], from `features`.
            tokens: [...], one next token for each prefix.
            anchor_logits: [..., vocabulary] of p_a; only the log-linear form reads them.
        """
        if self.is_log_linear:
            assert anchor_logits is not None
            log_r = log_linear.log_r(self._value(features), self._tilt(features), anchor_logits)
            return log_linear.logit_of(log_r if tokens is None else log_r.gather(-1, tokens[..., None]).squeeze(-1))
        states = self.trunk(features)
        value, codes = self.value(states), self.down(states)
        if tokens is None:
            return value + self.head(codes)
        chosen = nn.functional.embedding(tokens, self.head.weight)
        return value.squeeze(-1) + (codes * chosen).sum(-1) + self.head.bias[tokens]

    def log_q(
        self, features: Tensor, anchor_logits: Tensor, guidance_scale: float = 1.0, violate: bool = False
    ) -> Tensor:
        """log q, or with `violate` log q⁻: q⁻(v|s) ∝ p_a(v|s)·(1 − R(s∘v))^η. [..., vocabulary]

        Args:
            features: [..., width], from `features`.
            anchor_logits: [..., vocabulary] of p_a, logits or log-probabilities.
            guidance_scale: η.
            violate: seek violations.
        """
        if self.is_log_linear and not violate:  # R(s) and Z(s) cancel
            return F.log_softmax(anchor_logits.float() + guidance_scale * self._tilt(features), dim=-1)
        r_logits = self(features, anchor_logits=anchor_logits)
        return log_target(anchor_logits, -r_logits if violate else r_logits, guidance_scale)

    def excess(self, r_logits: Tensor) -> Tensor:
        """max(R − 1, 0): what the fit's penalty keeps small; 0 in the sigmoid form. [...] -> [...]"""
        return log_linear.excess(r_logits) if self.is_log_linear else torch.zeros_like(r_logits)

    def scale_to(self, hidden_states: Tensor) -> None:
        """Lets a new log-linear R read numbers of size 1, whatever the guided model's are. [..., hidden]"""
        if self.is_log_linear and not self.head.weight.any():
            squares = hidden_states.float().square().flatten(0, -2).mean(0)
            self.scale.copy_(squares.clamp(min=1e-12).rsqrt())

    @torch.no_grad()
    def shift_value(self, by: float) -> None:
        """Adds a number to the value's logit, at every prefix."""
        self.value.bias.add_(by)

    def output_change(self) -> Tensor:
        """U·V of the log-linear form: what, added to the output layer's weight, makes p into q. [vocabulary, hidden]"""
        into = self.down.weight if isinstance(self.down, nn.Linear) else torch.eye(len(self.scale)).to(self.scale)
        return self.head.weight @ (into * self.scale)

    def values(self, features: Tensor) -> Tensor:
        """The logit of R of each prefix of rows itself, of the log-linear form; the sigmoid form has none.

        [batch, time, width] -> [batch, time], or [batch, 0]
        """
        return self._value(features).squeeze(-1) if self.is_log_linear else features.new_zeros(len(features), 0)

    def _value(self, features: Tensor) -> Tensor:
        return self.value(self.trunk(features[..., : self.config.hidden_size]))

    def _tilt(self, features: Tensor) -> Tensor:
        """r, of the log-linear form. [..., width] -> [..., vocabulary]"""
        return self.head(self.down(features[..., self.config.hidden_size :]))

    def features(
        self,
        hidden_states: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        begins: Tensor | None = None,
    ) -> Tensor:
        """What R reads at each prefix. [batch, time, hidden] -> [batch, time, width]

        Args:
            hidden_states: [batch, time, hidden] of the guided model; ignored by the sigmoid form with its own network.
            input_ids, attention_mask: [batch, time]; only a network of its own reads them.
            begins: [batch, time], true at the last token before each completion; None where completions begin with the
                row's first token. Only a memory reads it.
        """
        return self.remembering(self.states(hidden_states, input_ids, attention_mask), hidden_states, begins)

    def remembering(self, states: Tensor, hidden_states: Tensor, begins: Tensor | None = None) -> Tensor:
        """As `features`, from what `states` gives. [batch, time, hidden] and [batch, time] -> [batch, time, width]"""
        kept = None if self.memory is None else largest_so_far(self.memory.entries(states), begins)
        return self.joined(states, kept, hidden_states)

    def joined(self, states: Tensor, kept: Tensor | None, hidden_states: Tensor) -> Tensor:
        """The trunk's input, and in the log-linear form the guided model's states beside it. [..., width]

        Args:
            states: [..., hidden], from `states`.
            kept: [..., memory], what the memory has kept; None without one.
            hidden_states: [..., hidden] of the guided model.
        """
        read = states if self.memory is None else self.memory(states, kept)
        if not self.is_log_linear:
            return read
        return torch.cat([read, hidden_states.detach().to(read.dtype) * self.scale], dim=-1)

    def states(
        self,
        hidden_states: Tensor | None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The guided model's states, or those of its own network, normalised. [..., hidden] -> [..., hidden]

        Args:
            hidden_states: [..., hidden], as in `features`.
            input_ids, attention_mask: [batch, time].
            kwargs: of its own network, such as a cache.
        """
        if self.network is not None:
            outputs = self.network(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
            hidden_states = outputs.last_hidden_state
        assert hidden_states is not None
        read = hidden_states if self.network is not None else hidden_states.detach()
        return self.norm(read.to(self.value.weight.dtype))


AutoConfig.register(AuxiliaryConfig.model_type, AuxiliaryConfig)
AutoModel.register(AuxiliaryConfig, AuxiliaryModel)


def new_auxiliary(
    model: PreTrainedModel | PeftModel,
    *,
    depth: int = 1,
    expansion: float = 2.0,
    head_rank: int | None = None,
    memory: int = 0,
    form: str = "sigmoid",
    own_network: bool = False,
) -> AuxiliaryModel:
    """A new auxiliary for a causal language model.

    A network of its own starts as a copy of the language model's body, adapters merged. It has no dropout: all
    processes, and a resumed run, read the same R.
    """
    text_config = model.config.get_text_config()
    config = AuxiliaryConfig(
        hidden_size=text_config.hidden_size,
        # The output layer, not the configuration: padding a vocabulary can make the two differ.
        vocab_size=causal_lm(model).get_output_embeddings().weight.shape[0],
        depth=depth,
        expansion=expansion,
        head_rank=head_rank,
        memory=memory,
        form=form,
        network=text_config.to_diff_dict() | {"model_type": text_config.model_type} if own_network else None,
    )
    auxiliary = AuxiliaryModel(config).float()
    if auxiliary.network is not None:
        whole = merged(deepcopy(model)) if isinstance(model, PeftModel) else model
        auxiliary.network.load_state_dict(whole.get_decoder().state_dict())
        disable_dropout(auxiliary.network)
    return auxiliary.to(model.device)


def fingerprint(model: nn.Module) -> str:
    """A short hash of some of a model's weights, the same in float32 and bfloat16; it tells which models an R fits.

    A model with untrained adapters, which change nothing yet, has the base model's.
    """
    with in_shards(model):
        return weights_digest(
            (name, whole(one.detach()).flatten()[:FINGERPRINT].to(torch.bfloat16))
            for name, one in acting_parameters(model).items()
        )


def acting_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """A model's parameters by name, without LoRA adapters that change nothing yet."""
    parameters = {name.replace("_checkpoint_wrapped_module.", ""): one for name, one in model.named_parameters()}
    # The factors that begin at 0: of a linear layer the second one, of an embedding the first.
    zeros = [one for name, one in parameters.items() if "lora_B" in name or "lora_embedding_A" in name]
    if not zeros or any(whole(one.detach()).any() for one in zeros):
        return parameters
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): one
        for name, one in parameters.items()
        if "lora_" not in name
    }


def load_auxiliary(folder: str | Path, model: PreTrainedModel) -> AuxiliaryModel:
    """Loads the auxiliary of a folder and checks that it fits the causal language model that it is to guide.

    Raises:
        UserError: the folder holds no auxiliary, or one for a model of another shape.
    """
    folder = Path(folder)
    if not _is_auxiliary(folder):
        inside = sorted(str(path.parent) for path in folder.glob("*/config.json") if _is_auxiliary(path.parent))
        hint = f"; name {' or '.join(inside)}" if inside else ""
        if not folder.exists() and (folder.parent / "metrics.jsonl").exists():
            hint = ": the run has fitted no R; its rounds' warnings say why"
        raise UserError(f"{folder}: no auxiliary model here{hint}")
    try:
        auxiliary, info = AuxiliaryModel.from_pretrained(
            str(folder), dtype=torch.float32, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:
        raise UserError(f"{folder}: cannot load the auxiliary: {reason(folder, error)}") from error
    if missing := sorted(info["missing_keys"]):  # transformers fills them with random numbers
        raise UserError(f"{folder}: the auxiliary is incomplete: its weights lack '{missing[0]}'")
    vocab_size = model.get_output_embeddings().weight.shape[0]
    if auxiliary.config.vocab_size != vocab_size:
        raise UserError(
            f"{folder}: guides a vocabulary of {auxiliary.config.vocab_size} tokens, the model has {vocab_size}"
        )
    if auxiliary.network is None and auxiliary.config.hidden_size != model.config.get_text_config().hidden_size:
        raise UserError(f"{folder}: reads hidden states of another width than the model's")
    return auxiliary.to(model.device).eval()


def _is_auxiliary(folder: Path) -> bool:
    config = folder / "config.json"
    return os.path.isfile(config) and read_json(config, dict[str, Any]).get("model_type") == AuxiliaryConfig.model_type
