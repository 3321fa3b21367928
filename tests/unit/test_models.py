"""Networks, sampling and guidance, on tiny real architectures."""

import math
import weakref
from collections import Counter

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, PeftModel, get_peft_model
from scipy.stats import chisquare
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationConfig
from transformers.utils import cached_file

from bridle.core import log_linear
from bridle.core.decomposition import log_target
from bridle.core.tokens import pad_left, pad_right, positions
from bridle.errors import UserError
from bridle.models import loading, sampling
from bridle.models.anchor import Anchor
from bridle.models.auxiliary import AuxiliaryModel, largest_so_far, load_auxiliary, new_auxiliary
from bridle.models.forward import policy_forward
from bridle.models.guidance import NADOGuide, NADOLogitsProcessor, guided
from bridle.models.hidden import capture_hidden_states, check_projection, project
from bridle.models.loading import (
    LoraOptions,
    check_model,
    end_token_ids,
    load_config,
    load_for_inference,
    load_model,
    load_tokenizer,
)
from bridle.models.sampling import SHORTEST_STAGE, Decoding, Trace, sample
from exhaustion import room_for
from worlds import World

ARCHITECTURES = ["llama", "falcon", "gpt2", "qwen2"]
RECURRENT = ["lfm2", "falcon_h1", "mamba"]  # in part or whole
PROMPTS = [[1, 5, 9], [1], [1, 7, 8, 9, 10]]


def randomise(auxiliary: AuxiliaryModel, scale: float = 1.0) -> AuxiliaryModel:
    """A fresh auxiliary says nothing and recalls nothing; this gives it something to say."""
    torch.nn.init.normal_(auxiliary.head.weight, std=scale)
    if auxiliary.memory is not None:
        torch.nn.init.normal_(auxiliary.memory.read.weight)
    return auxiliary.eval()


@pytest.fixture
def world(tiny_model):
    """Four tokens, outputs of up to three, which comply where they hold an even number of 0s."""
    model = tiny_model(vocab_size=4, initializer_range=0.1)
    return World(
        model=model,
        prompt=[1],
        length=3,
        end=2,
        constraint=lambda y: float(y.count(0) % 2 == 0),
    )


class TestHiddenStates:
    @pytest.mark.parametrize(
        ("model_type", "options"),
        [
            *((name, {}) for name in ARCHITECTURES),
            ("gemma2", {"head_dim": 16, "num_key_value_heads": 1, "final_logit_softcapping": 3.0}),
            ("granite", {"logits_scaling": 4.0}),
            ("cohere", {"logit_scale": 0.5}),
            ("falcon_h1", {"lm_head_multiplier": 0.3}),
        ],
    )
    def test_their_projection_is_the_model_s_logits(self, tiny_model, model_type, options):
        model = tiny_model(model_type, **options)
        ids = torch.randint(3, 60, (2, 7))
        with torch.no_grad(), capture_hidden_states(model) as hidden:
            logits = model(input_ids=ids).logits
        torch.testing.assert_close(project(model, hidden.last), logits)
        check_projection(model)

    def test_an_unknown_change_to_the_logits_is_refused(self, tiny_model):
        model = tiny_model()
        forward = model.forward

        def doubled(*args, **kwargs):
            output = forward(*args, **kwargs)
            output.logits = output.logits * 2
            return output

        model.forward = doubled
        with pytest.raises(UserError, match="makes its logits"):
            check_projection(model)

    @pytest.mark.parametrize(
        ("model_type", "options"),
        [
            ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
            (
                "llama4_text",
                {"head_dim": 16, "num_key_value_heads": 2, "num_local_experts": 2, "intermediate_size_mlp": 64},
            ),
        ],
    )
    def test_an_architecture_that_goes_round_its_own_backbone_is_refused(self, tiny_model, model_type, options):
        with pytest.raises(UserError, match=f"{model_type}: this architecture"):
            check_projection(tiny_model(model_type, **options))


