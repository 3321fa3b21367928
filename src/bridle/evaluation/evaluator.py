"""Everything that `bridle evaluate` measures of one model, through one path for every method, a guided one included."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bridle.constraints import Constraint
from bridle.data import DataSource, Prompt, VerbalisedLabel, encode_prompt, labelled_texts, read_prompts
from bridle.data.prompts import check_room
from bridle.data.readers import whole_text
from bridle.errors import UserError
from bridle.evaluation.generation import evaluate_constraints, generate_completions, output_perplexity
from bridle.evaluation.observations import Observations
from bridle.evaluation.prompt_sets import PromptSet
from bridle.evaluation.results import generation_parts
from bridle.evaluation.tasks import evaluate_tasks
from bridle.evaluation.utility import Perplexity, likelihoods
from bridle.models.guidance import NADOGuide
from bridle.models.loading import context_length

DRAWN_PER_ROW = 4  # completions drawn side by side for each row of a forward: a step of theirs is one position


@dataclass
class Evaluator:
    """A model and how it is to be measured.

    Attributes:
        model: a causal language model.
        tokenizer: the model's.
        guide: measure the model as guided by this (entered) guide.
        batch_size: rows in one forward.
        seed: of sampling and of bootstraps.
        show: is told each figure as it is made.
        observations: what the figures were made from, item by item.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    guide: NADOGuide | None = None
    batch_size: int = 64
    seed: int = 0
    show: Callable[[str], None] = field(default=lambda line: None)
    observations: Observations = field(default_factory=Observations)

    def generation(
        self,
        sets: Sequence[PromptSet],
        constraints: Mapping[str, Constraint],
        *,
        samples: int,
        max_new_tokens: int,
        prompt_tokens: int | None = None,
        base: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None,
    ) -> dict[str, Any]:
        """The parts `generation` and `text` of the results.

        Args:
            sets: prompts to complete.
            constraints: by name; each judges the same completions.
            samples: completions a prompt.
            max_new_tokens: at which a completion is cut.
            prompt_tokens: take only the first so many tokens of each row; None does as the set says.
            base: model and tokenizer under which the perplexity of the completions is measured.
        """
        found, fluency = {}, {}
        for prompts in sets:
            read = self.read(prompts, max_new_tokens, prompt_tokens)
            asked = [prompt.ids for prompt in read]
            drawn = self.draw(asked, samples=samples, max_new_tokens=max_new_tokens)
            cut_before = {name: constraint.cut_texts() for name, constraint in constraints.items()}
            found[prompts.name] = evaluate_constraints(
                drawn, constraints, prompts=[prompt.messages or prompt.text for prompt in read], seed=self.seed
            )
            in_part = {name: constraint.cut_texts() - cut_before[name] for name, constraint in constraints.items()}
            texts = [prompt.text for prompt in read]
            prompt_scores = {name: constraint.score(None, texts) for name, constraint in constraints.items()}
            self.observations.add_completions(prompts.name, read, drawn, found[prompts.name], prompt_scores)
            for name, result in found[prompts.name].items():
                reads = f" ({constraints[name].reads})" if constraints[name].reads != "completion" else ""
                cut = f"\n{in_part[name]} completions were too long and scored in part" if in_part[name] else ""
                self.show(f"{prompts.name} under {name}{reads}\n{result}{cut}")
            if base is not None:
                fluency[prompts.name] = output_perplexity(*base, asked, drawn, seed=self.seed)
                self.show(f"perplexity of the completions under the base: {fluency[prompts.name]}")
        return generation_parts(found, fluency)

    def read(self, prompts: PromptSet, max_new_tokens: int, prompt_tokens: int | None = None) -> list[Prompt]:
        """The prompts of a set; one that leaves no room for the new tokens is a `UserError`."""
        return read_prompts(
            prompts.source,
            self.tokenizer,
            max_prompt_tokens=self._room(max_new_tokens),
            prefix_tokens=prompt_tokens or prompts.prompt_tokens,
        )

    def prompt(self, text: str, max_new_tokens: int) -> Prompt:
        """A single prompt, as a shell hands it over; raises as `read`."""
        ids = encode_prompt(text, self.tokenizer)
        check_room(ids, self._room(max_new_tokens), "prompt")
        return Prompt(whole_text(text), ids)

    def _room(self, max_new_tokens: int) -> int | None:
        """Tokens that a prompt may have; None where the context has no end."""
        context = context_length(self.model)
        if context and max_new_tokens > context:
            raise UserError(f"max_new_tokens: {max_new_tokens} are more than the model's context of {context}")
        return context - max_new_tokens if context else None

    def draw(
        self, prompts: Sequence[list[int]], *, samples: int, max_new_tokens: int, **options: Any
    ) -> list[list[str]]:
        """Completions, [prompts, samples]; `options` are those of `generate_completions`."""
        return generate_completions(
            self.model,
            self.tokenizer,
            prompts,
            samples=samples,
            max_new_tokens=max_new_tokens,
            batch_size=DRAWN_PER_ROW * self.batch_size,
            seed=self.seed,
            guide=self.guide,
            **options,
        )

    def perplexity(self, held_out: Mapping[str, Sequence[str]]) -> dict[str, Any]:
        """The part `perplexity`: held-out texts by the name of their file."""
        part = {}
        for name, texts in held_out.items():
            found = likelihoods(
                self.model,
                self.tokenizer,
                texts,
                batch_size=self.batch_size,
                adjust_logits=self.guide.log_probs if self.guide else None,
            )
            self.observations.add_likelihoods(name, found)
            measured = Perplexity.of(found, seed=self.seed)
            self.show(f"perplexity of {name}\n{measured}")
            part[name] = measured.to_json()
        return part

    def classification(self, test: DataSource, validation: DataSource, label: VerbalisedLabel) -> dict[str, Any]:
        """The part `classification`: the model as a classifier by the likelihood of its labels in words.

        Args:
            test: rows that are measured.
            validation: rows that choose the threshold and fit the calibration.
            label: how text and label are written as one text; that of training.
        """
        from bridle.evaluation.classification import classification_report, classify  # scikit-learn takes a second

        scored = {}
        for name, source in (("validation", validation), ("test", test)):
            texts, classes = labelled_texts(source, label)
            adjust_logits = self.guide.log_probs if self.guide else None
            scored[name] = (
                classify(
                    self.model,
                    self.tokenizer,
                    texts,
                    label,
                    batch_size=self.batch_size,
                    adjust_logits=adjust_logits,
                ),
                classes,
            )
        result = classification_report(*scored["validation"], *scored["test"], seed=self.seed)
        self.observations.add_classified(*scored["test"])
        self.show(str(result))
        return result.to_json()

    def tasks(
        self, names: Sequence[str], *, task_data: Path | None, limit: int | None, shots: int | None
    ) -> dict[str, Any]:
        """The part `tasks`, through lm-eval."""
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
