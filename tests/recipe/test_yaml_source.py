from __future__ import annotations

import pytest

from libmtl_fair.errors import RecipeError
from libmtl_fair.recipe.yaml_source import MAX_BYTES, parse_yaml, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E5", 100000.0),
        (".5", 0.5),
        ("-1.", -1.0),
        ("1.0e-5", 1e-5),
        ("010", 10),
        ("-7", -7),
        ("0x1F", 31),
        ("0o17", 15),
        ("1_000", 1000),
        ("yes", "yes"),
        ("no", "no"),
        ("NO", "NO"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("null", None),
        ("", None),
        ("'1'", "1"),
        ('"true"', "true"),
        ("2024-01-01", "2024-01-01"),
        ("12:30:00", "12:30:00"),
        ("!!str 3", "3"),
        ("conformal:0.1", "conformal:0.1"),
        ("[1, 2.5, [a]]", [1, 2.5, ["a"]]),
        ("{a: 1}", {"a": 1}),
        ('"\\ud83d\\ude00 \\u00e9"', "😀 é"),
    ],
)
def test_scalars_follow_yaml_1_2(text, value):
    found = parse_yaml(f"a: {text}\n").data["a"]
    assert found == value
    assert type(found) is type(value)


def test_lines_of_keys_and_items():
    source = parse_yaml("a:\n  b: 1\n  c:\n    - x\n    - y: 2\n# note\nd: 3\n")
    assert source.lines == {
        (): 1,
        ("a",): 1,
        ("a", "b"): 2,
        ("a", "c"): 3,
        ("a", "c", 0): 4,
        ("a", "c", 1): 5,
        ("a", "c", 1, "y"): 5,
        ("d",): 7,
    }
    assert source.where(("a", "c", 1, "missing")) == "recipe:5"


def test_anchors_and_merge_keys():
    source = parse_yaml("base: &b {x: 1, y: {z: 2}}\nuse:\n  <<: *b\n  x: 5\nlist: [*b]\n")
    assert source.data["use"] == {"x": 5, "y": {"z": 2}}
    assert source.data["list"] == [{"x": 1, "y": {"z": 2}}]
    assert source.lines[("use", "x")] == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: [1, 2\nc: 3", r"recipe:\d: not valid YAML: expected ',' or '\]'"),
        ("a: 1\n\tb: 2", r"recipe:2: not valid YAML"),
        ("a: 1\nb: 2\na: 3", r"recipe:3: duplicate key 'a'; first given on line 1"),
        ("a: !!python/object:os.system x", r"recipe:1: expected plain data, found the tag .*cannot name types"),
        ("a: !!python/object/apply:os.system [x]", r"recipe:1: expected plain data, found the tag"),
        ("a: !x {b: 1}", r"found the tag '!x'"),
        ("!x a: 1", r"found the tag '!x'"),
        ("a: .nan", r"recipe:1: expected a finite number .*found \.nan"),
        ("a: -.inf", r"expected a finite number"),
        ("a: 1e999", r"expected a finite number"),
        ("a: " + "9" * 5000, r"expected a finite number of at most 30 digits"),
        ("a: *b", r"recipe:1: unknown alias '\*b'"),
        ("a: &b [*b]", r"alias '\*b' stands inside its own anchor"),
        ("a: 1\n---\nb: 2", r"recipe:2: expected one YAML document, found a second"),
        ("[a, b]: 1", r"expected a name as key"),
        ("<<: 3", r"expected a mapping after '<<'"),
        ("", r"recipe:1: the file is empty"),
        ("# only a comment\n", r"recipe:1: the file is empty"),
        ("---\n...\n", r"the file is empty"),
        ("[" * 10_000, r"nested deeper than 24 levels"),
        ("- " * 200 + "x", r"nested deeper than 24 levels"),
        ('a: "\\ud800"', r"recipe:1: expected Unicode text, found half of a surrogate pair"),
        ("a: \x00", r"recipe:\d: not valid YAML"),
    ],
)
def test_bad_yaml_says_file_line_and_reason(text, message):
    with pytest.raises(RecipeError, match=message):
        parse_yaml(text)


def test_alias_bomb_is_refused_without_expanding_it():
    lines = ["l0: &l0 [a, a, a, a, a, a, a, a, a, a]"]
    lines += [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]" for i in range(1, 12)]
    with pytest.raises(RecipeError, match=r"recipe:\d+: expected at most 20,000 values, found more"):
        parse_yaml("\n".join(lines))


def test_merge_bomb_is_refused_without_expanding_it():
    lines = ["l0: &l0 {}"] + [f"l{i}: &l{i} {{<<: *l{i - 1}, <<: *l{i - 1}}}" for i in range(1, 60)]
    with pytest.raises(RecipeError, match=r"recipe:\d+: expected at most 20,000 values, found more"):
        parse_yaml("\n".join(lines))


def test_files_that_cannot_be_read(tmp_path, write):
    with pytest.raises(RecipeError, match=r"none\.yaml: no such file; expected a recipe in YAML"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="cannot be read"):
        read_yaml(tmp_path)
    with pytest.raises(RecipeError, match=r"small\.yaml:2: expected UTF-8 text, found byte 0xff"):
        read_yaml(write(b"a: 1\nb: \xff"))
    with pytest.raises(RecipeError, match="expected a recipe of at most"):
        read_yaml(write("#" * (MAX_BYTES + 1)))


def test_byte_order_mark_and_windows_line_ends(write):
    source = read_yaml(write(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n"))
    assert source.data == {"a": 1, "b": 2}
    assert source.lines[("b",)] == 2
