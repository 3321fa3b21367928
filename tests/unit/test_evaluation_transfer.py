"""The transfer ratio, on rates whose ratio is known."""

import numpy as np
import pytest

from bridle.evaluation.transfer import pleases_its_oracle, reference_of, transfer_ratio, transfers


def rate(violations, prompts=100, first=0):
    """One sample for each prompt, of which so many violate, from the prompt `first` on."""
    return [[first <= prompt < first + violations] for prompt in range(prompts)]


def test_shares_are_compared_and_not_differences():
    # Half of the violations go under both constraints, of which one sees twice as many.
    found = transfer_ratio(rate(60), rate(30), rate(30), rate(15))
    assert (found.value, found.n, found.missing) == (pytest.approx(1.0), 100, 0)
    assert found.low < 1 < found.high
    assert transfer_ratio(rate(60), rate(30), rate(30), rate(24)).value == pytest.approx(0.2 / 0.5)
    assert transfer_ratio(rate(60), rate(30), rate(0), rate(45)).value == pytest.approx(-0.5), "it rises"


def test_without_a_significant_drop_there_is_no_ratio():
    for after in (rate(60), rate(57), rate(80)):
        assert transfer_ratio(rate(60), rate(30), after, rate(0)).value is None
    assert transfer_ratio(rate(60), rate(0), rate(0), rate(0)).value is None, "nothing violates the independent one"
    assert transfer_ratio([], [], [], []).value is None


def test_the_ratio_s_interval_holds_it():
    """Over many draws of 200 prompts the 95% interval contains the true ratio about as often as it should."""
    rng = np.random.default_rng(0)
    held, draws = 0, 60
    for seed in range(draws):
        a0, b0, a, b = (rng.random((200, 2)) < p for p in (0.4, 0.3, 0.2, 0.21))  # 0.3 of b0 go, half of a0
        found = transfer_ratio(*(part.tolist() for part in (a0, b0, a, b)), seed=seed)
        held += found.low <= 0.6 <= found.high
    assert held >= 0.88 * draws


def test_pairs_are_kept_together():
    """The independent constraint says what the oracle says, prompt by prompt, so that the ratio hardly varies."""
    paired = transfer_ratio(rate(50), rate(50), rate(25), rate(26))
    apart = transfer_ratio(rate(50), rate(50, first=50), rate(25), rate(26, first=50))
    assert paired.value == pytest.approx(apart.value)
    assert paired.high - paired.low < 0.5 * (apart.high - apart.low)


def test_a_few_violations_give_a_wide_interval_of_numbers():
    found = transfer_ratio(rate(60), rate(2), rate(30), rate(1))
    assert found.value == pytest.approx(1.0)
    assert -200 < found.low < found.high < 200


def test_prompts_without_a_score_are_missing():
    gap = [[None, None], *rate(60, 99)]
    found = transfer_ratio(rate(60), gap, rate(30), rate(15))
    assert (found.n, found.missing) == (99, 1)
    some = [[False, None], *rate(30, 99)]
    assert transfer_ratio(rate(60), some, rate(30), rate(15)).missing == 0


def test_the_reference_is_the_same_model_without_the_constraint():
    every = ["base", "sft", "nado-decoding", "rl", "my-own"]
    references = {name: reference_of(name, every) for name in every}
    assert references == {"base": None, "sft": None, "nado-decoding": "base", "rl": "sft", "my-own": "sft"}
    assert reference_of("rl", ["base", "rl"]) == "base"
    assert reference_of("rl", ["rl"]) is None


def test_who_pleases_its_oracle():
    ignored = transfer_ratio(rate(50), rate(40, first=50), rate(5), rate(38, first=50))
    assert (ignored.value, pleases_its_oracle(ignored)) == (pytest.approx(0.05 / 0.9), True)
    unchanged = transfer_ratio(rate(50), rate(40), rate(5), rate(40))
    assert (unchanged.value, unchanged.high, pleases_its_oracle(unchanged)) == (0.0, None, True)
    confirmed = transfer_ratio(rate(50), rate(40), rate(5), rate(10))
    assert not pleases_its_oracle(confirmed)
    uncertain = transfer_ratio(rate(50), rate(4, first=50), rate(5), rate(3, first=50))
    assert uncertain.value < 0.5 < 1 < uncertain.high
    assert not pleases_its_oracle(uncertain)
    assert not pleases_its_oracle(transfer_ratio(rate(50), rate(40), rate(50), rate(40)))


def test_every_prompt_set_and_independent_constraint_has_its_ratio():
    def judged(**violations):
        return {method: dict(enumerate(rate(count))) for method, count in violations.items()}

    violations = {
        ("forum", "oracle"): judged(base=60, sft=70, tuned=35),
        ("forum", "judge"): judged(base=30, sft=40, tuned=30),
        ("wiki", "oracle"): judged(base=3, tuned=3),
        ("wiki", "judge"): judged(base=3, tuned=3),
        ("wiki", "other"): judged(base=3, tuned=3),
    }
    found = transfers(violations, "oracle", ["judge"])
    assert found.keys() == {"tuned"}, "base and sft have no reference"
    assert found["tuned"]["forum"]["judge"].value == pytest.approx(0.25 / 0.5), "against sft"
    assert found["tuned"]["wiki"]["judge"].value is None
    assert found["tuned"]["wiki"].keys() == {"judge"}
    assert transfers(violations, "absent", ["judge"]) == {}
