"""``lf.heal()``: LibMTL's own Trainer works, in place. In processes of their own, so that nothing leaks into other tests."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

SETUP = """
import contextlib, io, json, random, sys, warnings
warnings.simplefilter("error")
import numpy as np
import torch
from torch import nn
torch.set_num_threads(1)
import libmtl_fair as lf
from libmtl_fair.libmtl.loading import LINEAGE, weighting_namespace, architecture_namespace
from libmtl_fair.libmtl import weighting_names
from libmtl_fair.libmtl.registry import OUR_WEIGHTINGS, weight_args

def chosen(name, namespace):
    return name if LINEAGE == "git main" else getattr(namespace, name)

def loader(shuffle=True):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(80, 6, generator=g)
    labels = {"a": (x[:, 0] > 0).float(), "b": (x[:, 1] + x[:, 0] > 0).float(), "c": (x[:, 2] > 0).float()}
    return lf.ResidentLoader(x, labels, batch_size=32, shuffle=shuffle, seed=3, device="cpu")

def settings(rep_grad):
    torch.manual_seed(7)
    tasks = [lf.Binary(n) for n in "abc"]
    return dict(task_dict=lf.task_dict(tasks), encoder_class=lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU()),
                decoders=nn.ModuleDict({n: nn.Linear(8, 1) for n in "abc"}), rep_grad=rep_grad, multi_input=False,
                optim_param={"optim": "adam", "lr": 1e-2}, scheduler_param=None)

def seed(n):
    random.seed(n); np.random.seed(n); torch.manual_seed(n)

def plain(name, epochs, rep_grad=False, trainer=None):
    import LibMTL
    if trainer is None:
        seed(0)
        made = settings(rep_grad)
        seed(0)
        args = weight_args(getattr(weighting_namespace, name), {})
        trainer = LibMTL.Trainer(weighting=chosen(name, weighting_namespace), architecture=chosen("HPS", architecture_namespace),
                                 weight_args=args, arch_args={}, **made)
    seed(1)
    weights = trainer.train(loader(), loader(False), epochs, return_weight=True)
    return trainer, weights
"""


@pytest.fixture
def run(fresh: Any) -> Any:
    return lambda code: fresh(SETUP + code)


def test_every_weighting_trains_with_libmtls_own_trainer(run: Any) -> None:
    found = run("""
lf.heal()
results = {}
optional = {"Nash_MTL", "UPGrad"}
for name in [n for n in weighting_names() if n not in OUR_WEIGHTINGS and n not in optional]:
    with contextlib.redirect_stdout(io.StringIO()):
        trainer, weights = plain(name, 5, rep_grad=name == "GradDrop")
    results[name] = [trainer.model.train_loss_buffer.sum(0).tolist(), np.asarray(weights).shape, str(trainer.device)]
print(json.dumps(results))
""")
    libmtls = {"EW", "UW", "DWA", "RLW", "GLS", "GradNorm", "GradDrop", "MGDA", "PCGrad", "GradVac", "IMTL", "CAGrad"}
    assert libmtls <= set(found)
    for name, (losses, shape, device) in found.items():
        assert losses[-1] < losses[0], name
        assert shape == [3, 5, 3], name
        assert device.startswith(("cpu", "cuda")), name


def test_fair_trainer_trains_to_the_numbers_of_libmtls_own(run: Any) -> None:
    """Same seeds, same order of rows: the same losses, for every weighting of LibMTL."""
    found = run("""
lf.heal()
results = {}
optional = {"Nash_MTL", "UPGrad", "MoDo", "SDMGrad"}
for name in [n for n in weighting_names() if n not in OUR_WEIGHTINGS and n not in optional]:
    rep_grad = name == "GradDrop"
    with contextlib.redirect_stdout(io.StringIO()):
        theirs, weights = plain(name, 4, rep_grad)
    seed(0)
    made = settings(rep_grad)
    seed(0)
    ours = lf.FairTrainer(weighting=name, architecture="HPS", device=theirs.device, progress=False, select="last", **made)
    seed(1)
    ours_w = ours.train(loader(), epochs=4, return_weight=True)
    gap = np.abs(theirs.model.train_loss_buffer - ours.model.train_loss_buffer).max()
    theirs_w = np.asarray(weights).reshape(3, -1)
    drift = 0.0 if np.isnan(ours_w).all() else float(np.abs(ours_w - theirs_w).max())
    results[name] = [float(gap), drift]
print(json.dumps(results))
""")
    assert len(found) >= 12
    assert {name: gaps for name, gaps in found.items() if max(gaps) > 1e-4} == {}


def test_an_mgda_that_is_part_of_no_model_solves(run: Any) -> None:
    """As MOML makes one in the Trainer of LibMTL's git main."""
    found = run("""
lf.heal()
solver = weighting_namespace.MGDA()
print(json.dumps([solver._find_min_norm_element(torch.tensor(g)).tolist() for g in ([[2.0, 0.0], [0.0, 1.0]], torch.eye(3).tolist())]))
""")
    assert found[0] == pytest.approx([0.2, 0.8])
    assert found[1] == pytest.approx([1 / 3] * 3, abs=1e-5)


