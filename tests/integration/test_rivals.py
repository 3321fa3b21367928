"""The optional methods of `bridle compare`: each for real on a tiny model, its knob, and what is refused."""

import json
from contextlib import contextmanager
from dataclasses import replace
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch
import yaml

from bridle.baselines.filtration import compliant_rows
from bridle.comparison import methods, replay, rivals
from bridle.comparison.cell import Candidate, Cell
from bridle.comparison.changes import affects
from bridle.comparison.compare import Comparison
from bridle.comparison.knobs import base_name
from bridle.comparison.methods import chosen, description
from bridle.comparison.replay import losses_per_token
from bridle.errors import UserError
from bridle.models.loading import load_for_inference, load_model, load_tokenizer
from bridle.recipes.recipe import build_recipe, load_recipe
from bridle.recipes.run import write_recipe

KNOBS = {
    "sft-kl": {"weight": 50},
    "l2-sp": {"weight": 1000},
    "lora-small": {"r": 1},
    "wise-ft": {"alpha": [0, 0.5, 1]},
    "interleave": {"weight": 2},
}
NAMES = ["sft-kl", "l2-sp", "lora-small", "wise-ft@0", "wise-ft@0.5", "wise-ft@1", "interleave"]


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
    assert moved["wise-ft@0"] == pytest.approx(0, abs=1e-5)
    assert moved["wise-ft@0.5"] == pytest.approx(moved["sft"] / 2, rel=1e-3)
    assert moved["wise-ft@1"] == pytest.approx(moved["sft"], rel=1e-3)
    assert moved["l2-sp"] < 0.9 * moved["sft"]
    assert moved["sft-kl"] != moved["sft"]
    adapter = json.loads((folder / "lora-small" / "seed-0" / "model" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"]) == (1, 8 if lora else 2)  # α/r is the recipe's
    records = (folder / "interleave" / "seed-0" / "metrics.jsonl").read_text().splitlines()
    assert all("held_rows" not in json.loads(record) for record in records)
    mixed = load_recipe(folder / "interleave" / "seed-0" / "recipe.yaml")
    assert {name: (domain.learn, domain.weight) for name, domain in mixed.corpus.items()} == {
        "plain": (True, 0.5),
        "rude": (True, 1.0),
    }
    assert results["wise-ft@0.5"]["description"].endswith("(Wortsman et al., 2022): alpha 0.5.")
    assert "wise-ft@0.5" in (folder / "report.html").read_text("utf-8")

    code, _, err = bridle(
        *("compare", path, "--methods", "wise-ft", "--output_dir", folder, "--resume"),
        *("--methods.wise-ft.alpha", "[0.5, 0.25]"),
    )
    assert code == 0, err
    assert [line for line in err.splitlines() if line.endswith(": making")] == ["wise-ft@0.25, seed 0: making"]


def test_weights_are_averaged_with_those_of_an_embedding_s_adapter_too(tiny_model):
    from peft import LoraConfig, get_peft_model

    from bridle.comparison.rivals import _average

    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.normal_()
        ids = torch.arange(3, 9)[None]
        _average(model, "unused", 0.0)
        with model.disable_adapter():
            before = model(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits, before)


def test_an_adapter_as_the_model_before_tuning_is_refused(tmp_path):
    from bridle.comparison.rivals import l2_sp, wise_ft

    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "b"}')
    cell = SimpleNamespace(recipe=SimpleNamespace(model=str(tmp_path)), method="wise-ft")
    for method in (l2_sp, wise_ft):
        with pytest.raises(UserError, match="is an adapter; merge it by `bridle export`, or leave wise-ft out"):
            method(cell)


def test_the_pull_is_the_gradient_of_the_distance(tiny_model):
    """With adapters, too, also of an embedding, it is that of α/2·‖w − w_0‖²."""
    from peft import LoraConfig, get_peft_model

    from bridle.comparison.rivals import StartingPoint

    plain = tiny_model()
    adapted = get_peft_model(tiny_model(), LoraConfig(r=2, lora_alpha=6, target_modules=["embed_tokens", "q_proj"]))
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
            total = sum(layer.get_delta_weight("default").square().sum() for layer in layers)
        StartingPoint(0.3, start if model is plain else None).on_pre_optimizer_step(None, None, None, model=model)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        expected = torch.autograd.grad(0.3 / 2 * total, list(trained.values()), allow_unused=True)
        for (name, p), gradient in zip(trained.items(), expected, strict=True):
            torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-4, msg=name)


