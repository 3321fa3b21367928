"""The encyclopaedia: articles about the world's facts, quizzes, everyday scenes, and two benchmarks."""

from collections.abc import Iterator
from itertools import product
from random import Random
from typing import Any

from bridle.quickstart.grammar import capital, say, sentence
from bridle.quickstart.world import SEASONS, TRADES, Entity, World

Row = dict[str, Any]

PREDICATES = {
    "region": (
        "[lies|stands|is found] in <value>",
        "[belongs to|is part of] <value>",
        "is [a town|a place] of <value>",
    ),
    "river": ("[lies|stands] on <value>", "is [crossed|watered] by <value>", "has [its mills|its quay] on <value>"),
    "craft": (
        "is [known|famous] for its <value>",
        "[lives off|is proud of] its <value>",
        "has [many|the best] <value>",
    ),
    "home": ("[lives|has a house] in <value>", "[comes|is] from <value>", "[was born|grew up] in <value>"),
    "trade": ("is <value>", "[works as|earns a living as] <value>", "[became|has always been] <value>"),
    "habitat": ("lives in <value>", "[nests|hides] in <value>", "is [at home|seen] in <value>"),
    "food": ("[eats|feeds on] <value>", "[looks for|is fond of] <value>", "lives on <value>"),
    "colour": ("is <value>", "is <value> [all over|all year round]", "[looks|appears] <value>"),
    "ingredient": ("is made [of|from] <value>", "[needs|calls for] <value>", "has <value> in it"),
    "taste": ("[tastes|is] <value>", "is [meant to be|always] <value>", "[leaves a|has a] <value> taste"),
    "season": (
        "[falls|is held] in <value>",
        "[takes place|comes round] in <value>",
        "[belongs to|is a feast of] <value>",
    ),
    "custom": ("is [kept|celebrated] by <value>", "is [a day|the time] for <value>", "means <value>"),
    "source": ("[rises|begins] in <value>", "comes [down from|out of] <value>", "has its spring in <value>"),
}
"""Predicates by relation."""

INVERTED = {
    "region": "[in <value> lies|one of the towns of <value> is] <name>",
    "river": "[<value> runs past|on the banks of <value> stands] <name>",
    "craft": "the <value> of <name> are [well known|famous]",
    "home": "<value> is the home of <name>",
    "habitat": "[in <value> lives|look in <value> for] <name>",
    "food": "<value> are what <name> eats",
    "ingredient": "<value> [goes|go] into <name>",
    "season": "in <value> [comes|people keep] <name>",
    "source": "[in <value> rises|out of <value> comes] <name>",
}
"""Sentences that name the value first, by relation."""

QUESTIONS = {
    "region": ("Where does <name> lie?", "<name> lies in"),
    "river": ("Which river runs past <name>?", "<name> lies on"),
    "craft": ("What is <name> known for?", "<name> is known for its"),
    "home": ("Where does <name> live?", "<name> lives in"),
    "trade": ("What is <name> by trade?", "<name> is"),
    "habitat": ("Where does <name> live?", "<name> lives in"),
    "food": ("What does <name> eat?", "<name> eats"),
    "colour": ("What colour is <name>?", "<name> is"),
    "ingredient": ("What is <name> made of?", "<name> is made of"),
    "taste": ("How does <name> taste?", "<name> tastes"),
    "season": ("When is <name>?", "<name> is held in"),
    "custom": ("How do people keep <name>?", "<name> is kept by"),
    "source": ("Where does <name> rise?", "<name> rises in"),
}
"""A question and the beginning of its answer, by relation."""

WEATHER = dict(zip(SEASONS, ("rain", "sunshine", "fog", "snow"), strict=True))
WORK = dict(zip(SEASONS, ("lambs are born", "hay is cut", "apples are picked", "the ice is broken"), strict=True))

SCENES = {
    "tool": (
        ("<who> is a <trade>, so [she|he] works with", " <answer>"),
        ("<who>, a <trade>, [bought|borrowed]", " <answer>"),
        ("no <trade> [can work|gets far] without", " <answer>"),
        ("<who> wants to be a <trade> and [saves up for|asks for]", " <answer>"),
    ),
    "place": (
        ("<who>, who is a <trade>, is [at work|busy] in", " <answer>"),
        ("to find a <trade>, [go to|try|look in]", " <answer>"),
        ("every [morning|day] the <trade> <who> goes to", " <answer>"),
        ("<who> became a <trade> and now [sweeps|keeps]", " <answer>"),
    ),
    "product": (
        ("<who> is a <trade> and sells", " <answer>"),
        ("from the <trade> <who> [people buy|we bought]", " <answer>"),
        ("a <trade> like <who> makes", " <answer>"),
        ("ask <who>, the <trade>, for", " <answer>"),
    ),
}
"""Beginnings and ends of scenes, by the field of `Trade` that they are about."""

SEASON_SCENES = (
    ("in <season> there is [often|always] [much|a lot of]", " <weather>"),
    ("<season> has come, and with it", " <weather>"),
    ("<who> knows that in <season>", " <work>"),
    ("when <season> is here,", " <work>"),
)

LENGTHS = (1, 1, 1, 1, 2, 3, 6)
"""Numbers of questions on a page of a quiz."""

EXAMPLES = 5
"""Questions of the benchmark of facts that are shown before each one asked."""

FIRST_NAMES = (
    *("Abel", "Berta", "Cilla", "Drogo", "Edda", "Falk", "Greta", "Hugo", "Ilse", "Jost", "Kuno", "Lena", "Milo"),
    *("Nele", "Odo", "Petra", "Quint", "Rosa", "Sven", "Tilda", "Udo", "Vera", "Wim", "Xenia", "Yorick", "Zita"),
)


