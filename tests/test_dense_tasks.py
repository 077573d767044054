"""Tasks whose labels are maps: losses and metrics as LibMTL's nyu example defines them, scores by loops, streaming."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm, t
from torch import Tensor

import libmtl_fair as lf
from libmtl_fair.errors import DataError, RecipeError
from libmtl_fair.metrics import GroupMetrics, task_utility
from libmtl_fair.predictions import Predictions
from libmtl_fair.tasks import MapTask

B, H, W, C = 6, 5, 7, 3
TASKS = {"seg": lf.Segmentation("seg", C), "depth": lf.Depth("depth"), "normals": lf.Normals("normals")}


def drawn(kind: str, seed: int = 0, n: int = B) -> tuple[Tensor, Tensor]:
    """Return outputs and labels, some of them missing; the last example's all."""
    g = torch.Generator().manual_seed(seed)
    output = torch.randn(n, TASKS[kind].out_features, H, W, generator=g)
    missing = torch.rand(n, H, W, generator=g) < 0.3
    missing[-1] = True
    if kind == "seg":
        return output, torch.randint(0, C, (n, H, W), generator=g).masked_fill(missing, -1)
    if kind == "depth":
        return output, (torch.rand(n, 1, H, W, generator=g) + 0.5).masked_fill(missing[:, None], 0)
    truth = torch.nn.functional.normalize(torch.randn(n, 3, H, W, generator=g), dim=1)
    return output, truth.masked_fill(missing[:, None], 0)


def as_in_the_example(kind: str, output: Tensor, labels: Tensor) -> tuple[float, dict[str, float]]:
    """Return loss and metrics by the formulas of LibMTL's examples/nyu/utils.py, in numpy."""
    pred, gt = output.double().numpy(), labels.double().numpy()
    if kind == "seg":
        flat, truth = pred.transpose(0, 2, 3, 1).reshape(-1, C), gt.ravel().astype(int)
        known = truth >= 0
        log_p = flat - np.log(np.exp(flat).sum(1, keepdims=True))
        table = np.zeros((C, C))
        np.add.at(table, (truth[known], flat.argmax(1)[known]), 1)
        iou = np.diag(table) / (table.sum(1) + table.sum(0) - np.diag(table))
        return -log_p[known, truth[known]].mean(), {"mIoU": iou.mean(), "pixAcc": np.diag(table).sum() / table.sum()}
    mask = gt.sum(1) != 0
    if kind == "depth":
        p, y = pred[:, 0][mask], gt[:, 0][mask]
        wrong = np.abs(p - y)
        return wrong.mean(), {
            "abs_err": wrong.mean(),
            "rel_err": (wrong / y).mean(),
            "RMSE": np.sqrt((wrong**2).mean()),
        }
    cosine = ((pred / np.linalg.norm(pred, axis=1, keepdims=True)) * gt).sum(1)[mask]
    angle = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
    within = {f"<{d:g}": (angle < d).mean() for d in (11.25, 22.5, 30)}
    return 1 - cosine.mean(), {"mean": angle.mean(), "median": np.median(angle), **within}