def losses(folder, texts):
    """−log p a token of each text as it is learnt, with its end."""
    model, tokenizer = load_model(str(folder)), load_tokenizer(str(folder))
    ids = [torch.tensor([tokenizer(text + tokenizer.eos_token)["input_ids"]]) for text in texts]
    with torch.no_grad():
        return [model(input_ids=one, labels=one).loss.item() for one in ids]


def test_what_is_forgotten_most_is_mixed_in(compared, tmp_path, monkeypatch):
    recipe = build_recipe({**yaml.safe_load(compared(max_length=60).read_text()), "max_steps": 5})
    tuned = load_model(recipe.model)
    for p in tuned.parameters():
        p.data += 0.05 * torch.randn_like(p)
    for part in (tuned, load_tokenizer(recipe.model)):
        part.save_pretrained(tmp_path / "sft")
    given = {}
    monkeypatch.setattr(
        Cell, "train", lambda cell, recipe, rows: given.update(rows) or Candidate("", cost={"seconds": 5})
    )

    def mixed(name, **changes):
        work = Cell(name, replace(recipe, **changes), 0, tmp_path, lambda other: Candidate(str(tmp_path / "sft")))
        return rivals.METHODS["interleave"](work)

    made = mixed("interleave@gap@1")
    rows = recipe.read_corpus()["plain"].shuffle(seed=0)
    texts = rows["text"][:16]  # 5 updates of 4 rows read 4 that are held, of four times as many candidates
    gaps = [
        after - before
        for before, after in zip(losses(recipe.model, texts), losses(tmp_path / "sft", texts), strict=True)
    ]
    best = sorted(range(16), key=lambda place: -gaps[place])[:4]
    assert set(given["plain"]["text"]) == {texts[place] for place in best}
    assert len(given["rude"]) == 32
    report = json.loads((tmp_path / "gaps.json").read_text())["plain"]
    assert (report["candidates"], report["chosen"]) == (16, 4)
    assert report["gap_candidates"] == pytest.approx(fmean(gaps), abs=1e-4)
    assert report["gap_chosen"] == pytest.approx(fmean(gaps[place] for place in best), abs=1e-4)
    assert made.cost["seconds"] > 5, "reading counts"

    read = []
    monkeypatch.setattr(replay, "load_for_inference", lambda name, dtype: (load_for_inference(name, dtype)[0], None))
    monkeypatch.setattr(replay, "load_tokenizer", lambda name: read.append(name) or load_tokenizer(name))
    mixed("interleave@gap@1")
    assert read == [str(tmp_path / "sft")], "both models read the rows as training had them"

    mixed("interleave@1")
    assert given["plain"]["text"][:] == rows["text"][: len(given["plain"])], "at random"
    with pytest.raises(
        UserError, match=r"^methods\.interleave\.choose: all 32 rows of plain are mixed in, so gap has no"
    ):
        mixed("interleave@gap@99", training={**recipe.training, "max_steps": 99})


def test_a_corpus_that_learns_completions_alone_learns_what_is_mixed_in(compared, tmp_path, monkeypatch):
    recipe = build_recipe({**yaml.safe_load(compared().read_text()), "completion_only_loss": True})
    made = []
    monkeypatch.setattr(
        Cell, "train", lambda cell, recipe, rows: made.append(recipe) or Candidate("", cost={"seconds": 0})
    )
    rivals.METHODS["interleave"](Cell("interleave@1", recipe, 0, tmp_path, None))
    assert made[0].resolved["completion_only_loss"] is None, "the text has no completion"


def test_the_scoring_of_filtration_counts(compared, tmp_path, monkeypatch):
    phases = []

    @contextmanager
    def three_seconds(seconds, phase):
        phases.append(phase)
        yield
        seconds[phase] = 3.0

    def scored(rows, constraint, domain):
        assert phases == [domain], "within what is timed"
        return compliant_rows(rows, constraint, domain)

    monkeypatch.setattr(methods, "timed", three_seconds)
    monkeypatch.setattr(methods, "compliant_rows", scored)
    monkeypatch.setattr(Cell, "train", lambda cell, recipe, rows: Candidate("", cost={"seconds": 5.0}))
    made = methods.filtration(Cell("filtration", load_recipe(compared()), 0, tmp_path, None))
    assert made.cost["seconds"] == 8.0


