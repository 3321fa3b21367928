"""Fitting R on labelled samples, against the equations one sample at a time."""

import math

import pytest
import torch
import torch.nn.functional as F

from bridle.core.decomposition import consistency_loss, label_loss
from bridle.core.tokens import pad_right
from bridle.data import Rollout
from bridle.models.auxiliary import new_auxiliary
from bridle.models.forward import disable_dropout, policy_forward
from bridle.models.hidden import project
from bridle.models.sampling import Trace
from bridle.training import examples, fitting
from bridle.training.config import AuxiliaryOptions
from bridle.training.examples import split
from bridle.training.fitting import fit_auxiliary
from bridle.utils.progress import Progress

encode = torch.no_grad()(examples.encode)  # as in a round

STANDING_STILL = {"learning_rate": 1e-30, "weight_decay": 0.0, "validation_share": 0.0}


def rollout(prompt, completion, value=1.0, **options):
    known = {"prompt": "", "completion": "", "round": 1, "regulariser": "all", "model_hash": "", "constraint": ""}
    return Rollout(prompt_ids=prompt, completion_ids=completion, value=value, complies=value >= 0.5, **known | options)


ROLLOUTS = [
    rollout([1, 5, 9], [3, 4, 8, 2], log_probs=[-4.0, -4.2, -4.0, -4.1]),
    rollout([1], [7], 0.0, log_probs=[-3.0]),
    rollout([1, 7, 8, 9, 10], [11], 0.0, log_probs=[-4.0]),
    rollout([1, 4], [13, 2, 6], finished=False, log_probs=[-4.5, -4.3, -4.0]),
    rollout([1, 6, 6, 6], [12, 12], 0.0, log_probs=[-3.9, -4.4]),
]
"""Rows of several lengths; the longest prompt has the shortest completion."""


@pytest.fixture
def model(tiny_model):
    return tiny_model("gpt2", initializer_range=0.1)


@pytest.fixture
def auxiliary(model):
    """An R that has something to say."""
    made = new_auxiliary(model)
    torch.nn.init.normal_(made.head.weight)
    return made


def fit(auxiliary, examples, plain=None, **options):
    return fit_auxiliary(
        auxiliary, examples, AuxiliaryOptions(**options), torch.Generator().manual_seed(0), plain=plain
    )


class TestExamples:
    def test_each_token_goes_with_the_state_that_predicts_it(self, model):
        examples = encode(model.train(), ROLLOUTS, 0)
        assert model.training
        model.eval()
        for row, one in enumerate(ROLLOUTS):
            length = len(one.completion_ids)
            assert examples.mask[row].tolist() == [True] * length + [False] * (4 - length)
            assert examples.completion[row, :length].tolist() == one.completion_ids
            states = policy_forward(model, *pad_right([one.prompt_ids + one.completion_ids], 0))[0]
            predicting = slice(len(one.prompt_ids) - 1, -1)
            torch.testing.assert_close(examples.hidden[row, :length], states[predicting])
            at = torch.arange(len(states))[predicting]
            assert torch.equal(examples.positions[row, :length], at)
        assert examples.compliance.tolist() == [1.0, 0.0, 0.0, 1.0, 0.0]
        assert (examples.weights == 1).all()

    def test_states_that_are_known_are_not_made_again(self, model):
        read, one = [], torch.ones(4, 32)
        model.register_forward_pre_hook(lambda _, __, given: read.append(len(given["input_ids"])), with_kwargs=True)
        examples = encode(model, ROLLOUTS, 0, traces={0: Trace([], [-1.0] * 4, one), 1: Trace([], [-1.0], None)})
        assert read == [len(ROLLOUTS) - 1]
        assert torch.equal(examples.hidden[0], one)

    def test_a_label_is_the_verdict_or_the_degree(self, model):
        degrees = [rollout([1, 5], [3, 4], degree) for degree in (0.3, 0.75)]
        assert encode(model, degrees, 0).compliance.tolist() == [0.0, 1.0]
        torch.testing.assert_close(
            encode(model, degrees, 0, label=lambda one: one.value).compliance, torch.tensor([0.3, 0.75])
        )

    def test_a_replayed_label_counts_by_how_likely_what_came_after_is_now(self, model):
        fresh = 2
        examples = encode(model, ROLLOUTS, 0, fresh=fresh)
        assert (examples.weights[:fresh] == 1).all()
        for row, one in list(enumerate(ROLLOUTS))[fresh:]:
            ids = torch.tensor([one.prompt_ids + one.completion_ids])
            log_p = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            now = log_p.gather(-1, ids[0, 1:, None])[len(one.prompt_ids) - 1 :, 0]
            ratios = (now - torch.tensor(one.log_probs)).exp()
            expected = [ratios[place + 1 :].prod().clamp(max=4.0) for place in range(len(ratios))]
            torch.testing.assert_close(examples.weights[row, : len(ratios)], torch.stack(expected))


