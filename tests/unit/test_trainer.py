"""The trainer's own decisions, one at a time: what is refused, where the KL looks, which rollouts ride along."""

import math
import weakref
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import IA3Config, LoraConfig, VeraConfig, get_peft_model

from bridle.constraints import AsyncScoring
from bridle.data import Rollout
from bridle.errors import UserError
from bridle.models.loading import load_model, load_tokenizer
from bridle.training import examples, given, regulariser_set, setup
from bridle.training import regulariser as regulariser_module
from bridle.training.batches import NO_DOMAIN, Prefixes, append_rollouts
from bridle.training.config import AuxiliaryOptions, EvalOptions, ParallelOptions, Regulariser
from bridle.training.evaluating import EvaluatedTrainer
from bridle.training.precomputed import PrecomputedTargets
from bridle.training.regulariser_set import RegulariserSet
from bridle.training.trainer import ConstrainedTrainer
from chats import CHATS, TEMPLATES, chat_folder
from trainers import NO_E, SHARE_OF_E, config, corpus, trainer_of

EVERYWHERE = {"target_modules": ["c_attn"], "fan_in_fan_out": True}


def rollout(prompt, completion):
    known = {"prompt": "", "completion": "", "round": 1, "regulariser": "rude", "model_hash": "", "constraint": ""}
    return Rollout(prompt_ids=prompt, completion_ids=completion, **known)


def refused(said):
    return pytest.raises(UserError, match=said) if said else nullcontext()


@pytest.mark.parametrize(
    ("zero3", "fsdp", "version", "schedule", "gpus", "said"),
    [
        (True, False, None, "sequential", 1, "ZeRO-3"),
        (False, True, 1, "sequential", 1, "set fsdp_version: 2"),
        (False, True, 2, "parallel", 1, "use sequential with FSDP2"),
        (False, True, 2, "sequential", 1, None),
        (False, False, None, "parallel", 0, None),
        (False, False, None, "sequential", 2, "2 GPUs: one process trains on one; start one process each"),
    ],
)
def test_several_gpus(monkeypatch, zero3, fsdp, version, schedule, gpus, said):
    monkeypatch.setattr(setup, "is_deepspeed_zero3_enabled", lambda: zero3)
    with refused(said):
        setup.check_gpus(gpus_of(schedule=schedule, n_gpu=gpus), version if fsdp else None)


def gpus_of(**options):
    known = {"schedule": "sequential", "n_gpu": 1, "targets": "computed", "device": torch.device("cuda")}
    return SimpleNamespace(**known | options)


@pytest.mark.parametrize(
    ("options", "version", "said"),
    [
        ({"targets": "precomputed"}, 2, "use computed with FSDP2"),
        ({"targets": "precomputed"}, None, None),
        ({"device": torch.device("mps")}, None, "set use_cpu: true"),
    ],
)
def test_what_a_gpu_cannot_do(options, version, said):
    with refused(said):
        setup.check_gpus(gpus_of(**options), version)


def test_processes_that_share_a_model_read_their_rollouts_by_as_many_forwards(tiny_model, monkeypatch):
    model, ids, forwards = tiny_model(), torch.ones(3, 5, dtype=torch.long), []
    model.model.register_forward_hook(lambda *_: forwards.append(1))
    monkeypatch.setattr(examples, "ENCODE_BATCH", 1)
    read = partial(examples._hidden_states, model, ids, ids, torch.arange(5).expand(3, 5))
    known = {0: torch.zeros(2, 32), 2: torch.zeros(1, 32)}
    assert read(known, None)[0, 0].count_nonzero() == 0
    assert len(forwards) == 1
    monkeypatch.setattr(examples, "is_sharded", lambda model: True)
    assert read(known, None)[0, 0].count_nonzero() == 32
    assert len(forwards) == 1 + 3


