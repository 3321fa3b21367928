"""A regulariser by itself: when it pulls, where its R holds, whose turn a rollout is, and what a round keeps."""

import json
import math
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bridle.core.decomposition import log_target
from bridle.core.tokens import pad_right
from bridle.data import DataSource, Prompt, Rollout, decode_parts
from bridle.data.target_cache import row_keys
from bridle.errors import RunStopped, UserError
from bridle.models.forward import policy_forward
from bridle.models.sampling import Trace
from bridle.training import prompts as of_round
from bridle.training import regulariser as module
from bridle.training.batches import PREFIXES, Prefixes, append_rollouts
from bridle.training.config import AuxiliaryOptions, ConstrainedConfig, Regulariser
from bridle.training.corpus_outputs import corpus_outputs
from bridle.training.measures import measure_rollouts, measure_weights
from bridle.training.regulariser import DomainRegulariser
from bridle.training.retention import Retention
from bridle.training.rollouts import output_of, tokens_to_seek
from bridle.training.state import RegulariserState
from trainers import NO_E, Labels, Letters, trainer_of

PADS = SimpleNamespace(pad_token_id=0)


@pytest.fixture
def of(tiny_model, tmp_path):
    """A factory of regularisers without a corpus: of(weight=1.0, rounds=3)."""

    def make(constraint=NO_E, config=None, **options):
        args = ConstrainedConfig(output_dir=str(tmp_path), report_to="none", **(config or {}))
        kind = DomainRegulariser if constraint is not None else Retention
        return kind(0, "rude", Regulariser(constraint, **options), tiny_model(), PADS, {}, args)

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


def corpus_rows(mask, is_text):
    rows = np.ones(len(mask), dtype=int)
    return Prefixes(0 * rows, -rows, mask, mask.sum(-1) + 1, rows > 0, np.array(is_text))


