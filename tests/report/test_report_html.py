from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from libmtl_fair.errors import CheckpointError
from libmtl_fair.report import read_run, write_report
from libmtl_fair.report.notes import notes
from libmtl_fair.report.page import render
from libmtl_fair.report.protocol import checklist

VOID = {"meta", "br", "img", "input", "hr", "link"}


class Page(HTMLParser):
    """Collects tags and visible text; refuses a page whose elements do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        inside = self.open[-1] if self.open else ""
        (self.scripts if inside == "script" else self.words).append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_report_is_whole_and_self_contained(run_dir):
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    for tag, attrs in page.tags:
        assert tag not in ("link", "iframe", "img")
        assert "src" not in attrs
        assert (attrs.get("href") or "#").startswith("#")
    for heading in ("What was run", "Utility", "Group fairness", "Fixed-delta audit", "By group", "Training", "Limits"):
        assert heading in page.text
    assert (run_dir / "plots" / "utility_bias.png").exists()
    for item, value in checklist(read_run(run_dir)):
        assert item in page.text
        assert " ".join(value.split()) in page.text
    assert "prefers-color-scheme: dark" in text
    assert any(attrs.get("name") == "viewport" for _, attrs in page.tags)
    assert text.count("plotly.js v") <= 2


def test_what_is_folded_on_the_screen_is_folded_on_paper_and_plots_are_scaled_to_it(run_dir):
    text = write_report(run_dir).read_text(encoding="utf-8")
    assert "each.open = true" not in text and "details:not([open]) > summary::after" in text
    assert 'addEventListener("beforeprint", () => drawn()' in text and "svg.main-svg { width: 100% !important" in text


def test_names_are_data_not_markup(run_dir):
    text = render(read_run(run_dir), interactive=True)
    page = Page(text)
    assert "<script>alert(1)" not in text
    assert "<b>x</b>" not in text
    assert "<script>alert(1)</script>" in page.text
    assert "Other & <b>x</b>" in page.text
    figures = json.loads(re.search(r'id="figures">(.*?)</script>', text, flags=re.S)[1])
    assert set(figures) == {"audit", "groups"}
    names = {name for figure in figures["groups"] for trace in figure["data"] for name in trace["x"]}
    assert "Other &amp; &lt;b&gt;x&lt;/b&gt;" in names


def test_static_report_has_no_plotly(run_dir):
    text = render(read_run(run_dir), interactive=False)
    Page(text)
    assert "Plotly" not in text
    assert text.count("<svg") > 8
    assert len(text) < 2_000_000


@pytest.mark.parametrize(
    "changes",
    [
        {"seeds": [3]},
        {"tasks": {"hours": "regression"}, "shrinkage": False},
        {"groups": {"sex": ["Male", "Female"]}},
        {"groups": {}},
        {"cards": False, "history": False, "shrinkage": False},
        {"methods": {"plain": "EW"}},
        {"splits": ("val",)},
        {"tasks": {"日本語": "binary", "$x": "binary"}, "groups": {"_a": ["{{ 1 }}", "b"]}},
    ],
    ids=str,
)
def test_report_without_optional_parts(builder, changes):
    run = read_run(builder(**changes).write())
    page = Page(render(run, interactive=False))
    assert "Limits and notes" in page.text
    assert "nan" not in page.text.lower().replace("finance", "")
    assert "None" not in page.text


def test_sparse_folder_says_what_is_not_recorded(builder):
    run_dir = builder(cards=False, history=False, groups={}, tasks={"hours": "regression"}, shrinkage=False).write()
    page = Page(render(read_run(run_dir), interactive=False))
    assert "No audit was recorded: it compares tasks and needs at least two." in page.text
    assert "No training history was kept." in page.text
    assert "No group metrics were recorded" in page.text
    assert "The run has no data card" in page.text


def test_protocol_falls_back_to_what_is_known(builder):
    items = dict(checklist(read_run(builder(cards=False).write())))
    assert items["Reference tolerance"] == (
        "0.275 = 0.275 (fixed number); p75 = 0.212 (75 % quantile of the reference model's pair distances)"
    )
    assert items["Pools and seeds"].startswith("exact: the expectation over all pairs")
    assert items["Representation of the reference distances"] == "not recorded"
    assert "relif (ReLiF): target: 0.1; eta: 0.02" in items["Controller settings"]
    assert items["Choice of the checkpoint"].startswith("validation macro AUC (epochs by seed: plain 7, 7, 7")


def test_protocol_states_what_was_recorded(run_dir):
    items = dict(checklist(read_run(run_dir)))
    assert items["Reference model"] == "model: plain; seed: 0; data: validation"
    assert items["Pair distribution"] == "as audit pairs"
    assert items["Representation of the reference distances"] == "what the heads receive"
    assert items["Score of each task"].endswith("quantiles: hours: -1.2, 1.4")
    drift = items["Thresholds of the methods themselves"]
    assert drift.startswith("diagnostics only, never used to rank: plain: mean 0.1 (0.36 of δ 0.275, 0.47 of δ p75);")


def test_sampled_protocol_names_pools_and_seeds(run_dir):
    protocol = {"exact": False, "pool_size": 256, "n_pairs": 4096, "eval_seed": 0, "pair_seed": 42}
    (run_dir / "audit_protocol.json").write_text(json.dumps(protocol))
    items = dict(checklist(read_run(run_dir)))
    assert items["Pools and seeds"] == "sampled; pool_size: 256; n_pairs: 4096; eval_seed: 0; pair_seed: 42"


def test_notes_are_honest(run_dir):
    found = "\n".join(notes(read_run(run_dir)))
    assert "Below the score-shrinkage envelope of plain at no more error, in the mean over seeds: relif" in found
    assert "race = Other & <b>x</b> (21 people: income 6 with a true yes, 15 with a no; " in found
    assert "Task income: 842 labels are missing" in found
    assert "Attribute sex: 12 values missing (rule: drop)" in found
    assert "Attribute sex is also an input of the model." in found
    assert "Old data: 1994." in found
    for file in run_dir.glob("relif/seed*/metrics.json"):
        metrics = json.loads(file.read_text())
        metrics["audit"]["test"][0]["bias"] = 0.095
        file.write_text(json.dumps(metrics))
    assert notes(read_run(run_dir))[0].endswith("the method has 0.0950. A lower Bias is no gain in consistency.")


def test_incomplete_folder_gives_no_report(run_dir):
    (run_dir / "fairmt" / "seed2" / "metrics.json").unlink()
    with pytest.raises(CheckpointError, match=r"missing fairmt/seed2/metrics\.json"):
        write_report(run_dir)
    assert not (run_dir / "report.html").exists()
