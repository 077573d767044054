"""Every sentence that judges or explains: limits of a run, said plainly, verdicts, how a choice was made, what tables show."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import pandas as pd

from libmtl_fair.files import Json
from libmtl_fair.report.choice import CHOSEN, Rule
from libmtl_fair.report.judged import NO_GROUP, left_out, steps_of
from libmtl_fair.report.run_folder import RunFolder, not_as_written, rows
from libmtl_fair.report.summary import shrinkage_curves, shrinkage_verdict, single_task_methods

LEGEND = {
    "±": "standard deviation between seeds",
    "AUC": "how well a task's scores order people: 1 is perfect, 0.5 is chance",
    "accuracy": "share of people decided rightly",
    "F1": "of yes answers, the harmonic mean of how many are right and how many of the rightful ones are given",
    "Brier": "mean squared error of the predicted probability; lower is better",
    "R²": "share of a number's variation that is predicted; 1 is perfect",
    "RMSE": "root mean squared error of a predicted number, in its unit",
    "TPR": "true positive rate: of those who should get a yes, the share who do",
    "FPR": "false positive rate: of those who should get a no, the share who get a yes",
    "EO diff": "equalised-odds difference: the largest difference between groups in TPR or FPR, of the worst task, between groups "
    "with enough people; 0 is no gap",
    "DP diff": "demographic-parity difference: the largest difference between groups in the share who get a yes, of the worst task",
    "EOP diff": "equal-opportunity difference: that of TPR alone",
    "KS": "largest distance between the groups' distributions of a predicted number",
    "base rate": "decisions at the threshold that says yes as often as there is a true yes on validation data; other columns: at the "
    "recipe's threshold (0.5 unless it says so)",
    "Bias": "how far apart the scores of two different tasks are for two people drawn at random, beyond a tolerance. It depends on each "
    "task's distribution of scores alone, not on who gets which score: it does not say whether like people are treated alike",
    "VR": "violation rate: the share of such pairs that are farther apart than the tolerance; of the distributions alone, as Bias",
    "@p": "the tolerance: a quantile (p75: 75 %) of distances between people in the reference model, or a fixed number",
    "inconsistency": "how far apart in rank like people are, in units of any two people: 0 is always alike, 1 is chance",
    "flip gap": "how far a person's rank moves when only the sensitive value among the inputs is exchanged",
    "MAE": "mean absolute error of a predicted number, in its unit",
    "Δm": "mean relative loss to the reference; below 0 is better",
}
"""Short names that tables use -> what they mean."""
PAYS = (
    "Change against {} for the same people, ± 1.96 standard errors (as if the two models decided independently: rather too wide). "
    "Marked where it is more than that: gains or loses. Groups with too few people are left out."
)
STANDING = (
    "By each task's main metric (AUC, else accuracy, else R²); with fairness, the differences between groups in equalised "
    "odds, equal opportunity and AUC (regression: MAE) of each attribute, means over tasks, count as one metric each; a method with a "
    "degenerate decision has no such standing. "
    "Δm: mean relative loss to the reference; below 0 is better. Worst and macro: the least and the mean of the tasks' scores in [0, 1] "
    "(AUC; accuracy of several classes; R², at least 0; mIoU, 1 / (1 + RMSE), 1 − angle / 180), which no other method moves."
)
MARGINALS = (
    "Bias and VR depend on each task's distribution of scores alone: which person gets which score changes nothing. They say how far "
    "apart and how spread out the scores are, not whether people who are alike are treated alike."
)
DRIFT = "Robust: the fixed order against every other method outlasts both drift budgets."
EVENTS = (
    "Similarity is linear CKA of the weights one layer above the block; pairs at or above the threshold share a copy."
)
INTENDED = (
    "This card reports how well each method does, for whom, and how that was measured. It is no approval of any use: "
    "whether a model may decide about people is not settled by these numbers."
)
_AT_MOST = 12


def notes(run: RunFolder) -> list[str]:
    """Return the notes of a run, the most important first."""
    return [
        *_again(run),
        *_edited(run),
        *_constraints(run),
        *_gains(run),
        *_small_groups(run),
        *_data(run.data_card),
        *_method(run),
        *_source(run.data_card),
    ]


def _again(run: RunFolder) -> Iterator[str]:
    found = [f"{item.method}, seed {item.seed} ({', '.join(item.again)})" for item in run.runs if item.again]
    if found:
        yield (
            f"Measured again: the saved predictions of {_listed(found)} are not those that the run measured. "
            "The numbers here are those of the predictions that are there now."
        )


def _edited(run: RunFolder) -> Iterator[str]:
    if run.edited:
        yield not_as_written(run.edited)


def _listed(found: Sequence[str]) -> str:
    return "; ".join(found[:_AT_MOST]) + (f" and {len(found) - _AT_MOST} more" if len(found) > _AT_MOST else "")


_AT = {"half": " of decisions at 0.5", "base_rate": " of decisions at the base-rate threshold"}


def _constraints(run: RunFolder) -> Iterator[str]:
    """Say what was asked of each method's decisions and what came of it, the unmet first."""
    frame = run.frame("constraint")
    told = []
    for (method, task, attribute, target, threshold), found in frame.groupby(
        ["method", "task", "attribute", "target", "threshold"], sort=False
    ):
        met, ends = int((found["val_met"] == True).sum()), int((found["at_bound"] == True).sum())  # noqa: E712
        at = _AT.get(str(threshold), "")
        text = (
            f"{method}, {task}, {attribute}: {target} was asked{at} (a difference of at most {found['tolerance'].mean():.3f}); it is "
            f"{found['train'].mean():.3f} on training and {found['val'].mean():.3f} on validation decisions, freed of chance: met on "
            f"validation, within one standard error, for {met} of {len(found)} seeds"
        )
        share = found["val_selected"].mean()
        if share < 0.01 or share > 0.99:
            text += f". That says nothing: {100 * share:.1f} % of {steps_of(run, [task])} are selected"
        bound = f"; the multiplier ended at its bound for {ends}" if ends else ""
        if away := int((found["out_of_reach"] == True).sum()):  # noqa: E712
            low = found.loc[found["out_of_reach"] == True, "eta_bound"].min()  # noqa: E712
            bound += f"; out of reach for {away}: there the difference did not fall, and the bound is {low:.2g} at least at the end"
        told.append((met == len(found), f"{text}{bound}."))
    yield from [text for _, text in sorted(told, key=lambda item: item[0])][:_AT_MOST]


