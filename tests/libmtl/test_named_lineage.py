"""LibMTL's git main passes weightings and architectures by name. It was never packaged, so it cannot be a dependency here:
these tests run the name-based path on a small stand-in of our own, written below, with the same module layout, names
and habits (a Trainer of names with ``weighting_method`` in its module, requirements imported at start, ``cuda:0``).
The contract suite itself runs on a clone of git main too: ``PYTHONPATH=<clone> pytest tests/libmtl/test_contract.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

FILES = {
    "__init__.py": "from . import architecture, weighting, config, loss, metrics, utils\nfrom .trainer import Trainer\n",
    "utils.py": "",
    "loss.py": """
class AbsLoss(object):
    def __init__(self):
        self.record, self.bs = [], []
    def _update_loss(self, pred, gt):
        loss = self.compute_loss(pred, gt)
        self.record.append(loss.item())
        self.bs.append(pred.size()[0])
        return loss
    def _average_loss(self):
        return sum(r * b for r, b in zip(self.record, self.bs)) / sum(self.bs)
    def _reinit(self):
        self.record, self.bs = [], []
""",
    "metrics.py": """
class AbsMetric(object):
    def __init__(self):
        self.record, self.bs = [], []
    def reinit(self):
        self.record, self.bs = [], []
""",
    "model.py": "from torchvision.models.utils import load_state_dict_from_url\n",
    "config.py": """
import argparse
LibMTL_args = argparse.ArgumentParser()
LibMTL_args.add_argument("--weighting", default="EW")
LibMTL_args.add_argument("--arch", default="HPS")
LibMTL_args.add_argument("--rep_grad", action="store_true")
LibMTL_args.add_argument("--robust_step_size", type=float, default=0.05)
LibMTL_args.add_argument("--GradVac_beta", type=float, default=0.5)
LibMTL_args.add_argument("--GradVac_group_type", type=int, default=0)
def prepare_args(params):
    known = {"EW": [], "ExcessMTL": ["robust_step_size"], "RLW": [], "FAMO": [], "MoDo": [], "GradVac": ["GradVac_beta", "GradVac_group_type"]}
    if params.weighting not in known:
        raise ValueError("No support weighting method {}".format(params.weighting))
    kwargs = {"weight_args": {k: getattr(params, k) for k in known[params.weighting]}, "arch_args": {}}
    _display(params, kwargs, {}, None)
    return kwargs, {"optim": "adam", "lr": 1e-3}, None
def _display(params, kwargs, optim_param, scheduler_param):
    print(params.weighting, kwargs)
""",
    "architecture/__init__.py": """
import torch.nn as nn
class AbsArchitecture(nn.Module):
    def __init__(self, task_name, encoder_class, decoders, rep_grad, multi_input, device, **kwargs):
        super(AbsArchitecture, self).__init__()
        self.task_name, self.task_num, self.encoder_class = task_name, len(task_name), encoder_class
        self.decoders, self.rep_grad, self.multi_input, self.device = decoders, rep_grad, multi_input, device
        self.kwargs = kwargs
        if rep_grad:
            self.rep_tasks, self.rep = {}, {}
    def forward(self, inputs, task_name=None):
        rep = self.encoder(inputs)
        return {t: self.decoders[t](self._prepare_rep(rep, t, True)) for t in self.task_name if task_name in (None, t)}
    def get_share_params(self):
        return self.encoder.parameters()
    def zero_grad_share_params(self):
        self.encoder.zero_grad(set_to_none=False)
    def _prepare_rep(self, rep, task, same_rep=None):
        if not self.rep_grad:
            return rep
        if same_rep:
            self.rep = rep
        else:
            self.rep[task] = rep
        self.rep_tasks[task] = rep.detach().clone().requires_grad_()
        return self.rep_tasks[task]
class HPS(AbsArchitecture):
    def __init__(self, *args, **kwargs):
        super(HPS, self).__init__(*args, **kwargs)
        self.encoder = self.encoder_class()
__all__ = ["AbsArchitecture", "HPS"]
""",
    "weighting/__init__.py": """
