"""All measurements of `bridle evaluate`, the same for every method, guided ones included."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bridle.data import DataSource, Prompt, VerbalisedLabel, encode_prompt, labelled_texts, read_prompts
from bridle.data.prompts import chat_prompt, check_room
from bridle.data.readers import whole_text
from bridle.errors import UserError
from bridle.evaluation.classification import classification_report, classify
from bridle.evaluation.completer import Completer
from bridle.evaluation.generation import generate_completions
from bridle.evaluation.observations import Observations
from bridle.evaluation.prompt_sets import GenerationOptions, PromptSet
from bridle.evaluation.utility import Perplexity, likelihoods
from bridle.models.guidance import NADOGuide
from bridle.models.loading import context_length, prompt_room
from bridle.models.monitor import Monitor

COMPLETIONS_PER_ROW = 4  # sampled at once for each row of a forward, since a step reads one position only


@dataclass
class Evaluator(Completer):
    """A model and the settings of its evaluation.

    Attributes:
        guide: an (entered) guide; the guided model is evaluated.
        monitor: watches the completions that are drawn; its guide is `guide`.
        batch_size: rows in one forward.
        seed: of sampling and of bootstraps.
        show: called with each figure as a line of text.
        observations: the observations behind the figures.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    guide: NADOGuide | None = None
    batch_size: int = 64
    seed: int = 0
    show: Callable[[str], None] = field(default=lambda line: None)
    observations: Observations = field(default_factory=Observations)
    monitor: Monitor | None = None

    def read(self, prompts: PromptSet) -> list[Prompt]:
        """Reads the prompts of a set; a `UserError` names one that leaves no room for the new tokens."""
        return read_prompts(
            prompts.source,
            self.tokenizer,
            max_prompt_tokens=self._room(prompts.generation.max_new_tokens),
            prefix_tokens=prompts.generation.prompt_tokens,
        )

    def prompt(self, text: str, max_new_tokens: int, chat: bool = False) -> Prompt:
        """A single prompt from the command line, as text or as a user's turn. Raises as `read`."""
        room = self._room(max_new_tokens)
        if chat:
            prompt = chat_prompt([{"role": "user", "content": whole_text(text)}], {}, 1, self.tokenizer, room, "prompt")
        else:
            prompt = Prompt(whole_text(text), encode_prompt(text, self.tokenizer))
        check_room(prompt.ids, room, "prompt")
        return prompt

    def _room(self, max_new_tokens: int) -> int | None:
        """Maximal length of a prompt; None where the context is unlimited."""
        room = prompt_room(self.model, max_new_tokens)
        if room is not None and room < 0:
            context = context_length(self.model)
            raise UserError(f"max_new_tokens: {max_new_tokens} are more than the model's context of {context}")
        return room

    def draw(
        self, prompts: Sequence[Prompt], how: GenerationOptions, on_token: Callable[[Tensor], None] | None = None
    ) -> list[list[str]]:
        """[prompts, samples] completions, decoded after guidance; `on_token` as in `generate_completions`."""
        return generate_completions(
            self.model,
            self.tokenizer,
            [prompt.ids for prompt in prompts],
            samples=how.samples,
            max_new_tokens=how.max_new_tokens,
            batch_size=COMPLETIONS_PER_ROW * self.batch_size,
            seed=self.seed,
            guide=self.guide,
            decoding=how,
            monitor=self.monitor,
            on_token=on_token,
        )

    def perplexity(self, held_out: Mapping[str, Sequence[str]]) -> dict[str, Any]:
        """The part `perplexity` of the results, of held-out texts by the name of their file."""
        part = {}
        for name, texts in held_out.items():
            found = likelihoods(self.model, self.tokenizer, texts, **self._reading())
            self.observations.add_likelihoods(name, found)
            measured = Perplexity.of(found, seed=self.seed)
            self.show(f"perplexity of {name}\n{measured}")
            part[name] = measured.to_json()
        return part

    def classification(self, test: DataSource, validation: DataSource, label: VerbalisedLabel) -> dict[str, Any]:
        """The part `classification` of the results: the likelihoods of labels in words as a classifier.

        Args:
            test: rows to classify.
            validation: rows that choose the threshold and the calibration.
            label: the template of text and label, as in training.
        """
        scored = {}
        for name, source in (("validation", validation), ("test", test)):
            texts, classes = labelled_texts(source, label)
            scored[name] = classify(self.model, self.tokenizer, texts, label, **self._reading()), classes
        result = classification_report(*scored["validation"], *scored["test"], seed=self.seed)
        self.observations.add_classified(*scored["test"])
        self.show(str(result))
        return result.to_json()

    def _reading(self) -> dict[str, Any]:
        """The options of every function that reads texts."""
        return {"batch_size": self.batch_size, "adjust_logits": self.guide and self.guide.log_probs}

    def tasks(
        self,
        names: Sequence[str],
        *,
        task_data: Path | None,
        limit: int | Mapping[str, int] | None,
        shots: int | None,
    ) -> dict[str, Any]:
        """The part `tasks` of the results, by lm-eval."""
        from bridle.evaluation.tasks import evaluate_tasks  # lm-eval is optional

        found = evaluate_tasks(
            self.model,
            self.tokenizer,
            names,
            task_data=task_data,
            limit=limit,
            shots=shots,
            batch_size=self.batch_size,
            seed=self.seed,
            guide=self.guide,
        )
        for name, result in found.items():
            self.observations.add_answers(name, result)
            self.show(f"{name}: {result}")
        return {name: result.to_json() for name, result in found.items()}