class TestSampling:
    @pytest.mark.parametrize("model_type", ARCHITECTURES)
    def test_the_same_seed_draws_the_same_text(self, tiny_model, model_type):
        model = tiny_model(model_type)
        draws = [
            sample(model, PROMPTS, max_new_tokens=6, pad_token_id=0, end_token_ids=[2], seed=seed) for seed in (1, 1, 2)
        ]
        assert draws[0] == draws[1] != draws[2]
        assert all(1 <= len(completion) <= 6 for completion in draws[0])
        assert all(2 not in completion[:-1] for completion in draws[0])

    @pytest.mark.parametrize("model_type", [*ARCHITECTURES, *RECURRENT])
    def test_the_states_it_keeps_are_those_of_a_forward_over_the_whole_text(self, tiny_model, model_type):
        model, traces, prompts = tiny_model(model_type), {}, PROMPTS * 10
        how = {"max_new_tokens": 30, "pad_token_id": 0, "end_token_ids": [2], "traces": traces}
        drawn = sample(model, prompts, **how, keep_states=True)
        assert len({len(completion) // SHORTEST_STAGE for completion in drawn}) > 2, "rows end in several stages"
        rows = [prompt + completion for prompt, completion in zip(prompts, drawn, strict=True)]
        expected = policy_forward(model, *pad_right(rows, 0)).detach()
        assert sorted(traces) == list(range(30))
        for index, (prompt, completion) in enumerate(zip(prompts, drawn, strict=True)):
            last = len(prompt) + len(completion) - 1
            states = expected[index, len(prompt) - 1 : last]
            torch.testing.assert_close(traces[index].states, states, atol=1e-5, rtol=1e-4)
            log_probs = project(model, states).log_softmax(-1)[torch.arange(len(completion)), completion]
            torch.testing.assert_close(torch.tensor(traces[index].log_probs), log_probs, atol=1e-4, rtol=1e-4)

    def test_processes_that_round_differently_agree_on_what_was_drawn(self, tiny_model, monkeypatch):
        """The first process's version counts, and states stay with the tokens that they are of."""
        mine = {0: Trace([5, 2], [-1.0, -0.5], torch.ones(2, 4)), 1: Trace([6, 2], [-1.0, -0.5], torch.ones(2, 4))}
        first = {1: Trace([7, 8, 2], [-1.0, -0.5, -0.1], None)}
        monkeypatch.setattr(sampling, "all_gather", lambda item: [first, item])
        sampling._agree(mine)
        assert [mine[index].tokens for index in (0, 1)] == [[5, 2], [7, 8, 2]]
        assert mine[0].states is not None
        assert mine[1].states is None

    def test_a_frozen_output_layer_is_not_copied_for_each_row(self, tiny_model):
        model, seen = get_peft_model(tiny_model(), LoraConfig(target_modules="all-linear", r=2)), []
        head = model.get_base_model().lm_head
        assert not head.weight.requires_grad
        head.register_forward_hook(lambda layer, inputs, output: seen.append(inputs[0].is_contiguous()))
        sample(model, PROMPTS, max_new_tokens=2, pad_token_id=0, end_token_ids=[2])
        assert all(seen), seen
        assert seen

    def test_the_model_s_own_generation_settings_do_not_leak_in(self, tiny_model):
        model = tiny_model()
        plain = sample(model, PROMPTS * 4, max_new_tokens=6, pad_token_id=0, end_token_ids=[2])
        model.generation_config = GenerationConfig(temperature=0.1, top_k=1, repetition_penalty=9.0)
        assert sample(model, PROMPTS * 4, max_new_tokens=6, pad_token_id=0, end_token_ids=[2]) == plain
        assert model.generation_config.top_k == 1

    @pytest.mark.parametrize("guided", [False, True])
    def test_a_batch_that_does_not_fit_into_memory_is_drawn_in_parts(self, tiny_model, caplog, guided):
        model, prompts = tiny_model(), PROMPTS * 8
        with NADOGuide(model, randomise(new_auxiliary(model))) as guide:
            options = {"max_new_tokens": 6, "pad_token_id": 0, "end_token_ids": [2], "guide": guide if guided else None}
            plain = sample(model, prompts, batch_size=20, **options)
            with room_for(model.get_input_embeddings(), 5) as refused:
                assert sample(model, prompts, batch_size=20, **options) == plain
        assert refused == [20, 10]
        assert caplog.text.count("sampling: memory ran out") == 2

    def test_pad_may_equal_the_end_token(self, tiny_model):
        model = tiny_model(vocab_size=4, pad_token_id=2)
        drawn = sample(model, [[1]] * 200, max_new_tokens=3, pad_token_id=2, end_token_ids=[2])
        assert {len(completion) for completion in drawn} == {1, 2, 3}
        assert all(completion[-1] == 2 or len(completion) == 3 for completion in drawn)

    @pytest.mark.parametrize("model_type", [*ARCHITECTURES, *RECURRENT, "minimax"])
    def test_dropping_rows_that_have_ended_changes_no_other(self, tiny_model, model_type, monkeypatch):
        model = tiny_model(model_type)
        options = {"max_new_tokens": 30, "pad_token_id": 0, "end_token_ids": [2]}
        in_stages = sample(model, PROMPTS * 10, **options)
        monkeypatch.setattr("bridle.models.sampling.SHORTEST_STAGE", 30)
        assert sample(model, PROMPTS * 10, **options) == in_stages

    def test_tokens_are_told_as_they_are_drawn(self, tiny_model):
        told = []
        (drawn,) = sample(
            tiny_model(),
            PROMPTS[:1],
            max_new_tokens=20,
            pad_token_id=0,
            end_token_ids=[2],
            on_token=lambda tokens: told.extend(tokens.tolist()),
        )
        assert told == drawn

    def test_samples_follow_the_model_s_distribution(self, world):
        count = 4000
        drawn = sample(
            world.model,
            [world.prompt] * count,
            max_new_tokens=3,
            pad_token_id=0,
            end_token_ids=[2],
            batch_size=1000,
        )
        outputs = list(world.outputs())
        expected = torch.tensor([world.output_probability(y) for y in outputs], dtype=torch.float64)
        assert p_value(drawn, outputs, expected) > 1e-3

    def test_every_end_token_ends_a_completion_and_is_its_last(self, tiny_model):
        model, ends = tiny_model(vocab_size=8), {2, 5}
        drawn = sample(model, [[1]] * 200, max_new_tokens=30, pad_token_id=0, end_token_ids=ends)
        assert all(ends.isdisjoint(completion[:-1]) for completion in drawn)
        assert {completion[-1] for completion in drawn} >= ends

    def test_end_tokens_are_those_of_model_and_tokenizer(self, tiny_model, tiny_tokenizer):
        model = tiny_model(eos_token_id=[7, 9])
        assert end_token_ids(model, tiny_tokenizer) == [2, 7, 9]
        model.generation_config.eos_token_id = 11
        assert end_token_ids(model, tiny_tokenizer) == [2, 11, 7, 9]

    @pytest.mark.parametrize("model_type", ARCHITECTURES)
    def test_left_and_right_padding_give_the_same_logits(self, tiny_model, model_type):
        model = tiny_model(model_type)
        right_ids, right_mask = pad_right(PROMPTS, 0)
        left_ids, left_mask = pad_left(PROMPTS, 0)
        with torch.no_grad():
            right = model(input_ids=right_ids, attention_mask=right_mask).logits
            left = model(input_ids=left_ids, attention_mask=left_mask, position_ids=positions(left_mask)).logits
        for row, prompt in enumerate(PROMPTS):
            torch.testing.assert_close(right[row, : len(prompt)], left[row, -len(prompt) :], atol=1e-5, rtol=1e-4)


class TestGuidance:
    def test_with_the_true_r_samples_follow_p_times_c(self, world):
        """NADO decoding, end to end through `generate`, against p·C normalised."""
        auxiliary = new_auxiliary(world.model)
        auxiliary.forward = lambda states, **_: true_r_logits(world, auxiliary.seen, states)  # type: ignore[method-assign]
        auxiliary.seen = []
        outputs = list(world.outputs())
        target = torch.tensor([world.output_probability(y) * world.constraint(y) for y in outputs], dtype=torch.float64)
        count = 4000
        with NADOGuide(world.model, auxiliary) as guide, torch.no_grad():
            drawn = sample(
                world.model,
                [world.prompt] * count,
                max_new_tokens=3,
                pad_token_id=0,
                end_token_ids=[2],
                batch_size=count,
                guide=Remembering(guide, auxiliary),
            )
        assert all(world.constraint(tuple(y)) == 1 for y in drawn)
        assert p_value(drawn, outputs, target / target.sum()) > 1e-3
        plain = torch.tensor([world.output_probability(y) for y in outputs], dtype=torch.float64)
        assert 0.05 < float(target.sum()) < 0.95, "the constraint must say something"
        assert (target / target.sum() - plain).abs().max() > 0.02

    def test_temperature_and_top_p_come_after_guidance(self, tiny_model):
        """Draws from (q^(1/T)) cut to its nucleus; greedy takes the likeliest of q, whatever the seed."""
        model, prompt, count = tiny_model(initializer_range=0.3), [1, 5, 9], 4000
        auxiliary = randomise(new_auxiliary(model))
        options = {"max_new_tokens": 1, "pad_token_id": 0, "end_token_ids": [2], "batch_size": count}
        with NADOGuide(model, auxiliary) as guide, torch.no_grad():
            ids = torch.tensor([prompt])
            plain = model(ids).logits
            auxiliary.head.bias[plain[0, -1].argmax()] -= 7.0  # it has something to say of a likely token
            log_q = guide.log_probs(plain, ids, torch.ones_like(ids))[0, -1].double()
            tempered = (log_q / 0.5).softmax(-1)
            ordered, tokens = tempered.sort(descending=True)
            nucleus = tokens[ordered.cumsum(-1) - ordered < 0.8]
            expected = torch.zeros_like(tempered).scatter(0, nucleus, tempered[nucleus])
            expected /= expected.sum()
            decoding = Decoding(temperature=0.5, top_p=0.8)
            drawn = sample(model, [prompt] * count, guide=guide, decoding=decoding, **options)
            greedy = [
                sample(model, [prompt], guide=guide, decoding=Decoding(greedy=True), seed=s, **options) for s in "ab"
            ]
        outputs = [(token,) for token in range(len(expected))]
        assert p_value(drawn, outputs, expected) > 1e-3
        assert 1 < len(nucleus) < len(expected) / 2
        assert greedy == [[[int(log_q.argmax())]]] * 2
        in_the_other_order = (plain[0, -1].double().log_softmax(-1) + log_q).softmax(-1)  # p^(1/T)·R
        assert (in_the_other_order - tempered).abs().sum() > 0.1

    def test_a_new_own_network_says_the_same_each_time(self, tiny_model):
        """A regulariser of another process, or of a resumed run, takes the weights of an R that it has not fitted."""
        auxiliary, ids = new_auxiliary(tiny_model("gpt2", resid_pdrop=0.5), own_network=True), torch.tensor([[1, 5, 9]])
        first, again = (auxiliary.states(None, ids, torch.ones_like(ids)) for _ in range(2))
        assert torch.equal(first, again)

    def test_an_own_network_of_a_model_that_sees_is_its_language_model(self):
        size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        text = {**size, "vocab_size": 64, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64}
        tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "image_token_id": 63}
        vision = {**size, "image_size": 28, "patch_size": 14}
        config = AutoConfig.for_model("gemma3", text_config={**text, **tokens}, vision_config=vision, **tokens)
        model, ids = AutoModelForCausalLM.from_config(config).eval(), torch.tensor([[1, 5, 9]])
        auxiliary = new_auxiliary(model, own_network=True)
        with torch.no_grad(), capture_hidden_states(model) as hidden:
            model(ids)
            torch.testing.assert_close(auxiliary.states(None, ids), auxiliary.norm(hidden.last))

    @pytest.mark.parametrize("own_network", [False, True])
    @pytest.mark.parametrize("memory", [0, 8])
    @pytest.mark.parametrize("model_type", [*ARCHITECTURES, *RECURRENT, "mistral"])
    def test_step_by_step_equals_all_at_once(self, tiny_model, model_type, memory, own_network):
        """Also after some of the rows have ended, and sampling has gone on with the others."""
        model = tiny_model(model_type)
        auxiliary = randomise(new_auxiliary(model, memory=memory, own_network=own_network))
        recorded = []

        class Recording(NADOGuide):
            def processors(self, attention_mask):
                processors = super().processors(attention_mask)
                processors.append(lambda ids, scores: recorded.append((ids, scores)) or scores)
                return processors

        prompts = PROMPTS * 8
        width = max(map(len, prompts))
        with Recording(model, auxiliary) as guide:
            sample(model, prompts, max_new_tokens=18, pad_token_id=0, end_token_ids=[2], guide=guide)
            assert len(recorded) == 18
            assert len(recorded[-1][0]) < len(prompts), "some rows have ended"
            for ids, scores in recorded[::17]:
                mask = (ids.ne(0).cumsum(-1) > 0).long()  # a prompt has no padding token
                with torch.no_grad():
                    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions(mask)).logits
                    states = auxiliary.states(guide._hidden.last, ids, mask, position_ids=positions(mask))
                    if memory:
                        entries = auxiliary.memory.entries(states[:, width - 1 :])
                        states = auxiliary.memory(states[:, -1], entries.max(1).values)[:, None]
                    r_logits = auxiliary(states[:, -1])
                expected = (logits[:, -1].log_softmax(-1) + r_logits.sigmoid().log()).log_softmax(-1)
                torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("violate", [False, True])
    @pytest.mark.parametrize("own_network", [False, True])
    def test_so_does_the_log_linear_form(self, tiny_model, violate, own_network):
        model, ids = tiny_model(initializer_range=0.1), torch.tensor([[1, 5, 9]])
        auxiliary = randomise(new_auxiliary(model, memory=8, own_network=own_network, form="log-linear"), scale=0.1)
        auxiliary.value.bias.data.fill_(-1.0)
        begins, recorded = torch.tensor([[False, False, True]]), []
        with NADOGuide(model, auxiliary, 1.5, violate) as guide:
            processors = guide.processors(torch.ones_like(ids))
            processors.append(lambda seen, scores: recorded.append((seen, scores)) or scores)
            model.generate(ids, attention_mask=torch.ones_like(ids), logits_processor=processors, max_new_tokens=5)
            assert len(recorded) > 1
            for seen, scores in recorded:
                at = torch.nn.functional.pad(begins, (0, seen.shape[1] - 3))
                with torch.no_grad():
                    logits = model(seen).logits
                expected = guide.log_probs(logits, seen, torch.ones_like(seen), at)[:, -1]
                torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("form", ["sigmoid", "log-linear"])
    def test_a_fresh_auxiliary_changes_nothing(self, tiny_model, form):
        model = tiny_model()
        plain = sample(model, PROMPTS, max_new_tokens=6, pad_token_id=0, end_token_ids=[2])
        with NADOGuide(model, new_auxiliary(model, form=form)) as guide:
            assert sample(model, PROMPTS, max_new_tokens=6, pad_token_id=0, end_token_ids=[2], guide=guide) == plain

    def test_its_power_is_finite_and_0_or_more(self, tiny_model):
        for power in (0.0, 0.5):
            with guided(tiny_model(), None, power) as guide:
                assert guide is None
        for power in (-0.1, float("inf")):
            with (
                pytest.raises(UserError, match="guidance_scale: must be a finite number"),
                guided(tiny_model(), None, power),
            ):
                pass

    @pytest.mark.parametrize("memory", [0, 8])
    def test_it_works_with_generate_and_beams(self, tiny_model, memory):
        model = tiny_model()
        auxiliary = randomise(new_auxiliary(model, memory=memory, own_network=True))
        ids = torch.tensor([[1, 5, 9]])

        def without_a_cache(seen, scores):
            begins = torch.arange(seen.shape[1])[None].expand_as(seen) == ids.shape[1] - 1
            features = auxiliary.features(torch.empty(0), seen, None, begins)
            return log_target(scores, auxiliary(features[:, -1]))

        with NADOGuide(model, auxiliary) as guide:
            beams, same = (
                model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    num_beams=3,
                    do_sample=False,
                    max_new_tokens=8,
                    logits_processor=processors,
                )
                for processors in (guide.processors(torch.ones_like(ids)), [without_a_cache])
            )
            log_q = guide.log_probs  # greedy by hand agrees with one beam
            greedy = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=4,
                logits_processor=guide.processors(torch.ones_like(ids)),
            )
            by_hand = ids
            for _ in range(4):
                with torch.no_grad():
                    logits = model(input_ids=by_hand).logits
                    begins = torch.arange(by_hand.shape[1])[None] == ids.shape[1] - 1
                    step = log_q(logits, by_hand, torch.ones_like(by_hand), begins)[:, -1].argmax(-1)
                by_hand = torch.cat([by_hand, step[:, None]], dim=1)
                if step == 2:
                    break
        assert greedy[0, : by_hand.shape[1]].tolist() == by_hand[0].tolist()
        assert torch.equal(beams, same)


