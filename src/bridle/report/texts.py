"""Untrusted texts made ready to be shown: samples side by side, and what of them stays covered at first.

What any constraint calls violating is covered, and so is what no constraint has scored: a failed score is
no proof of harmlessness.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from bridle.report.data import Completion, Guidance, GuidedToken, Report, Score

T = TypeVar("T")
Key = tuple[str, int]  # prompt set and index of the prompt

SHOWN, MORE = 12, 36  # prompts to see at once, and on request
LEVELS = 20  # steps of the colour scale from R = 0 to R = 1
VISIBLE = str.maketrans({"\n": "⏎", "\t": "⇥", "\r": "␍"})


@dataclass(frozen=True)
class Verdict:
    """What a constraint says of a text, as "compliance 0.93"; `outcome` is "complies", "violates" or "no score"."""

    constraint: str
    outcome: str
    words: str


@dataclass(frozen=True)
class Answer:
    """One method's completion of a prompt; `text` is None where it has none."""

    method: str
    text: str | None
    verdicts: list[Verdict]
    covered: str


@dataclass(frozen=True)
class Sample:
    """A prompt, numbered from 1 in its set, with the constraints' verdicts on it, and every method's answer."""

    prompt_set: str
    number: int
    prompt: str
    verdicts: list[Verdict]
    covered: str
    answers: list[Answer]


@dataclass(frozen=True)
class Drawn:
    """A rollout; its prompt was not scored, and stays covered."""

    prompt: str
    text: str
    verdicts: list[Verdict]
    covered: str
    finished: bool


def drawn(report: Report) -> dict[str, list[Drawn]]:
    """The rollouts of a training run, by round and regulariser."""
    found: dict[str, list[Drawn]] = {}
    for one in report.rollouts:
        judged = _judged({one.constraint: one})
        shown = Drawn(one.prompt, one.completion, *judged, one.finished)
        found.setdefault(f"Round {one.round}, {one.regulariser}", []).append(shown)
    return found


def samples(report: Report) -> tuple[list[Sample], list[Sample]]:
    """Evenly picked prompts with all methods' completions: those to show at once, and those on request."""
    found = _first_of_each(report.completions)
    keys = list(dict.fromkeys(key for of_method in found.values() for key in of_method))
    picked = [_sample(key, found) for key in evenly(keys, SHOWN + MORE)]
    shown = evenly(picked, SHOWN)
    return shown, [sample for sample in picked if sample not in shown]


def evenly(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of the items, in their order and equally far apart."""
    count = min(count, len(items))
    return [items[position * len(items) // count] for position in range(count)]


def cover(outcomes: Iterable[str]) -> str:
    """Why a text is covered, given the constraints' outcomes; empty where all of them, at least one, let it be."""
    found = set(outcomes)
    if "violates" in found:
        return "violating text"
    return "" if found == {"complies"} else "text without a score"


def verdict(constraint: str, score: Score) -> Verdict:
    """A constraint's score in words."""
    outcome = {True: "complies", False: "violates", None: "no score"}[score.complies]
    if score.value is None:
        return Verdict(constraint, outcome, f"no score ({score.reason})" if score.reason else "no score")
    return Verdict(constraint, outcome, f"compliance {score.value:.2f}")


def in_full(guidance: Guidance) -> Verdict:
    """What the constraint says of the whole guided text."""
    complies = None if guidance.violates is None else not guidance.violates
    return verdict(guidance.constraint, Score(guidance.value, complies))


def opened(guidance: Guidance) -> int:
    """The index of the token that is chosen at first: of the completion the one where q is farthest from p."""
    completion = range(guidance.prompt_tokens, len(guidance.tokens))
    return max(completion, key=lambda place: guidance.tokens[place].kl or 0.0, default=0)


def visible(token: str) -> str:
    """A token with its line breaks and tabs as signs, so that its cell stays one cell."""
    return token.translate(VISIBLE) if token.strip(" ") else token.replace(" ", "␣") or "∅"


def level(r: float | None) -> str:
    """The colour of a chance R, as the name of a style; a missing one has its own."""
    return "r-none" if r is None else f"r-{round(min(max(r, 0.0), 1.0) * LEVELS)}"


def probability(p: float | None) -> str:
    """p with three digits; one too small for them says so, and a missing one is a dash."""
    if p is None:
        return "–"
    return f"{p:.3f}" if p >= 0.0005 or p == 0 else "< 0.001"


def widest(token: GuidedToken) -> float:
    """The largest probability shown beside a token: the full length of its bars."""
    return max((max(shift.p, shift.q) for shift in (*token.gains, *token.losses)), default=0.0) or 1.0


def flat(settings: Mapping[str, Any], above: str = "") -> dict[str, str]:
    """Nested settings as one level of dotted keys, with values as text."""
    rows: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            rows |= flat(value, f"{above}{key}.")
        else:
            rows[above + str(key)] = _as_text(value)
    return rows


def _as_text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_as_text, value)) or "none"
    return {None: "none", True: "yes", False: "no"}[value] if value is None or isinstance(value, bool) else str(value)


def _first_of_each(completions: Iterable[Completion]) -> dict[str, dict[Key, Completion]]:
    """By method and prompt its first completion: the first sample of the first seed that has one."""
    found: dict[str, dict[Key, Completion]] = {}
    for one in completions:
        found.setdefault(one.method, {}).setdefault((one.prompt_set, one.index), one)
    return found


def _sample(key: Key, found: Mapping[str, Mapping[Key, Completion]]) -> Sample:
    prompt_set, index = key
    first = next(of_method[key] for of_method in found.values() if key in of_method)
    answers = [_answer(method, of_method.get(key)) for method, of_method in found.items()]
    return Sample(prompt_set, index + 1, first.prompt, *_judged(first.prompt_scores), answers)


def _answer(method: str, completion: Completion | None) -> Answer:
    if completion is None:
        return Answer(method, None, [], "")
    return Answer(method, completion.completion, *_judged(completion.scores))


def _judged(scores: Mapping[str, Score]) -> tuple[list[Verdict], str]:
    """The verdicts on a text, and why it is covered."""
    verdicts = [verdict(constraint, score) for constraint, score in scores.items()]
    return verdicts, cover(one.outcome for one in verdicts)
