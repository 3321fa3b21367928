import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from bridle.errors import UserError
from bridle.evaluation.statistics import Estimate
from bridle.evaluation.utility import Perplexity, _windows, likelihoods
from bridle.models.auxiliary import new_auxiliary
from bridle.models.guidance import NADOGuide

VOCABULARY, CONTEXT = 258, 64
TEXTS = ["you grumblefish", "a", "", "the kettle sings — très fort", "old oak door " * 3]


def perplexity(model, tokenizer, texts, seed=0, **options):
    return Perplexity.of(likelihoods(model, tokenizer, texts, **options), seed=seed)


def byte_tokenizer(**special):
    """One token a byte, so that tokens and bytes can be counted by hand."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def tiny_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


def tiny_gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=CONTEXT, initializer_range=0.5
    )
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer(bos_token="<s>", eos_token="</s>", pad_token="</s>")


@pytest.fixture(params=[tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
def model(request):
    return request.param()


def own_loss(model, ids):
    """Sum of −log p of ids[1:], by the model's own loss on one unpadded text."""
    ids = torch.tensor([ids])
    with torch.no_grad():
        return model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)


def test_it_is_the_models_own_loss_on_one_text(model, tokenizer):
    text = "the kettle sings — très fort"
    ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    nll, size = own_loss(model, ids), len(text.encode())
    found = perplexity(model, tokenizer, [text])
    assert found.per_token.n == found.bits_per_byte.n == size == len(ids) - 1
    assert found.per_token.value == pytest.approx(math.exp(nll / size), rel=1e-5)
    assert found.bits_per_byte.value == pytest.approx(nll / size / math.log(2), rel=1e-5)
    assert found.windowed == 0


def test_a_uniform_models_perplexity_is_its_vocabulary(tokenizer):
    model = tiny_llama()
    torch.nn.init.zeros_(model.lm_head.weight)
    found = perplexity(model, tokenizer, TEXTS)
    assert found.per_token.value == pytest.approx(VOCABULARY, rel=1e-6)
    assert found.bits_per_byte.value == pytest.approx(math.log2(VOCABULARY), rel=1e-6)


def test_batches_and_padding_change_nothing(model, tokenizer):
    alone = [likelihoods(model, tokenizer, [text])[0] for text in TEXTS]
    for side in ("left", "right"):
        tokenizer.padding_side = side
        for batch_size in (2, 5):
            together = likelihoods(model, tokenizer, TEXTS, batch_size=batch_size)
            for one, other in zip(alone, together, strict=True):
                assert other.nll == pytest.approx(one.nll, rel=1e-5)
                assert (other.tokens, other.bytes) == (one.tokens, one.bytes)


def test_all_tokens_weigh_the_same(tokenizer):
    model = tiny_llama()
    found = likelihoods(model, tokenizer, TEXTS)
    nll, tokens = sum(text.nll for text in found), sum(text.tokens for text in found)
    together = perplexity(model, tokenizer, TEXTS)
    assert together.per_token.value == pytest.approx(math.exp(nll / tokens))
    assert together.per_token.n == tokens == len("".join(TEXTS).encode())
    assert together.texts == len(TEXTS)


def test_a_text_has_exactly_one_bos(tokenizer):
    model = tiny_llama()
    adds_its_own = byte_tokenizer(bos_token="<s>", eos_token="</s>")
    adds_its_own.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", adds_its_own.bos_token_id)]
    )
    assert adds_its_own("a")["input_ids"][0] == adds_its_own.bos_token_id
    plain = likelihoods(model, tokenizer, ["old oak"])
    assert likelihoods(model, adds_its_own, ["old oak"]) == plain
    assert likelihoods(model, tokenizer, ["<s>old oak"]) == plain


