"""The keys of a recipe for `--help`, read from the source of their dataclasses, whose import takes seconds."""

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from typer.core import TyperCommand

import bridle

TRAINING = {
    "Keys of the recipe": ("", ["recipes/recipe.py:Recipe"]),
    "Each domain of the corpus": ("corpus.NAME.", ["data/source.py:DataSource", "data/corpus.py:Domain"]),
    "A label in words": ("corpus.NAME.label.", ["data/labels.py:VerbalisedLabel"]),
    "Each regulariser": ("regularisers.NAME.", ["training/config.py:Regulariser"]),
    "A regulariser's target": ("regularisers.NAME.target.", ["training/dual_ascent.py:TargetOptions"]),
    "A regulariser's share": ("regularisers.NAME.share.", ["training/shares.py:ShareOptions"]),
    "Training, with every field of TRL's SFTConfig (max_steps, learning_rate, ...)": (
        "",
        ["training/config.py:ConstrainedConfig"],
    ),
    "R": ("auxiliary.", ["training/config.py:AuxiliaryOptions"]),
    "Schedule: parallel": ("parallel.", ["training/config.py:ParallelOptions"]),
    "Sampler of rollouts": ("sampler.", ["training/engine.py:SamplerOptions"]),
    "Evaluation on held-out rows": ("eval.", ["training/config.py:EvalOptions"]),
    "The best checkpoint": ("eval.best.", ["training/config.py:BestOptions"]),
    "Adapters": ("lora.", ["models/loading.py:LoraOptions"]),
}
COMPARISON = {
    "What is measured": ("evaluation.", ["comparison/plan.py:Evaluation"]),
    "How prompts are completed, of all sets or one (evaluation.prompts.NAME)": (
        "evaluation.",
        ["models/sampling.py:Decoding", "evaluation/prompt_sets.py:GenerationOptions"],
    ),
    "Classification": ("evaluation.classification.", ["comparison/plan.py:ClassificationOptions"]),
    "Judge": ("evaluation.judge.", ["comparison/plan.py:JudgeOptions"]),
    "What the judge is examined on": (
        "evaluation.judge.examine.",
        ["data/source.py:DataSource", "evaluation/judge_examination.py:HumanText"],
    ),
    "Reinforcement learning": ("methods.rl.", ["baselines/reinforcement.py:ReinforcementOptions"]),
    "NADO decoding, also of nado-decoding-sft": (
        "methods.nado-decoding.",
        ["comparison/methods.py:GuidanceOptions"],
    ),
    "Strength of all regularisers": ("methods.constrained-adaptive.", ["comparison/knobs.py:StrengthOptions"]),
    "KL on the learnt rows": ("methods.sft-kl.", ["comparison/knobs.py:KLOptions"]),
    "Distance to the first weights": ("methods.l2-sp.", ["comparison/knobs.py:L2Options"]),
    "Small adapters": ("methods.lora-small.", ["comparison/knobs.py:LowRankOptions"]),
    "Averaged weights": ("methods.wise-ft.", ["comparison/knobs.py:AverageOptions"]),
    "Held domains that are learnt": ("methods.interleave.", ["comparison/knobs.py:InterleaveOptions"]),
    "Preferences": ("methods.dpo.", ["comparison/knobs.py:DPOOptions"]),
}
"""By heading: the prefix of the keys, and the dataclasses, each in its file, whose fields are the keys."""

NO_KEYS = {"Recipe": {"training", "resolved", "file"}, "Domain": {"name"}, "Evaluation": {"label", "trained_on"}}
"""Fields of the dataclasses that no recipe sets."""

RENAMED = {"variables": "env"}
"""Fields that a recipe sets by another key."""


