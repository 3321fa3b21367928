"""Rollouts by vLLM, through TRL's `VLLMGeneration`, which also brings the policy's weights to it.

An engine's probabilities differ a little from the policy's: other kernels, other precision. So the log-probability that
each token had when it was drawn is kept, and R's labels are weighted by the likelihood ratio of what follows
(`importance_weights`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Literal

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import PositiveFloat, PositiveInt
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bridle.errors import UserError, first_line
from bridle.models.sampling import Trace, sample
from bridle.models.sharding import local
from bridle.utils.distributed import all_gather, rank, world_size
from bridle.utils.extras import to_install
from bridle.utils.settings import check_fields


@dataclass
class SamplerOptions:
    """What draws rollouts.

    Attributes:
        engine: `transformers`, in this process; or `vllm` (`pip install ".[vllm]"`), which does not draw the same
            text again for the same seed.
        mode: `colocate`: vLLM shares the GPUs of the policy; `server`: it runs elsewhere (`trl vllm-serve`).
        server_url: of a server, e.g. "http://localhost:8000".
        gpu_memory: share of a GPU's memory that a colocated vLLM takes.
        tensor_parallel: GPUs that share a colocated model.
        sleep: whether a colocated vLLM frees its memory between rounds.

    Raises:
        UserError: a value of the wrong kind or out of range, or one that the engine or the mode does not read; the
            message begins with the field.
    """

    engine: Literal["transformers", "vllm"] = "transformers"
    mode: Literal["colocate", "server"] = "colocate"
    server_url: str | None = None
    gpu_memory: PositiveFloat = 0.3
    tensor_parallel: PositiveInt = 1
    sleep: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        if self.gpu_memory > 1:
            raise UserError(f"gpu_memory: is a share, at most 1, not {self.gpu_memory:g}")
        colocated = ("gpu_memory", "tensor_parallel", "sleep")
        unread = {
            ("mode", "server_url", *colocated): (self.engine == "transformers", "engine: vllm"),
            ("server_url",): (self.mode == "colocate", "mode: server"),
            colocated: (self.mode == "server", "mode: colocate"),
        }
        defaults = {field.name: field.default for field in fields(self)}
        for names, (is_unread, needed) in unread.items():
            for name in names:
                if is_unread and getattr(self, name) != defaults[name]:
                    raise UserError(f"{name}: has no effect without {needed}; set that too, or leave {name} out")
        if self.mode == "server" and self.server_url is None:
            raise UserError("server_url: mode: server needs one, such as http://localhost:8000")


def sampler(options: SamplerOptions, tokenizer: PreTrainedTokenizerBase) -> Callable[..., list[list[int]]]:
    """The function that draws rollouts, with the arguments of `bridle.models.sampling.sample`."""
    if options.engine == "transformers":
        return sample
    return lambda model, prompts, **how: _sample(options, tokenizer, model, prompts, **how)


def _sample(
    options: SamplerOptions,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end_token_ids: Sequence[int],
    traces: dict[int, Trace],
    on_batch: Callable[[Mapping[int, list[int]]], None],
    **_: Any,
) -> list[list[int]]:
    """All processes call this; each draws its share of the prompts and returns all completions."""
    engine = _engine(options, model, tokenizer, max_new_tokens, list(end_token_ids))
    with _base_restored(model):
        engine.sync_weights()
    size = -(-len(prompts) // world_size())  # in server mode every process must have as many
    mine = [index % len(prompts) for index in range(rank() * size, (rank() + 1) * size)]
    _, completions, log_probs, _ = engine.generate([list(prompts[index]) for index in mine], None, 1)
    drawn = {
        index: Trace(list(ids), [step[0] for step in likely], None, is_exact=False)
        for index, ids, likely in zip(mine, completions, log_probs, strict=True)
    }
    on_batch({index: trace.tokens for index, trace in drawn.items()})
    for part in all_gather(drawn):
        traces |= part
    return [traces[index].tokens for index in range(len(prompts))]


@contextmanager
def _base_restored(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Restores the weights beneath adapters after the block, in which TRL merges and unmerges them.

    In half precision (W + Δ) − Δ is not W, and the model beneath would drift from round to round.
    """
    layers = [module.get_base_layer() for module in model.modules() if isinstance(module, BaseTunerLayer)]
    halves = [weight for layer in layers for weight in layer.parameters() if weight.dtype.itemsize == 2]
    kept = [local(weight).to("cpu", copy=True) for weight in halves]
    yield
    for weight, before in zip(halves, kept, strict=True):
        local(weight).copy_(before)


_running: list[tuple[PreTrainedModel, tuple, Any]] = []
"""The policy, the engine's settings and the engine, which takes minutes to start and much of a GPU: at most one."""


def release_engine() -> None:
    """Frees the engine and its policy."""
    _running.clear()


def _engine(
    options: SamplerOptions,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    end_token_ids: list[int],
) -> Any:
    settings = (*vars(options).values(), max_new_tokens)
    if not _running or _running[0][0] is not model or _running[0][1] != settings:
        release_engine()
        from accelerate import Accelerator
        from trl.generation import vllm_generation

        where: dict[str, Any] = {"mode": options.mode, "server_base_url": options.server_url}
        if options.mode == "colocate":
            where |= {"gpu_memory_utilization": options.gpu_memory, "enable_sleep_mode": options.sleep}
            where |= {"tensor_parallel_size": options.tensor_parallel}
        how = {"max_completion_length": max_new_tokens, "generation_kwargs": {"stop_token_ids": end_token_ids}}
        try:
            started = vllm_generation.VLLMGeneration(model, Accelerator(), tokenizer, **where, **how)
        except ImportError as error:
            raise UserError(f"sampler: engine: vllm needs the package vllm; {to_install('vllm')}") from error
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UserError(f"sampler: vLLM cannot start: {first_line(error)}") from error
        _running.append((model, settings, started))
    return _running[0][2]