def _gains(run: RunFolder) -> Iterator[str]:
    verdicts = list(rows(shrinkage_verdict(run)))
    for row in verdicts:
        if not row.below and row.curve_bias == row.curve_bias:
            yield (
                f"{row.method}: at no more error of scores ({row.brier:.4f}), shrinking the scores of {run.reference} towards one constant "
                f"gives Bias@{row.delta_name} {row.curve_bias:.4f}; the method has {row.bias:.4f}. A lower Bias is no gain in consistency."
            )
    if any(math.isnan(row.curve_bias) for row in verdicts):
        yield "The run was measured by an earlier version, without the shrinkage envelope: no gain in Bias is certified."
    curves = run.frame("shrinkage")
    if len(run.frame("audit")) and curves.empty:
        yield (
            "No score-shrinkage envelope was made: it needs audit.shrinkage. A lower Bias may be no more than what shrinking all "
            "scores towards a constant would give."
        )
    if len(curves) and not shrinkage_curves(run):
        yield "The score-shrinkage envelope covers other tasks than the audit, so no method is compared with it."
    if len(run.frame("audit")):
        yield MARGINALS
    good = [f"{r.method} (Bias@{r.delta_name}; {r.seeds_below} of {r.seeds} seeds)" for r in verdicts if r.below]
    if good:
        yield (
            f"Below the score-shrinkage envelope of {run.reference} at no more error, in the mean over seeds: {', '.join(good)}. "
            "So their lower Bias is more than what shrinking all scores towards any one constant would give."
        )


def legend(names: Iterable[str]) -> list[tuple[str, str]]:
    """Return (short name, meaning) for what stands in column names or texts."""
    found = " ".join(names)
    return [(name.strip("@"), text) for name, text in LEGEND.items() if name in found]


def _small_groups(run: RunFolder) -> Iterator[str]:
    found = left_out(run)
    if found:
        units = steps_of(run, run.data_card.get("tasks") or ())
        yield f"Too few {units} (rows, true yes or true no) to be judged, and in no gap, mean or choice: {'; '.join(found)}."
    frame = run.frame("groups")
    flagged = frame[~frame["flag"].isin(["", "undefined", "dropped"]) & ~frame["group"].isin(NO_GROUP)]
    told = {text.split(" (")[0] for text in found}
    names = {f"{row.attribute} = {row.group}": row.flag for row in rows(flagged)}
    if found := [f"{name} ({flag})" for name, flag in names.items() if name not in told]:
        more = f" and {len(found) - _AT_MOST} more" if len(found) > _AT_MOST else ""
        yield f"Flagged, their rates are mostly noise: {', '.join(found[:_AT_MOST])}{more}."
    gaps = int(frame["value"].isna().sum())
    if gaps:
        yield f"{gaps} group metrics are undefined (empty denominator): shown as –, left out of differences, never 0."


