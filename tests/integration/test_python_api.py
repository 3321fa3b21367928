"""`ConstrainedTrainer` and its options in a Python program: what is meant is done, or refused in one line."""

import json
import re
import shutil

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import (
    CartridgeConfig,
    LoHaConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import ProcessorMixin, TrainerCallback
from trl import SFTConfig, TrlParser

from bridle.errors import UserError
from bridle.models.auxiliary import acting_parameters, fingerprint, new_auxiliary
from bridle.models.hidden import causal_lm, project
from bridle.models.loading import LoraOptions, load_for_inference, load_model, load_tokenizer
from bridle.recipes.recipe import load_recipe
from bridle.recipes.run import train
from bridle.training.config import AuxiliaryOptions, ConstrainedConfig, EvalOptions, ParallelOptions, Regulariser
from bridle.training.trainer import ConstrainedTrainer
from bridle.utils.settings import parse_yaml
from conftest import SENTENCES
from trainers import NO_E, config, corpus, logged, trainer_of, weights


def refused(act, said):
    with pytest.raises(UserError) as caught:
        act()
    assert re.search(said, str(caught.value)), caught.value
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kl_on": "rollout"}, "^kl_on: there is no choice 'rollout'; did you mean rollouts?"),
        ({"anchor": "liv"}, "^anchor: there is no choice 'liv'; did you mean live?"),
        ({"weight": "heavy"}, "^weight: input should be a valid number"),
        ({"weight": True}, "^weight: needs a value, not true"),
        ({"soft_labels": "perhaps"}, "^soft_labels: input should be a valid boolean"),
        ({"prompts": "forum.jsonl"}, "^prompts: must be a mapping"),
        ({"prompts": AuxiliaryOptions()}, "^prompts: must be a mapping"),
        ({"constraint": 5}, "^constraint: input should be an instance of constraint"),
        ({"constraint": "regexp:e"}, "did you mean regex"),
        ({"domain": 5}, "^domain: input should be a valid string"),
    ],
)
def test_a_regulariser_is_checked(options, said):
    refused(lambda: Regulariser(**{"constraint": NO_E, **options}), said)


@pytest.mark.parametrize(
    ("cls", "options", "said"),
    [
        (
            ConstrainedConfig,
            {"schedule": "par"},
            "^schedule: there is no choice 'par'; there are: parallel, sequential",
        ),
        (ConstrainedConfig, {"rounds": 1.5}, "^rounds: input should be a valid integer"),
        (ConstrainedConfig, {"targets": "compute"}, "^targets: there is no choice 'compute'; did you mean computed?"),
        (
            ConstrainedConfig,
            {"auxiliary": {"depht": 2}},
            "^auxiliary.depht: there is no key 'depht'; did you mean depth?",
        ),
        (ConstrainedConfig, {"parallel": AuxiliaryOptions()}, "^parallel: must be a mapping"),
        (ConstrainedConfig, {"num_train_epochs": 0}, "^num_train_epochs: must be above 0"),
        (ConstrainedConfig, {"max_grad_norm": None}, "^max_grad_norm: must be at least 0, not None"),
        (AuxiliaryOptions, {"epochs": 0}, "^epochs: input should be greater than 0"),
        (AuxiliaryOptions, {"depth": 1.5}, "^depth: input should be a valid integer"),
        (ParallelOptions, {"patience": "long"}, "^patience: input should be a valid number"),
    ],
)
def test_options_are_checked(cls, options, said, tmp_path):
    folder = {"output_dir": str(tmp_path)} if cls is ConstrainedConfig else {}
    refused(lambda: cls(**folder, **options), said)