@pytest.mark.parametrize("logits", [1, 3 * 64, 2**23])
def test_weights_of_labels_do_not_depend_on_how_many_logits_there_are_at_once(tiny_model, monkeypatch, logits):
    model, sizes, project = tiny_model(), [], examples.project
    lengths, hidden = torch.tensor([4, 2]), torch.randn(2, 4, 32)
    drawn = [SimpleNamespace(log_probs=[-4.0] * length) for length in lengths.tolist()]
    rows = model, drawn, hidden, torch.randint(3, 60, (2, 4)), torch.arange(4) < lengths[:, None], None
    expected = examples._weights(*rows)
    monkeypatch.setattr(examples, "LOGITS_AT_ONCE", logits)
    monkeypatch.setattr(examples, "project", lambda model, some, dtype: sizes.append(len(some)) or project(model, some))
    torch.testing.assert_close(examples._weights(*rows), expected)
    assert sizes == {1: [1] * 6, 3 * 64: [3, 3], 2**23: [6]}[logits]


def test_regularisers_of_the_initial_model_share_one_snapshot(tiny_folder, tmp_path):
    options = {
        "plain": [Regulariser(), Regulariser(NO_E, name="first", anchor="initial")],
        "rude": [Regulariser(NO_E, anchor="previous"), Regulariser(NO_E, name="live")],
    }
    by_name = [replace(one, domain=domain) for domain, some in options.items() for one in some]
    retention, initial, previous, live = trainer_of(tiny_folder(), tmp_path, by_name).regularisers
    assert initial.anchor is retention.anchor
    assert previous.anchor is not retention.anchor
    assert live.anchor is None


def test_states_are_kept_for_the_fit_of_r_alone_and_until_they_are_encoded(tiny_folder, tmp_path, monkeypatch):
    regularisers = {"rude": Regulariser(NO_E), "plain": Regulariser(kl_on="rollouts")}
    rude, plain = trainer_of(tiny_folder(), tmp_path, regularisers).regularisers
    with AsyncScoring(NO_E) as scoring:
        for regulariser, how, kept in (
            (rude, (scoring,), True),
            (rude, (scoring, None, True), False),
            (plain, (None,), False),
        ):
            traces = regulariser.draw(1, *how)[1]
            assert {trace.states is not None for trace in traces.values()} == {kept}
    states, fit = [], regulariser_module.fit_auxiliary
    draw = rude.draw

    def drawn(*how):
        rollouts, traces = draw(*how)
        states.extend(weakref.ref(trace.states) for trace in traces.values())
        return rollouts, traces

    def fitted(*how, **more):
        assert not any(state() is not None for state in states)
        return fit(*how, **more)

    rude.draw = drawn
    monkeypatch.setattr(regulariser_module, "fit_auxiliary", fitted)
    assert rude.update(1)["fit"] == "fitted"
    assert states


def test_a_loaded_adapter_is_trained_on(tiny_tokenizer, tiny_folder, tmp_path):
    adapter = tmp_path / "adapter"
    get_peft_model(load_model(str(tiny_folder())), LoraConfig(target_modules="all-linear", r=2)).save_pretrained(
        adapter
    )
    tiny_tokenizer.save_pretrained(adapter)
    trainer = trainer_of(adapter, tmp_path / "run", {"rude": Regulariser(NO_E)})
    start = {name: part.clone() for name, part in trainer.model.named_parameters() if "lora_B" in name}
    trainer.train()
    moved = dict(trainer.model.named_parameters())
    assert start
    assert all(not torch.equal(moved[name], part) for name, part in start.items())


def test_rows_to_evaluate_on_are_given_once(tiny_folder, tmp_path):
    with refused("eval_dataset: eval_options hold out rows of the corpus already"):
        ConstrainedTrainer(
            model=load_model(str(tiny_folder())),
            args=config(tmp_path),
            corpus=corpus(),
            regularisers={"rude": Regulariser(NO_E)},
            eval_options=EvalOptions(share=0.2),
            eval_dataset=corpus()["plain"],
        )


@pytest.mark.parametrize(("items", "scale"), [(torch.tensor(8), 3), (None, 1)])
def test_the_loss_undoes_an_average_over_processes_with_a_batch_of_their_own(items, scale):
    trainer = SimpleNamespace(accelerator=SimpleNamespace(num_processes=6), get_tp_size=lambda: 2)
    assert ConstrainedTrainer._loss_scale(trainer, items) == scale


