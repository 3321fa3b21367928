"""Importance sampling for certificates, in a world small enough to enumerate: weights and rates are the true ones."""

from contextlib import ExitStack

import numpy as np
import pytest
import torch

from bridle.certification.importance import Seeker
from bridle.data import Prompt
from bridle.evaluation.evaluator import Evaluator
from bridle.evaluation.prompt_sets import GenerationOptions
from bridle.models.auxiliary import new_auxiliary
from bridle.models.guidance import NADOGuide
from worlds import World

END, LENGTH, PROMPT = 2, 3, [1, 3]


class Letters:
    """A tokenizer of single letters."""

    pad_token_id, eos_token_id = 0, END
    added_tokens_decoder: dict = {}  # noqa: RUF012

    def decode(self, ids, **_):
        return "".join("-bcdef"[token] for token in ids)

    def apply_chat_template(self, *_, **__):
        raise ValueError("has no chat template")


@pytest.fixture
def model(tiny_model):
    return tiny_model(vocab_size=6, initializer_range=0.3)


@pytest.fixture
def auxiliary(model):
    found = new_auxiliary(model, memory=4)
    torch.nn.init.normal_(found.head.weight, std=1.0)
    torch.nn.init.normal_(found.memory.read.weight, std=0.5)
    return found.eval()


@pytest.fixture
def world(model):
    return World(model, PROMPT, LENGTH, END, constraint=lambda output: float(output.count(4) < 2))


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_the_weighted_violations_have_the_model_s_own_rate(model, auxiliary, guided, temperature):
    count, share = 6_000, 0.5
    how = GenerationOptions(samples=1, max_new_tokens=LENGTH, temperature=temperature)
    prompts = [Prompt("bd", PROMPT)] * count
    with ExitStack() as stack:
        guide = stack.enter_context(NADOGuide(model, auxiliary, 2.0)) if guided else None
        evaluator = Evaluator(model, Letters(), guide, batch_size=256)
        seeker = Seeker(stack.enter_context(NADOGuide(model, auxiliary, violate=True)), share)
        texts, weights = zip(*seeker.draw(evaluator, prompts, how, seed=1), strict=True)
        plain = [text for (text,) in evaluator.draw(prompts, how)]
    weights, violates = np.array(weights), np.array([text.count("e") >= 2 for text in texts])
    assert 0 < weights.min() < 0.9 < weights.max() <= 1 / (1 - share)
    assert weights.mean() == pytest.approx(1, abs=4 * weights.std() / np.sqrt(count))
    rate = np.mean([text.count("e") >= 2 for text in plain])
    error = np.sqrt(rate * (1 - rate) / count + (weights * violates).var() / count)
    assert (weights * violates).mean() == pytest.approx(rate, abs=4 * error)


def test_the_ratios_are_those_of_two_distributions(model, auxiliary, world):
    outputs = list(world.outputs())
    with NADOGuide(model, auxiliary, violate=True) as guide:
        seeker, evaluator = Seeker(guide, 0.25), Evaluator(model, Letters(), batch_size=64)
        ratios = seeker.log_ratios(evaluator, [(PROMPT, list(output)) for output in outputs])
    p = np.array([world.output_probability(output) for output in outputs])
    q = p * np.exp(ratios)
    assert p.sum() == pytest.approx(1, abs=1e-5)
    assert q.sum() == pytest.approx(1, abs=1e-5)
    assert all(Seeker(guide, share).weight(-60.0) <= 1 / (1 - share) for share in np.linspace(0.01, 0.99, 99))
    weights = np.array([seeker.weight(ratio) for ratio in ratios])
    assert weights == pytest.approx(p / (0.75 * p + 0.25 * q), rel=1e-5)