def _data(card: Json) -> Iterator[str]:
    for name, task in (card.get("tasks") or {}).items():
        if task.get("missing"):
            yield f"Task {name}: {task['missing']:,} labels are missing; losses and metrics leave them out."
    for name, group in (card.get("groups") or {}).items():
        gone, out = group.get("missing") or 0, group.get("left_out") or 0
        if gone or out:
            rule = group.get("missing_rule") or "drop"
            yield f"Attribute {name}: {gone:,} values missing (rule: {rule}), {out:,} rows of groups left out of its metrics."
        if group.get("is_input"):
            yield f"Attribute {name} is also an input of the model."


def _method(run: RunFolder) -> Iterator[str]:
    if run.split == "val":
        yield "No test split was evaluated: the numbers are of the validation split, which also chose the checkpoints."
    else:
        yield (
            "Numbers are of the test split unless they say so. The protocol says what chose each checkpoint; how the settings "
            "were chosen is not recorded here: they are honest only if the test split had no part in it."
        )
    yield (
        "± is the standard deviation between seeds; intervals on bars are bootstrap intervals within a seed, averaged over "
        "seeds. Group metrics describe this sample; they do not establish why groups differ."
    )
    by_step = [name for name in run.data_card.get("tasks") or () if steps_of(run, [name]) == "steps"]
    if by_step:
        yield (
            f"Of {', '.join(by_step)} every labelled step counts, not every person: intervals take steps as independent and are too "
            "narrow where a person's steps are alike."
        )


def _source(card: Json) -> Iterator[str]:
    yield from map(str, card.get("notes") or [])
    if not card:
        yield "The run has no data card: sources, group sizes and missing values are not recorded."


def gain_verdict(found: pd.DataFrame) -> str:
    """Return one sentence that says which methods gain on average over tasks, and which do not."""
    gained: list[str] = []
    short: list[str] = []
    for row in rows(found[found["task"] == "mean"]):
        less = {"knowledge": row.knowledge < 0, "EP": row.ep > 0, "EO": row.eo > 0}
        lacks = ", ".join(name for name, true in less.items() if true)
        (short if lacks else gained).append(f"{row.method} ({lacks})" if lacks else str(row.method))
    return (
        f"Mean knowledge gain at least 0 and mean discrimination gain at most 0: {', '.join(gained) or 'none'}. "
        f"Short of it (in what): {'; '.join(short) or 'none'}."
    )


def comparison_notes(run: RunFolder, lacking: str, strangers: Sequence[str], first: str) -> Iterator[str]:
    """Yield the limits of a comparison; ``lacking``: why there is no drift; ``strangers``: runs of other data than ``first``."""
    yield (
        "± is the standard deviation between seeds. Intervals are 95 % bootstrap intervals of the mean paired difference to "
        f"{run.reference}: seeds are resampled, the {run.split} rows are not, so they do not cover another sample of people."
    )
    yield (
        "Ranks under raw thresholds use each method's own thresholds and are a diagnostic; those under the fixed tolerance "
        "compare. An order is robust where the difference in Bias exceeds the two drift budgets together."
    )
    yield from filter(None, [publication(run)])
    if not single_task_methods(run):
        yield "No method trains each task alone (single_task: true), so there is no knowledge or discrimination gain."
    if lacking:
        yield f"No drift diagnostics: {lacking}."
    if strangers:
        yield f"{', '.join(strangers)}: other data or another split than {first}; differences mix both."


def publication(run: RunFolder) -> str:
    """Say where published numbers come from, where the protocols differ, which methods the run lacks; "" without any."""
    section = run.recipe.get("published")
    if not section:
        return ""
    lacking = [method for method in section.get("values") or {} if method not in run.methods]
    also = f"Not in this run: {', '.join(lacking)}." if lacking else ""
    return " ".join(filter(None, [f"Published numbers: {section.get('source')}.", section.get("note"), also]))


def choice_sentence(rule: Rule, made: pd.DataFrame) -> str:
    """Say how a choice on validation data was made, what it took, and which better-looking methods it refused and why."""
    taken = ", ".join(f"{method} ({count} of {len(made)})" for method, count in made["method"].value_counts().items())
    why: dict[str, list[str]] = {}
    for refused in made["refused"]:
        for method, reason in refused.items():
            why.setdefault(method, []).append(reason)
    found = [f"{method} ({each[0]}; {len(each)} of {len(made)})" for method, each in why.items()]
    more = f" and {len(found) - _AT_MOST} more" if len(found) > _AT_MOST else ""
    return (
        f"{CHOSEN}: {'for all seeds' if rule.pooled else 'in each seed'} the lowest {' and '.join(rule.measures)} on validation data "
        f"among methods that lose at most {rule.within:g} points, or no more than chance, of AUC and accuracy or R² in every task there; "
        f"it took {taken}. "
        + (f"Refused, though lower: {', '.join(found[:_AT_MOST])}{more}." if found else "Nothing lower was refused.")
    )
