"""Encoders as blocks: what is found, that each copy runs once, and that the chain is the encoder's own forward."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from libmtl_fair.errors import HostError
from libmtl_fair.methods.fairbranch.blocks import find_blocks
from libmtl_fair.methods.fairbranch.branched import BranchedEncoder
from libmtl_fair.models import MLP


class SequenceEncoder(nn.Module):
    """Embeds a sequence, two LSTM layers, the last step."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 5)
        self.blocks = nn.ModuleList([nn.LSTM(5, 6, batch_first=True), nn.LSTM(6, 4, batch_first=True)])

    def before_blocks(self, x: Tensor) -> Tensor:
        return self.embed(x)  # type: ignore[no-any-return]

    def after_blocks(self, x: Tensor) -> Tensor:
        return x[:, -1]

    def forward(self, x: Tensor) -> Tensor:
        x = self.before_blocks(x)
        for block in self.blocks:
            x, _ = block(x)
        return self.after_blocks(x)


class Stages(nn.Module):
    """A small ResNet with the attribute names of torchvision's and LibMTL's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(2)
        for i in range(1, 5):
            stage = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(inplace=True))
            setattr(self, f"layer{i}", stage)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))  # type: ignore[no-any-return]


def shape_of(encoder: nn.Module) -> list[list[str]]:
    return [[type(m).__name__ for m in block] for block in find_blocks(encoder)]


def split_all(encoder: BranchedEncoder, level: int) -> None:
    """Branch the last blocks down to ``level`` so that every task is alone."""
    tree = encoder.tree
    while tree.depth > level:
        tree = tree.branch([(i,) for i in range(len(tree.groups))])
    encoder.grow(tree)


def test_sequential_children_without_matrices_join_the_block_before() -> None:
    encoder = nn.Sequential(
        nn.Flatten(), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.1), nn.Linear(4, 2), nn.Tanh()
    )
    assert shape_of(encoder) == [["Flatten", "Linear", "BatchNorm1d", "ReLU", "Dropout"], ["Linear", "Tanh"]]
    assert [len(block) for block in shape_of(MLP(4, (8, 4), norm="batch"))] == [1, 1]
    assert len(shape_of(SequenceEncoder())) == 2
    assert len(shape_of(Stages())) == 4


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.Linear(3, 3)
        self.blocks = nn.ModuleList([layer, nn.Sequential(layer, nn.Linear(3, 3))])


class Outside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(3, 3)])
        self.last = nn.Linear(3, 3)


class Strange(nn.Module):
    blocks: Any = 3


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (nn.Linear(3, 3), "found Linear, which is neither"),
        (Strange(), "found 'blocks' of type int"),
        (nn.Sequential(), "found an empty list"),
        (nn.Sequential(nn.ReLU()), "none of the blocks of Sequential has a weight matrix"),
        (Shared(), "blocks 1 and 2 of Shared share a weight"),
        (Outside(), "weight 'last.weight' of Outside is in none of its blocks"),
    ],
)
def test_encoders_without_clear_blocks(encoder: nn.Module, message: str) -> None:
    with pytest.raises(HostError, match=message):
        find_blocks(encoder)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: MLP(3, (5, 4, 4), dropout=0.2, norm="batch"), (6, 3)),
        (lambda: nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4)), (6, 3)),
        (SequenceEncoder, (6, 7, 3)),
        (Stages, (6, 1, 8, 8)),
    ],
)
def test_the_chain_is_the_encoder_bitwise_before_and_after_branching(make: Any, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    encoder = make()
    x = torch.randn(shape)
    expected = encoder.eval()(x)
    branched = BranchedEncoder(encoder, ["a", "b"]).eval()
    for level in range(branched.tree.n_blocks, -1, -1):
        split_all(branched, level)
        reps = branched(x)
        assert list(reps) == ["a", "b"]
        assert all(torch.equal(rep, expected) for rep in reps.values())
        assert (reps["a"] is reps["b"]) == (level == branched.tree.n_blocks)


def test_every_copy_runs_once_a_forward_and_only_for_the_tasks_asked_for() -> None:
    branched = BranchedEncoder(MLP(3, (5, 4, 4)), list("abc"))
    calls: list[nn.Module] = []
    branched.grow(branched.tree.branch([(0, 2), (1,)]).branch([(0,), (1,)]))
    modules = [m for level in range(3) for m in branched.copies(level)]
    for module in modules:
        module.register_forward_hook(lambda m, *_: calls.append(m))
    branched(torch.randn(2, 3))
    assert len(calls) == len(modules) == 5
    assert set(map(id, calls)) == set(map(id, modules))
    calls.clear()
    assert list(branched(torch.randn(2, 3), ["b"])) == ["b"]
    assert len(calls) == 3


def test_the_first_forward_runs_each_block_once_too_and_moves_batch_norm_once() -> None:
    torch.manual_seed(0)
    encoder = SequenceEncoder()
    encoder.embed = nn.Sequential(nn.Linear(3, 5), nn.Flatten(0, 1), nn.BatchNorm1d(5), nn.Unflatten(0, (6, 7)))  # type: ignore[assignment]
    branched = BranchedEncoder(encoder, ["a", "b"])
    calls: list[nn.Module] = []
    for level in range(2):
        branched.copies(level)[0].register_forward_hook(lambda m, *_: calls.append(m))
    branched(torch.randn(6, 7, 3))
    assert len(calls) == 2
    assert int(branched.frame.embed[2].num_batches_tracked) == 1  # type: ignore[index, arg-type, union-attr]


class Skips(nn.Module):
    """A forward that does something the blocks do not."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "after":
            return self.blocks[1](self.blocks[0](x)).relu()  # type: ignore[no-any-return]
        if self.how == "between":
            return self.blocks[1](self.blocks[0](x) * 2)  # type: ignore[no-any-return]
        if self.how == "before":
            return self.blocks[1](self.blocks[0](x + 1))  # type: ignore[no-any-return]
        if self.how == "twice":
            return self.blocks[1](self.blocks[0](self.blocks[0](x)))  # type: ignore[no-any-return]
        if self.how == "other order":
            return self.blocks[0](self.blocks[1](x))  # type: ignore[no-any-return]
        return self.blocks[0](x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("how", ["after", "between", "before"])
def test_what_a_forward_does_beside_its_blocks_is_done_in_every_branch(how: str) -> None:
    x, encoder = torch.randn(2, 3), Skips(how)
    expected = encoder(x)
    branched = BranchedEncoder(encoder, ["a", "b"])
    for level in (2, 1, 0):
        split_all(branched, level)
        assert all(torch.equal(rep, expected) for rep in branched(x).values())


@pytest.mark.parametrize("how", ["one block only", "twice", "other order"])
def test_a_forward_that_does_not_run_each_block_once_in_order_is_told(how: str) -> None:
    called, expected = {"one block only": ("nothing", 1), "twice": ("'blocks.0'", 1), "other order": ("'blocks.1'", 0)}[
        how
    ]
    message = rf"Skips\.forward does not run each .* in their order \({called} was called where 'blocks.{expected}' was expected\)"
    with pytest.raises(HostError, match=message):
        BranchedEncoder(Skips(how), ["a", "b"])(torch.randn(2, 3))


def resnet() -> nn.Module:
    """A nested encoder as LibMTL's office example makes one: a ResNet as a submodule, pooling, then a hidden layer."""

    class Office(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.resnet_network, self.avgpool = Stages(), nn.AdaptiveAvgPool2d((1, 1))
            self.hidden_layer = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.hidden_layer(torch.flatten(self.avgpool(self.resnet_network(x)), 1))  # type: ignore[no-any-return]

    return Office()


PATHS = [*(f"resnet_network.layer{i}" for i in range(1, 5)), "hidden_layer"]


@pytest.mark.parametrize("paths", [None, PATHS, PATHS[2:]])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_nested_resnet_branches_and_its_gradients_are_those_of_an_encoder_a_task(paths: Any, level: int) -> None:
    torch.manual_seed(0)
    encoder, x = resnet().double(), torch.randn(6, 1, 8, 8).double()
    alone = {task: copy.deepcopy(encoder) for task in "ab"}
    branched = BranchedEncoder(encoder, ["a", "b"], paths)
    assert branched.tree.n_blocks == len(paths or PATHS)
    split_all(branched, level)
    reps = branched(x)
    sum((i + 1.0) * reps[task].pow(2).sum() for i, task in enumerate("ab")).backward()  # type: ignore[union-attr]
    for i, task in enumerate("ab"):
        rep = alone[task](x)
        assert torch.equal(reps[task], rep)
        ((i + 1.0) * rep.pow(2).sum()).backward()
    stem = encoder.resnet_network.conv1.weight.grad  # type: ignore[union-attr]
    torch.testing.assert_close(stem, sum(e.resnet_network.conv1.weight.grad for e in alone.values()))  # type: ignore[misc,union-attr]
    for task in "ab":
        last = branched.copies(branched.tree.n_blocks - 1)[branched.tree.path(task)[-1]]
        torch.testing.assert_close(last[0].weight.grad, alone[task].hidden_layer[0].weight.grad)  # type: ignore[index,union-attr]
    assert int(encoder.resnet_network.bn1.num_batches_tracked) == 1  # type: ignore[union-attr, arg-type]
    torch.testing.assert_close(encoder.resnet_network.bn1.running_mean, alone["a"].resnet_network.bn1.running_mean)  # type: ignore[union-attr]


def test_every_copy_of_a_nested_encoder_runs_once_and_its_stem_once() -> None:
    encoder = resnet()
    branched, calls = BranchedEncoder(encoder, list("abc")), []
    split_all(branched, 2)
    for module in [m for level in range(5) for m in branched.copies(level)] + [encoder.resnet_network.conv1]:  # type: ignore[union-attr]
        module.register_forward_hook(lambda m, *_: calls.append(m))  # type: ignore[union-attr]
    branched(torch.randn(4, 1, 8, 8))
    assert len(calls) == len(set(calls)) == 2 + 3 * 3 + 1
    calls.clear()
    branched(torch.randn(4, 1, 8, 8), ["b"])
    assert len(calls) == 2 + 3 + 1


def _libmtls() -> nn.Module:
    return importlib.import_module("LibMTL.model.resnet").resnet18()  # type: ignore[no-any-return]


def _torchvisions() -> nn.Module:
    try:
        return importlib.import_module("torchvision.models").resnet18(num_classes=8)  # type: ignore[no-any-return]
    except (ImportError, RuntimeError) as error:  # RuntimeError: a build for another torch
        pytest.skip(f"torchvision cannot be imported: {error}")


@pytest.mark.parametrize(("make", "n_blocks"), [(_libmtls, 4), (_torchvisions, 5)])
def test_the_resnets_that_libmtls_users_bring(make: Any, n_blocks: int) -> None:
    encoder, x = make().eval(), torch.randn(2, 3, 33, 33)
    with torch.no_grad():
        expected = encoder(x)
        branched = BranchedEncoder(encoder, ["a", "b"])
        assert branched.tree.n_blocks == n_blocks
        split_all(branched, 2)
        assert all(torch.equal(rep, expected) for rep in branched(x).values())


class Asks(nn.Module):
    """A forward that looks at its blocks: at what they are, and at their weights; they have two names each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 4)
        self.layers = nn.ModuleList([self.first, self.last])

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.first.weight.dtype)
        for layer in self.layers:
            x = layer(x)
            if isinstance(layer, nn.Linear):
                x = x.relu() * layer.out_features
        return x


def test_a_forward_that_looks_at_its_blocks_finds_them() -> None:
    x, encoder = torch.randn(5, 3, dtype=torch.float64), Asks()
    expected = encoder(x)
    branched = BranchedEncoder(encoder, ["a", "b"])
    assert not list(branched.frame.parameters())
    for level in (2, 1, 0):
        split_all(branched, level)
        assert all(torch.equal(rep, expected) for rep in branched(x).values())
    with torch.no_grad():
        branched.copies(1)[1].weight.zero_()  # type: ignore[operator, union-attr]
    assert torch.equal(branched(x)["a"], expected)
    assert not torch.equal(branched(x)["b"], expected)


def test_one_module_that_stands_in_two_blocks() -> None:
    act = nn.ReLU()

    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(3, 4), act, nn.Linear(4, 4), act])

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x) + 0.5
            return x

    x, encoder = torch.randn(5, 3), Listed()
    expected = encoder(x)
    branched = BranchedEncoder(encoder, ["a", "b"])
    for level in (2, 1, 0):
        split_all(branched, level)
        assert all(torch.equal(rep, expected) for rep in branched(x).values())
    once = nn.Module()
    once.one, once.act, once.two = nn.Linear(3, 4), act, nn.Linear(4, 4)
    with pytest.raises(HostError, match=r"'act' of Module is part of blocks 1, 2: give each block a module of its own"):
        BranchedEncoder(once, ["a", "b"], ["one", "act", "two", "act"])


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_weights_that_a_forward_makes_are_copied_with_their_block() -> None:
    norm = torch.nn.utils.weight_norm
    encoder, x = nn.Sequential(norm(nn.Linear(3, 4)), nn.ReLU(), norm(nn.Linear(4, 4))), torch.randn(5, 3)
    branched = BranchedEncoder(encoder, ["a", "b"])
    expected = branched(x)["a"]
    split_all(branched, 1)
    found = branched(x)
    assert all(torch.equal(found[task], expected) for task in "ab")
    found["b"].sum().backward()
    used = [p.grad is not None for copy in branched.copies(1) for p in copy.parameters()]
    assert used == [False] * 3 + [True] * 3


def test_a_block_that_is_checkpointed_by_its_encoder() -> None:
    class Checkpointed(Skips):
        def forward(self, x: Tensor) -> Tensor:
            h = torch.utils.checkpoint.checkpoint(self.blocks[0], x, use_reentrant=False)
            return self.blocks[1](h * 2)  # type: ignore[no-any-return]

    x, branched = torch.randn(2, 3, requires_grad=True), BranchedEncoder(Checkpointed("after"), ["a", "b"])
    split_all(branched, 0)
    found = branched(x)
    (found["a"].sum() + 2 * found["b"].sum()).backward()
    one, two = ([p.grad for p in copy.parameters()] for copy in branched.copies(0))
    assert all(torch.equal(2 * a, b) for a, b in zip(one, two) if a is not None and b is not None)
    assert None not in [*one, *two]


def test_a_path_that_is_none_is_told_with_the_near_one() -> None:
    with pytest.raises(HostError, match=r"Office: unknown block 'resnet_network.layer5'; did you mean"):
        find_blocks(resnet(), ["resnet_network.layer1", "resnet_network.layer5"])


def test_the_encoder_itself_cannot_be_run_behind_the_models_back() -> None:
    encoder = MLP(3, (4, 4))
    BranchedEncoder(encoder, ["a", "b"])
    with pytest.raises(HostError, match="belong to a FairBranch model now"):
        encoder(torch.randn(2, 3))


def test_a_block_that_writes_into_its_input_is_told() -> None:
    blocks = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 3)))
    branched = BranchedEncoder(blocks, ["a", "b"])
    branched(torch.randn(2, 3))
    split_all(branched, 1)
    with pytest.raises(HostError, match=r"block 2 changes its input in place.*inplace=False"):
        branched(torch.randn(2, 3))


def test_copies_have_their_own_weights_and_buffers_and_keep_frozen_ones_frozen() -> None:
    encoder = MLP(3, (4, 4), norm="batch")
    encoder.blocks[1][0].bias.requires_grad_(False)  # type: ignore[index]
    branched = BranchedEncoder(encoder, ["a", "b"])
    branched(torch.randn(8, 3))
    split_all(branched, 1)
    one, two = branched.copies(1)
    for p, q in zip(one.parameters(), two.parameters()):
        assert p is not q
        assert torch.equal(p, q)
        assert p.requires_grad == q.requires_grad
    for a, b in zip(one.buffers(), two.buffers()):
        assert a is not b
        assert torch.equal(a, b)
    assert {id(p) for p in branched.parameters()} == {
        id(p) for p in [*branched.trunk_parameters(), *branched.parameters_of([(1, 0), (1, 1)])]
    }
    assert len({id(p) for p in branched.parameters()}) == 12


def test_growing_to_a_tree_that_does_not_fit() -> None:
    branched = BranchedEncoder(MLP(3, (4, 4)), ["a", "b"])
    other = BranchedEncoder(MLP(3, (4, 4, 4)), ["a", "b"]).tree
    with pytest.raises(HostError, match="branch tree of 3 blocks and tasks a, b does not fit an encoder of 2 blocks"):
        branched.grow(other)


class TestAllCopiesAtOnce:
    """In training, copies of linear layers and activations run as one product: the same numbers as one by one."""

    @staticmethod
    def branched(**options: Any) -> BranchedEncoder:
        torch.manual_seed(0)
        encoder = BranchedEncoder(MLP(3, (6, 5, 4), **options), list("abc"))
        encoder(torch.randn(2, 3))
        encoder.grow(encoder.tree.branch([(0, 2), (1,)]).branch([(0,), (1,)]))
        with torch.no_grad():
            for p in encoder.parameters():
                p.add_(0.3 * torch.randn_like(p))
        return encoder

    @staticmethod
    def gradients(encoder: BranchedEncoder, reps: dict[str, Tensor]) -> list[Tensor]:
        loss = sum((i + 1) * (reps[task] ** 2).sum() for i, task in enumerate("abc"))
        return list(torch.autograd.grad(loss, list(encoder.parameters())))

    def test_values_and_gradients_are_those_of_each_copy_alone(self) -> None:
        encoder, x = self.branched(), torch.randn(7, 3)
        reps, joint = encoder.run(x)
        alone, apart = encoder.run(x, together=False)
        assert joint is not None
        assert joint.shape == (2, 7, 4)
        assert apart is None
        assert reps["a"] is reps["c"]
        for task in "abc":
            torch.testing.assert_close(reps[task], alone[task])
        for one, other in zip(self.gradients(encoder, reps), self.gradients(encoder, alone)):
            torch.testing.assert_close(one, other)

    def test_an_activation_that_stands_twice_runs_twice(self) -> None:
        torch.manual_seed(0)
        tanh = nn.Tanh()
        encoder = BranchedEncoder(nn.Sequential(nn.Linear(3, 4), tanh, tanh, nn.Linear(4, 4), tanh, tanh), list("ab"))
        split_all(encoder, 0)
        x = torch.randn(5, 3)
        reps, joint = encoder.run(x)
        assert joint is not None
        torch.testing.assert_close(reps["b"], encoder.run(x, together=False)[0]["b"])

    @pytest.mark.parametrize("options", [{"norm": "batch"}, {"norm": "layer"}, {"dropout": 0.5}])
    def test_other_layers_run_one_by_one(self, options: Any) -> None:
        assert self.branched(**options).run(torch.randn(7, 3))[1] is None

    def test_a_copy_that_somebody_listens_to_runs_alone(self) -> None:
        encoder, seen = self.branched(), []
        encoder.copies(2)[1].register_forward_hook(lambda *_: seen.append(1))
        assert encoder.run(torch.randn(7, 3))[1] is None
        assert seen == [1]
