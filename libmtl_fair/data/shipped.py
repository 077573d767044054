"""The data sets that come with the project, ``NAME.csv.gz``: what is known about each, what leaks what, and where it lies.

Inside the package: Adult (Becker and Kohavi 1996) and German Credit (Hofmann 1994; small: a quick check, no more), both CC BY 4.0.
Beside the recipes of the repository, as their sources give no clear licence: COMPAS (ProPublica 2016, published for public use) and
SUPPORT2 (Vanderbilt Biostatistics; Knaus et al. 1995).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from libmtl_fair.data.frames import column_of
from libmtl_fair.data.spec import SensitiveSpec, TableSpec, age_bands, attributes, comparison, task, words
from libmtl_fair.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

_TARGET = "kept as a target"
_OUTCOME = "an outcome: every outcome leaks the others"


def usual_filter(frame: pd.DataFrame) -> pd.Series[bool]:
    """Return which rows of COMPAS ProPublica's own analysis keeps: 6,172 of 7,214."""
    names = ("days_b_screening_arrest", "is_recid", "c_charge_degree", "score_text")
    days, again, degree, score = (column_of(frame, name, "filter of compas") for name in names)
    return days.between(-30, 30) & (again != -1) & (degree != "O") & score.notna()


ADULT = TableSpec(
    name="adult",
    title="UCI Adult (census income 1994)",
    source="Becker, B. & Kohavi, R. (1996), Adult, UCI Machine Learning Repository, doi:10.24432/C5XW20",
    licence="CC BY 4.0",
    tasks={
        "income": task("binary", "income", "income above 50K US$", positive=">50K"),
        "college": task(
            "binary", "education-num", "education-num of 13 or more (Bachelors)", "education", threshold=13
        ),
        "hours": task("regression", "hours-per-week", "hours worked a week"),
        "occupation": task(
            "multiclass",
            "occupation",
            "occupation, 13 classes; Armed-Forces (15 rows) unlabelled",
            classes=words(
                "Adm-clerical Craft-repair Exec-managerial Farming-fishing Handlers-cleaners Machine-op-inspct "
                "Other-service Priv-house-serv Prof-specialty Protective-serv Sales Tech-support Transport-moving"
            ),
        ),
        "never_married": task(
            "binary", "marital-status", "marital-status is Never-married", "relationship", positive="Never-married"
        ),
        "long_hours": comparison("hours-per-week > 40", "more than 40 hours a week"),
    },
    sensitive=attributes("sex race") | {"age": age_bands("age", 25, 60)},
    candidates=words(
        "age workclass race sex capital-gain capital-loss native-country marital-status relationship education"
    ),
    default_tasks=("income", "college", "hours", "occupation"),
    default_sensitive=("sex", "race"),
    excluded={
        "fnlwgt": "survey weight made from demographics",
        "education-num": "the same as education",
        **dict.fromkeys(("occupation", "hours-per-week", "income"), _TARGET),
    },
    stratify="income",
    notes=(
        "The column relationship (Husband, Wife) tells the sex of 45.1 % of the rows.",
        "Old data: few women of the sample reach 50K in 1994; capital-gain is capped at 99,999, hours-per-week at 99; "
        "labels are survey answers. See Ding et al. (2021), Retiring Adult.",
        "52 exact duplicate rows are kept.",
    ),
)

