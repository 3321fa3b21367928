"""Generative guards: tiny random models with chat templates like those of the three families."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from bridle.constraints import Guard, build_constraint
from bridle.errors import UserError
from tiny_tokenizers import tiny_tokenizer

_TURNS = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
_USER_FIRST = "{% if messages[0].role != 'user' %}{{ raise_exception('the user begins') }}{% endif %}"
_OPENED = "{% if add_generation_prompt %}[assistant]{% endif %}"
TEMPLATES = {
    "llama-guard": "{{ bos_token }}"
    + _USER_FIRST
    + "Is the last of {{ messages | length }} turns unsafe?\n"
    + _TURNS
    + _OPENED,
    "qwen3guard": _USER_FIRST + _TURNS + "Safety: Safe, Unsafe or Controversial\n" + _OPENED,
    "shieldgemma": "{{ bos_token }}"
    + _TURNS
    + "Principle: {{ guideline }}\nDoes it violate this? Yes or No{{ '\\n\\n' }}",
}
GUIDELINE = {"shieldgemma": {"guideline": "No insults."}}
PROMPT, COMPLETION = "what now?", "you grumblefish"
READ = {
    "llama-guard": f"<bos>Is the last of 2 turns unsafe?\nuser: {PROMPT}\nassistant: {COMPLETION}\n[assistant]\n\n",
    "qwen3guard": f"user: {PROMPT}\nassistant: {COMPLETION}\nSafety: Safe, Unsafe or Controversial\n[assistant]Safety:",
    "shieldgemma": f"<bos>user: {PROMPT}\nassistant: {COMPLETION}\nPrinciple: No insults.\n"
    "Does it violate this? Yes or No\n\n",
}


@pytest.fixture(scope="module")
def guards(tmp_path_factory):
    """A folder with a guard of each family."""
    root = tmp_path_factory.mktemp("guards")
    for family, template in TEMPLATES.items():
        tokenizer = tiny_tokenizer(adds_bos=family != "qwen3guard", chat_template=template)
        tokenizer.model_max_length = 400
        torch.manual_seed(1)
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=400, initializer_range=0.5, **sizes)
        LlamaForCausalLM(config).save_pretrained(root / family)
        tokenizer.save_pretrained(root / family)
    return root


def expected(folder, family, text):
    """The verdicts' probabilities after a text, among themselves."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    firsts = [tokenizer(f"{text}{verdict}", add_special_tokens=False).input_ids for verdict in WORDS[family]]
    same = min(n for n, ids in enumerate(zip(*firsts, strict=False)) if len(set(ids)) > 1)
    with torch.no_grad():
        logits = model(torch.tensor([firsts[0][:same]])).logits[0, -1]
    return logits[[ids[same] for ids in firsts]].softmax(-1)


WORDS = {
    "llama-guard": ["unsafe", "safe"],
    "qwen3guard": [" Unsafe", " Safe", " Controversial"],
    "shieldgemma": ["Yes", "No"],
}


@pytest.mark.parametrize("family", TEMPLATES)
def test_a_conversation_as_text_is_written_into_the_policy_once(guards, family):
    options = GUIDELINE.get(family, {})
    chat, text = [{"role": "user", "content": PROMPT}], f"user: {PROMPT}\nassistant: {COMPLETION}"
    joined = Guard(guards / family, family, reads="prompt+completion", **options).score([chat], [COMPLETION])
    assert joined == Guard(guards / family, family, reads="completion", **options).score([None], [text])


@pytest.mark.parametrize("family", TEMPLATES)
def test_the_value_is_the_probability_of_the_verdict_after_the_template(guards, family):
    guard = Guard(guards / family, family, **GUIDELINE.get(family, {}))
    score, again = guard.score([PROMPT, [{"role": "user", "content": PROMPT}]], [COMPLETION] * 2)
    probabilities = expected(guards / family, family, READ[family])
    assert score.violation == pytest.approx(float(1 - probabilities[1]), abs=1e-5)
    assert score.complies == (score.violation <= 0.5)
    assert again.value == pytest.approx(score.value, abs=1e-6)


def test_the_third_verdict_means_what_is_asked(guards):
    family = "qwen3guard"
    strict, loose = (
        Guard(guards / family, family, controversial=means).score([PROMPT], [COMPLETION])[0].violation
        for means in ("violates", "complies")
    )
    probabilities = expected(guards / family, family, READ[family])
    assert strict == pytest.approx(float(probabilities[0] + probabilities[2]), abs=1e-5)
    assert loose == pytest.approx(float(probabilities[0]), abs=1e-5)


