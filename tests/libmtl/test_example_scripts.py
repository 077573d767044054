"""Scripts in the shape of LibMTL's examples (nyu, office, qm9, xtreme) run unchanged through ``exec``.

The examples themselves are not in LibMTL's package; ``tests/harness/libmtl_examples.py`` runs them from a checkout.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

HEAD = """
import torch
import torch.nn as nn
import torch.nn.functional as F
import numpy as np
from torch.utils.data import DataLoader, Dataset, TensorDataset
import LibMTL.architecture as architecture_method
import LibMTL.weighting as weighting_method
import LibMTL.trainer
from LibMTL import Trainer
from LibMTL.config import LibMTL_args, prepare_args
from LibMTL.loss import AbsLoss, CELoss
from LibMTL.metrics import AbsMetric, AccMetric
from LibMTL.utils import set_device, set_random_seed

def chosen(params):
    if hasattr(LibMTL.trainer, "weighting_method"):
        return {"weighting": params.weighting, "architecture": params.arch}
    return {"weighting": weighting_method.__dict__[params.weighting], "architecture": architecture_method.__dict__[params.arch]}

params = LibMTL_args.parse_args()
set_device(params.gpu_id)
set_random_seed(params.seed)
kwargs, optim_param, scheduler_param = prepare_args(params)
common = dict(rep_grad=params.rep_grad, multi_input=params.multi_input, optim_param=optim_param, **chosen(params), **kwargs)
"""

NYU = """
# images to images: a task of classes and one of numbers for each pixel; outputs are resized in process_preds
class DepthLoss(AbsLoss):
    def compute_loss(self, pred, gt):
        return (pred - gt).abs().mean()

class SegLoss(AbsLoss):
    def __init__(self):
        super(SegLoss, self).__init__()
        self.loss_fn = nn.CrossEntropyLoss(ignore_index=-1)
    def compute_loss(self, pred, gt):
        return self.loss_fn(pred, gt.long())

class Pixels(AbsMetric):
    num_classes = 2
    def update_fun(self, pred, gt):
        self.record.append((pred.mean() - gt.mean()).abs().item())
        self.bs.append(pred.size()[0])
    def score_fun(self):
        return [np.mean(self.record)]

class Images(Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, i):
        g = torch.Generator().manual_seed(i)
        image = torch.rand(3, 16, 24, generator=g)
        return image, {"segmentation": (image.sum(0) > 1.5).float(), "depth": image.mean(0, keepdim=True)}

class Dilated(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(2)
        for i in range(1, 5):
            setattr(self, f"layer{i}", nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)))
        self.feature_dim = 4
    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

class NYUtrainer(Trainer):
    def __init__(self, task_dict, weighting, architecture, encoder_class, decoders, rep_grad, multi_input, optim_param,
                 scheduler_param, **kwargs):
        super(NYUtrainer, self).__init__(task_dict=task_dict, weighting=weighting, architecture=architecture,
            encoder_class=encoder_class, decoders=decoders, rep_grad=rep_grad, multi_input=multi_input,
            optim_param=optim_param, scheduler_param=scheduler_param, **kwargs)
    def process_preds(self, preds):
        for task in self.task_name:
            preds[task] = F.interpolate(preds[task], (16, 24), mode="bilinear", align_corners=True)
        return preds

task_dict = {"segmentation": {"metrics": ["err"], "metrics_fn": Pixels(), "loss_fn": SegLoss(), "weight": [0]},
             "depth": {"metrics": ["err"], "metrics_fn": Pixels(), "loss_fn": DepthLoss(), "weight": [0]}}
decoders = nn.ModuleDict({t: nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, c, 1))
                          for t, c in (("segmentation", 2), ("depth", 1))})
trained = NYUtrainer(task_dict=task_dict, encoder_class=Dilated, decoders=decoders, scheduler_param=scheduler_param, **common)
trained.train(DataLoader(Images(), batch_size=4, shuffle=True, drop_last=True), DataLoader(Images(), batch_size=4), 2)
"""

OFFICE = """
# a data set a task, a ResNet as a part of the encoder
from LibMTL.model import resnet18