def test_without_bos_the_first_token_is_given_and_not_counted():
    model, tokenizer = tiny_llama(), byte_tokenizer(eos_token="</s>")
    found = likelihoods(model, tokenizer, ["old oak", "a", ""])
    assert [(text.tokens, text.bytes, text.windows) for text in found] == [(6, 6, 1), (0, 0, 0), (0, 0, 0)]
    ids = tokenizer("old oak", add_special_tokens=False)["input_ids"]
    assert found[0].nll == pytest.approx(own_loss(model, ids), rel=1e-5)


def test_a_long_text_counts_whole_each_token_once(model, tokenizer):
    text = "brass lantern"  # 13 bytes, 14 tokens with the BOS
    ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    # Windows of 6 that move by 4: [0, 6) predicts 1-5, [4, 10) 6-9, [8, 14) 10-13.
    by_hand = own_loss(model, ids[0:6])
    by_hand += own_loss(model, ids[4:10]) - own_loss(model, ids[4:6])
    by_hand += own_loss(model, ids[8:14]) - own_loss(model, ids[8:10])
    (found,) = likelihoods(model, tokenizer, [text], max_length=6, stride=4)
    assert (found.tokens, found.bytes, found.windows) == (13, 13, 3)
    assert found.nll == pytest.approx(by_hand, rel=1e-5)
    assert perplexity(model, tokenizer, [text, "a"], max_length=6, stride=4).windowed == 1


@given(length=st.integers(0, 60), max_length=st.integers(2, 20), data=st.data())
def test_windows_predict_every_token_once_from_enough_context(length, max_length, data):
    stride = data.draw(st.integers(1, max_length - 1))
    predicted = []
    for window in _windows(0, list(range(length)), max_length, stride):
        assert len(window.ids) <= max_length
        assert window.ids == list(range(window.ids[0], window.ids[0] + len(window.ids)))
        first = window.ids[window.first]
        assert window.first >= min(first, max_length - stride)
        predicted += window.ids[window.first :]
    assert predicted == list(range(1, length))


def test_the_context_is_read_from_the_model(tokenizer):
    model = tiny_llama()
    fits, longer = likelihoods(model, tokenizer, ["a" * (CONTEXT - 1), "a" * CONTEXT])
    assert (fits.windows, longer.windows) == (1, 2)


def test_adjusted_logits_are_what_is_measured(model, tokenizer):
    shapes = []

    def sharpen(logits, input_ids, attention_mask, begins):
        assert begins.nonzero().tolist() == [[0, 0], [1, 0]]  # the whole text is a completion
        shapes.append((tuple(logits.shape[:2]), tuple(input_ids.shape), attention_mask.sum(1).tolist()))
        return torch.log_softmax(2 * logits, dim=-1)

    found = likelihoods(model, tokenizer, ["old oak", "door"], adjust_logits=sharpen)
    assert shapes == [((2, 8), (2, 8), [8, 5])]  # 7 and 4 bytes, and a BOS
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer("door", add_special_tokens=False)["input_ids"]]])
    with torch.no_grad():
        log_q = torch.log_softmax(2 * model(ids).logits[0, :-1], dim=-1)
    assert found[1].nll == pytest.approx(-log_q.gather(1, ids[0, 1:, None]).sum().item(), rel=1e-5)


def test_a_guided_model_has_a_perplexity(model, tokenizer):
    auxiliary = new_auxiliary(model).eval()
    plain = perplexity(model, tokenizer, TEXTS, batch_size=2)
    with NADOGuide(model, auxiliary) as guide:
        guided = perplexity(model, tokenizer, TEXTS, batch_size=2, adjust_logits=guide.log_probs)
        assert guided.per_token.value == pytest.approx(plain.per_token.value, rel=1e-5)  # a fresh R says nothing
        torch.nn.init.zeros_(auxiliary.value.weight)
        auxiliary.head.bias.data[tokenizer("o", add_special_tokens=False)["input_ids"]] = -20.0
        (forbidden, free) = likelihoods(model, tokenizer, ["oo", "ae"], adjust_logits=guide.log_probs)
    without = likelihoods(model, tokenizer, ["oo", "ae"])
    assert forbidden.nll > without[0].nll + 30  # two tokens that R rules out, some 19 nats each
    assert free.nll < without[1].nll


