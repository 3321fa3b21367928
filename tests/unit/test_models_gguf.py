"""A GGUF file is a model like any other: the same logits, the same tokens, and one line where it cannot be read."""

import json
import os
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType, quants
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny_tokenizers
from bridle.errors import UserError
from bridle.models import gguf
from bridle.models.export import convert_gguf
from bridle.models.loading import LoraOptions, load_config, load_model, load_tokenizer
from conftest import ROOT
from tiny_gguf import write_gguf

CHAT = [{"role": "user", "content": "Where is the kettle?"}, {"role": "assistant", "content": "On the table."}]
TEXT = "  The kettle sings 1234 times,\n and  12 loaves ½ are £5 🙂"
SMOLLM2 = os.environ.get("BRIDLE_SMOLLM2", ROOT / "models" / "smollm2-135m")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizers.tiny_tokenizer()


@pytest.fixture
def model(tiny_model, tokenizer):
    options = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1}
    return tiny_model("llama", vocab_size=len(tokenizer), **options)


@pytest.fixture
def file(model, tokenizer, tmp_path):
    return write_gguf(tmp_path / "tiny.gguf", model, tokenizer)


class TestModel:
    @pytest.mark.parametrize("tied", [False, True])
    def test_its_logits_are_those_of_the_same_model_s_folder(self, tiny_model, tokenizer, tmp_path, tied):
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        model = tiny_model("llama", len(tokenizer), tie_word_embeddings=tied, initializer_range=0.1, **heads)
        model.save_pretrained(tmp_path / "folder")
        if tied:
            model.lm_head = None
        file = str(write_gguf(tmp_path / "tiny.gguf", model, tokenizer))
        ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
        with torch.no_grad():
            expected = load_model(str(tmp_path / "folder"))(ids).logits
            torch.testing.assert_close(load_model(file)(ids).logits, expected, rtol=0, atol=0)

    def test_its_configuration_is_the_model_s(self, file):
        config = load_config(str(file))
        assert config.to_dict() | {"dtype": "float32"} == load_model(str(file)).config.to_dict()
        assert config.name_or_path == str(file)

    @pytest.mark.parametrize("kind", ["Q4_1", "Q8_0"])
    def test_quantised_weights_are_dequantised(self, model, tokenizer, tmp_path, kind):
        kind = GGMLQuantizationType[kind]
        file = write_gguf(tmp_path / "tiny.gguf", model, tokenizer, quantised=kind)
        found = load_model(str(file), dtype="bfloat16").get_input_embeddings().weight
        stored = quants.quantize(model.get_input_embeddings().weight.detach().numpy(), kind)
        assert torch.equal(found, torch.from_numpy(quants.dequantize(stored, kind)).bfloat16())

    def test_what_is_saved_is_an_ordinary_folder(self, file, tmp_path):
        model = load_model(str(file))
        model.save_pretrained(tmp_path / "saved")
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
        assert not getattr(saved, "is_quantized", False)
        torch.testing.assert_close(saved.state_dict(), model.state_dict(), rtol=0, atol=0)

    def test_an_adapter_finds_its_file_again(self, file, tmp_path):
        adapted = load_model(str(file), lora=LoraOptions(r=2))
        torch.nn.init.normal_(adapted.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight)
        adapted.save_pretrained(tmp_path / "adapter")
        again = load_model(str(tmp_path / "adapter"))
        ids = torch.tensor([[5, 6, 7]])
        torch.testing.assert_close(again(ids).logits, adapted(ids).logits)
        assert load_tokenizer(str(tmp_path / "adapter"))("a") == load_tokenizer(str(file))("a")

    def test_nothing_beside_it_is_read(self, file, tokenizer, tiny_model):
        tiny_model("gpt2").save_pretrained(file.parent)
        other = tiny_tokenizers.tiny_tokenizer(metaspace=True, chat_template=None)
        other.save_pretrained(file.parent)
        (file.parent / "adapter_config.json").write_text("{}")
        assert load_model(str(file)).config.model_type == "llama"
        assert load_tokenizer(str(file)).get_vocab() == tokenizer.get_vocab()

    def test_a_file_on_the_hub(self, file, monkeypatch):
        asked = []
        monkeypatch.setattr(gguf, "hf_hub_download", lambda *names, **at: asked.append((*names, *at)) or str(file))
        assert load_model("me/tiny:tiny.gguf").config._name_or_path == "me/tiny:tiny.gguf"
        assert load_tokenizer("me/tiny:tiny.gguf").name_or_path == "me/tiny:tiny.gguf"
        assert set(asked) == {("me/tiny", "tiny.gguf")}
        load_tokenizer("me/tiny:tiny.gguf", revision="abc")
        assert asked[-1] == ("me/tiny", "tiny.gguf", "revision")

    def test_a_scaling_of_positions_is_not_lost_in_silence(self, model, tokenizer, tmp_path, caplog):
        model.register_buffer("rope_freqs", torch.ones(4))
        load_model(str(write_gguf(tmp_path / "tiny.gguf", model, tokenizer)))
        assert "scaling of positions" in caplog.text