class Encoder(nn.Module):
    def __init__(self):
        super(Encoder, self).__init__()
        self.resnet_network = resnet18(pretrained=False)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.hidden_layer_list = [nn.Linear(512, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5)]
        self.hidden_layer = nn.Sequential(*self.hidden_layer_list)
        self.hidden_layer[0].weight.data.normal_(0, 0.005)
    def forward(self, inputs):
        out = self.resnet_network(inputs)
        out = torch.flatten(self.avgpool(out), 1)
        return self.hidden_layer(out)

names = ["amazon", "dslr"]
task_dict = {task: {"metrics": ["Acc"], "metrics_fn": AccMetric(), "loss_fn": CELoss(), "weight": [1]} for task in names}
loaders = {task: DataLoader(TensorDataset(torch.rand(8, 3, 17, 17), torch.arange(8) % 3), batch_size=4, shuffle=True, drop_last=True)
           for task in names}
trained = Trainer(task_dict=task_dict, encoder_class=Encoder, decoders=nn.ModuleDict({t: nn.Linear(16, 3) for t in names}),
                  scheduler_param=scheduler_param, **common)
trained.train(train_dataloaders=loaders, val_dataloaders=loaders, test_dataloaders=loaders, epochs=2)
"""

QM9 = """
# batches of graphs: no tensor, list or dict, but with .to
class Graphs:
    def __init__(self, x, device=None):
        self.x, self.device = x, device
    def to(self, device, non_blocking=False):
        return Graphs(self.x.to(device), device)

class MAE(AbsMetric):
    def update_fun(self, pred, gt):
        self.record.append((pred - gt).abs().mean().item())
    def score_fun(self):
        return [np.mean(self.record)]

class MSELoss(AbsLoss):
    def __init__(self):
        super(MSELoss, self).__init__()
        self.loss_fn = nn.MSELoss()
    def compute_loss(self, pred, gt):
        return self.loss_fn(pred, gt)

class Molecules(Dataset):
    def __len__(self):
        return 24
    def __getitem__(self, i):
        x = torch.rand(6, generator=torch.Generator().manual_seed(i))
        return x, {"0": x[:1], "11": x[1:2] - x[2:3]}

def joined(rows):
    return Graphs(torch.stack([x for x, _ in rows])), {t: torch.stack([y[t] for _, y in rows]) for t in ("0", "11")}

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin0, self.lin1 = nn.Linear(6, 8), nn.Linear(8, 8)
    def forward(self, data):
        assert data.device is not None
        return F.relu(self.lin1(F.relu(self.lin0(data.x))))

reduced = {"scheduler": "reduce", "mode": "max", "factor": 0.7, "patience": 5, "min_lr": 0.00001}  # git main's
task_dict = {t: {"metrics": ["MAE"], "metrics_fn": MAE(), "loss_fn": MSELoss(), "weight": [0]} for t in ("0", "11")}
loader = DataLoader(Molecules(), batch_size=8, shuffle=True, collate_fn=joined)
trained = Trainer(task_dict=task_dict, encoder_class=Net, decoders=nn.ModuleDict({t: nn.Linear(8, 1) for t in task_dict}),
                  scheduler_param=reduced if hasattr(LibMTL.trainer, "weighting_method") else scheduler_param, **common)
trained.train(loader, loader, 2, val_dataloaders=loader)
"""

XTREME = """
# a Trainer that takes batches of four tensors apart itself and makes its optimiser
class Encoder(nn.Module):
    def __init__(self):
        super(Encoder, self).__init__()
        self.words, self.out = nn.Embedding(20, 8), nn.Linear(8, 8)
    def forward(self, inputs):
        mask = inputs["attention_mask"].unsqueeze(-1)
        return torch.tanh(self.out((self.words(inputs["input_ids"]) * mask).sum(1)))

