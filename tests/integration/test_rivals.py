"""The optional methods of `bridle compare`: each for real on a tiny model, its knob, and what is refused."""

import json

import pytest
import torch
import yaml

from bridle.comparison.methods import base_name, chosen, description, shapes
from bridle.errors import UserError
from bridle.models.loading import load_model
from bridle.recipes.recipe import build_recipe, load_recipe

KNOBS = {
    "sft-kl": {"weight": 50},
    "l2-sp": {"weight": 1000},
    "lora-small": {"r": 1},
    "wise-ft": {"alpha": [0, 0.5, 1]},
    "interleave": {"weight": 2},
}
NAMES = ["sft-kl", "l2-sp", "lora-small", "wise-ft@0.0", "wise-ft@0.5", "wise-ft@1.0", "interleave"]


@pytest.fixture
def compared(recipe, corpus_files):
    """A recipe with a held domain, and every optional method."""

    def make(**changes):
        return recipe(
            corpus={
                "plain": {"path": str(corpus_files["plain"]), "learn": False, "weight": 0.25},
                "rude": {"path": str(corpus_files["rude"])},
            },
            constraints={"no p": {"type": "regex", "pattern": "p"}},
            regularisers={"plain": {"constraint": "retention"}, "rude": {"constraint": "no p"}},
            evaluation={
                "prompts": {"rude": {"path": str(corpus_files["rude"]), "rows": "0:4", "prompt_tokens": 2}},
                "perplexity": {"plain": {"path": str(corpus_files["plain"]), "rows": "0:6"}},
            },
            **{"methods": KNOBS, "learning_rate": 1e-2, **changes},
        )

    return make


def distance(folder, start):
    """‖w − w_0‖ of a saved model, its adapters merged."""
    model = load_model(str(folder))
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    before = dict(load_model(str(start)).named_parameters())
    return sum((p - before[name]).square().sum() for name, p in model.named_parameters()).sqrt().item()


@pytest.mark.parametrize("lora", [None, {"r": 4}])
def test_every_rival(bridle, compared, tmp_path, lora):
    path, folder = compared(lora=lora), tmp_path / "out"
    names = ["base", "sft", *KNOBS]
    code, _, err = bridle("compare", path, "--methods", ",".join(names), "--output_dir", folder)
    assert code == 0, err
    results = json.loads((folder / "results.json").read_text())["methods"]
    assert list(results) == ["base", "sft", *NAMES]
    start = load_recipe(path).model
    moved = {name: distance(folder / name / "seed-0" / "model", start) for name in ["sft", *NAMES]}
    assert moved["wise-ft@0.0"] == pytest.approx(0, abs=1e-5)
    assert moved["wise-ft@0.5"] == pytest.approx(moved["sft"] / 2, rel=1e-3)
    assert moved["wise-ft@1.0"] == pytest.approx(moved["sft"], rel=1e-3)
    assert moved["l2-sp"] < 0.9 * moved["sft"]
    assert moved["sft-kl"] != moved["sft"]
    adapter = json.loads((folder / "lora-small" / "seed-0" / "model" / "adapter_config.json").read_text())
    assert adapter["r"] == 1
    records = (folder / "interleave" / "seed-0" / "metrics.jsonl").read_text().splitlines()
    assert all("held_rows" not in json.loads(record) for record in records)
    mixed = load_recipe(folder / "interleave" / "seed-0" / "recipe.yaml")
    assert {name: (domain.learn, domain.weight) for name, domain in mixed.corpus.items()} == {
        "plain": (True, 0.5),
        "rude": (True, 1.0),
    }
    assert results["wise-ft@0.5"]["description"].endswith("(Wortsman et al., 2022): 0.5.")
    assert "wise-ft@0.5" in (folder / "report.html").read_text("utf-8")

    code, _, err = bridle(
        *("compare", path, "--methods", "wise-ft", "--output_dir", folder, "--resume"),
        *("--methods.wise-ft.alpha", "[0.5, 0.25]"),
    )
    assert code == 0, err
    assert [line for line in err.splitlines() if line.endswith(": making")] == ["wise-ft@0.25, seed 0: making"]


def test_the_pull_is_the_gradient_of_the_distance(tiny_model):
    """With adapters, too, it is that of α/2·‖w − w_0‖²."""
    from peft import LoraConfig, get_peft_model

    from bridle.comparison.rivals import StartingPoint

    plain = tiny_model()
    adapted = get_peft_model(tiny_model(), LoraConfig(r=2, lora_alpha=6, target_modules="all-linear"))
    for model in (plain, adapted):
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        torch.manual_seed(1)
        for p in model.parameters():
            p.data += torch.randn_like(p) * p.requires_grad
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        if model is plain:
            total = sum((p - start[name]).square().sum() for name, p in model.named_parameters())
        else:
            layers = [module for module in model.modules() if hasattr(module, "lora_A")]
            total = sum(
                (layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight)
                .square()
                .sum()
                for layer in layers
            )
        StartingPoint(0.3, start if model is plain else None).on_pre_optimizer_step(None, None, None, model=model)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        expected = torch.autograd.grad(0.3 / 2 * total, list(trained.values()), allow_unused=True)
        for (name, p), gradient in zip(trained.items(), expected, strict=True):
            torch.testing.assert_close(p.grad, gradient, msg=name)


def test_which_are_chosen(compared):
    mapping = yaml.safe_load(compared().read_text())
    plain = build_recipe({**mapping, "methods": {}})
    assert not {base_name(name) for name in chosen([], plain)} & set(KNOBS), "unless they are named"
    assert chosen([], build_recipe(mapping))[-len(NAMES) :] == NAMES
    assert chosen(["wise-ft", "wise-ft@0.9", "sft"], plain) == ["wise-ft", "wise-ft@0.9", "sft"]
    assert description("wise-ft@0.9").endswith(": 0.9.")
    assert shapes("methods.wise-ft.alpha", ["wise-ft"])
    assert not shapes("methods.wise-ft.alpha", ["wise-ft@0.5"])
    assert not shapes("regularisers.rude.weight", ["wise-ft@0.5", "sft"])
    assert shapes("learning_rate", ["wise-ft@0.5"])


@pytest.mark.parametrize(
    ("names", "methods", "said"),
    [
        ([], {"wise-ft": {"alpha": 2}}, "^methods.wise-ft.alpha: .*less than or equal to 1"),
        ([], {"wise-ft": {"alpha": []}}, "^methods.wise-ft.alpha: has no value; give one or several"),
        ([], {"l2-sp": {"wieght": 1}}, "^methods.l2-sp.wieght: there is no key 'wieght'; did you mean weight"),
        (["wise-ft@much"], {}, "^methods.wise-ft.alpha: input should be a valid number"),
        (["sft@2"], {}, "there is no method 'sft@2'; did you mean sft"),
    ],
)
def test_mistakes(compared, names, methods, said):
    recipe = build_recipe({**yaml.safe_load(compared().read_text()), "methods": methods})
    with pytest.raises(UserError, match=said):
        chosen(names, recipe)


def test_methods_without_the_held_domain_have_nothing_to_build_ahead(bridle, compared, tmp_path):
    """`targets: precomputed` is for the retention that only `constrained-adaptive` and `sft-kl` have."""
    path = compared(targets="precomputed", target_cache=str(tmp_path / "cache"))
    names = "constrained,constrained-adaptive,nado-decoding,sft-kl"
    code, _, err = bridle("compare", path, "--methods", names, "--output_dir", tmp_path / "out")
    assert code == 0, err
    assert list((tmp_path / "cache").iterdir())
