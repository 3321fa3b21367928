"""Batches: where completions begin in their rows."""

import numpy as np
import pytest
import torch

from bridle.data import Rollout
from bridle.training import batches
from bridle.training.batches import PREFIXES, Prefixes, apart, append_rollouts, beginnings, without_unread


def rollout(prompt, completion):
    known = {"prompt": "", "completion": "", "round": 1, "regulariser": "", "model_hash": "", "constraint": ""}
    return Rollout(prompt_ids=prompt, completion_ids=completion, **known)


def test_completions_begin_after_a_prompt_and_in_text_wherever_a_rollout_may():
    text = [True] * 5 + [False]
    after_a_prompt = [False, True, True, True, True, False]
    chat = [False, True, True, False, True, True]  # two turns
    mask, is_text = np.array([text, after_a_prompt, chat, text]), np.array([True, False, False, False])
    assert beginnings(mask, is_text, longest=3).tolist() == [
        [True, True, True, False, False, False, False],
        [False, True, False, False, False, False, False],
        [False, True, False, False, True, False, False],
        [True, False, False, False, False, False, False],  # after a prompt of one token
    ]


def test_position_t_predicts_token_t_plus_1():
    labels = torch.tensor([[5, 6, 7], [5, -100, 7]])
    found = Prefixes.of_corpus([0, 0], labels, torch.ones_like(labels))
    assert found.mask.tolist() == [[True, True], [False, True]]


def test_a_prompt_of_one_token_is_not_taken_for_text():
    """In rows of the corpus that are text, that begin with such a prompt or within a completion; and in a rollout."""
    ids = torch.arange(12).view(3, 4)
    labels, attention_mask = ids.clone(), torch.ones_like(ids)
    labels[1, 0] = labels[2, 1] = -100
    inputs = {"input_ids": ids, "attention_mask": attention_mask, "labels": labels}
    inputs[PREFIXES] = Prefixes.of_corpus([0, 0, 0], labels, attention_mask)
    found = append_rollouts(inputs, [rollout([1], [5, 6, 7])], 0, pad=0)[PREFIXES]
    assert found.is_text.tolist() == [True, False, False, False]
    assert found.mask[:, 0].tolist() == [True, True, False, True]
    assert found[1:].is_text.tolist() == [False] * 3


@pytest.mark.parametrize(("joined", "left"), [(True, [0, 1]), (False, [1, 2])])
def test_prompts_alone_do_not_enter_the_forward(joined, left):
    """Where nothing else is left and no rollout will be added, a forward still needs a row."""
    ids, labels = torch.arange(12).view(2, 6), torch.full((2, 6), -100)
    mask = torch.ones_like(ids)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    inputs[PREFIXES] = Prefixes.of_corpus([0, 0], labels, mask, held=[0])
    found = without_unread(inputs, [], joined)
    assert list(found["input_ids"].shape) == left
    assert not found[PREFIXES].trained_on.any()
    assert found[PREFIXES].mask.shape == (left[0], max(0, left[1] - 1))


class TestApart:
    """Two rows of a corpus, of four tokens and of three, with rollouts of two regularisers."""

    def joined(self, first, second, rows=2):
        ids = torch.arange(1, 9).view(2, 4)[:rows]
        attention_mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])[:rows]
        labels = ids.where(attention_mask.bool(), -100)
        inputs = {"input_ids": ids, "attention_mask": attention_mask, "labels": labels}
        inputs[PREFIXES] = Prefixes.of_corpus([0, 1][:rows], labels, attention_mask)
        for index, completion in enumerate((first, second)):
            inputs = append_rollouts(inputs, [rollout([1], completion)], index, pad=0)
        return inputs

    @pytest.mark.parametrize("multiple", [1, 3])
    @pytest.mark.parametrize(("first", "second"), [([5], [6, 7]), ([5] * 9, [6])])
    def test_they_are_the_same_rows_each_as_long_as_the_longest_of_its_kind(self, monkeypatch, first, second, multiple):
        monkeypatch.setattr(batches, "worth_a_forward", lambda device: -100)
        inputs = self.joined(first, second)
        longest = 1 + max(len(first), len(second))
        widths = [-(-time // multiple) * multiple for time in (4, longest)]
        inputs = {key: part if key == PREFIXES else pad(part, max(widths)) for key, part in inputs.items()}
        corpus, rollouts = apart(inputs, multiple)
        for part, rows, width in zip((corpus, rollouts), (slice(2), slice(2, 4)), widths, strict=True):
            for key in ("input_ids", "attention_mask", "labels"):
                assert part[key].equal(inputs[key][rows, :width])
            assert part[PREFIXES].regulariser.tolist() == inputs[PREFIXES].regulariser[rows].tolist()
            assert part[PREFIXES].mask.sum() == inputs[PREFIXES].mask[rows].sum()
            assert part[PREFIXES].mask.shape[1] <= part["input_ids"].shape[1] - 1
        assert inputs["attention_mask"].sum() == sum(part["attention_mask"].sum() for part in (corpus, rollouts))

    @pytest.mark.parametrize(("least", "count"), [(14, 2), (15, 1)])
    def test_it_must_spare_enough_padding(self, monkeypatch, least, count):
        monkeypatch.setattr(batches, "worth_a_forward", lambda device: least)
        inputs = self.joined([5] * 10, [6])  # 4 rows of 11 tokens, or 2 of 4 and 2 of 11
        assert len(apart(inputs)) == count

    def test_rows_of_one_kind_stay_as_they_are(self, monkeypatch):
        monkeypatch.setattr(batches, "worth_a_forward", lambda device: -100)
        inputs = self.joined([5], [6, 7])
        rollouts = apart(inputs)[1]
        (alone,) = apart(rollouts)
        assert alone is rollouts


def pad(part, time):
    return torch.nn.functional.pad(part, (0, time - part.shape[1]))