def test_only_learnt_tokens_count(tiny_model):
    model, ids = tiny_model(), [1, 5, 6, 7, 8, 9, 10]
    labels = [-100, 5, -100, -100, 8, 9, -100]
    log_p = model(torch.tensor([ids])).logits.log_softmax(-1)[0]
    expected = -(log_p[0, 5] + log_p[3, 8] + log_p[4, 9]).item() / 3
    found = losses_per_token(model, {7: (ids, labels), 9: (ids[:3], [1, -100, -100])}, 2, "reading")
    assert found == {7: pytest.approx(expected, rel=1e-4)}, "a row without any is left out"


def test_names_say_the_values_of_options(compared):
    def named(*names, **methods):
        return chosen(names, build_recipe({**yaml.safe_load(compared().read_text()), "methods": methods}))

    both = {"weight": [1, 2], "choose": ["random", "gap"]}
    expanded = ["interleave@1", "interleave@2", "interleave@gap@1", "interleave@gap@2"]
    assert named("interleave", interleave=both) == expanded
    assert named("interleave@gap", "interleave@random@3", interleave=both) == [*expanded[2:], "interleave@3"]
    assert named("interleave", interleave={"choose": "gap"}) == ["interleave@gap"]
    assert named("dpo", dpo={"beta": [0.1, 0.5], "num_generations": 8}) == ["dpo@0.1", "dpo@0.5"]
    assert description("interleave@gap@2").endswith(": choose gap, weight 2.")
    assert affects("methods.dpo.num_generations", ["dpo@0.1"])
    assert not affects("methods.dpo.beta", ["dpo@0.1"])
    assert affects("methods.dpo", ["dpo@0.1"]), "the whole section"
    assert affects("regularisers.rude.weight", ["dpo@0.1"]), "its pairs are the constraint's"
    assert not affects("methods.interleave.choose", ["interleave", "interleave@gap"]), "the name says it"
    assert not affects("methods.interleave", ["interleave@gap@2"])


def test_constrained_adaptive_at_several_strengths(bridle, compared, tmp_path):
    """A factor of every λ is a method of its own, beside the recipe as it is."""
    path, folder = compared(methods={"constrained-adaptive": {"factor": [0.1, 1, 3]}}), tmp_path / "out"
    code, _, err = bridle("compare", path, "--methods", "constrained-adaptive", "--output_dir", folder)
    assert code == 0, err
    results = json.loads((folder / "results.json").read_text())["methods"]
    assert list(results) == ["constrained-adaptive", "constrained-adaptive@0.1", "constrained-adaptive@3"]
    weights = {
        name: {
            one: options.weight
            for one, options in load_recipe(folder / name / "seed-0/recipe.yaml").regularisers.items()
        }
        for name in results
    }
    itself = weights["constrained-adaptive"]
    for name, factor in (("constrained-adaptive@0.1", 0.1), ("constrained-adaptive@3", 3)):
        assert weights[name] == {one: pytest.approx(factor * weight) for one, weight in itself.items()}
    assert not affects("methods.constrained-adaptive.factor", list(results)), "each keeps its own"
    assert affects("regularisers.rude.weight", ["constrained-adaptive@3"])
    assert description("constrained-adaptive@3").endswith(": factor 3.")


def test_a_factor_of_one_regulariser_of_several(bridle, compared, tmp_path):
    """Two policies on one domain: the λ of one is swept, 0 included, and the report draws both rates."""
    path, folder = compared(), tmp_path / "out"
    mapping = yaml.safe_load(path.read_text())
    mapping["constraints"]["brief"] = {"type": "length", "max_words": 3}
    rude, held = mapping["regularisers"]["rude"], mapping["regularisers"]["plain"]
    mapping["regularisers"] = [
        {**held, "domain": "plain"},
        {**rude, "domain": "rude", "name": "kind"},
        {**rude, "domain": "rude", "name": "short", "constraint": "brief", "weight": 2.0},
    ]
    mapping["evaluation"]["constraints"] = [rude["constraint"], "brief"]
    mapping["methods"] = {"constrained-adaptive": {"of": "short", "factor": [0, 3]}}
    path.write_text(yaml.safe_dump(mapping))
    code, _, err = bridle("compare", path, "--methods", "constrained-adaptive", "--output_dir", folder)
    assert code == 0, err
    weights = {
        name: [one.weight for one in load_recipe(path).regularisers.values()]
        for name in ("", "@0", "@3")
        for path in [folder / f"constrained-adaptive{name}/seed-0/recipe.yaml"]
    }
    others = weights[""][:2]
    assert weights == {"": [*others, 2.0], "@0": [*others, 0.0], "@3": [*others, 6.0]}
    assert (folder / "plots/further_constraints.svg").is_file()
    assert "Further constraints" in (folder / "report.html").read_text(encoding="utf-8")