def test_making_r_leaves_every_generator_as_it_was(of, monkeypatch):
    held, seeded, before = of(), [], torch.random.get_rng_state()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)  # what `torch.manual_seed` does besides
    held.__post_init__()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert seeded == []


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

    text = corpus_rows(np.array([[True] * 8, [True] * 5 + [False] * 3]), [True, True])
    with_prompts = corpus_rows(
        np.array([[False, False, True, True, True, True], [False, True, *[False] * 4], [True] * 6]), [False] * 3
    )

    @pytest.fixture
    def held(self, of):
        held = of(config={"max_new_tokens": 2})
        held.rollouts = [rollout([1, 5, 9], [3, 4]), rollout([1, 5], [7])]
        return held

    def test_in_text_it_is_as_deep_as_the_rollouts(self, held):
        expected = [[False, True, True, True, False, False, False, False]] * 2  # the tokens 3, 4 and 5 are sampled
        assert (held.reaches(self.text) & self.text.mask).tolist() == expected

    def test_a_chat_s_prompt_says_nothing_of_rows_of_text(self, held):
        expected = held.reaches(self.text), held.begins(self.text)
        chat = rollout([1, 5, 9, 9, 9, 9], [3, 4], messages=[{"role": "user", "content": "Is it a hat?"}])
        held.rollouts.append(chat)
        assert (held.reaches(self.text) == expected[0]).all()
        assert torch.equal(held.begins(self.text), expected[1])
        held.rollouts = [chat]
        assert held.prompt_lengths == (6, 6), "of chats alone"

    def test_behind_a_prompt_it_is_as_long_as_a_rollout(self, held):
        reached = held.reaches(self.with_prompts) & self.with_prompts.mask
        assert reached.tolist() == [
            [False, False, True, True, False, False],
            [False, True, *[False] * 4],
            [True, True, *[False] * 4],  # behind one of one token
        ]

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
    def test_a_file_s_own_come_in_one_random_order_over_the_rounds(self, trained_on, tmp_path):
        path, drawn = tmp_path / "prompts.jsonl", []
        path.write_text("".join(json.dumps({"prompt": f"%{row}"}) + "\n" for row in range(12)))  # sorted
        for seed in (0, 0, 1):
            held = trained_on(options={"prompts": DataSource(str(path))}, rollouts_per_round=6, seed=seed)
            rounds = [[prompt.row for prompt in held.prompts(index)] for index in (1, 2, 3, 4)]
            assert rounds[:2] == rounds[2:], "after the whole file, again"
            assert sorted(rounds[0] + rounds[1]) == [*range(1, 13)]
            assert 0 < sum(row <= 6 for row in rounds[0]) < 6, "each round has some of each half"
            assert held.prompts(2) == held.prompts(2), "as a resumed run draws it"
            drawn.append(rounds)
        assert drawn[0] == drawn[1] != drawn[2]
        path.write_text(json.dumps({"prompt": "%7 " * 20}) + "\n")
        assert 64 - 8 < len(held.tokenizer("%7 " * 20)["input_ids"]) < 64
        with pytest.raises(UserError, match="row 1"):
            held.prompts(1)

    def test_domains_give_one_each_in_turn(self, trained_on, monkeypatch):
        held, asked = trained_on(options={"domain": "all"}, rollouts_per_round=5, prompt_tokens=(3, 3)), []
        begin = of_round.prompts_from_domain
        monkeypatch.setattr(of_round, "prompts_from_domain", lambda *a, **k: asked.append(a[1]) or begin(*a, **k))
        prompts = held.prompts(1)
        assert asked == [3, 3], "no more than are needed"
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
        held.replayed, held.rollouts, held.rollout_cursor = [first, second], [third, unscored], 5
        held.update(4)
        assert held.rollout_cursor == 0
        assert [(one.round, one.complies) for one in held.replayed] == [(2, True), (3, False)]
        assert {one.round for one in held.rollouts} == {4}

    def test_a_rollout_is_what_was_asked_and_drawn(self, trained_on):
        held = trained_on(max_new_tokens=4)
        end = held.tokenizer.eos_token_id
        likely = 3.0 * torch.nn.functional.one_hot(torch.tensor(end), len(held.tokenizer))
        held.model.get_output_embeddings().register_forward_hook(lambda _, __, logits: logits + likely)
        measured = held.update(1)
        assert all(0 <= measured[f"seconds_{phase}"] < 600 for phase in ("sampling", "scoring", "fitting"))
        assert {one.finished for one in held.rollouts} == {True, False}
        for one in held.rollouts:
            assert one.finished == (one.completion_ids[-1] == end)
            parts = decode_parts(one.prompt_ids, one.completion_ids, held.tokenizer)
            assert (one.prompt, one.completion) == parts
            assert output_of(Prompt("", one.prompt_ids), one.completion_ids, held.tokenizer) == parts
        chat = [{"role": "user", "content": "Is it a hat?"}]
        assert output_of(Prompt("", [1, 5], messages=chat), [7], held.tokenizer)[0] == chat

    def test_a_share_seeks_violations_once_r_is_fitted_and_changes_no_rate(self, trained_on):
        held = trained_on(
            auxiliary=AuxiliaryOptions(epochs=1, seek=0.5), rollouts_per_round=12, max_new_tokens=6, max_missing=1.0
        )
        first = held.update(1)
        assert all(one.sought == 0 for one in held.rollouts)
        assert "rollouts_sought" not in first
        held.is_fitted = True
        second = held.update(2)
        sought = [one for one in held.rollouts if one.sought]
        plain = [one for one in held.rollouts if not one.sought]
        assert all(one.sought <= len(one.completion_ids) for one in sought)
        assert len({one.sought for one in sought}) > 1
        assert (second["rollouts"], second["rollouts_sought"]) == (6, 6)
        assert second["tokens_sampled"] == sum(len(one.completion_ids) for one in held.rollouts)
        assert second["compliance"] == sum(one.complies for one in plain) / 6
        assert second["compliance_sought"] == sum(one.complies for one in sought) / 6

    @pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
    def test_each_of_two_domains_in_turn_has_rollouts_of_both_kinds(self, share):
        seeks = [tokens > 0 for tokens in tokens_to_seek(400, share, 8, seed=3)]
        assert sum(seeks) == 400 * share
        for domain in (seeks[::2], seeks[1::2]):
            assert sum(domain) == pytest.approx(200 * share, rel=0.3)

    def test_a_new_r_is_fitted_on_the_corpus_first_and_once(self, trained_on, monkeypatch):
        fits = []
        held = trained_on(auxiliary=AuxiliaryOptions(epochs=1, corpus_outputs=10), max_new_tokens=4)
        real = module.fit_auxiliary
        monkeypatch.setattr(module, "fit_auxiliary", lambda *a, **k: fits.append((a[1], a[4])) or real(*a, **k))
        measured = held.update(1)
        examples, description = fits[0]
        assert description == "fitting R on the corpus"
        assert len(examples) == 10
        rows = [row for domain in held.corpus.values() for row in domain["input_ids"]]
        for ids, mask in zip(examples.input_ids.tolist(), examples.attention_mask.tolist(), strict=True):
            output = ids[: sum(mask)]
            assert any(row[: len(output)] == output for row in rows)
        assert 0 <= measured["r_brier_corpus"] <= 1
        assert (measured["corpus_outputs"], measured["corpus_outputs_missing"]) == (10, 0)
        assert measured["fit_corpus"] == "fitted"
        assert "r_brier_before" in measured, "the R of the corpus is measured on the policy's own texts"
        del fits[:]
        held.update(2)
        assert "fitting R on the corpus" not in [description for _, description in fits]

    def test_outputs_of_the_corpus_that_are_cut_or_unscored_teach_nothing_where_rollouts_would_not(
        self, trained_on, monkeypatch
    ):
        held = trained_on(auxiliary=AuxiliaryOptions(epochs=1, corpus_outputs=10), max_new_tokens=4, truncated="mask")
        nothing = {"corpus_outputs": 10, "corpus_outputs_missing": 0, "fit_corpus": "none"}
        assert held._fit_on_corpus(corpus_outputs(held)) == nothing, "all are cut"
        held.config.truncated = "label"
        monkeypatch.setattr(held.constraint, "_score", lambda texts: [None] * len(texts))
        held.config.max_missing = 1.0
        assert held._fit_on_corpus(corpus_outputs(held)) == nothing | {"corpus_outputs_missing": 10}
        assert not held.is_fitted
        held.config.max_missing = 0.9
        with pytest.raises(RunStopped, match=r"^rude: 10 of 10 outputs of the corpus got no score"):
            held._fit_on_corpus(corpus_outputs(held))

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
        held.auxiliary.config.provenance = {"round": 0}  # on the corpus alone
        assert held.update(2)["rollouts"]
        held.auxiliary.config.provenance = {"round": 2}
        assert held.update(3) == {}

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


