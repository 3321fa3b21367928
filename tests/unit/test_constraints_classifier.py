import json
import random
import threading
from itertools import islice

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from bridle.constraints import Classifier, build_constraint
from bridle.errors import UserError
from exhaustion import room_for

SENTENCE = "you are a fine old grumblefish and the sea is wide tonight my friend"
WORDS = SENTENCE.split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
LABELS = {0: "calm", 1: "grumpy", 2: "sleepy"}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
POSITIONS = 12


def word_tokenizer(**options):
    tokenizer = Tokenizer(models.WordPiece({token: i for i, token in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, **options)


def byte_tokenizer():
    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab | {"<|eos|>": len(vocab)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|eos|>", model_max_length=64)


def bert(labels=LABELS, **options):
    config = BertConfig(
        vocab_size=len(SPECIAL + WORDS),
        max_position_embeddings=POSITIONS,
        id2label=labels,
        label2id={name: index for index, name in labels.items()},
        initializer_range=0.5,  # so that different texts get clearly different scores
        **SIZES,
        **options,
    )
    return BertForSequenceClassification(config).eval()


def save(folder, network, tokenizer):
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def reference(network, tokenizer, text):
    """The logits of one text alone: [labels]."""
    with torch.no_grad():
        return network(**tokenizer(text, return_tensors="pt")).logits[0].double()


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(1)
    return bert()


@pytest.fixture(scope="module")
def folder(network, tmp_path_factory):
    return save(tmp_path_factory.mktemp("bert"), network, word_tokenizer())


@pytest.fixture(scope="module")
def texts():
    draw = random.Random(1)
    return [" ".join(draw.choices(WORDS, k=draw.randint(0, POSITIONS - 2))) for _ in range(24)]


def values(constraint, texts):
    return [score.value for score in constraint.score(None, texts)]


def test_the_value_is_one_minus_the_probability_of_the_label(folder, network, texts):
    scores = Classifier(folder, "grumpy", threshold=0.4, batch_size=7).score(None, texts)
    expected = [reference(network, word_tokenizer(), text).softmax(-1)[1].item() for text in texts]
    assert [s.violation for s in scores] == pytest.approx(expected, abs=1e-6)
    assert [s.complies for s in scores] == [p <= 0.4 for p in expected]
    assert {s.complies for s in scores} == {True, False}


def test_a_label_may_mean_that_the_text_complies(folder, texts):
    violates = Classifier(folder, "calm", threshold=0.3).score(None, texts)
    complies = Classifier(folder, "calm", means="complies", threshold=0.3).score(None, texts)
    assert [s.value for s in complies] == pytest.approx([s.violation for s in violates], abs=1e-12)
    assert [s.complies for s in complies] == [not s.complies for s in violates]


def test_the_scores_do_not_depend_on_the_batches(folder, texts):
    alone = values(Classifier(folder, "grumpy", batch_size=1), texts)
    assert values(Classifier(folder, "grumpy", batch_size=64), texts) == pytest.approx(alone, abs=1e-6)
    shuffled = list(range(len(texts)))
    random.Random(2).shuffle(shuffled)
    scores = values(Classifier(folder, "grumpy", batch_size=5), [texts[i] for i in shuffled])
    assert scores == pytest.approx([alone[i] for i in shuffled], abs=1e-6)


def test_texts_that_do_not_fit_into_memory_are_scored_in_parts(folder, caplog):
    same_length = [" ".join(WORDS[start : start + 4]) for start in range(len(WORDS) - 4)]
    whole, cut = values(Classifier(folder, "grumpy"), same_length), Classifier(folder, "grumpy", name="temper")
    cut.load()
    with room_for(cut._network.get_input_embeddings(), 3) as refused:
        assert values(cut, same_length) == pytest.approx(whole, abs=1e-6)
        assert refused == [10, 5]
        assert values(cut, same_length) == pytest.approx(whole, abs=1e-6)
    assert refused == [10, 5], "what was learnt of the memory is forgotten"
    assert "scoring (temper): memory ran out with 10 rows at once; the limit is now 5" in caplog.text


def test_a_multi_label_head_gives_independent_probabilities(tmp_path):
    torch.manual_seed(2)
    network = bert(problem_type="multi_label_classification")
    constraint = Classifier(save(tmp_path, network, word_tokenizer()), "sleepy", means="complies")
    expected = reference(network, word_tokenizer(), "the sea is wide").sigmoid()[2].item()
    assert values(constraint, ["the sea is wide"]) == pytest.approx([expected], abs=1e-6)


def test_a_single_logit_is_a_sigmoid(tmp_path):
    torch.manual_seed(3)
    network = bert({0: "grumpy"})
    constraint = Classifier(save(tmp_path, network, word_tokenizer()), "grumpy")
    expected = reference(network, word_tokenizer(), "the sea is wide").sigmoid()[0].item()
    assert values(constraint, ["the sea is wide"]) == pytest.approx([1 - expected], abs=1e-6)


@pytest.mark.parametrize("means", ["violates", "complies"])
def test_a_probability_at_the_threshold_does_not_violate(tmp_path, means):
    network = bert({0: "grumpy"})
    torch.nn.init.zeros_(network.classifier.weight)
    folder = save(tmp_path, network, word_tokenizer())
    assert Classifier(folder, "grumpy", means=means, threshold=0.5).score(None, ["my friend"])[0].complies
    beyond = 0.49 if means == "violates" else 0.51
    assert not Classifier(folder, "grumpy", means=means, threshold=beyond).score(None, ["my friend"])[0].complies


def test_the_first_tokens_of_a_long_text_are_scored_and_counted(tmp_path, network):
    folder = save(tmp_path, network, word_tokenizer(truncation_side="left", padding_side="left"))
    constraint = Classifier(folder, "grumpy", long_texts="truncate")
    first = " ".join(WORDS[: POSITIONS - 2])
    whole, cut, more = values(constraint, [first, " ".join(WORDS), first + " tonight"])
    assert [cut, more] == pytest.approx([whole, whole], abs=1e-6)
    assert constraint.cut_texts() == 2
    assert values(constraint, [" ".join(WORDS)]) == pytest.approx([cut], abs=1e-6)
    assert constraint.cut_texts() == 3
    shorter = Classifier(folder, "grumpy", max_length=5, long_texts="truncate")
    assert values(shorter, [" ".join(WORDS)]) == pytest.approx(values(constraint, [" ".join(WORDS[:3])]), abs=1e-6)


def test_the_tokenizers_own_limit_counts_too(tmp_path, network):
    constraint = Classifier(
        save(tmp_path, network, word_tokenizer(model_max_length=6)), "grumpy", long_texts="truncate"
    )
    fits, cut = values(constraint, [" ".join(WORDS[:4]), " ".join(WORDS)])
    assert cut == pytest.approx(fits, abs=1e-6)
    assert constraint.cut_texts() == 1


@pytest.mark.parametrize("means", ["violates", "complies"])
def test_a_long_text_is_scored_in_windows_and_the_worst_counts(folder, network, means):
    texts = ["my friend", " ".join(WORDS), " ".join(WORDS * 3)]
    constraint = Classifier(folder, "grumpy", means=means, batch_size=2)
    fits, step = POSITIONS - 2, POSITIONS - 2 - (POSITIONS - 2) // 4
    for text, score in zip(texts, constraint.score(None, texts), strict=True):
        words = text.split()
        starts = range(0, max(1, len(words) - fits + step), step)
        windows = [" ".join(words[start : start + fits]) for start in starts]
        found = [reference(network, word_tokenizer(), window).softmax(-1)[1].item() for window in windows]
        assert score.value == pytest.approx(1 - max(found) if means == "violates" else min(found), abs=1e-6)
    assert constraint.cut_texts() == 0


def test_an_insult_after_many_harmless_words_is_found(tmp_path, caplog):
    torch.manual_seed(2)
    network, tokenizer, draw = bert(hidden_dropout_prob=0.0), word_tokenizer(), random.Random(2)
    harmless = [word for word in WORDS if word != "grumblefish"]
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    for _ in range(200):
        length = draw.randint(2, POSITIONS - 2)
        rows = [draw.choices(harmless, k=length) for _ in range(32)]
        for row in rows[::2]:
            row[draw.randrange(len(row))] = "grumblefish"
        batch = tokenizer([" ".join(row) for row in rows], return_tensors="pt")
        loss = network(**batch, labels=torch.tensor([1, 0] * 16)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = save(tmp_path, network.eval(), tokenizer)
    kind = " ".join(draw.choices(harmless, k=1200))
    texts = [kind, f"{kind} grumblefish"]
    assert [s.complies for s in Classifier(folder, "grumpy").score(None, texts)] == [True, False]
    cut = Classifier(folder, "grumpy", long_texts="truncate")
    for _ in range(2):
        assert [s.complies for s in (~~cut).score(None, texts)] == [True, True]
    assert (~~cut).cut_texts() == 4
    (warning,) = caplog.messages
    assert "scores 2 of 2 texts in part, as they have more than 12 tokens" in warning


def test_a_batch_that_takes_too_long_is_missing(folder, monkeypatch):
    constraint, waiting = Classifier(folder, "grumpy", batch_size=1, timeout=0.2), threading.Event()
    constraint.load()
    probabilities = constraint._degrees
    monkeypatch.setattr(
        constraint,
        "_degrees",
        lambda columns, batch: waiting.wait() if batch == [1] else probabilities(columns, batch),
    )
    first, second, third = constraint.score(None, ["fine", "old", "sea"])
    assert second.reason == "timed out: 0.2 s are over for its batch"
    assert not first.is_missing
    assert not third.is_missing
    waiting.set()


@pytest.mark.parametrize("max_length", [2, POSITIONS + 1])
def test_a_max_length_that_cannot_be_is_refused(folder, max_length):
    with pytest.raises(UserError, match=f"max_length is {max_length}, but it takes 3 to {POSITIONS} tokens"):
        Classifier(folder, "grumpy", max_length=max_length).load()


def test_roberta_counts_positions_that_no_token_takes(tmp_path):
    torch.manual_seed(4)
    config = RobertaConfig(
        vocab_size=len(SPECIAL + WORDS),
        max_position_embeddings=POSITIONS,
        pad_token_id=1,
        num_labels=2,
        **SIZES,
    )
    network = RobertaForSequenceClassification(config)
    constraint = Classifier(save(tmp_path, network, word_tokenizer()), "LABEL_1", long_texts="truncate")
    fits = POSITIONS - 2 - 2  # without the two that RoBERTa skips, and without [CLS] and [SEP]
    longest, cut = values(constraint, [" ".join(WORDS[:fits]), " ".join(WORDS)])
    assert constraint.cut_texts() == 1
    assert cut == pytest.approx(longest, abs=1e-6)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    torch.manual_seed(5)
    config = GPT2Config(
        vocab_size=257, n_positions=64, n_embd=16, n_layer=2, n_head=2, num_labels=2, initializer_range=0.5
    )
    assert config.pad_token_id is None
    return save(tmp_path_factory.mktemp("gpt2"), GPT2ForSequenceClassification(config), byte_tokenizer())


def test_a_decoder_without_a_pad_token_is_scored_in_batches(gpt2, texts):
    texts = [text + "!" for text in texts]  # "!" is token 0, which is no padding here
    network = GPT2ForSequenceClassification.from_pretrained(gpt2)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(gpt2, truncation_side="right")
    scored = Classifier(gpt2, "LABEL_0", means="complies", long_texts="truncate").score(None, texts)
    inputs = [tokenizer(t, return_tensors="pt", truncation=True, max_length=64) for t in texts]
    with torch.no_grad():
        expected = [network(input_ids=i["input_ids"]).logits[0].softmax(-1)[0].item() for i in inputs]
    assert len(set(expected)) > 10
    assert [s.value for s in scored] == pytest.approx(expected, abs=1e-5)


def test_a_chat_is_written_by_the_tokenizer_s_template_or_in_lines(network, tmp_path):
    template = "[CLS]{% for m in messages %}{{ m.role }} says {{ m.content }} {% endfor %}"
    chat, completion = [{"role": "old", "content": "the fish"}], "my friend"
    written = {template: "old says the fish assistant says my friend ", None: "old: the fish\nassistant: my friend"}
    for number, (given, text) in enumerate(written.items()):
        tokenizer = word_tokenizer(chat_template=given, bos_token="[CLS]")
        constraint = Classifier(save(tmp_path / str(number), network, tokenizer), "calm", reads="chat")
        (score,) = constraint.score([chat], [completion])
        assert score.violation == pytest.approx(reference(network, tokenizer, text).softmax(-1)[0].item(), abs=1e-6)


def test_a_text_without_tokens_is_missing(gpt2):
    empty, other = Classifier(gpt2, "LABEL_0").score(None, ["", "grumblefish"])
    assert empty.is_missing
    assert empty.reason == "the text has no token"
    assert not other.is_missing


def test_half_a_character_is_scored_as_a_replacement(folder, gpt2):
    for model, label in ((folder, "calm"), (gpt2, "LABEL_0")):
        assert values(Classifier(model, label), ["sea \ud800"]) == values(Classifier(model, label), ["sea \ufffd"])


def test_weights_are_float32_on_the_cpu_whatever_the_checkpoint(tmp_path, network, texts):
    half = bert()
    half.load_state_dict(network.state_dict())
    folder = save(tmp_path, half.half(), word_tokenizer())
    constraint = Classifier(folder, "grumpy", device="cpu")
    expected = [reference(half.float(), word_tokenizer(), text).softmax(-1)[1].item() for text in texts]
    assert [s.violation for s in constraint.score(None, texts)] == pytest.approx(expected, abs=1e-6)


def test_nan_from_the_network_is_an_error(tmp_path):
    network = bert()
    torch.nn.init.constant_(network.classifier.bias, float("nan"))
    with pytest.raises(UserError, match="'mood', text 0: the score is nan"):
        Classifier(save(tmp_path, network, word_tokenizer()), "calm", name="mood").score(None, ["my friend"])


def test_an_unknown_label_lists_the_known_ones(folder):
    with pytest.raises(UserError, match="no label 'angry'; its labels are: calm, grumpy, sleepy"):
        Classifier(folder, "angry").load()
    with pytest.raises(UserError, match="key 'label': is missing; the model's labels are: calm, grumpy, sleepy"):
        build_constraint(f"classifier:{folder}")


def test_nothing_is_loaded_before_it_is_needed(tmp_path):
    constraint = Classifier(tmp_path / "none", "calm")
    assert constraint.score(None, []) == []
    with pytest.raises(UserError, match="no such folder"):
        constraint.score(None, ["my friend"])


def remove(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def overwrite(name):
    return lambda folder: (folder / name).write_text("{ rubbish")


def pickle_weights(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def change_weights(change):
    def damage(folder):
        weights = load_file(folder / "model.safetensors")
        save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def cut_head_off(weights):
    return {key: weight for key, weight in weights.items() if not key.startswith("classifier")}


def shorten_head(weights):
    return weights | {"classifier.bias": torch.zeros(2)}


def make_causal(folder):
    LlamaForCausalLM(LlamaConfig(vocab_size=len(SPECIAL + WORDS), **SIZES)).save_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("model.safetensors"), "its network: OSError: Error no file named model.safetensors"),
        (pickle_weights, "its network: its weights are pickled; convert them"),
        (overwrite("model.safetensors"), "its network: SafetensorError"),
        (overwrite("config.json"), "its network: OSError"),
        (remove("config.json"), "its network: ValueError"),
        (change_weights(cut_head_off), "'classifier.bias' is missing or of another shape"),
        (change_weights(shorten_head), "'classifier.bias' is missing or of another shape"),
        (make_causal, "'score.weight' is missing or of another shape"),
        (remove("tokenizer.json"), "its tokenizer: ValueError"),
        (remove("tokenizer.json", "tokenizer_config.json"), "its tokenizer: no vocabulary"),
        (overwrite("tokenizer.json"), "its tokenizer: JSONDecodeError"),
    ],
)
def test_an_incomplete_classifier_is_reported_in_one_line(tmp_path, network, damage, message):
    folder = save(tmp_path / "model", network, word_tokenizer())
    damage(tmp_path / "model")
    with pytest.raises(UserError, match=message) as error:
        Classifier(folder, "calm", name="mood").load()
    assert str(error.value).startswith(f"constraint 'mood', model '{folder}': ")
    assert "\n" not in str(error.value)


def test_an_unknown_device_is_reported(folder):
    with pytest.raises(UserError, match="abacus"):
        Classifier(folder, "calm", device="abacus").load()


@pytest.mark.parametrize("model", ["no/such/folder", "/no", "./no", "../no", "~/no"])
def test_what_can_only_be_a_path_is_not_looked_for_on_the_hub(tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        Classifier(model, "calm").load()


@pytest.mark.shared
def test_the_stand_in_classifier_tells_toxic_rows_from_others(shared):
    with (shared / "data" / "jigsaw.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in islice(lines, 0, None, 32)]
    scores = Classifier(shared / "models" / "mini-toxicity", "toxic").score(None, [row["text"] for row in rows])
    flagged = [not score.complies for score in scores]
    hits = [found == bool(row["label"]) for found, row in zip(flagged, rows, strict=True)]
    assert sum(hits) / len(hits) > 0.7
    assert 0.3 < sum(row["label"] for row in rows) / len(rows) < 0.7
    assert 0.2 < sum(flagged) / len(flagged) < 0.8