@pytest.mark.parametrize("kind", TASKS)
class TestEveryMapKind:
    def test_loss_and_metrics_are_those_of_the_example(self, kind: str) -> None:
        task, (output, labels) = TASKS[kind], drawn(kind)
        loss, metrics = as_in_the_example(kind, output, labels)
        assert task.loss(output, labels).item() == pytest.approx(loss, rel=1e-5)
        found = task_utility(task, output, labels)
        assert list(found) == list(task.shown)
        for name, value in metrics.items():
            assert found[name] == pytest.approx(value, abs=0.1 if name == "median" else 1e-5), name

    def test_batches_add_up(self, kind: str) -> None:
        task, (output, labels) = TASKS[kind], drawn(kind)
        entry = lf.task_dict([task])[kind]
        for part in (slice(0, 1), slice(1, 4), slice(4, B)):
            entry["metrics_fn"].update_fun(output[part], labels[part])
        assert entry["metrics_fn"].score_fun() == pytest.approx(list(task_utility(task, output, labels).values()))
        assert len(entry["metrics_fn"].record) == 1  # sums, however many batches there were
        entry["metrics_fn"].reinit()
        assert np.isnan(entry["metrics_fn"].score_fun()).all()

    def test_missing_labels(self, kind: str) -> None:
        task, (output, labels) = TASKS[kind], drawn(kind)
        output.requires_grad_()
        assert task.observed(labels).tolist() == [True] * (B - 1) + [False]
        (grad,) = torch.autograd.grad(task.loss(output, labels), output)
        seen = task.valid(labels)[:, None].expand_as(grad)
        assert bool((grad[~seen] == 0).all())
        assert bool((grad[seen] != 0).any())
        nothing = torch.full_like(labels, -1 if kind == "seg" else 0)
        loss = task.loss(output, nothing)
        assert loss.item() == 0
        assert bool((torch.autograd.grad(loss, output)[0] == 0).all())
        if kind != "seg":
            with_nan = labels.where(labels != 0, torch.nan)
            torch.testing.assert_close(task.loss(output, with_nan), task.loss(output, labels))

    def test_example_losses_weighed_by_their_pixels_are_the_loss(self, kind: str) -> None:
        task, (output, labels) = TASKS[kind], drawn(kind)
        pixels = task.valid(labels).flatten(1).sum(1)
        mean = (task.example_losses(output, labels) * pixels).sum() / pixels.sum()
        torch.testing.assert_close(mean, task.loss(output, labels))
        assert task.count(labels) == pixels.sum()

    def test_scores_by_a_loop(self, kind: str) -> None:
        task, (output, labels) = TASKS[kind], drawn(kind)
        g = torch.Generator().manual_seed(5)
        features = torch.randn(B, 4, H, W, generator=g)
        raw = task.raw_score(output, labels, features)
        for b in range(B):
            places = [(i, j) for i in range(H) for j in range(W) if task.valid(labels)[b, i, j]]
            places = places or [(i, j) for i in range(H) for j in range(W)]
            if kind == "seg":
                by_hand = [torch.softmax(output[b, :, i, j], 0).max() for i, j in places]
            else:
                by_hand = [features[b, :, i, j].norm() / 2 for i, j in places]  # 2: the root of 4 channels
            assert raw[b].item() == pytest.approx(float(torch.stack(by_hand).mean()), rel=1e-5)
        score = task.example_scores(output, labels, features)
        assert bool(((score >= 0) & (score <= 1)).all())
        if kind != "seg":
            frozen = task.with_score_range(raw)
            low, high = np.quantile(raw.double(), [0.1, 0.9])
            expected = ((raw - low) / (high - low + 1e-6)).clamp(0, 1)
            torch.testing.assert_close(frozen.example_scores(output, labels, features), expected.to(score))
            with pytest.raises(DataError, match="audit score is of its head's feature map, and none was given"):
                task.score(output)

    def test_smaller_outputs_are_resized(self, kind: str) -> None:
        task, (output, labels) = TASKS[kind], drawn(kind)
        small = output[..., ::2, ::2]
        sized = torch.nn.functional.interpolate(small, (H, W), mode="bilinear", align_corners=True)
        torch.testing.assert_close(task.loss(small, labels), task.loss(sized, labels))
        with pytest.raises(DataError, match=rf"task '{kind}' .*outputs of shape \[6, 9, 5, 7\]"):
            task.loss(torch.zeros(B, 9, H, W), labels)

    def test_group_metrics_are_those_of_the_groups(self, kind: str) -> None:
        task, (output, labels) = TASKS[kind], drawn(kind, 3, 12)
        groups = torch.tensor([0, 1, 1, 0, -1, 1, 0, 0, 1, 1, 0, 1])
        metrics = GroupMetrics([task], {"light": 2}, min_group_size=1)
        for part in (slice(0, 5), slice(5, 12)):
            metrics.update({kind: output[part]}, {kind: labels[part]}, {"light": groups[part]})
        table = metrics.compute().set_index(["metric", "group"]).value
        for name in task.shown:
            of = [task_utility(task, output[groups == g], labels[groups == g])[name] for g in (0, 1)]
            assert [table[name, g] for g in ("0", "1")] == pytest.approx(of)
            assert table[name, "difference"] == pytest.approx(abs(of[0] - of[1]))
        assert table["count", "overall"] == 10  # one of no group, one without a label
        both = GroupMetrics([task], {"light": 2}).update({kind: output[:5]}, {kind: labels[:5]}, {"light": groups[:5]})
        rest = GroupMetrics([task], {"light": 2}).update({kind: output[5:]}, {kind: labels[5:]}, {"light": groups[5:]})
        merged = both.merge(rest).compute().set_index(["metric", "group"]).value
        np.testing.assert_allclose(merged.to_numpy(), table.to_numpy(), rtol=1e-9)

    def test_intervals_are_those_of_a_loop_that_draws_images(self, kind: str) -> None:
        task, (output, labels) = TASKS[kind], drawn(kind, 3, 12)
        groups = torch.tensor([0, 1, 1, 0, -1, 1, 0, 0, 1, 1, 0, 1])
        metrics = GroupMetrics([task], {"light": 2}, n_bootstrap=60, confidence=0.8, seed=5)
        for part in (slice(0, 5), slice(5, 12)):
            metrics.update({kind: output[part]}, {kind: labels[part]}, {"light": groups[part]})
        table = metrics.compute().set_index(["metric", "group"])
        rng, seen = np.random.default_rng((5, 0, 0)), task.observed(labels)
        drawings, tails = {}, {}
        for name, rows in (("0", groups == 0), ("1", groups == 1), ("overall", groups >= 0)):
            own = torch.nonzero(rows & seen).ravel()
            draws = own[torch.from_numpy(rng.integers(0, len(own), (60, len(own))))]
            tails[name] = norm.sf(t.ppf(0.9, len(own) - 1) * np.sqrt(len(own) / (len(own) - 1)))
            drawings[name] = [task_utility(task, output[draw], labels[draw]) for draw in draws]
        for metric in task.shown:
            for name, each in drawings.items():
                ends = np.quantile([found[metric] for found in each], [tails[name], 1 - tails[name]])
                np.testing.assert_allclose(table.loc[(metric, name), ["low", "high"]].astype(float), ends, rtol=1e-5)
            gap = table.loc[(metric, "difference")]
            assert 0 <= gap.low <= gap.value <= gap.high

    def test_statistics_stand_for_the_maps(self, kind: str, tmp_path: Any) -> None:
        task, (output, labels) = TASKS[kind], drawn(kind)
        raw = task.raw_score(output, labels, torch.ones(B, 4, H, W))
        kept, share = task.statistics(output, labels), task.coverage(labels)
        scores = task.example_scores(output, labels, torch.ones(B, 4, H, W))
        groups = {"light": torch.tensor([0, 0, 1, 1, 0, 1])}
        found = Predictions((task,), {kind: scores}, {kind: kept}, {kind: share}, groups, raw={kind: raw})
        held = Predictions.load(found.save(tmp_path / "predictions.parquet"))
        assert task_utility(task, held.outputs[kind], held.labels[kind]) == task_utility(task, output, labels)
        assert task.observed(held.labels[kind]).tolist() == task.observed(labels).tolist()
        torch.testing.assert_close(held.rescored((task,)).scores[kind], scores)
        assert {f"{kind}/{name}" for name in task.shown} <= set(held.frame().columns)
        whole = replace(found, outputs={kind: output}, labels={kind: labels})
        assert Predictions.load(whole.save(tmp_path / "whole.parquet")).frame().equals(held.frame())

    def test_bad_labels_are_told(self, kind: str) -> None:
        task, (output, labels) = TASKS[kind], drawn(kind)
        wrong = labels.clone().float()
        wrong[1] = 3.5 if kind == "seg" else torch.inf
        with pytest.raises(DataError, match=rf"task '{kind}' .*labels: found (3.5|inf) in row 1"):
            GroupMetrics([task], {"g": 2}).update(
                {kind: output}, {kind: wrong}, {"g": torch.zeros(B, dtype=torch.long)}
            )


