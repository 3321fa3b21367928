"""Pushing a run to the hub: its model, the card and the auxiliary, and nothing else.

Rollouts hold text that violates the constraint, metrics and recipes hold local paths, and pickles run code when read.
None of them is ever pushed.
"""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
from pydantic import SecretStr
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.utils import PushInProgress

from bridle.errors import RunStopped, UserError, first_line
from bridle.models.card import CARD_FILE, add_to_header, write_card
from bridle.models.card_text import public_name, setting_text, with_names
from bridle.utils.files import atomic_files
from bridle.utils.provenance import environment

logger = logging.getLogger(__name__)

WEIGHTS = ("config.json", "generation_config.json", "adapter_config.json", "*.safetensors", "*.safetensors.index.json")
TOKENIZER = (
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("*.model", "chat_template.jinja", "chat_template.json"),
)
"""The files of a model's folder that are pushed, beside the card."""

PATH_KEYS = {"base_model_name_or_path", "_name_or_path", "name_or_path"}


class PushesModel:
    """Replaces `push_to_hub` of a `transformers` trainer; a mixin that precedes the trainer's class.

    The repository holds the run's `model/` at its root, with the card, and the run's `auxiliary/`. `hub_model_id`,
    `hub_private_repo`, `hub_token`, `hub_revision` (a branch, made if it is missing) and `hub_always_push` mean what
    they mean in `transformers`. The `hub_strategy` `end` pushes once, after training, and `every_save`, the default,
    also pushes the model of each checkpoint. `checkpoint` and `all_checkpoints` would push optimiser states and
    rollouts, and are refused.
    """

    args: Any
    state: Any
    control: Any
    callback_handler: Any
    hub_model_id: str | None
    save_model: Any
    is_world_process_zero: Any
    _finish_current_push: Any
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
            super().init_hf_repo(self._secret, private)  # type: ignore[misc]
            if args.hub_revision and self.is_world_process_zero():
                HfApi(token=self._secret).create_branch(
                    self.hub_model_id or name, branch=args.hub_revision, exist_ok=True
                )
        except Exception as error:  # the hub's clients raise errors of several libraries with no common base
            raise UserError(f"push_to_hub: {name}: {first_line(error)}") from error

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        license: str | None = None,
        tags: str | Sequence[str] = (),
        dataset_name: str | Sequence[str] = (),
    ) -> CommitInfo | Future[CommitInfo] | None:
        """Saves the model to `model/` in the output folder, with a card unless there is one, and pushes it.

        `license`, `tags` and `dataset_name` are added to the card's header. Returns and raises as `push_saved_model`.
        """
        folder = Path(self.args.output_dir) / "model"
        self.save_model(str(folder), _internal_call=True)
        if self.is_world_process_zero():
            if not (folder / CARD_FILE).exists():
                _describe(self, folder)
            if license or tags or dataset_name:
                add_to_header(folder, license=license, tags=tags, datasets=dataset_name)
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
        """Pushes `model/` and `auxiliary/` in the output folder.

        Returns:
            The commit, or its future where `blocking` is off; None on all processes but the first.

        Raises:
            UserError: as `init_hf_repo`.
            RunStopped: the push failed; the model is in the output folder.
        """
        if self.hub_model_id is None:
            self.init_hf_repo(token, private)
        if not self.is_world_process_zero():
            return None
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self._finish_current_push()
        folder = Path(self.args.output_dir)
        files = model_files(folder / "model") | auxiliary_files(folder / "auxiliary")
        try:
            return self._commit(files, commit_message or "End of training", not blocking, token, revision)
        except Exception as error:
            raise RunStopped(
                f"{folder}: the model is kept here, but was not pushed to {self.hub_model_id}: {first_line(error)}; "
                "--resume pushes it again"
            ) from error

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Pushes the model of a checkpoint, in the background; the card and the auxiliary come at the end."""
        args = self.args
        if not self.is_world_process_zero() or args.hub_strategy == "end":
            return
        running: PushInProgress | None = self.push_in_progress  # type: ignore[has-type]
        if running is not None and not running.is_done() and not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
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
        return HfApi(token=token or self._secret).create_commit(
            str(self.hub_model_id),
            [CommitOperationAdd(name, content) for name, content in files.items()],
            commit_message=message,
            revision=revision or self.args.hub_revision,
            run_as_future=run_as_future,
        )

    @property
    def _secret(self) -> str | None:
        return self._token.get_secret_value() if self._token else None

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """As in `transformers`, but each file appears whole, and without `peft`'s card and the pickled arguments.

        Nothing reads the arguments, and they may hold a token or the value of a variable.
        """
        if not self.args.should_save:
            super()._save(output_dir, state_dict)  # type: ignore[misc]
            return
        with atomic_files(Path(output_dir or self.args.output_dir)) as unfinished:
            super()._save(str(unfinished), state_dict)  # type: ignore[misc]
            for name in (CARD_FILE, TRAINING_ARGS_NAME):
                (unfinished / name).unlink(missing_ok=True)

    def create_model_card(self, model_name: str | None = None, **described: Any) -> None:
        """Does nothing, as TRL calls it for each checkpoint: `bridle.models.card.write_card` writes the card.

        Raises:
            UserError: arguments say what the card should hold.
        """
        if described:
            raise UserError(
                f"create_model_card: {', '.join(described)}: the card is written when the model is pushed; give "
                "push_to_hub license, tags and dataset_name"
            )


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
    """What the repository's root gets from a model's folder: path in the repository to file or content."""
    found = _matching(folder.iterdir(), *WEIGHTS, *TOKENIZER, CARD_FILE)
    found += sorted(folder.glob("additional_chat_templates/*.jinja"))
    return {path.relative_to(folder).as_posix(): _public(path) for path in found}


def auxiliary_files(folder: Path) -> dict[str, str | bytes]:
    """What the repository gets from the auxiliary's folder, single rounds and regularisers included."""
    found = _matching(folder.rglob("*"), *WEIGHTS)
    return {f"auxiliary/{path.relative_to(folder).as_posix()}": _public(path) for path in found}


def without_token(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe without the hub's token, to be written to a file."""
    return {key: value for key, value in recipe.items() if key != "hub_token"}


def _describe(trainer: Any, folder: Path) -> None:
    """Writes the card of what a trainer knows of its run; it does not know where the rows came from."""
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


def _matching(paths: Iterable[Path], *patterns: str) -> list[Path]:
    return sorted(path for path in paths if any(map(path.match, patterns)))


def _public(path: Path) -> str | bytes:
    """A file's path, or the content of a configuration without local paths and the constraint's words."""
    if path.name not in ("config.json", "adapter_config.json"):
        return str(path)
    return json.dumps(_without_paths(json.loads(path.read_text(encoding="utf-8"))), indent=2).encode()


def _without_paths(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    known = {key: public_name(value) for key, value in config.items() if key in PATH_KEYS and value}
    oracle = {"constraint": setting_text(config["constraint"])} if isinstance(config.get("constraint"), dict) else {}
    return {key: _without_paths(value) for key, value in config.items()} | known | oracle


def _warn_of_failure(push: Future[CommitInfo]) -> None:
    if (error := push.exception()) is not None:
        logger.warning("a checkpoint was not pushed to the hub: %s", first_line(error))
