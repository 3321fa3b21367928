import pytest

from bridle.constraints import Length, Regex, WordList
from bridle.errors import UserError


def complies(constraint, *texts):
    return [score.complies for score in constraint.score(None, texts)]


def test_regex_complies_where_nothing_matches():
    scores = Regex(r"(?i)grumble\w*").score(None, ["You Grumblefish!", "A fine day.", ""])
    assert [s.value for s in scores] == [0.0, 1.0, 1.0]
    assert [s.complies for s in scores] == [False, True, True]


@pytest.mark.parametrize("pattern", ["(", "a{2,1}", "[z-a]", "a{99999999999999999999}", ""])
def test_a_bad_pattern_is_reported_in_one_line(pattern):
    with pytest.raises(UserError, match="'regex'") as error:
        Regex(pattern)
    assert "\n" not in str(error.value)


def test_only_whole_words_are_found():
    words = WordList(["grumble", "noodle head", "c++"])
    assert complies(words, "a grumblefish", "outgrumble", "grumble_bee", "grumble2") == [True] * 4
    assert complies(words, "Grumble.", "(GRUMBLE)", "grumble-bee", "grumble") == [False] * 4
    assert complies(words, "noodle  \n head!", "noodle, head", "noodle heads") == [False, True, True]
    assert complies(words, "I like C++ too", "I like C too") == [False, True]


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("straße", "DIE STRASSE"),
        ("STRASSE", "die Straße"),
        ("né", "NE\u0301"),  # composed and decomposed
        ("grumble", "\uff27\uff32\uff35\uff2d\uff22\uff2c\uff25"),  # full width
        ("ворчун", "Какой ВОРЧУН!"),
        ("ΟΔΟΣ", "οδος"),  # two small sigmas
    ],
)
def test_words_are_found_in_any_unicode_form(word, text):
    assert complies(WordList([word]), text) == [False]


def test_a_combining_mark_belongs_to_its_word():
    assert complies(WordList(["क"]), "कि", "क") == [True, False]


def test_the_longer_of_two_phrases_is_still_found():
    assert complies(WordList(["foo", "foos ball"]), "a foos ball") == [False]


def test_words_from_a_file(tmp_path):
    file = tmp_path / "mild.txt"
    file.write_text("# mild ones\n\ngrumblefish  # a fish\n  noodle head\nc#\n", encoding="utf-8-sig")
    words = WordList(file=file)
    assert words.words == ["grumblefish", "noodle head", "c#"]
    assert words.name == "mild.txt"
    assert complies(words, "You grumblefish", "noodle head", "a fish", "mild ones") == [
        False,
        False,
        True,
        True,
    ]


def test_words_from_any_iterable_but_a_string():
    assert sorted(WordList({"a", "b"}).words) == ["a", "b"]
    assert WordList(word for word in ("a", "b")).words == ["a", "b"]
    with pytest.raises(UserError, match="'words', key 'words'"):
        WordList("grumblefish")


def test_a_missing_or_empty_word_list_names_the_file(tmp_path):
    with pytest.raises(UserError, match=r"no\.txt: No such file"):
        WordList(file=tmp_path / "no.txt")
    with pytest.raises(UserError, match="Is a directory"):
        WordList(file=tmp_path)
    for name, content in {"empty.txt": b"", "comments.txt": b"# nothing\n \n"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name} holds no word"):
            WordList(file=tmp_path / name)
    (tmp_path / "latin.txt").write_bytes("né".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.txt: 'utf-8' codec can't decode"):
        WordList(file=tmp_path / "latin.txt")


@pytest.mark.parametrize("arguments", [{}, {"words": ["a"], "file": "b.txt"}])
def test_a_word_list_has_one_source(arguments):
    with pytest.raises(UserError, match="exactly one of"):
        WordList(**arguments)


def test_a_list_of_blanks_holds_no_word():
    with pytest.raises(UserError, match="holds no word"):
        WordList([" ", ""])


def test_a_pattern_that_backtracks_without_end_is_given_up():
    texts = ["kettle", "a" * 40 + "!", "aaa"]
    scores = Regex("^(a|aa)+$", timeout=0.3).score(None, texts)
    assert [score.complies for score in scores] == [True, None, False]
    assert scores[1].reason == "timed out: 0.3 s are over for its batch"


def test_length_counts_words():
    texts = ["", "?!", "One, two.", "One two three", "snake_case कि né", "a b c d e"]
    assert complies(Length(min_words=3), *texts) == [False, False, False, True, True, True]
    assert complies(Length(max_words=3), *texts) == [True, True, True, True, True, False]
    assert complies(Length(min_words=1, max_words=2), *texts) == [False, False, True, False, False, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs 'min_words'"),
        ({"min_words": 3, "max_words": 2}, "max_words 2 is less than min_words 3"),
        ({"min_words": -1}, "'min_words'"),
    ],
)
def test_bounds_on_the_length_that_make_no_sense(options, message):
    with pytest.raises(UserError, match=message):
        Length(**options)
