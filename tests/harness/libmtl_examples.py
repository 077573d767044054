"""Run the examples of a LibMTL checkout unchanged, on small data in their format, through ``libmtl-fair exec``.

    python tests/harness/libmtl_examples.py --repo LibMTL [--only nyu cityscapes office qm9 xtreme] [--weighting EW ReLiF] [--keep DIR]

The checkout is copied; only data, weights that would be downloaded and lists of files are made, never a line of a script.
What has to be there beside LibMTL: torch_geometric for qm9, transformers 4 for xtreme (5 has no DataProcessor). torchvision's transforms, which office
needs, are stood in for where torchvision does not import; ``transformers.AdamW``, which is gone, is torch's for xtreme.
Prints one line a run and ends with 1 if one of them failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

PRELUDE = """
import sys
for name in {hide!r}:
    sys.modules[name] = None
if {adamw}:
    import torch, transformers
    vars(transformers).setdefault("AdamW", torch.optim.AdamW)
from libmtl_fair.cli import main
sys.argv = ["libmtl-fair", "exec", *{arguments!r}]
main()
"""
TRANSFORMS = '''"""Stands for torchvision.transforms where torchvision does not import."""
import numpy as np
import torch
class Compose:
    def __init__(self, steps): self.steps = steps
    def __call__(self, x):
        for step in self.steps: x = step(x)
        return x
class Resize:
    def __init__(self, size): self.size = size
    def __call__(self, image): return image.resize((32, 32))
class ToTensor:
    def __call__(self, image): return torch.from_numpy(np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 255)
class Normalize:
    def __init__(self, mean, std): self.mean, self.std = (torch.tensor(v).view(3, 1, 1) for v in (mean, std))
    def __call__(self, x): return (x - self.mean) / self.std
'''


class Example(NamedTuple):
    """How an example is run: what makes its data and gives its arguments, and its weightings."""

    prepare: Callable[[Path, Path], list[str]]
    runs: Sequence[tuple[str, ...]]


def weights(work: Path, name: str) -> None:
    """Put a ResNet's weights where torch.hub would download them to: of chance, since nothing is downloaded here."""
    code = f"""
import torch, libmtl_fair
from LibMTL.model import resnet
url = resnet.model_urls[{name!r}]
torch.save(getattr(resnet, {name!r})(pretrained=False).state_dict(), {str(work)!r} + "/hub/checkpoints/" + url.rsplit("/", 1)[1])
"""
    (work / "hub" / "checkpoints").mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def nyu(repo: Path, work: Path) -> list[str]:
    """Four images; labels have the size that the script resizes its outputs to."""
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for i in range(2):
            made = {
                "image": rng.random((32, 48, 3)),
                "label": rng.integers(-1, 13, (288, 384)).astype(float),
                "depth": rng.random((288, 384, 1)) + 0.5,
                "normal": rng.standard_normal((288, 384, 3)),
            }
            for name, values in made.items():
                (work / part / name).mkdir(parents=True, exist_ok=True)
                np.save(work / part / name / f"{i}.npy", values.astype(np.float32))
    weights(work, "resnet50")
    return ["--train_bs", "2", "--test_bs", "2", "--epochs", "1", "--dataset_path", str(work)]


def cityscapes(repo: Path, work: Path) -> list[str]:
    """Four images; labels have the size that the script resizes its outputs to."""
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for i in range(2):
            made = {
                "image": rng.random((32, 64, 3)),
                "label": rng.integers(-1, 7, (128, 256)).astype(float),
                "depth": rng.random((128, 256, 1)) + 0.5,
            }
            for name, values in made.items():
                (work / part / name).mkdir(parents=True, exist_ok=True)
                np.save(work / part / name / f"{i}.npy", values.astype(np.float32))
    weights(work, "resnet50")
    return ["--train_bs", "2", "--test_bs", "2", "--epochs", "1", "--dataset_path", str(work)]


def office(repo: Path, work: Path) -> list[str]:
    """The first twelve images of each list, in noise."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for listed in (repo / "examples" / "office" / "data_txt" / "office-31").glob("*.txt"):
        lines = listed.read_text().splitlines()[::7][:12]
        listed.write_text("".join(line + "\n" for line in lines))
        for line in lines:
            path = work / line.split(" ")[0]
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)
    weights(work, "resnet18")
    return ["--multi_input", "--bs", "6", "--epochs", "1", "--dataset_path", str(work)]


def qm9(repo: Path, work: Path) -> list[str]:
    """Molecules of three atoms, processed as QM9 is; a split that names some of them many times, since its parts are fixed."""
    code = f"""
import torch
from torch_geometric.data import Data, InMemoryDataset
g = torch.Generator().manual_seed(0)
edges = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
rows = [Data(x=torch.rand(3, 11, generator=g), edge_index=edges, edge_attr=torch.rand(4, 4, generator=g),
             y=torch.randn(1, 19, generator=g), pos=torch.rand(3, 3, generator=g)) for _ in range(64)]
