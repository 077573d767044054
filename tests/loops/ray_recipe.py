"""``python ray_recipe.py RECIPE OUT``: the recipe under Ray Train, in two workers on this machine."""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def train(config: dict[str, Any]) -> None:
    """Run the recipe, as ``libmtl-fair run`` does; Ray has initialised the process group."""
    from libmtl_fair.recipe import load_recipe
    from libmtl_fair.recipe.run import run_recipe

    run_recipe(load_recipe(config["recipe"]), config["out"], device="cpu")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        ray.init(num_cpus=2, include_dashboard=False, object_store_memory=2**27, log_to_driver=False)
        TorchTrainer(
            train,
            train_loop_config={"recipe": sys.argv[1], "out": sys.argv[2]},
            scaling_config=ScalingConfig(num_workers=2),
            run_config=RunConfig(name="recipe", storage_path=folder),
        ).fit()
        ray.shutdown()
