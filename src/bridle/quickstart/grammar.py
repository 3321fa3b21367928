"""Sentence templates: "[a|the] <thing>" stands for one of its alternatives, with the slots filled."""

import re
from collections.abc import Mapping
from random import Random

_INNERMOST = re.compile(r"\[([^\[\]]*)\]")


def say(rng: Random, template: str, slots: Mapping[str, str] | None = None) -> str:
    """Expands a template.

    Args:
        rng: draws the alternatives.
        template: `[a|b|c]` stands for a, b or c with equal probability and may be nested; `<name>` is a slot.
        slots: the text of each slot; it may be a template too.
    """
    slots = slots or {}
    while "<" in template:
        template = re.sub(r"<(\w+)>", lambda match: slots[match[1]], template)
    while "[" in template:
        template = _INNERMOST.sub(lambda match: rng.choice(match[1].split("|")), template)
    return re.sub(r" +([,.?!])", r"\1", re.sub(r" {2,}", " ", template)).strip()


def sentence(rng: Random, template: str, slots: Mapping[str, str] | None = None) -> str:
    """Expands a template to a sentence with a capital and a full stop, unless it ends in another stop."""
    text = say(rng, template, slots)
    return capital(text) + ("" if text[-1] in ".?!" else ".")


def capital(text: str) -> str:
    """Capitalises the first letter and keeps the others."""
    return text[:1].upper() + text[1:]
