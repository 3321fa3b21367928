"""The variants of a subject at work: texts side by side, completions by the dozen, and the constraints' verdicts."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from threading import RLock

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bridle.constraints import Constraint, Given, Score
from bridle.constraints.reading import Messages
from bridle.data import encode_prompt
from bridle.data.prompts import check_room
from bridle.demo.subject import MOST, Subject, Variant
from bridle.demo.writing import REDRAW, Controls, Writing
from bridle.errors import UserError
from bridle.evaluation.generation import generate_completions
from bridle.evaluation.statistics import Estimate, estimate_proportion
from bridle.models.auxiliary import AuxiliaryModel
from bridle.models.guidance import NADOGuide, check_scale, load_guide
from bridle.models.loading import context_length, load_for_inference, prompt_room
from bridle.models.monitor import Monitor
from bridle.models.sampling import Decoding
from bridle.utils.settings import known_name

PARTS = 4  # in which the completions of `draw` arrive


@dataclass(frozen=True)
class Request:
    """What is asked of the variants.

    Attributes:
        prompt: its text.
        names: of the variants.
        max_new_tokens: tokens at which a text is cut.
        seed: of the draws.
        as_chat: the prompt is a user's turn, in the model's chat template.
    """

    prompt: str
    names: Sequence[str]
    max_new_tokens: int
    seed: int = 0
    as_chat: bool = False

    @property
    def given(self) -> str | Messages:
        """The prompt as a constraint reads it."""
        return [{"role": "user", "content": self.prompt}] if self.as_chat else self.prompt


@dataclass
class Draws:
    """Completions of one variant, and what a constraint says of them; no scores without a constraint.

    A completion that was withheld is None, and so is its score.
    """

    name: str
    total: int
    texts: list[str | None] = field(default_factory=list)
    scores: list[Score | None] = field(default_factory=list)

    @property
    def withheld(self) -> int:
        """How many completions were stopped each time that they were drawn."""
        return self.texts.count(None)

    @property
    def rate(self) -> Estimate:
        """The share of the scored completions that violate, with Wilson's interval for independent draws."""
        scores = [score for score in self.scores if score is not None]
        scored = [not score.complies for score in scores if not score.is_missing]
        return estimate_proportion(scored, missing=len(scores) - len(scored))


