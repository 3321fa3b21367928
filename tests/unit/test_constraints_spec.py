import json
import re

import pytest

from bridle.constraints import (
    AllOf,
    AnyOf,
    Cached,
    Classifier,
    Constraint,
    Length,
    Not,
    PythonFunction,
    Regex,
    WordList,
    build_constraint,
)
from bridle.constraints.spec import TYPES, trained_on
from bridle.errors import UserError
from bridle.recipes.recipe import build_recipe
from bridle.utils.settings import parse_yaml
from conftest import ROOT

CLASSIFIER = {"type": "classifier", "model": "some/folder,odd", "label": "toxic, very", "threshold": 0.25}


def test_the_short_form_and_the_mapping_say_the_same():
    short = build_constraint("classifier:some/folder,odd,label=toxic, very,threshold=0.25,batch_size=8")
    assert isinstance(short, Classifier)
    assert short.batch_size == 8
    assert short.describe() == build_constraint(CLASSIFIER).describe()


def test_every_type_has_a_short_form(tmp_path):
    (tmp_path / "mild.txt").write_text("grumblefish\n")
    words = build_constraint(f"words:{tmp_path / 'mild.txt'},name=mild")
    assert isinstance(words, WordList)
    assert words.name == "mild"
    assert [s.complies for s in words.score(None, ["a grumblefish", "a fish"])] == [False, True]
    regex = build_constraint("regex:a{1,2}:b,name=c")
    assert isinstance(regex, Regex)
    assert regex.pattern == "a{1,2}:b,name=c"
    length = build_constraint("length:3,max_words=5")
    assert isinstance(length, Length)
    assert (length.min_words, length.max_words) == (3, 5)
    function = build_constraint("python:my.module:Judge.score")
    assert isinstance(function, PythonFunction)
    assert function.function == "my.module:Judge.score"


def test_a_string_in_braces_is_yaml():
    constraint = build_constraint(" {any: [{type: words, words: [fish]}, {not: 'regex:bird'}], name: pets}")
    assert isinstance(constraint, AnyOf)
    assert isinstance(constraint.parts[1], Not)
    assert constraint.name == "pets"
    assert [s.complies for s in constraint.score(None, ["fish", "fish and bird", "none"])] == [False, True, True]


def test_a_list_means_all_of_them():
    constraint = build_constraint(["regex:fish", {"type": "regex", "pattern": "bird"}])
    assert isinstance(constraint, AllOf)
    assert [s.complies for s in constraint.score(None, ["cat", "fish", "bird"])] == [True, False, False]


def test_a_name_replaces_the_specifications_own():
    assert build_constraint({**CLASSIFIER, "name": "theirs"}).name == "theirs"
    assert build_constraint({**CLASSIFIER, "name": "theirs"}, name="ours").name == "ours"
    assert build_constraint("regex:fish").name == "regex:fish"


@pytest.mark.parametrize(
    "spec",
    [
        CLASSIFIER,
        {"type": "words", "words": ["fish", "noodle head"]},
        "regex:fish",
        "length:3",
        {"type": "length", "max_words": 5},
        "python:module:function",
        {"all": ["regex:a", {"any": ["regex:b", {"not": "regex:c"}]}], "name": "three"},
    ],
)
def test_a_description_is_json_that_builds_the_same_again(spec):
    described = json.loads(json.dumps(build_constraint(spec).describe()))
    again = build_constraint(described)
    assert isinstance(again, Constraint)
    assert again.describe() == described


def test_a_word_file_is_described_by_its_path(tmp_path):
    file = tmp_path / "mild.txt"
    file.write_text("grumblefish\n")
    assert build_constraint(f"words:{file}").describe() == {
        "type": "words",
        "file": str(file),
        "name": "mild.txt",
    }


