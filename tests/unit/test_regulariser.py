"""A regulariser by itself: when it pulls, where its R holds, whose turn a rollout is, and what a round keeps."""

import json
import math

import numpy as np
import pytest

from bridle.data import DataSource, Rollout
from bridle.errors import UserError
from bridle.training import regulariser as module
from bridle.training.config import AuxiliaryOptions, ConstrainedConfig, Regulariser
from bridle.training.regulariser import DomainRegulariser
from trainers import NO_E, Labels, Letters, trainer_of


@pytest.fixture
def of(tiny_model, tmp_path):
    """A factory of regularisers without a corpus: of(weight=1.0, rounds=3)."""

    def make(constraint=NO_E, config=None, **options):
        args = ConstrainedConfig(output_dir=str(tmp_path), report_to="none", **(config or {}))
        return DomainRegulariser(0, "rude", Regulariser(constraint, **options), tiny_model(), None, {}, args)

    return make


@pytest.fixture
def trained_on(tiny_folder, tmp_path):
    """The regulariser of a trainer on the invented corpus, with everything a round needs."""

    def make(constraint=NO_E, options=None, **config):
        held = {"rude": Regulariser(constraint, **(options or {}))}
        return trainer_of(tiny_folder(), tmp_path / "run", held, **config).regularisers[0]

    return make


def rollout(prompt, completion, /, **options):
    known = {"prompt": "", "completion": "", "round": 1, "regulariser": "rude", "model_hash": "", "constraint": ""}
    return Rollout(prompt_ids=prompt, completion_ids=completion, **{**known, **options})


@pytest.mark.parametrize(
    ("options", "fitted", "begun", "active"),
    [
        ({"weight": 0.0}, True, True, False),
        ({"weight": 1.0}, True, True, True),
        ({"anchor": "live"}, False, False, False),
        ({"anchor": "live"}, False, True, False),  # q is the policy itself
        ({"anchor": "live"}, True, True, True),
        ({"anchor": "previous"}, False, False, False),
        ({"anchor": "previous"}, False, True, True),
        ({"anchor": "initial"}, False, True, True),
        ({"anchor": "initial"}, True, True, True),
        ({"constraint": None}, False, False, True),
        ({"constraint": None, "weight": 0.0}, False, False, False),
    ],
)
def test_it_pulls_where_q_can_differ_from_the_policy(of, options, fitted, begun, active):
    held = of(**options)
    held.is_fitted, held.has_begun = fitted, begun
    assert held.active == active


class TestReach:
    """Rollouts of two tokens after prompts of two and three."""

    text = np.array([[True] * 8, [True] * 5 + [False] * 3])
    with_prompts = np.array([[False, False, True, True, True, True], [False, True, False, False, False, False]])

    @pytest.fixture
    def held(self, of):
        held = of(config={"max_new_tokens": 2})
        held.rollouts = [rollout([1, 5, 9], [3, 4]), rollout([1, 5], [7])]
        return held

    def test_in_text_it_is_as_deep_as_the_rollouts(self, held):
        expected = [[False, True, True, True, False, False, False, False]] * 2  # the tokens 3, 4 and 5 are sampled
        assert (held.reaches(self.text) & self.text).tolist() == expected

    def test_behind_a_prompt_it_is_as_long_as_a_rollout(self, held):
        reached = held.reaches(self.with_prompts) & self.with_prompts
        assert reached.tolist() == [[False, False, True, True, False, False], [False, True, *[False] * 4]]

    def test_without_rollouts_and_for_retention_it_is_everywhere(self, of, held):
        held.rollouts = []
        assert held.reaches(self.text).all()
        retention = of(None)
        retention.rollouts = [rollout([1, 5], [7])]
        assert retention.reaches(self.text).all()


def test_rollouts_are_taken_in_turn_by_micro_batch_and_process(of):
    held = of()
    held.rollouts = [rollout([1], [number] * number) for number in (1, 2, 4)]
    (first, second, *rest), tokens = held.take([[2, 1], [1, 2]])
    assert [[len(one.completion_ids) for one in part] for part in (first, second, *rest)] == [[1, 2], [4], [1], [2, 4]]
    assert tokens == 1 + 2 + 4 + 1 + 2 + 4
    held.take([[1]])
    (after,), _ = held.take([[1]])
    assert after == [held.rollouts[1]]


