"""TorchJD's aggregators as weightings: against TorchJD itself, and in training, resume, recipes and LibMTL's options."""

from __future__ import annotations

import importlib.util
import pickle
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import libmtl_fair as lf
from libmtl_fair.errors import HostError, RecipeError
from libmtl_fair.libmtl.loading import config_module, weighting_namespace
from libmtl_fair.libmtl.registry import OUR_WEIGHTINGS, resolve_weighting

aggregation = pytest.importorskip("torchjd.aggregation")
from libmtl_fair.libmtl import torchjd_bridge as bridge  # noqa: E402

ARGS: dict[str, dict[str, Any]] = {
    "CAGrad": {"c": 0.4},
    "Constant": {"weights": [1.0, 2.0, 0.5]},
    "FairGrad": {"alpha": 1.0},
    "Krum": {"n_byzantine": 0},
    "TrimmedMean": {"trim_number": 1},
    "UPGrad": {"pref_vector": [0.2, 0.3, 0.5]},
}
NEEDS = {"CAGrad": "cvxpy", "NashMTL": "cvxpy"}
STATEFUL = ["CRMOGM", "ExcessMTL", "GradVac", "NashMTL", "PCD"]
TASKS = (lf.Regression("a"), lf.Regression("b"), lf.Regression("c"))


@pytest.fixture(autouse=True, scope="module")
def _forgotten() -> Any:
    """Leave the names of TorchJD's weightings, once asked for, to this module's tests."""
    yield
    for name in [name for name in OUR_WEIGHTINGS if name.startswith("torchjd:")]:
        del OUR_WEIGHTINGS[name]


def need(name: str) -> None:
    """Skip what TorchJD itself cannot do here."""
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])


def theirs(name: str) -> nn.Module:
    """Return TorchJD's own aggregator."""
    args = {key: torch.tensor(v).double() if isinstance(v, list) else v for key, v in ARGS.get(name, {}).items()}
    if name == "NashMTL":
        args["n_tasks"] = 3
    if name == "CRMOGM":
        inner = theirs("UPGrad") if importlib.util.find_spec("qpsolvers") else upgrad_by_definition()
        return aggregation.CRMOGMWeighting(inner.weighting)
    if name in ("UPGrad", "DualProj") and importlib.util.find_spec("qpsolvers") is None:
        return upgrad_by_definition(getattr(aggregation, name), **args)
    return getattr(aggregation, name)(**args)


def upgrad_by_definition(cls: Any = aggregation.UPGrad, **args: Any) -> Any:
    """Return the aggregator with quadprog called directly, where the package TorchJD calls it through is not installed."""
    quadprog = pytest.importorskip("quadprog")
    from torchjd.linalg import DualConeProjector

    class Direct(DualConeProjector):
        def __call__(self, U: Tensor, G: Tensor) -> Tensor:
            g = (G / G.diagonal().sum()).double() + 1e-4 * torch.eye(len(G)).double()
            solved = [
                quadprog.solve_qp(
                    g.numpy(), torch.zeros(len(g)).double().numpy(), torch.eye(len(g)).double().numpy(), u
                )
                for u in U.double().reshape(-1, len(g)).numpy()
            ]
            return torch.stack([torch.from_numpy(found[0]) for found in solved]).reshape(U.shape).to(G.dtype)

    return cls(**args, projector=Direct())


def fair_step(name: str, theta: nn.Module) -> lf.FairStep:
    """Return the step of a weighting on losses that are linear in the shared parameters."""
    return lf.FairStep(f"torchjd:{name}", lf.task_dict(TASKS), encoder=theta, **ARGS.get(name, {}))


@pytest.mark.filterwarnings("ignore:You are solving a parameterized problem that is not DPP")
@pytest.mark.filterwarnings(
    "ignore:Solution may be inaccurate"
)  # cvxpy's, of TorchJD's own call where two gradients oppose
@pytest.mark.parametrize("name", [n for n in bridge.torchjd_names() if n != "CRMOGM"])
def test_random_jacobians(name: str) -> None:
    """The gradient of the losses J theta is J: what is left in .grad is TorchJD's A(J), step after step."""
    need(name)
    theta = nn.Linear(7, 1, bias=False).double()
    fair, own = fair_step(name, theta), theirs(name)
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        jacobian = torch.randn(3, 7, generator=g, dtype=torch.float64) * 10.0 ** (seed - 2)
        if seed == 3:
            jacobian[2] = -2 * jacobian[0]  # opposed, and of rank two
        theta.zero_grad()
        torch.manual_seed(seed)
        fair.backward(jacobian @ theta.weight[0])
        torch.manual_seed(seed)
        expected = own(jacobian)
        assert theta.weight.grad is not None
        scale = float(expected.norm().clamp(min=1e-12))
        torch.testing.assert_close(theta.weight.grad[0], expected, rtol=1e-6, atol=1e-6 * scale)


