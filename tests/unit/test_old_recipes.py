"""Recipes as they were written for an earlier version."""

from copy import deepcopy

from bridle.recipes.recipe import build_recipe

OLD = {
    "model": "unread",
    "corpus": {"forum": {"path": "forum.jsonl"}},
    "constraints": {"kind": {"type": "words", "words": ["grumblefish"]}},
    "regularisers": {"forum": {"constraint": "kind", "on": "both", "power": 2.0, "anchor": "previous"}},
    "targets": "shipped",
}


def test_old_keys_and_values_are_renamed_with_a_warning(caplog):
    before = deepcopy(OLD)
    recipe = build_recipe(OLD)
    assert before == OLD
    regulariser = recipe.regularisers["forum"]
    assert (regulariser.kl_on, regulariser.guidance_scale) == ("both", 2.0)
    assert recipe.training["targets"] == "precomputed"
    assert recipe.resolved["regularisers"]["forum"].keys() == {"constraint", "kl_on", "guidance_scale", "anchor"}
    assert sorted(caplog.messages) == [
        "regularisers.forum.on: is now called kl_on",
        "regularisers.forum.power: is now called guidance_scale",
        "targets: shipped is now called precomputed",
    ]
    caplog.clear()
    build_recipe(recipe.resolved)
    assert not caplog.messages
