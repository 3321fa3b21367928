"""The world: some two hundred entities of six kinds, and the facts about them, all drawn from one seed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random


@dataclass(frozen=True)
class Entity:
    """A named thing; `name`, with its article, and the values of `facts`, by relation, are written as in a sentence."""

    name: str
    kind: str
    pronoun: str
    facts: Mapping[str, str]


@dataclass(frozen=True)
class Trade:
    """An occupation, and common knowledge about it."""

    one: str
    many: str
    tool: str
    place: str
    product: str


TRADES = (
    Trade("weaver", "weavers", "a loom", "the weaving hall", "cloth"),
    Trade("baker", "bakers", "an oven", "the bakehouse", "bread"),
    Trade("smith", "smiths", "an anvil", "the forge", "nails"),
    Trade("potter", "potters", "a wheel", "the kiln yard", "jugs"),
    Trade("tanner", "tanners", "a scraper", "the tannery", "leather"),
    Trade("fisher", "fishers", "a net", "the jetty", "dried fish"),
    Trade("miller", "millers", "a millstone", "the mill", "flour"),
    Trade("shepherd", "shepherds", "a crook", "the pasture", "wool"),
    Trade("tinker", "tinkers", "a file", "the cart", "kettles"),
    Trade("chandler", "chandlers", "a mould", "the wax house", "candles"),
)
REGIONS = (
    *("the Low Fells", "the High Fells", "the Salt Coast", "the Long Marsh"),
    *("the Birch Country", "the Red Downs", "the Windy Isles", "the Inner Vale"),
)
SEASONS = ("spring", "summer", "autumn", "winter")
VALUES: dict[str, tuple[str, ...]] = {
    "region": REGIONS,
    "craft": tuple(trade.many for trade in TRADES),
    "trade": tuple(f"a{'n' if trade.one[0] in 'aeiou' else ''} {trade.one}" for trade in TRADES),
    "habitat": ("the reeds", "old barns", "the cliffs", "deep woods", "dry walls", "the dunes", "hedges", "caves"),
    "food": ("acorns", "snails", "clover", "herring", "beetles", "moss", "berries", "eggs"),
    "colour": ("grey", "russet", "black", "white", "golden", "green", "brown", "blue"),
    "ingredient": ("barley", "leeks", "eel", "plums", "goat cheese", "turnips", "honey", "mushrooms", "peas", "crab"),
    "taste": ("sweet", "sour", "salty", "bitter", "peppery", "smoky"),
    "season": SEASONS,
    "custom": (
        *("racing boats", "burning straw", "swapping hats", "throwing apples"),
        *("telling lies", "walking backwards", "ringing bells", "painting doors"),
    ),
}
"""The possible values of a fact, by relation; `World.values` adds the names of towns and rivers."""

COUNTS = {"town": 36, "person": 48, "beast": 32, "dish": 28, "festival": 24, "river": 24}

_SYLLABLES = {
    "town": ("Brel Tavo Osk Vard Lomm Drus Pell Sket Garr Hul Imber Nars", "mere wick holt garth sund bray"),
    "person": ("An Be Cor Dov El Fen Gis Hed Jor Mir Ott Rul", "dis ric la mund wen bert"),
    "beast": ("grel ven tus mar fip ood bal snur", "low nok kin del pet"),
    "dish": ("sour hod pan crum brin dump fry", "dle bake gruel mash sop"),
    "festival": ("Lantern Goose Kettle Thistle Mirror Bell", "tide mas fair wake eve"),
    "river": ("Sar Il Wen Tok Ruv Ost", "na be dle mar isk"),
}
_ARTICLES = dict.fromkeys(("beast", "dish", "river"), "the ")
_RELATIONS = {
    "town": ("region", "river", "craft"),
    "person": ("home", "trade"),
    "beast": ("habitat", "food"),
    "dish": ("ingredient", "taste"),
    "festival": ("season", "custom"),
    "river": ("source", "colour"),
}
_VALUES_OF = {"home": "town", "source": "region"}


@dataclass(frozen=True)
class World:
    """All entities by kind, drawn from one seed."""

    seed: int
    entities: Mapping[str, list[Entity]] = field(repr=False)

    @classmethod
    def of(cls, seed: int) -> "World":
        """Draws the world of a seed."""
        rng = Random(f"world {seed}")
        names = {kind: _names(rng, kind) for kind in COUNTS}
        values = VALUES | {kind: tuple(named) for kind, named in names.items()}
        return cls(seed, {kind: [_entity(rng, kind, name, values) for name in names[kind]] for kind in COUNTS})

    def names(self, kind: str) -> list[str]:
        """The names of one kind."""
        return [entity.name for entity in self.entities[kind]]

    def all(self) -> list[Entity]:
        """All entities, kind by kind."""
        return [entity for entities in self.entities.values() for entity in entities]

    def values(self, relation: str) -> tuple[str, ...]:
        """All possible values of a relation."""
        own = _VALUES_OF.get(relation, relation)
        return VALUES[own] if own in VALUES else tuple(self.names(own))


def _entity(rng: Random, kind: str, name: str, values: Mapping[str, tuple[str, ...]]) -> Entity:
    facts = {relation: rng.choice(values[_VALUES_OF.get(relation, relation)]) for relation in _RELATIONS[kind]}
    pronoun = rng.choice(("she", "he")) if kind == "person" else "it"
    return Entity(name, kind, pronoun, facts)


def _names(rng: Random, kind: str) -> list[str]:
    """Different invented names, each a beginning and an end, in random order."""
    beginnings, ends = (part.split() for part in _SYLLABLES[kind])
    names = rng.sample([beginning + end for beginning in beginnings for end in ends], COUNTS[kind])
    return [_ARTICLES.get(kind, "") + name for name in names]