def test_one_weighting_over_another() -> None:
    theta = nn.Linear(7, 1, bias=False).double()
    fair = lf.FairStep("torchjd:CRMOGM", lf.task_dict(TASKS), encoder=theta, over="MGDA", alpha=0.6)
    own = aggregation.CRMOGMWeighting(aggregation.MGDA().weighting, 0.6)
    for seed in range(3):
        jacobian = torch.randn(3, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        theta.zero_grad()
        fair.backward(jacobian @ theta.weight[0])
        torch.testing.assert_close(theta.weight.grad[0], own(jacobian) @ jacobian, rtol=1e-6, atol=1e-9)  # type: ignore[index]


@pytest.mark.parametrize("name", ["UPGrad", "AlignedMTL", "IMTLG", "ConFIG", "MGDA"])
def test_training_as_torchjds_own(kit: Any, name: str) -> None:
    """Five steps of mtl_backward and of FairTrainer, of the same model on the same batches."""
    from torchjd.autojac import jac_to_grad, mtl_backward

    tasks = kit.tasks
    trainer = kit.trainer(f"torchjd:{name}", optim_param={"optim": "sgd", "lr": 0.1}, weight_args=ARGS.get(name, {}))
    trainer.model.double()
    theirs_model = pickle.loads(pickle.dumps(trainer.model))
    own, optimizer = theirs(name), torch.optim.SGD(theirs_model.parameters(), lr=0.1)
    entries = lf.task_dict(tasks)
    x, labels, groups = kit.data(160)
    x, labels = x.double(), {task: y.double() for task, y in labels.items()}
    loader = lf.ResidentLoader(x, labels, groups, batch_size=32, shuffle=False, device="cpu")
    trainer.train(loader, epochs=1)
    for start in range(0, 160, 32):
        h = theirs_model.encoder(x[start : start + 32])
        losses = [
            entries[task.name]["loss_fn"].compute_loss(
                theirs_model.decoders[task.name](h), labels[task.name][start : start + 32]
            )
            for task in tasks
        ]
        optimizer.zero_grad()
        mtl_backward(losses, features=h)
        jac_to_grad(list(theirs_model.encoder.parameters()), own)
        optimizer.step()
    for ours, expected in zip(trainer.model.encoder.parameters(), theirs_model.encoder.parameters()):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["UPGrad", "ConFIG"])
def test_gradients_of_the_representation(kit: Any, name: str) -> None:
    trainer = kit.trainer(f"torchjd:{name}", rep_grad=True, weight_args=ARGS.get(name, {}))
    trainer.train(kit.loader(), epochs=3)
    losses = trainer.epochs[[f"loss/{t.name}" for t in kit.tasks]].sum(axis=1)
    assert losses.iloc[-1] < losses.iloc[0]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trainer.model.encoder.parameters())


@pytest.mark.parametrize("name", ["GradDrop", "TrimmedMean"])
def test_what_is_no_sum_of_gradients_says_so(kit: Any, name: str) -> None:
    trainer = kit.trainer(f"torchjd:{name}", rep_grad=True, weight_args=ARGS.get(name, {}))
    with pytest.raises(HostError, match=f"torchjd:{name} works on parameter gradients: use rep_grad=False"):
        trainer.train(kit.loader(), epochs=1)


@pytest.mark.parametrize(
    ("weighting", "args"),
    [
        ("ReLiF", {"pairs": "random", "k": 4}),
        ("FairMT", {"min_count": 1}),
        ("GroupRegulariser", {"loss": "gap", "lam": 0.95}),
    ],
)
def test_base_of_a_method(kit: Any, weighting: str, args: dict[str, Any]) -> None:
    settings = {**args, "base": "torchjd:AlignedMTL", "base_args": {"scale_mode": "median"}}
    trainer = kit.trainer(weighting, weight_args=settings)
    trainer.train(kit.loader(), epochs=3)
    losses = trainer.epochs[[f"loss/{t.name}" for t in kit.tasks]].sum(axis=1)
    assert losses.iloc[-1] < losses.iloc[0]
    assert trainer.model.torchjd.aggregator.scale_mode == "median"


@pytest.mark.parametrize("name", STATEFUL)
def test_resume_goes_on_with_what_is_remembered(kit: Any, tmp_path: Path, name: str) -> None:
    need(name)
    make = lambda **more: kit.trainer(f"torchjd:{name}", **more)  # noqa: E731
    whole = make()
    whole.train(kit.loader(), epochs=4)
    make(run_dir=tmp_path / "run").train(kit.loader(), epochs=2)
    second = make(run_dir=tmp_path / "run", resume=True)
    second.train(kit.loader(), epochs=4)
    kit.assert_same(kit.parameters(whole), kit.parameters(second))


