"""What is measured of completions, the same for a model here and for one behind a server."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bridle.constraints import Constraint
from bridle.data import Prompt
from bridle.data.encoding import encode_prompt
from bridle.evaluation.generation import evaluate_constraints, output_perplexity
from bridle.evaluation.observations import Observations
from bridle.evaluation.prompt_sets import GenerationOptions, PromptSet
from bridle.evaluation.results import generation_parts


class Completer(ABC):
    """Anything that completes prompts.

    Attributes:
        tokenizer: of the model, if it is known.
        seed: of sampling and of bootstraps.
        show: called with each figure as a line of text.
        observations: the observations behind the figures.
    """

    tokenizer: PreTrainedTokenizerBase | None
    seed: int
    show: Callable[[str], None]
    observations: Observations

    @abstractmethod
    def read(self, prompts: PromptSet) -> list[Prompt]:
        """Reads the prompts of a set; a `UserError` names one that cannot be completed."""

    @abstractmethod
    def draw(self, prompts: Sequence[Prompt], how: GenerationOptions) -> list[list[str]]:
        """[prompts, samples] completions."""

    def generation(
        self,
        sets: Sequence[PromptSet],
        constraints: Mapping[str, Constraint],
        *,
        base: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None,
    ) -> dict[str, Any]:
        """The parts `generation` and `text` of the results.

        Args:
            sets: prompts to complete, each as its `generation` says.
            constraints: by name; each scores the same completions.
            base: model and tokenizer that measure the perplexity of the completions.
        """
        found, fluency = {}, {}
        for prompts in sets:
            self.show(f"{prompts.name}: {prompts.generation}")
            read = self.read(prompts)
            read_by_base = self._read_by(base[1], read) if base is not None else []
            drawn = self.draw(read, prompts.generation)
            cut_before = {name: constraint.cut_texts() for name, constraint in constraints.items()}
            found[prompts.name] = evaluate_constraints(
                drawn, constraints, prompts=[prompt.given for prompt in read], seed=self.seed
            )
            for name, result in found[prompts.name].items():
                constraint = constraints[name]
                reads = f" ({constraint.reads})" if constraint.reads != "completion" else ""
                cut = constraint.cut_texts() - cut_before[name]
                note = f"\n{cut} completions were too long and scored in part" if cut else ""
                self.show(f"{prompts.name} under {name}{reads}\n{result}{note}")
            texts = [prompt.text for prompt in read]
            prompt_scores = {name: constraint.score(None, texts) for name, constraint in constraints.items()}
            self.observations.add_completions(prompts.name, read, drawn, found[prompts.name], prompt_scores)
            if base is not None:
                fluency[prompts.name] = output_perplexity(*base, read_by_base, drawn, seed=self.seed)
                self.show(f"perplexity of the completions under the base: {fluency[prompts.name]}")
        return generation_parts(found, fluency)

    def _read_by(self, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> list[list[int]]:
        """The tokens of prompts for another model, which may have another tokenizer."""
        if self.tokenizer is not None and self.tokenizer.get_vocab() == tokenizer.get_vocab():
            return [prompt.ids for prompt in prompts]
        return [encode_prompt(prompt.given, tokenizer) for prompt in prompts]