class TrainingCommand(TyperCommand):
    """A command whose help lists the keys of a recipe that `bridle train` reads."""

    groups = TRAINING

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes the options, then the keys, group by group."""
        super().format_options(ctx, formatter)
        for heading, (prefix, classes) in self.groups.items():
            with formatter.section(heading):
                formatter.write_dl([(prefix + key, text) for place in classes for key, text in keys_of(place)])


class ComparisonCommand(TrainingCommand):
    """A command whose help lists the keys that only `bridle compare` reads."""

    groups = COMPARISON


@cache
def keys_of(place: str) -> list[tuple[str, str]]:
    """The fields of a dataclass, "file:class", each with the first clause of its description, choices and default.

    Raises:
        KeyError: a field is missing under `Attributes` of its class.
    """
    file, _, name = place.partition(":")
    source = (Path(bridle.__file__).parent / file).read_text(encoding="utf-8")
    body = ast.parse(source).body
    tree = next(node for node in body if isinstance(node, ast.ClassDef) and node.name == name)
    meanings = entries(ast.get_docstring(tree) or "", "Attributes")
    named = {target.id: node.value for node in body if isinstance(node, ast.Assign) for target in _names(node.targets)}
    found = []
    for field in _fields(tree):
        key = field.target.id
        described = _described(meanings[key], _choices(field.annotation, named), field.value)
        found.append((RENAMED.get(key, key), described))
    return found


def entries(docstring: str, section: str) -> dict[str, str]:
    """The meaning of each name in a section of a docstring; "one, two: ..." gives both the same."""
    found = re.search(rf"^{section}:\n((?:    .*\n?|\n)*)", docstring, re.MULTILINE)
    pairs = re.findall(r"^    ([*\w, ]+):((?:.*(?:\n     .*)*))", found[1] if found else "", re.MULTILINE)
    return {name.strip(): meaning.strip() for names, meaning in pairs for name in names.split(",")}


def _fields(tree: ast.ClassDef) -> Iterator[Any]:
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
            if not name.startswith("_") and name not in NO_KEYS.get(tree.name, ()):
                yield node


CLAUSE = re.compile(r"(?:`[^`]*`|\{[^}]*\}|\be\.g\. |[^.;:]|[.;:](?! ))*")
"""Up to a full stop, semicolon or colon that ends a clause: not one of code, of a mapping or of "e.g."."""


def _described(meaning: str, choices: list[str], value: ast.expr | None) -> str:
    clause = CLAUSE.match(" ".join(meaning.split()))[0].rstrip(".")  # type: ignore[index]  # it matches any text
    if clause.strip("`") in choices:
        clause = " | ".join(choices)
    elif not all(re.search(rf"[`\"]{choice}[`\"]", clause) for choice in choices):
        clause += f": {' | '.join(choices)}"
    return clause if (default := _default(value)) is None else f"{clause}  [{default}]"


def _names(nodes: Iterable[ast.AST]) -> Iterator[ast.Name]:
    yield from (node for node in nodes if isinstance(node, ast.Name))


def _choices(annotation: ast.expr, named: Mapping[str, ast.expr]) -> list[str]:
    """The members of the literals in an annotation, also of those with a name in the file."""
    parts = [annotation, *(named[name.id] for name in _names(ast.walk(annotation)) if name.id in named)]
    literals = [
        node.slice
        for part in parts
        for node in ast.walk(part)
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "Literal"
    ]
    members = (node.value for literal in literals for node in ast.walk(literal) if isinstance(node, ast.Constant))
    return list(dict.fromkeys(map(str, members)))


def _default(value: ast.expr | None) -> str | None:
    """The default as YAML; None if it is computed."""
    if value is None:
        return "required"
    if isinstance(value, ast.Call):  # field(default=..., ...)
        value = next((one.value for one in value.keywords if one.arg == "default"), value)
    try:
        default = ast.literal_eval(value)
    except ValueError:
        return None
    plain = list(default) if isinstance(default, tuple) else default
    return yaml.safe_dump(plain, default_flow_style=True).partition("\n")[0]
