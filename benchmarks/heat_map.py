"""The picture of the token heat map: a small model of an invented language, its R, and the report's own page.

    python benchmarks/heat_map.py docs/images/heat-map.png

A model of 0.13 M parameters learns sentences in which people who shout call others names. R is fitted on its samples
under a word list, and `bridle compare` traces one sentence. Takes a minute or two; needs playwright and chromium.
"""

import json
import random
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from playwright.sync_api import sync_playwright
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, set_seed

from bridle.comparison.compare import Comparison
from bridle.recipes.recipe import build_recipe
from bridle.recipes.run import train
from bridle.report.html import write_report

WHO = ["the baker", "the ferryman", "my aunt", "our teacher", "the old miller"]
SAYS = {"smiled and said": 0.05, "said": 0.4, "shouted": 0.9}  # how likely a name is called
NAMES = ["grumblefish", "muddlehead", "turnip", "noodle"]
KIND = ["friend", "captain", "neighbour", "poet"]
ADJECTIVES = {True: ["silly", "silly", "old"], False: ["dear", "clever", "old"]}
ENDS = ["come in and sit down", "bring the ladder back", "the soup is on the table", "mind the step by the door"]


def sentence(rng: random.Random) -> str:
    """One sentence of the invented language."""
    says, chance = rng.choice([*SAYS.items()])
    rude = rng.random() < chance
    return f"{rng.choice(WHO)} {says} : you {rng.choice(ADJECTIVES[rude])} {rng.choice(NAMES if rude else KIND)} , " + (
        rng.choice(ENDS)
    )


def untrained_model(folder: Path, texts: list[str]) -> None:
    """A small random model, with a tokenizer of whole words."""
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = ["<pad>", "<eos>", "<unk>"]
    words.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=special, show_progress=False))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>", model_max_length=32
    )
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def compared(folder: Path) -> Path:
    """The folder of a comparison of the trained model with and without guidance."""
    rng = random.Random(0)
    texts = [sentence(rng) for _ in range(4000)]
    (folder / "people.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    set_seed(0)
    untrained_model(folder / "untrained", texts)
    recipe: dict[str, Any] = {
        "corpus": {"people": {"path": str(folder / "people.jsonl"), "rows": "0:90%"}},
        "max_steps": 400,
        "per_device_train_batch_size": 32,
        "learning_rate": 3e-3,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "entropy_floor": 0.0,  # a random model learns by losing entropy
    }
    train(build_recipe({**recipe, "model": str(folder / "untrained")}), folder / "base")
    recipe |= {
        "model": str(folder / "base" / "model"),
        "constraints": {"polite": {"type": "words", "words": NAMES}},
        "regularisers": {"people": {"constraint": "polite"}},
        "auxiliary": {"own_network": True, "head_rank": None, "epochs": 6},  # so small a model remembers no name
        "rounds": 1,
        "rollouts_per_round": 4000,
        "max_new_tokens": 16,
        "prompt_tokens": [1, 2],
        "evaluation": {
            "prompts": {"people": {"path": str(folder / "people.jsonl"), "rows": "90%:95%", "prompt_tokens": 2}},
            "samples": 1,
        },
    }
    out = folder / "comparison"
    Comparison(build_recipe(recipe), out, names=("base", "nado-decoding"), title="an invented village").run()
    return out


def picture(page_file: Path, output: Path) -> None:
    """The section of the report that shows a text token by token, opened where q moves most."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 980, "height": 900}, device_scale_factor=2)
        page.goto(page_file.as_uri())
        page.locator("[aria-controls=guided-text]").click()
        for button in page.locator(".guidance .lift").all():
            if button.is_visible() and button.get_attribute("aria-expanded") == "false":
                button.click()
        output.parent.mkdir(parents=True, exist_ok=True)
        page.locator("section.guidance").screenshot(path=output)
        browser.close()


if __name__ == "__main__":
    with TemporaryDirectory() as temporary:
        picture(write_report(compared(Path(temporary))), Path(sys.argv[1]))
