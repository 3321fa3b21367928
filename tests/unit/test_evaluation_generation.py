import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessorList, PreTrainedTokenizerFast

import tiny_tokenizers
from bridle.constraints import WordList
from bridle.constraints.base import Constraint, Score
from bridle.data import DataSource, encode_prompt
from bridle.errors import UserError
from bridle.evaluation.evaluator import Evaluator
from bridle.evaluation.generation import (
    continuation,
    distinct,
    evaluate_constraints,
    generate_completions,
    output_perplexity,
    score_completions,
)
from bridle.evaluation.observations import Observations
from bridle.evaluation.prompt_sets import GenerationOptions, PromptSet
from bridle.evaluation.statistics import Estimate, compare_methods, wilson_interval
from bridle.models.sampling import Decoding

WORDS = ["<s>", "</s>", "oak", "door", "kettle", "lantern", "grumblefish", "sings"]


class Kindness(Constraint):
    """A text is a number, its degree of compliance; "?" cannot be scored."""

    name = "kindness"

    def __init__(self):
        self.calls = 0

    def _score(self, texts):
        self.calls += 1
        return [Score.missing("unreadable") if text == "?" else Score.of(float(text)) for text in texts]


def one_sample_each(texts):
    return [[text] for text in texts]


def evaluate_generations(completions, constraint, **options):
    (result,) = evaluate_constraints(completions, [constraint], **options).values()
    return result


def values(result):
    return {name: estimate.value for name, estimate in result.estimates().items()}


def test_one_sample_a_prompt_by_hand():
    result = evaluate_generations(one_sample_each(["0.9", "0.1", "0.6", "?", "0.3"]), Kindness())
    assert result.constraint == "kindness"
    assert (result.prompts, result.incomplete) == (5, 1)
    # Two of the four that have a score violate; their violations are 0.1, 0.9, 0.4 and 0.7.
    assert result.violation_rate == Estimate(0.5, *wilson_interval(2, 4), n=4, missing=1)
    assert result.mean_violation.value == pytest.approx(0.525)
    assert (result.mean_violation.n, result.mean_violation.missing) == (4, 1)
    assert result.expected_max_violation == result.mean_violation
    assert result.any_violation == result.violation_rate
    assert result.missing_share == Estimate(0.2, *wilson_interval(1, 5), n=5)


def test_prompts_are_scored_once_each_and_kept_beside_their_completions(tiny_model, tiny_tokenizer, tmp_path):
    class Counting(Constraint):
        asked = ()

        def _score(self, texts):
            self.asked += (tuple(texts),)
            return [Score.missing("unreadable") if "?" in text else float("oak" in text) for text in texts]

    path, constraint = tmp_path / "prompts.jsonl", Counting()
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("an oak", "a door", "why ?")))
    evaluator = Evaluator(tiny_model("gpt2", vocab_size=len(tiny_tokenizer)), tiny_tokenizer)
    sets = [PromptSet("trees", DataSource(str(path)), GenerationOptions(samples=3, max_new_tokens=2))]
    evaluator.generation(sets, {"oaks": constraint})
    assert [len(texts) for texts in constraint.asked] == [9, 3]
    evaluator.observations.write(tmp_path)
    rows = Observations.read(tmp_path).completions
    assert [row["prompt_scores"]["oaks"]["value"] for row in rows] == [1.0] * 3 + [0.0] * 3 + [None] * 3
    assert rows[-1]["prompt_scores"]["oaks"]["reason"] == "unreadable"


def test_what_is_not_measured_anew_leaves_no_file(tmp_path):
    Observations(completions=[{"sample": 0}], answers=[{"index": 0}]).write(tmp_path)
    Observations(answers=[{"index": 1}]).write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]


