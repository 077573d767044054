"""Datasets that fairlearn fetches from OpenML: bank marketing, ACS income, credit card, diabetes 130-US hospitals.

The choice of tasks, attributes and leaks is ours: related targets of one table, with what gives them away left out.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException

import pandas as pd

from libmtl_fair.data.spec import SensitiveSpec, TableSpec, age_bands, attributes, comparison, task, words
from libmtl_fair.errors import DataError

_TARGET = "kept as a target"
_AFTER_DISCHARGE = ("readmitted", "readmit_binary", "readmit_30_days")
_BANK_COLUMNS = words(
    "age job marital education default balance housing loan contact day month duration campaign pdays previous poutcome Class"
)
_ACS_COLUMNS = words("AGEP COW SCHL MAR OCCP POBP RELP WKHP SEX RAC1P PINCP")
_CREDIT_COLUMNS = (
    *words("LIMIT_BAL SEX EDUCATION MARRIAGE AGE PAY_0 PAY_2 PAY_3 PAY_4 PAY_5 PAY_6"),
    *(f"BILL_AMT{i}" for i in range(1, 7)),
    *(f"PAY_AMT{i}" for i in range(1, 7)),
    "y",
)
_DIABETES_COLUMNS = words(
    "race gender age discharge_disposition_id admission_source_id time_in_hospital medical_specialty num_lab_procedures "
    "num_procedures num_medications primary_diagnosis number_diagnoses max_glu_serum A1Cresult insulin change diabetesMed "
    "medicare medicaid had_emergency had_inpatient_days had_outpatient_days readmitted readmit_binary readmit_30_days"
)

BANK = TableSpec(
    name="bank_marketing",
    title="UCI Bank Marketing",
    source="Moro, S., Rita, P. & Cortez, P. (2012), Bank Marketing, UCI Machine Learning Repository, "
    "doi:10.24432/C5K306; OpenML 1461, fetched by fairlearn",
    licence="CC BY 4.0 (UCI record)",
    tasks={
        "deposit": task("binary", "Class", "subscribed a term deposit (Class 2)", positive="2"),
        "housing": task("binary", "housing", "has a housing loan", positive="yes"),
        "loan": task("binary", "loan", "has a personal loan", positive="yes"),
        "default": task("binary", "default", "has credit in default (1.8 %)", positive="yes"),
    },
    sensitive={"age": age_bands("age", 25, 60), "marital": SensitiveSpec(column="marital")},
    candidates=tuple(name for name in _BANK_COLUMNS if name not in ("duration", "Class")),
    default_tasks=("deposit", "housing", "loan"),
    default_sensitive=("age", "marital"),
    excluded={"duration": "of the call, known only when the answer is", "Class": _TARGET},
    stratify="deposit",
)

ACS = TableSpec(
    name="acs_income",
    title="ACS Income 2018 (folktables)",
    source="Ding, Hardt, Miller, Schmidt (2021), Retiring Adult; US Census ACS PUMS 2018; OpenML 43141, fetched by fairlearn",
    licence="US Census public use microdata terms",
    tasks={
        "income": comparison("PINCP > 50000", "personal income above 50,000 US$"),
        "college": task("binary", "SCHL", "SCHL of 21 or more (bachelor's degree)", threshold=21),
        "hours": task("regression", "WKHP", "usual hours worked a week"),
        "long_hours": comparison("WKHP > 40", "more than 40 hours a week"),
        "log_income": task("regression", "PINCP", "natural log of personal income", transform="log"),
    },
    sensitive={
        "sex": SensitiveSpec(column="SEX", merge={"1": "Male", "2": "Female"}),
        "race": SensitiveSpec(column="RAC1P"),
        "age": age_bands("AGEP", 25, 60),
    },
    candidates=words("AGEP COW SCHL MAR POBP RELP WKHP SEX RAC1P"),
    default_tasks=("income", "college", "hours"),
    default_sensitive=("sex", "race"),
    excluded={"OCCP": "530 detailed occupation codes", "PINCP": _TARGET},
    kinds=dict.fromkeys(words("COW MAR POBP RELP SEX RAC1P"), "categorical"),
    stratify="income",
    notes=(
        "Groups of race are the codes of RAC1P: 1 White, 2 Black, 3-5 American Indian or Alaska Native, 6 Asian, 7 Pacific "
        "Islander, 8 other, 9 two or more.",
        "1.66 million rows: use subset= for a trial, min_frequency= for the 219 birth places (POBP).",
    ),
)

CREDIT = TableSpec(
    name="credit_card",
    title="UCI Default of Credit Card Clients (Taiwan 2005)",
    source="Yeh, I-C. & Lien, C. (2009), Expert Systems with Applications 36(2):2473-2480; UCI Machine Learning Repository, "
    "doi:10.24432/C55S3H; OpenML 42477, fetched by fairlearn",
    licence="CC BY 4.0 (UCI record)",
    tasks={
        "default": task("binary", "y", "defaults on the next payment", positive="1"),
        "late_now": task("binary", "PAY_0", "a payment is late in the last month (PAY_0 >= 1)", threshold=1),
        "log_limit": task("regression", "LIMIT_BAL", "natural log of the limit", transform="log"),
        "graduate": task("binary", "EDUCATION", "graduate school (EDUCATION 1)", positive="1"),
    },
    sensitive={
        "sex": SensitiveSpec(column="SEX", merge={"1": "Male", "2": "Female"}),
        "marriage": SensitiveSpec(column="MARRIAGE"),
        "age": age_bands("AGE", 30, 45),
    },
    candidates=_CREDIT_COLUMNS[:-1],
    default_tasks=("default", "late_now", "log_limit"),
    default_sensitive=("sex", "age"),
    excluded={"y": _TARGET},
    kinds=dict.fromkeys(_CREDIT_COLUMNS[:-1], "numeric")
    | dict.fromkeys(("SEX", "EDUCATION", "MARRIAGE"), "categorical"),
    stratify="default",
    notes=(
        "Groups of marriage are codes: 1 married, 2 single, 3 other, 0 undocumented.",
        "default is about the month after PAY_0; late_now takes PAY_0 out of the inputs of all tasks.",
    ),
)

DIABETES = TableSpec(
    name="diabetes_hospital",
    title="Diabetes 130-US hospitals 1999-2008",
    source="Strack et al. (2014), doi:10.24432/C5230J, as prepared by the fairlearn team (2021); OpenML 43874, "
    "fetched by fairlearn",
    licence="CC BY 4.0 (UCI record)",
    tasks={
        "readmit_30_days": task("binary", "readmit_30_days", "readmitted within 30 days of release", positive="1"),
        "readmit_any": task("binary", "readmit_binary", "readmitted at any time in the data", positive="1"),
        "long_stay": comparison("time_in_hospital >= 7", "stayed for 7 days or more (1 to 14)"),
        "medications": task("regression", "num_medications", "distinct medications given"),
        "insulin": task("multiclass", "insulin", "insulin: no, steady, up, down", "diabetesMed change"),
    },
    sensitive=attributes("race gender age"),
    candidates=tuple(name for name in _DIABETES_COLUMNS if name not in _AFTER_DISCHARGE),
    default_tasks=("readmit_30_days", "readmit_any", "long_stay"),
    default_sensitive=("race", "gender"),
    excluded=dict.fromkeys(_AFTER_DISCHARGE, "known after the release only: readmission in another form"),
    kinds=dict.fromkeys(("discharge_disposition_id", "admission_source_id"), "categorical"),
    stratify="readmit_30_days",
    notes=(
        "gender has 3 rows Unknown/Invalid: keep_groups={'gender': ['Female', 'Male']} leaves them out of statistics.",
    ),
)


@dataclass(frozen=True)
class Fetched:
    """A dataset that is not shipped: its frame's columns in order, and their ``codes`` in OpenML (older fairlearn)."""

    spec: TableSpec
    columns: tuple[str, ...]
    codes: tuple[str, ...] = ()

    def named(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Return ``frame`` with the proper column names."""
        frame = frame.rename(columns=str)
        if self.codes and set(self.codes) <= set(frame.columns):
            frame = frame.rename(columns=dict(zip(self.codes, self.columns)))
        return frame

    def frame(self) -> pd.DataFrame:
        """Return the table through fairlearn's fetcher, which keeps a copy on disk."""
        import fairlearn.datasets

        name, fetcher = self.spec.name, f"fetch_{self.spec.name}"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # scikit-learn warns of every retry
                frame: pd.DataFrame = getattr(fairlearn.datasets, fetcher)(as_frame=True).frame
        except (OSError, ValueError, HTTPException) as error:
            raise DataError(
                f"dataset {name!r} is not shipped and could not be fetched with fairlearn.datasets.{fetcher} "
                f"({type(error).__name__}: {error}). Run once with a network, or give the table: "
                f"load_dataset({name!r}, frame=DataFrame or path of a .csv or .parquet file with the columns "
                f"{', '.join(self.columns)})"
            ) from error
        return self.named(frame)


_ALL = (
    Fetched(BANK, _BANK_COLUMNS, (*(f"V{i}" for i in range(1, 17)), "Class")),
    Fetched(ACS, _ACS_COLUMNS),
    Fetched(CREDIT, _CREDIT_COLUMNS, (*(f"x{i}" for i in range(1, 24)), "y")),
    Fetched(DIABETES, _DIABETES_COLUMNS),
)
FETCHED: Mapping[str, Fetched] = {item.spec.name: item for item in _ALL}
"""Datasets by name that are fetched, not shipped."""
