"""The update and its schedule, on tiny models: what must not change when something else does."""

import json
import threading
from itertools import product

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaForCausalLM, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from bridle.data import read_rollouts
from bridle.errors import RunStopped, UserError
from bridle.models.auxiliary import AuxiliaryModel
from bridle.models.guidance import guided
from bridle.models.loading import LoraOptions, load_model, load_tokenizer
from bridle.training import batches, regulariser, regulariser_set
from bridle.training import trainer as training
from bridle.training.batches import rollout_rows
from bridle.training.checkpointing import last_checkpoint
from bridle.training.config import AuxiliaryOptions, Regulariser
from bridle.utils.distributed import all_gather
from bridle.utils.files import write_json
from trainers import NO_E, SFT_OPTIONS, SHARE_OF_E, Labels, Letters, corpus, logged, trainer_of, weights


class Waits(TorchDispatchMode):
    """Finds the operations for whose result the host would have to wait."""

    def __init__(self):
        super().__init__()
        self.found, self.paused = [], False

    def outside(self, function):
        """The same function, unwatched: what the model itself does is not ours."""

        def unwatched(*args, **kwargs):
            self.paused = True
            try:
                return function(*args, **kwargs)
            finally:
                self.paused = False

        return unwatched

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        masks = name == "index" and any(part is not None and part.dtype == torch.bool for part in args[1])
        if not self.paused and (masks or name in {"_local_scalar_dense", "nonzero", "masked_select", "equal"}):
            self.found.append(name)
        return operation(*args, **(kwargs or {}))


