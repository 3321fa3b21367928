"""A model behind an OpenAI-compatible server: how it is asked, what is refused, and a real server."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_export import log_linear

from bridle.constraints.reading import turns_of
from bridle.data import DataSource, Prompt
from bridle.errors import UserError
from bridle.evaluation.prompt_sets import GenerationOptions, PromptSet
from bridle.evaluation.served import ServedModel
from bridle.models.loading import load_model
from loopback import completion, error, ok, transformers_serving

KEY = "sk-invented-0123456789"
CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "why do ships float"}]
PROMPTS = [Prompt("the kettle", []), Prompt("user: why", [], messages=CHAT), Prompt("bread is", [])]


def violation_rate(path):
    (found,) = json.loads(path.read_text())["generation"]["unseen.jsonl"].values()
    return found["violation_rate"]


def continued(request):
    """Goes on from a text or a chat, differently for each seed."""
    if "messages" in request:
        return completion(f"said {request['seed']}")
    return ok({"choices": [{"text": f" after {request['prompt']} {request['seed']}"}]})


@pytest.fixture
def served(server):
    """A factory of models of the server."""
    server.answer = continued

    def make(url=f"{server.url}/v1/", **options):
        patient = {"sleep": lambda seconds: None, "timeout": 5.0, "retries": 1}
        return ServedModel(url, "kind-model", endpoint=patient, **options)

    return make


class TestProtocol:
    def test_texts_and_chats_are_asked_as_the_set_says(self, served, server, monkeypatch):
        monkeypatch.setenv("MY_KEY", KEY)
        how = GenerationOptions(0.5, 0.8, samples=2, max_new_tokens=7)
        drawn = served(api_key_env="MY_KEY").draw(PROMPTS, how)
        asked = [(path, headers["Authorization"], json.loads(body)) for path, headers, body in server.requests]
        assert {(path, "messages" in body) for path, _, body in asked} == {
            ("/v1/completions", False), ("/v1/chat/completions", True)
        }  # fmt: skip
        for _, key, body in asked:
            assert key == f"Bearer {KEY}"
            assert body["model"] == "kind-model"
            assert (body["temperature"], body["top_p"], body["max_tokens"]) == (0.5, 0.8, 7)
            assert body.get("messages", CHAT) == CHAT
        assert len({body["seed"] for _, _, body in asked}) == 6
        assert all(text.startswith(" after the kettle ") for text in drawn[0])
        assert all(text.startswith("said ") for text in drawn[1])
        assert all(text.startswith(" after bread is ") for text in drawn[2])
        assert drawn == served(api_key_env="MY_KEY").draw(PROMPTS, how), "the same seed asks the same"
        assert drawn != served(api_key_env="MY_KEY", seed=1).draw(PROMPTS, how)

    def test_greedy_is_temperature_0(self, served, server):
        served().draw(PROMPTS, GenerationOptions(greedy=True, samples=1))
        assert {body["temperature"] for body in server.bodies} == {0}

    @pytest.mark.parametrize(
        ("answer", "reason"),
        [(error(400, code="content_filter"), "content_filter"), (ok({"choices": []}), "no completion in the answer")],
    )
    def test_a_set_with_a_gap_gives_no_rate(self, served, server, answer, reason):
        server.script.append(answer)
        with pytest.raises(UserError, match=f"no completion for 1 of 3 requests.*biased.*{reason}"):
            served().draw(PROMPTS, GenerationOptions(samples=1))

    def test_a_fault_that_passes_is_asked_again(self, served, server):
        server.script.append(error(503))
        assert len(served().draw(PROMPTS, GenerationOptions(samples=1))) == 3
        assert len(server.requests) == 4

    def test_a_server_that_ignores_the_temperature_is_found_out(self, served, server):
        server.answer = lambda request: ok({"choices": [{"text": " always the same"}]})
        texts = [PROMPTS[0], PROMPTS[2]]
        with pytest.raises(UserError, match=r"decodes greedily.*do_sample"):
            served().draw(texts, GenerationOptions(samples=2))
        assert served().draw(texts, GenerationOptions(samples=1)) == [[" always the same"]] * 2

    def test_a_certificate_is_not_of_a_server_that_ignores_the_temperature(self, served, server):
        """It draws one completion a prompt, which does not show it: a few prompts are completed twice before."""
        server.answer = lambda request: ok({"choices": [{"text": " always the same"}]})
        with pytest.raises(UserError, match=r"decodes greedily.*do_sample"):
            served().check_sampling([PROMPTS[0], PROMPTS[2]], GenerationOptions(samples=1))
        served().check_sampling(PROMPTS, GenerationOptions(greedy=True, samples=1))
        server.answer = continued
        served().check_sampling([PROMPTS[0], PROMPTS[2]], GenerationOptions(samples=1))

    @pytest.mark.parametrize("url", ["http://example.org/v1", "https://host/v1?key=secret"])
    def test_keys_are_guarded(self, served, url):
        with pytest.raises(UserError, match="model kind-model: url"):
            served(url=url, api_key_env="MY_KEY")


class TestPrompts:
    def test_tokens_need_a_tokenizer(self, served, tiny_tokenizer, tmp_path):
        path = tmp_path / "prompts.jsonl"
        path.write_text(json.dumps({"text": "ship sails away"}) + "\n")
        prompts = PromptSet("ships", DataSource(str(path)), GenerationOptions(prompt_tokens=2))
        with pytest.raises(UserError, match=r"prompts.jsonl row 1: its first 2 tokens .* --tokenizer"):
            served().read(prompts)
        (cut,) = served(tokenizer=tiny_tokenizer).read(prompts)
        assert "ship sails away".startswith(cut.text)
        (whole,) = served().read(PromptSet("ships", DataSource(str(path)), GenerationOptions()))
        assert (whole.text, whole.ids) == ("ship sails away", [])

    def test_keys_that_arrow_adds_to_a_turn_are_not_sent(self, served):
        turns = [{"role": "user", "content": "hi", "tool_calls": None, "name": None}]
        body = served()._body(Prompt("hi", [], messages=turns), GenerationOptions(), (0, 0))
        assert body["messages"] == [{"role": "user", "content": "hi"}]
        assert turns_of(turns) == body["messages"]

    def test_chats_go_to_the_server_s_own_template(self, served, tmp_path):
        path = tmp_path / "chats.jsonl"
        answered = {"messages": [*CHAT, {"role": "assistant", "content": "they are light"}]}
        path.write_text(json.dumps(answered) + "\n" + json.dumps({"messages": CHAT}) + "\n")
        read = served().read(PromptSet("chats", DataSource(str(path)), GenerationOptions()))
        assert [prompt.messages for prompt in read] == [CHAT, CHAT]
        path.write_text(json.dumps({"messages": CHAT, "chat_template_kwargs": '{"enable_thinking": false}'}) + "\n")
        with pytest.raises(UserError, match="row 1: enable_thinking: a server sets"):
            served().read(PromptSet("chats", DataSource(str(path)), GenerationOptions()))


class TestCommands:
    @pytest.fixture(autouse=True)
    def folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        rows = "".join(json.dumps({"prompt": f"ship {number}"}) + "\n" for number in range(40))
        (tmp_path / "unseen.jsonl").write_text(rows)
        return tmp_path

    def measured(self, command, url, *options):
        return (command, url, "--model", "kind-model", "--prompts", "unseen.jsonl", "--constraint", "regex:7", *options)

    def test_evaluate(self, bridle, served, server, folder):
        keep = ("--samples", 2, "--json", "out.json", "--completions", "out.jsonl")
        code, _, err = bridle(*self.measured("evaluate", f"{server.url}/v1", *keep))
        assert code == 0, err
        found = json.loads((folder / "out.json").read_text())
        rows = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
        assert found["model"] == "kind-model"
        assert found["settings"]["server"] == f"{server.url}/v1"
        rate = violation_rate(folder / "out.json")
        assert (len(rows), rate["value"]) == (80, sum("7" in row["completion"] for row in rows) / 80)
        assert 0 < rate["value"] < 1

    def test_certify(self, bridle, served, server, folder):
        lenient = ("--rate", 0.99, "--confidence", 0.6)
        server.answer = lambda request: ok({"choices": [{"text": " always the same"}]})
        code, _, err = bridle(*self.measured("certify", f"{server.url}/v1", *lenient))
        assert (code, list(folder.glob("certificate*"))) == (2, [])
        assert "decodes greedily" in err
        server.answer = continued
        code, _, err = bridle(*self.measured("certify", f"{server.url}/v1", *lenient))
        assert code == 0, err
        found = json.loads((folder / "certificate.json").read_text())
        assert found["certified"] == f"kind-model at {server.url}/v1"
        assert found["tried"][0]["weights"] == ""
        assert any("Its weights were not seen" in limit for limit in found["not_covered"])
        assert bridle("certify", "--verify", "certificate.json", "--constraint", "regex:7")[0] == 0

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--perplexity", "unseen.jsonl"], "--perplexity needs the model's weights"),
            (["--dtype", "bfloat16"], "--dtype needs the model's weights"),
        ],
    )
    @pytest.mark.parametrize("command", ["evaluate", "certify"])
    def test_what_needs_weights_is_refused(self, bridle, served, server, command, options, message):
        code, _, err = bridle(*self.measured(command, f"{server.url}/v1", *options))
        assert (code, server.requests) == (2, [])
        assert message in err

    @pytest.mark.parametrize("command", ["evaluate", "certify"])
    def test_a_tokenizer_that_cuts_nothing_is_refused(self, bridle, served, server, command):
        code, _, err = bridle(*self.measured(command, f"{server.url}/v1", "--tokenizer", "nowhere"))
        assert (code, server.requests) == (2, [])
        assert "--tokenizer cuts prompts to --prompt_tokens; give both, or leave it out" in err
        cut = ("--tokenizer", "nowhere", "--prompt_tokens", 1)
        code, _, err = bridle(*self.measured(command, f"{server.url}/v1", *cut))
        assert (code, "nowhere: no such folder" in err) == (2, True)

    @pytest.mark.parametrize("command", ["evaluate", "certify"])
    def test_names_belong_to_servers(self, bridle, server, command):
        asked = ("--prompts", "unseen.jsonl", "--constraint", "regex:7")
        code, _, err = bridle(command, f"{server.url}/v1", *asked)
        assert (code, "with --model NAME" in err) == (2, True)
        code, _, err = bridle(command, "folder", *asked, "--model", "kind-model")
        assert (code, "--model is for a model behind a server" in err) == (2, True)

    def test_a_server_is_certified_alone(self, bridle, server):
        code, _, err = bridle(*self.measured("certify", f"{server.url}/v1", "folder", "--development", "unseen.jsonl"))
        assert (code, "certified alone" in err) == (2, True)


def test_what_is_deployed_is_what_is_measured(bridle, tiny_folder, tmp_path, monkeypatch):
    """A model with R folded in, behind `transformers serve`, samples as guided decoding does here."""
    monkeypatch.chdir(tmp_path)
    model = tiny_folder()
    weights = load_file(model / "model.safetensors")
    torch.manual_seed(0)
    save_file({name: 6 * torch.randn_like(value) if "lm_head" in name else value for name, value in weights.items()},
              model / "model.safetensors", {"format": "pt"})  # fmt: skip
    auxiliary = log_linear(load_model(str(model)))
    torch.nn.init.normal_(auxiliary.head.weight, std=1.2)  # beside logits as large as these
    auxiliary.save_pretrained(tmp_path / "R")
    guided = ("--guide", "R", "--guidance_scale", 2)
    assert bridle("export", model, "deployed", "--fold", *guided)[0] == 0
    rows = "".join(json.dumps({"prompt": f"ship {number}"}) + "\n" for number in range(60))
    (tmp_path / "unseen.jsonl").write_text(rows)
    measured = ("--prompts", "unseen.jsonl", "--constraint", "regex:[a-m]", "--max_new_tokens", 1, "--samples", 4)
    settings = json.loads((tmp_path / "deployed/generation_config.json").read_text())
    assert (settings["do_sample"], settings["top_k"]) == (True, 0), "else transformers takes 50 tokens, or one"
    with transformers_serving(tmp_path / "deployed") as url:
        served = (url, "--model", tmp_path / "deployed", *measured, "--json", "served.json")
        code, _, err = bridle("evaluate", *served)
        assert code == 0, err
    assert bridle("evaluate", model, *guided, *measured, "--json", "here.json")[0] == 0
    assert bridle("evaluate", model, *measured, "--json", "plain.json")[0] == 0
    there, here, plain = (violation_rate(tmp_path / f"{name}.json") for name in ("served", "here", "plain"))
    assert 0.05 < here["value"] < 0.95
    assert there["low"] <= here["high"]
    assert here["low"] <= there["high"]
    assert abs(plain["value"] - here["value"]) > 0.05, "R must say something"