class Session:
    """A subject with its models, each loaded when it is first used.

    Tabs and buttons may ask at the same time, while a forward's hooks are the model's: one step runs at a time.

    Args:
        device: of the models; the GPU where there is one.
        show: called with a line before a model is loaded.
    """

    def __init__(self, subject: Subject, device: str | None = None, show: Callable[[str], None] = lambda line: None):
        self.subject, self._device, self._show, self._lock = subject, device, show, RLock()
        self._models: dict[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]] = {}
        self._auxiliaries: dict[tuple[str, str], AuxiliaryModel] = {}

    @property
    def local(self) -> dict[str, Constraint]:
        """The constraints that ask no other host."""
        return {name: one for name, one in self.subject.constraints.items() if not one.waits}

    @property
    def remote(self) -> dict[str, Constraint]:
        """The constraints that ask another host, and so only when a person says so."""
        return {name: one for name, one in self.subject.constraints.items() if one.waits}

    def load(self) -> None:
        """Loads the constraints of this machine and what is shown at first, so that mistakes show early.

        Raises:
            UserError: one of them cannot be loaded.
        """
        for constraint in self.local.values():
            constraint.load()
        for name in self.subject.shown:
            self._loaded(name)

    def unloaded(self, names: Iterable[str]) -> list[str]:
        """The variants among `names` whose model has yet to be loaded, which may take long."""
        found = self.subject.variants
        return [name for name in names if name in found and found[name].model not in self._models]

    @property
    def has_chats(self) -> bool:
        """Whether the first model has a chat template."""
        _, tokenizer, _ = self._loaded(self.subject.shown[0])
        return tokenizer.chat_template is not None

    def write(self, request: Request, controls: Controls) -> Iterator[dict[str, Writing]]:
        """Writes a text by each variant, a token of each in turn; yields the same mapping after each round.

        Raises:
            UserError: the request cannot be obeyed.
            RunStopped: a model's probabilities are not finite.
        """
        writings = {name: self._begin(name, request) for name in self._checked(request)}
        yield writings
        while not controls.stopped and (ahead := [one for one in writings.values() if not one.is_finished]):
            for writing in ahead:
                with self._lock:
                    writing.step(controls)
            yield writings

    def draw(
        self, request: Request, controls: Controls, samples: int, constraint: str | None
    ) -> Iterator[dict[str, Draws]]:
        """Draws completions by each variant and judges them; yields the same mapping after each part.

        Args:
            request: the prompt and how it is completed.
            controls: guidance and temperature; each part obeys what they say when it begins.
            samples: completions of each variant.
            constraint: the name of one that judges them; None for none.

        Raises:
            UserError: the request cannot be obeyed.
            RunStopped: a model's probabilities are not finite.
        """
        names = self._checked(request)
        draws = {name: Draws(name, samples) for name in names}
        sizes = [samples * (part + 1) // PARTS - samples * part // PARTS for part in range(PARTS)]
        yield draws
        for part, size in enumerate(sizes):
            for name in names if size else []:
                if controls.stopped:
                    return
                texts = self._completions(name, request, controls, size, request.seed * PARTS + part)
                draws[name].texts += texts
                if constraint is not None:
                    kept = [text for text in texts if text is not None]
                    scores = iter(self._scores(constraint, request.given, kept) if kept else [])
                    draws[name].scores += [None if text is None else next(scores) for text in texts]
                yield draws

    def judge(self, texts: Mapping[str, str], given: Given, remote: bool) -> dict[str, dict[str, Score]]:
        """The verdicts on finished texts: by the texts' names, then by constraint.

        Args:
            texts: by name.
            given: their prompt.
            remote: ask the constraints of other hosts, and them alone.

        Raises:
            UserError: a constraint cannot be used.
        """
        found: dict[str, dict[str, Score]] = {name: {} for name in texts}
        for constraint in (self.remote if remote else self.local) if texts else ():
            scores = self._scores(constraint, given, list(texts.values()))
            for name, score in zip(texts, scores, strict=True):
                found[name][constraint] = score
        return found

    def _scores(self, constraint: str, given: Given, texts: list[str]) -> list[Score]:
        with self._lock:
            judge = self.subject.constraints[constraint]
            judge.load()
            return judge.score([given] * len(texts), texts)

    def _checked(self, request: Request) -> Sequence[str]:
        if not 1 <= len(request.names) <= MOST:
            raise UserError(f"methods: choose one to {MOST} to see side by side, not {len(request.names)}")
        for name in request.names:
            known_name(name, self.subject.variants, "methods", "method")
        return request.names

    def _loaded(self, name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, AuxiliaryModel | None]:
        variant: Variant = self.subject.variants[name]
        with self._lock:
            if variant.model not in self._models:
                self._show(f"loading {variant.model}")
                self._models[variant.model] = load_for_inference(variant.model, self.subject.dtype, self._device)
            model, tokenizer = self._models[variant.model]
            if variant.auxiliary is None:
                return model, tokenizer, None
            key = variant.auxiliary, variant.model
            if key not in self._auxiliaries:
                self._auxiliaries[key] = load_guide(variant.auxiliary, model)
            return model, tokenizer, self._auxiliaries[key]

    def _prompt(self, name: str, request: Request) -> list[int]:
        model, tokenizer, _ = self._loaded(name)
        ids = encode_prompt(request.given, tokenizer)
        room = prompt_room(model, request.max_new_tokens)
        if room is not None and room < 1:
            context = context_length(model)
            raise UserError(
                f"length: {request.max_new_tokens} new tokens do not fit into {name}'s context of {context}"
            )
        check_room(ids, room, f"prompt of {name}")
        return ids

    def _begin(self, name: str, request: Request) -> Writing:
        model, tokenizer, auxiliary = self._loaded(name)
        return Writing(
            model,
            tokenizer,
            self._prompt(name, request),
            request.max_new_tokens,
            request.seed,
            auxiliary,
            self.subject.variants[name].is_guided,
        )

    def _completions(
        self, name: str, request: Request, controls: Controls, samples: int, seed: int
    ) -> list[str | None]:
        """Completions of the prompt; None for one that is withheld."""
        check_scale(controls.guidance_scale)
        model, tokenizer, auxiliary = self._loaded(name)
        prompts = [self._prompt(name, request)]
        scale = controls.guidance_scale if self.subject.variants[name].is_guided else 0.0
        is_read = scale > 0 or controls.stop_below > 0
        guidance = NADOGuide(model, auxiliary, scale) if auxiliary is not None and is_read else nullcontext()
        with self._lock, guidance as guide:
            monitor = Monitor(guide, controls.stop_below, REDRAW) if guide and controls.stop_below else None
            (texts,) = generate_completions(
                model,
                tokenizer,
                prompts,
                samples=samples,
                max_new_tokens=request.max_new_tokens,
                batch_size=samples,
                seed=seed,
                guide=guide,
                monitor=monitor,
                decoding=Decoding(controls.temperature),
            )
        withheld = monitor.withheld if monitor is not None else []
        return [None if place in withheld else text for place, text in enumerate(texts)]