@pytest.mark.parametrize(
    ("options", "column", "assistant_only", "warned"),
    [
        ({"kl_on": "both"}, "messages", False, True),
        ({"kl_on": "both", "weight": 0.0}, "messages", False, False),
        ({}, "messages", False, False),
        ({"constraint": None}, "messages", False, False),
        ({"kl_on": "both"}, "text", False, False),
        ({"kl_on": "both"}, "messages", True, False),
    ],
)
def test_a_kl_within_users_turns_is_warned_of(caplog, options, column, assistant_only, warned):
    rows = Dataset.from_dict({column: ["unread"]})
    regulariser = SimpleNamespace(
        name="rude", options=Regulariser(**{"constraint": NO_E, **options}), corpus={"talk": rows}
    )
    arguments = SimpleNamespace(assistant_only_loss=assistant_only)
    setup.warn_of_user_turns([regulariser], arguments)
    assert ("R is fitted on the assistant's turns of talk" in caplog.text) == warned


@pytest.mark.parametrize(
    ("adapters", "said"),
    [
        ([], None),
        ([LoraConfig(**EVERYWHERE)], None),
        ([LoraConfig(**EVERYWHERE), LoraConfig(**EVERYWHERE, lora_dropout=0.1)], "lora"),
        ([VeraConfig(**EVERYWHERE, r=2, vera_dropout=0.1)], "^peft_config.vera_dropout: a regulariser needs"),
        ([IA3Config(**EVERYWHERE, feedforward_modules=[])], None),
    ],
)
def test_dropout_is_off_or_an_adapter_s_is_refused(tiny_model, adapters, said):
    model = tiny_model("gpt2", resid_pdrop=0.2)
    for number, adapter in enumerate(adapters):
        if number:
            model.add_adapter(f"{number}", adapter)
        else:
            model = get_peft_model(model, adapter)
    with refused(said):
        setup.disable_policy_dropout(model, [Regulariser()])
        assert {part.p for part in model.modules() if isinstance(part, torch.nn.Dropout)} == {0.0}


@pytest.mark.parametrize(
    ("new_tokens", "held", "said"),
    [
        (63, [Regulariser(NO_E)], None),
        (64, [Regulariser(NO_E)], "max_new_tokens: 64 leave no room"),
        (64, [Regulariser(), Regulariser(NO_E)], "max_new_tokens: 64 leave no room"),
        (64, [Regulariser()], None),
    ],
)
def test_rollouts_need_room_for_a_prompt(tiny_model, new_tokens, held, said):
    with refused(said):
        setup.check_rollout_length(tiny_model(), SimpleNamespace(max_new_tokens=new_tokens), held)


def test_a_name_is_loaded_as_it_says_and_a_model_is_taken_as_it_is(tiny_folder):
    name = str(tiny_folder())
    for options, dtype in ((None, torch.float32), ({"dtype": "float64"}, torch.float64)):
        loaded = setup.loaded(name, SimpleNamespace(model_init_kwargs=options, chat_template_path=None))
        assert loaded.dtype == dtype
    assert setup.loaded(loaded, SimpleNamespace(model_init_kwargs=None, chat_template_path=None)) is loaded
    with refused("model_init_kwargs: the model is loaded already"):
        setup.loaded(loaded, SimpleNamespace(model_init_kwargs={"dtype": "float64"}, chat_template_path=None))


def test_a_model_that_is_spread_over_devices_is_not_compiled(tiny_folder):
    model = setup.load_model(str(tiny_folder()))
    model._hf_hook = object()  # of accelerate
    with refused("torch_compile: a model with a device_map is not compiled"):
        setup.follow_compilation(model)