COMPAS = TableSpec(
    name="compas",
    title="COMPAS, two-year recidivism (ProPublica)",
    source="Larson, Mattu, Kirchner, Angwin (2016), How We Analyzed the COMPAS Recidivism Algorithm, ProPublica; "
    "file compas-scores-two-years.csv",
    licence="published by ProPublica for public use with the article; no formal licence",
    tasks={
        "two_year_recid": task("binary", "two_year_recid", "charged again within two years (a charge, not an offence)"),
        "is_violent_recid": task(
            "binary", "is_violent_recid", "charged with a violent crime in the whole follow-up (not cut at two years)"
        ),
        "decile_score": task(
            "regression",
            "decile_score",
            "COMPAS score 1-10: imitate the tool",
            "score_text v_decile_score v_score_text",
        ),
        "v_score_text": task(
            "multiclass",
            "v_score_text",
            "COMPAS violence band",
            "v_decile_score decile_score score_text",
            classes=("Low", "Medium", "High"),
        ),
    },
    sensitive={
        **attributes("race sex"),
        "age": SensitiveSpec(column="age_cat", labels=("Less than 25", "25 - 45", "Greater than 45"), also_in=("age",)),
    },
    candidates=words(
        "sex age race juv_fel_count juv_misd_count juv_other_count priors_count c_charge_degree decile_score v_decile_score"
    ),
    default_tasks=("two_year_recid", "is_violent_recid", "decile_score", "v_score_text"),
    default_sensitive=("race", "sex"),
    excluded={
        "is_recid": "an outcome: 1 whenever two_year_recid or is_violent_recid is 1",
        "two_year_recid": _TARGET,
        "is_violent_recid": _TARGET,
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

GERMAN = TableSpec(
    name="german",
    title="Statlog German Credit",
    source="Hofmann, H. (1994), Statlog (German Credit Data), UCI Machine Learning Repository, doi:10.24432/C5NC77",
    licence="CC BY 4.0",
    tasks={
        "bad_credit": task("binary", "credit", "credit is bad (code 2)", positive=2),
        "owns_home": task("binary", "housing", "owns a home (housing A152)", "property", positive="A152"),
        "log_amount": task("regression", "credit_amount", "natural log of the credit amount in DM", transform="log"),
        "job": task(
            "multiclass",
            "job",
            "job, 4 classes",
            classes={
                "A171": "unskilled non-resident",
                "A172": "unskilled resident",
                "A173": "skilled",
                "A174": "management or self-employed",
            },
        ),
    },
    sensitive={
        "age": SensitiveSpec(column="age", bins=(26,), labels=("25 and under", "over 25")),
        "foreign_worker": SensitiveSpec(column="foreign_worker"),
    },
    candidates=words(
        "checking_status duration credit_history purpose credit_amount savings_status employment installment_rate "
        "personal_status other_parties residence_since property age other_payment_plans housing existing_credits job "
        "num_dependents telephone foreign_worker"
    ),
    default_tasks=("bad_credit", "owns_home", "log_amount", "job"),
    default_sensitive=("age", "foreign_worker"),
    excluded={"credit": _TARGET},
    stratify="bad_credit",
    notes=(
        "Sex is no sensitive attribute here: code A92 of personal_status holds women who are not single and single men "
        "(South German Credit, UCI dataset 573, Groemping 2019); code tables of other columns are faulty too, so groups of "
        "foreign_worker keep their codes (A202: 37 rows).",
        "1,000 rows, bad credits over-sampled (300): too small for more than a quick check.",
        "duration and log_amount are strongly related, but that is no leak.",
    ),
)

SUPPORT2 = TableSpec(
    name="support2",
    title="SUPPORT2, seriously ill hospitalised adults",
    source="obtained from hbiostat.org/data courtesy of the Vanderbilt University Department of Biostatistics; UCI Machine "
    "Learning Repository dataset 880, doi:10.3886/ICPSR02957.v2; study: Knaus et al. (1995), Ann Intern Med 122:191-203",
    licence="CC BY 4.0 by the UCI record, disputed; Vanderbilt permits use and asks for citation and acknowledgement",
    tasks={
        "hospdead": task("binary", "hospdead", "died in hospital"),
        "death180": comparison("death == 1 and d.time <= 180", "died within 180 days of study entry"),
        "func2m": task(
            "multiclass",
            "sfdm2",
            "functional state after 2 months, from sfdm2",
            classes={
                "no(M2 and SIP pres)": "no disability",
                **dict.fromkeys(("adl>=4 (>=5 if sur)", "SIP>=30", "Coma or Intub"), "disability"),
                "<2 mo. follow-up": "dead",
            },
        ),
        "log_slos": task("regression", "slos", "natural log of days from study entry to discharge", transform="log"),
        "log_charges": task("regression", "charges", "natural log of hospital charges in US$", transform="log"),
    },
    sensitive=attributes("sex race") | {"age": age_bands("age", 65)},
    candidates=words(
        "age sex race dzgroup num.co scoma hday diabetes dementia ca meanbp wblc hrt resp temp pafi alb bili crea sod ph "
        "glucose bun urine adlsc"
    ),
    default_tasks=("hospdead", "death180", "func2m", "log_slos", "log_charges"),
    default_sensitive=("sex", "race"),
    excluded={
        **dict.fromkeys(words("hospdead death d.time slos sfdm2 charges totcst totmcst"), _OUTCOME),
        **dict.fromkeys(words("surv2m surv6m prg2m prg6m"), "a prediction of the outcome by a model or a physician"),
        **dict.fromkeys(("dnr", "dnrday"), "do-not-resuscitate order, set during the stay"),
        "avtisst": "treatment intensity of days 3-25: later events",
        **dict.fromkeys(("adlp", "adls"), "who could answer depends on the course of the illness"),
        **dict.fromkeys(("sps", "aps"), "scores of earlier models; the provider advises against them"),
        **dict.fromkeys(("edu", "income"), "from interviews that the sickest could not give; for audits only"),
        "dzclass": "a coarsening of dzgroup",
    },
    stratify="hospdead",
    notes=(
        "Base rates hardly differ between the sexes or between white and black: expect small, mostly noisy gaps.",
        "Charges differ by race, perhaps by hospital, which the file does not name.",
        "pafi and ph were measured in the sicker, so that their gaps carry information (known on day 3).",
        "Tasks are related by construction: hospdead implies death180 in all but 2 rows.",
        "Compare white and black; asian and other are about 100 rows each, 42 rows have no race.",
    ),
)

SHIPPED = {spec.name: spec for spec in (ADULT, COMPAS, GERMAN, SUPPORT2)}
"""Data sets by name whose files are inside the package."""

DATA_FOLDER = "LIBMTL_FAIR_DATA"
"""Environment variable: a folder of one's own with NAME.csv.gz, looked into first."""
_ELSEWHERE = {
    "compas": "made of compas-scores-two-years.csv of ProPublica (github.com/propublica/compas-analysis)",
    "support2": "made of support2csv.zip of Vanderbilt Biostatistics (hbiostat.org/data)",
}


def shipped_file(name: str) -> Path:
    """Return the file of a data set: of :data:`DATA_FOLDER`, the package, or the repository's ``recipes/data``.

    Raises
    ------
    DataError
        It is in none of them, as COMPAS and SUPPORT2 are not where the package is installed: it says where they are to be had.
    """
    here, given = Path(__file__).resolve().parent, os.environ.get(DATA_FOLDER)
    folders = [*([Path(given)] if given else []), here / "files", here.parents[1] / "recipes" / "data"]
    found = next((path for folder in folders if (path := folder / f"{name}.csv.gz").is_file()), None)
    if found is None:
        raise DataError(
            f"dataset {name!r} is not in the installed package, as its source gives no clear licence: take recipes/data/{name}.csv.gz from "
            f"the project's repository ({_ELSEWHERE.get(name, 'see its data card')}), put it into a folder and set {DATA_FOLDER} to that, "
            f"or give the table: load_dataset({name!r}, frame=...)"
        )
    return found