def test_the_configuration_is_read_by_trl_s_parser(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(f"output_dir: {tmp_path}\nrounds: 3\nschedule: parallel\nauxiliary: {{depth: 2}}\n")
    (read,) = TrlParser(ConstrainedConfig).parse_args_and_config(["--config", str(path), "--max_new_tokens", "5"])
    assert (read.rounds, read.schedule, read.max_new_tokens) == (3, "parallel", 5)
    assert read.auxiliary == AuxiliaryOptions(depth=2)


class OneOfSeveral(ProcessorMixin):
    """A processor, which holds a tokenizer."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer


def test_names_and_functions_in_their_places(tiny_folder, tmp_path):
    """A model by its name, one data set, and a lambda: as `SFTTrainer` takes its own."""
    folder, rows = tiny_folder(), Dataset.from_dict({"text": SENTENCES * 4})
    trainer = ConstrainedTrainer(
        model=str(folder),
        args=config(tmp_path / "run", max_steps=1, rounds=1, model_init_kwargs={"dtype": "float64"}),
        corpus=rows,
        regularisers=Regulariser(lambda texts: [float("e" not in text) for text in texts]),
    )
    trainer.train()
    assert str(trainer.model.dtype) == "torch.float64"
    assert trainer.domains == ["corpus"]
    assert logged(trainer, "kl/all")
    (rollout, *_) = (tmp_path / "run" / "rollouts" / "round-1.all.jsonl").read_text().splitlines()
    assert (
        json.loads(rollout)["constraint"]
        == "python:test_python_api:test_names_and_functions_in_their_places.<locals>.<lambda>"
    )
    assert Regulariser("regex:e").constraint.describe()["pattern"] == "e"
    assert Regulariser("retention").is_retention

    old_name = config(tmp_path, model_init_kwargs={"torch_dtype": "bfloat16"})
    loaded_tokenizer = load_tokenizer(str(folder))
    loaded, with_images = load_model(str(folder)), rows.add_column("image", [None] * len(rows))
    tokens = Dataset.from_dict({"input_ids": [[5, 6, 7]]})
    for changes, said in (
        ({"corpus": rows.to_iterable_dataset()}, "^corpus: is streamed"),
        ({"corpus": {"a": rows.to_list()}}, "^corpus.a: must be a Dataset .*, not a list; Dataset.from_list makes one"),
        ({"corpus": DatasetDict(train=rows, test=rows)}, r"^corpus: has the splits train, test, .*corpus\['train'\]"),
        ({"corpus": {}}, "^corpus: has no domain"),
        ({"corpus": {"a": rows, "b": rows.select([])}}, "^corpus.b: has no rows"),
        ({"corpus": {"a": rows, "b": with_images}}, "^corpus.b: the column 'image' would not be read"),
        ({"corpus": {"a": rows.with_transform(dict)}}, "^corpus.a: with_transform"),
        ({"eval_options": EvalOptions(corpus={"corpus": with_images})}, "^eval.corpus.corpus: the column 'image'"),
        ({"eval_dataset": {"b": with_images}}, "^eval_dataset b: the column 'image' would not be read"),
        ({"eval_dataset": rows.rename_column("text", "prompt")}, "^eval_dataset eval: prompts alone have no loss"),
        ({"corpus": tokens, "formatting_func": str}, "^formatting_func: the corpus is tokenised already"),
        ({"model": loaded}, "^model_init_kwargs: the model is loaded already"),
        ({"args": old_name}, "^model_init_kwargs: torch_dtype is called dtype now; set dtype"),
        ({"args": SFTConfig(str(tmp_path), use_cpu=True, bf16=False)}, "^args: must be a ConstrainedConfig, not a SFT"),
        (
            {"processing_class": OneOfSeveral(loaded_tokenizer)},
            "^processing_class: .*, not a OneOfSeveral; give the tok",
        ),
        ({"quantization_config": {}}, "^quantization_config: is for loading; .* set it in args.model_init_kwargs"),
        ({"peft_config": LoHaConfig(target_modules=["q_proj"], module_dropout=0.5)}, "^peft_config.module_dropout: "),
        (
            {"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6)},
            "^peft_config: PromptTuningConfig puts virtual tokens before each row",
        ),
        (
            {"peft_config": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=6)},
            "^peft_config: PromptEncoderConfig puts virtual tokens before each row",
        ),
        ({"model": str(tmp_path / "nothing")}, "nothing: cannot load the model: no such folder"),
        ({"regularisers": NO_E}, "^regularisers.0: must be a Regulariser, not a Letters; Regulariser\\(constraint"),
        ({"regularisers": {"all": "regex:e"}}, "^regularisers.all: must be a Regulariser, not a str"),
        ({"train_dataset": rows}, "^train_dataset: the rows are those of corpus"),
        ({"eval_options": {"shares": 0.1}}, "^eval_options.shares: there is no key 'shares'; did you mean share"),
        ({"regularisers": [Regulariser(NO_E), Regulariser(NO_E)]}, "^regularisers: two are called 'all'"),
        ({"regularisers": [Regulariser(NO_E, domain="corpse")]}, "^regularisers.corpse.domain: .*did you mean corpus"),
        ({"regularisers": [Regulariser(NO_E, name="kl")]}, "^regularisers.kl: metrics are called kl; give"),
        ({"regularisers": [Regulariser(NO_E, name="lambda")]}, "^regularisers.lambda: metrics are called lambda; "),
        ({"regularisers": {"x/y": Regulariser(NO_E, domain="corpus")}}, "^regularisers.x/y: 'x/y' names files"),
    ):
        given = {"model": str(folder), "args": trainer.args, "corpus": rows, "regularisers": [Regulariser()], **changes}
        refused(lambda given=given: ConstrainedTrainer(**given), said)
    nothing = str(tmp_path / "checkpoint-9")
    refused(lambda: trainer.train(resume_from_checkpoint=nothing), "^resume_from_checkpoint: there is no folder .*-9$")


def test_rows_that_are_tokenised_already_stand_beside_text(tiny_folder, tmp_path):
    """Their masks say what is learnt and where rollouts begin; a prompt has no loss in evaluation either."""
    masked = [{"input_ids": [1, 9, 8, *range(5, 40)], "assistant_masks": [0, 0, 0] + [1] * 35}] * 8
    rows = {"plain": corpus()["plain"], "rude": Dataset.from_list(masked)}
    trainer = trainer_of(tiny_folder(), tmp_path, {"rude": Regulariser(NO_E)}, rows=rows, max_steps=2)
    trainer.train()
    assert trainer.tokenised["rude"][0] == {
        "input_ids": [1, 9, 8, *range(5, 26)],
        "labels": [-100] * 3 + [*range(5, 26)],
    }
    assert all(one.prompt_ids == [1, 9, 8] for one in trainer.regularisers[0].rollouts)
    alone = {"rude": Dataset.from_dict({"input_ids": [[1, *range(5, 20)]] * 8})}
    trainer_of(tiny_folder(), tmp_path, {"rude": Regulariser(NO_E)}, rows=alone, max_steps=2).train()


def test_rows_to_evaluate_on_are_read_as_those_of_the_corpus(tiny_folder, tmp_path):
    """Whatever they are called, and whatever the first domain of the corpus is."""
    asked = Dataset.from_list([{"prompt": SENTENCES[0], "completion": SENTENCES[1]}] * 4)
    trainer = ConstrainedTrainer(
        str(tiny_folder()),
        config(tmp_path, max_length=60),
        corpus(),
        {},
        eval_dataset={"train": asked, "text": corpus()["plain"]},
    )
    assert trainer.eval_dataset["train"]["labels"][0][:5] == [-100] * 5
    assert len(trainer.eval_dataset["text"]) == len(corpus()["plain"])
    found = trainer.evaluate()
    given = trainer.evaluate({"train": asked})
    assert given["eval_train_loss"] == found["eval_train_loss"] != trainer.evaluate(corpus()["plain"])["eval_loss"]
    streamed = corpus()["plain"].to_iterable_dataset()
    assert trainer.evaluate(streamed)["eval_loss"] == pytest.approx(found["eval_text_loss"])
    only = config(tmp_path, max_length=60, completion_only_loss=True)
    trainer = ConstrainedTrainer(str(tiny_folder()), only, asked, {}, eval_dataset={"text": corpus()["plain"]})
    assert trainer.evaluate()["eval_text_loss"] == pytest.approx(found["eval_text_loss"]), "text has no completion"


def test_prompts_that_are_held_are_not_formatted(tiny_folder, tmp_path):
    """The function makes text of what is learnt, and may read columns that prompts alone lack."""
    asked = Dataset.from_list([{"q": text, "a": "yes"} for text in SENTENCES])
    trainer = ConstrainedTrainer(
        str(tiny_folder()),
        config(tmp_path, max_length=60),
        {"asked": asked, "held": Dataset.from_list([{"prompt": text} for text in SENTENCES])},
        {"held": Regulariser("retention", kl_on="rollouts", rollouts_of="policy")},
        learn={"held": False},
        formatting_func=lambda row: f"{row['q']}: {row['a']}",
    )
    assert set(trainer.tokenised["held"][0]["labels"]) == {-100}


def test_adapters_with_tokens_in_the_cache(tiny_folder, tmp_path):
    for kind in (PrefixTuningConfig, CartridgeConfig):
        adapter = kind(task_type="CAUSAL_LM", num_virtual_tokens=4)
        trainer = ConstrainedTrainer(
            str(tiny_folder()), config(tmp_path, max_length=24), corpus(), {}, peft_config=adapter
        )
        assert trainer.model.peft_config["default"].num_virtual_tokens == 4


def test_a_format_is_judged_after_the_formatting(tiny_folder, tmp_path):
    """A function may make text of any columns, in training and in evaluation."""
    rows = Dataset.from_list([{"prompt": text, "response": "yes"} for text in SENTENCES])

    def text(row):
        return f"{row['prompt']}: {row['response']}"

    trainer = ConstrainedTrainer(
        str(tiny_folder()),
        config(tmp_path, max_length=None),
        rows,
        {},
        formatting_func=text,
        eval_options=EvalOptions(corpus={"corpus": rows}),
    )
    decoded = trainer.processing_class.decode(trainer.tokenised["corpus"][0]["input_ids"], skip_special_tokens=True)
    assert decoded == text(rows[0])
    assert trainer.evaluate()["eval_loss"] == trainer.evaluate(rows)["eval_loss"]
    assert trainer.evaluate({"a": rows})["eval_a_loss"] == trainer.evaluate(rows)["eval_loss"]


def test_a_prefix_in_the_cache_is_trained_as_by_trl(tiny_folder, tmp_path):
    """Its virtual tokens lie before no row, so that positions are those of the rows."""
    prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6)
    trainer = ConstrainedTrainer(
        str(tiny_folder()), config(tmp_path, max_steps=2), corpus(), {"rude": Regulariser()}, peft_config=prefix
    )
    trainer.train()
    assert logged(trainer, "kl/rude")[0] == pytest.approx(0.0, abs=1e-5)


def test_a_tokenizer_comes_from_where_its_model_does(tiny_folder, tmp_path):
    """A revision of a repository in a cache of its own; of an adapter the base has other revisions."""

    def cached(name, revision):
        cache = tmp_path / "cache" / f"models--mine--{name}"
        (cache / "refs").mkdir(parents=True)
        (cache / "refs" / revision).write_text("0" * 40)
        return cache / "snapshots" / ("0" * 40)

    shutil.copytree(tiny_folder(), cached("tiny", "second"))
    where = {"cache_dir": str(tmp_path / "cache"), "revision": "second"}
    trainer = ConstrainedTrainer("mine/tiny", config(tmp_path, model_init_kwargs=where), corpus(), {})
    assert trainer.processing_class.eos_token == "<eos>"
    shutil.copytree(tiny_folder(), cached("base", "main"))
    tuned = load_model(str(tiny_folder()), lora=LoraOptions(r=2))
    tuned.peft_config["default"].base_model_name_or_path = "mine/base"
    tuned.save_pretrained(cached("adapter", "second"))
    trainer = ConstrainedTrainer("mine/adapter", config(tmp_path, model_init_kwargs=where), corpus(), {})
    assert trainer.processing_class.eos_token == "<eos>"


class StopAt(TrainerCallback):
    """Ends training after an update."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step


def test_a_run_that_a_callback_ends_has_all_its_rounds_and_is_not_begun_again(tiny_folder, tmp_path):
    trainer = trainer_of(tiny_folder(), tmp_path, {"rude": Regulariser(NO_E)}, max_steps=6, save_strategy="steps")
    trainer.add_callback(StopAt(4))
    trainer.train()
    assert logged(trainer, "round") == [1, 2]
    assert all(seconds > 0 for seconds in logged(trainer, "seconds_policy"))
    refused(trainer.train, "^train: this trainer has begun its rounds already")
    plain = trainer_of(tiny_folder(), tmp_path / "plain", {}, max_steps=2)
    for _ in range(2):
        plain.train()
    assert plain.state.global_step == 2, "plain fine-tuning trains again, as SFTTrainer does"
    again = trainer_of(tiny_folder(), tmp_path, {"rude": Regulariser(NO_E)}, max_steps=6, save_strategy="steps")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert logged(again, "round") == [1, 2]


def test_the_loss_comes_with_outputs_where_they_are_asked_for(tiny_folder, tmp_path):
    trainer = trainer_of(tiny_folder(), tmp_path, {"rude": Regulariser()})
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    again, outputs = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
    assert loss == again
    assert outputs.logits.shape[:2] == batch["input_ids"].shape


def test_two_policies_and_retention_on_one_domain(tiny_folder, tmp_path):
    """Each has files, metrics and rows of its own; a domain called "all" is a domain."""
    rows = {"all": corpus()["rude"], "plain": corpus()["plain"]}
    regularisers = [
        Regulariser(NO_E, domain="all", name="no e", kl_on="both"),
        Regulariser("regex:a", domain="all", name="no a", anchor="previous"),
        Regulariser(domain=["all", "plain"], name="keep"),
        Regulariser("regex:o", name="everywhere"),
    ]
    trainer = trainer_of(tiny_folder(), tmp_path / "run", regularisers, rows=rows, logging_steps=4)
    trainer.train()
    assert [list(one.corpus) for one in trainer.regularisers] == [["all"], ["all"], ["all", "plain"], ["all", "plain"]]
    (record,) = [record for record in trainer.state.log_history if "kl/keep" in record and "loss" in record]
    assert {"kl/no e", "kl/no a", "kl/everywhere"} <= set(record)
    parts = sum(record[f"kl/{one.name}"] >= 0 for one in trainer.regularisers)
    assert parts == 4
    files = {path.name for path in (tmp_path / "run" / "rollouts").iterdir()}
    assert files == {f"round-{index}.{name}.jsonl" for index in (1, 2) for name in ("no e", "no a", "everywhere")}
    assert {path.name for path in (tmp_path / "run" / "auxiliary").iterdir()} == {"no e", "no a", "everywhere"}


def test_a_recipe_with_a_list_of_regularisers(recipe, tmp_path):
    path = recipe(
        regularisers=[
            {"constraint": "no e", "domain": "rude", "weight": 2.0},
            {"constraint": "retention", "domain": ["rude", "plain"], "name": "keep"},
        ],
        max_steps=2,
    )
    read = load_recipe(path, {"regularisers.keep.weight": 3.0})
    assert {name: (one.domain, one.weight) for name, one in read.regularisers.items()} == {
        "rude": ("rude", 2.0),
        "keep": (["rude", "plain"], 3.0),
    }
    train(read, tmp_path / "run")
    saved = parse_yaml((tmp_path / "run" / "recipe.yaml").read_text(), "saved")
    assert saved["regularisers"]["keep"] == {"domain": ["rude", "plain"], "constraint": "retention", "weight": 3.0}
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "| keep | rude, plain | retention | 3.0 |" in card


def test_what_cannot_train_is_refused(tiny_folder, tmp_path):
    folder = tiny_folder()
    held = {"rude": Regulariser(NO_E)}
    refused(lambda: trainer_of(folder, tmp_path, held, max_new_tokens=64), "^max_new_tokens: 64 leave no room")
    refused(
        lambda: trainer_of(folder, tmp_path, held, rounds=5).train(), "^rounds: 5 are more than the run's 4 updates"
    )
    trainer_of(folder, tmp_path, {}, rounds=5)  # without samples rounds are nothing

    tokenizer = load_tokenizer(str(folder))
    tokenizer.add_tokens([f"<{number}>" for number in range(5)])
    tokenizer.save_pretrained(folder)
    said = f"the tokenizer has {len(tokenizer)} tokens and the model's embedding {len(tokenizer) - 5}"
    refused(lambda: trainer_of(folder, tmp_path, held), said)
    refused(lambda: load_for_inference(str(folder)), said)

    model = load_model(str(folder))
    model.get_input_embeddings().weight.data[3, 3] = float("nan")
    model.save_pretrained(folder)
    said = "the weights 'model.embed_tokens.weight' hold numbers that are not finite"
    refused(lambda: trainer_of(folder, tmp_path, held), said)
    refused(lambda: load_for_inference(str(folder)), said)


def test_an_output_layer_that_is_saved_whole_is_trained(tiny_folder, tmp_path):
    """Beside adapters, and where R has a network of its own."""
    trainer = ConstrainedTrainer(
        model=str(tiny_folder()),
        args=config(tmp_path, auxiliary=AuxiliaryOptions(epochs=2, batch_size=8, own_network=True), max_steps=2),
        corpus=corpus(),
        regularisers={"rude": Regulariser(NO_E, anchor="previous")},
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=2, modules_to_save=["lm_head"]),
    )
    start = weights(trainer)
    trainer.train()
    (name,) = (name for name in start if "lm_head" in name)
    assert not weights(trainer)[name].equal(start[name])
    lm = causal_lm(trainer.model).eval()
    states = lm.base_model(torch.arange(3, 9)[None]).last_hidden_state
    torch.testing.assert_close(project(lm, states), lm.lm_head(states))