class TestPrefixes:
    """A batch of a plain row, two rude ones, and a rollout for the regulariser of the rude ones."""

    mask = np.array([[True, True, False], [True, True, True], [False, True, True], [False, True, False]])
    reached = np.array([[True, False, True]] * 4)
    learnt = np.array([True, True, True, False])
    is_text = np.array([True, True, False, False])
    batch = Prefixes(
        np.array([0, 1, 1, NO_DOMAIN]), np.array([-1, -1, -1, 0]), mask, np.array([3, 4, 4, 3]), learnt, is_text
    )

    @pytest.fixture
    def trainer(self, tiny_folder, tmp_path):
        def make(on, **options):
            held = {"rude": Regulariser(NO_E, kl_on=on, anchor="previous")}
            made = trainer_of(tiny_folder(), tmp_path, held, **options)
            made.regularisers[0].is_fitted = True
            made.regularisers[0].reaches = lambda rows: self.reached
            return made

        return make

    @pytest.mark.parametrize("targets", ["computed", "precomputed"])
    @pytest.mark.parametrize("on", ["corpus", "rollouts", "both"])
    def test_the_kl_looks_at_its_rows_where_r_was_fitted(self, trainer, on, targets):
        made = trainer(on, targets=targets)
        (regulariser,) = made.regularisers
        expected = np.zeros_like(self.mask)
        if on != "rollouts":
            expected[1:3] = self.mask[1:3] & self.reached[1:3]
        expected[3] = self.mask[3]
        assert made.regularisers.masks(self.batch)[0].tolist() == expected.tolist()
        unreached = made.means.since_last_log()
        assert unreached == ({} if on == "rollouts" else {"kl_unreached/rude": 0.4})
        regulariser.is_fitted = False
        assert not made.regularisers.masks(self.batch)[0].any()

    @pytest.mark.parametrize("on", ["corpus", "rollouts", "both"])
    def test_as_many_rollouts_ride_along_as_a_batch_has_rows(self, trainer, on):
        made = trainer(on)
        (regulariser,) = made.regularisers
        regulariser.rollouts = [rollout([1, 5], [number] * number) for number in range(1, 6)]
        batches = [self.batch[:2], self.batch[:1], self.batch[:3]]
        riders, tokens = made.regularisers.share_rollouts(batches)
        if on == "corpus":
            assert riders == [[], [], []]
        else:
            taken = [[len(one.completion_ids) for _, some in batch for one in some] for batch in riders]
            assert taken == [[1], [], [2, 3]]
            assert made.regularisers._sampled == {0: 6}
        assert tokens == 7 + 3 + 11 + (0 if on == "corpus" else 6 + 3 * 2)
        regulariser.is_fitted = False
        assert made.regularisers.share_rollouts(batches)[0] == [[], [], []]


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
@pytest.mark.parametrize("accumulated", [False, True])
class TestLoss:
    """Corpus rows and rollouts of one batch, with a target q that is known at every prefix."""

    @pytest.fixture
    def trainer(self, tiny_folder, tmp_path, loss_type):
        held = {"rude": Regulariser(NO_E, kl_on="both", anchor="previous", weight=3.0)}
        made = trainer_of(tiny_folder(), tmp_path, held, loss_type=loss_type, pad_to_multiple_of=4)
        regulariser = made.regularisers[0]
        regulariser.is_fitted = True
        regulariser.rollouts = [rollout([1, 5, 9], [3, 4, 2]), rollout([1, 7], [8])]
        regulariser.reaches = lambda rows: np.arange(rows.mask.shape[1]) >= 2
        return made

    def test_each_term_is_a_mean_over_its_own_tokens(self, trainer, accumulated):
        (regulariser,) = trainer.regularisers
        rows = [trainer.train_dataset[index] for index in range(6)]
        assert {row["domain"] for row in rows} == {0, 1}
        rows[0]["input_ids"][3] = rows[0]["labels"][3] = 0  # also a token to learn
        batch = trainer.data_collator(rows)
        inputs = append_rollouts(batch, regulariser.rollouts, 0, trainer.processing_class.pad_token_id)
        ids, attention_mask = inputs["input_ids"], inputs["attention_mask"]
        trained_on = torch.from_numpy(inputs["prefixes"].trained_on)
        rude = torch.tensor([row["domain"] == 1 for row in rows] + [False] * 2)
        on_corpus = trained_on & rude[:, None] & (torch.arange(ids.shape[1] - 1) >= 2)
        on_rollouts = torch.from_numpy(inputs["prefixes"].mask) & (torch.arange(8) >= 6)[:, None]
        log_q = torch.randn(*ids[:, 1:].shape, len(trainer.processing_class)).log_softmax(-1)
        regulariser.target = lambda _, __, ___, mask, ____: lambda which, logits: log_q[torch.from_numpy(mask)][which]
        tokens, sampled = int(trained_on.sum()), 4
        items = None
        if accumulated:  # over two batches
            items, trainer.regularisers._sampled = torch.tensor(2 * tokens), {0: 2 * sampled}
        model = trainer.model.train()
        loss = trainer.compute_loss(model, dict(inputs), num_items_in_batch=items)

        log_p = model(input_ids=ids, attention_mask=attention_mask).logits[:, :-1].log_softmax(-1)
        of_targets = log_p.gather(-1, ids[:, 1:, None])[..., 0][trained_on]
        by = of_targets.exp().detach() if trainer.args.loss_type == "dft" else 1.0  # dynamic fine-tuning's weights
        ce = -(by * of_targets).sum()
        kl = (log_q.exp() * (log_q - log_p)).sum(-1)
        times = 2 if accumulated else 1
        expected = (ce + 3 * kl[on_corpus].sum()) / (times * tokens) + 3 * kl[on_rollouts].sum() / (times * sampled)
        torch.testing.assert_close(loss, expected)
        weight = model.get_output_embeddings().weight
        ours, theirs = (torch.autograd.grad(part, weight)[0] for part in (loss, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
        measured = trainer.means.since_last_log()
        assert measured["ce"] == pytest.approx(ce.item() / tokens, rel=1e-5)
        assert measured["kl/rude"] == pytest.approx(kl[on_corpus | on_rollouts].mean().item(), rel=1e-5)
        if trainer.args.loss_type == "nll":
            entropy = -(log_p.exp() * log_p).sum(-1)[trained_on].mean()
            assert measured["entropy"] == pytest.approx(entropy.item(), rel=1e-5)
            right = (log_p.argmax(-1) == ids[:, 1:])[trained_on].float().mean()
            assert measured["mean_token_accuracy"] == pytest.approx(right.item(), abs=1e-6)

        without = {key: part for key, part in batch.items() if key != "prefixes"}
        plain = trainer.compute_loss(model.eval(), dict(without), num_items_in_batch=items)
        torch.testing.assert_close(plain, ce.detach() / (times * tokens), rtol=1e-4, atol=0)
        assert torch.equal(trainer.compute_loss(model, dict(batch), num_items_in_batch=items), plain)

        if trainer.args.loss_type == "nll":
            trainer._loss_scale = lambda items: 6  # as one of six processes whose gradients are averaged
            scaled = trainer.compute_loss(model.train(), dict(inputs), num_items_in_batch=items)
            torch.testing.assert_close(scaled, 6 * expected)
        regulariser.options.weight = 3e38
        infinite = trainer.compute_loss(model.train(), dict(inputs), num_items_in_batch=items)
        assert infinite.isnan(), "so that all processes skip the update"


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
class TestHeldRows:
    """Rows of a domain that is held and not learnt, with a target q that is known at every prefix."""

    @pytest.fixture
    def trainer(self, tiny_folder, tmp_path, loss_type):
        made = trainer_of(
            tiny_folder(), tmp_path, {"plain": Regulariser(weight=3.0)}, learn={"plain": False}, loss_type=loss_type
        )
        vocabulary = len(made.processing_class)
        self.q = torch.randn(vocabulary).log_softmax(-1)
        made.regularisers[0].target = lambda *_: lambda which, logits: self.q.expand(logits.shape)
        return made

    @pytest.mark.parametrize("accumulated", [False, True])
    def test_the_cross_entropy_counts_learnt_tokens_and_the_kl_is_a_mean_over_held_ones(self, trainer, accumulated):
        rows = [trainer.train_dataset[index] for index in range(6)]
        batch = trainer.data_collator(rows)
        plain = torch.tensor([row["domain"] == 0 for row in rows])
        assert 0 < plain.sum() < 6
        labelled = batch["attention_mask"][:, 1:].bool()
        learnt, held = labelled & ~plain[:, None], labelled & plain[:, None]
        assert (batch["labels"][:, 1:] != -100).equal(learnt), "what `transformers` counts"
        items = None
        if accumulated:  # with another batch, of the same rows
            items = torch.tensor(2 * int(learnt.sum()))
            trainer.regularisers.share_rollouts([batch["prefixes"]] * 2)
        model = trainer.model.train()
        loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=items)
        log_p = model(input_ids=batch["input_ids"]).logits[:, :-1].log_softmax(-1)
        of_targets = log_p.gather(-1, batch["input_ids"][:, 1:, None])[..., 0][learnt]
        by = of_targets.exp().detach() if trainer.args.loss_type == "dft" else 1.0
        kl = (self.q.exp() * (self.q - log_p)).sum(-1)
        expected = -(by * of_targets).mean() + 3 * kl[held].mean()
        torch.testing.assert_close(loss, expected / 2 if accumulated else expected)

    def test_an_update_without_a_learnt_token_has_the_kl_alone(self, trainer):
        rows = [row for row in (trainer.train_dataset[index] for index in range(12)) if row["domain"] == 0]
        batch = trainer.data_collator(rows)
        model = trainer.model.train()
        loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(0))
        log_p = model(input_ids=batch["input_ids"]).logits[:, :-1].log_softmax(-1)
        kl = (self.q.exp() * (self.q - log_p)).sum(-1)
        torch.testing.assert_close(loss, 3 * kl[batch["attention_mask"][:, 1:].bool()].mean())


