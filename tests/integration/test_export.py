"""`bridle export`: what other programs read."""

import json
import os
import shutil
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

import tiny_tokenizers
from bridle.errors import UserError
from bridle.models.auxiliary import new_auxiliary
from bridle.models.card import add_certificate
from bridle.models.export import export, fold
from bridle.models.gguf_writer import write_gguf
from bridle.models.guidance import NADOGuide
from bridle.models.loading import LoraOptions, end_token_ids, load_model, load_tokenizer
from chats import TEMPLATES, chat_tokenizer
from conftest import ROOT
from loopback import transformers_serving
from tiny_gguf import write_gguf as reference

NODE = Path(os.environ.get("BRIDLE_NODE", ROOT))
LARGE = {"hidden_size": 256, "intermediate_size": 512}  # llama.cpp takes heads of at least 32
TEXT = "The kettle sings 1234 times"
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1}


@pytest.fixture
def llama(tiny_model, tmp_path):
    """A factory of folders of Llama models with a tokenizer."""

    def make(tokenizer=None, model_type="llama", **options):
        tokenizer, folder = tokenizer or tiny_tokenizers.tiny_tokenizer(), tmp_path / "base"
        tiny_model(model_type, vocab_size=len(tokenizer) + 3, **HEADS, **options).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


def greedy(model, ids, tokens=8):
    return model.generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False, pad_token_id=0)[0].tolist()