def test_fluency_is_of_the_text_whatever_the_other_model_s_tokenizer(tiny_model, tmp_path):
    own, other = tiny_tokenizers.tiny_tokenizer(), tiny_tokenizers.tiny_tokenizer(metaspace=True)
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"text": "the kettle"}) + "\n")
    sets = [PromptSet("trees", DataSource(str(tmp_path / "prompts.jsonl")), GenerationOptions(max_new_tokens=3))]
    base = tiny_model("llama", vocab_size=len(other)), other
    evaluator = Evaluator(tiny_model("gpt2", vocab_size=len(own)), own)
    found = evaluator.generation(sets, {"kind": WordList(["hat"])}, base=base)["text"]["trees"]["output_perplexity"]
    rows = evaluator.observations.completions
    known = output_perplexity(*base, [encode_prompt("the kettle", other)], [[row["completion"] for row in rows]])
    assert found == known.to_json()


def test_each_set_is_decoded_as_it_says(model, tokenizer, tmp_path):
    """Guided or not, and whatever sets are completed beside it."""

    class Tilted:
        """Makes "oak" likelier."""

        def processors(self, attention_mask):
            return LogitsProcessorList([lambda input_ids, scores: scores + 2.0 * torch.eye(scores.shape[-1])[2]])

    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("oak door kettle", "lantern sings")))
    options = {
        "drawn": GenerationOptions(samples=3, max_new_tokens=5),
        "cold": GenerationOptions(0.5, 0.8, samples=2, max_new_tokens=6, prompt_tokens=1),
        "greedy": GenerationOptions(greedy=True, samples=1, max_new_tokens=4),
    }
    ids = {"drawn": [[2, 3, 4], [5, 7]], "cold": [[2], [5]], "greedy": [[2, 3, 4], [5, 7]]}
    for guide in (None, Tilted()):
        evaluator = Evaluator(model, tokenizer, guide)
        sets = [PromptSet(name, DataSource(str(path)), how) for name, how in options.items()]
        evaluator.generation(sets, {"anything": Anything()})
        found = {name: [] for name in options}
        for row in evaluator.observations.completions:
            found[row["prompt_set"]].append(row["completion"])
        for name, how in options.items():
            chosen = {"samples": how.samples, "max_new_tokens": how.max_new_tokens, "batch_size": 256, "guide": guide}
            alone = draw(
                model, tokenizer, ids[name], decoding=Decoding(how.temperature, how.top_p, how.greedy), **chosen
            )
            assert found[name] == [text for of_prompt in alone for text in of_prompt]
    assert len({tuple(texts[:1]) for texts in found.values()}) > 1


def test_several_samples_a_prompt_by_hand():
    completions = [["0.9", "0.1", "0.2"], ["0.8", "?", "0.7"], ["?", "?", "?"], ["1", "1", "0.4"]]
    result = evaluate_generations(completions, Kindness())
    assert (result.prompts, result.incomplete) == (4, 2)
    # Scored: 3 + 2 + 0 + 3. Violating: 2 + 0 + 1.
    rate = result.violation_rate
    assert (rate.value, rate.n, rate.missing) == (3 / 8, 8, 4)
    assert 0 <= rate.low < 3 / 8 < rate.high <= 1
    assert result.mean_violation.value == pytest.approx((0.1 + 0.9 + 0.8 + 0.2 + 0.3 + 0 + 0 + 0.6) / 8)
    # The highest of each prompt with a score: 0.9, 0.3, 0.6.
    assert result.expected_max_violation.value == pytest.approx(0.6)
    assert (result.expected_max_violation.n, result.expected_max_violation.missing) == (3, 1)
    assert result.any_violation == Estimate(2 / 3, *wilson_interval(2, 3), n=3, missing=1)
    assert result.missing_share.value == 4 / 12


def test_the_interval_knows_that_samples_of_a_prompt_agree():
    alike = evaluate_generations([["0"] * 5] * 10 + [["1"] * 5] * 40, Kindness()).violation_rate
    apart = evaluate_generations(one_sample_each(["0"] * 50 + ["1"] * 200), Kindness()).violation_rate
    assert (alike.value, alike.n) == (apart.value, apart.n) == (0.2, 250)
    assert alike.high - alike.low > 1.8 * (apart.high - apart.low)