@pytest.mark.parametrize(
    ("counts", "sharded", "active", "asked"),
    [(True, False, True, True), (False, False, True, False), (False, True, True, True), (False, True, False, False)],
)
def test_a_regulariser_is_asked_where_it_looks_and_an_anchor_in_shards_always(
    monkeypatch, counts, sharded, active, asked
):
    monkeypatch.setattr(regulariser_set, "is_sharded", lambda model: sharded)
    given = []
    target = lambda *rows: given.append(rows[-1]) or "q"  # noqa: E731
    regulariser = SimpleNamespace(index=0, name="rude", active=active, weight=2.0, target=target, model=None)
    regulariser.corpus, regulariser.options = ["plain"], Regulariser(NO_E)
    held = RegulariserSet([regulariser], ["plain"], None)
    regulariser.begins = lambda rows: "begins"
    one, yes = np.array([0]), np.array([True])
    batch = Prefixes(one, one - 1, np.ones((1, 3), dtype=bool), one + 4, yes, yes)
    mask = np.array([[False, counts, False]])
    inputs = {"input_ids": torch.ones(1, 4), "attention_mask": torch.ones(1, 4)}
    seen = np.array([[True, True, False]])
    found = held.divergences(torch.zeros(1, 4, 2), inputs, batch, [mask], seen, torch.tensor(3))
    assert [(one.positions.tolist(), one.weights.tolist()) for one in found] == (
        [([1] * counts, [2.0] * counts)] if asked else []
    )
    assert given == (["begins"] if asked else [])


