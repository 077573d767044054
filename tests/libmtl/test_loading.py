"""LibMTL loads whatever state torchvision and its other requirements are in, and nothing else is changed.

Each case runs in a process of its own with a fake torchvision (or LibMTL) on its path.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import libmtl_fair as lf
from libmtl_fair.errors import HostError
from libmtl_fair.libmtl import loading

REPORT = """
import importlib, importlib.util, json, sys, types
root = {root!r}
for name in [n for n in sys.modules if n.split(".")[0] in ("LibMTL", "libmtl_fair", "torchvision")]:
    del sys.modules[name]
for name, folder in (("libmtl_fair", root), ("libmtl_fair.libmtl", root + "/libmtl")):  # without running their __init__
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [folder]
if {path!r}:
    sys.path.insert(0, {path!r})
importlib.invalidate_caches()
{before}
held = {{n: id(m) for n, m in sys.modules.items() if n.split(".")[0] == "torchvision"}}
try:
    import libmtl_fair.libmtl.loading as loading
    said = loading.LINEAGE
except Exception as error:
    said = f"{{type(error).__name__}}: {{error}}"
now = {{n: id(m) for n, m in sys.modules.items() if n.split(".")[0] in ("torchvision", "cvxpy", "qpsolvers", "torch_geometric")}}
libmtl = sorted(n for n in sys.modules if n.split(".")[0] == "LibMTL")
print(json.dumps([said, held == {{n: i for n, i in now.items() if n.split(".")[0] == "torchvision"}}, sorted(now), libmtl]))
"""


@pytest.fixture
def load(fresh: Any) -> Any:
    root = str(Path(lf.__file__).parent)
    return lambda path="", before="": fresh(REPORT.format(root=root, path=str(path), before=before))


def package(folder: Path, name: str, init: str, **modules: str) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(init)
    for module, text in modules.items():
        (folder / name / f"{module}.py").write_text(text)


def test_torchvision_as_it_is_here(load: Any) -> None:
    said, same, present, libmtl = load()
    assert said in ("package", "git main")
    assert same
    assert "LibMTL.trainer" in libmtl
    assert not any(n.startswith("torchvision.models.utils") for n in present)


def test_torchvision_of_another_build(load: Any, tmp_path: Path) -> None:
    """Importing it raises RuntimeError, and leaves half of its submodules behind."""
    package(
        tmp_path,
        "torchvision",
        "from torchvision import models\nraise RuntimeError('operator torchvision::nms')",
        models="x = 1",
    )
    before = """
try:
    import torchvision
except RuntimeError:
    pass
assert "torchvision.models" in sys.modules and "torchvision" not in sys.modules
"""
    said, same, present, _ = load(tmp_path, before)
    assert said in ("package", "git main")
    assert same  # what was half loaded is what it was
    assert present == ["torchvision.models"]


def test_a_present_torchvision_is_put_back(load: Any, tmp_path: Path) -> None:
    package(tmp_path, "torchvision", "from torchvision import models, ops", models="resnet = 'real'", ops="x = 1")
    said, same, present, _ = load(tmp_path, "import torchvision.models")
    assert said in ("package", "git main")
    assert same
    assert present == ["torchvision", "torchvision.models", "torchvision.ops"]


def test_a_torchvision_imported_later_is_the_users(fresh: Any, tmp_path: Path) -> None:
    package(tmp_path, "torchvision", "from torchvision import models", models="resnet = 'real'")
    found = fresh(f"""
