"""COMPAS, two-year recidivism: ProPublica 2016, published for public use, no formal licence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from libmtl_fair.data.frames import column_of
from libmtl_fair.data.spec import SensitiveSpec, TableSpec, TaskSpec

if TYPE_CHECKING:
    import pandas as pd


_FILTER_COLUMNS = ("days_b_screening_arrest", "is_recid", "c_charge_degree", "score_text")


def usual_filter(frame: pd.DataFrame) -> pd.Series[bool]:
    """Return which rows ProPublica's own analysis keeps: 6,172 of 7,214."""
    days, again, degree, score = (column_of(frame, name, "filter of compas") for name in _FILTER_COLUMNS)
    return days.between(-30, 30) & (again != -1) & (degree != "O") & score.notna()


COMPAS = TableSpec(
    name="compas",
    title="COMPAS, two-year recidivism (ProPublica)",
    source="Larson, Mattu, Kirchner, Angwin (2016), How We Analyzed the COMPAS Recidivism Algorithm, ProPublica; "
    "file compas-scores-two-years.csv",
    licence="published by ProPublica for public use with the article; no formal licence",
    tasks={
        "two_year_recid": TaskSpec(
            kind="binary",
            column="two_year_recid",
            definition="charged again within two years (a charge, not an offence)",
        ),
        "is_violent_recid": TaskSpec(
            kind="binary",
            column="is_violent_recid",
            definition="charged with a violent crime in the whole follow-up (not cut at two years)",
        ),
        "decile_score": TaskSpec(
            kind="regression",
            column="decile_score",
            forbids=("score_text", "v_decile_score", "v_score_text"),
            definition="COMPAS score 1-10: imitate the tool",
        ),
        "v_score_text": TaskSpec(
            kind="multiclass",
            column="v_score_text",
            classes=("Low", "Medium", "High"),
            forbids=("v_decile_score", "decile_score", "score_text"),
            definition="COMPAS violence band",
        ),
    },
    sensitive={
        "race": SensitiveSpec(column="race"),
        "sex": SensitiveSpec(column="sex"),
        "age": SensitiveSpec(column="age_cat", labels=("Less than 25", "25 - 45", "Greater than 45"), also_in=("age",)),
    },
    candidates=(
        "sex",
        "age",
        "race",
        "juv_fel_count",
        "juv_misd_count",
        "juv_other_count",
        "priors_count",
        "c_charge_degree",
        "decile_score",
        "v_decile_score",
    ),
    default_tasks=("two_year_recid", "is_violent_recid", "decile_score", "v_score_text"),
    default_sensitive=("race", "sex"),
    excluded={
        "is_recid": "an outcome: 1 whenever two_year_recid or is_violent_recid is 1",
        "two_year_recid": "kept as a target",
        "is_violent_recid": "kept as a target",
        "score_text": "a banding of decile_score",
        "v_score_text": "a banding of v_decile_score",
        "days_b_screening_arrest": "for the row filter only",
        "age_cat": "a function of age",
    },
    stratify="two_year_recid",
    keep_rows=usual_filter,
    filter="ProPublica's: days_b_screening_arrest within 30, is_recid known, no ordinary traffic offence, scored",
    notes=(
        "The label is a new charge, not a new offence, and policing differs between groups.",
        "The follow-up was cut at two years only for people without a new charge, so the base rate is inflated: 45.1 % in "
        "the whole file, 36.2 % after the correction of Barenstein (2019), arXiv:1906.04711, which this file cannot repeat.",
        "Compare African-American and Caucasian; Asian and Native American are too few for any rate.",
        "The two recidivism tasks overlap: 652 of the 692 violent cases are also two_year_recid.",
    ),
)