class TestLosses:
    def test_what_is_reported_is_the_mean_over_all_prefixes(self, model, auxiliary):
        examples = encode(model, ROLLOUTS, 0)
        report = fit(auxiliary, examples, batch_size=1, epochs=2, **STANDING_STILL)
        r_taken = auxiliary(examples.states(auxiliary), examples.completion)
        bce, prefixes = label_loss(r_taken, examples.mask, examples.compliance)
        assert report["r_bce"] == pytest.approx((bce / prefixes).item(), rel=1e-5)
        log_p = project(model, examples.hidden).log_softmax(-1)
        apart, pairs = consistency_loss(auxiliary(examples.states(auxiliary)), r_taken, log_p, examples.mask)
        assert report["r_consistency"] == pytest.approx((apart / pairs).item(), rel=1e-4)
        assert report["r_steps_skipped"] == report["r_kept_back"] == 0

    def test_of_an_output_that_was_cut_r_is_taught_its_own_estimate_at_the_cut(self, model, auxiliary):
        for one, teaches_itself in [(ROLLOUTS[0], False), (ROLLOUTS[3], True)]:
            examples = encode(model, [one], 0, bootstrap=True)
            report = fit(auxiliary, examples, epochs=1, **STANDING_STILL)
            r_taken = auxiliary(examples.states(auxiliary), examples.completion)[0].detach()
            label = r_taken[-1].sigmoid() if teaches_itself else torch.tensor(1.0)
            expected = F.binary_cross_entropy_with_logits(r_taken, label.expand_as(r_taken))
            assert report["r_bce"] == pytest.approx(expected.item(), rel=1e-5)

    @pytest.mark.parametrize("length", [1, 2, 4])
    def test_a_step_goes_down_the_mean_of_each_term(self, model, auxiliary, length):
        """Also of one token alone, which is no pair of a prefix and its continuations."""
        examples = encode(model, [rollout([1, 5], [3, 4, 8, 2][:length])], 0)
        found, head = [], auxiliary.head.weight
        hook = head.register_hook(lambda gradient: found.append(gradient.clone()))
        report = fit(auxiliary, examples, epochs=1, consistency_weight=0.7, **STANDING_STILL)
        hook.remove()
        r_logits = auxiliary(examples.states(auxiliary))[0]
        r_taken = r_logits.gather(-1, examples.completion[0, :, None])[:, 0]
        loss = F.binary_cross_entropy_with_logits(r_taken, torch.ones(length))
        if length > 1:
            log_p = project(model, examples.hidden).log_softmax(-1)
            apart, _ = consistency_loss(r_logits[None].detach(), r_taken[None], log_p, examples.mask)
            loss = loss + 0.7 * apart / (length - 1)
        torch.testing.assert_close(found[0], torch.autograd.grad(loss, head)[0], rtol=1e-4, atol=1e-7)
        assert (report["r_consistency"] is None) == (length == 1)

    @pytest.mark.parametrize("own_network", [False, True])
    def test_of_the_log_linear_form(self, model, own_network, monkeypatch):
        """Each prefix's BCE, after a token and before one, and what is above 1; a few logits at a time."""
        monkeypatch.setattr(examples, "LOGITS_AT_ONCE", 200)
        made = new_auxiliary(model, memory=8, own_network=own_network, form="log-linear")
        for part in (made.head, made.value):
            torch.nn.init.normal_(part.weight)  # some R is then above 1
        disable_dropout(made)
        samples = encode(model, ROLLOUTS, 0)
        found, weight = [], made.value.weight
        hook = weight.register_hook(lambda gradient: found.append(gradient.clone()))
        report = fit(made, samples, epochs=1, consistency_weight=0.0, **STANDING_STILL)
        hook.remove()
        features = samples.states(made)
        r_taken = made(features, samples.completion, samples.anchor_logits())
        torch.testing.assert_close(samples.r_taken(made, features)[samples.mask], r_taken[samples.mask])
        bce, prefixes = label_loss(r_taken, samples.mask, samples.compliance)
        excess = made.excess(r_taken)[samples.mask].mean()
        later = label_loss(made.values(features)[:, 1:], samples.mask[:, 1:], samples.compliance)
        assert report["r_bce"] == pytest.approx((bce / prefixes).item(), rel=1e-5)
        assert report["r_excess"] == pytest.approx(excess.item(), rel=1e-5)
        assert excess > 0 or own_network
        expected = torch.autograd.grad(bce / prefixes + excess + later[0] / later[1], weight)[0]
        torch.testing.assert_close(sum(found), expected, rtol=1e-3, atol=1e-5)

    @pytest.mark.parametrize("form", ["sigmoid", "log-linear"])
    def test_a_step_reads_the_rows_once_with_r_and_once_with_its_average(self, model, form, monkeypatch):
        made, read = new_auxiliary(model, own_network=True, form=form), []
        states = type(made).states
        monkeypatch.setattr(type(made), "states", lambda *a, **k: read.append(a[0] is made) or states(*a, **k))
        monkeypatch.setattr(fitting, "rate_shift", lambda *a: 0.0)
        fit(made, encode(model, ROLLOUTS, 0), epochs=1, batch_size=5, **STANDING_STILL)
        assert sorted(read) == [False, True]

    def test_a_new_log_linear_r_reads_numbers_of_size_one_where_rows_have_tokens(self, model):
        made = new_auxiliary(model, form="log-linear")
        traces = {
            row: Trace([], one.log_probs, 3 * torch.randn(len(one.completion_ids), 32))
            for row, one in enumerate(ROLLOUTS)
        }
        examples = encode(model, ROLLOUTS, 0, traces=traces)
        fit(made, examples, epochs=1, **STANDING_STILL)
        read = (examples.hidden * made.scale)[examples.mask]
        torch.testing.assert_close(read.square().mean(0), torch.ones(32))

    def test_gradients_are_cut_to_a_norm_of_one(self, model, auxiliary):
        fit(auxiliary, encode(model, ROLLOUTS, 0), epochs=1, consistency_weight=100.0, **STANDING_STILL)
        norm = torch.nn.utils.get_total_norm([weight.grad for weight in auxiliary.parameters()])
        assert norm.item() == pytest.approx(1.0, rel=1e-4)

    def test_steps_that_are_not_finite_are_skipped_and_counted(self, model, auxiliary):
        before = auxiliary.head.weight.detach().clone()
        auxiliary.value.weight.register_hook(lambda gradient: gradient * math.nan)
        report = fit(auxiliary, encode(model, ROLLOUTS, 0), epochs=3, batch_size=5, validation_share=0.0)
        assert report["r_steps_skipped"] == 3
        assert report["r_bce"] is report["r_consistency"] is None
        torch.testing.assert_close(auxiliary.head.weight, before, rtol=1e-4, atol=0)  # but for the decay

    def test_a_quarter_of_the_rows_pays_for_the_whole_vocabulary(self, model, auxiliary):
        examples, seen = encode(model, ROLLOUTS + ROLLOUTS[:4], 0), []
        auxiliary.register_forward_hook(lambda _, __, r_logits: seen.append(tuple(r_logits.shape)))
        fit(auxiliary, examples, epochs=1, batch_size=9, **STANDING_STILL)
        assert seen[-2:] == [(9, 4), (3, 4, 64)]