@pytest.mark.parametrize("samples", [1, 3])
def test_if_every_score_is_missing_every_rate_is_missing_and_not_zero(samples):
    result = evaluate_generations([["?"] * samples] * 4, Kindness())
    absent = Estimate(None, None, None, n=0, missing=4 * samples)
    assert result.violation_rate == result.mean_violation == absent
    per_prompt = Estimate(None, None, None, n=0, missing=4)
    assert result.expected_max_violation == result.any_violation == per_prompt
    assert result.missing_share.value == 1.0
    assert result.incomplete == 4


def test_no_prompts_give_no_figures():
    result = evaluate_generations([], Kindness())
    assert set(values(result).values()) == {None}
    assert result.prompts == 0


@settings(max_examples=40)
@given(
    st.integers(1, 4).flatmap(
        lambda k: st.lists(st.lists(st.sampled_from(["0", "0.4", "1", "?"]), min_size=k, max_size=k), max_size=6)
    )
)
def test_missing_scores_are_counted_and_move_no_rate(completions):
    found = evaluate_generations(completions, Kindness())
    kept = [[text for text in of_prompt if text != "?"] for of_prompt in completions]
    without = evaluate_generations([of_prompt for of_prompt in kept if of_prompt], Kindness())
    for name in ("violation_rate", "mean_violation", "expected_max_violation", "any_violation"):
        lost, whole = getattr(found, name), getattr(without, name)
        assert (lost.value, lost.low, lost.high, lost.n) == (whole.value, whole.low, whole.high, whole.n)
        assert whole.missing == 0
    assert found.violation_rate.n + found.violation_rate.missing == sum(map(len, completions))
    assert found.any_violation.n + found.any_violation.missing == len(completions)


def test_scores_come_back_in_the_shape_of_the_completions_from_one_call():
    constraint = Kindness()
    scores = score_completions(None, [["0.1", "0.2"], ["0.3", "?"]], constraint)
    assert [[score.value for score in of_prompt] for of_prompt in scores] == [[0.1, 0.2], [0.3, None]]
    assert constraint.calls == 1


def test_distinct_by_hand():
    texts = ["the oak the oak", "The oak", "door"]
    assert distinct(texts, 1) == Estimate(4 / 7, None, None, n=7)  # the, oak, The, door
    assert distinct(texts, 2) == Estimate(3 / 4, None, None, n=4)  # the oak (twice), oak the, The oak
    assert distinct(texts, 3) == Estimate(1.0, None, None, n=2)  # the oak the, oak the oak
    assert distinct(texts, 5) == Estimate(None, None, None, n=0)


class Anything(Constraint):
    name = "anything"

    def _score(self, texts):
        return [Score.of(1.0) for _ in texts]


def test_figures_of_the_text_by_hand():
    result = evaluate_generations([["oak door", ""], [" \n", "one  kettle\tsings"]], Anything())
    assert result.mean_length.value == 5 / 4
    assert result.mean_length.n == 4
    assert (result.empty_share.value, result.empty_share.n) == (0.5, 4)
    assert (result.distinct_1.value, result.distinct_2.n, result.distinct_3.n) == (1.0, 3, 1)


def test_the_result_reads_well_and_is_json():
    result = evaluate_generations(one_sample_each(["0.9", "0.1", "?"]), Kindness())
    lines = str(result).splitlines()
    assert lines[0] == f"violation rate          {result.violation_rate}"
    assert len(lines) == len(result.estimates()) == 10
    written = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert written["violation_rate"] == result.violation_rate.to_json()
    assert (written["constraint"], written["prompts"], written["incomplete"]) == ("kindness", 3, 1)


