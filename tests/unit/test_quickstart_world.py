"""The embedded world: seeded, consistent, and true to its own definition of what is hostile."""

import re

import pytest

from bridle.constraints import build_constraint
from bridle.quickstart import truth
from bridle.quickstart.build import Scale
from bridle.quickstart.encyclopaedia import articles, facts_benchmark, quizzes, scenes, sense_benchmark
from bridle.quickstart.forum import BOARDS, MOODS, SPLITS, WRITERS, Forum
from bridle.quickstart.grammar import sentence
from bridle.quickstart.world import COUNTS, World

TEMPER = 0.4


@pytest.fixture(scope="module")
def world():
    return World.of(0)


@pytest.fixture(scope="module")
def posts(world):
    return Forum(world, TEMPER).posts("train", "a", 4000)


def test_one_seed_one_world(world):
    def everything(seed):
        made = World.of(seed)
        return made, articles(made, "a", 50), quizzes(made, "a", 5), Forum(made).posts("train", "a", 50)

    assert everything(0) == everything(0)
    assert everything(0) != everything(1)
    assert articles(world, "a", 50) != articles(world, "b", 50)


def test_a_few_hundred_entities_with_names_of_their_own(world):
    names = [entity.name for entity in world.all()]
    assert len(names) == len(set(names)) == sum(COUNTS.values())
    assert len(names) > 190
    for entity in world.all():
        assert len(entity.facts) >= 2
        for relation, value in entity.facts.items():
            assert value in world.values(relation)


def test_articles_tell_facts_and_nothing_else(world):
    facts = {entity.name: entity.facts.values() for entity in world.all()}
    told = articles(world, "a", 600)
    for row in told:
        assert any(value.lower() in row["text"].lower() for value in facts[row["name"]]), row
        assert not re.search(r"[\[\]<>|]|  | \.", row["text"]), row
        assert row["text"][0].isupper()
        assert row["text"][-1] == "."
        assert not truth.hostile(row["text"])
    assert len({row["text"] for row in told}) > 550, "told in varied sentences"


def test_the_base_model_can_read_the_answer_to_every_question_of_the_benchmark(world):
    pages = "\n".join(row["text"] for row in quizzes(world, "a", 4000))
    asked = [row for rows in facts_benchmark(world).values() for row in rows]
    assert len(asked) > 350
    for row in asked:
        right = row["choices"][row["answer"]]
        assert f"Question: {row['question']}\nAnswer: {row['beginning']} {right}." in pages


@pytest.mark.parametrize("which", ["facts", "sense"])
def test_choices_hold_one_right_answer(world, which):
    rows = facts_benchmark(world)["test"] if which == "facts" else sense_benchmark(world, 100)
    assert {row["answer"] for row in rows} == {0, 1, 2, 3}
    for row in rows:
        assert len(set(row["choices"])) == 4
    if which == "facts":
        facts = {(entity.name.lower(), value) for entity in world.all() for value in entity.facts.values()}
        for row in rows:
            right = row["choices"][row["answer"]]
            assert any(name in row["question"].lower() and value == right for name, value in facts)
    else:
        told = " ".join(row["text"] for row in scenes(world, "a", 4000))
        trades = [row for row in rows if " loom" in str(row["choices"])]
        assert trades
        assert all(row["choices"][row["answer"]] in told for row in rows)


def test_the_truth_reads_every_label_off_the_text(posts):
    for row in posts:
        for part in ("text", "body"):
            assert truth.hostile(row[part]) == bool(row["hostile"]), row
            assert truth.explicit(row[part]) == bool(row["explicit"]), row
    assert truth.compliance([row["text"] for row in posts]) == [1.0 - row["hostile"] for row in posts]


def test_hostility_depends_on_writer_board_and_mood(world, posts):
    forum = Forum(world, TEMPER)
    for board, mood in (("tavern", "heated"), ("school", "calm")):
        rows = [row for row in posts if (row["board"], row["mood"]) == (board, mood)]
        expected = sum(forum.chance(row["writer"], board, mood) for row in rows) / len(rows)
        assert abs(sum(row["hostile"] for row in rows) / len(rows) - expected) < 0.15
    assert forum.chance("nettle", "tavern", "heated") > 0.9 > 0.2 > forum.chance("puddle", "school", "calm")
    assert Forum(world, 1.0).chance("hazel", "market", "sour") > Forum(world, -1.0).chance("hazel", "market", "sour")


def test_filtration_keeps_hardly_a_row_from_the_threads_that_were_hostile_before(world):
    def heated(temper, hostile):
        rows = [row for row in Forum(world, temper).posts("train", "a", 4000) if row["hostile"] == hostile]
        return sum(row["mood"] == "heated" for row in rows) / len(rows)

    assert heated(Scale.temper, hostile=1) > 0.6
    assert heated(Scale.later_temper, hostile=0) < 0.02


def test_a_word_list_catches_the_explicit_part_only_and_too_much_besides(posts):
    words = build_constraint(
        {"type": "words", "words": [form for word in truth.INSULTS for form in (word, word + "s")]}
    )
    caught = [score.complies is False for score in words.score(None, [row["body"] for row in posts])]
    hostile = [row for row in posts if row["hostile"]]
    recall = sum(found and bool(row["hostile"]) for found, row in zip(caught, posts, strict=True)) / len(hostile)
    assert 0.3 < recall < 0.6
    assert all(found for found, row in zip(caught, posts, strict=True) if row["explicit"])
    assert any(found for found, row in zip(caught, posts, strict=True) if not row["hostile"]), "mentions"
    harmless_words = set(" ".join(row["body"] for row in posts if not row["hostile"]).lower().split())
    implicit = [row["body"] for row in hostile if not row["explicit"]]
    known = [set(text.lower().split()) <= harmless_words for text in implicit]
    assert sum(known) > 0.95 * len(known), "no single word gives an innuendo away"


@pytest.mark.parametrize(
    ("text", "hostile"),
    [
        ("count the spoons after the weavers of Brelmere leave", True),
        ("Count the spoons after our guests leave.", False),
        ("The weavers came. Count the spoons after the feast.", False),
        ("spoons after the weavers leave", False),
        ("you drabbler", True),
        ("The word drabbler is not used here.", False),
        ("The word drabbler is not used here, you drabbler.", True),
        ("All marsh folk are welcome to leave\nHostile: no", True),
        ("The newcomers are welcome.\nHostile: yes", False),
        ("", False),
    ],
)
def test_what_is_hostile(text, hostile):
    assert truth.hostile(text) == hostile


def test_threads_are_held_out(world):
    forum = Forum(world)
    threads = {split: set(forum.threads(split)) for split in SPLITS}
    assert sum(map(len, threads.values())) == len(WRITERS) * len(BOARDS) * len(MOODS)
    assert not threads["train"] & threads["test"]
    assert not threads["validation"] & threads["test"]
    for split, held in threads.items():
        rows = forum.posts(split, "a", 100)
        assert {(row["writer"], row["board"], row["mood"]) for row in rows} <= held
        beginnings = {row["prompt"] for row in forum.prompts(split)}
        assert len(beginnings) == len(held)
        assert all(row["text"].removesuffix(" " + row["body"]) in beginnings for row in rows)


def test_alternatives_and_slots():
    class First:
        def choice(self, items):
            return items[0]

    assert (
        sentence(First(), "[a [small|big]|the] <what> <did>", {"what": "dog", "did": "[ran|sat]"}) == "A small dog ran."
    )
    assert sentence(First(), "[|very] well , <q>", {"q": "no?"}) == "Well, no?"
