"""A drafter named with options: any text can be a value, what is written is read back, and everything else is refused."""

from __future__ import annotations

import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.drafters import format_drafter, make_drafter, parse_drafter, tuned_file
from specdec.drafters.training.card import usage
from specdec.interfaces import DraftContext
from specdec.verifiers import make_verifier

TEXTS = st.one_of(st.text(), st.text(alphabet=""",="'\\: \n0e1xé"""))
VALUES = st.one_of(TEXTS, st.integers(), st.booleans(), st.none(), st.floats(allow_nan=False, allow_infinity=False))
KEYS = st.from_regex(r"[a-z_]+(\.[a-z_]+)?", fullmatch=True)


def context(**options: Any) -> DraftContext:
    return DraftContext(SimpleNamespace(vocab_size=50), make_verifier("match"), (), options)  # type: ignore[arg-type]


@pytest.mark.slow
@given(st.dictionaries(KEYS, VALUES, max_size=4))
@settings(deadline=None, derandomize=True)
def test_what_is_written_is_read_back(options: dict[str, Any]) -> None:
    """The type too: a folder called 2024 is no number."""
    name, read = parse_drafter(format_drafter("eagle", options))
    assert (name, read) == ("eagle", options)
    assert [type(value) for value in read.values()] == [type(value) for value in options.values()]


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("eagle", {}),
        ("eagle:", {}),
        ("eagle:path=a/b,num_tokens=6", {"path": "a/b", "num_tokens": 6}),
        ('eagle:path="a,b",num_tokens=6', {"path": "a,b", "num_tokens": 6}),
        ("eagle:path='a,b'", {"path": "a,b"}),
        ('eagle:path=o\'brien/"x"', {"path": 'o\'brien/"x"'}),
        (r'eagle:path="say \"a,b\""', {"path": 'say "a,b"'}),
        ('eagle: path = "a,b" , top_k = 3 ', {"path": "a,b", "top_k": 3}),
        ('eagle:path="7",top_k=7', {"path": "7", "top_k": 7}),
        ("eagle:shape=3x2x1,path=a=b", {"shape": "3x2x1", "path": "a=b"}),
        ('hybrid:parts=ngram+eagle,eagle.path="a,b"', {"parts": "ngram+eagle", "eagle.path": "a,b"}),
        ("model:min_confidence=0.5,children=None", {"min_confidence": 0.5, "children": None}),
    ],
)
def test_values_are_literals_or_text_and_quotes_hold_commas(text: str, options: dict[str, Any]) -> None:
    assert parse_drafter(text)[1] == options


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ("eagle:path", "path"),
        ("eagle:=3", "=3"),
        ("eagle:top_k=3,,path=a", ",path=a"),
        ("eagle:path=a,b", "b"),
        ('eagle:path="a,b', 'path="a,b'),
        ('eagle:path="a,b"c', 'path="a,b"c'),
    ],
)
def test_other_forms_are_refused_with_the_rule_of_quoting(text: str, got: str) -> None:
    with pytest.raises(ValueError, match=r'values with a comma in quotes \(path="a,b"\)') as caught:
        parse_drafter(text)
    assert f"got {got!r} in " in str(caught.value)


def test_an_option_given_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="option top_k appears twice"):
        parse_drafter("eagle:top_k=3,path=a,top_k=4")


def test_a_part_of_a_hybrid_gets_its_value_as_it_was_written(tmp_path: Path) -> None:
    """Guards against options that are written as text and read again on the way to a part."""
    folder = tmp_path / "a,b's"
    folder.mkdir()
    for path in (folder / "table", folder / "7"):
        spec = format_drafter("hybrid", {"parts": "ngram+recycling", "recycling.path": str(path)})
        assert make_drafter(spec, context()).parts[1].path == path  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="no drafter is called 'nonesuch'"):
        make_drafter("hybrid:parts=ngram+nonesuch", context())


@pytest.mark.parametrize(
    ("text", "is_file"),
    [
        ("tuned.json", True),
        ("TUNED.JSON", True),
        ("here/tuned.json", True),
        ("C:\\runs\\tuned.json", True),
        ("C:/runs/a=b.json", True),
        ("dir:with/colon.json", True),
        ("some/dir:with=equals.json", True),
        ("existing", True),
        ("ngram", False),  # although a file of that name exists
        ("model:shape=my.json", False),
        ("model:shape=C:/my.json", False),
        ("hybrid:parts=ngram+model,model.shape=my.json", False),
        ("eagle:path=heads,shape=best.json", False),
        ("modle:shape=my.json", False),
        ("nonesuch", False),
        ("", False),
    ],
)
def test_a_text_is_a_drafter_before_it_is_a_tuned_file(
    text: str, is_file: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards drafters whose last option is a file, and files whose names hold a colon."""
    monkeypatch.chdir(tmp_path)
    for name in ("existing", "ngram"):
        Path(name).touch()
    assert tuned_file(text) == (Path(text) if is_file else None)
    assert tuned_file(Path(text)) == Path(text)


def test_a_tuned_file_in_the_place_of_a_name_is_pointed_out() -> None:
    with pytest.raises(ValueError, match=r"no drafter is called 'tuned\.json'.*--config"):
        parse_drafter("tuned.json")


@pytest.mark.parametrize("folder", ["my-eagle", "a,b", "with space", 'o\'brien, "x"', "2024"])
def test_the_hint_after_training_is_one_for_a_shell(folder: str) -> None:
    option, spec = shlex.split(usage("eagle", Path(folder)))
    assert (option, parse_drafter(spec)) == ("--drafter", ("eagle", {"path": folder}))
    assert shlex.split(usage("draft", Path(folder))) == ["--drafter", "model", "--drafter-model", folder]
