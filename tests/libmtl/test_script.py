"""``run_script``: a user's LibMTL script runs as it is."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import libmtl_fair as lf
from libmtl_fair import cli
from libmtl_fair.libmtl.script import run_script

SCRIPT = '''
"""A small script as LibMTL's examples write them."""
import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import LibMTL.architecture as architecture_method
import LibMTL.weighting as weighting_method
from LibMTL import Trainer
from LibMTL.config import LibMTL_args, prepare_args
from LibMTL.loss import CELoss
from LibMTL.metrics import AccMetric
from LibMTL.utils import set_random_seed

import helper  # beside the script


class Rows(Dataset):
    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(64, 6, generator=generator)

    def __len__(self):
        return 64

    def __getitem__(self, i):
        return self.x[i], {"a": (self.x[i, 0] > 0).long(), "b": (self.x[i, 1] > 0).long()}


class MyTrainer(Trainer):
    def process_preds(self, preds, task_name=None):
        helper.calls.append(task_name)
        return {task: 2 * value for task, value in preds.items()}


def main(params):
    kwargs, optim_param, scheduler_param = prepare_args(params)
    set_random_seed(params.seed)
    task_dict = {t: {"metrics": ["Acc"], "metrics_fn": AccMetric(), "loss_fn": CELoss(), "weight": [1]} for t in "ab"}

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Sequential(nn.Linear(6, 8), nn.ReLU())

        def forward(self, x):
            return self.layer(x)

    by_name = params.by_name
    trainer = MyTrainer(
        task_dict=task_dict,
        weighting=params.weighting if by_name else weighting_method.__dict__[params.weighting],
        architecture=params.arch if by_name else architecture_method.__dict__[params.arch],
        encoder_class=Encoder,
        decoders=nn.ModuleDict({t: nn.Linear(8, 2) for t in "ab"}),
        rep_grad=params.rep_grad,
        multi_input=params.multi_input,
        optim_param=optim_param,
        scheduler_param=scheduler_param,
        **kwargs,
    )
    loader = DataLoader(Rows(), batch_size=16, shuffle=True)
    trainer.train(loader, DataLoader(Rows(), batch_size=32), 2)
    return trainer


if __name__ == "__main__":
    LibMTL_args.add_argument("--by_name", action="store_true")
    trained = main(LibMTL_args.parse_args())