@pytest.mark.parametrize(
    ("name", "args", "match"),
    [
        ("CAGrad", {}, "torchjd:CAGrad: c must be given"),
        ("MGDA", {"max_itrs": 3}, "unknown setting 'max_itrs'; did you mean 'max_iters'"),
        ("AlignedMTL", {"scale_mode": "mean"}, "unknown scale_mode 'mean'.*median, min, rmse"),
        ("GradVac", {"beta": "high"}, "beta must be a finite number, found 'high'"),
        ("UPGrad", {"pref_vector": "abc"}, "pref_vector must be a list of numbers, one a task"),
        ("ExcessMTL", {"robust_step_size": 0.0}, "robust_step_size.*must be positive"),
    ],
)
def test_settings_are_checked_in_words(kit: Any, name: str, args: dict[str, Any], match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        kit.trainer(f"torchjd:{name}", weight_args=args)


def test_what_fits_no_number_of_tasks_is_said_at_the_first_step(kit: Any) -> None:
    trainer = kit.trainer("torchjd:UPGrad", weight_args={"pref_vector": [0.5, 0.5]})
    with pytest.raises(HostError, match="torchjd:UPGrad: .*2 rows.*with 3"):
        trainer.train(kit.loader(), epochs=1)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("UPGrd", "unknown aggregator of TorchJD 'UPGrd'; did you mean 'UPGrad'"),
        ("MoDo", "torchjd:MoDo takes independent batches a step"),
        ("WeightedAggregator", "unknown aggregator"),
    ],
)
def test_names(name: str, match: str) -> None:
    with pytest.raises(HostError, match=match):
        resolve_weighting(f"torchjd:{name}")


def test_without_torchjd() -> None:
    code = (
        "import sys; sys.modules['torchjd'] = None\n"
        "import libmtl_fair as lf\n"
        "from libmtl_fair.libmtl.registry import OUR_WEIGHTINGS, resolve_weighting\n"
        "try: resolve_weighting('torchjd:UPGrad')\n"
        "except lf.errors.HostError as error: print(error)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'libmtl_fair[torchjd]'" in found.stdout


def test_libmtls_options() -> None:
    def prepared(*args: str) -> Any:
        params = config_module.LibMTL_args.parse_args(["--optim", "adam", *args])
        return config_module.prepare_args(params)[0]

    found = prepared("--weighting", "torchjd:AlignedMTL", "--torchjd_args", '{"scale_mode": "rmse"}')
    assert found["weight_args"] == {"scale_mode": "rmse"}
    assert issubclass(vars(weighting_namespace)["torchjd:AlignedMTL"], weighting_namespace.AbsWeighting)
    based = prepared("--weighting", "ReLiF", "--relif_base", "torchjd:MGDA", "--torchjd_args", '{"max_iters": 9}')
    assert (based["weight_args"]["base"], based["weight_args"]["base_args"]) == ("torchjd:MGDA", {"max_iters": 9})
    with pytest.raises(RecipeError, match="unknown setting 'scale'"):
        prepared("--weighting", "torchjd:AlignedMTL", "--torchjd_args", '{"scale": 1}')
    with pytest.raises(HostError, match="did you mean 'UPGrad'"):
        prepared("--weighting", "torchjd:UPgrad")


def test_recipe_names_the_line(tmp_path: Path) -> None:
    from libmtl_fair.recipe.build import check
    from libmtl_fair.recipe.schema import load_recipe

    text = (
        "name: bridge\ndata: {name: adult}\nmodel: {hidden: [4]}\nmethods:\n"
        "  one: {weighting: 'torchjd:AlignedMTL', scale_mode: rmse}\n"
        "  two:\n    weighting: ReLiF\n    base: torchjd:AlignedMTL\n    base_args:\n      scale_mode: mean\n"
    )
    path = tmp_path / "bridge.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=r"bridge.yaml:10: .*unknown scale_mode 'mean'"):
        check(load_recipe(path))
    path.write_text(text.replace("mean", "min"), encoding="utf-8")
    check(load_recipe(path))


@pytest.mark.parametrize("name", ["GradVac", "UPGrad"])
def test_models_are_pickled(kit: Any, name: str) -> None:
    random.seed(0)
    trainer = kit.trainer(f"torchjd:{name}")
    trainer.train(kit.loader(), epochs=1)
    again = pickle.loads(pickle.dumps(trainer.model))
    kit.assert_same(trainer.model.state_dict(), again.state_dict())
