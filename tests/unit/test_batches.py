"""Batches: where completions begin in their rows."""

import numpy as np
import pytest
import torch

from bridle.training.batches import PREFIXES, Prefixes, beginnings, without_unread


def test_completions_begin_after_a_prompt_and_in_text_wherever_a_rollout_may():
    text = [True] * 5 + [False]
    after_a_prompt = [False, True, True, True, True, False]
    chat = [False, True, True, False, True, True]  # two turns
    begins = beginnings(np.array([text, after_a_prompt, chat]), longest=3)
    assert begins.tolist() == [
        [True, True, True, False, False, False, False],
        [False, True, False, False, False, False, False],
        [False, True, False, False, True, False, False],
    ]


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
