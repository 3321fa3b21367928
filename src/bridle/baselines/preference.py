"""Direct preference optimisation (DPO): a policy learns to prefer one completion of a prompt to another.

Minimises −log σ(β·[log p_θ(y_w|x)/p_0(y_w|x) − log p_θ(y_l|x)/p_0(y_l|x)]) with TRL's trainer (Rafailov et al., NeurIPS
2023, arXiv 2305.18290, equation 7). Here y_w complies and y_l violates, and both are the policy's own.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, ProgressCallback, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME  # the last file of a checkpoint
from trl import DPOConfig, DPOTrainer

from bridle.baselines.reinforcement import restored
from bridle.data import Rollout
from bridle.utils.checkpoints import EndsWhereItEnded, last_whole
from bridle.utils.interruption import deferring


@dataclass(frozen=True)
class Pair:
    """Two completions of a prompt, as token ids."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


def preference_pairs(rollouts: Sequence[Rollout], num_generations: int) -> list[Pair]:
    """A pair for each prompt that has both kinds: the best completion that complies, the worst that violates.

    A completion without a score is of neither kind. Of equal scores the first counts.

    Args:
        rollouts: scored; each prompt's completions stand together.
        num_generations: completions of a prompt.
    """
    pairs = []
    for start in range(0, len(rollouts), num_generations):
        of_prompt = [one for one in rollouts[start : start + num_generations] if one.value is not None]
        chosen = max((one for one in of_prompt if one.complies), key=_value, default=None)
        rejected = min((one for one in of_prompt if not one.complies), key=_value, default=None)
        if chosen and rejected:
            pairs.append(Pair(chosen.prompt_ids, chosen.completion_ids, rejected.completion_ids))
    return pairs


def _value(rollout: Rollout) -> float:
    return float(rollout.value or 0)


def prefer(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    config: DPOConfig,
    callbacks: Sequence[TrainerCallback] = (),
    resume: bool = False,
) -> int:
    """Trains a model in place, and returns the number of updates.

    Args:
        model: the starting model, loaded from a folder; also when a run resumes, for it is the reference p_0 too.
        tokenizer: with a pad token.
        pairs: at least one.
        config: of TRL, with the number of updates.
        callbacks: in place of those that print each record.
        resume: resume from the last checkpoint in the configuration's folder, if there is one.

    Raises:
        Interrupted: a signal arrived, and a callback ended the run.
    """
    checkpoint = last_whole(Path(config.output_dir), TRAINER_STATE_NAME) if resume else None
    with restored(model, tokenizer):
        trainer = _DPO(
            model=model,
            args=config,
            train_dataset=Dataset.from_list([asdict(pair) for pair in pairs]),
            processing_class=tokenizer,
            callbacks=list(callbacks),
        )
        for default in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(default)
        with deferring():
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    return int(trainer.state.global_step)


class _DPO(EndsWhereItEnded, DPOTrainer):
    def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
        return dataset  # token ids already, as they were drawn; decoding and encoding them could change them

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes none, since a checkpoint is not a model to publish."""
