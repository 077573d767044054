"""Loaders that do not say how long they are: trained with, or refused in words that say what to give."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from torch.utils.data import DataLoader, IterableDataset

import libmtl_fair as lf
from libmtl_fair.errors import DataError, HostError, RecipeError

FAIR = {"target": "eo <= 30%", "min_count": 1}


class Endless(IterableDataset[Any]):
    """Rows without an end; the groups are declared."""

    n_groups: ClassVar = {"sex": 2, "race": 3}

    def __init__(self, kit: SimpleNamespace) -> None:
        self.rows = kit.data()

    def __iter__(self) -> Iterator[Any]:
        x, labels, groups = self.rows
        for i in itertools.cycle(range(len(x))):
            ids = {name: each[i] for name, each in groups.items()}
            yield x[i], {**{t: y[i] for t, y in labels.items()}, "sensitive": ids}


def stream(kit: SimpleNamespace) -> DataLoader[Any]:
    return DataLoader(Endless(kit), batch_size=24)


def once(kit: SimpleNamespace, passes: int = 1) -> Iterator[Any]:
    """Yield the batches of some passes, as a generator does."""
    for _ in range(passes):
        yield from DataLoader(lf.data.TableDataset(*kit.data()), batch_size=24)


@pytest.mark.parametrize(("weighting", "args"), [("EW", {}), ("FairMT", FAIR), ("ReLiF", {"pairs": "random", "k": 4})])
def test_an_endless_stream_trains_what_a_loader_of_that_length_trains(
    kit: SimpleNamespace, weighting: str, args: dict[str, Any]
) -> None:
    found = []
    sized = DataLoader(lf.data.TableDataset(*kit.data()), batch_size=24)
    tasks = kit.tasks[:2] if weighting == "ReLiF" else kit.tasks
    for loader, steps in ((sized, None), (sized, 4), (stream(kit), 4), (once(kit, 9), 4)):
        trainer = kit.trainer(weighting, tasks=tasks, weight_args=args, n_groups={"sex": 2, "race": 3})
        trainer.train(loader, epochs=3, steps_per_epoch=steps)
        assert trainer.history.groupby("epoch").size().tolist() == [4, 4, 4]
        found.append(kit.parameters(trainer))
    for each in found[1:]:
        kit.assert_same(found[0], each)


def test_fairmt_in_one_epoch_of_a_stream(kit: SimpleNamespace) -> None:
    with pytest.raises(HostError, match="give train\\(steps_per_epoch="):
        kit.trainer("FairMT", weight_args=FAIR, n_groups={"sex": 2, "race": 3}).train(once(kit), epochs=1)
    trainer = kit.trainer("FairMT", weight_args=FAIR)
    trainer.train(stream(kit), epochs=1, steps_per_epoch=12)
    assert trainer.n_groups == {"sex": 2, "race": 3}  # as the data set says
    assert len(trainer.history) == 12


def test_a_stream_for_each_task(kit: SimpleNamespace) -> None:
    trainer = kit.trainer("EW", multi_input=True)
    loaders = {"a": kit.loader(), "b": stream(kit), "c": once(kit)}
    with pytest.raises(DataError, match="multi_input=True with 3 loaders needs.*steps_per_epoch"):
        trainer.train(loaders, epochs=1)
    trainer.train(loaders, epochs=1, steps_per_epoch=4)
    assert len(trainer.history) == 4


def test_what_cannot_be_trained_is_said_in_words(kit: SimpleNamespace) -> None:
    trainer = kit.trainer("EW")
    with pytest.raises(
        DataError, match="an iterator, which gives its batches once, and there are 2 epochs.*steps_per_epoch"
    ):
        trainer.train(once(kit), epochs=2)
    with pytest.raises(DataError, match="the validation loader is an iterator"):
        trainer.train(kit.loader(), epochs=2, val_dataloaders=once(kit))
    with pytest.raises(RecipeError, match="steps_per_epoch must be a whole number of at least 1"):
        trainer.train(kit.loader(), epochs=1, steps_per_epoch=0)
    with pytest.raises(DataError, match="a loader without a length does not say how many.*n_groups="):
        kit.trainer("GroupRegulariser").train(once(kit), epochs=1)
    with pytest.raises(DataError, match="a training loader has no batch.*an iterator at its end"):
        trainer.train(once(kit), epochs=3, steps_per_epoch=3)
    with pytest.raises(DataError, match="no batch for task 'a'; nothing to evaluate"):
        trainer.test(iter([]))