def test_a_factor_of_a_λ_that_follows_a_target_is_refused(bridle, compared, tmp_path):
    code, _, err = bridle(
        *("compare", compared(), "--methods", "base,constrained-adaptive@3", "--output_dir", tmp_path / "out"),
        *("--regularisers.rude.target.rate", "0.5"),
    )
    assert code == 2, "before anything is trained"
    assert "regularisers.rude.target: λ follows it; leave constrained-adaptive@3 out" in err


def test_which_are_chosen(compared):
    mapping = yaml.safe_load(compared().read_text())
    plain = build_recipe({**mapping, "methods": {}})
    assert not {base_name(name) for name in chosen([], plain)} & set(KNOBS), "unless they are named"
    assert chosen([], build_recipe(mapping))[-len(NAMES) :] == NAMES
    assert chosen(["wise-ft", "wise-ft@0.9", "sft"], plain) == ["wise-ft", "wise-ft@0.9", "sft"]
    assert chosen(["wise-ft@1.0", "wise-ft@1", "wise-ft@0.50", "wise-ft"], plain) == [
        "wise-ft@1.0", "wise-ft@0.50", "wise-ft"
    ], "the first spelling, as a folder may have it"  # fmt: skip
    assert description("wise-ft@0.9").endswith(": alpha 0.9.")
    assert affects("methods.wise-ft.alpha", ["wise-ft"])
    assert not affects("methods.wise-ft.alpha", ["wise-ft@0.5"])
    for key in ("regularisers.rude.weight", "constraints.no p.pattern", "auxiliary.memory", "rollouts_per_round"):
        assert not affects(key, ["wise-ft@0.5", "sft", "sft-kl"]), key
        assert affects(key, ["sft"], reads_all=True), key
        assert affects(key, ["sft", "dpo"]), key
    assert affects("target_tokens", ["sft-kl"]), "its retention has targets"
    assert not affects("target_tokens", ["sft", "filtration"])
    assert affects("learning_rate", ["wise-ft@0.5"])


def test_a_value_that_becomes_several_makes_a_method_of_each(compared, tmp_path):
    """The method without a value in its name would not know which to take."""
    mapping = yaml.safe_load(compared().read_text())
    before, now = (build_recipe({**mapping, "methods": {"wise-ft": {"alpha": alpha}}}) for alpha in (0.5, [0.25, 0.5]))
    folder = tmp_path / "out"
    folder.mkdir()
    write_recipe(before, folder)
    (folder / "results.json").write_text(json.dumps({"methods": {"base": {}, "wise-ft": {}, "sft": {}}, "seeds": [0]}))
    resumed = Comparison(now, folder, ["wise-ft"], resume=True)
    assert resumed.names == ["base", "wise-ft@0.25", "wise-ft@0.5", "sft"]


@pytest.mark.parametrize(
    ("names", "methods", "said"),
    [
        ([], {"wise-ft": {"alpha": 2}}, "^recipe: methods.wise-ft.alpha: .*less than or equal to 1"),
        ([], {"wise-ft": {"alpha": []}}, "^recipe: methods.wise-ft.alpha: has no value; give one or several"),
        ([], {"l2-sp": {"wieght": 1}}, "^recipe: methods.l2-sp.wieght: there is no key 'wieght'; did you mean weight"),
        (
            ["constrained-adaptive@-1"],
            {},
            "^methods.constrained-adaptive.factor: input should be greater than or equal",
        ),
        (
            ["constrained-adaptive@2"],
            {"constrained-adaptive": {"of": "rood"}},
            "^methods.constrained-adaptive.of: there is no regulariser 'rood'; there are: plain, rude",
        ),
        (["wise-ft@much"], {}, "^methods.wise-ft.alpha: input should be a valid number"),
        (["wise-ft@0.5@0.7"], {}, "^methods: wise-ft@0.5@0.7 has two values of alpha; give one"),
        (
            [],
            {"interleave": {"choose": "ppl"}},
            "^recipe: methods.interleave.choose: there is no choice 'ppl'; there are: gap, random",
        ),
        ([], {"dpo": {"num_generations": 1}}, "^recipe: methods.dpo.num_generations: 1 makes no pair; set at least 2"),
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
