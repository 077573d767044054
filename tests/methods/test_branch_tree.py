"""The branch tree: nested partitions, drawing, plotting, and back from a dict."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libmtl_fair.errors import HostError
from libmtl_fair.functional import pair_by_similarity
from libmtl_fair.methods.fairbranch.tree import BranchTree


@st.composite
def trees(draw: st.DrawFn) -> BranchTree:
    """A tree after any number of events, with binary merges drawn at random."""
    import torch

    tree = BranchTree.start([f"t{i}" for i in range(draw(st.integers(1, 7)))], draw(st.integers(1, 4)))
    for _ in range(draw(st.integers(0, 4))):
        n = len(tree.groups)
        if tree.depth == 0 or n < 2:
            break
        values = torch.tensor(draw(st.lists(st.floats(0, 1), min_size=n * n, max_size=n * n))).view(n, n)
        tree = tree.branch(pair_by_similarity(values, draw(st.floats(0.1, 1))))
    return tree


@given(trees())
def test_every_level_is_a_partition_nested_in_the_one_below(tree: BranchTree) -> None:
    for level, groups in enumerate(tree.levels):
        assert sorted(t for group in groups for t in group) == sorted(tree.tasks)
        for index, group in enumerate(groups):
            if level:
                assert set(group) <= set(tree.levels[level - 1][tree.parents[level][index]])
    assert all(len(tree.levels[level]) == 1 for level in range(tree.depth))
    assert all(
        len(group) <= 2 ** (tree.n_blocks - level)
        for level, g in enumerate(tree.levels)
        if level >= tree.depth
        for group in g
    )


@given(trees())
def test_a_dict_rebuilds_it_through_json(tree: BranchTree) -> None:
    assert BranchTree.from_dict(json.loads(json.dumps(tree.to_dict()))) == tree


@given(trees())
def test_branches_name_each_copy_above_the_trunk_once(tree: BranchTree) -> None:
    places = [place for group in tree.branches().values() for place in group]
    assert sorted(places) == [(lv, i) for lv in range(tree.depth, tree.n_blocks) for i in range(len(tree.levels[lv]))]
    for task in tree.tasks:
        assert all(task in tree.levels[level][index] for level, index in enumerate(tree.path(task)))


@given(trees())
def test_drawing_names_every_copy_and_task(tree: BranchTree) -> None:
    text = str(tree)
    copies = sum(len(level) for level in tree.levels[tree.depth :])
    assert text.count("block ") == copies + (tree.depth == 1)
    if tree.depth < tree.n_blocks:
        assert all(task in text for task in tree.tasks)


def test_drawing() -> None:
    tree = BranchTree.start("abcd", 3)
    assert str(tree) == "blocks 1-3: all tasks (not branched)"
    tree = tree.branch([(0, 2), (1,), (3,)]).branch([(0, 1), (2,)])
    assert str(tree).splitlines() == [
        "block 1: all tasks",
        "├─ block 2: a, b, c",
        "│  ├─ block 3: a, c",
        "│  └─ block 3: b",
        "└─ block 2: d",
        "   └─ block 3: d",
    ]
    assert str(tree.branch([(0,), (1,)])).splitlines()[0] == "input"
    assert tree.n_branches == 3


def test_plot_is_a_figure_with_a_box_a_copy_and_a_task() -> None:
    tree = BranchTree.start("abc", 2).branch([(0, 2), (1,)])
    figure = tree.plot()
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert sorted(texts) == ["a", "b", "block 1", "block 2", "block 2", "c"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ["a", "a"]}, "distinct tasks"),
        ({"depth": 3}, "depth must be in 0..2"),
        ({"levels": [[["a", "b"]], [["a"]]]}, "block 2 must hold every task once"),
        ({"levels": [[["a"], ["b"]], [["a", "b"]]], "depth": 0}, "not within those below"),
        ({"levels": [[["a"], ["b"]], [["a"], ["b"]]], "depth": 1}, "belongs to the trunk, but has 2 copies"),
    ],
)
def test_dicts_that_are_no_tree(change: dict[str, object], message: str) -> None:
    good = {"tasks": ["a", "b"], "levels": [[["a", "b"]], [["a"], ["b"]]], "depth": 1}
    BranchTree.from_dict(good)
    with pytest.raises(HostError, match=message):
        BranchTree.from_dict({**good, **change})
    with pytest.raises(HostError, match="'depth' is missing"):
        BranchTree.from_dict({k: v for k, v in good.items() if k != "depth"})


def test_events_that_do_not_fit() -> None:
    tree = BranchTree.start("ab", 1)
    with pytest.raises(HostError, match="must name each of 2 groups once"):
        tree.branch([(0,)])
    with pytest.raises(HostError, match="every block has been branched"):
        tree.branch([(0,), (1,)]).branch([(0,), (1,)])