class TestInvariance:
    def test_without_regularisers_it_is_sft_step_for_step(self, tiny_folder, tmp_path):
        folder = tiny_folder()
        ours = trainer_of(folder, tmp_path / "a", {}, rows={"all of it": corpus()["plain"]})
        ours.train()
        mixed = ours.train_dataset.remove_columns("domain")
        theirs = SFTTrainer(
            model=load_model(str(folder)),
            args=SFTConfig(output_dir=str(tmp_path / "b"), bf16=False, **SFT_OPTIONS),
            train_dataset=mixed,
            processing_class=load_tokenizer(str(folder)),
        )
        theirs.train()
        assert len(logged(ours, "loss")) == 4
        assert logged(ours, "loss") == pytest.approx(logged(theirs, "loss"), abs=1e-5)
        steps = [record for record in ours.state.log_history if "loss" in record]
        assert [record["ce"] for record in steps] == pytest.approx(logged(ours, "loss"), abs=1e-5)

    def test_a_weight_of_zero_is_sft(self, tiny_folder, tmp_path):
        folder = tiny_folder()
        plain = trainer_of(folder, tmp_path / "a", {})
        zero = trainer_of(folder, tmp_path / "b", {"rude": Regulariser(NO_E, weight=0.0)})
        plain.train()
        zero.train()
        assert logged(zero, "loss") == logged(plain, "loss")

    @pytest.mark.parametrize(
        ("on", "anchor", "divides"),
        [*product(("corpus", "both"), ("live", "previous"), (True,)), ("both", "live", False)],
    )
    def test_one_batch_of_eight_is_four_of_two(self, tiny_folder, tmp_path, monkeypatch, anchor, on, divides):
        """Also of a model whose own loss does not divide by the tokens of an update."""
        monkeypatch.setattr(LlamaForCausalLM, "accepts_loss_kwargs", divides, raising=False)
        folder, losses, ends = tiny_folder(), [], []
        for rows, accumulated in ((8, 1), (2, 4)):
            trainer = trainer_of(
                folder,
                tmp_path / f"{rows}",
                {"rude": Regulariser(NO_E, weight=4.0, anchor=anchor, kl_on=on)},
                per_device_train_batch_size=rows,
                gradient_accumulation_steps=accumulated,
                optim="sgd",  # AdamW makes whole steps out of gradients that are only rounding
                learning_rate=0.5,
            )
            start = weights(trainer)
            trainer.train()
            assert max((moved - start[name]).abs().max() for name, moved in weights(trainer).items()) > 0.01
            assert len(logged(trainer, "kl/rude")) > 4
            losses.append(logged(trainer, "loss") + logged(trainer, "kl/rude"))
            ends.append(weights(trainer))
        assert losses[0] == pytest.approx(losses[1], abs=2e-5)
        for name, weight in ends[0].items():
            torch.testing.assert_close(ends[1][name], weight, atol=2e-5, rtol=1e-4)

    @pytest.mark.parametrize("accumulated", [1, 2])
    @pytest.mark.parametrize(
        ("regularisers", "options", "forwards"),
        [
            ({"rude": ("live", "both")}, {}, 2),
            ({"rude": ("previous", "rollouts")}, {"pad_to_multiple_of": 8}, 2),
            ({"rude": ("previous", "both")}, {"targets": "precomputed"}, 2),
            ({"rude": ("initial", "both"), "plain": (None, "both"), "all": ("live", "rollouts")}, {}, 2),
            ({"rude": (None, "rollouts"), "plain": ("live", "both")}, {"learn": {"plain": False}}, 2),
            ({"rude": ("previous", "corpus")}, {}, 1),
            ({"rude": ("live", "both")}, {"loss_type": "dft"}, 1),
        ],
    )
    def test_rollouts_in_a_forward_of_their_own_give_the_same_update(
        self, tiny_folder, tmp_path, monkeypatch, regularisers, options, forwards, accumulated
    ):
        """Of one regulariser or several, of a frozen anchor or a live one, of retention and of held rows."""
        folder, runs, counts = tiny_folder(), [], []
        for least in (10**9, -(10**9)):
            monkeypatch.setattr(batches, "worth_a_forward", lambda device, least=least: least)
            trainer = trainer_of(
                folder,
                tmp_path / f"{least}",
                {
                    name: Regulariser(NO_E if anchor else None, weight=3.0, anchor=anchor, kl_on=on)
                    for name, (anchor, on) in regularisers.items()
                },
                gradient_accumulation_steps=accumulated,
                optim="sgd",  # AdamW makes whole steps out of gradients that are only rounding
                learning_rate=0.5,
                **options,
            )
            found, parts = [], trainer.parts
            trainer.parts = lambda inputs, parts=parts, found=found: found.append(parts(inputs)) or found[-1]
            trainer.train()
            counts.append(max(map(len, found)))
            runs.append(trainer)
        assert counts == [1, forwards]
        joined, apart = runs
        for name, weight in weights(joined).items():
            torch.testing.assert_close(weights(apart)[name], weight, atol=2e-5, rtol=1e-4)
        kls = [f"kl/{name}" for name in regularisers]
        for key in ("loss", "ce", "entropy", "mean_token_accuracy", "grad_norm", "num_tokens", *kls):
            assert logged(joined, key)
            assert logged(apart, key) == pytest.approx(logged(joined, key), abs=1e-4), key

    @pytest.mark.parametrize("lora", [None, LoraOptions(r=2)])
    def test_compiled_or_not_it_is_the_same_training(self, tiny_folder, tmp_path, lora, monkeypatch):
        for name in ("BACKEND", "USE_REGIONAL_COMPILATION"):  # transformers and Bridle set them, which would last
            monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", "no" if name == "BACKEND" else "false")
        folder, losses, ends = tiny_folder(), [], []
        for compiled in (False, True):
            set_seed(0)  # adapters begin at random
            regularisers = {"rude": Regulariser(NO_E, weight=4.0, kl_on="both")}
            options = {"torch_compile": compiled, "torch_compile_backend": "aot_eager" if compiled else None}
            trainer = trainer_of(folder, tmp_path / f"{compiled}", regularisers, lora=lora, **options)
            counters.clear()
            trainer.train()
            assert (counters["frames"]["ok"] > 0) == compiled, "blocks are compiled"
            losses.append(logged(trainer, "loss") + logged(trainer, "kl/rude"))
            ends.append(weights(trainer))
        assert losses[0] == pytest.approx(losses[1], abs=1e-3)
        for name, weight in ends[0].items():
            torch.testing.assert_close(ends[1][name], weight, atol=1e-3, rtol=1e-2)

    def test_adaptive_with_one_domain_is_not_adaptive(self, tiny_folder, tmp_path):
        folder, rows, losses = tiny_folder(), {"rude": corpus()["rude"]}, []
        for name in ("rude", "all"):
            trainer = trainer_of(folder, tmp_path / name, {name: Regulariser(NO_E, weight=4.0)}, rows=rows)
            trainer.train()
            losses.append(logged(trainer, "loss") + logged(trainer, f"kl/{name}"))
        assert losses[0] == losses[1]
        assert any(kl > 1e-6 for kl in losses[0][4:])

    def test_one_seed_gives_one_result(self, tiny_folder, tmp_path):
        folder, ends = tiny_folder(), []
        for run, seed in enumerate((1, 1, 2)):
            trainer = trainer_of(folder, tmp_path / str(run), {"rude": Regulariser(NO_E)}, seed=seed)
            trainer.train()
            ends.append(weights(trainer))
        assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
        assert not all(torch.equal(ends[0][name], ends[2][name]) for name in ends[0])