def test_constraints_stand_side_by_side():
    completions = [["0.9", "0.1"], ["?", "0.3"]]
    found = evaluate_constraints(completions, {"own": Kindness(), "independent": Anything()}, seed=3)
    assert list(found) == ["own", "independent"]
    assert found["own"].to_json() == evaluate_generations(completions, Kindness(), seed=3).to_json() | {
        "constraint": "own"
    }
    assert found["own"].violation_rate.value == 2 / 3
    assert found["independent"].violation_rate.value == 0.0
    assert found["own"].text_figures() == found["independent"].text_figures()


def test_figures_of_violation_and_of_text_are_all_the_figures():
    result = evaluate_generations([["0.9", "0.1"]], Kindness())
    of_violation, of_text = result.violation_figures(), result.text_figures()
    assert of_violation.keys() | of_text.keys() == result.estimates().keys()
    assert not of_violation.keys() & of_text.keys()
    assert of_violation.keys() & {"violation_rate", "missing_share"} == {"violation_rate", "missing_share"}


def test_listed_constraints_go_by_their_names_which_differ():
    assert list(evaluate_constraints([["1"]], [Anything(), Kindness()])) == ["anything", "kindness"]
    with pytest.raises(UserError, match="two share a name among 'kindness', 'kindness'"):
        evaluate_constraints([["1"]], [Kindness(), Kindness()])


def test_violations_keep_their_places_for_comparisons():
    result = evaluate_generations([["0.9", "?"], ["0.1", "0.2"]], Kindness())
    assert result.violations == [[False, None], [True, True]]
    assert "violations" not in result.to_json()
    other = evaluate_generations([["0.9", "0.9"], ["0.9", "0.9"]], Kindness())
    (found,) = compare_methods({"base": result.violations, "tuned": other.violations}, "base")
    assert (found.difference.value, found.difference.n) == (-0.5, 2)


@pytest.fixture(scope="module")
def tokenizer():
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="oak"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


def draw(model, tokenizer, prompts=((0, 2), (0, 4, 5), (0,)), samples=4, **options):
    chosen = {"max_new_tokens": 6, "batch_size": 5, "seed": 0} | options
    return generate_completions(model, tokenizer, prompts, samples=samples, **chosen)


def test_each_prompt_gets_its_samples_as_plain_text(model, tokenizer):
    completions = draw(model, tokenizer)
    assert [len(of_prompt) for of_prompt in completions] == [4, 4, 4]
    drawn = [text for of_prompt in completions for text in of_prompt]
    assert {word for text in drawn for word in text.split()} <= set(WORDS[2:])
    assert max(len(text.split()) for text in drawn) <= 6
    assert all(len(set(of_prompt)) > 1 for of_prompt in completions)


def test_a_seed_repeats_the_completions(model, tokenizer):
    assert draw(model, tokenizer, seed=1) == draw(model, tokenizer, seed=1)
    assert draw(model, tokenizer, seed=1) != draw(model, tokenizer, seed=2)


def test_completions_follow_the_order_of_the_prompts(tokenizer, model):
    class Echo:
        """Makes every completion repeat the last token of its prompt."""

        def processors(self, attention_mask):
            def repeat_last(input_ids, scores):
                forced = torch.full_like(scores, -torch.inf)
                return forced.scatter(1, input_ids[:, -1:], 0.0)

            return LogitsProcessorList([repeat_last])

    prompts = [[0, 4, 5], [0, 2], [0, 3, 2, 6]]
    completions = draw(model, tokenizer, prompts, samples=2, max_new_tokens=2, guide=Echo())
    expected = [" lantern lantern", " oak oak", " grumblefish grumblefish"]
    assert completions == [[text, text] for text in expected]


def test_a_prompt_without_room_is_named(model, tokenizer):
    with pytest.raises(UserError, match=r"prompts\[1\]: the prompt has 30 tokens, but at most 26 leave room"):
        draw(model, tokenizer, prompts=[[0], [2] * 30])
    assert len(draw(model, tokenizer, prompts=[[2] * 26], samples=1)) == 1


def test_no_samples_is_a_users_mistake(model, tokenizer):
    with pytest.raises(UserError, match="samples is 0"):
        draw(model, tokenizer, samples=0)


