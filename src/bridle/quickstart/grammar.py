"""A grammar of one rule: "[a|the] <thing>" is one of its alternatives, with the slots filled."""

import re
from collections.abc import Mapping, Sequence
from random import Random

_INNERMOST = re.compile(r"\[([^\[\]]*)\]")


def say(rng: Random, template: str, slots: Mapping[str, str] | None = None) -> str:
    """A sentence from a template.

    Args:
        rng: chooses.
        template: `[a|b|c]` is one of a, b and c, each as likely and perhaps empty, and may hold further brackets;
            `<name>` is a slot.
        slots: what stands in each slot; it may be a template too.
    """
    slots = slots or {}
    while "<" in template:
        template = re.sub(r"<(\w+)>", lambda match: slots[match[1]], template)
    while "[" in template:
        template = _INNERMOST.sub(lambda match: rng.choice(match[1].split("|")), template)
    return re.sub(r" +([,.?!])", r"\1", re.sub(r" {2,}", " ", template)).strip()


def sentence(rng: Random, template: str, slots: Mapping[str, str] | None = None) -> str:
    """The same, with a capital at its head and a full stop at its end where it has none."""
    text = say(rng, template, slots)
    return capital(text) + ("" if text[-1] in ".?!" else ".")


def capital(text: str) -> str:
    """The text with a capital at its head."""
    return text[:1].upper() + text[1:]


def coin(rng: Random, beginnings: Sequence[str], ends: Sequence[str], count: int) -> list[str]:
    """`count` different invented words, each a beginning and an end, in random order."""
    return rng.sample([beginning + end for beginning in beginnings for end in ends], count)