class TestPrompts:
    def test_a_file_s_own_come_in_turn_over_the_rounds(self, trained_on, tmp_path):
        path = tmp_path / "prompts.jsonl"
        path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("one", "two", "three")))
        held = trained_on(options={"prompts": DataSource(str(path))}, rollouts_per_round=2)
        own = [held.tokenizer.decode(prompt.ids[1:]) for index in (1, 2, 3) for prompt in held.prompts(index)]
        assert own == ["one", "two", "three", "one", "two", "three"]
        path.write_text(json.dumps({"prompt": "%7 " * 40}) + "\n")
        assert len(held.tokenizer("%7 " * 40)["input_ids"]) > 64 - 8
        with pytest.raises(UserError, match="row 1"):
            held.prompts(1)

    def test_domains_give_one_each_in_turn(self, trained_on):
        held = trained_on(options={"domain": "all"}, rollouts_per_round=5, prompt_tokens=(3, 3))
        prompts = held.prompts(1)
        first, second = ({tuple(row[:4]) for row in rows["input_ids"]} for rows in held.corpus.values())
        assert [tuple(prompt.ids) in of for prompt, of in zip(prompts, [first, second] * 3, strict=False)] == [True] * 5
        assert [prompt.ids for prompt in held.prompts(1)] == [prompt.ids for prompt in prompts]
        assert [prompt.ids for prompt in held.prompts(2)] != [prompt.ids for prompt in prompts]


class TestRound:
    def test_it_replays_scored_rollouts_of_so_many_rounds(self, trained_on):
        held = trained_on(auxiliary=AuxiliaryOptions(epochs=1, replay=2), rollouts_per_round=8)
        first, second, third, unscored = (
            rollout([1], [5, 2], round=index, complies=complies, value=0.5, log_probs=[-1.0, -1.0])
            for index, complies in ((1, True), (2, True), (3, False), (3, None))
        )
        held.replayed, held.rollouts, held.drawn = [first, second], [third, unscored], 5
        held.update(4)
        assert held.drawn == 0
        assert [(one.round, one.complies) for one in held.replayed] == [(2, True), (3, False)]
        assert {one.round for one in held.rollouts} == {4}

    def test_retention_and_a_weight_of_0_ask_nobody(self, of):
        assert of(None).update(1) == of(weight=0.0).update(1) == {}

    @pytest.mark.parametrize("anchor", ["live", "initial"])
    def test_an_initial_anchor_draws_from_what_the_policy_was(self, trained_on, anchor):
        held, drawn = trained_on(Labels(), {"anchor": anchor}), []
        for _ in range(2):
            held.update(1)
            drawn.append([one.completion_ids for one in held.rollouts])
            for weight in held.model.parameters():
                weight.data.mul_(2)
        assert (drawn[0] == drawn[1]) == (anchor == "initial")

    def test_an_initial_anchor_that_is_fitted_draws_no_more(self, trained_on):
        held = trained_on(Letters(["unused"]), {"anchor": "initial"})
        held.is_fitted = True
        assert held.update(2) == {}

    def test_what_was_scored_while_sampling_is_scored_once(self, trained_on):
        constraint, asked = Letters(["unused"]), []
        constraint.waits = True
        held = trained_on(constraint, rollout_batch_size=8)
        score = constraint._score
        constraint._score = lambda texts: asked.extend(texts) or score(texts)
        constraint.cut_texts = lambda: 5 + len(asked)  # of an earlier round
        measured = held.update(1)
        assert measured["truncated"] == len(asked)
        assert sorted(set(asked)) == sorted({one.completion for one in held.rollouts})
        assert all(one.complies == ("e" not in one.completion) for one in held.rollouts)


def test_what_a_round_measures_by_hand():
    one = {"log_probs": [-1.0, -2.0], "finished": True, "completion": "a"}
    other = {"log_probs": [-6.0], "finished": False, "completion": " "}
    rollouts = [
        rollout([1], [5, 2], complies=True, value=1.0, **one),
        rollout([1], [5, 2], complies=False, value=0.0, **one),
        rollout([1], [5, 2], complies=True, value=1.0, **one),
        rollout([1], [7], **other),
    ]
    measured = module._compliance(rollouts)
    low, high = measured.pop("compliance_low"), measured.pop("compliance_high")
    assert measured == {
        "rollouts": 4,
        "rollouts_missing": 1,
        "rollouts_empty": 1,
        "clipped": 0.25,
        "tokens_sampled": 7,
        "entropy_sampled": pytest.approx((3 * 3.0 + 6.0) / 7),
        "compliance": pytest.approx(2 / 3),
    }
    z, n, p = 1.959964, 3, 2 / 3  # Wilson's interval
    middle, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert (low, high) == pytest.approx(((middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n)), rel=1e-5)
    nobody = module._compliance(rollouts[3:])
    assert nobody["compliance"] is nobody["compliance_low"] is nobody["compliance_high"] is None