class TestFolder:
    def test_the_adapters_of_a_run_are_merged(self, bridle, recipe, tmp_path):
        code, _, err = bridle("train", recipe(lora={"r": 2}), "--output_dir", tmp_path / "run")
        assert code == 0, err
        code, told, err = bridle("export", tmp_path / "run", tmp_path / "out")
        assert (code, told) == (0, f"The model is in {tmp_path / 'out'}.\n"), err
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
        assert found.dtype == torch.float32
        expected, ids = load_model(str(tmp_path / "run" / "model")), torch.tensor([[5, 6, 7]])
        torch.testing.assert_close(found(ids).logits, expected(ids).logits, rtol=0, atol=1e-5)
        assert load_tokenizer(str(tmp_path / "out"))("a") == load_tokenizer(str(tmp_path / "run" / "model"))("a")

    @pytest.mark.parametrize("adapted", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
    def test_an_adapter_of_one_end_leaves_the_other_that_it_is_tied_to(self, llama, tmp_path, adapted):
        base = llama(tie_word_embeddings=True)
        model = load_model(str(base), lora=LoraOptions(r=2, target_modules=adapted))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(tmp_path / "adapter")
        export(tmp_path / "adapter", tmp_path / "out")
        found, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), torch.tensor([[5, 6, 7]])
        assert not found.config.tie_word_embeddings
        torch.testing.assert_close(found(ids).logits, model(ids).logits, rtol=0, atol=1e-4)

    def test_its_card_is_the_run_s_with_what_changed(self, bridle, recipe, tmp_path):
        run = tmp_path / "run"
        shape = {"form": "log-linear", "epochs": 1}
        assert bridle("train", recipe(auxiliary=shape, lora={"r": 2}), "--output_dir", run)[0] == 0
        before = ModelCard((run / "model" / "README.md").read_text("utf-8"))
        certificate = {
            "statement": "At most 1% violate.",
            "limits": ["Other weights."],
            "candidates": [{}],
            "details": {},
        }
        assert "At most 1%" in add_certificate(run / "model", **certificate).read_text("utf-8")
        assert bridle("export", run, tmp_path / "out", "--dtype", "bfloat16")[0] == 0
        assert bridle("export", run, tmp_path / "folded", "--fold", "--guidance_scale", 2)[0] == 0
        plain, folded = (ModelCard((tmp_path / name / "README.md").read_text("utf-8")) for name in ("out", "folded"))
        assert before.data.library_name == "peft"
        assert "lora" in before.data.tags
        for card in (plain, folded):
            assert card.data.library_name == "transformers"
            assert "lora" not in card.data.tags
            assert "PeftModel" not in card.text
            assert card.text.count("## How to load it") == 1
            assert before.text.partition("## Intended use")[0] in card.text
            assert "## Citation" in card.text
            assert "At most 1%" not in card.text, "a certificate is of the weights that were tested"
        assert "weights are in bfloat16" in plain.text
        assert "η =" not in plain.text
        assert "η = 2.0" in folded.text
        assert "nado-decoding" in folded.data.tags

    def test_a_model_without_a_card_of_ours_gets_one(self, llama, tmp_path):
        folder = llama()
        (folder / "README.md").write_text("---\n: not a header\n---\n# Another's", encoding="utf-8")
        export(folder, tmp_path / "out")
        card = ModelCard((tmp_path / "out" / "README.md").read_text("utf-8"))
        assert card.text.lstrip().startswith("# base, exported")
        assert card.data.tags == ["bridle"]
        assert str(tmp_path) not in card.content
        assert "base_model" not in card.content

    def test_the_dtype_is_that_asked_for(self, llama, tmp_path):
        export(llama(), tmp_path / "out", dtype="bfloat16")
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16

    @pytest.mark.parametrize(
        ("own", "expected"),
        [({}, (True, 0)), ({"do_sample": True, "top_k": 9}, (True, 9)), ({"do_sample": False}, (False, None))],
    )
    def test_servers_sample_unless_the_model_says_otherwise(self, llama, tmp_path, own, expected):
        folder = llama()
        GenerationConfig(**own).save_pretrained(folder)
        export(folder, tmp_path / "out")
        found = GenerationConfig.from_pretrained(tmp_path / "out")
        assert (found.do_sample, found.top_k) == expected

    def test_servers_end_a_turn_where_bridle_does(self, llama, tmp_path):
        chat = chat_tokenizer(TEMPLATES["smollm2"][0])
        folder = llama(chat)
        export(folder, tmp_path / "out")
        ends = GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id
        assert chat.convert_tokens_to_ids(TEMPLATES["smollm2"][1]) in ends
        assert ends == end_token_ids(load_model(str(folder)), load_tokenizer(str(folder)))

    def test_nothing_is_overwritten(self, bridle, llama):
        folder = llama()
        code, _, err = bridle("export", folder, folder)
        assert (code, err) == (2, f"bridle: {folder}: exists already; name another folder\n")

    @pytest.mark.parametrize("folded", [False, True])
    def test_transformers_serves_it(self, llama, tmp_path, folded):
        folder, guide = llama(), None
        if folded:
            guide = tmp_path / "R"
            log_linear(load_model(str(folder))).save_pretrained(guide)
        export(folder, tmp_path / "out", auxiliary=guide)
        served = complete(tmp_path / "out", "The kettle", max_tokens=6)
        model, tokenizer = (load(str(tmp_path / "out")) for load in (load_model, load_tokenizer))
        ids = tokenizer("The kettle")["input_ids"]
        assert served == tokenizer.decode(greedy(model, ids, 6)[len(ids) :], skip_special_tokens=True)


