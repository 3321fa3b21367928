"""`ConstrainedTrainer` and its options in a Python program: what is meant is done, or refused in one line."""

import json
import re

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import TrlParser

from bridle.errors import UserError
from bridle.models.auxiliary import new_auxiliary
from bridle.models.hidden import causal_lm, project
from bridle.models.loading import LoraOptions, load_for_inference, load_model, load_tokenizer
from bridle.models.sharding import weights_hash
from bridle.recipes.recipe import load_recipe
from bridle.recipes.run import train
from bridle.training.config import AuxiliaryOptions, ConstrainedConfig, ParallelOptions, Regulariser
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
        (ConstrainedConfig, {"schedule": "par"}, "^schedule: there is no choice 'par'; did you mean parallel?"),
        (ConstrainedConfig, {"rounds": 1.5}, "^rounds: input should be a valid integer"),
        (ConstrainedConfig, {"targets": "compute"}, "^targets: there is no choice 'compute'; did you mean computed?"),
        (
            ConstrainedConfig,
            {"auxiliary": {"depht": 2}},
            "^auxiliary.depht: there is no key 'depht'; did you mean depth?",
        ),
        (ConstrainedConfig, {"parallel": AuxiliaryOptions()}, "^parallel: must be a mapping"),
        (ConstrainedConfig, {"num_train_epochs": 0}, "^num_train_epochs: must be above 0"),
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

    loaded = load_model(str(folder))
    for changes, said in (
        ({"corpus": rows.to_iterable_dataset()}, "^corpus.corpus: is streamed"),
        ({"corpus": {"a": rows.to_list()}}, "^corpus.a: must be a Dataset"),
        ({"model": loaded}, "^model_init_kwargs: the model is loaded already"),
        ({"model": str(tmp_path / "nothing")}, "nothing: cannot load the model: no such folder"),
        ({"regularisers": [Regulariser(NO_E), Regulariser(NO_E)]}, "^regularisers: two are called 'all'"),
        ({"regularisers": [Regulariser(NO_E, domain="corpse")]}, "^regularisers.corpse.domain: .*did you mean corpus"),
        ({"regularisers": [Regulariser(NO_E, name="kl")]}, "^regularisers.kl: is what metrics begin with"),
        ({"regularisers": {"x/y": Regulariser(NO_E, domain="corpus")}}, "^regularisers.x/y: 'x/y' names files"),
    ):
        given = {"model": str(folder), "args": trainer.args, "corpus": rows, "regularisers": [], **changes}
        refused(lambda given=given: ConstrainedTrainer(**given), said)


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


def test_a_weight_without_dimensions_has_a_hash():
    model = torch.nn.Linear(2, 2)
    model.scale = torch.nn.Parameter(torch.tensor(1.0))
    before = weights_hash(model)
    model.scale.data += 1
    assert weights_hash(model) != before