class TestTokenizer:
    @pytest.mark.parametrize("adds_bos", [False, True])
    def test_it_is_the_same(self, model, tmp_path, adds_bos):
        tokenizer = tiny_tokenizers.tiny_tokenizer(adds_bos=adds_bos)
        found = load_tokenizer(str(write_gguf(tmp_path / "tiny.gguf", model, tokenizer)))
        assert found(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
        assert found.decode(found(TEXT, add_special_tokens=False)["input_ids"]) == TEXT
        assert found.apply_chat_template(CHAT) == tokenizer.apply_chat_template(CHAT)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            assert getattr(found, name) == getattr(tokenizer, name)

    def test_smollm_splits_numbers_into_digits(self, model, tokenizer, tmp_path):
        file = str(write_gguf(tmp_path / "tiny.gguf", model, tokenizer, splits="smollm"))
        pieces = load_tokenizer(file).backend_tokenizer.pre_tokenizer.pre_tokenize_str("a  12 b")
        assert [piece for piece, _ in pieces] == ["a", "ĠĠ", "1", "2", "Ġb"]

    def test_an_unknown_way_to_split_text_is_named(self, model, tokenizer, tmp_path, caplog):
        file = str(write_gguf(tmp_path / "tiny.gguf", model, tokenizer, splits="poro-chat"))
        assert isinstance(load_tokenizer(file).backend_tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel)
        assert "poro-chat" in caplog.text


class TestConversion:
    def test_the_folder_is_the_model(self, file, tokenizer, tmp_path):
        convert_gguf(str(file), tmp_path / "out", "bfloat16")
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
        expected = load_model(str(file), dtype="bfloat16")
        torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=0, atol=0)
        assert AutoTokenizer.from_pretrained(tmp_path / "out").apply_chat_template(CHAT) == (
            tokenizer.apply_chat_template(CHAT)
        )

    def test_it_overwrites_nothing(self, file, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").touch()
        for out in (tmp_path / "out", file):
            with pytest.raises(UserError, match=f"{out}: exists already"):
                convert_gguf(str(file), out)

    def test_only_gguf_files_are_converted(self, tiny_folder, tmp_path):
        with pytest.raises(UserError, match="is not a GGUF file"):
            convert_gguf(str(tiny_folder()), tmp_path / "out")


class TestRefusals:
    @pytest.mark.parametrize("size", [0, 3, 30, 5000, 20_000, -1])
    def test_a_truncated_file(self, file, size):
        file.write_bytes(file.read_bytes()[:size])
        for load in (load_model, load_tokenizer):
            with pytest.raises(UserError, match=r"tiny\.gguf: .* damaged"):
                load(str(file))

    def test_another_kind_of_file(self, tmp_path):
        (tmp_path / "text.gguf").write_text("No model is here.\n" * 100)
        with pytest.raises(UserError, match="is not a GGUF file, or is damaged"):
            load_model(str(tmp_path / "text.gguf"))

    def test_weights_that_are_missing(self, model, tokenizer, tmp_path):
        model.model.norm = None
        file = write_gguf(tmp_path / "tiny.gguf", model, tokenizer)
        with pytest.raises(UserError, match=r"lack 'model\.norm\.weight'"):
            load_model(str(file))

    def test_an_unknown_architecture(self, model, tokenizer, tmp_path):
        file = str(write_gguf(tmp_path / "tiny.gguf", model, tokenizer, architecture="unheard-of"))
        for load in (load_model, load_tokenizer):
            with pytest.raises(UserError, match="unheard-of is not supported"):
                load(file)

    @pytest.mark.parametrize("name", ["missing.gguf", "me/missing:tiny.gguf"])
    def test_no_such_file(self, name):
        for load in (load_model, load_tokenizer):
            with pytest.raises(UserError, match=f"{name}: no such file"):
                load(name)

    def test_a_folder_that_holds_one(self, file):
        with pytest.raises(UserError, match="name its GGUF file"):
            load_model(str(file.parent))

    def test_another_quantisation(self, file):
        with pytest.raises(UserError, match="leave out quantization_config"):
            load_model(str(file), quantization_config={"load_in_4bit": True})

    def test_the_package_is_missing(self, file, monkeypatch):
        monkeypatch.setattr(gguf, "is_gguf_available", lambda: False)
        with pytest.raises(UserError, match=r'pip install "\.\[gguf\]"'):
            load_model(str(file))


@pytest.mark.skipif(not Path(SMOLLM2).is_dir(), reason="no SmolLM2: `make smollm2` makes it")
def test_smollm2_writes_english():
    model, tokenizer = load_model(str(SMOLLM2), dtype="bfloat16"), load_tokenizer(str(SMOLLM2))
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    ids = tokenizer("The capital of France is", return_tensors="pt")
    assert "Paris" in tokenizer.decode(model.generate(**ids, max_new_tokens=3, do_sample=False)[0])
    assert tokenizer.tokenize("  in 1984") == ["Ġ", "Ġin", "Ġ", "1", "9", "8", "4"]