class TestRegularisers:
    def test_scoring_that_waits_goes_on_while_sampling_does_and_changes_nothing(self, tiny_folder, tmp_path):
        folder, ends, calls = tiny_folder(), [], {}
        for waits in (False, True):
            constraint = Letters(["e"])
            constraint.waits = waits
            calls[waits] = asked = []
            score = constraint.score
            constraint.score = lambda prompts, texts, asked=asked, score=score: (
                asked.append((threading.current_thread().name, list(texts))) or score(prompts, texts)
            )
            regularisers = {"rude": Regulariser(constraint, weight=4.0)}
            trainer = trainer_of(folder, tmp_path / f"{waits}", regularisers, rollout_batch_size=8)
            trainer.train()
            ends.append(weights(trainer))
        assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
        assert [len(texts) for _, texts in calls[False]] == [32, 32]
        ahead = [texts for name, texts in calls[True] if name.startswith("scoring")]
        assert len(ahead) == 8
        assert all(not texts for name, texts in calls[True] if not name.startswith("scoring")), "nothing is left over"

    @pytest.mark.parametrize("waits", [False, True])
    def test_a_constraint_that_reads_prompts_gets_those_of_its_rollouts(self, tiny_folder, tmp_path, waits):
        constraint, asked = Letters(["unused"], reads="prompt+completion"), set()
        constraint.waits = waits
        score = constraint._score
        constraint._score = lambda texts: asked.update(texts) or score(texts)
        constraint.cut_texts = lambda: len(asked)
        trainer = trainer_of(tiny_folder(), tmp_path / "run", {"rude": Regulariser(constraint)}, max_steps=1, rounds=1)
        trainer.train()
        assert logged(trainer, "rude/truncated") == [len(asked)]
        rollouts = trainer.regularisers[0].rollouts
        assert asked == {rollout.prompt + rollout.completion for rollout in rollouts}
        assert all(rollout.complies == ("e" not in rollout.prompt + rollout.completion) for rollout in rollouts)

    @pytest.mark.parametrize("lora", [None, LoraOptions(r=2)])
    @pytest.mark.parametrize("anchor", ["live", "previous", "initial"])
    def test_every_anchor_trains(self, tiny_folder, tmp_path, anchor, lora):
        trainer = trainer_of(
            tiny_folder(), tmp_path / "run", {"rude": Regulariser(NO_E, anchor=anchor, kl_on="both")}, lora=lora
        )
        trainer.train()
        kl = logged(trainer, "kl/rude")
        assert all(value >= 0 for value in kl)
        assert max(kl) > 1e-6
        rounds = [record for record in trainer.state.log_history if "round" in record]
        assert [record["round"] for record in rounds] == [1, 2]
        assert 0 < rounds[0]["rude/compliance_low"] < rounds[0]["rude/compliance"] < 1
        assert {
            "rude/r_brier",
            "rude/r_skill",
            "rude/r_ece",
            "rude/lambda",
            "rude/seconds_sampling",
            "seconds_policy",
            "ce",
        } <= set(rounds[0])
        assert ("rude/rollouts" in rounds[1]) == (anchor != "initial"), "p_0's samples are drawn once"

    def test_an_auxiliary_with_a_network_of_its_own(self, tiny_folder, tmp_path):
        shape = AuxiliaryOptions(own_network=True, epochs=2, batch_size=8)
        trainer = trainer_of(tiny_folder(), tmp_path / "run", {"rude": Regulariser(NO_E)}, auxiliary=shape)
        trainer.train()
        assert max(logged(trainer, "kl/rude")) > 1e-6
        assert AuxiliaryModel.from_pretrained(tmp_path / "run" / "auxiliary").network is not None

    def test_soft_labels_teach_r_the_degree_and_not_the_verdict(self, tiny_folder, tmp_path):
        """Nearly every sample complies, so verdicts are all alike, while the degrees differ."""
        folder, fits = tiny_folder(), []
        for soft in (False, True):
            trainer = trainer_of(
                folder, tmp_path / str(soft), {"rude": Regulariser(SHARE_OF_E, soft_labels=soft)}, rounds=1
            )
            trainer.train()
            fits.append(logged(trainer, "rude/fit"))
            rates = [rate for bins in logged(trainer, "rude/r_reliability") for _, rate, _ in bins]
        assert fits == [["none"], ["fitted"]]
        assert any(0.5 < rate < 1 for rate in rates)

    def test_the_corpus_alone(self, tiny_folder, tmp_path):
        trainer = trainer_of(tiny_folder(), tmp_path / "run", {"rude": Regulariser(NO_E, kl_on="corpus")})
        trainer.train()
        assert max(logged(trainer, "kl/rude")) > 1e-6

    def test_retention_pulls_towards_the_initial_model(self, tiny_folder, tmp_path):
        folder, distances = tiny_folder(), []
        for weight in (0.0, 50.0):
            trainer = trainer_of(
                folder,
                tmp_path / str(weight),
                {"all": Regulariser(weight=weight)},
                max_steps=6,
                learning_rate=3e-3,
            )
            before = weights(trainer)
            trainer.train()
            after = weights(trainer)
            distances.append(sum(float((after[name] - before[name]).norm()) for name in before))
            if weight:
                assert logged(trainer, "kl/all")[0] == pytest.approx(0, abs=1e-6)  # q = p_0 = p at the start
        assert distances[1] < 0.8 * distances[0]

    @pytest.mark.parametrize("bf16", [False, True])
    def test_a_policy_that_does_not_move_is_its_anchor(self, tiny_folder, tmp_path, bf16):
        """Dropout and mixed precision are those of the anchor: KL is 0 where the weights are the same."""
        folder = tiny_folder("gpt2", attn_pdrop=0.3, resid_pdrop=0.3, embd_pdrop=0.3)
        options = {"learning_rate": 0.0, "bf16": bf16, "use_cpu": True}
        trainer = trainer_of(folder, tmp_path / "run", {"all": Regulariser(weight=1.0)}, **options)
        trainer.train()
        assert logged(trainer, "kl/all") == pytest.approx([0.0] * 6, abs=1e-6)

    def test_dropout_of_adapters_is_refused(self, tiny_folder, tmp_path):
        with pytest.raises(UserError, match=r"^lora.dropout: a regulariser needs dropout off"):
            trainer_of(tiny_folder(), tmp_path, {"all": Regulariser()}, lora=LoraOptions(r=2, dropout=0.1))

    @pytest.mark.parametrize("accumulation", [1, 4])
    @pytest.mark.parametrize("on", ["corpus", "rollouts"])
    def test_lambda_weighs_the_mean_kl_whatever_the_lengths(self, tiny_folder, tmp_path, on, accumulation):
        """On rollouts of 2 tokens beside rows of 24 as much as on long ones."""
        options = {
            "max_new_tokens": 2,
            "per_device_train_batch_size": 8 // accumulation,
            "gradient_accumulation_steps": accumulation,
            "prompt_tokens": (1, None),
            "auxiliary": AuxiliaryOptions(epochs=20, batch_size=8),  # or the KL is lost in the rounding of the loss
        }
        regularisers = {"all": Regulariser(NO_E, weight=1000.0, kl_on=on)}
        trainer = trainer_of(tiny_folder(), tmp_path, regularisers, **options)
        trainer.train()
        records = [record for record in trainer.state.log_history if "loss" in record]
        for record in records:
            share = 1 - record.get("kl_unreached/all", 0)
            assert record["loss"] - record["ce"] == pytest.approx(1000 * share * record["kl/all"], rel=1e-3)
        assert max(record["kl/all"] for record in records) > 1e-6

    def test_where_no_rollout_can_be_the_kl_is_left_out_and_counted(self, tiny_folder, tmp_path, caplog):
        shares = []
        for prompts in ((1, 2), (1, None)):
            options = {"max_new_tokens": 2, "prompt_tokens": prompts, "rounds": 1}
            trainer = trainer_of(
                tiny_folder(), tmp_path / str(prompts), {"rude": Regulariser(NO_E, kl_on="corpus")}, **options
            )
            trainer.train()
            (share,) = [record["kl_unreached/rude"] for record in trainer.state.log_history if "round" in record]
            shares.append(share)
        assert shares[0] > 0.5 > 0.1 > shares[1]
        said = [record for record in caplog.messages if "the KL left out" in record]
        assert len(said) == 1
        assert said[0].startswith(f"round 1, rude: the KL left out {shares[0]:.0%} of the corpus's prefixes")

    @pytest.mark.parametrize("anchor", ["live", "previous"])
    def test_a_micro_batch_waits_for_nothing_that_an_update_can_do_once(
        self, tiny_folder, tmp_path, monkeypatch, anchor
    ):
        """On an accelerator, reading a number or counting true entries waits for all work before it."""
        waits, gathers = Waits(), []
        monkeypatch.setattr(regulariser_set, "all_gather", lambda item: gathers.append(item) or all_gather(item))
        monkeypatch.setattr(training, "policy_forward", waits.outside(training.policy_forward))
        monkeypatch.setattr(regulariser, "policy_forward", waits.outside(regulariser.policy_forward))
        options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "rounds": 1, "max_steps": 2}
        regularisers = {"rude": Regulariser(NO_E, kl_on="both", anchor=anchor), "plain": Regulariser(weight=1.0)}
        trainer = trainer_of(tiny_folder(), tmp_path, regularisers, **options)
        compute_loss = trainer.compute_loss

        def watched(*args, **kwargs):
            with waits:
                return compute_loss(*args, **kwargs)

        trainer.compute_loss = watched
        trainer.train()
        assert waits.found == []
        assert len(gathers) == 2, "once for each update"
        with waits:
            bool(torch.ones(3)[torch.ones(3) > 0].sum() > 0)
        assert len(waits.found) == 2, "the test must be able to see them"

    @pytest.mark.parametrize("lora", [None, LoraOptions(r=2)])
    def test_an_r_that_guides_another_model_than_its_own_warns(self, tiny_folder, tmp_path, caplog, lora):
        folder = tiny_folder()
        trainer = trainer_of(folder, tmp_path, {"rude": Regulariser(NO_E)}, lora=lora, max_steps=2, rounds=1)
        trainer.train()
        trainer.save_model(str(tmp_path / "model"))
        torch.manual_seed(1)
        other = AutoModelForCausalLM.from_config(trainer.model.config)
        for model, warns in (
            (load_model(str(tmp_path / "model")), False),
            (load_model(str(tmp_path / "model"), dtype="bfloat16"), False),
            (other, True),
            (load_model(str(folder)), False),  # R was fitted on it
        ):
            caplog.clear()
            with guided(model, str(tmp_path / "auxiliary")):
                assert ("R was fitted on another model" in caplog.text) == warns

    def test_packing_keeps_each_row_in_one_domain(self, tiny_folder, tmp_path):
        trainer = trainer_of(
            tiny_folder(),
            tmp_path / "run",
            {"rude": Regulariser(NO_E, kl_on="both")},
            packing=True,
            packing_strategy="wrapped",
        )
        assert {len(row) for row in trainer.train_dataset["input_ids"]} <= {*range(1, 25)}
        trainer.train()
        assert len(logged(trainer, "kl/rude")) > 0

    @pytest.mark.parametrize("anchor", ["live", "previous", "initial"])
    def test_before_any_label_differs_only_a_frozen_anchor_pulls(self, tiny_folder, tmp_path, caplog, anchor):
        trainer = trainer_of(tiny_folder(), tmp_path, {"rude": Regulariser(Labels(), anchor=anchor)})
        trainer.train()
        assert "round 2, rude: every label is alike and no round before had others" in caplog.text
        assert logged(trainer, "rude/fit") == ["none", "none"]
        assert logged(trainer, "rude/term_on") == [anchor != "live"] * 2
        if anchor == "live":
            assert logged(trainer, "kl/rude") == []
        else:  # KL(p_a ‖ p): 0 where the policy starts, and above once it has moved
            assert logged(trainer, "kl/rude")[0] == pytest.approx(0, abs=1e-6)
            assert max(logged(trainer, "kl/rude")) > 1e-5

    def test_a_round_whose_labels_are_alike_shifts_r_to_their_rate_and_keeps_the_term(self, tiny_folder, tmp_path):
        trainer = trainer_of(tiny_folder(), tmp_path, {"rude": Regulariser(Labels(1))}, rounds=2, logging_steps=1)
        trainer.train()
        assert logged(trainer, "rude/fit") == ["fitted", "kept"]
        assert logged(trainer, "rude/term_on") == [True, True]
        per_round = [record["kl/rude"] for record in trainer.state.log_history if "round" in record]
        assert per_round[0] > 1e-6
        assert 0 < per_round[1] < 1e-6, "R of the first round goes on in the second, which says that all comply"
        assert logged(trainer, "rude/r_brier_before"), "how the kept R does on the new samples"

    def test_an_initial_anchor_is_asked_again_until_its_labels_differ(self, tiny_folder, tmp_path):
        """And every time it is the initial model that is sampled, not the policy."""
        regularisers = {"rude": Regulariser(Labels(2), anchor="initial")}
        trainer = trainer_of(tiny_folder(), tmp_path, regularisers, rounds=4)
        trainer.train()
        assert logged(trainer, "rude/fit") == ["none", "fitted"]
        first, second = (read_rollouts(tmp_path / "rollouts" / f"round-{index}.rude.jsonl") for index in (1, 2))
        assert first[0].model_hash == second[0].model_hash

    def test_replayed_labels_teach_where_new_ones_are_alike(self, tiny_folder, tmp_path):
        shape = AuxiliaryOptions(epochs=2, batch_size=8, replay=1)
        regularisers = {"rude": Regulariser(Labels(1))}
        trainer = trainer_of(tiny_folder(), tmp_path, regularisers, rounds=2, auxiliary=shape)
        trainer.train()
        assert logged(trainer, "rude/fit") == ["fitted", "replay"]

    def test_log_probs_are_those_of_the_model_that_drew(self, tiny_folder, tmp_path):
        """Also of a round that fitted nothing."""
        trainer = trainer_of(tiny_folder(), tmp_path, {"rude": Regulariser(Labels())}, rounds=1)
        tokenizer, rude = trainer.processing_class, trainer.regularisers[0]
        with torch.no_grad():
            rude.update(1)
            ids, mask, _ = rollout_rows(rude.rollouts, tokenizer.pad_token_id)
            log_p = trainer.model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
        for row, rollout in enumerate(rude.rollouts):
            start = len(rollout.prompt_ids) - 1
            at = torch.arange(start, start + len(rollout.completion_ids))
            expected = log_p[row, at, rollout.completion_ids]
            torch.testing.assert_close(torch.tensor(rollout.log_probs), expected, atol=1e-4, rtol=1e-4)

    def test_clipped_rollouts_are_counted_and_teach_what_truncated_says(self, tiny_folder, tmp_path, caplog):
        seen = {}
        options = {"rounds": 1, "max_new_tokens": 2, "clipped_bound": 0.5}
        options |= {"rollouts_per_round": 1024, "auxiliary": AuxiliaryOptions(epochs=1)}  # a few of which end
        for truncated in ("label", "mask", "bootstrap"):
            options["truncated"] = truncated
            trainer = trainer_of(tiny_folder(), tmp_path / truncated, {"rude": Regulariser(NO_E)}, **options)
            trainer.train()
            rollouts = trainer.regularisers[0].rollouts
            end = trainer.processing_class.eos_token_id
            assert [rollout.finished for rollout in rollouts] == [r.completion_ids[-1] == end for r in rollouts]
            clipped = sum(not rollout.finished for rollout in rollouts) / len(rollouts)
            assert logged(trainer, "rude/clipped") == [clipped]
            assert clipped > 0.5
            assert "were cut at max_new_tokens 2" in caplog.text
            assert logged(trainer, "rude/fit") == ["fitted"]
            seen[truncated] = logged(trainer, "rude/r_bce")
        assert len(set(map(str, seen.values()))) == 3

    def test_missing_scores_are_masked_and_too_many_stop_the_run_with_the_rollouts_kept(self, tiny_folder, tmp_path):
        folder = tiny_folder()
        for missing, limit in ((1, 0.5), (20, 0.5)):
            flaky = Letters(["unused"], name="flaky")
            flaky._score = lambda texts, n=missing: [None] * n + [float("e" not in t) for t in texts[n:]]
            output = tmp_path / str(missing)
            trainer = trainer_of(folder, output, {"rude": Regulariser(flaky)}, max_missing=limit)
            if missing < 16:
                trainer.train()
                assert logged(trainer, "rude/rollouts_missing") == [missing, missing]
            else:
                with pytest.raises(RunStopped, match="20 of 32 rollouts got no score"):
                    trainer.train()
                kept = (output / "rollouts" / "round-1.rude.jsonl").read_text().splitlines()
                assert len(kept) == 32
                assert sum(json.loads(line)["complies"] is None for line in kept) == 20

    def test_a_regulariser_for_no_domain(self, tiny_folder, tmp_path):
        with pytest.raises(UserError, match=r"regularisers.rdue.domain: there is no domain 'rdue'; did you mean rude"):
            trainer_of(tiny_folder(), tmp_path, {"rdue": Regulariser(NO_E)})

    @pytest.mark.parametrize("options", [{"weight": -1.0}, {"guidance_scale": -1.0}, {"weight": float("nan")}])
    def test_impossible_settings(self, options):
        with pytest.raises(UserError, match=r"must be 0 or more|should be a finite number"):
            Regulariser(NO_E, **options)


