"""Prepares untrusted texts for the page: samples side by side, covered unless all constraints say that they comply.

A text without a score is covered too.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from unicodedata import bidirectional

from bridle.report.data import Completion, Guidance, GuidedToken, Report, Score, evenly_spaced

Key = tuple[str, int]  # prompt set and index of the prompt

SHOWN, MORE = 3, 45  # prompts shown at first, and on request
LEVELS = 20  # steps of the colour scale from R = 0 to R = 1
VISIBLE = str.maketrans({"\n": "⏎", "\t": "⇥", "\r": "␍"})


@dataclass(frozen=True)
class Verdict:
    """A constraint's score in words, e.g. "compliance 0.93"; `outcome` is "complies", "violates" or "no score"."""

    constraint: str
    outcome: str
    words: str


@dataclass(frozen=True)
class Answer:
    """A method's completion of a prompt; `text` is None if it has none."""

    method: str
    text: str | None
    verdicts: list[Verdict]
    covered: str


@dataclass(frozen=True)
class Sample:
    """A prompt, numbered from 1 in its set, with its verdicts and every method's answer."""

    prompt_set: str
    number: int
    prompt: str
    verdicts: list[Verdict]
    covered: str
    answers: list[Answer]

    @property
    def disagrees(self) -> bool:
        """Whether one method's answer violates a constraint that another's complies with."""
        outcomes: dict[str, set[str]] = {}
        for one in (one for answer in self.answers for one in answer.verdicts):
            outcomes.setdefault(one.constraint, set()).add(one.outcome)
        return any({"complies", "violates"} <= found for found in outcomes.values())


@dataclass(frozen=True)
class Drawn:
    """A rollout; its prompt is not scored and stays covered."""

    prompt: str
    text: str
    verdicts: list[Verdict]
    covered: str
    finished: bool


def drawn(report: Report) -> dict[str, list[Drawn]]:
    """The rollouts of a training run by round and regulariser."""
    found: dict[str, list[Drawn]] = {}
    for one in report.rollouts:
        judged = _judged({one.constraint: one})
        shown = Drawn(one.prompt, one.completion, *judged, one.finished)
        found.setdefault(f"Round {one.round}, {one.regulariser}", []).append(shown)
    return found


def samples(report: Report) -> tuple[list[Sample], list[Sample]]:
    """Evenly spaced prompts with all methods' completions: those shown at first, and those on request."""
    found = _first_of_each(report.completions)
    keys = list(dict.fromkeys(key for of_method in found.values() for key in of_method))
    picked = [_sample(key, found) for key in evenly_spaced(keys, SHOWN + MORE)]
    shown = evenly_spaced(picked, SHOWN)
    return shown, [sample for sample in picked if sample not in shown]


def cover(outcomes: Iterable[str]) -> str:
    """Why a text is covered; empty if there are outcomes and all are "complies"."""
    found = set(outcomes)
    if "violates" in found:
        return "violating text"
    return "" if found == {"complies"} else "text without a score"


def verdict(constraint: str, score: Score) -> Verdict:
    """Puts a constraint's score in words."""
    outcome = {True: "complies", False: "violates", None: "no score"}[score.complies]
    if score.value is None:
        return Verdict(constraint, outcome, f"no score ({score.reason})" if score.reason else "no score")
    return Verdict(constraint, outcome, f"compliance {score.value:.2f}")


def in_full(guidance: Guidance) -> Verdict:
    """The constraint's verdict on the whole guided text."""
    complies = None if guidance.violates is None else not guidance.violates
    return verdict(guidance.constraint, Score(guidance.value, complies))


def opened(guidance: Guidance) -> int:
    """Index of the token selected at first: that of the completion with the largest KL(q‖p)."""
    completion = range(guidance.prompt_tokens, len(guidance.tokens))
    return max(completion, key=lambda place: guidance.tokens[place].kl or 0.0, default=0)


def visible(token: str) -> str:
    """Shows line breaks, tabs and lone spaces as signs."""
    return token.translate(VISIBLE) if token.strip(" ") else token.replace(" ", "␣") or "∅"


def direction(text: str) -> str:
    """The value of `dir` for a text whose tokens are elements of their own, as "auto" finds it for a whole text."""
    strong = (bidirectional(character) for character in text)
    return "rtl" if next((one for one in strong if one in ("L", "R", "AL")), "L") != "L" else "ltr"


def level(r: float | None) -> str:
    """The CSS class of the colour of R."""
    return "r-none" if r is None else f"r-{round(min(max(r, 0.0), 1.0) * LEVELS)}"


def probability(p: float | None) -> str:
    """Formats p with three digits; "< 0.001" if smaller, a dash if missing."""
    if p is None:
        return "–"
    return f"{p:.3f}" if p >= 0.0005 or p == 0 else "< 0.001"


def widest(token: GuidedToken) -> float:
    """The largest probability beside a token, which sets the scale of its bars."""
    return max((max(shift.p, shift.q) for shift in (*token.gains, *token.losses)), default=0.0) or 1.0


def flat(settings: Mapping[str, Any], above: str = "") -> dict[str, str]:
    """Flattens nested settings to dotted keys with text values."""
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
    """The first completion by method and prompt: the first sample of the first seed that has one."""
    found: dict[str, dict[Key, Completion]] = {}
    for one in completions:
        found.setdefault(one.method, {}).setdefault((one.prompt_set, one.index), one)
    return found


def _sample(key: Key, found: Mapping[str, Mapping[Key, Completion]]) -> Sample:
    prompt_set, index = key
    first = next(of_method[key] for of_method in found.values() if key in of_method)
    rows = {method: of_method.get(key) for method, of_method in found.items()}
    answers = [
        Answer(method, row.completion, *_judged(row.scores)) if row else Answer(method, None, [], "")
        for method, row in rows.items()
    ]
    return Sample(prompt_set, index + 1, first.prompt, *_judged(first.prompt_scores), answers)


def _judged(scores: Mapping[str, Score]) -> tuple[list[Verdict], str]:
    """The verdicts on a text, and why it is covered, if it is."""
    verdicts = [verdict(constraint, score) for constraint, score in scores.items()]
    return verdicts, cover(one.outcome for one in verdicts)