import cvxpy as cp
import torch
import torch.nn as nn
from qpsolvers import solve_qp
class AbsWeighting(nn.Module):
    def init_param(self):
        pass
    def _compute_grad_dim(self):
        pass
    def _compute_grad(self, losses, mode, rep_grad=False):
        pass
    def _get_grads(self, losses, mode="backward"):
        pass
class ExcessMTL(AbsWeighting):
    def init_param(self):
        self.loss_weight, self.grad_sum, self.first_epoch = torch.ones(self.task_num), None, True
    def backward(self, losses, **kwargs):
        losses.sum().backward()
        losses.sum().backward()
class EW(AbsWeighting):
    def backward(self, losses, **kwargs):
        losses.sum().backward()
        return torch.ones(len(losses)).numpy()
class RLW(AbsWeighting):
    def backward(self, losses, **kwargs):
        weight = torch.softmax(torch.randn(len(losses)), -1)
        (losses * weight.to(losses.device)).sum().backward()
        return weight.numpy()
class GradVac(AbsWeighting):
    def backward(self, losses, **kwargs):
        self.asked = kwargs["GradVac_beta"], kwargs["GradVac_group_type"]
        losses.sum().backward()
class MoDo(AbsWeighting):
    def backward(self, losses, **kwargs):
        assert losses.shape == (3, self.task_num), losses.shape
        losses.mean(0).sum().backward()
class FAMO(AbsWeighting):
    def init_param(self):
        self.seen = []
    def backward(self, losses, **kwargs):
        self.before = losses.detach()
        losses.sum().backward()
    def update_w(self, losses):
        assert not losses.requires_grad and not torch.is_grad_enabled()
        self.seen.append(bool((losses != self.before).any()))
class UPGrad(AbsWeighting):
    def backward(self, losses, **kwargs):
        solve_qp(losses)
__all__ = ["AbsWeighting", "EW", "RLW", "GradVac", "MoDo", "FAMO", "UPGrad", "ExcessMTL"]
""",
    "trainer.py": """
import torch, torch_geometric
import torch.nn as nn
import numpy as np
import cvxpy as cp
import LibMTL.weighting as weighting_method
import LibMTL.architecture as architecture_method
class Trainer(nn.Module):
    def __init__(self, task_dict, weighting, architecture, encoder_class, decoders, rep_grad, multi_input,
                 optim_param, scheduler_param, save_path=None, load_path=None, **kwargs):
        super(Trainer, self).__init__()
        self.device = torch.device("cuda:0")
        self.task_dict, self.task_name, self.task_num = task_dict, list(task_dict), len(task_dict)
        self.multi_input, self.kwargs, self.weighting = multi_input, kwargs, weighting
        class MTLmodel(architecture_method.__dict__[architecture], weighting_method.__dict__[weighting]):
            pass
        self.model = MTLmodel(self.task_name, encoder_class, decoders, rep_grad, multi_input, self.device,
                              **kwargs["arch_args"])
        self.model.init_param()
        self.model.to(self.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=optim_param["lr"])
    def _process_data(self, loader):
        try:
            data, label = next(loader[1])
        except:
            loader[1] = iter(loader[0])
            data, label = next(loader[1])
        return data, label
    def process_preds(self, preds, task_name=None):
        return preds
    def _compute_loss(self, preds, gts, task_name=None):
        return torch.stack([self.task_dict[t]["loss_fn"]._update_loss(preds[t], gts[t]) for t in self.task_name])
    def train(self, train_dataloaders, test_dataloaders, epochs, val_dataloaders=None, return_weight=False, **kwargs):
        self.train_singlelevel(train_dataloaders, test_dataloaders, epochs, val_dataloaders, return_weight, **kwargs)
    def train_singlelevel(self, train_dataloaders, test_dataloaders, epochs, val_dataloaders=None, return_weight=False):
        loader, steps = [train_dataloaders, iter(train_dataloaders)], len(train_dataloaders)
        self.batch_weight = np.zeros([self.task_num, epochs, steps])
        self.model.train_loss_buffer = np.zeros([self.task_num, epochs])
        for epoch in range(epochs):
            self.model.epoch = epoch
            for step in range(steps):
                inputs, gts = self._process_data(loader)
                losses = self._compute_loss(self.process_preds(self.model(inputs)), gts)
                self.optimizer.zero_grad()
                w = self.model.backward(losses, **self.kwargs["weight_args"])
                if w is not None:
                    self.batch_weight[:, epoch, step] = w
                self.optimizer.step()
                self.model.train_loss_buffer[:, epoch] += losses.detach().numpy() / steps
        return self.batch_weight