def test_heal_says_what_it_changed_and_once_is_enough(run: Any) -> None:
    first, second, third = run("""
first = lf.heal()
print(json.dumps([first, lf.heal(), lf.heal()]))
""")
    assert second == third == []
    text = "\n".join(first)
    for part in (
        "Trainer._process_data",
        "cuda:0",
        "AbsWeighting._reset_grad",
        "CAGrad.backward",
        "EW.backward",
        "RLW.backward",
    ):
        assert part in text
    assert all(": " in line for line in first)


def test_importing_changes_nothing_but_names_and_options() -> None:
    """Every function, class and module of LibMTL is the same object before and after ``import libmtl_fair``."""
    found = run_bare("""
import importlib, json, sys, types
import torch

vision = {name: types.ModuleType(name) for name in ("torchvision", "torchvision.models", "torchvision.models.utils")}
vision["torchvision.models.utils"].load_state_dict_from_url = torch.hub.load_state_dict_from_url
absent = {n: types.ModuleType(n) for n in ("torch_geometric", "cvxpy", "qpsolvers") if not importlib.util.find_spec(n)}
if "qpsolvers" in absent:
    absent["qpsolvers"].solve_qp = None
sys.modules.update({**vision, **absent})
import LibMTL
for name in (*vision, *absent):
    del sys.modules[name]

def picture():
    seen = {}
    for name, module in sorted(sys.modules.items()):
        if name == "LibMTL" or name.startswith("LibMTL."):
            for key, value in vars(module).items():
                if key.startswith("__") and key != "__all__":
                    continue
                seen[f"{name}:{key}"] = id(value)
                if isinstance(value, type) and value.__module__.startswith("LibMTL"):
                    for attribute, item in vars(value).items():
                        seen[f"{name}:{key}.{attribute}"] = id(item)
    return seen

options = set(LibMTL.config.LibMTL_args._option_string_actions)
before = picture()
import libmtl_fair
from libmtl_fair.libmtl.registry import OUR_WEIGHTINGS, OUR_ARCHITECTURES
after = picture()
changed = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
ours = [*OUR_WEIGHTINGS, *OUR_ARCHITECTURES]
mine = {f"LibMTL.weighting:{n}" for n in OUR_WEIGHTINGS} | {f"LibMTL.architecture:{n}" for n in OUR_ARCHITECTURES}
rest = [k for k in changed if k not in mine and k.split(".")[0:2] != [] and not any(k.startswith(m + ".") for m in mine)]
more = set(LibMTL.config.LibMTL_args._option_string_actions) - options
strange = [o for o in more if not o.startswith(tuple(f"--{n.lower()}_" for n in ours))]
print(json.dumps([rest, strange, len(more)]))
""")
    rest, strange, more = found
    assert rest == ["LibMTL.config:prepare_args"]
    assert strange == ["--torchjd_args"]  # of all weightings of TorchJD
    assert more > 0


def run_bare(code: str) -> Any:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_unhealed_libmtl_is_as_broken_as_ever(run: Any) -> None:
    """What heal() mends is there to be mended: a change upstream makes this fail, and a patch superfluous."""
    found = run("""
import LibMTL
troubles = {}
with contextlib.redirect_stdout(io.StringIO()):
    try:
        plain("EW", 1)
    except (AssertionError, RuntimeError) as error:
        troubles["device"] = str(error)[:60]
print(json.dumps([troubles, torch.cuda.is_available()]))
""")
    troubles, has_cuda = found
    assert has_cuda or "device" in troubles


def test_a_loaders_own_error_is_seen(run: Any) -> None:
    """LibMTL's bare except took every error of a data set for the end of the epoch."""
    found = run("""
lf.heal()
class Broken:
    def __iter__(self):
        raise ValueError("row 3 is damaged")
        yield
    def __len__(self):
        return 1
try:
    with contextlib.redirect_stdout(io.StringIO()):
        trainer, _ = plain("EW", 1)
        trainer.train(Broken(), loader(), 1)
except ValueError as error:
    print(json.dumps(str(error)))
""")
    assert found == "row 3 is damaged"


@pytest.mark.parametrize("weighting", ["ReLiF"])
def test_our_weighting_in_libmtls_own_trainer(run: Any, weighting: str) -> None:
    found = run(f"""
import LibMTL
lf.heal()
made = settings(False)
with contextlib.redirect_stdout(io.StringIO()):
    trainer = LibMTL.Trainer(weighting=chosen({weighting!r}, weighting_namespace),
                             architecture=chosen("HPS", architecture_namespace), weight_args={{}}, arch_args={{}}, **made)
    try:
        trainer.train(loader(), loader(False), 1)
        said = "trained"
    except lf.errors.HostError as error:
        said = str(error)
print(json.dumps(said))
""")
    assert "use libmtl_fair.FairTrainer" in found