def test_intervals_of_images_cover_the_truth() -> None:
    """Of images whose pixels err together, in 100 worlds; pixels taken for independent would cover less than half of them."""
    task, rng, covered = TASKS["depth"], np.random.default_rng(0), []
    truth = np.sqrt(
        [1.0 + 0.25, 2.25 + 0.25]
    )  # an error of each image's own, of sd 1 and 1.5, and of each pixel's, of .5
    for world in range(100):
        errors = rng.normal(0, np.repeat([1.0, 1.5], 40))[:, None] + rng.normal(0, 0.5, (80, 100))
        sums = np.stack([np.full(80, 100), abs(errors).sum(1), abs(errors).sum(1), (errors**2).sum(1)], 1)
        metrics = GroupMetrics([task], {"light": 2}, n_bootstrap=100, seed=world)
        groups = torch.arange(80) // 40
        table = metrics.update(
            {"depth": torch.from_numpy(sums)}, {"depth": torch.ones(80)}, {"light": groups}
        ).compute()
        found = table[table.metric == "RMSE"].set_index("group")
        true = {"0": truth[0], "1": truth[1], "difference": truth[1] - truth[0], "ratio": truth[0] / truth[1]}
        covered.append([found.low[name] <= value <= found.high[name] for name, value in true.items()])
    assert np.mean(covered, 0) == pytest.approx(0.95, abs=0.06)


