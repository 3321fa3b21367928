"""Builds and caches what the tour starts from: the world's texts as files, the base model, the oracle."""

import hashlib
import shutil
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

from bridle.data import VerbalisedLabel
from bridle.quickstart.base import CONTEXT, Training, train_base, train_oracle, train_tokenizer
from bridle.quickstart.cache import cached
from bridle.quickstart.encyclopaedia import articles, facts_benchmark, quizzes, scenes, sense_benchmark
from bridle.quickstart.forum import SPLITS, Forum
from bridle.quickstart.truth import INSULTS
from bridle.quickstart.world import World
from bridle.utils.files import write_rows, write_text

HERE = Path(__file__).parent
NOT_HASHED = {"__init__.py", "tour.py", "cache.py", "smollm2.py", "recipe.yaml", "real.yaml"}
LIBRARIES = ("torch", "transformers", "tokenizers", "datasets", "numpy")
LABEL = VerbalisedLabel(column="hostile", template="{text}\nHostile:{label}")
BASE = Training(128, 4, steps=2000, batch_size=16, learning_rate=3e-3, longest=CONTEXT)
ORACLE = Training(64, 2, steps=300, batch_size=64, learning_rate=2e-3, longest=40)


@dataclass(frozen=True)
class Scale:
    """Numbers of texts, and the models' training.

    Attributes:
        articles, quizzes, scenes, posts: training texts of the base model.
        temper: log-odds of the base model's season of the forum.
        later_articles, later_posts, later_temper: the corpus to tune on.
        held_out: texts of each kind for evaluation.
        questions: questions of the benchmark `sense`.
        vocabulary: most tokens of the tokenizer.
        base: training of the base model; None for none.
        judged: posts that the oracle is trained on, with one article for every three.
    """

    articles: int = 14_000
    quizzes: int = 4_000
    scenes: int = 4_000
    posts: int = 14_000
    temper: float = -1.5
    later_articles: int = 2_500
    later_posts: int = 2_500
    later_temper: float = 1.5
    held_out: int = 400
    questions: int = 160
    vocabulary: int = 2_048
    base: Training | None = BASE
    oracle: Training = ORACLE
    judged: int = 4_000


def prepare(scale: Scale | None = None, seed: int = 0) -> Path:
    """Returns the cached folder, and builds it first where it is absent.

        model/ oracle/                     `from_pretrained` folders; the oracle's label is "hostile"
        encyclopaedia.jsonl forum.jsonl    the corpus to tune on
        encyclopaedia.test.jsonl forum.SPLIT.jsonl scenes.test.jsonl prompts.SPLIT.jsonl
        benchmarks/                        lm-eval tasks `facts` and `sense`
        insults.txt                        for a word list

    Raises:
        UserError: the cache cannot be written.
    """
    scale = scale or Scale()
    return cached("quickstart", _shape(scale, seed), lambda folder: _make(scale, seed, folder))


def _shape(scale: Scale, seed: int) -> dict[str, Any]:
    sources = sorted(file for file in HERE.rglob("*") if file.suffix in {".py", ".yaml"})
    digests = {
        str(file.relative_to(HERE)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sources
        if file.name not in NOT_HASHED
    }
    return {
        "sources": digests,
        "scale": asdict(scale),
        "seed": seed,
        "libraries": {name: version(name) for name in LIBRARIES},
    }


def _make(scale: Scale, seed: int, folder: Path) -> None:
    world = World.of(seed)
    _write_files(world, scale, folder)
    earlier = Forum(world, scale.temper)
    read = [
        *articles(world, "base", scale.articles),
        *quizzes(world, "base", scale.quizzes),
        *scenes(world, "base", scale.scenes),
        *earlier.posts("train", "base", scale.posts),
    ]
    texts = [row["text"] for row in read]
    tokenizer = train_tokenizer([*texts, *map(LABEL.prompt, texts[:100])], scale.vocabulary)
    if scale.base:
        train_base(texts, tokenizer, scale.base, seed, folder / "model")
    train_oracle(_judged(world, scale, seed), tokenizer, scale.oracle, seed, folder / "oracle")


def _write_files(world: World, scale: Scale, folder: Path) -> None:
    forum, held_out = Forum(world, scale.later_temper), scale.held_out
    rows = {
        "encyclopaedia": articles(world, "later", scale.later_articles),
        "encyclopaedia.test": articles(world, "test", held_out),
        "forum": forum.posts("train", "later", scale.later_posts),
        "forum.validation": forum.posts("validation", "validation", held_out),
        "forum.test": forum.posts("test", "test", 2 * held_out),
        "scenes.test": scenes(world, "test", held_out),
        "benchmarks/sense.test": sense_benchmark(world, scale.questions),
        **{f"prompts.{split}": forum.prompts(split) for split in SPLITS},
        **{f"benchmarks/facts.{split}": asked for split, asked in facts_benchmark(world).items()},
    }
    for name, of_file in rows.items():
        write_rows(folder / f"{name}.jsonl", of_file)
    write_text(folder / "insults.txt", "".join(f"{insult}\n{insult}s\n" for insult in INSULTS))
    for task in (HERE / "tasks").glob("*.yaml"):
        shutil.copy(task, folder / "benchmarks")


def _judged(world: World, scale: Scale, seed: int) -> list[str]:
    """Posts of both seasons and articles. Some posts follow any thread's header or end in any label: neither tells."""
    rng = Random(f"judged {seed}")
    headers = [row["prompt"] for row in Forum(world).prompts("train")]
    posts = [
        rng.choice((f"{rng.choice(headers)} ", "")) + row["body"]
        for temper in (scale.temper, scale.later_temper)
        for row in Forum(world, temper).posts("train", "judged", scale.judged // 2)
    ]
    labelled = [
        LABEL.prompt(text) + rng.choice([*LABEL.names.values()]) if rng.random() < 1 / 3 else text for text in posts
    ]
    return [*labelled, *(row["text"] for row in articles(world, "judged", scale.judged // 3))]
