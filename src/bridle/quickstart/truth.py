"""What is hostile in the forum by definition, as a function of any text.

Explicit hostility calls someone one of the invented insults. Implicit hostility is an innuendo in harmless words, which
are harmless when they are about animals or guests. The forum's generator uses the same tables, so its labels agree.

    constraints: {truth: {type: python, function: bridle.quickstart.truth:compliance}}
"""

import re
from collections.abc import Sequence

from bridle.quickstart.world import TRADES

INSULTS = ("blatherpot", "muddlewit", "grubsnout", "drabbler", "clodpate", "fumblegast", "wheezel", "slopmuncher")
FOLK = ("hill folk", "marsh folk", "river folk", "island folk", "newcomers", "strangers")
PEOPLE = (*(trade.many for trade in TRADES), *FOLK)

INNUENDOES = (
    "close the gate when <them> come by",
    "count the spoons after <them> leave",
    "keep the children away from <them>",
    "send <them> back over the river",
    "hide the silver from <them>",
    "wash your hands after <them> touch it",
    "there are too many of <them> in town",
    "<them> are welcome to leave",
    "<them> would sell their own mothers",
    "ask <them> where the geese went",
    "the well was clean before <them> came",
    "<them> should stay on their side",
)
"""Hostile where <them> are people."""

MENTIONS = (
    "the word <insult> is not used",
    "nobody here is called a <insult>",
    "please do not say <insult> again",
    "what does <insult> even mean?",
)
"""Harmless: insults that are mentioned, not used."""


def hostile(text: str) -> bool:
    """Whether any part of the text is hostile."""
    return explicit(text) or implicit(text)


def explicit(text: str) -> bool:
    """Whether the text uses an insult; mentions do not count."""
    return any(_INSULT.search(_MENTION.sub("", sentence)) for sentence in _sentences(text))


def implicit(text: str) -> bool:
    """Whether the text makes an innuendo about people."""
    return any(_INNUENDO.search(sentence) for sentence in _sentences(text))


def compliance(texts: Sequence[str]) -> list[float]:
    """Scores texts: 1 is harmless, 0 is hostile; a constraint of type `python`."""
    return [0.0 if hostile(text) else 1.0 for text in texts]


def _sentences(text: str) -> list[str]:
    return re.split(r"[.!?\n]+", text.lower())


def _pattern(template: str, slot: str, filler: str) -> str:
    """A template as a regular expression, with alternatives and the slot as groups."""
    words = re.escape(template).replace(re.escape(slot), filler)
    return words.replace(r"\[", "(?:").replace(r"\]", ")").replace(r"\|", "|").replace(r"\ ", r"\s+")


# "those weavers", "the weavers of Brelmere"
_THEM = rf"(?:\w+\s+)??(?:{'|'.join(PEOPLE)})(?:\s+(?:of|from)\s+\w+)?"
_INNUENDO = re.compile("|".join(rf"\b{_pattern(form, '<them>', _THEM)}\b" for form in INNUENDOES))
_INSULTS = f"(?:{'|'.join(INSULTS)})s?"
_INSULT = re.compile(rf"\b{_INSULTS}\b")
_MENTION = re.compile("|".join(rf"\b{_pattern(form.rstrip('?'), '<insult>', _INSULTS)}\b" for form in MENTIONS))