class TestFold:
    @pytest.mark.parametrize("scale", [1.0, 2.5])
    @pytest.mark.parametrize(
        ("model_type", "options"),
        [
            *(
                (name, {"tie_word_embeddings": tied})
                for name in ("gpt2", "llama", "qwen2", "falcon")
                for tied in (False, True)
            ),
            ("granite", {"logits_scaling": 4.0}),
            ("cohere", {"logit_scale": 0.5}),
            ("falcon_h1", {"lm_head_multiplier": 0.3}),
        ],
    )
    @torch.no_grad()
    def test_next_tokens_are_those_of_guided_decoding(self, tiny_model, tmp_path, model_type, options, scale):
        model = tiny_model(model_type, initializer_range=0.1, **options)
        auxiliary = log_linear(model)
        ids = torch.randint(3, 60, (2, 7))
        with NADOGuide(model, auxiliary, scale) as guide:
            plain = model(ids).logits
            expected = guide.log_probs(plain, ids, torch.ones_like(ids))
        fold(model, auxiliary, scale)
        model.save_pretrained(tmp_path)
        found = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert not found.config.tie_word_embeddings
        torch.testing.assert_close(found(ids).logits.log_softmax(-1), expected, rtol=0, atol=1e-4)
        assert (plain.log_softmax(-1) - expected).abs().max() > 0.1, "it must say something"

    def test_of_a_run_s_r(self, bridle, recipe, tmp_path, caplog):
        run = tmp_path / "run"
        shape = {"form": "log-linear", "epochs": 2, "batch_size": 8, "learning_rate": 0.05}
        assert bridle("train", recipe(auxiliary=shape, lora={"r": 2}), "--output_dir", run)[0] == 0
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert all(record["rude/r_excess"] >= 0 for record in records if "round" in record)
        code, _, err = bridle("export", run, tmp_path / "out", "--fold", "--guidance_scale", 2)
        assert code == 0, err
        draw = ("--prompt", "the old", "--max_new_tokens", 8)
        guided = bridle("generate", run / "model", "--guide", run / "auxiliary", "--guidance_scale", 2, *draw)
        assert bridle("generate", tmp_path / "out", *draw) == guided
        code, _, err = bridle("export", run, tmp_path / "one", "--fold", "--guide", run / "auxiliary" / "round-1")
        assert code == 0, err
        assert "fitted on another model" in caplog.text

    def test_what_cannot_be_folded_is_refused(self, bridle, llama, tiny_model, tmp_path):
        folder, out = llama(), tmp_path / "out"
        new_auxiliary(load_model(str(folder))).save_pretrained(tmp_path / "R")
        _, _, err = bridle("export", folder, out, "--fold", "--guide", tmp_path / "R")
        assert err.startswith("bridle: fold: R has the sigmoid form")
        capped = tiny_model("gemma2", head_dim=16, num_key_value_heads=1, final_logit_softcapping=3.0)
        with pytest.raises(UserError, match=r"gemma2 caps its logits \(final_logit_softcapping\)"):
            fold(capped, log_linear(capped))
        assert "no auxiliary model here" in bridle("export", folder, out, "--fold")[2]
        assert "add --fold" in bridle("export", folder, out, "--guide", tmp_path / "R")[2]
        assert "leave it out" in bridle("export", folder, out, "--guidance_scale", 2)[2]
        assert "must be a finite number" in bridle("export", folder, out, "--fold", "--guidance_scale", -1)[2]
        assert not out.exists()


def log_linear(model):
    """An R of the log-linear form that has something to say."""
    auxiliary = new_auxiliary(model, form="log-linear", head_rank=4, memory=8)
    torch.nn.init.normal_(auxiliary.head.weight, std=0.5)
    torch.nn.init.uniform_(auxiliary.scale, 0.5, 2.0)
    return auxiliary.eval()