class TestFit:
    """What R is fitted on, by what labels there are."""

    @staticmethod
    def fit(held, fresh, replayed=(), **options):
        def scored(labels):
            known = {"log_probs": [-1.0, -1.0], **options}
            return [rollout([1, 5], [3, 4], complies=label, value=label, **known) for label in labels]

        held.rollouts, held.replayed = scored(fresh), scored(replayed)
        return held._fit(2, {row: Trace([], [-1.0, -1.0], None) for row in range(len(fresh))})

    @pytest.mark.parametrize(
        ("fresh", "replayed", "fitted", "fit"),
        [
            ([True, False], [], False, "fitted"),
            ([True, False], [True], True, "fitted"),
            ([True, True], [], False, "none"),
            ([True, True], [], True, "kept"),
            ([True, True], [True], False, "none"),
            ([True, True], [True], True, "kept"),
            ([True, True], [False], False, "replay"),
            ([True, True], [False], True, "replay"),
            ([True, None, False, None], [], False, "fitted"),  # half of them, and no more, may be missing
        ],
    )
    def test_labels_that_differ_are_fitted(self, of, fresh, replayed, fitted, fit):
        held = of(config={"max_missing": 0.5})
        held.is_fitted, before = fitted, deepcopy(held.auxiliary.state_dict())
        measured = self.fit(held, fresh, replayed, finished=True)
        assert measured["fit"] == fit
        assert ("r_brier_before" in measured) == fitted
        assert measured.get("replayed") == (len(replayed) or None if fit != "none" else None)
        changed = [name for name, now in held.auxiliary.state_dict().items() if not torch.equal(now, before[name])]
        assert fit not in ("kept", "none") or changed == ["value.bias"] * (fit == "kept")
        assert bool(changed) == (fit != "none")
        assert held.is_fitted == (fit != "none")

    @pytest.mark.parametrize("complies", [False, True])
    def test_where_all_are_alike_r_is_shifted_to_their_rate(self, of, complies, tmp_path):
        """As far as a rate of 0.001 or 0.999, which another process and a resumed run have, too."""
        held, other = of(config={"auxiliary": AuxiliaryOptions(seek=0.5)}), of()
        held.is_fitted = True
        torch.nn.init.normal_(held.auxiliary.head.weight)
        known = {"complies": complies, "value": complies, "log_probs": [-1.0, -1.0]}
        sought = rollout([1, 7], [3, 4], sought=1, **known)
        held.rollouts = [sought, *(rollout([1, 5 + row], [3 + row, 4], **known) for row in range(4))]
        plain = held._encode(held.rollouts[1:])
        measured = held._fit(2, {row: Trace([], [-1.0, -1.0], None) for row in range(5)})
        assert measured["fit"] == "kept"
        assert measured["r_ece_before"] > 0.2
        held.state().save(tmp_path)
        other.load_state(RegulariserState.load(tmp_path))
        for one in (held, other):
            with torch.no_grad():
                predicted = plain.r_taken(one.auxiliary, plain.states(one.auxiliary))[plain.mask].sigmoid()
            assert predicted.mean().item() == pytest.approx(0.999 if complies else 0.001, abs=1e-5)

    def test_what_replay_leaves_of_its_labels(self, of):
        """The policy finds the second token of each 3 times as likely as the one that drew the first rollout did."""
        held = of()
        ids = torch.tensor([[1, 5, 3, 4]])
        now = held.model(input_ids=ids).logits[0, 2].log_softmax(-1)[4].item()
        replayed = [rollout([1, 5], [3, 4], log_probs=[-1.0, now - math.log(w)], complies=True) for w in (3.0, 1.0)]
        examples = held._encode([rollout([1, 5], [3, 4], complies=True), *replayed], fresh=1)
        torch.testing.assert_close(examples.weights[1:], torch.tensor([[3.0, 1.0], [1.0, 1.0]]))
        measured = measure_weights(examples, 1)
        assert measured == {"replayed": 2, "replay_effective": pytest.approx(6**2 / 12 / 4, rel=1e-4)}
        assert measure_weights(examples[:1], 1) == {}

    def test_without_any_score_it_stays_as_it_is(self, of):
        held = of(config={"max_missing": 1.0})
        held.is_fitted = True
        assert self.fit(held, [None, None]) == {"fit": "unlabelled"}
        with pytest.raises(RunStopped, match="2 of 3 rollouts got no score"):
            self.fit(of(config={"max_missing": 0.5}), [None, None, True])

    @pytest.mark.parametrize("anchor", ["live", "previous"])
    def test_an_r_of_the_opposite_tilt_does_not_pull(self, of, anchor):
        held, on = of(share={"at_least": 0.4, "at_most": 0.6}, anchor=anchor), []
        for weight, fresh in ((1.0, [True, False]), (-1.0, [True, True]), (1.0, [False, False]), (-1.0, [False, True])):
            held.tilt, before = weight, held.auxiliary.value.bias.item()
            on.append((self.fit(held, fresh)["fit"], held.active, held.auxiliary.value.bias.item() != before))
        assert on == [("fitted", True, True), ("kept", False, False), ("kept", True, True), ("fitted", True, True)]
        held.tilt, other = 2.0, of(share={"at_least": 0.4, "at_most": 0.6}, anchor=anchor)
        other.load_state(held.state())
        assert other.is_fitted
        assert not other.active

    @pytest.mark.parametrize("soft", [False, True])
    def test_degrees_differ_where_verdicts_do_not(self, of, soft):
        held = of(soft_labels=soft)
        held.rollouts = [rollout([1, 5], [3, 4], complies=True, value=value, finished=True) for value in (0.6, 0.9)]
        measured = held._fit(1, {0: Trace([], [-1.0] * 2, None), 1: Trace([], [-1.0] * 2, None)})
        assert measured["fit"] == ("fitted" if soft else "none")

    @pytest.mark.parametrize("truncated", ["label", "mask", "bootstrap"])
    def test_the_label_of_what_was_cut_counts_where_it_says_so(self, of, truncated):
        found = []
        for of_the_cut in (True, False):
            held = of(config={"truncated": truncated, "auxiliary": AuxiliaryOptions(epochs=1)})
            labels = (True, False, False)  # the two rates then lie at unequal distances from a half
            ends = [rollout([1, 5], [3, 2], complies=label, value=label, finished=True) for label in labels]
            cut = rollout([1, 5], [3, 4], complies=of_the_cut, value=of_the_cut, finished=False)
            held.rollouts = [*ends, cut]
            measured = held._fit(1, {row: Trace([], [-1.0, -1.0], None) for row in range(4)})
            assert measured["fit"] == "fitted"
            found.append(measured["r_bce"])
        assert (found[0] == found[1]) == (truncated != "label")
        held.rollouts, held.is_fitted = [cut, rollout([1], [3], complies=True, value=True)], False
        assert held._fit(1, dict.fromkeys(range(2), Trace([], [-1.0], None)))["fit"] == (
            "fitted" if truncated == "label" else "none"
        )

    @pytest.mark.parametrize(
        ("truncated", "fit"), [("label", "fitted"), ("mask", "unlabelled"), ("bootstrap", "unlabelled")]
    )
    @pytest.mark.parametrize("fitted", [False, True])
    def test_where_all_were_cut_there_may_be_no_label(self, of, truncated, fit, fitted):
        held = of(config={"truncated": truncated})
        held.is_fitted, before = fitted, deepcopy(held.auxiliary.state_dict())
        assert self.fit(held, [True, False], finished=False)["fit"] == fit
        same = all(torch.equal(weight, before[name]) for name, weight in held.auxiliary.state_dict().items())
        assert same == (fit == "unlabelled")

    def test_without_a_label_of_its_own_a_round_fits_no_replayed_ones(self, of):
        held = of(config={"truncated": "mask"})
        replayed = [rollout([1, 5], [3, 4], complies=label, log_probs=[-1.0, -1.0]) for label in (True, False)]
        cut = rollout([1, 5], [3, 4], complies=True, finished=False, log_probs=[-1.0, -1.0])
        held.rollouts, held.replayed = [cut], replayed
        assert held._fit(2, {0: Trace([], [-1.0, -1.0], None)}) == {"fit": "unlabelled"}
        assert not held.is_fitted


