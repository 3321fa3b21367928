"""Batches: where completions begin in their rows."""

import numpy as np

from bridle.training.batches import beginnings


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