class TestGGUF:
    @pytest.mark.parametrize("adapted", [False, True])
    @pytest.mark.parametrize("tied", [False, True])
    def test_transformers_reads_it_back(self, bridle, llama, tmp_path, tied, adapted):
        folder, file = llama(tie_word_embeddings=tied), tmp_path / "out.gguf"
        tokenizer = load_tokenizer(str(folder))
        source = folder
        if adapted:
            source = tmp_path / "adapter"
            model = load_model(str(folder), lora=LoraOptions(r=2))
            torch.nn.init.normal_(model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight)
            model.save_pretrained(source)
            tokenizer.save_pretrained(source)
        code, _, err = bridle("export", source, file, "--gguf")
        assert code == 0, err
        options = {"gguf_file": file.name, "quantization_config": GgufConfig(dequantize=True)}
        found = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, **options)
        ids = tokenizer(TEXT)["input_ids"]
        assert AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)(TEXT)["input_ids"] == ids
        assert greedy(found, ids) == greedy(load_model(str(source)), ids)
        assert load_tokenizer(str(file))(TEXT)["input_ids"] == ids

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_half_precision(self, llama, tmp_path, dtype):
        folder = llama()
        export(folder, tmp_path / "out.gguf", gguf=True, dtype=dtype)
        found, expected = load_model(str(tmp_path / "out.gguf")), load_model(str(folder), dtype=dtype).float()
        torch.testing.assert_close(found.lm_head.weight, expected.lm_head.weight, rtol=0, atol=0)

    @pytest.mark.parametrize("tied", [False, True])
    def test_llama_cpp_says_the_same(self, llama, tmp_path, tied):
        """The engine comes with the package node-llama-cpp of npm."""
        if not shutil.which("node") or not (NODE / "node_modules" / "node-llama-cpp").is_dir():
            pytest.skip(
                f"no node-llama-cpp in {NODE}: npm install --ignore-scripts node-llama-cpp (or BRIDLE_NODE=FOLDER)"
            )
        folder, file = llama(tie_word_embeddings=tied, **LARGE), tmp_path / "out.gguf"
        export(folder, file, gguf=True)
        tokenizer = load_tokenizer(str(folder))
        ids = tokenizer(TEXT)["input_ids"]
        said = subprocess.run(
            ["node", ROOT / "tests" / "llama_cpp.mjs", file, json.dumps(ids), "8", TEXT],
            **{"cwd": NODE, "capture_output": True, "text": True, "check": True, "timeout": 120},
        )
        found = json.loads(said.stdout.splitlines()[-1])
        assert found["tokens"] == tokenizer(TEXT, add_special_tokens=False)["input_ids"]
        assert found["drawn"] == greedy(load_model(str(folder)), ids)[len(ids) :]

    def test_it_is_what_llama_cpp_s_converter_writes(self, tiny_model, tmp_path):
        tokenizer = tiny_tokenizers.tiny_tokenizer()
        model = tiny_model("llama", vocab_size=len(tokenizer), **HEADS)
        write_gguf(tmp_path / "tiny.gguf", model, tokenizer)
        reference(tmp_path / "reference.gguf", model, tokenizer)
        write_gguf(tmp_path / ".tiny.gguf.7.tmp", model, tokenizer, "tiny")
        assert content(tmp_path / ".tiny.gguf.7.tmp") == content(tmp_path / "tiny.gguf")
        found, expected = (content(tmp_path / name) for name in ("tiny.gguf", "reference.gguf"))
        assert {key: found[0].get(key) for key in expected[0]} == expected[0]
        assert found[1] == expected[1]

    def test_what_it_does_not_write_is_refused(self, bridle, llama, tmp_path):
        whole_numbers, as_gpt2 = tiny_tokenizers.tiny_tokenizer(), pre_tokenizers.ByteLevel(add_prefix_space=False)
        steps = [pre_tokenizers.Digits(individual_digits=False), as_gpt2]
        whole_numbers.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
        for words, folder in [
            ("not gpt2", {"model_type": "gpt2"}),
            ("has no biases, and this model has 'model.layers.0.self_attn.q_proj.bias'", {"attention_bias": True}),
            ("scales positions (linear)", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}),
            ("writes byte-level tokenizers", {"tokenizer": tiny_tokenizers.tiny_tokenizer(metaspace=True)}),
            ("writes byte-level tokenizers", {"tokenizer": whole_numbers}),
        ]:
            code, _, err = bridle("export", llama(**folder), tmp_path / "out.gguf", "--gguf")
            assert code == 2
            assert err.startswith("bridle: --gguf: ")
            assert words in err
        assert not (tmp_path / "out.gguf").exists()

    def test_the_name_says_what_is_written(self, bridle, llama, tmp_path):
        assert "name a file NAME.gguf" in bridle("export", llama(), tmp_path / "out", "--gguf")[2]
        assert "a GGUF file is written with --gguf" in bridle("export", llama(), tmp_path / "out.gguf")[2]


def content(path):
    """The metadata of a GGUF file, and its tensors."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    fields = {key: json.dumps(field.contents()) for key, field in reader.fields.items() if not key.startswith("GGUF")}
    tensors = {tensor.name: (tensor.tensor_type, tensor.data.tobytes()) for tensor in reader.tensors}
    return fields, tensors


def complete(folder, prompt, **options):
    """The likeliest completion of a model by `transformers serve`, over HTTP."""
    with transformers_serving(folder) as url:
        body = json.dumps({"model": str(folder), "prompt": prompt, "temperature": 0, **options}).encode()
        headers = {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(f"{url}/completions", body, headers), timeout=60) as answer:
            return json.load(answer)["choices"][0]["text"]
