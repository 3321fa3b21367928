"""The method on worlds that can be enumerated: fitted R, q, guided decoding and the update, against the truth."""

from itertools import pairwise

import pytest
import torch
from test_models import p_value

from bridle.constraints import PythonFunction
from bridle.core.loss import Divergence, constrained_loss
from bridle.core.tokens import pad_right
from bridle.data import Rollout
from bridle.models.auxiliary import new_auxiliary
from bridle.models.guidance import NADOGuide
from bridle.models.hidden import capture_hidden_states, output_layer
from bridle.models.sampling import sample
from bridle.training.config import AuxiliaryOptions, ConstrainedConfig, Regulariser
from bridle.training.examples import encode
from bridle.training.fitting import fit_auxiliary
from bridle.training.regulariser import DomainRegulariser
from worlds import World

SAMPLES = 8_000
VOCABULARY = 5

CONSTRAINTS = {
    "an even number of zeros": lambda y: float(y.count(0) % 2 == 0),
    "never a 3 after a 0": lambda y: float((0, 3) not in pairwise(y)),
    "a degree": lambda y: 0.2 + 0.6 / len(y),
}


def ideal_rollouts(world: World, count: int) -> list[Rollout]:
    """Outputs in exact proportion to their probability: a sample without its noise."""
    return [
        Rollout(
            prompt_ids=world.prompt,
            completion_ids=list(output),
            prompt="",
            completion="",
            round=1,
            regulariser="all",
            model_hash="",
            constraint="",
            finished=output[-1] == world.end,
            value=world.constraint(output),
            complies=world.constraint(output) >= 0.5,
        )
        for output in world.outputs()
        for _ in range(round(count * world.output_probability(output)))
    ]


def q_of(world: World, output) -> float:
    """q(output), as the product of q over its tokens."""
    probability = 1.0
    for position, token in enumerate(output):
        if probability > 0:
            probability *= float(world.true_q(output[:position])[token])
    return probability


def test_most_outputs_are_cut_at_the_horizon(world):
    cut = sum(world.output_probability(output) for output in world.outputs() if output[-1] != world.end)
    assert cut > 0.5


@torch.no_grad()
def fitted_r_logits(world, auxiliary, prefix):
    """[vocabulary] logits of R for every continuation of a prefix."""
    ids = torch.tensor([world.prompt + list(prefix)])
    with capture_hidden_states(world.model) as hidden:
        world.model(input_ids=ids)
    return auxiliary(auxiliary.features(hidden.last, ids))[0, -1]


def world_of(tiny_model, constraint) -> World:
    """Five tokens, outputs of up to three, from a random GPT-2: its positions are absolute, where rotary ones
    cannot tell the prefix 1 from the prefix 1 1. More than half of its outputs are cut at the horizon."""
    model = tiny_model("gpt2", vocab_size=VOCABULARY, initializer_range=0.1)
    return World(model=model, prompt=[1], length=3, end=2, constraint=constraint)


@pytest.fixture(scope="module", params=list(CONSTRAINTS))
def world(request, tiny_model):
    return world_of(tiny_model, CONSTRAINTS[request.param])


@pytest.fixture(scope="module")
def fitted(world):
    """R, fitted on labelled samples of the world."""
    torch.manual_seed(0)
    auxiliary = new_auxiliary(world.model, depth=2, expansion=4)
    soft = any(0 < world.constraint(y) < 1 for y in world.outputs())
    with torch.no_grad():
        examples = encode(world.model, ideal_rollouts(world, SAMPLES), 0, soft_labels=soft)
    options = AuxiliaryOptions(
        epochs=60,
        batch_size=512,
        learning_rate=1.2e-2,
        weight_decay=0.0,
        consistency_weight=0.1,
        validation_share=0.0,
    )
    fit_auxiliary(auxiliary, world.model, examples, options, torch.Generator().manual_seed(0))
    return auxiliary