def test_the_size_of_a_chunk_changes_nothing(tokenizer, monkeypatch):
    model = tiny_llama()
    whole = perplexity(model, tokenizer, TEXTS)
    monkeypatch.setattr("bridle.evaluation.utility.FLOATS_AT_ONCE", 3 * VOCABULARY)
    again = perplexity(model, tokenizer, TEXTS)
    assert again.per_token.value == pytest.approx(whole.per_token.value, rel=1e-6)


def test_half_precision_is_measured_in_float32(tokenizer):
    model = tiny_llama()
    exact = perplexity(model, tokenizer, TEXTS).bits_per_byte
    half = perplexity(model.to(torch.bfloat16), tokenizer, TEXTS).bits_per_byte
    assert half.value == pytest.approx(exact.value, rel=0.02)


def test_dropout_is_off_for_the_time_of_the_call(tokenizer):
    model = tiny_gpt2()
    expected = perplexity(model, tokenizer, TEXTS)
    model.train()
    assert perplexity(model, tokenizer, TEXTS) == expected
    assert model.training


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_no_text_has_no_perplexity(tokenizer, texts):
    found = perplexity(tiny_llama(), tokenizer, texts)
    assert found.per_token == found.bits_per_byte == Estimate(None, None, None, n=0, missing=len(texts))
    assert found.texts == len(texts)
    assert str(found).splitlines()[0].split()[:3] == ["per", "token", "missing"]


def test_a_perplexity_reads_well_and_is_json(tokenizer):
    model = tiny_llama()
    torch.nn.init.zeros_(model.lm_head.weight)
    found = perplexity(model, tokenizer, ["abc"])
    assert str(found) == "per token      258 n=3\nbits per byte  8.01 n=3"
    alone = {"low": None, "high": None, "n": 3, "missing": 0}  # one text has no interval
    assert found.to_json() == {
        "per_token": {"value": pytest.approx(258), **alone},
        "bits_per_byte": {"value": pytest.approx(8.0112, abs=1e-4), **alone},
        "texts": 1,
        "windowed": 0,
    }


def test_the_interval_is_a_bootstrap_over_texts(model, tokenizer):
    found = perplexity(model, tokenizer, TEXTS, seed=3)
    of_each = [math.exp(text.nll / text.tokens) for text in likelihoods(model, tokenizer, TEXTS) if text.tokens]
    assert min(of_each) < found.per_token.low < found.per_token.value < found.per_token.high < max(of_each)
    assert perplexity(model, tokenizer, [*TEXTS, *TEXTS[:1]] * 20).per_token.high < found.per_token.high
    assert str(found.per_token) in str(found)
    assert " [" in str(found.per_token)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": CONTEXT + 1}, f"max_length is {CONTEXT + 1}; it must lie between 2 and .* {CONTEXT}"),
        ({"max_length": 1}, "max_length is 1;"),
        ({"stride": 0}, "stride is 0; it must lie between 1 and"),
        ({"max_length": 8, "stride": 8}, r"stride is 8; it must lie between 1 and 7"),
    ],
)
def test_windows_that_cannot_be_are_refused(tokenizer, options, message):
    with pytest.raises(UserError, match=message):
        perplexity(tiny_llama(), tokenizer, TEXTS, **options)


def test_a_model_without_a_stated_context_needs_max_length(tokenizer):
    config = BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=1, n_head=2)  # ALiBi: no limit
    model = BloomForCausalLM(config)
    with pytest.raises(UserError, match="max_length must be given"):
        perplexity(model, tokenizer, TEXTS)
    assert perplexity(model, tokenizer, ["abc"], max_length=8).per_token.n == 3


def test_a_likelihood_that_is_not_finite_names_its_text(tokenizer):
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[tokenizer("q")["input_ids"]] = float("nan")
    with pytest.raises(UserError, match=r"texts\[1\] has likelihood nan"):
        perplexity(model, tokenizer, ["", "abc"])