def test_rows_that_go_on_are_known_by_their_tokens(tiny_model):
    model = tiny_model()
    with capture_hidden_states(model) as hidden:
        processor = NADOLogitsProcessor(new_auxiliary(model), hidden, torch.ones(3, 2))
        ids = torch.tensor([[1, 5], [1, 6], [1, 7]])
        assert processor._parents(ids) is None
        ids = torch.cat([ids, torch.tensor([[8], [9], [8]])], dim=1)
        assert processor._parents(ids).tolist() == [0, 1, 2]
        ids = torch.cat([ids[[2, 0, 2]], torch.tensor([[3], [4], [5]])], dim=1)
        assert processor._parents(ids).tolist() == [2, 0, 2]
        ids = torch.cat([ids[[1]], torch.tensor([[3]])], dim=1)
        assert processor._parents(ids).tolist() == [1]
        assert processor._parents(torch.tensor([[1, 6, 8, 4, 3, 3]])) is None, "a row that was not there"


class TestAuxiliary:
    @pytest.mark.parametrize(
        "options", [{}, {"head_rank": 4}, {"depth": 3}, {"memory": 8}, {"own_network": True}, {"form": "log-linear"}]
    )
    def test_it_survives_saving(self, tiny_model, tmp_path, options):
        model = tiny_model()
        auxiliary = randomise(new_auxiliary(model, **options))
        auxiliary.save_pretrained(tmp_path)
        assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
        loaded = load_auxiliary(tmp_path, model)
        assert isinstance(AutoModel.from_pretrained(tmp_path), AuxiliaryModel)
        ids = torch.randint(3, 60, (2, 5))
        with torch.no_grad(), capture_hidden_states(model) as hidden:
            logits = model(input_ids=ids).logits
            before, after = (a(a.features(hidden.last, ids), anchor_logits=logits) for a in (auxiliary, loaded))
        assert before.shape == (2, 5, 64)
        torch.testing.assert_close(after, before)

    def test_a_memory_keeps_the_largest_entry_since_the_completion_began(self):
        entries = torch.tensor([0.9, -0.5, 0.2, -0.1, -0.9, -0.8])[None, :, None]
        begins = torch.tensor([[False, True, False, False, True, False]])
        kept = largest_so_far(entries, begins)[0, :, 0]
        torch.testing.assert_close(kept, torch.tensor([0.9, -0.5, 0.2, 0.2, -0.9, -0.8]))
        torch.testing.assert_close(largest_so_far(entries, None)[0, :, 0], torch.full((6,), 0.9))

    def test_what_was_said_before_the_completion_is_not_kept(self, tiny_model):
        auxiliary = randomise(new_auxiliary(tiny_model(), memory=8))
        states = torch.randn(1, 6, 32)
        elsewhere = torch.cat([torch.randn(1, 2, 32), states[:, 2:]], dim=1)
        for begins in (torch.tensor([[False, False, True, False, False, False]]), None):
            one, other = (auxiliary.features(each, begins=begins) for each in (states, elsewhere))
            assert torch.equal(one[:, 2:], other[:, 2:]) == (begins is not None)

    def test_one_token_s_r_is_the_whole_vocabulary_s_entry(self, tiny_model):
        auxiliary = randomise(new_auxiliary(tiny_model(), head_rank=4))
        features, tokens = torch.randn(2, 5, 32), torch.randint(64, (2, 5))
        whole = auxiliary(features).gather(-1, tokens[..., None]).squeeze(-1)
        torch.testing.assert_close(auxiliary(features, tokens), whole)

    def test_the_log_linear_form(self, tiny_model):
        """Its mean over p's next tokens is R itself, and its q is p's with r added to the logits."""
        model = tiny_model(initializer_range=0.1)
        auxiliary = randomise(new_auxiliary(model, memory=8, form="log-linear"), scale=0.1)
        auxiliary.value.bias.data.fill_(-3.0)  # so that no R is above 1
        ids, tokens = torch.randint(3, 60, (2, 5)), torch.randint(64, (2, 5))
        with torch.no_grad(), capture_hidden_states(model) as hidden:
            logits = model(input_ids=ids).logits
            features = auxiliary.features(hidden.last)
            r_logits, p = auxiliary(features, anchor_logits=logits), logits.softmax(-1)
            torch.testing.assert_close((p * r_logits.sigmoid()).sum(-1), auxiliary.values(features).sigmoid())
            assert not auxiliary.excess(r_logits).any()
            taken = r_logits.gather(-1, tokens[..., None]).squeeze(-1)
            torch.testing.assert_close(auxiliary(features, tokens, logits), taken)
            for scale in (1.0, 2.5):
                log_q = auxiliary.log_q(features, logits, scale)
                torch.testing.assert_close(log_q, log_target(logits, r_logits, scale), atol=1e-5, rtol=1e-5)
                added = hidden.last @ auxiliary.output_change().T
                torch.testing.assert_close(log_q, (logits + scale * added).log_softmax(-1), atol=1e-5, rtol=1e-5)
            violating = (p * (1 - r_logits.sigmoid())).log().log_softmax(-1)
            torch.testing.assert_close(auxiliary.log_q(features, logits, violate=True), violating)

    def test_an_r_above_1_is_measured_and_has_a_gradient(self):
        log_r = torch.tensor([-2.0, -1e-2, 0.0, 0.5], requires_grad=True)
        r_logits = log_linear.logit_of(log_r)
        torch.testing.assert_close(r_logits[:2], log_r[:2].exp().logit(), atol=1e-4, rtol=1e-4)
        above = torch.tensor([0.0, 0.0, 0.0, math.exp(0.5) - 1])
        torch.testing.assert_close(log_linear.excess(r_logits), above, atol=1e-5, rtol=1e-5)
        assert (torch.autograd.grad(r_logits.sum(), log_r)[0] >= 1).all()

    def test_a_new_log_linear_r_reads_numbers_of_size_one(self, tiny_model):
        auxiliary, states = new_auxiliary(tiny_model(), form="log-linear"), torch.randn(4, 9, 32) * torch.arange(1, 33)
        auxiliary.scale_to(states)
        read = auxiliary.features(states)[..., 32:]
        torch.testing.assert_close(read.square().mean((0, 1)), torch.ones(32))
        randomise(auxiliary).scale_to(3 * states)
        torch.testing.assert_close(auxiliary.features(states)[..., 32:], read)

    def test_a_folder_that_does_not_fit_is_refused(self, tiny_model, tmp_path):
        new_auxiliary(tiny_model(vocab_size=32)).save_pretrained(tmp_path / "a")
        with pytest.raises(UserError, match="vocabulary of 32 tokens, the model has 64"):
            load_auxiliary(tmp_path / "a", tiny_model())
        with pytest.raises(UserError, match=f"no auxiliary model here; name {tmp_path / 'a'}$"):
            load_auxiliary(tmp_path, tiny_model())
        tiny_model().save_pretrained(tmp_path / "model")
        with pytest.raises(UserError, match=r"model: no auxiliary model here$"):
            load_auxiliary(tmp_path / "model", tiny_model())
        with pytest.raises(UserError, match="no auxiliary model here"):
            load_auxiliary(tmp_path / "nothing", tiny_model())


