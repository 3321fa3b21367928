"""The benchmarks as programs, at tiny size: what they write has its keys and makes sense. Nobody is timed here."""

import gc
import json
import runpy
import sys
import time

import numpy as np
import pytest
import torch
from transformers import TrainerControl, TrainerState

from bridle.errors import UserError
from bridle.recipes.recipe import load_recipe
from bridle.recipes.run import build_trainer
from conftest import ROOT

BENCHMARKS = ROOT / "benchmarks"
TINY = ("--hidden_size", 32, "--layers", 1, "--vocabulary", 64)


@pytest.fixture(autouse=True)
def benchmarks_are_found(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    gc.unfreeze()  # a script has a process of its own, and ours goes on


@pytest.fixture
def benchmark(monkeypatch, tmp_path):
    """Runs a script: benchmark("rounds", "--steps", 4) -> what it wrote."""

    def run(name, *arguments):
        figures = tmp_path / "figures.json"
        command = [name, "--device", "cpu", "--json", figures, *arguments]
        monkeypatch.setattr(sys, "argv", [*map(str, command)])
        runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")
        found = json.loads(figures.read_text())
        assert found["environment"]["versions"]["torch"] == torch.__version__
        return found

    return run


class TestWhatTheyShare:
    def test_peak_memory_is_that_of_all_tensors_at_once(self):
        from common import peak_memory

        def peak(work):
            with peak_memory("cpu") as found:
                work()
            return found[0]

        def one_after_the_other():
            for _ in range(3):
                torch.empty(2**20, dtype=torch.uint8)

        def side_by_side():
            return [torch.empty(2**20, dtype=torch.uint8) for _ in range(3)]

        nothing = peak(lambda: None)
        assert peak(one_after_the_other) - nothing == 2**20
        kept = side_by_side()
        assert peak(lambda: None) - nothing == sum(tensor.nbytes for tensor in kept)
        assert peak(side_by_side) - nothing == 6 * 2**20

    def test_ways_take_turns_forwards_and_backwards(self, capsys):
        from common import interleaved

        order = []
        found = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b") or 1}, repeats=3)
        assert "".join(order) == "abbaab"
        assert found == {"a": [None] * 3, "b": [1] * 3}

    def test_a_random_recipe_has_rollouts_of_both_kinds(self, tmp_path):
        from subjects import llama, random_recipe

        path = random_recipe(tmp_path, llama(32, 1, 64), rows=40, length=8, domains=2, constraints=2)
        recipe = load_recipe(path, {"rollouts_per_round": 16, "max_new_tokens": 4, "max_steps": 1})
        assert [len(domain.read()) for domain in recipe.corpus.values()] == [20, 20]
        trainer = build_trainer(recipe, tmp_path, recipe.read_corpus())
        assert all(regulariser.update(1)["compliance"] not in (0, 1) for regulariser in trainer.regularisers)


def test_step_overhead(benchmark):
    ways = ("live", "adaptive_previous", "shipped")
    small = (
        "--batch",
        4,
        "--length",
        8,
        "--updates",
        1,
        "--repeats",
        2,
        "--training",
        "full",
        "--checkpointing",
        "off",
    )
    found = benchmark("step_overhead", *TINY, *small, "--ways", *ways)
    assert all(found[f"{way}_over_sft"] > 0 for way in ways)
    (case,) = found["cases"]
    for runs in case["raw"].values():
        # The sums that are logged are a pair of numbers more in a later repeat.
        assert runs[0]["bytes"] == pytest.approx(runs[1]["bytes"], abs=64)
        assert runs[0]["bytes"] > 0
        assert runs[0]["tokens_per_second"] == pytest.approx(32 / runs[0]["seconds"])
    memory = {way: figures["bytes"]["median"] for way, figures in case["over_sft"].items()}
    assert memory["adaptive_previous"] > memory["live"]  # by a copy of the weights
    assert found["memory_over_sft"] == max(memory.values())


def test_step_overhead_with_adapters_and_checkpointing(benchmark):
    small = ("--batch", 4, "--length", 32, "--updates", 1, "--repeats", 1, "--training", "lora", "--ways", "live")
    found = benchmark("step_overhead", "--hidden_size", 64, "--layers", 3, "--vocabulary", 64, *small)
    off, on = found["cases"]
    assert (off["checkpointing"], on["checkpointing"]) == (False, True)
    assert on["raw"]["sft"][0]["bytes"] < off["raw"]["sft"][0]["bytes"]
    assert found["live_over_sft"] == off["over_sft"]["live"]["seconds"]["median"]


def test_loss(benchmark):
    small = ("--vocabulary", 2048, "--hidden_size", 8, "--rows", 8, "--repeats", 1)
    smaller, larger = benchmark("loss", "--tokens", 64, 256, *small)["cases"]
    assert larger["over_plain"]["plain ce+kl"]["bytes"]["median"] == 1
    assert larger["over_plain"]["chunked ce+kl"]["bytes"]["median"] < 0.5
    grown = {name: larger["raw"][name][0]["bytes"] / smaller["raw"][name][0]["bytes"] for name in larger["raw"]}
    assert grown["plain ce+kl"] > 3 > grown["chunked ce+kl"]


def test_sampling(benchmark):
    found = benchmark(
        "sampling", *TINY, "--prompts", 8, "--one_by_one", 2, "--new_tokens", 4, "--batch", 4, "--repeats", 1
    )
    assert found["over_one_by_one"] > 0
    assert found["over_batches"] > 0
    assert (found["over_continuous"] is None) == ("continuous" in found["faults"])
    assert found["share_of_roof"] is None  # a CPU's is not known
    for runs in found["raw"].values():
        assert runs[0]["tokens_per_second"] == pytest.approx(runs[0]["tokens"] / runs[0]["seconds"])
    assert 8 <= found["raw"]["bridle"][0]["tokens"] <= 32


def test_rounds(benchmark, recipe):
    small = ("--steps", 8, "--rounds", 1, "--batch", 8, "--length", 24, "--new_tokens", 4, "--repeats", 1)
    held = {"rude": {"constraint": "no e", "weight": 4.0}, "plain": {"constraint": "retention", "weight": 1.0}}
    path = recipe(regularisers=held)
    found = benchmark("rounds", "--recipe", path, *small, "--on", "corpus", "--anchors", "live", "shipped")
    for anchor in ("live", "shipped"):
        (run,) = found["raw"][anchor]
        phases = [run[phase] for phase in ("sampling", "scoring", "encoding", "fitting", "policy")]
        assert min(phases) > 0
        assert sum(phases) + run["targets"] <= run["total"]
        assert found[f"{anchor}_over_sft"] == pytest.approx(run["total"] / found["raw"]["sft"][0]["total"])
        assert found["trained_per_sampled_token"][anchor] == pytest.approx(10, rel=0.3)
    assert found["raw"]["shipped"][0]["targets"] > 0 == found["raw"]["live"][0]["targets"]


def test_rounds_of_random_weights(benchmark):
    small = ("--steps", 2, "--rounds", 1, "--batch", 4, "--length", 16, "--new_tokens", 4, "--repeats", 1)
    found = benchmark("rounds", *TINY, *small, "--anchors", "live", "--training", "lora", "--share", 1)
    assert found["raw"]["live"][0]["tokens_trained"] == 2 * 4 * 15  # the first token has no prefix


class TestTimeToControl:
    def test_both_methods_arrive(self, benchmark, recipe, corpus_files):
        evaluation = {"prompts": {"rude": {"path": str(corpus_files["rude"]), "prompt_tokens": 2}}}
        methods = {"rl": {"batch_size": 4, "num_generations": 2}}
        path = recipe(evaluation=evaluation, methods=methods, max_steps=4)
        small = ("--share", 100, "--every", 1, "--prompts", 4, "--samples", 2, "--updates", 4, "--repeats", 1)
        found = benchmark("time_to_control", "--recipe", path, *small, "--rollouts_per_round", 3)
        assert found["settings"]["overrides"] == {"rollouts_per_round": 3}
        assert found["goal"] == 100 * found["violation_of_base"][found["settings"]["constraint"]]
        for method in ("constrained", "rloo", "grpo"):
            (run,) = found["raw"][method]
            assert run["reached"] == run["curve"][0]
            assert [measured["updates"] for measured in run["curve"]] == [1, 2]
            assert run["curve"][0]["violation"].keys() == found["violation_of_base"].keys()
        ours, rloo = (found["raw"][method][0]["reached"]["seconds"] for method in ("constrained", "rloo"))
        assert found["rloo_over_constrained"] == pytest.approx(rloo / ours)
        for wrong in (("--seed", 1), ("--constraint", "unknown")):
            with pytest.raises(SystemExit):
                benchmark("time_to_control", "--recipe", path, *wrong)

    def test_a_run_that_does_not_arrive_is_a_bound(self):
        from time_to_control import _ratio_cell, _ratios

        def ends(seconds, reached=True):
            measured = {"seconds": seconds, "updates": 4}
            return {"reached": measured if reached else None, "curve": [measured]}

        ours = [ends(10), ends(20), ends(30), ends(40, reached=False)]
        found = _ratios([ends(30), ends(90, reached=False), ends(60), ends(80, reached=False)], ours)
        assert found == {"median": 3, "low": 2, "high": 4.5, "at_least": 1, "at_most": 0}
        assert _ratio_cell(found) == "3.00 (2.00 to 4.50); 1 at least"
        assert _ratios([ends(80)], ours[3:])["at_most"] == 1
        assert _ratios([ends(80, reached=False)], ours[3:]) is None

    def test_two_in_a_row_count_and_the_measuring_does_not(self, tiny_model):
        from time_to_control import ControlClock

        measured = iter([0.5, 0.1, 0.4, 0.2, 0.1, 0.3])

        def rates(model):
            time.sleep(0.05)
            return {"trained on": 0.1, "independent": next(measured)}

        clock = ControlClock(rates, "independent", goal=0.2, every=2, limit=60)
        state, control, model = TrainerState(), TrainerControl(), tiny_model()
        clock.on_train_begin(None, state, control)
        while not control.should_training_stop:
            state.global_step += 1
            clock.on_step_end(None, state, control, model=model)
        assert [one["violation"]["independent"] for one in clock.curve] == [0.5, 0.1, 0.4, 0.2, 0.1]
        assert clock.reached["updates"] == 8
        assert clock.curve[-1]["seconds"] < 0.05


def test_coverage(benchmark):
    found = benchmark("coverage", "--runs", 200, "--saving_runs", 2)
    assert len(found["wrong"]) >= 10
    assert max(found["wrong"].values()) < 0.05 + 4 * found["standard_error_at_5_percent"]
    ways = {"count, fixed number", "count, anytime", "importance, seek 0.1", "importance, seek 0.5"}
    assert all(ways < row.keys() for row in found["prompts"])


def test_growth(benchmark, tmp_path):
    picture = tmp_path / "growth.png"
    small = ("--rows", 8, "--length", 16, "--hidden_size", 32, "--layers", 1, "--repeats", 1)
    found = benchmark("growth", "--axes", "domains", "--sizes", 1, 2, *small, "--picture", picture)
    (axis,) = found["axes"]
    assert axis["sizes"] == [1, 2]
    assert all(run["raw"]["constrained"][0]["tokens_sampled"] > 0 for run in axis["runs"])
    one, two = (run["seconds"]["constrained"]["median"] for run in axis["runs"])
    slope = torch.tensor(two / one).log2().item()
    assert axis["exponents"]["constrained"] == pytest.approx({"all": slope, "at_the_end": slope}, abs=1e-6)
    assert picture.read_bytes().startswith(b"\x89PNG")


class TestCritic:
    SMALL = ("--prefixes", 12, "--continuations", 8, "--prompts", 6, "--samples", 4, "--guided", 2)

    def test_variants_on_one_policy_and_what_is_kept(self, benchmark, recipe, tmp_path, capsys):
        within_a_run = {"corpus_outputs": 8, "seek": 0.5, "epochs": 2, "batch_size": 8}
        path, kept = recipe(auxiliary=within_a_run), tmp_path / "critic"
        variants = ("--variant", "a", "rollouts=16", "--variant", "b", "rollouts=24", "epochs=3", "form=log-linear")
        command = ("critic", path, *self.SMALL, "--cache", kept, "--independent", "no e", *variants)
        found = benchmark(*command)
        files = {file: file.stat().st_mtime_ns for file in kept.glob("*.jsonl")}
        assert len(files) == 3  # the policy's texts, their continuations, and a block of rollouts
        assert found["policy"]["p"] == found["policy"]["p_independent"] > 0 == found["policy"]["q_independent"]
        for name, settings in {"a": {"rollouts": 16}, "b": {"rollouts": 24, "epochs": 3, "form": "log-linear"}}.items():
            one = found["variants"][name]
            assert one["settings"] == settings
            assert one["guided"] == one["guided_independent"]
            assert one["drop"] == pytest.approx(1 - one["guided"] / found["policy"]["p"])
            assert 0 < one["mae"] < 1
        again = benchmark(*command)
        for results in (found, again):
            del results["environment"], results["variants"]["a"]["seconds"], results["variants"]["b"]["seconds"]
        assert again == found
        assert {file: file.stat().st_mtime_ns for file in kept.glob("*.jsonl")} == files

    def test_branches_continue_the_prefixes_at_which_r_varies_most(self, benchmark, recipe, tmp_path):
        from bridle.data import read_rollouts

        cache = tmp_path / "critic"
        benchmark("critic", recipe(), *self.SMALL, "--cache", cache, "--variant", "a", "rollouts=24", "branches=3")
        kept = sorted((read_rollouts(file) for file in cache.glob("*.jsonl")), key=len)
        branches, plain = kept[0], kept[-1]
        assert len(branches) == 12
        shared = set()
        for three in zip(*[iter(branches)] * 3, strict=True):
            (prompt,) = {tuple(one.prompt_ids) for one in three}
            texts = [one.completion_ids for one in plain if tuple(one.prompt_ids) == prompt]
            alike = (
                [len(set(tokens)) == 1 for tokens in zip(text, *(one.completion_ids for one in three), strict=False)]
                for text in texts
            )
            shared.add(max([*same, False].index(False) for same in alike))
        assert max(shared) > 0

    @pytest.mark.parametrize("key", ["corpus_outputs", "seek", "replay"])
    def test_what_acts_only_within_a_run_is_refused(self, benchmark, recipe, tmp_path, key):
        value = 0.5 if key == "seek" else 1
        with pytest.raises(UserError, match=rf"^--variant a: {key} acts within a run"):
            benchmark("critic", recipe(), *self.SMALL, "--cache", tmp_path, "--variant", "a", f"{key}={value}")

    def test_a_recipe_without_a_variant_has_nothing_to_measure(self, benchmark, recipe):
        with pytest.raises(UserError, match=r"^--variant: name at least one"):
            benchmark("critic", recipe(), *self.SMALL)

    def test_a_round_of_a_run_goes_with_its_own_policy(self, benchmark, bridle, recipe, tmp_path):
        path, run = recipe(learning_rate=1e-2, rollouts_per_round=64), tmp_path / "run"
        assert bridle("train", path, "--output_dir", run)[0] == 0
        rates = []
        for arguments in (("--round", 1), ("--round", 2), ()):
            found = benchmark("critic", run, *self.SMALL, "--guided", 0, "--cache", tmp_path / "critic", *arguments)
            assert found["variants"]["the run's"].keys() >= {"skill", "auc", "kl_closed"}
            rates.append(found["policy"]["kl_q_p"])
        assert len(set(rates)) == 3

    def test_skill_and_correlation_do_not_see_the_noise_of_the_truth(self):
        from critic import correlation, skill

        rng = np.random.default_rng(0)
        r, count = rng.beta(4, 2, size=4_000), 8
        estimate = rng.binomial(count, r) / count
        noise = estimate * (1 - estimate) / (count - 1)
        half, error = skill((r + r.mean()) / 2, estimate, noise)  # half of the way to the truth: a quarter of the MSE
        assert half == pytest.approx(0.75, abs=3 * error)
        assert 0 < error < 0.05
        for prediction, expected in [(r, 1), (np.full(4_000, r.mean()), 0), (2 * r.mean() - r, -3)]:
            value, error = skill(prediction, estimate, noise)
            assert value == pytest.approx(expected, abs=3 * error + 1e-3)
        assert correlation(r, estimate, noise) == pytest.approx(1, abs=0.05)
        assert correlation(1 - r, estimate, noise) == pytest.approx(-1, abs=0.05)
        assert skill(r, np.full(4_000, 0.5), noise + 0.01) is None


def test_a_monitor_beside_rejection(benchmark, bridle, recipe, corpus_files, tmp_path):
    prompts = {"path": str(corpus_files["rude"]), "rows": "0:6", "prompt_tokens": 2}
    path, run = recipe(evaluation={"prompts": {"rude": prompts}, "samples": 2}), tmp_path / "run"
    assert bridle("train", path, "--output_dir", run)[0] == 0
    auxiliary = run / "auxiliary" / "rude"
    auxiliary = auxiliary if auxiliary.is_dir() else run / "auxiliary"
    found = benchmark("monitor", path, run / "model", auxiliary, "--bounds", 0.01, 0.99, "--redraw", 1)
    assert found["plain"]["stopped"] == 0
    for way in ("monitor", "rejection"):
        assert found[f"{way}, 0.01"]["rates"] == found["plain"]["rates"]
        assert found[f"{way}, 0.99"]["stopped"] > 0
    assert found["monitor, 0.99"]["tokens"] < found["rejection, 0.99"]["tokens"]


class TestSteering:
    def test_targets_stand_beside_fixed_weights(self, benchmark, recipe, corpus_files, tmp_path):
        held_out = {"path": str(corpus_files["plain"]), "rows": "0:6"}
        prompts = {"path": str(corpus_files["rude"]), "rows": "0:6", "prompt_tokens": 2}
        path = recipe(evaluation={"prompts": {"rude": prompts}, "perplexity": {"plain": held_out}})
        command = ("steering", path, tmp_path / "runs", "--rates", 0.99, "--weights", 1, 9, "--seeds", 1, "--rounds", 2)
        found = benchmark(*command)
        assert found["fixed"]["9"]["weight"] == 9
        assert found["fixed"]["1"]["rates"].keys() == {"no e"}
        target = found["targets"]["0.99"]
        (seed,) = target["seeds"]
        assert seed["reached"] < seed["bound"]
        assert target["met"] == (seed["bound"] <= 0.99)
        made = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("model.safetensors")}
        again = benchmark(*command)
        assert again["targets"] == found["targets"]
        assert {file: file.stat().st_mtime_ns for file in made} == made

    def test_the_sweep_is_read_between_its_points_alone(self):
        from steering import of_sweep

        sweep = [{"rates": {"c": rate}, "perplexity": ppl} for rate, ppl in ((0.2, 10.0), (0.1, 40.0))]
        assert of_sweep(sweep, "c", 0.15) == pytest.approx(20.0)
        assert of_sweep(sweep, "c", 0.05) is None


def test_a_head_learns_to_classify(tiny_folder, tiny_tokenizer):
    from heads import head_scores, train_head

    texts = ["the kettle sings", "bread is baked", "rain on the roofs", "you grumblefish", "oh you grumblefish"]
    rows = texts * 8, [0, 0, 0, 1, 1] * 8
    model = train_head(str(tiny_folder("llama")), tiny_tokenizer, rows, rows, epochs=4, learning_rate=5e-3)
    scores = head_scores(model, tiny_tokenizer, texts, batch_size=3)
    assert [score > 0 for score in scores] == [False, False, False, True, True]
    assert head_scores(model, tiny_tokenizer, texts[:1]) == pytest.approx(scores[:1], abs=1e-4)
