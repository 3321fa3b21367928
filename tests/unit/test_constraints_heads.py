"""Hypotheses and rewards: sequence classifiers that read a pair of texts, or have one output."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from test_constraints_classifier import POSITIONS, SENTENCE, bert, byte_tokenizer, save, word_tokenizer
from tokenizers import processors

from bridle.constraints import NLI, Reward, Similarity, build_constraint
from bridle.constraints.similarity import saved_pooling
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
        alone = logits(network, tokenizer, "rain").sigmoid().item()
        assert constraint.score([None], ["rain"])[0].value == pytest.approx(alone, abs=1e-6), "without a prompt"

    def test_several_outputs_are_refused(self, nli):
        with pytest.raises(UserError, match="has 3 outputs, and a reward model has one; use type: classifier"):
            Reward(nli[1], 0.0).load()


@pytest.fixture
def embedding(nli, tmp_path):
    """A folder as sentence-transformers writes it, of a model without its pooler; `pooling` is its configuration."""
    network = nli[0].bert

    def make(pooling=None, modules=("Transformer", "Pooling", "Normalize")):
        folder = save(tmp_path / "embedding", network, word_tokenizer())
        weights = {name: one for name, one in network.state_dict().items() if not name.startswith("pooler.")}
        save_file(weights, tmp_path / "embedding" / "model.safetensors", metadata={"format": "pt"})
        if pooling is not None:
            kinds = [{"type": f"sentence_transformers.models.{name}", "path": name} for name in modules]
            (tmp_path / "embedding" / "modules.json").write_text(json.dumps(kinds))
            (tmp_path / "embedding" / "Pooling").mkdir(exist_ok=True)
            (tmp_path / "embedding" / "Pooling" / "config.json").write_text(json.dumps(pooling))
        return network, folder

    return make


NEAR = ["my friend", "the sea is wide"]


class TestSimilarity:
    @pytest.mark.parametrize(
        ("saved", "given", "pool"),
        [
            (None, None, "mean"),
            (None, "last", "last"),
            ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False, "include_prompt": True}, None, "cls"),
            ({"pooling_mode": "lasttoken"}, None, "last"),
            ({"pooling_mode_cls_token": True}, "mean", "mean"),
        ],
    )
    def test_the_value_is_the_largest_cosine_of_pooled_states(self, embedding, saved, given, pool):
        network, folder = embedding(saved)
        of = {"mean": lambda states: states.mean(0), "cls": lambda states: states[0], "last": lambda states: states[-1]}

        def embedded(text):
            with torch.no_grad():
                states = network(**word_tokenizer()(text, return_tensors="pt")).last_hidden_state[0].double()
            return of[pool](states)

        texts = ["you grumblefish", "my friend", "wide sea"]
        expected = [
            max(torch.cosine_similarity(embedded(text), embedded(near), dim=0).item() for near in NEAR)
            for text in texts
        ]
        on_topic = Similarity(folder, NEAR, 0.5, means="complies", pooling=given)
        assert values(on_topic, texts) == pytest.approx(expected, abs=1e-6)
        assert values(Similarity(folder, NEAR, 0.5, pooling=given), texts) == pytest.approx(
            [1 - value for value in expected], abs=1e-6
        )

    def test_the_threshold_says_what_is_near(self, embedding):
        _, folder = embedding()
        (same,) = Similarity(folder, "my friend", 0.99).score(None, ["my friend"])
        assert not same.complies
        assert Similarity(folder, "my friend", 0.99, means="complies").score(None, ["my friend"])[0].complies

    @pytest.mark.parametrize(
        ("pooling", "modules", "said"),
        [
            (
                {"pooling_mode_max_tokens": True},
                ("Transformer", "Pooling"),
                r"pooling \(max_tokens\) is none of mean",
            ),
            ({}, ("Transformer", "Pooling", "Dense"), r"goes through further layers \(Transformer, Pooling, Dense\)"),
        ],
    )
    def test_an_embedding_that_it_does_not_make_is_refused(self, embedding, pooling, modules, said):
        with pytest.raises(UserError, match=said):
            Similarity(embedding(pooling, modules)[1], NEAR, 0.5).load()
        with pytest.raises(UserError, match="names no text"):
            Similarity("a-model", [], 0.5)

    def test_without_a_network_no_pooling_is_guessed(self, monkeypatch):
        def unreachable(*given, **options):
            raise OSError("no connection")

        monkeypatch.setattr("bridle.constraints.similarity.cached_file", unreachable)
        with pytest.raises(UserError, match=r"^near: whether it has a modules.json cannot be seen .*; set pooling$"):
            saved_pooling("near", "somebody/some-model")

    def test_references_without_a_token_are_refused(self, embedding, monkeypatch):
        constraint = Similarity(embedding(None)[1], " ", 0.5, name="near")
        monkeypatch.setattr(constraint, "_tokenize", lambda texts: ({"input_ids": [[] for _ in texts]}, 0))
        with pytest.raises(UserError, match="constraint 'near': no text of 'texts' has a token"):
            constraint.load()


def test_descriptions_build_the_same_again(nli, reward):
    for spec in (
        {"type": "nli", "model": nli[1], "hypothesis": HYPOTHESIS, "threshold": 0.2},
        f"reward:{reward[1]},threshold=-1.5",
        {"type": "similarity", "model": nli[1], "texts": NEAR, "threshold": 0.2, "pooling": "cls"},
    ):
        described = build_constraint(spec).describe()
        assert build_constraint(described).describe() == described
