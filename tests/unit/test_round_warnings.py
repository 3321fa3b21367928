"""What a round's measurements make a run warn of, and what they do not."""

import pytest

from bridle.training.config import ConstrainedConfig
from bridle.training.guards import FEWEST_KEPT_BACK, FEWEST_OF_EACH, round_warnings

FINE = {
    "rollouts": 100,
    "rollouts_empty": 2,
    "compliance": 0.9,
    "compliance_low": 0.83,
    "compliance_high": 0.94,
    "r_steps_skipped": 0,
    "r_kept_back": 100,
    "r_violating": 10,
    "r_ece": 0.05,
    "r_skill": 0.01,
    "lambda": 4.0,
}
BETTER = {"compliance": 0.99, "compliance_low": 0.95, "compliance_high": 1.0}
UNSCORED = {"compliance": None, "compliance_low": None, "compliance_high": None}
WRONG = {
    "labels": ({"fit": "kept"}, "every label is alike, so R learnt nothing new but their rate; more rollouts"),
    "no R": ({"fit": "none"}, "every label is alike and no round before had others, so R is constant"),
    "clipping": ({"clipped": 0.95}, "95% of the rollouts were cut at max_new_tokens 32, above clipped_bound 0.9"),
    "calibration": ({"r_ece": 0.2}, "R's calibration error is 0.200, above calibration_bound 0.15"),
    "skill": ({"r_skill": -0.031}, "R knows nothing: on the 100 rollouts kept back it is no better than a constant"),
    "fit": ({"r_steps_skipped": 3}, "3 steps of R's fit were skipped"),
    "corpus": (
        {"fit_corpus": "none", "corpus_outputs": 0},
        "auxiliary.corpus_outputs taught R nothing: 0 outputs of the corpus have no two labels that differ",
    ),
    "silence": ({"rollouts_empty": 11}, "11 of 100 rollouts say nothing, above empty_bound 0.1"),
}


NOTHING_LEARNT = {
    "opposite": (
        {"fit": "kept", "tilt": -0.5, "term_on": False},
        "every label is alike, so R learnt nothing new, and, as it was fitted to the opposite share, the term is off",
    ),
    "no label": ({"fit": "unlabelled"}, "no rollout has a label to learn, since all were cut at max_new_tokens 32"),
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return ConstrainedConfig(output_dir=str(tmp_path_factory.mktemp("run")), bf16=False)


def warnings(config, now, *earlier, name="rude"):
    log = [{"step": 1, "loss": 3.0}, *({f"{name}/{key}": value for key, value in one.items()} for one in earlier)]
    return round_warnings(name, 2, now, log, config)


@pytest.mark.parametrize("what", WRONG | NOTHING_LEARNT)
def test_what_a_round_warns_of(config, what):
    changed, said = (WRONG | NOTHING_LEARNT)[what]
    (warning,) = warnings(config, FINE | changed, FINE)
    assert warning.startswith(f"round 2, rude: {said}")


@pytest.mark.parametrize("earlier", [[BETTER], [BETTER, FINE], [UNSCORED, BETTER]])
def test_violations_are_compared_with_the_best_round(config, earlier):
    (warning,) = warnings(config, FINE, *earlier)
    assert "violations rose from 1.0% to 10.0% of the rollouts" in warning


def test_violations_may_rise_to_what_a_target_allows(config):
    """λ falls where the policy violates less than it may."""
    assert warnings(config, FINE | {"violation": 0.1, "target": 0.2}, BETTER) == []
    for missed in ({"violation": 0.1, "target": 0.05}, {"violation": 0.1, "target": None}, {"violation": None}):
        assert len(warnings(config, FINE | missed, BETTER)) == 1


@pytest.mark.parametrize("earlier", [[], [FINE], [UNSCORED], [FINE | {"compliance_low": 0.94}]])
def test_intervals_that_touch_say_nothing(config, earlier):
    assert warnings(config, FINE, *earlier) == []


def test_what_was_not_measured_is_not_judged(config):
    assert warnings(config, {"lambda": 1.0}, BETTER) == []
    assert warnings(config, FINE | UNSCORED, BETTER) == []
    assert (
        warnings(config, FINE | {"r_ece": 0.9, "r_skill": -1.0, "r_kept_back": FEWEST_KEPT_BACK - 1, "r_violating": 0})
        == []
    )
    for violating in (FEWEST_OF_EACH - 1, 100 - FEWEST_OF_EACH + 1):
        assert warnings(config, FINE | {"r_skill": -1.0, "r_violating": violating}) == []
    assert warnings(config, FINE | {"r_skill": None}) == []


@pytest.mark.parametrize(("round_index", "scoring", "warned"), [(1, 25.0, True), (1, 15.0, False), (2, 25.0, False)])
def test_a_constraint_that_takes_most_of_the_first_round_is_named(config, round_index, scoring, warned):
    now = FINE | {"seconds_sampling": 12.0, "seconds_scoring": scoring, "seconds_fitting": 8.0}
    now |= {"rollouts_sought": 50, "corpus_outputs": 150}
    found = round_warnings("rude", round_index, now, [], config)
    said = (
        "round 1, rude: scoring took 25 s, 56% of the round without its updates: the constraint reads 12 texts a second"
    )
    assert [warning.startswith(said) for warning in found] == [True] * warned
    seldom = {"seconds_sampling": 1.0, "seconds_scoring": 9.0}
    assert round_warnings("rude", round_index, FINE | seldom, [], config) == []


def test_another_regulariser_s_rounds_are_its_own(config):
    log = [{f"plain/{key}": value for key, value in BETTER.items()}]
    assert round_warnings("rude", 2, FINE, log, config) == []


def test_several_things_may_go_wrong_at_once(config):
    all_at_once = FINE | {key: value for changed, _ in WRONG.values() for key, value in changed.items()}
    assert len(warnings(config, all_at_once, BETTER)) == len(WRONG)  # `fit` has one value, and violations rose