class StopAt(TrainerCallback):
    """Dies in the middle of a run, as if the machine had."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


class TestResume:
    @pytest.mark.parametrize(
        ("options", "stop", "checkpoint"),
        [
            ({"save_strategy": "steps", "save_steps": 3}, 5, 3),  # in the middle of round 1
            ({"save_strategy": "steps", "save_steps": 3}, 7, 6),  # in the middle of round 2
            ({"save_strategy": "steps", "save_steps": 100}, 5, 4),  # the boundary saves by itself
        ],
    )
    @pytest.mark.parametrize("anchor", ["live", "previous", "initial"])
    def test_a_run_that_died_ends_as_if_it_had_not(self, tiny_folder, tmp_path, anchor, options, stop, checkpoint):
        folder = tiny_folder()
        regulariser = {"rude": Regulariser(NO_E, anchor=anchor, kl_on="both")}
        if anchor == "initial":  # a snapshot that two share
            regulariser["plain"] = Regulariser(kl_on="both")
        options = {"max_steps": 8, **options}
        whole = trainer_of(folder, tmp_path / "whole", regulariser, **options)
        whole.train()
        died = trainer_of(folder, tmp_path / "died", regulariser, **options)
        died.add_callback(StopAt(stop))
        with pytest.raises(KeyboardInterrupt):
            died.train()
        resumed = trainer_of(folder, tmp_path / "died", regulariser, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "died" / f"checkpoint-{checkpoint}"))
        for name, weight in weights(whole).items():
            assert torch.equal(weights(resumed)[name], weight), name

    def test_a_round_and_an_epoch_that_end_together_write_one_checkpoint(self, tiny_folder, tmp_path, monkeypatch):
        written, save = [], SFTTrainer._save_checkpoint
        noted = lambda trainer, *rest: written.append(trainer.state.global_step) or save(trainer, *rest)  # noqa: E731
        monkeypatch.setattr(SFTTrainer, "_save_checkpoint", noted)
        trainer = trainer_of(
            *(tiny_folder(), tmp_path, {"rude": Regulariser(NO_E)}), max_steps=8, save_strategy="epoch", keep_last=1
        )
        trainer.train()
        assert trainer.state.epoch == 1
        assert written == [4, 8]
        assert last_checkpoint(tmp_path).name == "checkpoint-8"

    def test_so_does_one_with_a_log_linear_r_that_seeks(self, tiny_folder, tmp_path):
        shape = AuxiliaryOptions(form="log-linear", seek=0.5, replay=1, epochs=2, batch_size=8)
        options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3, "auxiliary": shape}
        regulariser = {"rude": Regulariser(NO_E, kl_on="both")}
        whole = trainer_of(tiny_folder(), tmp_path / "whole", regulariser, **options)
        whole.train()
        died = trainer_of(tiny_folder(), tmp_path / "died", regulariser, **options)
        died.add_callback(StopAt(7))
        with pytest.raises(KeyboardInterrupt):
            died.train()
        resumed = trainer_of(tiny_folder(), tmp_path / "died", regulariser, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "died" / "checkpoint-6"))
        for name, weight in weights(whole).items():
            assert torch.equal(weights(resumed)[name], weight), name
        of = whole.regularisers[0].auxiliary, resumed.regularisers[0].auxiliary
        assert torch.equal(of[0].scale, of[1].scale)
        assert of[0].scale.std() > 0

    def test_a_half_written_checkpoint_is_passed_over(self, tmp_path):
        for step, files in {4: ["schedule.json"], 12: ["schedule.json"], 100: ["model.safetensors"]}.items():
            for file in files:
                write_json(tmp_path / f"checkpoint-{step}" / file, {})
        assert last_checkpoint(tmp_path).name == "checkpoint-12"
        assert last_checkpoint(tmp_path / "checkpoint-4") is None

    def test_the_word_that_a_checkpoint_is_whole_comes_last(self, tiny_folder, tmp_path, monkeypatch):
        options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        trainer = trainer_of(tiny_folder(), tmp_path, {"rude": Regulariser(NO_E)}, **options)
        trainer.schedule._save_states = lambda checkpoint: (_ for _ in ()).throw(KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        assert (tmp_path / "checkpoint-2" / "trainer_state.json").exists()
        assert last_checkpoint(tmp_path) is None
