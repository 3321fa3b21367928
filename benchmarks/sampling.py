"""Tokens a second of `bridle.models.sampling.sample`, against the ways of `transformers` to draw the same samples.

    python benchmarks/sampling.py --json FILE
    python benchmarks/sampling.py --shape llama-7b --prompts 512 --new_tokens 64 --batch 256

`one_by_one` is `model.generate` with one prompt after the other, on some of the prompts; `batches` is `generate` with
batches as they come; `continuous` is `generate_batch`, continuous batching; `bare` is a loop of forwards with a cache
of keys and values that takes the likeliest token and ends no row early: what the model alone costs. Prompts are
beginnings of what the model itself says. Tokens are counted to the end of each text, so that filling counts for nobody.
On a GPU whose bandwidth is known the roof is what a batch would draw if each step did nothing but read the weights and
its rows' keys and values.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from common import (
    Figures,
    cell,
    interleaved,
    is_gpu,
    markdown,
    median,
    over,
    parsed,
    parser_of,
    peaks,
    spread,
    synchronize,
    write,
)
from subjects import STAND_IN, add_sizes, model_of, tokenizer_of
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from bridle.core.tokens import pad_left
from bridle.models.forward import CACHE
from bridle.models.sampling import sample

BRIDLE = "bridle"
SPEED = "tokens_per_second"
PAGE = 64  # tokens of a page of the cache, on a CPU
Rows = list[list[int]]


@dataclass
class Sampler:
    """A model, and how much is drawn from it. Each method draws a completion for every prompt, as token ids."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    new_tokens: int
    batch: int

    @property
    def config(self) -> GenerationConfig:
        """The model's own distribution, as `sample` draws from it."""
        return GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=self.new_tokens,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
        )

    def bridle(self, prompts: Rows) -> Rows:
        return sample(
            self.model,
            prompts,
            max_new_tokens=self.new_tokens,
            pad_token_id=self.tokenizer.pad_token_id,
            end_token_ids=[self.tokenizer.eos_token_id],
            batch_size=self.batch,
        )

    def one_by_one(self, prompts: Rows) -> Rows:
        return [row for prompt in prompts for row in self._generate([prompt])]

    def batches(self, prompts: Rows) -> Rows:
        starts = range(0, len(prompts), self.batch)
        return [row for start in starts for row in self._generate(prompts[start : start + self.batch])]

    def continuous(self, prompts: Rows) -> Rows:
        found = self.model.generate_batch(
            prompts, self.config, continuous_batching_config=self._paging(prompts), persistent_manager=True
        )
        done = [output.generated_tokens for output in found.values() if output.error is None]
        if len(done) < len(prompts):
            raise RuntimeError(f"{len(done)} of {len(prompts)} completions came back")
        return done

    @torch.no_grad()
    def bare(self, prompts: Rows) -> Rows:
        found = []
        for start in range(0, len(prompts), self.batch):
            ids, mask = pad_left(prompts[start : start + self.batch], self.tokenizer.pad_token_id)
            ids, mask, cache, drawn = ids.to(self.model.device), mask.to(self.model.device), None, []
            for _ in range(self.new_tokens):
                output = self.model(
                    input_ids=ids, attention_mask=mask, use_cache=True, logits_to_keep=1, **{CACHE: cache}
                )
                ids, cache = output.logits[:, -1:].argmax(-1), output[CACHE]
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
                drawn.append(ids)
            found += torch.cat(drawn, dim=1).tolist()
        return found

    @torch.no_grad()
    def _generate(self, prompts: Rows) -> Rows:
        ids, mask = (part.to(self.model.device) for part in pad_left(prompts, self.tokenizer.pad_token_id))
        output = self.model.generate(input_ids=ids, attention_mask=mask, generation_config=self.config)
        return output[:, ids.shape[1] :].tolist()

    def _paging(self, prompts: Rows) -> ContinuousBatchingConfig:
        """On a GPU as it chooses itself, in less of the memory; on a CPU it would take nearly all there is."""
        if is_gpu(self.model.device):
            return ContinuousBatchingConfig(max_memory_percent=0.4)
        pages = -(-(max(map(len, prompts)) + self.new_tokens) // PAGE)
        return ContinuousBatchingConfig(
            page_size=PAGE, num_blocks=self.batch * pages, max_batch_tokens=self.batch * PAGE // 4
        )

    def drawn(self, completions: Rows) -> int:
        """Tokens up to the end of each text, the end token included."""
        end = self.tokenizer.eos_token_id
        return sum(row.index(end) + 1 if end in row else len(row) for row in completions)


def beginnings(sampler: Sampler, count: int, longest: int) -> Rows:
    """Prompts of 2 to `longest` tokens, from what the model says."""
    tokenizer = sampler.tokenizer
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    texts = sampler.bridle([[first]] * count)
    lengths = torch.randint(2, longest + 1, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    words = ([token for token in text if token != tokenizer.eos_token_id] for text in texts)
    return [[first, *text][:length] for text, length in zip(words, lengths, strict=True)]


def run(sampler: Sampler, draw: Callable[[Rows], Rows], prompts: Rows) -> Figures:
    """Tokens drawn, seconds, and tokens a second."""
    torch.manual_seed(0)
    synchronize(sampler.model.device)
    began = time.perf_counter()
    completions = draw(prompts)
    synchronize(sampler.model.device)
    seconds = time.perf_counter() - began
    tokens = sum(map(len, completions)) if draw == sampler.bare else sampler.drawn(completions)
    return {"tokens": tokens, "seconds": seconds, SPEED: tokens / seconds}


def fault_of(way: Callable[[], Figures]) -> str | None:
    """Why a way does not work here; None where it does."""
    try:
        way()
    except Exception as error:  # the file reports any fault
        return " ".join(f"{type(error).__name__}: {error}".split())
    return None


def roof(sampler: Sampler, prompts: Rows) -> float | None:
    """Tokens a second that the memory's bandwidth allows; None where it is not known."""
    if not (peak := peaks(sampler.model.device)):
        return None
    tables = {id(sampler.model.get_input_embeddings().weight)} - {id(sampler.model.get_output_embeddings().weight)}
    weights = sum(weight.nbytes for weight in sampler.model.parameters() if id(weight) not in tables)
    length = sum(map(len, prompts)) / len(prompts) + sampler.new_tokens / 2
    return sampler.batch * peak[1] / (weights + sampler.batch * length * cached_bytes(sampler.model))


@torch.no_grad()
def cached_bytes(model: PreTrainedModel) -> float:
    """What the keys and values of one token take up."""
    ids = torch.ones(1, 8, dtype=torch.long, device=model.device)
    cache = model(input_ids=ids, use_cache=True)[CACHE]
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) / ids.numel()


def measure(options: argparse.Namespace) -> dict[str, object]:
    model = model_of(options).eval()
    model.generation_config = GenerationConfig()  # else what ours leaves open is filled in from there
    sampler = Sampler(model, tokenizer_of(options), options.new_tokens, options.batch)
    prompts = beginnings(sampler, options.prompts, options.longest_prompt)
    some = prompts[:: max(1, len(prompts) // options.one_by_one)]
    ways = {
        name: partial(run, sampler, getattr(sampler, name), prompts)
        for name in (BRIDLE, "batches", "continuous", "bare")
    }
    ways["one_by_one"] = partial(run, sampler, sampler.one_by_one, some)
    faults = {name: fault for name, way in ways.items() if (fault := fault_of(way))}  # and each has run once
    raw = interleaved({name: way for name, way in ways.items() if name not in faults}, options.repeats)
    ratios = {name: spread(over(raw[BRIDLE], raw[name], SPEED)) for name in raw if name != BRIDLE}
    bound = roof(sampler, prompts)
    return {
        **{f"over_{name}": ratios[name]["median"] if name in ratios else None for name in ways if name != BRIDLE},
        "share_of_roof": bound and median(raw[BRIDLE], SPEED) / bound,
        "faults": faults,
        "ratios": ratios,
        "raw": raw,
    }


def table(results: dict) -> str:
    rows = []
    for name, runs in results["raw"].items():
        ratio = results["ratios"].get(name)
        rows.append([name, f"{median(runs, SPEED):.0f}", cell(ratio) if ratio else ""])
    rows += [[name, "not measured", reason] for name, reason in results["faults"].items()]
    return markdown(["way", "tokens/s", "Bridle's over it"], rows)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--model", type=Path, default=STAND_IN, metavar="FOLDER", help="where no size is given")
    add_sizes(parser)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--one_by_one", type=int, default=32, help="of them, one after the other")
    parser.add_argument("--longest_prompt", type=int, default=16, help="in tokens")
    parser.add_argument("--new_tokens", type=int, default=32)
    parser.add_argument("--batch", type=int, default=64)
    options = parsed(parser)
    results = measure(options)
    print("\n" + table(results))
    if results["share_of_roof"] is not None:
        print(f"share of the bandwidth's roof: {results['share_of_roof']:.0%}")
    write(options, results)


if __name__ == "__main__":
    main()