def test_fitted_r_and_q_are_the_true_ones_at_every_prefix(world, fitted):
    spread = [world.true_r((token,)) for token in range(VOCABULARY)]
    assert max(spread) - min(spread) > 0.1, "the constraint must say something"
    for prefix in world.prefixes():
        r_logits = fitted_r_logits(world, fitted, prefix).double()
        true_r = torch.tensor([world.true_r((*prefix, v)) for v in range(VOCABULARY)], dtype=torch.float64)
        torch.testing.assert_close(r_logits.sigmoid(), true_r, atol=0.02, rtol=0)
        if world.true_r(prefix) == 0:
            continue  # q never gets there
        q = world.next_token(prefix) * r_logits.sigmoid()
        q = q / q.sum()
        true_q = world.true_q(prefix)
        kl = torch.where(true_q > 0, true_q * (true_q.clamp(min=1e-30) / q).log(), 0.0).sum()
        assert kl < 1e-3


def test_guided_decoding_samples_from_q(world, fitted):
    """With the fitted R, through `generate`, against the true product of q over tokens."""
    outputs = list(world.outputs())
    expected = torch.tensor([q_of(world, output) for output in outputs], dtype=torch.float64)
    joint = torch.tensor([world.output_probability(y) * world.constraint(y) for y in outputs], dtype=torch.float64)
    torch.testing.assert_close(expected, joint / joint.sum())  # eq. 1 and eq. 2 are the same distribution

    with NADOGuide(world.model, fitted) as guide:
        drawn = sample(
            world.model,
            [world.prompt] * 4000,
            max_new_tokens=world.length,
            pad_token_id=0,
            end_token_ids=[2],
            batch_size=1000,
            guide=guide,
        )
    kept = [y for y in drawn if world.constraint(tuple(y)) > 0]
    assert len(kept) > 0.99 * len(drawn)
    assert p_value(kept, outputs, expected) > 1e-3
    plain = torch.tensor([world.output_probability(y) for y in outputs], dtype=torch.float64)
    assert p_value(kept, outputs, plain) < 1e-6, "the test must be able to tell q from p"


@pytest.mark.parametrize("anchor", ["initial", "previous"])
def test_the_update_without_ce_reaches_q(tiny_model, tmp_path, anchor):
    """Every weight of a transformer is trained on KL(q ‖ p) alone, with R from the truth."""
    world = world_of(tiny_model, lambda y: 0.95 if y.count(0) % 2 == 0 else 0.1)
    model = world.model
    targets = {prefix: world.true_q(prefix) for prefix in world.prefixes()}  # kept before training
    regulariser = DomainRegulariser(
        0,
        "all",
        Regulariser(PythonFunction("unused:unused"), weight=1.0, anchor=anchor),
        model,
        None,
        {},
        ConstrainedConfig(output_dir=str(tmp_path), report_to="none"),
    )
    prefixes = list(targets)
    input_ids, attention_mask = pad_right([world.prompt + list(prefix) + [0] for prefix in prefixes], 0)
    mask = torch.zeros(len(prefixes), input_ids.shape[1] - 1, dtype=torch.bool)
    true_r = torch.zeros(*input_ids.shape, VOCABULARY)
    for row, prefix in enumerate(prefixes):
        mask[row, len(prefix)] = True
        true_r[row, len(prefix)] = torch.tensor([world.true_r((*prefix, v)) for v in range(VOCABULARY)])
    r_logits = true_r.clamp(1e-30, 1 - 1e-7).logit()
    regulariser.auxiliary.forward = lambda states: r_logits[:, :-1][mask]  # all prefixes fit into one chunk

    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, 300)
    for _ in range(300):
        with capture_hidden_states(model) as hidden:
            model(input_ids=input_ids, attention_mask=attention_mask)
        states = hidden.last[:, :-1][mask]
        on = torch.arange(len(states))
        target = regulariser.target(hidden.last.detach(), input_ids, attention_mask, mask.numpy())
        nothing = torch.zeros_like(on)
        kl, _ = constrained_loss(
            states, output_layer(model), nothing, nothing.bool(), [Divergence("all", on, torch.ones(len(on)), target)]
        )
        optimizer.zero_grad()
        (kl / len(states)).backward()
        optimizer.step()
        schedule.step()
    world._probabilities.clear()
    for prefix, q in targets.items():
        p = world.next_token(prefix)
        assert torch.where(q > 0, q * (q.clamp(min=1e-30) / p).log(), 0.0).sum() < 1e-3