def test_an_adapter_of_the_output_layer_is_refused(tiny_folder, tmp_path):
    lora = LoraOptions(r=2, target_modules=["q_proj", "lm_head"])
    said = "^target_modules: an adapter of the output layer would never be trained"
    refused(lambda: trainer_of(tiny_folder(), tmp_path, {"rude": Regulariser(NO_E)}, lora=lora), said)


def test_a_trained_adapter_is_merged_into_an_own_network(tiny_folder):
    model = load_model(str(tiny_folder()), lora=LoraOptions(r=2)).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    ids = torch.arange(3, 9)[None]
    network = new_auxiliary(model, own_network=True).network.eval()
    states = causal_lm(model).base_model(ids).last_hidden_state
    torch.testing.assert_close(network(ids).last_hidden_state, states, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("target", ["q_proj", "embed_tokens"])
def test_adapters_count_once_they_act(tiny_folder, target):
    model = load_model(str(tiny_folder()))
    before = fingerprint(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=[target]))
    assert fingerprint(adapted) == before
    assert acting_parameters(adapted).keys() == dict(load_model(str(tiny_folder())).named_parameters()).keys()
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    assert fingerprint(adapted) != before
    assert any("lora_" in name for name in acting_parameters(adapted))


def test_a_weight_without_dimensions_has_a_hash():
    model = torch.nn.Linear(2, 2)
    model.scale = torch.nn.Parameter(torch.tensor(1.0))
    before = fingerprint(model)
    model.scale.data += 1
    assert fingerprint(model) != before
