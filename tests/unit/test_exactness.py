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


def ideal_rollouts(world: World, count: int, probability=None, sought: int = 0) -> list[Rollout]:
    """Outputs in exact proportion to their probability, that under p if not given: a sample without its noise."""
    probability = probability or world.output_probability
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
            sought=min(sought, len(output)),
        )
        for output in world.outputs()
        for _ in range(round(count * probability(output)))
    ]


def sought_probability(world: World, output, tokens: int) -> float:
    """That the first tokens are drawn from q⁻ ∝ p·(1 − R), with the true R, and the others from p."""
    probability = 1.0
    for position, token in enumerate(output):
        p = world.next_token(output[:position])
        if position < tokens:
            p = p * (1 - torch.tensor([world.true_r((*output[:position], v)) for v in range(VOCABULARY)]))
            p = p / p.sum() if p.sum() else world.next_token(output[:position])
        probability *= float(p[token])
    return probability


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
    return fitted_on(world, ideal_rollouts(world, SAMPLES))


def fitted_on(
    world: World, rollouts: list[Rollout], epochs: int = 200, learning_rate: float = 6e-3, form: str = "sigmoid"
):
    torch.manual_seed(0)
    auxiliary = new_auxiliary(world.model, depth=2, expansion=4, form=form)
    soft = any(0 < world.constraint(y) < 1 for y in world.outputs())
    with torch.no_grad():
        label = (lambda one: one.value) if soft else (lambda one: one.complies)
        examples = encode(world.model, rollouts, 0, label=label)
    options = AuxiliaryOptions(
        epochs=epochs,
        batch_size=512,
        learning_rate=learning_rate,
        weight_decay=0.0,
        consistency_weight=0.1,
        validation_share=0.0,
    )
    fit_auxiliary(auxiliary, examples, options, torch.Generator().manual_seed(0))
    return auxiliary


def test_fitted_r_and_q_are_the_true_ones_at_every_prefix(world, fitted):
    spread = [world.true_r((token,)) for token in range(VOCABULARY)]
    assert max(spread) - min(spread) > 0.1, "the constraint must say something"
    for prefix in world.prefixes():
        r = check_r(world, fitted, prefix)
        if world.true_r(prefix) == 0:
            continue  # q never gets there
        q = world.next_token(prefix) * r
        q = q / q.sum()
        true_q = world.true_q(prefix)
        kl = torch.where(true_q > 0, true_q * (true_q.clamp(min=1e-30) / q).log(), 0.0).sum()
        assert kl < 1e-3


def test_fitted_r_is_the_true_one_where_nine_of_ten_rollouts_seek_violations(world):
    rollouts = ideal_rollouts(world, SAMPLES // 10)
    for tokens in (1, 2):
        rollouts += ideal_rollouts(
            world, SAMPLES * 45 // 100, lambda output, tokens=tokens: sought_probability(world, output, tokens), tokens
        )
    assert sum(one.sought > 0 for one in rollouts) > 0.88 * len(rollouts)
    rates = [sum(one.value for one in some) / len(some) for some in (rollouts, ideal_rollouts(world, SAMPLES))]
    assert rates[0] < rates[1] - 0.02, "violations must be more frequent"
    fitted = fitted_on(world, rollouts)
    for prefix in world.prefixes():
        check_r(world, fitted, prefix)


@pytest.mark.parametrize("constraint", [lambda y: float((0, 1) not in pairwise(y)), CONSTRAINTS["a degree"]])
def test_a_log_linear_r_is_the_true_one_and_consistent(tiny_model, constraint):
    """In a world of three tokens: r is linear in the states, which must tell its prefixes apart."""
    model = tiny_model("gpt2", vocab_size=3, initializer_range=0.3)
    world = World(model=model, prompt=[1], length=3, end=2, constraint=constraint)
    fitted = fitted_on(world, ideal_rollouts(world, SAMPLES), epochs=40, learning_rate=1.2e-2, form="log-linear")
    for prefix in world.prefixes():
        ids = torch.tensor([world.prompt + list(prefix)])
        with torch.no_grad(), capture_hidden_states(model) as hidden:
            logits = model(input_ids=ids).logits
            features = fitted.features(hidden.last, ids)
            r = fitted(features, anchor_logits=logits)[0, -1].double().sigmoid()
            value = fitted.values(features)[0, -1].double().sigmoid()
            log_q = fitted.log_q(features, logits)[0, -1].double()
        true_r = torch.tensor([world.true_r((*prefix, v)) for v in range(3)], dtype=torch.float64)
        torch.testing.assert_close(r, true_r, atol=0.02, rtol=0)
        p = world.next_token(prefix)
        torch.testing.assert_close(p @ r, value, atol=5e-3, rtol=0)  # an R of 1 is read as 0.999
        assert (log_q.exp() - p * r / (p @ r)).abs().max() < 5e-3


def check_r(world, fitted, prefix) -> torch.Tensor:
    """R of every continuation of a prefix, which must be the true one. [vocabulary]"""
    r = fitted_r_logits(world, fitted, prefix).double().sigmoid()
    true_r = torch.tensor([world.true_r((*prefix, v)) for v in range(VOCABULARY)], dtype=torch.float64)
    torch.testing.assert_close(r, true_r, atol=0.02, rtol=0)
    return r


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


def test_first_tokens_seek_a_violation_and_the_rest_is_the_model_s_own(world, fitted):
    outputs, count = list(world.outputs()), 2000
    with NADOGuide(world.model, fitted, violate=True) as guide:
        drawn = sample(
            world.model,
            [world.prompt] * 3 * count,
            max_new_tokens=world.length,
            pad_token_id=0,
            end_token_ids=[2],
            batch_size=1000,
            guide=guide,
            guided_tokens=[0] * count + [1] * count + [2] * count,
        )
    for tokens in (0, 1, 2):
        some = drawn[tokens * count : (tokens + 1) * count]
        expected = [
            torch.tensor([sought_probability(world, y, one) for y in outputs], dtype=torch.float64)
            for one in (tokens, 0)
        ]
        seen = [y for y in some if sought_probability(world, tuple(y), tokens) > 0]
        assert len(seen) > 0.98 * len(some)
        assert p_value(seen, outputs, expected[0]) > 1e-4
        assert tokens == 0 or p_value(seen, outputs, expected[1]) < 1e-6, "the test must be able to tell q⁻ from p"


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
    begins = torch.zeros_like(input_ids, dtype=torch.bool)
    r_logits = true_r.clamp(1e-30, 1 - 1e-7).logit()
    regulariser.auxiliary.forward = lambda states, **_: r_logits[:, :-1][mask]  # all prefixes fit into one chunk

    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, 300)
    for _ in range(300):
        with capture_hidden_states(model) as hidden:
            model(input_ids=input_ids, attention_mask=attention_mask)
        states = hidden.last[:, :-1][mask]
        on = torch.arange(len(states))
        target = regulariser.target(hidden.last.detach(), input_ids, attention_mask, mask.numpy(), begins)
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
