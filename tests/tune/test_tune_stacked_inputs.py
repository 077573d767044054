from __future__ import annotations

import pytest
import torch

from libmtl_fair.tune.stacked.layers import Dense, Inputs, Layer, Room, Sparse

N, F = 40, 20


def table(entries: int, generator: torch.Generator) -> torch.Tensor:
    """Features [N, F] of which a row has 0 to ``entries``."""
    x = torch.zeros((N, F), dtype=torch.float64)
    for i in range(N):
        places = torch.randperm(F, generator=generator)[: i % (entries + 1)]
        x[i, places] = torch.randn(len(places), generator=generator, dtype=torch.float64)
    return x


def layer(members: int, width: int, generator: torch.Generator) -> Layer:
    """A layer in the memory that a stack gives it: a stretch of each row of one matrix, the longer side last."""
    flat = torch.randn((members, 7 + F * width + width), generator=generator, dtype=torch.float64)
    weight, bias = flat[:, 7 : 7 + F * width], flat[:, 7 + F * width :]
    shaped = weight.view(members, F, width) if width > F else weight.view(members, width, F).mT
    return Layer(shaped, bias.view(members, 1, width))


@pytest.mark.parametrize("width", [3, 30])
@pytest.mark.parametrize("members", [1, 4])
@pytest.mark.parametrize("entries", [0, 2])
def test_few_entries_give_the_outputs_and_gradients_of_all_features(entries, members, width):
    generator = torch.Generator().manual_seed(entries + members + width)
    x, room = table(entries, generator), Room()
    inputs = Inputs(x)
    for batch_size in (16, 5, 16):
        rows = torch.randint(N, (members, batch_size), generator=generator)
        weights, grads, want = (layer(members, width, generator) for _ in range(3))
        gradient = torch.randn((members, batch_size, width), generator=generator, dtype=torch.float64)
        found, dense = inputs.take(rows, room), Dense(x[rows])
        assert isinstance(found, Sparse)
        torch.testing.assert_close(found.forward(weights, room), x[rows] @ weights.weight + weights.bias)
        torch.testing.assert_close(dense.forward(weights, room), x[rows] @ weights.weight + weights.bias)
        found.backward(gradient, grads)
        dense.backward(gradient, want)
        torch.testing.assert_close(want.weight, torch.einsum("mbf,mbo->mfo", x[rows], gradient))
        torch.testing.assert_close(want.bias, gradient.sum(1, keepdim=True))
        torch.testing.assert_close(grads.weight, want.weight)
        torch.testing.assert_close(grads.bias, want.bias)


def test_members_beyond_short_integers_keep_their_own_places():
    generator = torch.Generator().manual_seed(0)
    x = torch.zeros((4, 9000))
    x[range(4), torch.tensor([0, 5, 8999, 5])] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    rows = torch.randint(4, (8, 6), generator=generator)
    grads = Layer(torch.empty((8, 9000, 1)), torch.empty((8, 1, 1)))
    gradient = torch.randn((8, 6, 1), generator=generator)
    Inputs(x).take(rows, Room()).backward(gradient, grads)
    torch.testing.assert_close(grads.weight, x[rows].mT @ gradient)


@pytest.mark.parametrize(("entries", "kind"), [(2, Sparse), (3, Dense)])
def test_only_few_entries_are_taken_as_such(entries, kind):
    x = torch.zeros((N, F))
    x[0, :entries] = 1
    assert isinstance(Inputs(x).take(torch.zeros((1, 2), dtype=torch.int64), Room()), kind)