class TestTarget:
    """q at the prefixes of a batch of three rows, of which the second has none."""

    @pytest.fixture(autouse=True)
    def _without_gradients(self):
        with torch.no_grad():
            yield

    ids, attention_mask = pad_right([[1, 5, 9, 3, 4], [1, 7], [1, 6, 8, 2]], 0)
    mask = np.array([[False, True, True, True], [False] * 4, [True, True, True, False]])
    begins = torch.zeros_like(ids, dtype=torch.bool)

    def batch(self, held):
        return policy_forward(held.model, self.ids, self.attention_mask), self.ids, self.attention_mask

    def counted(self, states):
        return states[:, :-1][torch.from_numpy(self.mask)]

    @pytest.mark.parametrize("shape", [{"memory": 0}, {"memory": 8}, {"memory": 8, "own_network": True}])
    @pytest.mark.parametrize("anchor", ["live", "previous"])
    def test_it_is_the_anchor_times_r(self, of, anchor, shape):
        held = of(anchor=anchor, guidance_scale=2.0, config={"auxiliary": AuxiliaryOptions(**shape)})
        torch.nn.init.normal_(held.auxiliary.head.weight)
        if held.auxiliary.memory is not None:
            torch.nn.init.normal_(held.auxiliary.memory.read.weight)
        held.rollouts = [rollout([1, 5], [3]), rollout([1], [3])]
        p_a = held.model if anchor == "live" else deepcopy(held.model)
        for weight in held.model.parameters():
            weight.mul_(1.5)
        rows = corpus_rows(self.mask, [False, False, True])
        target = held.target(*self.batch(held), self.mask, held.begins(rows))
        of_policy, of_anchor = (
            self.counted(model(input_ids=self.ids, attention_mask=self.attention_mask).logits)
            for model in (held.model, p_a)
        )
        states = policy_forward(p_a, self.ids, self.attention_mask)
        begins = torch.zeros_like(self.ids, dtype=torch.bool)
        begins[0, 1] = begins[2, 0] = begins[2, 1] = True  # after the prompt; in text up to the longest prompt's end
        features = held.auxiliary.features(states, self.ids, self.attention_mask, begins)
        r_logits = held.auxiliary(self.counted(features))
        torch.testing.assert_close(target(slice(None), of_policy), log_target(of_anchor, r_logits, 2.0))

    @pytest.mark.parametrize("anchor", ["live", "previous"])
    def test_in_a_rollout_r_reads_what_it_was_fitted_on(self, of, anchor):
        """After a prompt of one token, too, which is no plain text."""
        held = of(anchor=anchor, config={"auxiliary": AuxiliaryOptions(memory=8)})
        torch.nn.init.normal_(held.auxiliary.memory.read.weight)
        held.rollouts = [rollout([1], [3, 4, 7], complies=True), rollout([1, 5, 9], [3, 8], complies=True)]
        inputs = {"input_ids": self.ids, "attention_mask": self.attention_mask, "labels": self.ids}
        inputs[PREFIXES] = corpus_rows(self.mask, [False, False, True])
        joined = append_rollouts(inputs, held.rollouts, 0, pad=0)
        prefixes = joined[PREFIXES]
        counted = prefixes.mask & (prefixes.regulariser == 0)[:, None]
        rows = joined["input_ids"], joined["attention_mask"]
        target = held.target(policy_forward(held.model, *rows), *rows, counted, held.begins(prefixes))
        examples = held._encode(held.rollouts)
        torch.testing.assert_close(target.features, examples.states(held.auxiliary)[examples.mask])

    def test_of_retention_it_is_the_initial_model(self, of):
        held = of(None)
        initial = self.counted(held.model(input_ids=self.ids, attention_mask=self.attention_mask).logits)
        for weight in held.model.parameters():
            weight.mul_(1.5)
        target = held.target(*self.batch(held), self.mask, self.begins)
        torch.testing.assert_close(target(slice(None), torch.zeros_like(initial)), initial.log_softmax(-1))
        assert target.features is target.anchor[0], "its states are gathered once"

    def test_one_made_ahead_is_taken_where_every_row_has_one(self, of):
        class Made(set):
            def gather(self, keys, mask):
                return [key in self for key in keys]

        held, counted = of(anchor="previous"), torch.from_numpy(self.mask)
        keys = [row_keys(*(part[[row]] for part in (self.ids, self.attention_mask, counted)))[0] for row in (0, 2)]
        held.targets = Made(keys)
        assert held.target(*self.batch(held), self.mask, self.begins) == [True, True]
        held.targets = Made(keys[:1])
        assert len(held.target(*self.batch(held), self.mask, self.begins).features) == 6

    def test_an_anchor_in_shards_runs_even_where_no_prefix_counts(self, of, monkeypatch):
        held, ran = of(anchor="previous"), []
        batch = self.batch(held)
        monkeypatch.setattr(module, "is_sharded", lambda model: True)
        held.model.register_forward_pre_hook(lambda *given: ran.append(len(given[2]["input_ids"])), with_kwargs=True)
        for mask, prefixes in ((self.mask, 6), (np.zeros_like(self.mask), 0)):
            assert len(held.target(*batch, mask, self.begins).features) == prefixes
        assert ran == [2, 1]