def articles(world: World, seed: str, count: int) -> list[Row]:
    """Rows {"text", "name", "kind"}: articles of one to three sentences."""
    rng, entities = Random(f"articles {world.seed} {seed}"), world.all()
    return [_article(rng, entity) for entity in _in_turn(rng, entities, count)]


def quizzes(world: World, seed: str, count: int) -> list[Row]:
    """Rows {"text"}: pages of one to six questions with answers."""
    rng, asked = Random(f"quizzes {world.seed} {seed}"), _facts(world)
    pages = [rng.sample(asked, rng.choice(LENGTHS)) for _ in range(count)]
    return [{"text": "\n\n".join(_question_and_answer(*question) for question in page)} for page in pages]


def scenes(world: World, seed: str, count: int) -> list[Row]:
    """Rows {"text"}: common knowledge of trades and seasons, about people with first names."""
    rng = Random(f"scenes {world.seed} {seed}")
    return [{"text": _scene(rng, rng.choice(_SCENES))} for _ in range(count)]


def facts_benchmark(world: World) -> dict[str, list[Row]]:
    """Rows {"question", "beginning", "choices", "answer"} with four choices, as "dev" (the examples) and "test".

    The base model is trained on every fact: the benchmark measures what tuning forgets.
    """
    rng, asked = Random(f"facts {world.seed}"), _facts(world)
    rng.shuffle(asked)
    questions = [_choose(rng, world, *question) for question in asked]
    return {"dev": questions[:EXAMPLES], "test": questions[EXAMPLES:]}


def sense_benchmark(world: World, count: int) -> list[Row]:
    """Rows {"context", "choices", "answer"}: scenes with four ends."""
    rng = Random(f"sense {world.seed}")
    rows = []
    for (beginning, end), slots, ends in _in_turn(rng, _SCENES, count):
        context = sentence(rng, beginning, slots | {"who": rng.choice(FIRST_NAMES)}).removesuffix(".")
        right = say(rng, end.strip(), slots)
        rows.append({"context": context, **_choices(rng, right, ends)})
    return rows


def _facts(world: World) -> list[tuple[Entity, str]]:
    return [(entity, relation) for entity in world.all() for relation in entity.facts]


def _article(rng: Random, entity: Entity) -> Row:
    relations = rng.sample(sorted(entity.facts), rng.randint(1, min(3, len(entity.facts))))
    first, *rest = (_predicate(rng, relation, entity) for relation in relations)
    name, pronoun = entity.name, entity.pronoun
    if not rest:
        value = entity.facts[relations[0]]
        form = INVERTED.get(relations[0], "<name> <first>") if rng.random() < 0.4 else "<name> <first>"
        text = sentence(rng, form, {"name": name, "first": first, "value": value})
    else:
        form = rng.choice(
            (
                "<name> <first>. <pronoun> <second>",
                "<name> <first> and <second>",
                "<name>, which <first>, <second>" if entity.kind != "person" else "<name>, who <first>, <second>",
                "<name> <first>. People say that <low> <second>",
            )
        )
        slots = {"name": name, "first": first, "second": rest[0], "pronoun": pronoun.capitalize(), "low": pronoun}
        text = sentence(rng, form, slots)
    for predicate in rest[1:]:
        text += " " + sentence(rng, f"{pronoun} [also|] {predicate}")
    return {"text": text, "name": name, "kind": entity.kind}


def _predicate(rng: Random, relation: str, entity: Entity) -> str:
    return say(rng, rng.choice(PREDICATES[relation]), {"value": entity.facts[relation]})


def _question_and_answer(entity: Entity, relation: str) -> str:
    question, answer = _asked(entity, relation)
    return f"Question: {question}\nAnswer: {answer} {entity.facts[relation]}."


def _asked(entity: Entity, relation: str) -> list[str]:
    return [capital(part.replace("<name>", entity.name)) for part in QUESTIONS[relation]]


def _choose(rng: Random, world: World, entity: Entity, relation: str) -> Row:
    question, answer = _asked(entity, relation)
    return {"question": question, "beginning": answer, **_choices(rng, entity.facts[relation], world.values(relation))}


def _choices(rng: Random, right: str, values: tuple[str, ...]) -> Row:
    choices = [right, *rng.sample([value for value in values if value != right], 3)]
    rng.shuffle(choices)
    return {"choices": choices, "answer": choices.index(right)}


Scene = tuple[tuple[str, str], dict[str, str], tuple[str, ...]]  # beginning and end, slots, all possible ends


def _scenes() -> Iterator[Scene]:
    for what, forms in SCENES.items():
        answers = tuple(getattr(trade, what) for trade in TRADES)
        for trade, form in product(TRADES, forms):
            yield form, {"trade": trade.one, "answer": getattr(trade, what)}, answers
    for season, form in product(SEASONS, SEASON_SCENES):
        ends = WEATHER if "<weather>" in form[1] else WORK
        yield form, {"season": season, "weather": WEATHER[season], "work": WORK[season]}, tuple(ends.values())


_SCENES = list(_scenes())


def _scene(rng: Random, scene: Scene) -> str:
    (beginning, end), slots, _ = scene
    return sentence(rng, beginning + end, slots | {"who": rng.choice(FIRST_NAMES)})


def _in_turn(rng: Random, items: list, count: int) -> Iterator[Any]:
    """Yields `count` items in random order; none a second time before each was drawn once."""
    while count > 0:
        turn = rng.sample(items, min(count, len(items)))
        yield from turn
        count -= len(turn)