def test_the_examples_of_the_page_are_constraints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mild.txt").write_text("grumblefish")
    page = (ROOT / "docs" / "constraints.md").read_text(encoding="utf-8")
    recipe, *examples = (parse_yaml(block, "page") for block in re.findall(r"```yaml[^\n]*\n(.*?)```", page, re.DOTALL))
    assert build_recipe(recipe).constraints["polite"].score(None, ["you grumblefish"])[0].complies is False
    built = {name: build_constraint(spec, name) for example in examples for name, spec in example.items()}
    assert len(built) > 12
    assert {type(constraint) for constraint in built.values()} >= {*TYPES.values(), AllOf, AnyOf, Not, Cached}
    assert not list(tmp_path.glob("*sqlite*")), "nothing is made before it is needed"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("toxicity", "write TYPE:VALUE"),
        ("clasifier:folder,label=toxic", "there is no type 'clasifier'; did you mean classifier"),
        ("classifier:folder,lable=toxic", "there is no key 'lable'; did you mean label"),
        ("classifier:folder", "'classifier', key 'label': missing"),
        ({"type": "words", "file": ""}, "cannot read the file"),
        ("classifier:folder,label=toxic,threshold=2", "key 'threshold'.*given: '2'"),
        ("classifier:folder,label=toxic,threshold=high", "key 'threshold'.*given: 'high'"),
        ("classifier:folder,label=toxic,batch_size=0", "key 'batch_size'"),
        ("classifier:folder,label=toxic,max_length=0", "key 'max_length'"),
        ("classifier:folder,label=toxic,means=bad", "key 'means'.*'violates' or 'complies'"),
        ("words:", "write TYPE:VALUE"),
        ({"type": "regex", "pattern": ""}, "'regex', key 'pattern'"),
        ("{type: regex, pattern: [", "not valid YAML"),
        ({"type": "regexp", "pattern": "a"}, "there is no type 'regexp'; did you mean regex"),
        ({"type": ["regex"], "pattern": "a"}, "there is no type"),
        ({"type": None}, "there is no type 'None'"),
        ({"type": "regex", "patern": "a"}, "there is no key 'patern'; did you mean pattern"),
        ({"type": "regex", "pattern": "a", 3: 4}, "there is no key '3'"),
        ({"type": "regex", "pattern": 3}, "key 'pattern'.*given: 3"),
        ({"type": "words", "words": "fish"}, "'words', key 'words'"),
        ({"type": "words", "words": [True]}, "'words', key 'words'"),
        ({"typ": "regex"}, "exactly one of the keys type, all, any, not"),
        ({"all": [], "any": []}, "exactly one of the keys"),
        ({"type": "regex", "not": "regex:a"}, "exactly one of the keys"),
        ({"all": []}, "'all', key 'parts'"),
        ({"all": "regex:a"}, "'all': needs a list"),
        ({"any": ["regex:a"], "nmae": "x"}, "'any': there is no key 'nmae'; did you mean name"),
        ({"not": "regex:a", "name": 3}, "'not', key 'name'"),
        ({"all": ["regex:a", 7]}, "constraint 7: is not a mapping"),
        (None, "constraint None: is not a mapping"),
    ],
)
def test_a_mistake_is_reported_in_one_line(spec, message):
    with pytest.raises(UserError, match=message) as error:
        build_constraint(spec)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spec", "independent"),
    [
        ("classifier:other,label=toxic", True),
        ({**CLASSIFIER, "model": "other"}, True),
        ({"all": ["regex:fish", {"not": "regex:cat"}]}, True),
        (["classifier:other,label=toxic", "length:3"], True),  # a length is no oracle
        (CLASSIFIER, False),
        ({**CLASSIFIER, "threshold": 0.75, "label": "rude", "cache": "file"}, False),  # the same model
        ("classifier:some/folder,odd,label=x", False),
        ({"any": ["regex:fish", {"not": CLASSIFIER}]}, False),
        (["regex:fish", "regex:dog"], False),
    ],
)
def test_what_shares_no_oracle_with_training_is_independent(spec, independent):
    recipe = {
        "constraints": {
            "judge": spec,
            "part": "regex:dog",
            "own": {"all": [CLASSIFIER, "regex:dog", "length:3"]},
            "spare": "regex:a",
        },
        "regularisers": {"rude": {"constraint": "own"}, "plain": {"constraint": "retention"}},
    }
    assert trained_on(recipe) == ["own", *([] if independent else ["judge"]), "part"]
    assert trained_on({**recipe, "regularisers": None}) == []


def test_the_oracles_of_the_first_of_several_policies_come_first():
    """The first that is measured stands beside the independent constraint as its training oracle."""
    recipe = {
        "constraints": {
            "brief": "length:max_words=3",
            "kind": "words:a.txt",
            "both": ["words:a.txt", "length:min_words=3"],
        },
        "regularisers": {"first": {"constraint": "both"}, "second": {"constraint": "brief"}},
    }
    assert trained_on(recipe) == ["both", "kind", "brief"]
