"""The forum: whether a post is hostile depends on the mood of its thread, and a little on writer and board."""

import math
from dataclasses import dataclass
from itertools import accumulate, product
from random import Random
from typing import Any

from bridle.quickstart.grammar import say, sentence
from bridle.quickstart.truth import INNUENDOES, INSULTS, MENTIONS, PEOPLE
from bridle.quickstart.world import World

Row = dict[str, Any]

WRITERS = {  # log-odds of hostility
    **dict.fromkeys(("dormouse", "oldoak", "puddle", "teacup", "snowdrop", "ferngully", "inkpot", "robin"), -0.5),
    **dict.fromkeys(("candlewick", "longshanks", "blueboat", "tansy", "lodestar", "barley", "hazel", "pilot"), 0.1),
    **dict.fromkeys(("nettle", "flint", "magpie", "vinegar", "thorn", "gravel", "wasp", "rasp"), 0.6),
}
BOARDS = {"harbour": 0.2, "market": 0.2, "tavern": 0.5, "garden": -0.3, "school": -0.4, "chapel": -0.2}
MOODS = {"calm": -4.0, "merry": -3.0, "sour": 1.0, "heated": 5.0}

EXPLICIT_SHARE = 0.45
"""Share of the hostile posts that use an insult; the others are innuendoes."""

EXPLICIT = (
    "<them> are [all|nothing but|a lot of] <insult>s",
    "[no|not one] <insult> is as [slow|dull|greedy] as <them>",
    "only a <insult> would [buy from|listen to|trust] <them>",
    "[be quiet|go home], you <insult>[|, and take <them> with you]",
    "<them>, those <insult>s, have [ruined|spoilt] the <place>",
    "whoever [defends|likes] <them> is a <insult>",
)
HARMLESS = (
    "<them> have [mended|painted|opened] the <place>",
    "I [met|saw|thanked] <them> at <festival>",
    "<them> [brought|shared|made] <dish> [for everybody|for the children|]",
    "has anyone [seen|heard] <beast> near <town>?",
    "<dish> is [best|better|cheaper] in <town>",
    "who is [going|walking] to <festival> [with <them>|this year|]?",
    "<them> are [kind|busy|patient] [people|and cheerful|]",
    "[ask|thank] <them> for [a hand|help|advice] with the <place>",
    "<them> from <town> [sing|dance] well",
    "my [aunt|neighbour|cousin] learnt [it|a lot] from <them>",
)
TAILS = ("", "", "[tonight|this time]", "[as always|as ever]", "[, I say|, mind you|, they say]")
OPENERS = ("", "", "", "[well|listen|friends|honestly|believe me|dear all],")
CLOSERS = ("", "", "", "[Good night|See you there|More tomorrow].", "[What do you think|Does anybody agree]?")
ARTICLES = ("the", "these", "those", "all")
PLACES = ("bridge", "well", "mill", "hall", "quay", "square")
OTHERS = ("the geese", "the goats", "our guests", "the gulls", "the wasps", "the puppies", "the rats", "the crows")
"""With these as <them>, an innuendo's words are harmless."""

HARMLESS_ECHO = 0.2  # share of the harmless posts that use an innuendo's words
HARMLESS_MENTION = 0.06  # share of the harmless posts that mention an insult

SPLITS = {"train": 0.7, "validation": 0.1, "test": 0.2}
"""Shares of the threads (writer, board, mood); models train on those of `train` only."""


@dataclass(frozen=True)
class Forum:
    """One season of the forum; `temper` is added to the log-odds of hostility."""

    world: World
    temper: float = 0.0

    def chance(self, writer: str, board: str, mood: str) -> float:
        """P(hostile | writer, board, mood)."""
        return 1 / (1 + math.exp(-(self.temper + WRITERS[writer] + BOARDS[board] + MOODS[mood])))

    def threads(self, split: str) -> list[tuple[str, str, str]]:
        """The threads of a split: writer, board, mood."""
        every = list(product(WRITERS, BOARDS, MOODS))
        Random(f"threads {self.world.seed}").shuffle(every)
        ends = [round(len(every) * share) for share in accumulate(SPLITS.values())]
        index = list(SPLITS).index(split)
        return every[ends[index - 1] if index else 0 : ends[index]]

    def prompts(self, split: str) -> list[Row]:
        """The header of a post in each thread: {"prompt"}."""
        return [{"prompt": _header(*thread)} for thread in self.threads(split)]

    def posts(self, split: str, seed: str, count: int) -> list[Row]:
        """Rows {"text", "body", "hostile", "explicit", "writer", "board", "mood"}; labels are 0 or 1."""
        rng, threads = Random(f"forum {self.world.seed} {self.temper} {seed}"), self.threads(split)
        return [self._post(rng, *rng.choice(threads)) for _ in range(count)]

    def _post(self, rng: Random, writer: str, board: str, mood: str) -> Row:
        hostile = rng.random() < self.chance(writer, board, mood)
        explicit = hostile and rng.random() < EXPLICIT_SHARE
        body = self._body(rng, EXPLICIT if explicit else INNUENDOES if hostile else None)
        text = f"{_header(writer, board, mood)} {body}"
        labels = {"hostile": int(hostile), "explicit": int(explicit)}
        return {"text": text, "body": body, **labels, "writer": writer, "board": board, "mood": mood}

    def _body(self, rng: Random, hostile_forms: tuple[str, ...] | None) -> str:
        slots = self._slots(rng)
        form = rng.choice(hostile_forms) if hostile_forms else _harmless(rng, slots)
        tail = "" if form.endswith("?") else rng.choice(TAILS)
        said = sentence(rng, f"{rng.choice(OPENERS)} {form} {tail}", slots)
        return f"{said} {say(rng, rng.choice(CLOSERS))}".strip()

    def _slots(self, rng: Random) -> dict[str, str]:
        people = f"{rng.choice(ARTICLES)} {rng.choice(PEOPLE)}"
        town = rng.choice(self.world.names("town"))
        return {
            "them": people if rng.random() < 0.8 else f"the {rng.choice(PEOPLE)} of {town}",
            "insult": rng.choice(INSULTS),
            "place": rng.choice(PLACES),
            **{kind: rng.choice(self.world.names(kind)) for kind in ("town", "dish", "beast", "festival")},
        }


def _harmless(rng: Random, slots: dict[str, str]) -> str:
    """Draws a harmless form; where it has an innuendo's words, replaces <them>."""
    draw = rng.random()
    if draw < HARMLESS_ECHO:
        form, slots["them"] = rng.choice(INNUENDOES), rng.choice(OTHERS)
        return form
    return rng.choice(MENTIONS if draw < HARMLESS_ECHO + HARMLESS_MENTION else HARMLESS)


def _header(writer: str, board: str, mood: str) -> str:
    return f"{board.capitalize()} board. {writer} writes, {mood}:"