def test_a_group_of_one_image_has_no_interval() -> None:
    task, (output, labels) = TASKS["depth"], drawn("depth", 1, 6)
    groups = torch.tensor([0, 0, 0, 0, 1, 1])  # the last has no label
    table = GroupMetrics([task], {"light": 3}).update({"depth": output}, {"depth": labels}, {"light": groups}).compute()
    ends = table[table.metric == "RMSE"].set_index("group")[["value", "low", "high"]]
    assert ends.loc[["0", "overall"]].notna().all(axis=None)
    assert ends.loc[["1", "difference", "ratio"], "value"].notna().all()
    assert ends.loc[["1", "2", "difference", "ratio"], ["low", "high"]].isna().all(axis=None)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(sorted(TASKS)))
def test_order_of_pixels_is_nothing(seed: int, kind: str) -> None:
    task, (output, labels) = TASKS[kind], drawn(kind, seed, 2)
    place = torch.randperm(H * W, generator=torch.Generator().manual_seed(seed))

    def moved(t: Tensor) -> Tensor:
        return t.flatten(-2)[..., place].unflatten(-1, (H, W))

    torch.testing.assert_close(task.statistics(moved(output), moved(labels)), task.statistics(output, labels))
    torch.testing.assert_close(task.loss(moved(output), moved(labels)), task.loss(output, labels))


def test_classes_that_do_not_occur_are_left_out_of_miou() -> None:
    task = lf.Segmentation("s", 4)
    labels = torch.tensor([[[0, 1]]])
    output = torch.nn.functional.one_hot(labels, 4).permute(0, 3, 1, 2).float()
    assert task_utility(task, output, labels) == {"mIoU": 1.0, "pixAcc": 1.0}


def test_utilities_are_the_sources() -> None:
    assert lf.Depth("d").utility({"RMSE": 1.0}) == 0.5
    assert lf.Normals("n").utility({"mean": 45.0}) == 0.75
    assert lf.Segmentation("s", 2).utility({"mIoU": 0.3}) == 0.3