'''

COMMON = """
import contextlib, io, json, sys, warnings
import torch
torch.set_num_threads(1)
import libmtl_fair as lf
from libmtl_fair.libmtl.loading import LINEAGE
from libmtl_fair.libmtl.script import run_script
by_name = ["--by_name"] if LINEAGE == "git main" else []
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "helper.py").write_text("calls = []\n")
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return path


def run(fresh: Any, script: Path, *args: str) -> Any:
    return fresh(f"""{COMMON}
out = io.StringIO()
with contextlib.redirect_stdout(out), warnings.catch_warnings(record=True):
    found = run_script({str(script)!r}, [*{list(args)!r}, *by_name])
trainer = found["trained"]
print(json.dumps({{
    "out": out.getvalue(), "type": [c.__name__ for c in type(trainer).__mro__], "main": found["__name__"],
    "calls": len(found["helper"].calls), "argv": sys.argv, "path": {str(script.parent)!r} in sys.path,
    "losses": trainer.model.train_loss_buffer.sum(0).tolist(),
    "history": list(trainer.history.columns) if hasattr(trainer, "history") else None,
}}))
""")


def test_a_plain_script_trains_on_the_cpu(fresh: Any, script: Path) -> None:
    found = run(fresh, script, "--weighting", "EW", "--lr", "0.01")
    assert found["main"] == "__main__"
    assert "FairTrainer" not in found["type"]
    assert found["losses"][1] < found["losses"][0]
    assert found["calls"] > 0
    assert "Epoch: 0001 | TRAIN" in found["out"]
    assert str(script) not in found["argv"]
    assert not found["path"]


def test_a_module_of_a_package_runs_as_python_m_runs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "their_script"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "inner" / "__init__.py").write_text("import a_module_of_nobody")
    (package / "names.py").write_text("here = 3\n")
    (package / "train.py").write_text(
        "import sys\nfrom LibMTL import Trainer\nfrom .names import here\nargs = list(sys.argv)\n"
    )
    (package / "__main__.py").write_text("from .train import *\nfound = here, __name__\n")
    monkeypatch.chdir(tmp_path)
    held = list(sys.path), list(sys.argv)
    found = run_script("their_script.train", ["--weighting", "ReLiF"], module=True)
    assert (found["here"], found["__name__"], found["Trainer"].__module__) == (
        3,
        "__main__",
        "libmtl_fair.libmtl.script",
    )  # type: ignore[attr-defined]
    assert found["args"] == [str(package / "train.py"), "--weighting", "ReLiF"]
    assert run_script("their_script", module=True)["found"] == (3, "__main__")
    for name in ("their_script.nothing", "nothing.train"):
        with pytest.raises(lf.errors.RecipeError, match=rf"no module '{name}' in "):
            run_script(name, module=True)
    with pytest.raises(ModuleNotFoundError, match="a_module_of_nobody"):
        run_script("their_script.inner.train", module=True)
    assert (sys.path, sys.argv) == held
    for name in [name for name in sys.modules if name.partition(".")[0] == "their_script"]:
        del sys.modules[name]


def test_the_command_takes_arguments_as_python_does(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "say.py"
    script.write_text("import sys\nfrom LibMTL.config import LibMTL_args\nprint(sys.argv[1:], LibMTL_args.prog)\n")
    cases = ([], ["--"], ["-m", "3"], ["--", "--help"], ["--help", "--", "x"])
    for case in cases:
        assert cli.app(["exec", str(script), *case], standalone_mode=False) in (None, 0)
    expected = [f"{case[1:] if case[:1] == ['--'] else case} say.py" for case in cases]
    assert capfd.readouterr().out.splitlines() == expected


@pytest.mark.parametrize("choice", [["--weighting", "ReLiF"], ["--weighting=ReLiF"], ["--weighti", "ReLiF"]])
def test_a_script_asks_for_one_of_ours(fresh: Any, script: Path, choice: list[str]) -> None:
    found = run(fresh, script, *choice, "--relif_target", "0.2", "--relif_base", "GradNorm", "--lr", "0.01")
    assert found["type"][0] == "MyTrainer"
    assert {"ScriptTrainer", "FairTrainer"} < set(found["type"])
    assert found["losses"][1] < found["losses"][0]
    assert found["calls"] > 0
    assert {"lambda", "r", "lipschitz", "weight/a"} <= set(found["history"])
    for part in ("Wighting: ReLiF", "base: GradNorm", "Epoch: 0001 | TRAIN: a", "TEST: a/loss"):
        assert part in found["out"]


OWN = """
import torch
from torch import nn
import LibMTL
from LibMTL.trainer import Trainer
from LibMTL import architecture, weighting
import libmtl_fair as lf

class Mine(Trainer):
    # chooses its weighting itself, and calls its base class by name

    def __init__(self, name):
        tasks = [lf.Binary("a"), lf.Binary("b")]
        chosen = [name, "HPS"]
        if not hasattr(LibMTL.trainer, "weighting_method"):
            chosen = [getattr(weighting, name), architecture.HPS]
        Trainer.__init__(self, lf.task_dict(tasks), *chosen, lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU()).cuda(),
                         nn.ModuleDict({t: nn.Linear(8, 1) for t in "ab"}), False, False, {"optim": "adam", "lr": 1e-2}, None,
                         weight_args={}, arch_args={})
        assert isinstance(self, Mine) and isinstance(self, Trainer)

x = torch.randn(32, 6).cuda()
loader = lf.ResidentLoader(x, {t: (x[:, i] > 0).float() for i, t in enumerate("ab")}, batch_size=16, shuffle=True, device="cpu")
found = {}
for name in ("EW", "ReLiF", "EW"):  # one after another, in one script: each what it asks for
    trainer = Mine(name)
    trainer.train(loader, loader, 1)
    found.setdefault(name, []).append(hasattr(trainer, "history"))
signature = Trainer.process_preds is not None
"""


def test_what_a_script_builds_decides_and_not_its_arguments(fresh: Any, tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    assert fresh(f"""{COMMON}
cuda = torch.Tensor.cuda, torch.nn.Module.cuda
with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(record=True):
    found = run_script({str(path)!r}, ["--weighting", "Nobody"])
assert cuda == (torch.Tensor.cuda, torch.nn.Module.cuda)
print(json.dumps(found["found"]))
""") == {"EW": [False, False], "ReLiF": [True]}


def test_a_script_swapped_to_fair_trainer(fresh: Any, script: Path) -> None:
    script.write_text(SCRIPT.replace("from LibMTL import Trainer", "from libmtl_fair import FairTrainer as Trainer"))
    found = run(fresh, script, "--weighting", "ReLiF", "--relif_prototypes", "confident", "--lr", "0.01")
    assert "FairTrainer" in found["type"]
    assert "ScriptTrainer" not in found["type"]
    assert "lambda" in found["history"]


def test_libmtls_own_trainer_comes_back(fresh: Any, script: Path) -> None:
    assert fresh(f"""{COMMON}
import LibMTL
with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(record=True):
    run_script({str(script)!r}, ["--weighting", "ReLiF", *by_name])
print(json.dumps([LibMTL.Trainer.__name__, LibMTL.trainer.Trainer.__module__]))
""") == ["Trainer", "LibMTL.trainer"]


@pytest.mark.parametrize(
    ("statement", "error"), [("raise KeyError('mine')", KeyError), ("import sys; sys.exit(3)", SystemExit)]
)
def test_the_scripts_own_exception_goes_through(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, statement: str, error: type[BaseException]
) -> None:
    monkeypatch.setattr("libmtl_fair.libmtl.script.heal", list)
    path = tmp_path / "fails.py"
    path.write_text(statement)
    argv, search = list(sys.argv), list(sys.path)
    with pytest.raises(error, match="mine|3"):
        run_script(path, ["--x"])
    assert (sys.argv, sys.path) == (argv, search)


def test_arguments_and_folder_are_the_scripts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("libmtl_fair.libmtl.script.heal", list)
    path = tmp_path / "shows.py"
    path.write_text("import json, sys\nshown = json.dumps([sys.argv, sys.path[0], __name__, __file__])")
    shown = json.loads(run_script(path, ["--a", "1"])["shown"])
    assert shown == [[str(path), "--a", "1"], str(tmp_path), "__main__", str(path)]


def test_no_script(tmp_path: Path) -> None:
    with pytest.raises(lf.errors.RecipeError, match=r"no script at .*absent\.py; expected a Python file"):
        run_script(tmp_path / "absent.py")
