"""Texts, dots and certificates as HTML. Autoescape covers all text of models, prompts, names and reasons."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from bridle.certification.certificate import Certificate
from bridle.constraints import Score
from bridle.demo.session import Draws
from bridle.demo.subject import Subject
from bridle.demo.writing import Chance, Token, Writing
from bridle.report import texts as words
from bridle.report.data import Score as ShownScore


@dataclass(frozen=True)
class Page:
    """How texts are shown.

    Attributes:
        remote: names of the constraints that ask another host.
        is_covered: cover a text until it is judged.
        is_judged: the constraints of this machine have judged.
        scores: by variant and constraint.
    """

    remote: Sequence[str] = ()
    is_covered: bool = False
    is_judged: bool = False
    scores: Mapping[str, Mapping[str, Score]] = field(default_factory=dict)

    def verdicts(self, name: str) -> list[words.Verdict]:
        """Every constraint's verdict on a variant's text."""
        scores = self.scores.get(name, {}) if self.is_judged else {}
        return [words.verdict(constraint, _shown(score)) for constraint, score in scores.items()]

    def unasked(self, name: str) -> list[str]:
        """The remote constraints that have not judged a variant's finished text; none of a withheld one."""
        known = self.scores.get(name)
        return [one for one in self.remote if self.is_judged and known is not None and one not in known]

    def cover(self, name: str) -> str:
        """Why a variant's text is covered; empty if it is not."""
        if not self.is_judged:
            return "text without a score" if self.is_covered else ""
        outcomes = [one.outcome for one in self.verdicts(name)]
        if outcomes:
            return words.cover(outcomes)
        return "text without a score" if self.is_covered and self.unasked(name) else ""


def texts_html(writings: Mapping[str, Writing], prompt: str, page: Page) -> str:
    """The texts side by side: tokens coloured by R, a line of R, the verdicts."""
    return _environment().get_template("texts.html").render(writings=writings, prompt=prompt, page=page)


def draws_html(draws: Mapping[str, Draws], constraint: str | None) -> str:
    """Completions as dots, and the rate of violations under a constraint."""
    return _environment().get_template("draws.html").render(draws=draws, constraint=constraint)


def certificate_html(certificate: Certificate) -> str:
    """What a certificate says and does not cover."""
    found = _environment().get_template("certificate.html")
    return found.render(certificate=certificate, rows=list(certificate.table()))


def header_html(subject: Subject) -> str:
    """What the page shows: the title, the variants, the constraints."""
    described = [one for one in subject.variants.values() if one.description]
    return _environment().get_template("header.html").render(subject=subject, described=described)


def message_html(message: str, *, is_alarm: bool = True) -> str:
    """What went wrong, or what is being waited for, in a line."""
    return _environment().get_template("message.html").render(message=message, is_alarm=is_alarm)


def asset(name: str) -> str:
    """The text of `demo.css` or `demo.js`."""
    return _environment().get_template(name).render()


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("bridle.demo"),
        autoescape=lambda name: name is not None and name.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (as_json, line_of_r, outcome, words.direction, words.level, words.probability, words.visible)
    environment.filters |= {one.__name__: one for one in filters}
    return environment


def as_json(token: Token) -> str:
    """What the page's script shows of a token: rows of text, p, R and q, of four digits, since a page holds many."""

    def row(one: Chance) -> list[Any]:
        numbers = (None if value is None else float(f"{value:.4g}") for value in (one.p, one.r, one.q))
        return [words.visible(one.text), *numbers]

    parts = {"drawn": [token.drawn], "gains": token.gains, "losses": token.losses}
    return json.dumps({name: [row(one) for one in found] for name, found in parts.items()})


def line_of_r(tokens: Sequence[Token]) -> str:
    """Points of a polyline in a box of 100 by 24, R = 1 at its top; tokens without R are left out."""
    last = max(1, len(tokens) - 1)
    found = [(100 * at / last, 24 * (1 - one.drawn.r)) for at, one in enumerate(tokens) if one.drawn.r is not None]
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in found)


def outcome(score: Score | None) -> str:
    """A score in a word; "not judged" without one."""
    return "not judged" if score is None else words.verdict("", _shown(score)).outcome


def _shown(score: Score) -> ShownScore:
    return ShownScore(score.value, score.complies, score.reason)