def test_bad_definitions() -> None:
    with pytest.raises(RecipeError, match="n_classes must be an integer of at least 2"):
        lf.Segmentation("s", 1)
    assert issubclass(lf.Depth, MapTask)


def test_a_recipe_of_rooms_shows_what_maps_have(tmp_path: Any) -> None:
    from libmtl_fair.files import read_json
    from libmtl_fair.recipe.run import run_recipe
    from libmtl_fair.recipe.schema import load_recipe
    from libmtl_fair.report.findings import findings, headline
    from libmtl_fair.report.run_folder import read_run
    from libmtl_fair.report.summary import standing, summary, worst_and_macro

    path = tmp_path / "rooms.yaml"
    path.write_text(
        "name: rooms\ndata: {name: scenes, sensitive: [light], args: {n: 24, size: [16, 24]}}\n"
        "model: {encoder: cnn, encoder_args: {channels: [4, 8]}}\ntrain: {epochs: 1, batch_size: 6}\nseeds: [0]\n"
        "methods: {plain: {weighting: EW}, relif: {weighting: ReLiF, pairs: random}}\naudit: {delta: [p50]}\n"
    )
    run_recipe(load_recipe(path), tmp_path / "run")
    run = read_run(tmp_path / "run")
    columns = set(summary(run)["column"])
    assert {"macro mIoU", "macro RMSE", "macro mean angle", "Bias@p50"} <= columns
    assert worst_and_macro(run).notna().all(axis=None)
    plain, relif = (
        {(r["task"], r["metric"]): r["value"] for r in run.frame("utility").query("method == @m").to_dict("records")}
        for m in ("plain", "relif")
    )
    signs = {("segmentation", "mIoU"): -1, ("depth", "RMSE"): 1, ("normal", "mean"): 1}
    wanted = sum(sign * (relif[at] - plain[at]) / plain[at] for at, sign in signs.items()) * 100 / 3
    assert standing(run).set_index("method").loc["relif", "delta_m"] == pytest.approx(wanted, abs=1e-6)
    said = dict(findings(run))
    assert "on 5 examples that no training saw, by groups of light." in said["What was compared"]
    assert said["What improved"].startswith("No group was judged: none of the tasks has yes-or-no decisions.")
    assert "makes groups" not in said["What improved"] + dict(headline(run))["Improved"]
    assert (
        "1 / (1 + RMSE)" in read_json(tmp_path / "run" / "plain" / "seed0" / "metrics.json")["checkpoint"]["chosen_by"]
    )
    groups = run.frame("groups")
    assert {"mIoU", "RMSE", "median"} <= set(groups[groups["group"] == "difference"]["metric"])
    predictions = Predictions.load(next((tmp_path / "run" / "relif").rglob("*.parquet")))
    ranges = {task.name: task.score_range for task in predictions.tasks if hasattr(task, "score_range")}
    assert len(ranges) == 2
    assert predictions.outputs["segmentation"].dim() == 2


def test_a_head_s_scale_moves_the_audit_score_and_no_prediction() -> None:
    """What docs/RESULTS.md says of dense ReLiF rests on it."""
    from libmtl_fair.models.dense_heads import ConvHead

    torch.manual_seed(0)
    head, x, task = ConvHead(4, 1).eval(), torch.randn(B, 4, H, W), TASKS["depth"]
    layers = list(head)
    features, norm, last = torch.nn.Sequential(*layers[:-1]), layers[1], layers[-1]
    with torch.no_grad():
        before, raw = head(x), task.raw_score(head(x), None, features(x))
        for parameter, factor in ((norm.weight, 3.0), (norm.bias, 3.0), (last.weight, 1 / 3.0)):
            parameter *= factor
        assert torch.allclose(head(x), before, atol=1e-6)
        assert torch.allclose(task.raw_score(head(x), None, features(x)), 3 * raw, rtol=1e-5)