class SCtrainer(Trainer):
    def _process_data(self, loader):
        try:
            data_batch = loader[1].next()
        except:
            loader[1] = iter(loader[0])
            data_batch = loader[1].next()
        data_batch = tuple(t.cuda(non_blocking=True) for t in data_batch if t is not None)
        return {"input_ids": data_batch[0], "attention_mask": data_batch[1], "token_type_ids": data_batch[2]}, data_batch[3]
    def _prepare_optimizer(self, optim_param, scheduler_param):
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-3, eps=1e-8)
        self.scheduler = None

names = ["en", "de"]
def tokens(n):
    ids = torch.randint(0, 20, (n, 5))
    return TensorDataset(ids, torch.ones(n, 5, dtype=torch.long), torch.zeros(n, 5, dtype=torch.long), (ids[:, 0] > 9).long())
task_dict = {t: {"metrics": ["Acc"], "metrics_fn": AccMetric(), "loss_fn": CELoss(), "weight": [1]} for t in names}
loaders = {t: DataLoader(tokens(16), batch_size=8, num_workers=0, drop_last=True) for t in names}
trained = SCtrainer(task_dict=task_dict, encoder_class=Encoder, decoders=nn.ModuleDict({t: nn.Sequential(nn.Dropout(0.1), nn.Linear(8, 2)) for t in names}),
                    scheduler_param=scheduler_param, **common)
trained.train(train_dataloaders=loaders, val_dataloaders=loaders, test_dataloaders=loaders, epochs=2)
assert type(trained.optimizer) is torch.optim.AdamW
"""

CODE = """
import contextlib, io, json, warnings
import torch
torch.set_num_threads(1)
from libmtl_fair.libmtl.script import run_script
out = io.StringIO()
with contextlib.redirect_stdout(out), warnings.catch_warnings(record=True):
    try:
        found = run_script({path!r}, {args!r})["trained"]
        print(json.dumps([float(found.model.train_loss_buffer.sum()), len(getattr(found.model, "events", []))]))
    except Exception as error:
        print(json.dumps(f"{{type(error).__name__}}: {{error}}"))
print(out.getvalue().strip().splitlines()[-1])
"""
BRANCHED = ("--arch", "FairBranch", "--fairbranch_threshold", "1.0", "--weighting")
PATHS = ("--fairbranch_blocks", '["resnet_network.layer3", "resnet_network.layer4", "hidden_layer"]')


@pytest.mark.parametrize(
    ("script", "args"),
    [
        (NYU, ("--weighting", "EW")),
        (NYU, ("--weighting", "MGDA", "--rep_grad")),
        (NYU, (*BRANCHED, "PCGrad")),
        (NYU, ("--weighting", "ReLiF")),
        (NYU, (*BRANCHED, "ReLiF")),
        (OFFICE, ("--weighting", "EW", "--multi_input")),
        (OFFICE, ("--weighting", "ReLiF", "--relif_pairs", "random", "--multi_input")),
        (OFFICE, (*BRANCHED, "EW", "--multi_input", *PATHS)),
        (QM9, ("--weighting", "UW")),
        (QM9, ("--weighting", "ReLiF", "--relif_pairs", "random")),
        (XTREME, ("--weighting", "EW", "--multi_input")),
        (XTREME, ("--weighting", "ReLiF", "--relif_pairs", "random", "--multi_input")),
    ],
)
def test_a_script_in_the_shape_of_an_example(fresh: Any, tmp_path: Path, script: str, args: tuple[str, ...]) -> None:
    path = tmp_path / "main.py"
    path.write_text(HEAD + script)
    found = fresh(CODE.format(path=str(path), args=list(args)))
    assert isinstance(found, list), found
    loss, events = found
    assert loss > 0
    assert events == (2 if script is NYU and "FairBranch" in args else 0)  # office's goes back to its best epoch


def test_pixels_are_no_people_where_nothing_says_what_they_are(fresh: Any, tmp_path: Path) -> None:
    path = tmp_path / "main.py"
    path.write_text(HEAD + NYU.replace("num_classes = 2", "pass"))
    assert "task 'segmentation': ReLiF compares people" in fresh(
        CODE.format(path=str(path), args=["--weighting", "ReLiF"])
    )
