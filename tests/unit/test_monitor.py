"""R along a text while it is written: what the monitor sees, what it stops, and what is left."""

import pytest
import torch

from bridle.errors import UserError
from bridle.models.auxiliary import new_auxiliary
from bridle.models.guidance import NADOGuide
from bridle.models.monitor import NOTHING, Monitor
from bridle.models.sampling import sample

PROMPTS = [[1, 5, 9], [1], [1, 7, 8, 9, 10]] * 12
END = 2
DRAWN = {"max_new_tokens": 12, "pad_token_id": 0, "end_token_ids": [END], "batch_size": 16}
FORMS = [("sigmoid", 0), ("sigmoid", 8), ("log-linear", 0)]


@pytest.fixture(params=FORMS, ids=lambda form: f"{form[0]}-{form[1]}")
def guide(request, tiny_model):
    """A model with an R that says something."""
    form, memory = request.param
    torch.manual_seed(3)
    model = tiny_model(initializer_range=0.2)
    auxiliary = new_auxiliary(model, form=form, memory=memory)
    torch.nn.init.normal_(auxiliary.head.weight, std=0.3)
    if auxiliary.memory is not None:
        torch.nn.init.normal_(auxiliary.memory.read.weight)
    with NADOGuide(model, auxiliary.eval(), 0.0) as entered:
        yield entered


@torch.no_grad()
def r_along(guide, prompt, completion):
    """R after each token of a completion, by a forward over the whole text. [tokens]"""
    ids = torch.tensor([prompt + completion])
    begins = torch.zeros_like(ids, dtype=torch.bool)
    begins[0, len(prompt) - 1] = True
    logits = guide.model(input_ids=ids).logits
    whole = guide.compliance(logits, ids, torch.ones_like(ids), begins)[0]
    return torch.stack([whole[len(prompt) - 1 + step, token] for step, token in enumerate(completion)])


def bound_of(guide, share):
    """A bound on R that about this share of the model's completions falls below."""
    drawn = sample(guide.model, PROMPTS, seed=9, **DRAWN)
    lows = [float(r_along(guide, *both).min()) for both in zip(PROMPTS, drawn, strict=True)]
    return sorted(lows)[int(share * len(lows))]


def test_it_sees_what_a_forward_over_the_text_sees(guide):
    traces = {}
    sample(guide.model, PROMPTS, seed=1, traces=traces, keep_states=True, **DRAWN)
    monitor = Monitor(guide, 0.5)
    for row, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(
            monitor.compliance(traces[row]), r_along(guide, prompt, traces[row].tokens), rtol=1e-4, atol=1e-5
        )


def test_what_is_left_is_what_never_fell_below(guide):
    """And without redrawing, the other completions are those that plain sampling draws."""
    monitor = Monitor(guide, bound_of(guide, 0.4))
    plain = sample(guide.model, PROMPTS, seed=1, **DRAWN)
    kept = monitor.sample(guide.model, PROMPTS, seed=1, **DRAWN)
    falls = [bool((r_along(guide, *both) < monitor.stop_below).any()) for both in zip(PROMPTS, plain, strict=True)]
    assert 0 < sum(falls) < len(falls)
    assert kept == [NOTHING if fell else whole for fell, whole in zip(falls, plain, strict=True)]
    assert (monitor.watched.drawn, monitor.watched.stopped) == (len(PROMPTS), sum(falls))
    assert monitor.watched.withheld == sum(falls)


def test_what_is_stopped_costs_no_more_tokens(guide):
    """A row ends one token after R has fallen below the bound."""
    monitor = Monitor(guide, bound_of(guide, 0.8))
    plain = sample(guide.model, PROMPTS, seed=1, **DRAWN)
    monitor.sample(guide.model, PROMPTS, seed=1, **DRAWN)
    needed = 0
    for prompt, completion in zip(PROMPTS, plain, strict=True):
        low = (r_along(guide, prompt, completion) < monitor.stop_below).nonzero()
        needed += min(int(low[0]) + 2, len(completion)) if len(low) else len(completion)
    assert monitor.watched.tokens == needed < sum(map(len, plain))


def test_it_draws_again(guide):
    bound = bound_of(guide, 0.4)
    once, again = Monitor(guide, bound), Monitor(guide, bound, redraw=4)
    first, found = (one.sample(guide.model, PROMPTS, seed=1, **DRAWN) for one in (once, again))
    assert again.watched.withheld < once.watched.withheld
    assert again.watched.withheld == found.count(NOTHING)
    assert again.watched.drawn > len(PROMPTS)
    for row, completion in enumerate(first):
        assert completion in (NOTHING, found[row])
    for prompt, completion in zip(PROMPTS, found, strict=True):
        assert completion == NOTHING or float(r_along(guide, prompt, completion).min()) >= bound * (1 - 1e-4)


def test_it_watches_a_guided_model(guide):
    bound, guide.guidance_scale = bound_of(guide, 0.8), 1.0
    guided = sample(guide.model, PROMPTS, seed=1, guide=guide, **DRAWN)
    kept = Monitor(guide, bound).sample(guide.model, PROMPTS, seed=1, **DRAWN)
    assert NOTHING in kept
    assert all(completion in (NOTHING, whole) for completion, whole in zip(kept, guided, strict=True))
    assert guided != sample(guide.model, PROMPTS, seed=1, **DRAWN)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"stop_below": 1.0}, "stop_below: must be"), ({"stop_below": 0.5, "redraw": -1}, "redraw: must be")],
)
def test_mistakes(guide, options, message):
    with pytest.raises(UserError, match=message):
        Monitor(guide, **options)


def test_an_r_of_a_share_is_refused(guide):
    guide.auxiliary.config.provenance = {"tilt": -2.0}
    with pytest.raises(UserError, match=r"^stop_below: .* this one was fitted to a share"):
        Monitor(guide, 0.5)


def test_a_network_of_its_own_is_refused(tiny_model):
    model = tiny_model()
    with (
        NADOGuide(model, new_auxiliary(model, own_network=True)) as guide,
        pytest.raises(UserError, match="a network of its own"),
    ):
        Monitor(guide, 0.5)
