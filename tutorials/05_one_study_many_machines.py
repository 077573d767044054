# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 5. One study, many workers
#
# | where | storage | what it needs |
# |---|---|---|
# | one machine | a journal file, `--storage study.journal --workers 4` | nothing |
# | several machines | `--storage postgresql://user@host/name` | a PostgreSQL server, `psycopg2` |
# | very many workers | `--storage grpc://host:13000`, a proxy in front of the database | `grpcio` |
#
# The command is the same everywhere; a machine joins by running it. Here two processes play two machines that share a file,
# and one of them is killed in the middle of a trial.

# %%
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from libmtl_fair import tune
from libmtl_fair.tune.storage import load_study

SMOKE = os.environ.get("LIBMTL_FAIR_SMOKE") == "1"
TRIALS, EPOCHS, ROWS = (6, 1, 1200) if SMOKE else (24, 5, 10000)
torch.set_num_threads(1)
folder = Path(tempfile.mkdtemp())
recipe = folder / "many.yaml"
recipe.write_text(f"""\
name: many
data: {{name: adult, tasks: [income, never_married], sensitive: [sex], subset: {ROWS}}}
model: {{hidden: [64, 32]}}
train: {{epochs: {EPOCHS}, select: last}}
methods:
  plain: {{weighting: EW}}
  relif: {{weighting: ReLiF, beta: 0.3}}
tune: {{objectives: [macro_auc, eo_difference], trials: {TRIALS}}}
""")

# %% [markdown]
# ## Two machines on one study
#
# Each is an ordinary `libmtl-fair tune`. On machines of your own, put the server's address in place of the file.


# %%
def machine(name: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "libmtl_fair", "tune", recipe, "--storage", folder / "study.journal"]
    command += ["--out", folder / name]
    return subprocess.Popen(
        list(map(str, command)), env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL
    )


first, second = machine("first"), machine("second")

# %% [markdown]
# ## One of them dies
#
# Its trial stays behind as running. The other sees that the worker is gone, gives the trial up and runs it again with the same
# parameters and seed. (A worker on another machine counts as dead after a minute without a sign of life.)

# %%
while not (folder / "study.journal").exists() or not any(
    "worker" in t.user_attrs for t in load_study(str(folder / "study.journal"), None).get_trials()
):
    time.sleep(0.5)
first.kill()
first.wait()
print("second ends with", second.wait())

# %% [markdown]
# ## Nothing is lost, nothing is done twice

# %%
study = load_study(str(folder / "study.journal"), "many")
complete = [t for t in study.get_trials() if t.state.name == "COMPLETE"]
print(len(complete), "complete of", TRIALS)
print("given up:", [(t.number, t.user_attrs.get("lost")) for t in study.get_trials() if t.state.name == "FAIL"])
assert sorted(t.user_attrs["slot"] for t in complete) == list(range(TRIALS))
print("knee:", tune.knee(study).number)

# %% [markdown]
# ## A proxy in front of a database
#
# ```
# python -c "from optuna.storages import RDBStorage, run_grpc_proxy_server as s; s(RDBStorage('postgresql://...'), port=13000)"
# libmtl-fair tune many.yaml --storage grpc://server:13000 --workers 4
# ```
