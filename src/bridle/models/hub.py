"""Pushing a run to the hub: its model, the card and the auxiliary, and nothing else.

Rollouts hold text that violates the constraint, metrics and recipes the paths of a machine, and pickles run code when
they are read. None of them is ever pushed.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
from pydantic import SecretStr
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.utils import PushInProgress

from bridle.errors import RunStopped, UserError
from bridle.models.card import CARD_FILE, public_name, told, with_names, write_card
from bridle.utils.files import atomic_files
from bridle.utils.provenance import environment

logger = logging.getLogger(__name__)

WEIGHTS = ("config.json", "generation_config.json", "adapter_config.json", "*.safetensors", "*.safetensors.index.json")
TOKENIZER = (
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("*.model", "chat_template.jinja", "chat_template.json"),
)
"""Names of what is pushed from a model's folder; anything else stays at home."""

PATH_KEYS = {"base_model_name_or_path", "_name_or_path", "name_or_path"}


class PushesModel:
    """What `push_to_hub` of a `transformers` trainer pushes here: mix it in before the trainer's class.

    The repository's root is the run's `model/`, with its card; its `auxiliary/` is the run's. `hub_model_id`,
    `hub_private_repo`, `hub_token`, `hub_revision` (a branch, made if it is not there) and `hub_always_push` mean
    what they mean in `transformers`. Of `hub_strategy`, `end` pushes once, when training has ended, and `every_save`,
    the default, also pushes each checkpoint's model while training goes on. `checkpoint` and `all_checkpoints` would
    push optimiser states and rollouts, and are refused.
    """

    args: Any
    hub_model_id: str | None
    _token: SecretStr | None = None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Makes the repository, so that a wrong token or name shows before training.

        Raises:
            UserError: the hub refuses, cannot be reached, or the strategy is not supported.
        """
        args = self.args
        check_strategy(args)
        if token := token or args.hub_token:
            self._token, args.hub_token = SecretStr(token), None
        name = args.hub_model_id or Path(args.output_dir).absolute().name
        try:
            super().init_hf_repo(_shown(self._token), private)  # type: ignore[misc]
            if args.hub_revision and self.is_world_process_zero():  # type: ignore[attr-defined]
                HfApi(token=_shown(self._token)).create_branch(
                    self.hub_model_id or name, branch=args.hub_revision, exist_ok=True
                )
        except Exception as error:  # the hub's clients raise errors of several libraries with no common base
            raise UserError(f"push_to_hub: {name}: {_first_line(error)}") from error

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """Saves the model to `model/` in the output folder and pushes it, as in `transformers`.

        A card that stands there stays; otherwise it gets one of what the trainer knows.
        """
        folder = Path(self.args.output_dir) / "model"
        self.save_model(str(folder), _internal_call=True)  # type: ignore[attr-defined]
        if self.is_world_process_zero() and not (folder / CARD_FILE).exists():  # type: ignore[attr-defined]
            _describe(self, folder)
        return self.push_saved_model(commit_message, blocking, token=token, revision=revision, private=private)

    def push_saved_model(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        *,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """Pushes what `model/` and `auxiliary/` in the output folder hold.

        Returns:
            The commit, or its future where `blocking` is off; None on all processes but the first.

        Raises:
            UserError: as `init_hf_repo`.
            RunStopped: the push failed; the model is in the output folder.
        """
        if self.hub_model_id is None:
            self.init_hf_repo(token, private)
        if not self.is_world_process_zero():  # type: ignore[attr-defined]
            return None
        self.callback_handler.on_push_begin(self.args, self.state, self.control)  # type: ignore[attr-defined]
        self._finish_current_push()  # type: ignore[attr-defined]
        folder = Path(self.args.output_dir)
        files = model_files(folder / "model") | auxiliary_files(folder / "auxiliary")
        with _kept(folder, str(self.hub_model_id)):
            return self._commit(files, commit_message or "End of training", not blocking, token, revision)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Pushes the model of a checkpoint, in the background; the card and the auxiliary come at the end."""
        args = self.args
        if not self.is_world_process_zero() or args.hub_strategy == "end":  # type: ignore[attr-defined]
            return
        running: PushInProgress | None = self.push_in_progress  # type: ignore[has-type]
        if running is not None and not running.is_done() and not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)  # type: ignore[attr-defined]
        files = {name: path for name, path in model_files(Path(checkpoint_folder)).items() if name != CARD_FILE}
        push = self._commit(files, f"Training in progress, {Path(checkpoint_folder).name}", run_as_future=True)
        push.add_done_callback(_warn_of_failure)
        self.push_in_progress = PushInProgress([*(running.jobs if running else []), push])

    def _commit(
        self,
        files: Mapping[str, str | bytes],
        message: str,
        run_as_future: Any,
        token: str | None = None,
        revision: str | None = None,
    ) -> Any:
        return HfApi(token=token or _shown(self._token)).create_commit(
            str(self.hub_model_id),
            [CommitOperationAdd(name, content) for name, content in files.items()],
            commit_message=message,
            revision=revision or self.args.hub_revision,
            run_as_future=run_as_future,
        )

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """As in `transformers`, but each file appears whole, `peft` neither drafts a card nor changes one, and the
        arguments are not pickled: nobody reads them, and a token or a variable's value may be among them.
        """
        if not self.args.should_save:
            super()._save(output_dir, state_dict)  # type: ignore[misc]
            return
        with atomic_files(Path(output_dir or self.args.output_dir)) as unfinished:
            super()._save(str(unfinished), state_dict)  # type: ignore[misc]
            for name in (CARD_FILE, TRAINING_ARGS_NAME):
                (unfinished / name).unlink(missing_ok=True)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the card is `bridle.models.card.write_card`'s, and a library's draft would stand beside it."""


def check_strategy(args: Any) -> None:
    """Refuses a `hub_strategy` that pushes more than the model.

    Raises:
        UserError: it is `checkpoint` or `all_checkpoints`.
    """
    if args.push_to_hub and args.hub_strategy in ("checkpoint", "all_checkpoints"):
        raise UserError(
            f"hub_strategy: {args.hub_strategy.value} would push optimiser states and rollouts; use end or every_save"
        )


def model_files(folder: Path) -> dict[str, str | bytes]:
    """What a model's folder gives to the repository's root: path in the repository to file or content."""
    wanted = [*WEIGHTS, *TOKENIZER, CARD_FILE]
    found = [path for path in sorted(folder.iterdir()) if any(path.match(pattern) for pattern in wanted)]
    return {path.name: _public(path) for path in found}


def auxiliary_files(folder: Path) -> dict[str, str | bytes]:
    """What the auxiliary's folder gives, those of single rounds or regularisers included; nothing where none is."""
    found = [path for path in sorted(folder.rglob("*")) if any(path.match(pattern) for pattern in WEIGHTS)]
    return {f"auxiliary/{path.relative_to(folder).as_posix()}": _public(path) for path in found}