""",
}

SETUP = """
import contextlib, importlib, io, json, sys, warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", ".*torch.jit.script", DeprecationWarning)  # torch_geometric says so where it is installed
sys.path.insert(0, {path!r})
for name in [n for n in sys.modules if n.split(".")[0] in ("LibMTL", "libmtl_fair")]:
    del sys.modules[name]
import numpy as np
import torch
from torch import nn
torch.set_num_threads(1)
import libmtl_fair as lf
from libmtl_fair.libmtl.loading import LINEAGE, Trainer
assert LINEAGE == "git main"
assert sys.modules["LibMTL"].__file__.startswith({path!r})

g = torch.Generator().manual_seed(0)
x = torch.randn(64, 6, generator=g)
labels = {{"a": (x[:, 0] > 0).float(), "b": (x[:, 1] > 0).float()}}
loader = lf.ResidentLoader(x, labels, batch_size=16, shuffle=True, seed=0, device="cpu")

def settings():
    torch.manual_seed(0)
    tasks = [lf.Binary("a"), lf.Binary("b")]
    return dict(task_dict=lf.task_dict(tasks), architecture="HPS", encoder_class=lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU()),
                decoders=nn.ModuleDict({{t: nn.Linear(8, 1) for t in "ab"}}), rep_grad=False, multi_input=False,
                optim_param={{"optim": "adam", "lr": 1e-2}}, scheduler_param=None)

def fair(weighting, **more):
    made = settings()
    return lf.FairTrainer(weighting=weighting, device="cpu", progress=False, select="last", seed=0, **{{**made, **more}})
"""


@pytest.fixture
def named(fresh: Any, tmp_path: Path) -> Any:
    """Run code where the stand-in is the installed LibMTL."""
    for name, text in FILES.items():
        path = tmp_path / "LibMTL" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return lambda code: fresh(SETUP.format(path=str(tmp_path)) + code)


def test_names_train_through_fair_trainer(named: Any) -> None:
    found = named("""
losses = {}
for weighting in ("EW", "RLW", "ReLiF", "MoDo", "FAMO"):
    trainer = fair(weighting)
    trainer.train(loader, epochs=4)
    losses[weighting] = trainer.epochs["loss/a"].tolist()
    if weighting == "FAMO":
        seen = trainer.model.seen
print(json.dumps([losses, seen, len(trainer.history)]))
""")
    losses, seen, steps = found
    assert all(values[-1] < values[0] for values in losses.values())
    assert seen == [True] * steps  # the losses after the step, every step
    assert steps == 16


def test_excess_risks_are_weighed_by_hand_of_parameters_and_of_the_representation(named: Any) -> None:
    """ExcessMTL, two steps of full batches: w = g' (g / sqrt(sum of g^2)), the first step's as reference."""
    found = named("""
full = lf.ResidentLoader(x, labels, batch_size=64, shuffle=False, device="cpu")
result = []
for rep_grad in (False, True):
    trainer = fair("ExcessMTL", rep_grad=rep_grad)
    seen = []
    for epoch in range(2):
        h = trainer.model.encoder(x)
        losses = [torch.nn.functional.binary_cross_entropy_with_logits(trainer.model.decoders[t](h)[:, 0], labels[t]) for t in "ab"]
        to = [h] if rep_grad else list(trainer.model.encoder.parameters())
        grads = [torch.autograd.grad(loss, to, retain_graph=True) for loss in losses]
        seen.append(torch.stack([g[0].sum(0) if rep_grad else torch.cat([p.flatten() for p in g]) for g in grads]))
        before = [p.detach().clone() for p in trainer.model.encoder.parameters()]
        trainer.train(full, epochs=epoch + 1)
        assert all(not torch.equal(a, b) for a, b in zip(before, trainer.model.encoder.parameters()))
    squares = [seen[0] ** 2, seen[0] ** 2 + seen[1] ** 2]
    w = [(g * g / torch.sqrt(s + 1e-7)).sum(1) for g, s in zip(seen, squares)]
    weights = torch.exp(w[1] / w[0] * 0.05)
    expected = (weights / weights.sum() * 2).tolist()
    result.append([trainer.history[["weight/a", "weight/b"]].to_numpy().tolist(), [[1.0, 1.0], expected]])