class TestAnchor:
    def test_it_is_the_model_as_it_was(self, tiny_model):
        model, ids = tiny_model(), torch.randint(3, 60, (2, 5))
        before = model(input_ids=ids).logits.detach()
        anchor = Anchor(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1)
        now = model(input_ids=ids).logits.detach()
        with anchor.active():
            torch.testing.assert_close(model(input_ids=ids).logits, before)
        torch.testing.assert_close(model(input_ids=ids).logits.detach(), now)
        assert not torch.allclose(now, before)

    def test_a_new_one_replaces_the_last_parameter_by_parameter(self, tiny_model, monkeypatch):
        model, alive, clone = tiny_model(), [], torch.Tensor.clone
        anchor = Anchor(model)
        last = [weakref.ref(weight) for weight in anchor.weights.values()]

        def counted(tensor):
            alive.append(sum(weight() is not None for weight in last))
            return clone(tensor)

        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1)
        monkeypatch.setattr(torch.Tensor, "clone", counted)
        anchor.refresh()
        assert alive == [*range(len(last), 0, -1)]
        assert all(torch.equal(anchor.weights[name], parameter) for name, parameter in model.named_parameters())

    def test_it_moves_with_the_model(self, tiny_model):
        anchor = Anchor(tiny_model())
        anchor.to("meta")
        assert {weight.device.type for weight in anchor.weights.values()} == {"meta"}

    def test_with_lora_it_holds_the_adapter_alone_and_is_no_base_model(self, tiny_model):
        model = get_peft_model(tiny_model(), LoraConfig(target_modules="all-linear", r=2))
        ids = torch.randint(3, 60, (2, 5))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:  # as if trained before
                    parameter.normal_()
        before = model(input_ids=ids).logits.detach()
        anchor = Anchor(model)
        assert all("lora" in name for name in anchor.state_dict())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.zero_()
        with anchor.active():
            torch.testing.assert_close(model(input_ids=ids).logits, before)

    def test_it_does_not_disturb_a_graph_that_is_under_way(self, tiny_model):
        model, ids = tiny_model(), torch.randint(3, 60, (2, 5))
        anchor = Anchor(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        gradients = []
        for interrupt in (False, True):
            model.zero_grad()
            loss = model(input_ids=ids).logits.logsumexp(-1).sum()
            if interrupt:
                with anchor.active():
                    model(input_ids=ids)
            loss.backward()
            gradients.append([p.grad.clone() for p in model.parameters()])
        for plain, interrupted in zip(*gradients, strict=True):
            assert torch.equal(plain, interrupted)


@pytest.fixture
def hub_cache(monkeypatch, tmp_path):
    """A factory of folders in which the hub's cache keeps a repository: hub_cache("me/adapter")."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def make(name):
        repository, commit = tmp_path / "hub" / f"models--{name.replace('/', '--')}", "0" * 40
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(commit)
        (repository / "snapshots" / commit).mkdir(parents=True)
        return repository / "snapshots" / commit

    return make


class TestLoading:
    def test_a_folder_and_an_adapter_folder(self, tiny_model, tmp_path):
        tiny_model().save_pretrained(tmp_path / "base")
        tuned = load_model(str(tmp_path / "base"), lora=LoraOptions(r=2))
        assert {p.dtype for p in tuned.parameters()} == {torch.float32}
        tuned.save_pretrained(tmp_path / "adapter")
        assert load_model(str(tmp_path / "adapter")).peft_config["default"].r == 2
        with pytest.raises(UserError, match="is an adapter already"):
            load_model(str(tmp_path / "adapter"), lora=LoraOptions())

    def test_an_adapter_on_the_hub(self, tiny_folder, hub_cache, tmp_path):
        base = str(tiny_folder())
        tuned = load_model(base, lora=LoraOptions(r=2))
        torch.nn.init.normal_(tuned.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight)
        tuned.save_pretrained(hub_cache("me/adapter"))
        found, ids = load_model("me/adapter", revision="main"), torch.tensor([[5, 6, 7]])
        assert isinstance(found, PeftModel)
        torch.testing.assert_close(found(ids).logits, tuned(ids).logits)
        assert load_tokenizer("me/adapter")("a") == load_tokenizer(base)("a")
        assert load_config("me/adapter").model_type == "llama"
        with pytest.raises(UserError, match="me/adapter: is an adapter already"):
            load_model("me/adapter", lora=LoraOptions())
        pickled = hub_cache("me/pickled")
        tuned.save_pretrained(pickled)
        (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
        with pytest.raises(UserError, match=r"me/pickled: cannot load the adapter: it holds no adapter_model\.safet"):
            load_model("me/pickled")

    def test_a_folder_without_weights_and_a_pickle_are_refused_in_one_line(self, tiny_model, tmp_path):
        model = tiny_model()
        model.config.save_pretrained(tmp_path / "empty")
        with pytest.raises(UserError, match=r"empty: cannot load the model: the folder holds no weights"):
            load_model(str(tmp_path / "empty"))
        model.save_pretrained(tmp_path / "run" / "model")
        with pytest.raises(UserError, match=f"run: .*; a run's model is {tmp_path / 'run' / 'model'}$"):
            load_model(str(tmp_path / "run"))
        model.config.save_pretrained(tmp_path / "pickled")
        torch.save(model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
        with pytest.raises(UserError, match=r"pickled; convert them"):
            load_model(str(tmp_path / "pickled"))
        with pytest.raises(UserError, match="no such folder, and no model of that name could be fetched") as error:
            load_model("nowhere")
        assert "\n" not in str(error.value)

    def test_a_hub_that_cannot_be_reached_is_asked_once(self, monkeypatch):
        asked = []
        monkeypatch.setattr(loading, "cached_file", lambda *args, **_: asked.append(args) or cached_file(*args))
        with pytest.raises(UserError, match=r"^nobody/nothing: no such folder, and no model of that name could be"):
            load_tokenizer("nobody/nothing")
        assert asked == [("nobody/nothing", "adapter_config.json")]

    @pytest.mark.parametrize("name", ["/nowhere", "./nowhere", "../nowhere", "nowhere/", "a.json", "a.gguf"])
    def test_of_what_can_only_be_a_path_the_hub_is_not_asked(self, name, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("socket.getaddrinfo", None)
        with pytest.raises(UserError, match=r"cannot load the model: no such folder$|a.gguf: no such file; "):
            load_model(name)

    def test_a_hub_name_may_begin_as_a_folder_here(self, tiny_tokenizer, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "nobody").mkdir()
        monkeypatch.setattr(loading, "cached_file", lambda *_, **__: None)
        monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", lambda name, **_: tiny_tokenizer)
        assert load_tokenizer("nobody/nothing") is tiny_tokenizer

    def test_weights_in_fp8_are_checked(self, tiny_model, tiny_tokenizer):
        model = tiny_model(vocab_size=len(tiny_tokenizer))
        layer = model.model.layers[0].mlp.up_proj
        layer.weight = torch.nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
        check_model(model, tiny_tokenizer, "tiny")
        layer.weight.data[0, 0] = math.nan
        with pytest.raises(UserError, match=r"'model\.layers\.0\.mlp\.up_proj\.weight' hold numbers that are not"):
            check_model(model, tiny_tokenizer, "tiny")

    def test_an_unknown_dtype(self, tiny_model, tmp_path):
        with pytest.raises(UserError, match="dtype: 'int8'"):
            load_model(str(tmp_path), dtype="int8")

    # ---------------------------------------------------------------------- helpers

    @pytest.mark.parametrize(
        ("capability", "dtype", "warned"),
        [("AVX2", "bfloat16", True), ("AVX2", "float32", False), ("AVX512", "bfloat16", False)],
    )
    def test_half_precision_without_instructions_for_it_is_warned_of(
        self, tiny_folder, monkeypatch, caplog, capability, dtype, warned
    ):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        load_for_inference(str(tiny_folder()), dtype, "cpu")
        assert ("no instructions for bfloat16; float32 is several times faster" in caplog.text) == warned


class Remembering:
    """Tells the stand-in for R which tokens the scores are for."""

    def __init__(self, guide, auxiliary):
        self.guide, self.auxiliary = guide, auxiliary

    def processors(self, attention_mask):
        processors = self.guide.processors(attention_mask)
        processors.insert(0, lambda ids, scores: setattr(self.auxiliary, "seen", ids) or scores)
        return processors


def true_r_logits(world, input_ids, states):
    """The true R of every continuation of the last position, as logits. [batch, vocabulary]"""
    rows = []
    for row in input_ids[:, len(world.prompt) :].tolist():
        unfinished = not row or not world.finished(tuple(row))
        r = [world.true_r((*row, v)) if unfinished else 1.0 for v in range(world.vocabulary)]
        rows.append(torch.tensor(r).clamp(1e-30, 1 - 1e-7).logit())
    return torch.stack(rows)


def p_value(drawn, outputs, expected):
    """Chi-square test of samples against exact probabilities; rare outputs are pooled."""
    counts = Counter(tuple(y) for y in drawn)
    assert set(counts) <= set(outputs)
    observed = torch.tensor([float(counts[y]) for y in outputs], dtype=torch.float64)
    expected = expected * len(drawn)
    rare = expected < 5
    pooled = [
        torch.cat([values[~rare], values[rare].sum()[None]]) if rare.any() else values
        for values in (observed, expected)
    ]
    keep = pooled[1] > 0
    assert pooled[0][~keep].sum() == 0
    return chisquare(pooled[0][keep].numpy(), (pooled[1][keep] * (pooled[0].sum() / pooled[1].sum())).numpy()).pvalue