def without_token(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe that may be kept in a file."""
    return {key: value for key, value in recipe.items() if key != "hub_token"}


def _shown(token: SecretStr | None) -> str | None:
    return token.get_secret_value() if token else None


def _describe(trainer: Any, folder: Path) -> None:
    """Writes the card of what a trainer knows of its run, which is not where its rows came from."""
    args, options = trainer.args, {regulariser.name: regulariser.options for regulariser in trainer.regularisers}
    constraints = [one.constraint for one in options.values() if one.constraint is not None]
    recipe = {
        **args.to_dict(),
        "auxiliary": vars(args.auxiliary),
        "model": trainer.model.config._name_or_path or "an unnamed model",
        "corpus": {name: {} for name in trainer.domains},
        "constraints": {constraint.name: constraint for constraint in constraints},
        "regularisers": {name: with_names(one) for name, one in options.items()},
    }
    write_card(folder, recipe, metrics=trainer.state.log_history, environment=environment(args.seed))


def _public(path: Path) -> str | bytes:
    """A file as it is, or the content of a configuration without the paths and words that it should not tell."""
    if path.name not in ("config.json", "adapter_config.json"):
        return str(path)
    return json.dumps(_without_paths(json.loads(path.read_text(encoding="utf-8"))), indent=2).encode()


def _without_paths(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    known = {key: public_name(value) for key, value in config.items() if key in PATH_KEYS and value}
    oracle = {"constraint": told(config["constraint"])} if isinstance(config.get("constraint"), dict) else {}
    return {key: _without_paths(value) for key, value in config.items()} | known | oracle


@contextmanager
def _kept(folder: Path, repository: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise RunStopped(
            f"{folder}: the model is kept here, but was not pushed to {repository}: {_first_line(error)}; "
            "--resume pushes it again"
        ) from error


def _warn_of_failure(push: Future[CommitInfo]) -> None:
    if push.exception() is not None:
        logger.warning("a checkpoint was not pushed to the hub: %s", _first_line(push.exception()))


def _first_line(error: BaseException | None) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
