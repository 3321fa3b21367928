"""Hypotheses and rewards: sequence classifiers that read a pair of texts, or have one output."""

import math

import pytest
import torch
from test_constraints_classifier import POSITIONS, SENTENCE, bert, byte_tokenizer, save, word_tokenizer
from tokenizers import processors

from bridle.constraints import NLI, Reward, build_constraint
from bridle.errors import UserError

HYPOTHESIS = "the sea is wide"
LABELS = {0: "CONTRADICTION", 1: "NEUTRAL", 2: "ENTAILMENT"}


def pair_tokenizer():
    tokenizer = word_tokenizer()
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


@pytest.fixture(scope="module")
def nli(tmp_path_factory):
    torch.manual_seed(1)
    network = bert(LABELS)
    return network, save(tmp_path_factory.mktemp("nli"), network, pair_tokenizer())


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    torch.manual_seed(1)
    network = bert({0: "reward"})
    return network, save(tmp_path_factory.mktemp("reward"), network, word_tokenizer())


def logits(network, tokenizer, *texts):
    with torch.no_grad():
        return network(**tokenizer(*texts, return_tensors="pt")).logits[0].double()


def values(constraint, texts):
    return [score.value for score in constraint.score(None, texts)]


class TestNLI:
    def test_the_value_is_the_probability_of_entailment(self, nli):
        network, folder = nli
        texts = ["you grumblefish", "my friend", "wide sea"]
        expected = [logits(network, pair_tokenizer(), text, HYPOTHESIS).softmax(-1)[2].item() for text in texts]
        violates, complies = (NLI(folder, HYPOTHESIS, means=means) for means in ("violates", "complies"))
        assert [score.violation for score in violates.score(None, texts)] == pytest.approx(expected, abs=1e-6)
        assert values(complies, texts) == pytest.approx(expected, abs=1e-6)

    def test_a_long_text_is_read_in_windows_each_with_the_hypothesis(self, nli):
        network, folder = nli
        words, room = SENTENCE.split(), POSITIONS - 3 - len(HYPOTHESIS.split())
        stride = room - room // 4
        starts = range(0, len(words) - room + stride, stride)
        parts = [" ".join(words[start : start + room]) for start in starts]
        worst = max(logits(network, pair_tokenizer(), part, HYPOTHESIS).softmax(-1)[2].item() for part in parts)
        (score,) = NLI(folder, HYPOTHESIS).score(None, [SENTENCE])
        assert score.violation == pytest.approx(worst, abs=1e-6)

    def test_what_cannot_be_used_is_refused(self, nli, reward):
        with pytest.raises(UserError, match="hypothesis: leaves no room for a text in the 12 tokens"):
            NLI(nli[1], SENTENCE).load()
        with pytest.raises(UserError, match="needs one label that begins with 'entail'; its labels are: reward"):
            NLI(reward[1], HYPOTHESIS).load()


class TestReward:
    def test_a_text_complies_from_the_threshold_on(self, reward):
        network, folder = reward
        texts = ["you grumblefish", "my friend", "wide sea", "old fish and the sea"]
        rewards = sorted((logits(network, word_tokenizer(), text).item(), text) for text in texts)
        threshold = (rewards[1][0] + rewards[2][0]) / 2
        scores = Reward(folder, threshold).score(None, [text for _, text in rewards])
        assert [score.complies for score in scores] == [False, False, True, True]
        expected = [1 / (1 + math.exp(threshold - one)) for one, _ in rewards]
        assert [score.value for score in scores] == pytest.approx(expected, abs=1e-6)

    def test_a_chat_is_written_by_the_models_template(self, tmp_path):
        from transformers import GPT2Config, GPT2ForSequenceClassification

        tokenizer = byte_tokenizer()
        tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        torch.manual_seed(1)
        config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=1, n_head=2, num_labels=1)
        network = GPT2ForSequenceClassification(config).eval()
        network.config.pad_token_id = tokenizer.eos_token_id
        constraint = Reward(save(tmp_path / "chat", network, tokenizer), 0.0, reads="chat")
        expected = logits(network, tokenizer, "<user>hm?<assistant>rain").sigmoid().item()
        assert constraint.score(["hm?"], ["rain"])[0].value == pytest.approx(expected, abs=1e-6)

    def test_several_outputs_are_refused(self, nli):
        with pytest.raises(UserError, match="has 3 outputs, and a reward model has one; use type: classifier"):
            Reward(nli[1], 0.0).load()


def test_descriptions_build_the_same_again(nli, reward):
    for spec in (
        {"type": "nli", "model": nli[1], "hypothesis": HYPOTHESIS, "threshold": 0.2},
        f"reward:{reward[1]},threshold=-1.5",
    ):
        described = build_constraint(spec).describe()
        assert build_constraint(described).describe() == described