@pytest.mark.parametrize(("count", "batch_size"), [(4, 2), (5, 2), (5, 8)])
def test_it_shows_as_many_steps_as_it_makes(model, auxiliary, monkeypatch, count, batch_size):
    shown = []

    class Kept(Progress):
        def close(self):
            shown.append((self.done, self.total))
            super().close()

    monkeypatch.setattr(fitting, "Progress", Kept)
    fit(auxiliary, encode(model, ROLLOUTS[:count], 0), epochs=3, batch_size=batch_size, **STANDING_STILL)
    assert shown == [(3 * len(range(0, count, batch_size)),) * 2]


@pytest.mark.parametrize(("plain", "share", "kept"), [(5, 0.4, 2), (5, 1.0, 4), (3, 0.5, 2), (1, 1.0, 0)])
def test_a_share_of_the_plain_ones_is_kept_back(model, auxiliary, plain, share, kept):
    alike = [rollout(one.prompt_ids, one.completion_ids, float(row < plain)) for row, one in enumerate(ROLLOUTS)]
    rows = []
    auxiliary.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])) if auxiliary.training else None)
    options = STANDING_STILL | {"validation_share": share}
    report = fit(auxiliary, encode(model, alike, 0), plain, epochs=1, consistency_weight=0.0, **options)
    assert report["r_kept_back"] == kept
    assert rows[0] == len(ROLLOUTS) - kept
    assert [rate for _, rate, _ in report.get("r_reliability", [])] == [1.0] * len(report.get("r_reliability", []))
    assert ("r_brier" in report) == (kept > 0)