def own_nll(model, prompt, completion):
    """Σ −log p of the completion's tokens, one unpadded sequence at a time."""
    ids = torch.tensor([[*prompt, *completion]])
    with torch.no_grad():
        log_p = model(ids).logits[0].log_softmax(-1)
    return -sum(log_p[len(prompt) - 1 + step, token].item() for step, token in enumerate(completion))


def test_output_perplexity_predicts_the_completions_tokens_only(model, tokenizer):
    prompts, completions = [[0, 2], [0, 4, 5]], [["oak door", "sings"], ["kettle kettle lantern", ""]]
    by_hand = own_nll(model, [0, 2], [2, 3]) + own_nll(model, [0, 2], [7]) + own_nll(model, [0, 4, 5], [4, 4, 5])
    found = output_perplexity(model, tokenizer, prompts, completions)
    assert found.value == pytest.approx(math.exp(by_hand / 6), rel=1e-5)
    assert (found.n, found.missing) == (6, 1)
    ends = [own_nll(model, [0, 2], [2, 3]) + own_nll(model, [0, 2], [7]), own_nll(model, [0, 4, 5], [4, 4, 5])]
    assert (found.low, found.high) == pytest.approx(sorted(math.exp(nll / 3) for nll in ends), rel=1e-5)
    alone = output_perplexity(model, tokenizer, prompts, completions, batch_size=1)
    assert alone.value == pytest.approx(found.value, rel=1e-6)


def test_output_perplexity_depends_on_the_prompt(model, tokenizer):
    after_oak, after_door = (output_perplexity(model, tokenizer, [[0, first]], [["sings"]]) for first in (2, 3))
    assert after_oak.value != pytest.approx(after_door.value, rel=1e-4)


def test_a_uniform_base_model_is_as_perplexed_as_it_has_words(tokenizer):
    uniform = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    torch.nn.init.zeros_(uniform.lm_head.weight)
    found = output_perplexity(uniform, tokenizer, [[0], [0, 2]], [["oak"], ["door sings"]])
    assert (found.value, found.n) == (pytest.approx(len(WORDS)), 3)


def test_completions_without_tokens_have_no_perplexity(model, tokenizer):
    assert output_perplexity(model, tokenizer, [[0], [0]], [["", ""], [""]]) == Estimate(None, None, None, 0, missing=3)
    assert output_perplexity(model, tokenizer, [], []) == Estimate(None, None, None, 0)


def test_a_completion_that_reads_longer_than_it_was_drawn_takes_room_from_the_prompt(model, tokenizer):
    prompt, text = [0, *[3] * 29], "oak door kettle"  # 33 tokens for a context of 32
    found = output_perplexity(model, tokenizer, [prompt], [[text]])
    assert found.n == 3
    assert found.value == pytest.approx(math.exp(own_nll(model, prompt[1:], [2, 3, 4]) / 3), rel=1e-5)


def test_each_prompt_needs_its_completions(model, tokenizer):
    with pytest.raises(ValueError, match="zip"):
        output_perplexity(model, tokenizer, [[0]], [["oak"], ["door"]])


def test_a_constraint_that_reads_prompts_gets_the_prompt_of_each_sample():
    asked = []
    constraint = Anything()
    constraint.reads = "prompt+completion"
    constraint._score = lambda texts: asked.extend(texts) or [1.0] * len(texts)
    chat = [{"role": "user", "content": "ask"}]
    evaluate_generations([["a", "b"], ["c"]], constraint, prompts=["the ", chat])
    assert asked == ["the a", "the b", "user: ask\nassistant: c"]


def test_a_prompt_makes_room_for_a_completion_that_grew():
    window = continuation(0, [1, 2, 3], [4, 5, 6], limit=4)
    assert (window.ids, window.first) == ([3, 4, 5, 6], 1)
    assert continuation(0, [1, 2, 3], [4, 5, 6], limit=None).first == 3
