"""Labelled samples with their provenance, as JSON lines."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import UnionType
from typing import get_args, get_origin, get_type_hints

from bridle.constraints.reading import Messages
from bridle.errors import UserError, first_line
from bridle.utils.files import atomic_file


@dataclass(kw_only=True)
class Rollout:
    """One completion drawn from a model, with its label.

    Attributes:
        prompt_ids, completion_ids: the tokens; `prompt` and `completion` are their texts.
        round: the round that drew it.
        regulariser: the name of the regulariser that it is for.
        model_hash: identifies the weights that drew it.
        constraint: the name of the constraint that scored it.
        value: the score in [0, 1], 1 where it complies; None if missing.
        complies: the thresholded score; None if missing.
        reason: why the score is missing.
        finished: whether the model ended it; false if it was cut at the horizon.
        sought: how many first tokens were drawn to where R expected a violation; the rest follows the model.
        log_probs: of the completion's tokens when they were drawn, in nats: under the model, and for the `sought` ones
            under the distribution that seeks. None if unknown.
        messages: the turns of the chat before the completion; None for a text.

    Raises:
        UserError: a field has another type, or the value is neither None nor in [0, 1].
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    prompt: str
    completion: str
    round: int
    regulariser: str
    model_hash: str
    constraint: str
    value: float | int | None = None
    complies: bool | None = None
    reason: str = ""
    finished: bool = True
    sought: int = 0
    log_probs: list[float] | None = None
    messages: Messages | None = None

    @property
    def given(self) -> str | Messages:
        """The prompt as a constraint reads it: a chat or a text."""
        return self.messages or self.prompt

    def __post_init__(self) -> None:
        for name, kinds in _TYPES.items():
            if not isinstance(getattr(self, name), kinds):
                raise UserError(f"{name} holds {type(getattr(self, name)).__name__}")
        if not all(type(token) is int and token >= 0 for token in self.prompt_ids + self.completion_ids):
            raise UserError("prompt_ids and completion_ids must be token ids")
        if self.value is not None and not 0 <= self.value <= 1:  # also refuses NaN
            raise UserError(f"value {self.value} is not in [0, 1]; a missing score is null")


_TYPES = {
    name: tuple(get_origin(one) or one for one in (get_args(kind) if isinstance(kind, UnionType) else [kind]))
    for name, kind in get_type_hints(Rollout).items()
}


def write_rollouts(path: str | Path, rollouts: Iterable[Rollout]) -> None:
    """Writes rollouts as JSON lines with `atomic_file`, in ASCII, so that lone surrogates are escaped and survive."""
    with atomic_file(Path(path)) as temporary, temporary.open("w", encoding="ascii") as file:
        file.writelines(json.dumps(asdict(rollout), allow_nan=False) + "\n" for rollout in rollouts)


def read_rollouts(path: str | Path) -> list[Rollout]:
    """Reads what `write_rollouts` wrote.

    Raises:
        UserError: a row is not a rollout, named by file and row.
    """
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {first_line(error)}") from error
    return [_rollout(line, f"{path} row {number}") for number, line in enumerate(lines, start=1)]


def _rollout(line: bytes, place: str) -> Rollout:
    try:
        return Rollout(**json.loads(line))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{place} is not a rollout: {first_line(error)}") from error
