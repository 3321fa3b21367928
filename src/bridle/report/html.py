"""Renders the report as one HTML file that loads nothing.

Autoescape covers all text of models, prompts, names and reasons. The Content-Security-Policy allows the inlined styles
and script by their hash, so injected markup would not run either.
"""

import shlex
from base64 import b64encode
from collections.abc import Mapping
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from bridle.report import plots, strip, tables, texts
from bridle.report.data import Report
from bridle.report.export import write_tables
from bridle.report.findings import failures, findings, warnings
from bridle.report.reading import read_report
from bridle.report.recommendation import recommendation
from bridle.report.style import missing_glyphs_in_one_line
from bridle.report.svg import svg
from bridle.utils.files import check_output, write_text
from bridle.utils.progress import Progress

SHOWN_STRIPS, SHOWN_WARNINGS = 2, 2  # the others are there on request
HEADINGS = {
    "tradeoff": "Which method",
    "further_constraints": "Further constraints",
    "summary": "Summary",
    "methods": "Methods",
    "wins": "Win rates",
    "classification": "Classification",
    "strips": "What changed between rounds",
    "training_curves": "Training",
    "rounds": "Rounds",
    "warnings": "Warnings",
    "reliability": "Reliability of R",
    "critics": "R against the truth",
    "rollouts": "Rollouts",
    "samples": "Completions",
    "guidance": "Guidance",
    "made": "How it was made",
}
"""Sections of the page, in order, and their titles in the table of contents."""

PLOTS_IN_WORDS = {
    "tradeoff": "One point per method; the table of all methods holds the same figures.",
    "other_tradeoffs": "The same for the other utilities.",
    "further_constraints": "One point per method: how often the main and a further constraint are violated.",
    "training_curves": "One line per training run: compliance, KL, CE, λ and its target over the rounds.",
    "reliability": "What R predicted for prefixes against how often the finished text complied.",
}
"""Descriptions of the plots for screen readers."""


def write_report(folder: Path, output: Path | None = None, tables_to: Path | None = None) -> Path:
    """Writes the page and its plots, `plots/*` as PNG, SVG and PDF, to the folder of a comparison or training run.

    Args:
        folder: output folder of `bridle compare` or `bridle train`.
        output: path of the page; `folder/report.html` by default.
        tables_to: folder that receives every table as LaTeX, Markdown and CSV.

    Returns:
        The path of the page.

    Raises:
        UserError: results are absent or broken, a file cannot be written, or there is no table for `tables_to`.
    """
    folder, output = Path(folder), Path(output or Path(folder) / "report.html")
    with Progress("report", total=3, unit="parts") as progress, missing_glyphs_in_one_line():
        report = read_report(folder)
        check_output(output)
        if tables_to is not None:
            write_tables(report, Path(tables_to))
        progress.update()
        figures = plots.draw_plots(report)
        plots.write_plots(figures, folder / "plots")
        progress.update()
        write_text(output, render(report, figures))
        progress.update()
    return output


def render(report: Report, figures: Mapping[str, Figure]) -> str:
    """Renders the page with the plots of `draw_plots`."""
    style, script = _inlined("report.css"), _inlined("report.js")
    shown, more = texts.samples(report)
    parts = {
        "summary": findings(report),
        "methods": tables.overview(report),
        "transfer": tables.transfer(report),
        "wins": tables.win_matrix(report),
        "classification": tables.classification(report),
        "strips": strip.strips(report),
        "rounds": tables.rounds(report),
        "critics": tables.critics(report),
        "warnings": warnings(report),
        "rollouts": texts.drawn(report),
        "samples": shown,
        "guidance": report.guidance,
        **{name: _drawing(name, figures[name]) if name in figures else None for name in PLOTS_IN_WORDS},
    }
    return _environment().get_template("report.html").render(
        report=report,
        style=style,
        script=script,
        policy=_policy(style, script),
        recommendation=recommendation(report),
        headings={name: title for name, title in HEADINGS.items() if name == "made" or parts.get(name)},
        **parts,
        differences=tables.differences(report),
        differences_in_words=tables.DIFFERENCES_IN_WORDS,
        further=tables.further(report).values(),
        shown_strips=SHOWN_STRIPS,
        shown_warnings=SHOWN_WARNINGS,
        more=more,
        environment=texts.flat(_readable(report.environment)),
        settings=texts.flat(report.settings),
        failures=failures(report),
    )  # fmt: skip


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("bridle.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (texts.cover, texts.direction, texts.in_full, texts.level, texts.opened, texts.probability)
    environment.filters |= {one.__name__: one for one in (*filters, texts.visible, texts.widest)}
    return environment


def _inlined(name: str) -> Markup:
    # Markup is safe here: a file of the package, without data of the report.
    return Markup(_environment().get_template(name).render())


def _policy(style: str, script: str) -> str:
    """The Content-Security-Policy: no requests, and only this style sheet and this script, by their hashes."""
    sources = f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}"
    return f"{sources}; base-uri 'none'; form-action 'none'"


def _hash(text: str) -> str:
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


def _drawing(name: str, figure: Figure) -> Markup:
    return Markup(svg(figure, HEADINGS.get(name, "Other trade-offs"), PLOTS_IN_WORDS[name]))


def _readable(environment: dict[str, Any]) -> dict[str, Any]:
    """The environment with its command as a line of shell."""
    command = environment.get("command")
    return environment | {"command": shlex.join(map(str, command))} if isinstance(command, list) else environment
