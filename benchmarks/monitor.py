"""What a monitor leaves of the violations, beside plain sampling and rejection sampling, and at which cost.

    python benchmarks/monitor.py RECIPE MODEL AUXILIARY --bounds 0.3 0.5 0.7 --redraw 3 --json FILE

The first prompt set of the recipe's `evaluation`, under all of its constraints. *Rejection* draws whole completions and
judges them by R after the last token alone, as often as the monitor; the monitor stops as soon as R falls below the
bound. The cost is the number of tokens drawn, over that of plain sampling. What is withheld says nothing, and complies.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import markdown, parsed, parser_of, write

from bridle.comparison.plan import evaluation_of
from bridle.data import read_prompts
from bridle.evaluation.evaluator import Evaluator
from bridle.models.guidance import guided
from bridle.models.loading import load_for_inference
from bridle.models.monitor import Monitor
from bridle.models.sampling import Trace
from bridle.recipes.recipe import load_recipe


class Rejecting(Monitor):
    """Judges a completion when it is finished."""

    def processors(self, attention_mask: torch.Tensor) -> Any:
        return self.guide.processors(attention_mask)

    def compliance(self, trace: Trace) -> torch.Tensor:
        return super().compliance(trace)[-1:]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("model")
    parser.add_argument("auxiliary")
    parser.add_argument("--bounds", type=float, nargs="+", default=[0.3, 0.5, 0.7])
    parser.add_argument("--redraw", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parsed(parser)
    plan = evaluation_of(load_recipe(options.recipe))
    prompts, results = next(iter(plan.prompts.values())), {}
    model, tokenizer = load_for_inference(options.model, "float32", options.device)
    asked = read_prompts(prompts.source, tokenizer, prefix_tokens=prompts.generation.prompt_tokens)

    def measure(name: str, monitor: Monitor | None) -> None:
        counted = monitor or Monitor(guide, 1e-9)  # which stops nothing
        evaluator = Evaluator(model, tokenizer, guide, plan.batch_size, options.seed, monitor=counted)
        found = evaluator.generation([prompts], plan.constraints)
        rates = found["generation"][prompts.name]
        watched = counted.watched
        results[name] = {
            "rates": {constraint: one["violation_rate"] for constraint, one in rates.items()},
            "mean_length": found["text"][prompts.name]["mean_length"]["value"],
            "stopped": watched.stopped / watched.drawn,
            "withheld": watched.withheld / (len(asked) * prompts.generation.samples),
            "tokens": watched.tokens,
        }

    with guided(model, options.auxiliary, 0.0) as guide:
        assert guide is not None
        ways = {"monitor": partial(Monitor, guide), "rejection": partial(Rejecting, guide)}
        measure("plain", None)
        for bound in options.bounds:
            for name, way in ways.items():
                measure(f"{name}, {bound:g}", way(bound, options.redraw))
    names, plain = list(results["plain"]["rates"]), results["plain"]["tokens"]
    rows = [
        [name, *(f"{found['rates'][one]['value']:.1%}" for one in names), f"{found['stopped']:.1%}",
         f"{found['withheld']:.1%}", f"{found['mean_length']:.1f}", f"{found['tokens'] / plain:.2f}"]
        for name, found in results.items()
    ]  # fmt: skip
    print("\n" + markdown(["", *names, "draws stopped", "withheld", "words", "tokens"], rows))
    write(options, results)


if __name__ == "__main__":
    main()
