"""The trainer's own decisions, one at a time: what is refused, where the KL looks, which rollouts ride along."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import IA3Config, LoraConfig, get_peft_model

from bridle.data import Rollout
from bridle.errors import UserError
from bridle.training import trainer as module
from bridle.training.batches import NO_DOMAIN, Prefixes
from bridle.training.config import Regulariser
from bridle.training.trainer import ConstrainedTrainer
from trainers import NO_E, trainer_of

EVERYWHERE = {"target_modules": ["c_attn"], "fan_in_fan_out": True}


def refused(said):
    return pytest.raises(UserError, match=said) if said else nullcontext()


@pytest.mark.parametrize(
    ("zero3", "fsdp", "version", "schedule", "said"),
    [
        (True, False, None, "sequential", "ZeRO-3"),
        (False, True, 1, "sequential", "set fsdp_version: 2"),
        (False, True, 2, "parallel", "use sequential with FSDP2"),
        (False, True, 2, "sequential", None),
        (False, False, None, "parallel", None),
    ],
)
def test_weights_in_shards(monkeypatch, zero3, fsdp, version, schedule, said):
    monkeypatch.setattr(module, "is_deepspeed_zero3_enabled", lambda: zero3)
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=version) if fsdp else None)
    trainer = SimpleNamespace(
        is_fsdp_enabled=fsdp, args=SimpleNamespace(schedule=schedule), accelerator=SimpleNamespace(state=state)
    )
    with refused(said):
        ConstrainedTrainer._check_sharding(trainer)


@pytest.mark.parametrize(
    ("items", "averages", "scale"), [(torch.tensor(8), True, 3), (torch.tensor(8), False, 1), (None, True, 1)]
)
def test_the_loss_undoes_an_average_over_processes_with_a_batch_of_their_own(items, averages, scale):
    trainer = SimpleNamespace(
        args=SimpleNamespace(average_tokens_across_devices=averages),
        accelerator=SimpleNamespace(num_processes=6),
        get_tp_size=lambda: 2,
    )
    assert ConstrainedTrainer._loss_scale(trainer, items) == scale


@pytest.mark.parametrize(
    ("options", "column", "assistant_only", "warned"),
    [
        ({"weight": 0.5}, "messages", False, True),
        ({"weight": 0.0}, "messages", False, False),
        ({"on": "rollouts"}, "messages", False, False),
        ({"constraint": None}, "messages", False, False),
        ({}, "text", False, False),
        ({}, "messages", True, False),
    ],
)
def test_a_kl_within_users_turns_is_warned_of(caplog, options, column, assistant_only, warned):
    rows = Dataset.from_dict({column: ["unread"]})
    regulariser = SimpleNamespace(
        name="rude", options=Regulariser(**{"constraint": NO_E, **options}), corpus={"talk": rows}
    )
    arguments = SimpleNamespace(assistant_only_loss=assistant_only)
    ConstrainedTrainer._warn_of_user_turns(SimpleNamespace(regularisers=[regulariser], args=arguments))
    assert ("R is fitted on the assistant's turns of talk" in caplog.text) == warned


@pytest.mark.parametrize(
    ("adapters", "said"),
    [
        ([], None),
        ([LoraConfig(**EVERYWHERE)], None),
        ([LoraConfig(**EVERYWHERE), LoraConfig(**EVERYWHERE, lora_dropout=0.1)], "lora"),
        ([IA3Config(**EVERYWHERE, feedforward_modules=[])], None),
    ],
)
def test_dropout_is_off_or_an_adapter_s_is_refused(tiny_model, adapters, said):
    model = tiny_model("gpt2", resid_pdrop=0.2)
    for number, adapter in enumerate(adapters):
        if number:
            model.add_adapter(f"{number}", adapter)
        else:
            model = get_peft_model(model, adapter)
    with refused(said):
        ConstrainedTrainer._disable_dropout(SimpleNamespace(model=model))
        assert {part.p for part in model.modules() if isinstance(part, torch.nn.Dropout)} == {0.0}


@pytest.mark.parametrize(
    ("new_tokens", "held", "said"),
    [
        (63, [Regulariser(NO_E)], None),
        (64, [Regulariser(NO_E)], "max_new_tokens: 64 leave no room"),
        (64, [Regulariser(), Regulariser(NO_E)], "max_new_tokens: 64 leave no room"),
        (64, [Regulariser()], None),
    ],
)
def test_rollouts_need_room_for_a_prompt(tiny_model, new_tokens, held, said):
    with refused(said):
        module._check_room(tiny_model(), SimpleNamespace(max_new_tokens=new_tokens), held)


class TestPrefixes:
    """A batch of a plain row, two rude ones, and a rollout for the regulariser of the rude ones."""

    mask = np.array([[True, True, False], [True, True, True], [False, True, True], [False, True, False]])
    reached = np.array([[True, False, True]] * 4)
    batch = Prefixes(np.array([0, 1, 1, NO_DOMAIN]), np.array([-1, -1, -1, 0]), mask, np.array([3, 4, 4, 3]))

    @pytest.fixture
    def trainer(self, tiny_folder, tmp_path):
        def make(on, **options):
            held = {"rude": Regulariser(NO_E, on=on, anchor="previous")}
            made = trainer_of(tiny_folder(), tmp_path, held, **options)
            made.regularisers[0].is_fitted = True
            made.regularisers[0].reaches = lambda mask: self.reached
            return made

        return make

    @pytest.mark.parametrize("targets", ["computed", "shipped"])
    @pytest.mark.parametrize("on", ["corpus", "rollouts", "both"])
    def test_the_kl_looks_at_its_rows_where_r_was_fitted(self, trainer, on, targets):
        made = trainer(on, targets=targets)
        (regulariser,) = made.regularisers
        expected = np.zeros_like(self.mask)
        if on != "rollouts":
            expected[1:3] = self.mask[1:3] & (self.reached[1:3] | (targets == "shipped"))
        expected[3] = self.mask[3]
        assert made._mask(regulariser, self.batch).tolist() == expected.tolist()
        unreached = made.tally.since_last_log()
        assert unreached == ({} if on == "rollouts" else {"kl_unreached/rude": 0.4 if targets == "computed" else 0.0})
        regulariser.is_fitted = False
        assert not made._mask(regulariser, self.batch).any()

    @pytest.mark.parametrize("on", ["corpus", "rollouts", "both"])
    def test_as_many_rollouts_ride_along_as_a_batch_has_rows(self, trainer, on):
        made = trainer(on)
        (regulariser,) = made.regularisers
        known = {"prompt": "", "completion": "", "round": 1, "regulariser": "", "model_hash": "", "constraint": ""}
        regulariser.rollouts = [Rollout(prompt_ids=[1, 5], completion_ids=[n] * n, **known) for n in range(1, 6)]
        batches = [self.batch[:2], self.batch[:1], self.batch[:3]]
        riders = list(made._share_rollouts(batches))
        if on == "corpus":
            assert riders == [[], [], []]
        else:
            taken = [[len(one.completion_ids) for _, some in batch for one in some] for batch in riders]
            assert taken == [[1], [], [2, 3]]
            assert made._sampled == {0: 6}
        assert made._total_train_tokens == 7 + 3 + 11 + (0 if on == "corpus" else 6 + 3 * 2)
        regulariser.is_fitted = False
        assert list(made._share_rollouts(batches)) == [[], [], []]
