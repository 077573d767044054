"""The names that users and other projects rely on: they exist, and take the arguments that the README and docs name."""

from __future__ import annotations

import inspect

import pytest

import libmtl_fair as lf
from libmtl_fair import functional, metrics, tune
from libmtl_fair.data import ResidentLoader

PUBLIC = {
    lf.FairTrainer: "task_dict weighting architecture encoder_class decoders rep_grad multi_input optim_param "
    "scheduler_param device run_dir resume seed progress",
    lf.FairTrainer.train: "train_dataloaders test_dataloaders epochs val_dataloaders",
    lf.FairTrainer.predict: "loader",
    lf.FairTrainer.audit: "loader delta",
    lf.task_dict: "tasks",
    lf.heal: "",
    lf.load_dataset: "name tasks sensitive seed split",
    ResidentLoader: "x labels groups batch_size shuffle seed device",
    functional.huber: "u beta",
    functional.huberized_hinge: "z mu",
    functional.cosine_distance: "u v",
    functional.prototype_pairs: "scores embeddings k valid mode generator",
    functional.group_mean: "values groups n_groups",
    functional.glf: "group_losses present",
    functional.gld: "group_losses present",
    functional.robust_log_loss: "losses labels groups n_groups",
    functional.soft_rates: "scores labels groups n_groups",
    functional.aeod: "scores labels groups n_groups symmetric normalise",
    functional.caeod: "probs labels groups n_groups",
    functional.aep: "errors groups n_groups",
    functional.project_to_simplex: "v",
    functional.aggregate_disparities: "psi mu present solver",
    functional.head_gram: "logit_grads head_weights rank_one",
    functional.min_norm_weights: "gram linear",
    functional.linear_cka: "a b",
    functional.pair_by_similarity: "sim threshold",
    functional.project_conflicts: "grads",
    metrics.FixedDeltaAudit: "delta pool_size n_pairs eval_seed pair_seed exact",
    metrics.FixedDeltaAudit.run: "scores valid",
    metrics.conformal_delta: "distances alpha",
    metrics.quantile_delta: "distances q",
    metrics.drift: "reports induced reference",
    metrics.GroupMetrics: "tasks n_groups threshold empty missing",
    metrics.GroupMetrics.update: "outputs labels groups",
    metrics.metric_frame: "predictions task sensitive metrics",
    metrics.delta_m: "results baseline higher_is_better",
    metrics.mean_rank: "",
    metrics.knowledge_gain: "",
    metrics.discrimination_gain: "",
    tune.tune: "recipe n_trials objectives storage workers stacked resume",
    tune.select: "study max_disparity",
    tune.knee: "study",
    tune.to_recipe: "trial",
}


@pytest.mark.parametrize("thing", PUBLIC, ids=lambda thing: thing.__qualname__)
def test_arguments_have_their_names(thing):
    found = inspect.signature(thing).parameters
    missing = [name for name in PUBLIC[thing].split() if name not in found]
    assert not missing, f"{thing.__qualname__} lacks {missing}; has {list(found)}"


def test_tasks_take_what_the_docs_say():
    entries = lf.task_dict([lf.Binary("income"), lf.Multiclass("occupation", 6), lf.Regression("hours")])
    assert list(entries) == ["income", "occupation", "hours"]
    for entry in entries.values():
        assert {"metrics", "metrics_fn", "loss_fn", "weight"} <= set(entry)
        assert len(entry["metrics"]) == len(entry["weight"])


def test_everything_public_is_there():
    for module in (lf, functional, metrics, tune):
        assert all(hasattr(module, name) for name in module.__all__)


def test_methods_are_registered_with_libmtl():
    import LibMTL.architecture
    import LibMTL.weighting

    for name in ("ReLiF", "FairMT", "FBGrad", "LambdaMix"):
        assert getattr(LibMTL.weighting, name) is getattr(lf, name)
    assert LibMTL.architecture.FairBranch is lf.FairBranch


def test_estimators_import():
    from libmtl_fair.sklearn import FairMTLClassifier, FairMTLEstimator

    for estimator in (FairMTLClassifier, FairMTLEstimator):
        assert "sensitive_features" in inspect.signature(estimator.fit).parameters