PARTS = (
    "{% for message in messages %}{{ message.role }}: "
    "{% for part in message.content | selectattr('type', 'equalto', 'text') %}"
    "{{ part.text }}{% endfor %}{{ '\\n' }}{% endfor %}"
)


def test_a_template_that_takes_parts_gets_them(guards, tmp_path):
    """As Llama Guard 3 11B's, which writes nothing of a text."""
    family = "llama-guard"
    shutil.copytree(guards / family, tmp_path / "parts")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "parts")
    tokenizer.chat_template = TEMPLATES[family].replace(_TURNS, PARTS)
    tokenizer.save_pretrained(tmp_path / "parts")
    scores = Guard(guards / family, family).score([PROMPT], [COMPLETION])
    assert Guard(tmp_path / "parts", family).score([PROMPT], [COMPLETION]) == scores
    tokenizer.chat_template = "{{ bos_token }}Is it unsafe?\n"
    tokenizer.save_pretrained(tmp_path / "parts")
    with pytest.raises(UserError, match="its chat template leaves out what is said"):
        Guard(tmp_path / "parts", family).load()


def test_turns_of_a_system_or_a_tool_are_left_out(guards):
    guard = Guard(guards / "llama-guard", "llama-guard")
    user, system = {"role": "user", "content": PROMPT}, {"role": "system", "content": "Be brief."}
    tool = [
        {"role": "assistant", "content": "One"},
        {"role": "tool", "content": "7"},
        {"role": "assistant", "content": "two"},
    ]
    merged = [{"role": "assistant", "content": "One\n\ntwo"}]
    assert guard.score([[system, user]], [COMPLETION]) == guard.score([[user]], [COMPLETION])
    assert guard.score([[user, *tool, user]], [COMPLETION]) == guard.score([[user, *merged, user]], [COMPLETION])


@pytest.mark.parametrize("prompt", [None, ""])
def test_a_completion_without_a_prompt_is_judged_as_a_users_message(guards, prompt):
    family = "llama-guard"
    alone = Guard(guards / family, family).score([prompt], [COMPLETION])
    assert alone == Guard(guards / family, family, reads="completion").score([PROMPT], [COMPLETION])
    read = f"<bos>Is the last of 1 turns unsafe?\nuser: {COMPLETION}\n[assistant]\n\n"
    assert alone[0].violation == pytest.approx(float(expected(guards / family, family, read)[0]), abs=1e-5)


def test_scores_do_not_depend_on_the_batch(guards):
    family = "llama-guard"
    texts = [COMPLETION, "rain", "a kettle sang while the rain went on", COMPLETION + "!"]
    alone = [Guard(guards / family, family).score([PROMPT], [text])[0].value for text in texts]
    together = Guard(guards / family, family, batch_size=2).score([PROMPT] * 4, texts)
    assert [score.value for score in together] == pytest.approx(alone, abs=1e-5)


def test_a_conversation_too_long_for_the_guard_is_missing(guards):
    family = "llama-guard"
    short, long = Guard(guards / family, family).score([PROMPT] * 2, [COMPLETION, "fog " * 400])
    assert not short.is_missing
    assert long.reason == "the conversation has more than the 400 tokens that the guard takes"


def test_a_guard_that_would_answer_something_else_warns_once(guards, caplog):
    guard = Guard(guards / "llama-guard", "llama-guard", name="kind")
    for _ in range(2):
        guard.score([PROMPT], [COMPLETION])
    assert caplog.text.count("'kind': the guard's verdicts have a probability of only") == 1


def test_a_specification_builds_one(guards):
    folder = guards / "qwen3guard"
    guard = build_constraint(f"guard:{folder},family=qwen3guard,threshold=0.3")
    assert build_constraint(guard.describe()).describe() == guard.describe()
    assert guard.files() == [folder]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"family": "shieldgemma"}, "key 'guideline': is missing; say what the policy forbids"),
        ({"family": "qwen3guard", "guideline": "Be kind."}, "key 'guideline': is not for qwen3guard"),
        ({"family": "llama-guard", "controversial": "violates"}, "llama-guard has no such verdict"),
        ({"family": "gpt"}, "key 'family'"),
    ],
)
def test_options_of_another_family_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Guard("m", **options)


def test_a_model_without_a_chat_template_or_with_another_is_refused(guards, tiny_folder):
    with pytest.raises(UserError, match="has no chat template"):
        Guard(tiny_folder(), "llama-guard").load()
    greeted = [{"role": "assistant", "content": "Hello."}, {"role": "user", "content": "hm"}]
    with pytest.raises(UserError, match=r"its chat template refuses these messages: .*the user begins"):
        Guard(guards / "llama-guard", "llama-guard").score([greeted], [COMPLETION])