@pytest.mark.parametrize("seed", range(5))
def test_what_is_kept_back_shares_no_prompt_with_the_fit(model, seed):
    prompts = [[3], [4], [3], [5, 6], [4], [5, 6], [5], [3], [4]]
    known = encode(model, [rollout(prompt, [7, 8 + row % 3, 2]) for row, prompt in enumerate(prompts)], 0)
    kept_back, fitting = split(known, 7, 0.3, seed)
    of_kept, of_fit = ({tuple(prompts[row]) for row in rows.tolist()} for rows in (kept_back, fitting))
    assert not of_kept & of_fit, "nor does an older rollout"
    assert of_kept | of_fit == {tuple(prompt) for prompt in prompts}
    assert {*kept_back.tolist()} | {*fitting.tolist()} >= {*range(7)}
    assert 1 <= len(kept_back) <= 2
    assert kept_back.max() < 7


def test_what_is_kept_back_counts_where_its_label_is_known(model, auxiliary):
    cut = [rollout([3 + row], [7, 8, 9], finished=row < 2) for row in range(10)]
    report = fit(
        auxiliary, encode(model, cut, 0, bootstrap=True), epochs=1, **STANDING_STILL | {"validation_share": 0.9}
    )
    assert 1 <= report["r_kept_back"] <= 2, "nine are kept back, and two of ten end"
    assert sum(count for *_, count in report["r_reliability"]) == 3 * report["r_kept_back"]


def test_prompts_that_recur_are_kept_back_in_every_fit(model):
    prompts, kept_back = [[3 + row % 20] for row in range(60)], []
    for first in (0, 7, 20):  # a later round draws them in another order
        drawn = prompts[first:] + prompts[:first]
        known = encode(model, [rollout(prompt, [7, 8 + row % 3, 2]) for row, prompt in enumerate(drawn)], 0)
        kept_back.append({tuple(drawn[row]) for row in split(known, 60, 0.3, 1)[0].tolist()})
    assert len(kept_back[0]) == 6
    assert kept_back[0] == kept_back[1] == kept_back[2]


@pytest.mark.parametrize("seed", range(5))
def test_a_prompt_with_more_rollouts_than_are_wanted_stays_in_the_fit(model, seed):
    prompts = [[3]] * 28 + [[4 + row] for row in range(12)]
    known = encode(model, [rollout(prompt, [7, 2]) for prompt in prompts], 0)
    kept_back, fitting = split(known, 40, 0.1, seed)
    assert len(kept_back) == 4
    assert kept_back.min() >= 28
    assert len(fitting) == 36


@pytest.mark.parametrize("prompts", [1, 2])
def test_where_every_prompt_has_too_many_rollouts_they_are_split_one_by_one(model, prompts):
    known = encode(model, [rollout([3 + row % prompts], [7, 8 + row % 3, 2]) for row in range(10)], 0)
    kept_back, fitting = split(known, 10, 0.3, 0)
    assert len(kept_back) == 3
    assert {*kept_back.tolist(), *fitting.tolist()} == {*range(10)}


@pytest.mark.parametrize("seed", range(8))
def test_of_uneven_prompts_the_small_one_is_kept_back(model, seed):
    known = encode(model, [rollout([3 if row < 9 else 4], [7, 8 + row % 3, 2]) for row in range(10)], 0)
    kept_back, fitting = split(known, 10, 0.1, seed)
    assert kept_back.tolist() == [9]
    assert len(fitting) == 9


@pytest.mark.parametrize("value", [-3.0, 2.0])
def test_it_starts_from_the_rate_of_the_labels(model, auxiliary, value):
    auxiliary.value.bias.data.fill_(value)
    samples = encode(model, ROLLOUTS, 0, bootstrap=True)
    fit(auxiliary, samples, **STANDING_STILL)
    known = samples[samples.labelled.nonzero()[:, 0]]
    with torch.no_grad():
        predicted = auxiliary(known.states(auxiliary), known.completion).sigmoid()[known.mask]
    labels = known.compliance[:, None].expand_as(known.mask)[known.mask]
    assert predicted.mean().item() == pytest.approx(labels.mean().item(), abs=1e-5)
    before = auxiliary.value.bias.clone()
    fit(auxiliary, samples, **STANDING_STILL)
    assert auxiliary.value.bias.item() == pytest.approx(before.item(), abs=1e-5), "it is there already"
