"""Documents of invented words for every benchmark, as the published data sets have them."""

import json
import random
from pathlib import Path

import lm_eval.tasks

from bridle.evaluation.task_data import COMMONSENSE

WORDS = ["kettle", "fog", "bread", "lantern", "mill", "river", "ferry", "door", "ladder", "rain", "grumblefish"]
SUBJECTS = sorted(
    path.stem.removeprefix("mmlu_")
    for path in (Path(lm_eval.tasks.__file__).parent / "mmlu/default").glob("mmlu_*.yaml")
)


class Inventor:
    """Documents of invented words; the same seed makes the same ones."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)

    def words(self, most: int = 5) -> str:
        return " ".join(self.random.choices(WORDS, k=self.random.randint(1, most)))

    def choices(self, n: int) -> list[str]:
        return [self.words() for _ in range(n)]

    def label(self, n: int) -> int:
        return self.random.randrange(n)

    def lettered(self) -> dict:
        n = self.random.choice([3, 4])  # ARC has questions with three
        return {
            "choices": {"text": self.choices(n), "label": list("ABCD"[:n])},
            "answerKey": "ABCD"[self.label(n)],
        }

    def boolq(self):
        return {"question": self.words(), "passage": self.words(20), "answer": bool(self.label(2))}

    def piqa(self):
        return {"goal": self.words(), "sol1": self.words(), "sol2": self.words(), "label": self.label(2)}

    def siqa(self):
        answers = zip(("answerA", "answerB", "answerC"), self.choices(3), strict=True)
        return {"context": self.words(), "question": self.words(), **dict(answers), "label": str(self.label(3) + 1)}

    def hellaswag(self):
        return {
            "activity_label": self.words(2),
            "ctx_a": self.words(),
            "ctx_b": self.words(2),
            "endings": [f"{choice} [step] {choice}" for choice in self.choices(4)],
            "label": self.label(4),
        }

    def winogrande(self):
        options = {"option1": self.words(2), "option2": self.words(2), "answer": str(self.label(2) + 1)}
        return {"sentence": f"{self.words()} _ {self.words()}", **options}

    def arc_easy(self):
        return {"id": self.words(1), "question": self.words(), **self.lettered()}

    arc_challenge = arc_easy

    def openbookqa(self):
        return {"question_stem": self.words(), **self.lettered()}

    def mmlu(self, subject):
        return {
            "question": self.words(),
            "subject": subject,
            "choices": self.choices(4),
            "answer": self.label(4),
        }


def documents(name: str, n: int = 12, seed: int = 0) -> list[dict]:
    inventor = Inventor(seed)
    if name == "mmlu":
        return [inventor.mmlu(subject) for subject in SUBJECTS for _ in range(n)]
    return [getattr(inventor, name)() for _ in range(n)]


def write(folder: Path, file: str, rows: list[dict]) -> None:
    (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_all(folder: Path) -> None:
    """Everything that the tasks `mmlu` and `commonsense` ask."""
    for name in COMMONSENSE:
        write(folder, f"{name}.validation", documents(name))
    write(folder, "mmlu.validation", documents("mmlu", 1))
    write(folder, "mmlu.dev", documents("mmlu", 5, seed=1))