@pytest.mark.parametrize(
    ("rounds", "schedule", "anchor", "idle"),
    [
        (1, "sequential", "live", ["replay", "seek"]),
        (2, "sequential", "live", []),
        (2, "parallel", "live", ["replay", "seek"]),
        (3, "parallel", "live", []),
        (3, "sequential", "initial", ["seek"]),
        (1, "sequential", None, ["corpus_outputs", "replay", "seek"]),
    ],
)
def test_options_of_fits_are_named_where_there_is_none_that_they_act_in(
    tmp_path, caplog, rounds, schedule, anchor, idle
):
    of_fits = AuxiliaryOptions(seek=0.5, replay=1, corpus_outputs=8)
    options = config(tmp_path, rounds=rounds, schedule=schedule, auxiliary=of_fits)
    held = {"rude": Regulariser(NO_E, anchor=anchor)} if anchor else {"plain": Regulariser(None)}
    setup.check_options(options, held, {})
    assert [record.message.split(":")[0] for record in caplog.records] == [f"auxiliary.{name}" for name in idle]


@pytest.mark.parametrize(("schedule", "named"), [("sequential", ["parallel.patience"]), ("parallel", [])])
def test_options_of_roles_are_named_where_there_are_none(tmp_path, caplog, schedule, named):
    roles = ParallelOptions(patience=5.0, policy_workers=1)
    roles = replace(roles, largest_message=3.0)  # which says where precomputed targets are kept, too
    options = {"targets": "precomputed", "parallel": roles}
    setup.check_options(
        config(tmp_path, rounds=3, schedule=schedule, **options), {"rude": Regulariser(NO_E, anchor="previous")}, {}
    )
    assert [record.message.split(":")[0] for record in caplog.records] == named