@pytest.mark.parametrize(("constraint", "anchor"), [(NO_E, "live"), (NO_E, "previous"), (None, "initial")])
def test_a_state_has_everything(of, constraint, anchor):
    held, other = of(constraint, anchor=anchor), of(constraint, anchor=anchor)
    held.is_fitted, held.has_begun, held.rollout_cursor = True, True, 7
    held.rollouts, held.replayed = [rollout([1], [2])], [rollout([1], [3])]
    if held.auxiliary is not None:
        torch.nn.init.normal_(held.auxiliary.head.weight)
        held.auxiliary.config.provenance = {"round": 3}
    if held.anchor is not None:
        for weight in held.model.parameters():
            weight.data.add_(1.0)
        held.anchor.refresh()
    state = held.state({"compliance": 0.5})
    other.load_state(state)
    again = other.state()
    assert (state.measured, again.measured) == ({"compliance": 0.5}, {})
    for name in ("is_fitted", "has_begun", "rollout_cursor", "rollouts", "replayed", "provenance"):
        assert getattr(again, name) == getattr(held.state(), name), name
    assert again.provenance == ({"round": 3} if constraint else None)
    for mine, its in ((state.auxiliary, again.auxiliary), (state.anchor, again.anchor)):
        assert mine.keys() == its.keys()
        assert all(torch.equal(mine[name], its[name]) for name in mine)
    assert bool(state.anchor) == (held.anchor is not None)
    assert bool(state.auxiliary) == (constraint is not None)
    held.to("cpu")


def test_it_takes_the_policy_s_trainable_weights(of):
    held = of()
    name, weight = next(iter(held.model.named_parameters()))
    others = [other.clone() for _, other in list(held.model.named_parameters())[1:]]
    moved = weight.detach() + 1
    held.set_policy({name: moved, "another": weight})
    assert torch.equal(weight, moved)
    assert all(map(torch.equal, others, list(held.model.parameters())[1:]))


def test_what_a_round_measures_by_hand():
    one = {"log_probs": [-1.0, -2.0], "finished": True, "completion": "a"}
    other = {"log_probs": [-6.0], "finished": False, "completion": " "}
    rollouts = [
        rollout([1], [5, 2], complies=True, value=1.0, **one),
        rollout([1], [5, 2], complies=False, value=0.0, **one),
        rollout([1], [5, 2], complies=True, value=1.0, **one),
        rollout([1], [7], **other),
    ]
    measured = measure_rollouts(rollouts)
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
    nobody = measure_rollouts(rollouts[3:])
    assert nobody["compliance"] is nobody["compliance_low"] is nobody["compliance_high"] is None