import json, sys
sys.path.insert(0, {str(tmp_path)!r})
import torchvision
print(json.dumps(torchvision.models.resnet))
""")
    assert found == "real"


@pytest.mark.parametrize("installed", [True, False])
def test_a_requirement_that_asks_for_torchvision_hears_the_truth(load: Any, tmp_path: Path, installed: bool) -> None:
    """As torch_geometric asks, which LibMTL's git main imports at start."""
    ask = f"from importlib.util import find_spec\nassert (find_spec('torchvision') is not None) is {installed}"
    package(tmp_path, "torch_geometric", ask)
    package(tmp_path, "LibMTL", "import torch_geometric\nraise ImportError('came so far')")
    if installed:
        package(tmp_path, "torchvision", "")
    said, same, present, _ = load(tmp_path, "" if installed else "sys.modules['torchvision'] = None")
    assert "came so far" in said
    assert same
    assert "torch_geometric" in present


BERT = """
from transformers import BertConfig, BertModel
made = BertModel(BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4))
"""


def test_transformers_after_us_and_before_us(load: Any, fresh: Any) -> None:
    """torchvision is hidden: a build for another torch, as one may find it, fails in transformers itself."""
    pytest.importorskip("transformers")
    hidden = "import json, sys\nsys.modules['torchvision'] = None\n"
    assert fresh(f"{hidden}{BERT}\nprint(json.dumps(sum(p.numel() for p in made.parameters())))") > 100
    said, same, _, _ = load(before=f"{hidden}{BERT}")
    assert said in ("package", "git main")
    assert same


def test_no_libmtl(load: Any) -> None:
    hide = """
import importlib.abc
class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "LibMTL":
            raise ModuleNotFoundError("No module named 'LibMTL'", name="LibMTL")
sys.meta_path.insert(0, Hide())
"""
    said, same, _, libmtl = load(before=hide)
    assert said == "HostError: LibMTL is not installed: pip install libmtl (or put a clone of its git main on sys.path)"
    assert same
    assert libmtl == []


def test_a_requirement_of_libmtl_is_missing(load: Any, tmp_path: Path) -> None:
    package(tmp_path, "LibMTL", "import a_module_of_nobody")
    said, same, _, libmtl = load(tmp_path)
    assert said.startswith(
        "HostError: LibMTL needs the module 'a_module_of_nobody', which is not installed: pip install"
    )
    assert same
    assert libmtl == []


@pytest.mark.parametrize("fault", ["raise RuntimeError('bad build')", "from torch import nothing_such", "a = ("])
def test_a_libmtl_that_does_not_import(load: Any, tmp_path: Path, fault: str) -> None:
    package(tmp_path, "LibMTL", "from . import inner", inner=fault)
    said, same, _, libmtl = load(tmp_path)
    assert said.startswith("HostError: LibMTL was found but does not import (")
    assert said.endswith("reinstall it: pip install libmtl")
    assert same
    assert libmtl == []


@pytest.mark.parametrize("fault", ["import a_module_of_nobody", "raise OSError('undefined symbol')"])
def test_a_requirement_that_does_not_import_is_stood_in_for(load: Any, tmp_path: Path, fault: str) -> None:
    """As a torch_geometric of another torch, or a cvxpy without one of its solvers: LibMTL's git main imports both at start."""
    package(tmp_path, "torch_geometric", f"from . import inner\n{fault}", inner="")
    init = "import torch_geometric\ntry:\n    torch_geometric.loader()\nexcept ValueError as error:\n    raise ImportError(error)"
    package(tmp_path, "LibMTL", init)
    said, same, present, libmtl = load(tmp_path)
    assert "this LibMTL method needs torch_geometric, which does not import here (" in said
    assert "a_module_of_nobody" in said or "OSError: undefined symbol" in said
    assert same
    assert not {"torch_geometric", "torch_geometric.inner"} & set(present)
    assert libmtl == []


def test_loaded_twice_is_loaded_once() -> None:
    assert loading.load_libmtl() is loading.libmtl


def test_what_stands_for_a_missing_package_says_so_when_called() -> None:
    absent = loading._Absent("cvxpy")
    with pytest.raises(HostError, match=r"this LibMTL method needs cvxpy, which is not installed: pip install cvxpy"):
        absent.Variable(3)
    with pytest.raises(AttributeError, match="__path__"):
        _ = absent.__path__
