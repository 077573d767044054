"""Two workers on one storage, one killed in mid-trial: every slot is finished once, none lost, none twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from libmtl_fair import locks
from libmtl_fair.tune import budget
from libmtl_fair.tune.budget import claim, fill
from libmtl_fair.tune.plan import Plan
from libmtl_fair.tune.storage import open_storage
from libmtl_fair.tune.study import Job, open_study, quiet
from libmtl_fair.tune.worker import protocol_of

TOTAL = 5
WORK = """
import sys, time
from libmtl_fair.tune import study, worker
real, slow = worker.run_trial, float(sys.argv[1])
def run(*args, **options):
    if slow:
        print("training", flush=True)
    time.sleep(slow)
    return real(*args, **options)
worker.run_trial = run
sys.exit(study.main())
"""


def start(told: dict, slow: float = 0.0) -> subprocess.Popen[str]:
    with tempfile.TemporaryFile("w+") as standard_input:
        json.dump(told, standard_input)
        standard_input.seek(0)
        return subprocess.Popen(
            [sys.executable, "-c", WORK, str(slow)],
            stdin=standard_input,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def prepared(recipe, storage: str, grace: float) -> dict:
    with quiet():
        plan = Plan.make(recipe)
        study = open_study(plan, open_storage(storage), recipe.name)
        protocol_of(study, plan, "cpu")
        fill(study, plan, TOTAL)
    job = Job(None, storage, recipe.name, TOTAL, None, "cpu", grace, 1, worker=1)
    return {"recipe": recipe.to_dict(), "file": recipe._source.file, "job": job.__dict__}


def kill_one_of_two(recipe, storage: str, grace: float = 5.0) -> None:
    told = prepared(recipe, storage, grace)
    second = {**told, "job": {**told["job"], "worker": 2}}
    with start(told, slow=600) as doomed, start(second) as other:
        try:
            assert doomed.stdout.readline() == "training\n", doomed.stderr.read()
            doomed.send_signal(signal.SIGKILL)
            _, errors = other.communicate(timeout=150)
        finally:
            doomed.kill()
            other.kill()
    assert other.returncode == 0, errors
    study = optuna.load_study(study_name=recipe.name, storage=open_storage(storage))
    complete = study.get_trials(states=[TrialState.COMPLETE])
    assert sorted(t.user_attrs["slot"] for t in complete) == list(range(TOTAL))
    others = [t for t in study.get_trials() if t.state != TrialState.COMPLETE]
    assert {t.state for t in others} == {TrialState.FAIL}
    (lost,) = [t for t in others if t.user_attrs["lost"] == "its worker died"]
    (again,) = [t for t in complete if t.user_attrs["slot"] == lost.user_attrs["slot"]]
    assert again.params == lost.params
    assert again.user_attrs["seeds"] == lost.user_attrs["seeds"]
    assert again.user_attrs["again"] == lost.number


def test_on_a_journal_file(small, tmp_path):
    kill_one_of_two(small(), str(tmp_path / "study.journal"))


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def test_through_a_grpc_proxy(small, tmp_path):
    pytest.importorskip("grpc")
    port = free_port()
    code = (
        "import sys; from optuna.storages import run_grpc_proxy_server; "
        "from libmtl_fair.tune.storage import open_storage; "
        "run_grpc_proxy_server(open_storage(sys.argv[1]), host='localhost', port=int(sys.argv[2]))"
    )
    server = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "behind.journal"), str(port)], stderr=subprocess.DEVNULL
    )
    try:
        address = f"grpc://localhost:{port}"
        wait_until(lambda: _answers(port))
        kill_one_of_two(small(), address)
    finally:
        server.terminate()
        server.wait()


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_until(holds, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come up"
        time.sleep(0.1)


def _binaries() -> Path | None:
    found = shutil.which("initdb")
    places = [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return next((p for p in places if (p / "postgres").exists() and (p / "initdb").exists()), None)


@pytest.fixture
def postgresql():
    """The URL of a real server, in a folder of its own; run as another user where we are root, as it demands."""
    pytest.importorskip("psycopg2", reason="psycopg2 is not installed (libmtl_fair[postgresql])")
    binaries = _binaries()
    if binaries is None:
        pytest.skip("PostgreSQL is not installed here (Debian: apt-get install postgresql)")
    as_user: dict = {}
    folder = Path(tempfile.mkdtemp(prefix="pg"))
    if os.geteuid() == 0:
        import pwd

        users = {entry.pw_name for entry in pwd.getpwall()}
        user = pwd.getpwnam("postgres" if "postgres" in users else "nobody")
        os.chown(folder, user.pw_uid, user.pw_gid)
        as_user = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    data, port = folder / "data", free_port()
    quietly = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": folder, **as_user}
    make = [binaries / "initdb", "-D", data, "-U", "tuner", "--auth=trust", "--no-sync", "--encoding=UTF8"]
    subprocess.run(list(map(str, make)), check=True, env={**os.environ, "LC_ALL": "C"}, **quietly)
    run = [binaries / "postgres", "-D", data, "-p", port, "-k", folder, "-c", "fsync=off", "-h", "127.0.0.1"]
    server = subprocess.Popen(list(map(str, run)), **quietly)
    try:
        wait_until(lambda: _answers(port))
        yield f"postgresql://tuner@127.0.0.1:{port}/postgres"
    finally:
        server.send_signal(signal.SIGINT)
        server.wait()
        shutil.rmtree(folder, ignore_errors=True)


def test_on_a_real_postgresql(small, postgresql):
    kill_one_of_two(small(), postgresql)


def test_a_worker_on_another_machine_is_dead_when_its_counter_stands_still(small, monkeypatch):
    plan = Plan.make(small())
    study = optuna.create_study(directions=["maximize", "minimize"])
    fill(study, plan, 1)
    trial = claim(study, 1)
    trial.set_user_attr(budget.WORKER, {"machine": "elsewhere", "pid": 1, "started": "1"})
    now = [100.0]
    monkeypatch.setattr(budget.time, "monotonic", lambda: now[0])
    reaper = budget.Reaper(grace=10)
    assert reaper(study) == []
    for beat in range(3):
        now[0] += 9
        trial.set_user_attr(budget.BEAT, beat)
        assert reaper(study) == []
    now[0] += 9
    assert reaper(study) == []
    now[0] += 2
    assert reaper(study) == [0]
    assert study.get_trials()[0].state == TrialState.FAIL


def test_heartbeats_are_written_and_stop_with_the_trial(small):
    plan = Plan.make(small())
    study = optuna.create_study(directions=["maximize", "minimize"])
    fill(study, plan, 1)
    trial = claim(study, 1)
    with budget.Heartbeat(study, trial, grace=0.1):
        wait_until(lambda: study.get_trials()[0].user_attrs.get(budget.BEAT, 0) >= 2)
    before = study.get_trials()[0].user_attrs[budget.BEAT]
    time.sleep(0.1)
    assert study.get_trials()[0].user_attrs[budget.BEAT] == before
    assert study.get_trials()[0].user_attrs[budget.WORKER] == locks.address()


def test_this_process_lives_and_a_reused_number_does_not():
    assert locks.alive(os.getpid(), locks.started(os.getpid()))
    if locks.started(os.getpid()) is not None:
        assert not locks.alive(os.getpid(), "1")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert not locks.alive(ended.pid, "1")