InMemoryDataset.save(rows, {str(work / "processed" / "data_v3.pt")!r})
torch.save(torch.arange(20256) % 64, {str(work / "random_split.t")!r})
"""
    for folder in ("raw", "processed"):
        (work / folder).mkdir(parents=True)
    for name in ("qm9_v3.pt", "gdb9.sdf", "gdb9.sdf.csv", "uncharacterized.txt"):
        (work / "raw" / name).touch()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    return ["--bs", "256", "--epochs", "1", "--target", "0", "1", "11", "--dataset_path", str(work)]


def xtreme(repo: Path, work: Path) -> list[str]:
    """Sentence pairs in four languages, and a BERT of one layer under the name that the script loads."""
    words = [f"word{i}" for i in range(40)]
    rng = np.random.default_rng(0)
    (work / "pawsx").mkdir(parents=True)
    for part in ("train", "dev", "test"):
        for language in ("en", "zh", "de", "es"):
            rows = [[*(" ".join(rng.choice(words, 6)) for _ in range(2)), str(i % 2)] for i in range(8)]
            text = "".join("\t".join(row) + "\n" for row in [["sentence1", "sentence2", "label"], *rows])
            (work / "pawsx" / f"{part}-{language}.tsv").write_text(text)
    bert = work / "bert-base-multilingual-cased"
    bert.mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (bert / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    code = f"""
import sys
sys.modules["torchvision"] = None
from transformers import BertConfig, BertModel
made = BertConfig(vocab_size={len(vocabulary)}, hidden_size=768, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
BertModel(made).save_pretrained({str(bert)!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    return ["--multi_input", "--bs", "4", "--epochs", "1", "--dataset_path", str(work)]


BRANCH = ("--arch", "FairBranch")
EXAMPLES = {
    "nyu": Example(nyu, [("EW",), ("PCGrad",), ("ReLiF",), ("EW", *BRANCH), ("ReLiF", *BRANCH)]),
    "cityscapes": Example(cityscapes, [("EW",), ("ReLiF",)]),
    "office": Example(office, [("EW",), ("MGDA",), ("ReLiF",), ("EW", *BRANCH), ("ReLiF", *BRANCH)]),
    "qm9": Example(qm9, [("EW",), ("UW",), ("ReLiF",)]),
    "xtreme": Example(xtreme, [("EW",), ("ReLiF",)]),
}


def imports(name: str) -> bool:
    """Whether a module imports in a process of its own."""
    return subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True).returncode == 0


def run(name: str, example: Example, checkout: Path, keep: Path, only: Sequence[str] | None) -> bool:
    """Run one example with each of its weightings; return whether all did."""
    repo, work, fine = keep / "LibMTL", keep / name, True
    shutil.rmtree(work, ignore_errors=True)
    shutil.rmtree(repo, ignore_errors=True)
    shutil.copytree(checkout, repo, ignore=shutil.ignore_patterns(".git"))
    work.mkdir(parents=True)
    paths = [str(repo), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    hide: list[str] = []
    if not imports("torchvision"):
        if name == "office":
            (work / "torchvision").mkdir()
            (work / "torchvision" / "__init__.py").touch()
            (work / "torchvision" / "transforms.py").write_text(TRANSFORMS)
            paths.insert(0, str(work))
        else:
            hide.append("torchvision")
    os.environ.update(PYTHONPATH=os.pathsep.join(paths), TORCH_HOME=str(work), MPLBACKEND="Agg")
    try:
        arguments = example.prepare(repo, work)
    except subprocess.CalledProcessError as error:
        sys.stdout.write(f"{name:8} not run: {error.stderr.decode().strip().splitlines()[-1]}\n")
        return False
    for weighting, *more in example.runs:
        if only and weighting not in only:
            continue
        script = str(repo / "examples" / name / "main.py")
        chosen = [script, "--", "--weighting", weighting, *more, *arguments]
        code = PRELUDE.format(hide=hide, adamw=name == "xtreme", arguments=chosen)
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=Path(script).parent
        )
        said = (done.stdout + done.stderr).strip().splitlines()
        fine &= done.returncode == 0
        what = "runs" if done.returncode == 0 else "FAILED"
        last = next((line for line in reversed(said) if line.strip("= ")), "")
        sys.stdout.write(f"{name:8} {weighting:8} {' '.join(more):18} {what}: {last[:200]}\n")
        sys.stdout.flush()
        (work / f"{weighting}{''.join(more)}.log").write_text(json.dumps(chosen) + "\n" + "\n".join(said))
    return fine


def main() -> int:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo", type=Path, required=True, help="a checkout of LibMTL's git main")
    parser.add_argument("--only", nargs="+", choices=EXAMPLES, default=list(EXAMPLES), help="examples")
    parser.add_argument("--weighting", nargs="+", help="only these weightings")
    parser.add_argument("--keep", type=Path, help="folder for data and logs; default: one that is removed")
    args = parser.parse_args()
    before = dict(os.environ)
    with tempfile.TemporaryDirectory() as folder:
        fine = True
        for name in args.only:
            os.environ.clear()
            os.environ.update(before)
            fine &= run(name, EXAMPLES[name], args.repo, (args.keep or Path(folder)).resolve(), args.weighting)
    return 0 if fine else 1


if __name__ == "__main__":
    raise SystemExit(main())