print(json.dumps(result))
""")
    for weights, expected in found:
        assert weights[0] == expected[0]
        assert weights[1] == pytest.approx(expected[1], rel=1e-5)


def test_hyperparameters_in_either_lineages_names(named: Any) -> None:
    assert named("""
asked = []
for args in ({}, {"beta": 0.2}, {"GradVac_beta": 0.3, "group_type": 1}):
    trainer = fair("GradVac", weight_args=args)
    trainer.train(loader, epochs=1)
    asked.append(trainer.model.asked)
print(json.dumps(asked))
""") == [[0.5, 0], [0.2, 0], [0.3, 1]]


def test_a_setting_that_git_main_lacks_is_refused_with_the_reason(named: Any) -> None:
    said = named("""
try:
    fair("RLW", weight_args={"dist": "Dirichlet"})
except lf.errors.RecipeError as error:
    print(json.dumps(str(error)))
""")
    assert (
        said
        == "RLW (LibMTL, git main): it takes no 'dist': git main always draws the weights from a normal distribution; leave it out"
    )


def test_bilevel_methods_are_left_to_libmtls_trainer(named: Any) -> None:
    said = named("""
try:
    fair("MOML")
except lf.errors.HostError as error:
    print(json.dumps(str(error)))
""")
    assert "call lf.heal() there and use LibMTL.Trainer" in said


def test_heal_and_its_own_trainer(named: Any) -> None:
    changed, again, losses, shape, device = named("""
changed = lf.heal()
trainer = Trainer(weighting="EW", weight_args={}, arch_args={}, **settings())
weights = trainer.train(loader, None, 4, return_weight=True)
print(json.dumps([changed, lf.heal(), trainer.model.train_loss_buffer.sum(0).tolist(), weights.shape, str(trainer.device)]))
""")
    assert any("return_weight=True could return None" in line for line in changed)
    assert again == []
    assert losses[-1] < losses[0]
    assert shape == [2, 4, 4]
    assert device.startswith(("cpu", "cuda"))


def test_its_save_and_load_paths(named: Any, tmp_path: Path) -> None:
    found = named(f"""
folder = {str(tmp_path / "run")!r}
first = fair("EW", save_path=folder)
first.train(loader, epochs=2)
second = fair("EW", save_path=folder, resume=True)
second.train(loader, epochs=2)
torch.save(first.model.state_dict(), folder + "/best.pt")  # as git main saves it
third = fair("EW", load_path=folder)
same = [all(torch.equal(a, b) for a, b in zip(first.model.state_dict().values(), t.model.state_dict().values())) for t in (second, third)]
print(json.dumps(same))
""")
    assert found == [True, True]


def test_the_command_line(named: Any) -> None:
    found = named("""
import LibMTL.config as config
out = io.StringIO()
with contextlib.redirect_stdout(out):
    params = config.LibMTL_args.parse_args(["--weighting", "ReLiF", "--relif_target", "0.3", "--relif_base", "GradVac", "--GradVac_beta", "0.1"])
    kwargs, optim, scheduler = config.prepare_args(params)
    trainer = fair("ReLiF", **kwargs)
print(json.dumps([kwargs["weight_args"], trainer.model.settings.target, "ReLiF" in out.getvalue()]))
""")
    assert found == [
        {"target": 0.3, "base": "GradVac", "base_args": {"GradVac_beta": 0.1, "GradVac_group_type": 0}},
        0.3,
        True,
    ]
