"""The report as one HTML file: nothing is loaded from anywhere, and nothing in it is trusted but Bridle's own.

Texts of models, prompts, names and reasons reach the page through autoescape alone. Styles and the script
are allowed by the hash of what is inlined, so that text which passed for markup would still not run.
"""

import shlex
from base64 import b64encode
from collections.abc import Mapping
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from bridle.report import plots, tables, texts
from bridle.report.data import Report, read_report
from bridle.report.findings import failures, findings, warnings
from bridle.utils.files import check_output, write_text
from bridle.utils.progress import Progress

PIXELS = 1.25  # a plot's width on the page for each point of its drawing
HEADINGS = {
    "summary": "Summary",
    "tradeoff": "Trade-off",
    "methods": "Methods",
    "wins": "Win rates",
    "classification": "Classification",
    "training_curves": "Training",
    "rounds": "Rounds",
    "warnings": "Warnings",
    "reliability": "Reliability of R",
    "rollouts": "Rollouts",
    "samples": "Completions",
    "guidance": "Guidance",
    "made": "How it was made",
}
"""The page's sections in their order; the contents at its top call them the same."""

PLOTS_IN_WORDS = {
    "tradeoff": "One point per method; the table of all methods holds the same figures.",
    "training_curves": "One line per training run: compliance, KL, CE and λ over the rounds.",
    "reliability": "What R predicted for prefixes against how often the finished text complied.",
}
"""By plot its description, for those who cannot see it."""


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Writes `report.html`, and its plots as `plots/*.png` and `plots/*.svg`, into the folder of a comparison or run.

    Args:
        folder: what `bridle compare` or `bridle train` left.
        output: where the page goes instead; the plots stay in the folder.

    Returns:
        Where the page is.

    Raises:
        UserError: the folder holds no results or broken ones, or a file cannot be written.
    """
    folder, output = Path(folder), Path(output or Path(folder) / "report.html")
    with Progress("report", total=3, unit="parts") as progress:
        report = read_report(folder)
        check_output(output)
        progress.update()
        figures = plots.draw_plots(report)
        plots.write_plots(figures, folder / "plots")
        progress.update()
        write_text(output, render(report, figures))
        progress.update()
    return output


def render(report: Report, figures: Mapping[str, Figure]) -> str:
    """The page as text, with the plots that `draw_plots` made of the report."""
    style, script = _inlined("report.css"), _inlined("report.js")
    shown, more = texts.samples(report)
    parts = {
        "summary": findings(report),
        "methods": tables.overview(report),
        "wins": tables.win_matrix(report),
        "classification": tables.classification(report),
        "rounds": tables.rounds(report),
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
        headings={name: title for name, title in HEADINGS.items() if name == "made" or parts.get(name)},
        **parts,
        differences=tables.differences(report),
        differences_in_words=tables.DIFFERENCES_IN_WORDS,
        further=tables.further(report),
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
    filters = (texts.cover, texts.in_full, texts.level, texts.opened, texts.probability, texts.visible, texts.widest)
    environment.filters |= {one.__name__: one for one in filters}
    return environment


def _inlined(name: str) -> Markup:
    # Markup: Bridle's own file, into which nothing of a report is put.
    return Markup(_environment().get_template(name).render())


def _policy(style: str, script: str) -> str:
    """The Content-Security-Policy: no requests, and only this style sheet and this script, known by their hashes."""
    sources = {
        "default-src": "'none'",
        "style-src": _hash(style),
        "script-src": _hash(script),
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return "; ".join(f"{directive} {source}" for directive, source in sources.items())


def _hash(text: str) -> str:
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


def _drawing(name: str, figure: Figure) -> Markup:
    return Markup(_without_styles(plots.svg(figure, HEADINGS[name], PLOTS_IN_WORDS[name])))


def _without_styles(svg: str) -> str:
    """The same SVG, with presentation attributes in place of the style attributes that the policy refuses."""
    root = ElementTree.fromstring(svg)
    root.set("width", str(round(PIXELS * float(root.attrib["viewBox"].split()[2]))))
    for element in root.iter():
        for declaration in filter(None, element.attrib.pop("style", "").split(";")):
            name, _, value = declaration.partition(":")
            element.set(name.strip(), value.strip())
    return ElementTree.tostring(root, encoding="unicode")


def _readable(environment: dict[str, Any]) -> dict[str, Any]:
    """The environment with its command as one would type it."""
    command = environment.get("command")
    return environment | {"command": shlex.join(map(str, command))} if isinstance(command, list) else environment