@pytest.mark.parametrize(
    ("options", "named"),
    [({}, 1), ({"kl_on": "rollouts"}, 0), ({"weight": 0.0}, 0), ({"constraint": None, "anchor": "initial"}, 0)],
)
def test_a_kl_on_packed_rows_is_warned_of(tmp_path, caplog, options, named):
    packed = config(tmp_path, packing=True, packing_strategy="wrapped")
    setup.check_options(packed, {"rude": Regulariser(**{"constraint": NO_E, "kl_on": "corpus"} | options)}, {})
    assert caplog.text.count("packing: rollouts begin in the first text of a row") == named


@pytest.mark.parametrize(("weights", "dropout"), [((0.0, 0.0), 0.2), ((0.5, 0.0), 0.0), ((1.0, 1.0), 0.0)])
def test_dropout_stays_where_no_kl_pulls(tiny_folder, tmp_path, weights, dropout):
    held = {name: Regulariser(NO_E, weight=weight) for name, weight in zip(("plain", "rude"), weights, strict=True)}
    trainer = trainer_of(tiny_folder("gpt2", resid_pdrop=0.2), tmp_path, held)
    assert trainer.model.transformer.h[0].mlp.dropout.p == dropout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"targets": "precomputed"}, "set anchor: previous or initial"),
        ({"targets": "computed"}, None),
        ({"eval_strategy": "epoch"}, "there are no rows to evaluate on"),
        ({"eval_on_start": True}, "there are no rows to evaluate on"),
    ],
)
def test_options_that_do_not_go_together(tiny_folder, tmp_path, options, said):
    with refused(said):
        trainer_of(tiny_folder(), tmp_path, {"rude": Regulariser(NO_E)}, **options)


def test_an_evaluation_asks_the_constraints_of_their_own_domains(tiny_folder, tmp_path, monkeypatch):
    asked, prepare = [], ConstrainedTrainer.evaluate_on

    def evaluate_on(self, *given):
        asked.append(given[3:])
        prepare(self, *given)

    monkeypatch.setattr(ConstrainedTrainer, "evaluate_on", evaluate_on)
    held = {"rude": Regulariser(NO_E), "plain": Regulariser(), "other": Regulariser(SHARE_OF_E)}
    rows, options = corpus(("plain", "rude", "other")), EvalOptions(share=0.2)
    trainer = trainer_of(tiny_folder(), tmp_path, held, rows, eval_options=options, eval_strategy="epoch")
    assert asked == [(["rude", "other"], [NO_E, SHARE_OF_E])]
    assert set(trainer.eval_dataset) == set(rows)
    assert trainer.schedule.evaluates
    assert not trainer_of(tiny_folder(), tmp_path, held, rows).schedule.evaluates


def test_a_loss_is_logged_as_missing_where_a_part_of_it_is_not_finite(tiny_folder, tmp_path):
    trainer = trainer_of(tiny_folder(), tmp_path, {})
    for kl in (1.0, float("nan")):
        trainer.means.add("ce", torch.tensor(4.0), 2)
        trainer.means.add("kl/rude", torch.tensor(kl), 1)
        trainer.log({"eval_loss": 3.0})
        trainer.log({"loss": 5.0})
    (before, finite), (again, missing) = trainer.state.log_history[:2], trainer.state.log_history[2:]
    assert "ce" not in before
    assert "ce" not in again
    assert (finite["loss"], finite["ce"], finite["kl/rude"]) == (5.0, 2.0, 1.0)
    assert math.isnan(missing["loss"])
    assert missing["ce"] == 2.0


