"""The world: some two hundred entities of six kinds, and the facts about them, all drawn from one seed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random

from bridle.quickstart.grammar import coin


@dataclass(frozen=True)
class Entity:
    """Something that has a name.

    Attributes:
        name: with its article, as it stands within a sentence.
        kind: town, person, beast, dish, festival or river.
        pronoun: that stands for it at the head of a sentence.
        facts: by relation; each value as it stands within a sentence.
    """

    name: str
    kind: str
    pronoun: str
    facts: Mapping[str, str]


@dataclass(frozen=True)
class Trade:
    """What people do for a living, and what everybody knows about it."""

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
"""By relation the values that a fact can have; towns, rivers, dishes and festivals are values as well."""

COUNTS = {"town": 36, "person": 48, "beast": 32, "dish": 28, "festival": 24, "river": 24}

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
    """Every entity, by kind.

    Attributes:
        seed: that it was drawn from.
        entities: by kind.
    """

    seed: int
    entities: Mapping[str, list[Entity]] = field(repr=False)

    @classmethod
    def of(cls, seed: int) -> "World":
        """The world of a seed."""
        rng = Random(f"world {seed}")
        names = _names(rng)
        values = VALUES | {kind: tuple(named) for kind, named in names.items()}
        return cls(seed, {kind: [_entity(rng, kind, name, values) for name in names[kind]] for kind in COUNTS})

    def names(self, kind: str) -> list[str]:
        """The names of one kind."""
        return [entity.name for entity in self.entities[kind]]

    def all(self) -> list[Entity]:
        """All entities, kind by kind."""
        return [entity for entities in self.entities.values() for entity in entities]

    def values(self, relation: str) -> tuple[str, ...]:
        """Everything that could be the value of a relation."""
        own = _VALUES_OF.get(relation, relation)
        return VALUES[own] if own in VALUES else tuple(self.names(own))


def _entity(rng: Random, kind: str, name: str, values: Mapping[str, tuple[str, ...]]) -> Entity:
    facts = {relation: rng.choice(values[_VALUES_OF.get(relation, relation)]) for relation in _RELATIONS[kind]}
    pronoun = rng.choice(("she", "he")) if kind == "person" else "it"
    return Entity(name, kind, pronoun, facts)


def _names(rng: Random) -> dict[str, list[str]]:
    towns = coin(
        rng,
        ("Brel", "Tavo", "Osk", "Vard", "Lomm", "Drus", "Pell", "Sket", "Garr", "Hul", "Imber", "Nars"),
        ("mere", "wick", "holt", "garth", "sund", "bray"),
        COUNTS["town"],
    )
    people = coin(
        rng,
        ("An", "Be", "Cor", "Dov", "El", "Fen", "Gis", "Hed", "Jor", "Mir", "Ott", "Rul"),
        ("dis", "ric", "la", "mund", "wen", "bert"),
        COUNTS["person"],
    )
    beasts = coin(
        rng,
        ("grel", "ven", "tus", "mar", "fip", "ood", "bal", "snur"),
        ("low", "nok", "kin", "del", "pet"),
        COUNTS["beast"],
    )
    dishes = coin(
        rng,
        ("sour", "hod", "pan", "crum", "brin", "dump", "fry"),
        ("dle", "bake", "gruel", "mash", "sop"),
        COUNTS["dish"],
    )
    festivals = coin(
        rng,
        ("Lantern", "Goose", "Kettle", "Thistle", "Mirror", "Bell"),
        ("tide", "mas", "fair", "wake", "eve"),
        COUNTS["festival"],
    )
    rivers = coin(rng, ("Sar", "Il", "Wen", "Tok", "Ruv", "Ost"), ("na", "be", "dle", "mar", "isk"), COUNTS["river"])
    with_article = {"beast": beasts, "dish": dishes, "river": rivers}
    return {"town": towns, "person": people, "festival": festivals} | {
        kind: [f"the {name}" for name in named] for kind, named in with_article.items()
    }
