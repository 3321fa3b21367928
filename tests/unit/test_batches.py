"""Batches: where completions begin in their rows."""

import numpy as np
import pytest
import torch

from bridle.data import Rollout
from bridle.training.batches import PREFIXES, Prefixes, append_rollouts, beginnings, without_unread


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


def test_a_prompt_of_one_token_is_not_taken_for_text():
    """In rows of the corpus that are text, that begin with such a prompt or within a completion; and in a rollout."""
    ids = torch.arange(12).view(3, 4)
    labels, attention_mask = ids.clone(), torch.ones_like(ids)
    labels[1, 0] = labels[2, 1] = -100
    inputs = {"input_ids": ids, "attention_mask": attention_mask, "labels": labels}
    inputs[PREFIXES] = Prefixes.of_corpus([0, 0, 0], labels, attention_mask)
    one = Rollout(
        prompt_ids=[1],
        completion_ids=[5, 6, 7],
        prompt="",
        completion="",
        round=1,
        regulariser="",
        model_hash="",
        constraint="",
    )
    found = append_rollouts(inputs, [one], 0, pad=0)[PREFIXES]
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