def test_held_rows_are_a_share_of_all_rows_of_updates_without_one_too(tiny_folder, tmp_path):
    options = {"per_device_train_batch_size": 1, "max_steps": 20, "rounds": 1}
    trainer = trainer_of(tiny_folder(), tmp_path, {"plain": Regulariser()}, learn={"plain": False}, **options)
    trainer.train()
    (record,) = [record for record in trainer.state.log_history if "round" in record]
    assert record["held_rows"] == pytest.approx(0.5, abs=0.3)


def test_prompts_of_chats_come_from_their_turns_and_others_from_their_tokens(tiny_model, tmp_path):
    folder = chat_folder(tiny_model, tmp_path / "chats", TEMPLATES["qwen3"][0])
    rows = {"talk": Dataset.from_dict({"messages": CHATS}), "text": Dataset.from_dict({"text": ["a kettle"] * 8})}
    for formatting, starts in ((None, ["messages", "input_ids"]), (lambda row: "a hat", ["input_ids", "input_ids"])):
        trainer = ConstrainedTrainer(
            load_model(str(folder)),
            config(tmp_path / "run", max_length=120),
            rows,
            Regulariser(NO_E),
            processing_class=load_tokenizer(str(folder)),
            formatting_func=formatting,
            eval_options=EvalOptions(corpus=rows, completions=8),
        )
        assert any(prompt.messages for prompt in trainer.eval_prompts) == (formatting is None)
        assert [
            start in of.column_names for start, of in zip(starts, trainer.regularisers[0].corpus.values(), strict=True)
        ] == [True, True]


@pytest.mark.parametrize("assistant_only", [False, True])
def test_trl_is_shown_a_chat_where_only_the_assistant_is_learnt(assistant_only):
    rows = {"text": Dataset.from_dict({"text": ["a kettle"]}), "talk": Dataset.from_dict({"messages": CHATS[:1]})}
    shown = given.example_of(rows, SimpleNamespace(assistant_only_loss=assistant_only))
    assert shown[0] == rows["talk" if assistant_only else "text"][0]


@pytest.mark.parametrize(("multiple", "time"), [(None, 9), (4, 12)])
def test_rollouts_become_rows_of_the_batch(tiny_folder, tmp_path, monkeypatch, multiple, time):
    held = {"rude": Regulariser(NO_E, kl_on="both", anchor="previous")}
    trainer = trainer_of(tiny_folder(), tmp_path, held, max_length=7, pad_to_multiple_of=multiple)
    trainer.regularisers[0].is_fitted = True
    trainer.regularisers[0].rollouts = [rollout([1] * 4, [2] * 5)]
    monkeypatch.setattr(EvaluatedTrainer, "training_step", lambda self, model, inputs, items: inputs["input_ids"].shape)
    rows = [trainer.train_dataset[index] for index in range(4)]
    rude = sum(row["domain"] for row in rows)
    batch = trainer.data_collator(rows)
    trainer.get_batch_samples(iter([dict(batch)]), 1, torch.device("cpu"))
    assert 0 < rude < 4
    assert trainer.training_step(trainer.model, dict(batch)) == (4 + rude, time)
    assert trainer._total_train_tokens == batch["attention_mask"].sum() + 9 * rude
    without = trainer.training_step(trainer.model, dict(batch))
    assert without == batch["input_ids"].shape, "they ride along once"


@pytest.mark.parametrize("targets", ["computed", "precomputed"])
def test_targets_are_made_ahead_where_asked(tiny_folder, tmp_path, targets):
    held = {"rude": Regulariser(NO_E, anchor="previous")}
    trainer = trainer_of(tiny_folder(), tmp_path, held, targets=targets)
    made_by = [one for one in trainer.callback_handler.callbacks if isinstance(one, PrecomputedTargets)]
    assert len(made_by) == (targets == "precomputed")


def test_one_token_is_a_mean_of_itself(tiny_folder, tmp_path):
    trainer = trainer_of(tiny_folder(), tmp_path, {})
    batch = trainer.data_collator([{"input_ids": [1, 5], "labels": [1, 5], "domain": 0}])
    loss = trainer.compute_loss(trainer.model.train(), dict(batch))
    log_p = trainer.model(input_ids=torch.tensor([[1]])).logits[0, 0].log_softmax(-1)
    torch.testing.assert_close(loss, -log_p[5])
