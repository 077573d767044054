"""FairStep in Lightning, Accelerate and Hugging Face's Trainer: real short runs, which a plain loop agrees with."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from loop_kit import FEATURES, TASKS, losses_of, made, make_loader
from torch import Tensor, nn

import libmtl_fair as lf

METHOD: tuple[str, dict[str, Any]] = ("FairMT", {"form": "phi", "min_count": 1, "base": "EW"})
pytestmark = [
    pytest.mark.usefixtures("torchvision_imports"),
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning:(lightning|pytorch_lightning|accelerate|transformers|torch)"
    ),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is downloaded; what a library puts into the environment goes again."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    held = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(held)


def step_of(net: Any, entries: Any, steps: int) -> lf.FairStep:
    return lf.FairStep(
        METHOD[0], entries, net.heads, n_groups={"sex": 2, "race": 3}, epochs=2, epoch_steps=steps, **METHOD[1]
    )


def plain(loader: Any) -> Any:
    """Train two epochs in a plain loop."""
    entries, net = made(TASKS)
    fair = step_of(net, entries, len(loader))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(2):
        for x, labels in loader:
            h, outputs = net(x)
            optimizer.zero_grad()
            fair.backward(losses_of(entries, outputs, labels), representation=h, outputs=outputs, labels=labels)
            optimizer.step()
        fair.close_epoch()
    return net, fair


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    entries, net = made(TASKS)
    loader = make_loader(shuffle=False)

    class Module(lightning.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.net = net
            self.fair = step_of(net, entries, len(loader))

        def training_step(self, batch: Any, _: int) -> None:
            x, labels = batch
            h, outputs = self.net(x)
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.fair.backward(losses_of(entries, outputs, labels), representation=h, outputs=outputs, labels=labels)
            optimizer.step()
            self.log_dict(self.fair.trace, batch_size=len(x))

        def on_train_epoch_end(self) -> None:
            self.fair.close_epoch()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, enable_checkpointing=False,
    )  # fmt: skip
    module = Module()
    trainer.fit(module, loader)
    assert_same(module.net, plain(make_loader(shuffle=False))[0])
    assert torch.isfinite(trainer.logged_metrics["phi"])
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    found = torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"]
    module.fair.load_state_dict(
        {name.removeprefix("fair."): value for name, value in found.items() if name.startswith("fair.")}
    )
    assert module.fair.epoch == 2


def test_accelerate(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    entries, net = made(TASKS)
    loader = make_loader()
    data = [
        (x, {**labels, "sensitive": labels["sensitive"]}) for x, labels in [*loader, *loader]
    ]  # what a DataLoader would give
    accelerator = accelerate.Accelerator(cpu=True)
    fair = step_of(net, entries, len(loader))
    model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
    accelerator.register_for_checkpointing(fair)
    for i, (x, labels) in enumerate(data):
        with accelerator.no_sync(model):
            h, outputs = model(x.to(accelerator.device))
            optimizer.zero_grad()
            fair.backward(losses_of(entries, outputs, labels), representation=h, outputs=outputs, labels=labels)
        optimizer.step()
        if (i + 1) % len(loader) == 0:
            fair.close_epoch()
    assert_same(net, plain(make_loader())[0])
    accelerator.save_state(tmp_path / "state")
    trace, fair.global_step = fair.trace, 0
    accelerator.load_state(tmp_path / "state")
    assert (fair.global_step, fair.epoch, fair.trace) == (6, 2, trace)


class Text(nn.Module):
    """A small transformer made from a config, and a head a task."""

    def __init__(self, transformers: Any) -> None:
        super().__init__()
        config = transformers.BertConfig(
            vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, max_position_embeddings=8,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        self.encoder = transformers.BertModel(config, add_pooling_layer=False)
        self.heads = nn.ModuleDict({task.name: nn.Linear(8, 1) for task in TASKS})

    def forward(self, input_ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the first token's representation and task -> logits [B]."""
        h = self.encoder(input_ids).last_hidden_state[:, 0]
        return h, {task: head(h).squeeze(1) for task, head in self.heads.items()}


def test_hugging_face(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(0)
    rows = [
        {
            "input_ids": torch.randint(0, 20, (FEATURES,), generator=g),
            "a": float(i % 2),
            "b": float(i % 3 == 0),
            "sex": i % 2,
        }
        for i in range(32)
    ]
    net = Text(transformers).double()
    start = {name: value.clone() for name, value in net.state_dict().items()}
    entries, batches = lf.task_dict(TASKS), list[dict[str, Tensor]]()

    class Trainer(transformers.Trainer):  # type: ignore[name-defined,misc]
        fair = lf.FairStep(METHOD[0], entries, net.heads, n_groups={"sex": 2}, **METHOD[1])

        def compute_loss(self, model: Any, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
            batches.append({name: value.clone() for name, value in inputs.items()})
            losses = descend(self.fair, model, inputs)
            return (
                torch.stack([*losses.values()]).sum().detach().requires_grad_()
            )  # Trainer's own backward finds nothing left

    def descend(fair: Any, model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        labels = {name: inputs.pop(name) for name in (*entries, "sex")}
        h, outputs = model(**inputs)
        losses = losses_of(entries, outputs, labels)
        fair.backward(losses, representation=h, outputs=outputs, labels=labels, groups={"sex": labels["sex"]})
        return losses

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=8, report_to=[], use_cpu=True, save_strategy="no",
        remove_unused_columns=False, disable_tqdm=True, learning_rate=0.05, logging_strategy="no", lr_scheduler_type="constant",
        optim="sgd", max_grad_norm=0.0,
    )  # fmt: skip
    Trainer(net, arguments, train_dataset=rows).train()
    other = Text(transformers).double()
    other.load_state_dict(start)
    fair = lf.FairStep(METHOD[0], entries, other.heads, n_groups={"sex": 2}, **METHOD[1])
    optimizer = torch.optim.SGD(other.parameters(), lr=0.05)
    for batch in batches:
        optimizer.zero_grad()
        descend(fair, other, batch)
        optimizer.step()
    assert len(batches) == 4
    assert_same(net, other)
    assert not torch.equal(net.heads["a"].weight, start["heads.a.weight"])

    class Held(Trainer):
        """The step is a part of the model, so that Trainer's checkpoints, files of tensors alone, hold its state."""

        @property
        def fair(self) -> lf.FairStep:
            return self.model.fair  # type: ignore[no-any-return]

    def gone_on(steps: int, checkpoint: str | None = None) -> Any:
        model: Any = Text(transformers).double()
        model.load_state_dict(start)
        model.fair = lf.FairStep(METHOD[0], entries, model.heads, n_groups={"sex": 2}, **METHOD[1])
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=steps, per_device_train_batch_size=8, report_to=[], use_cpu=True, save_steps=2,
            remove_unused_columns=False, disable_tqdm=True, learning_rate=0.05, logging_strategy="no", lr_scheduler_type="constant",
            gradient_accumulation_steps=2,
        )  # fmt: skip
        Held(model, arguments, train_dataset=rows).train(resume_from_checkpoint=checkpoint)
        return model

    whole = gone_on(4)
    again = gone_on(4, str(tmp_path / "checkpoint-2"))
    assert whole.fair.global_step == again.fair.global_step == 8
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), again.parameters(), strict=True))
    assert whole.fair.trace == pytest.approx(again.fair.trace, nan_ok=True)
