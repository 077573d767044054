"""Datasets that fairlearn fetches from OpenML: bank marketing, ACS income, credit card, diabetes 130-US hospitals.

The choice of tasks, attributes and leaks is ours: related targets of one table, with what gives them away left out.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException

import pandas as pd

from libmtl_fair.data.spec import SensitiveSpec, TableSpec, TaskSpec
from libmtl_fair.errors import DataError


@dataclass(frozen=True)
class Fetched:
    """A dataset that is not shipped: ``fetcher`` in fairlearn.datasets, and the columns its frame must have, in order.

    ``codes`` are the columns' names in OpenML's own record, which older fairlearn versions give.
    """

    spec: TableSpec
    fetcher: str
    columns: tuple[str, ...]
    codes: tuple[str, ...] = ()

    def named(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Return ``frame`` with the proper column names."""
        frame = frame.rename(columns=str)
        if self.codes and set(self.codes) <= set(frame.columns):
            frame = frame.rename(columns=dict(zip(self.codes, self.columns)))
        return frame


_BANK_COLUMNS = (
    *("age", "job", "marital", "education", "default", "balance", "housing", "loan", "contact", "day", "month"),
    *("duration", "campaign", "pdays", "previous", "poutcome", "Class"),
)

BANK = TableSpec(
    name="bank_marketing",
    title="UCI Bank Marketing",
    source="Moro, S., Rita, P. & Cortez, P. (2012), Bank Marketing, UCI Machine Learning Repository, "
    "doi:10.24432/C5K306; OpenML 1461, fetched by fairlearn",
    licence="CC BY 4.0 (UCI record)",
    tasks={
        "deposit": TaskSpec(
            kind="binary", column="Class", positive="2", definition="subscribed a term deposit (Class 2)"
        ),
        "housing": TaskSpec(kind="binary", column="housing", positive="yes", definition="has a housing loan"),
        "loan": TaskSpec(kind="binary", column="loan", positive="yes", definition="has a personal loan"),
        "default": TaskSpec(
            kind="binary", column="default", positive="yes", definition="has credit in default (1.8 %)"
        ),
    },
    sensitive={
        "age": SensitiveSpec(column="age", bins=(25, 60), labels=("under 25", "25–59", "60 and over")),
        "marital": SensitiveSpec(column="marital"),
    },
    candidates=tuple(name for name in _BANK_COLUMNS if name not in ("duration", "Class")),
    default_tasks=("deposit", "housing", "loan"),
    default_sensitive=("age", "marital"),
    excluded={"duration": "of the call, known only when the answer is", "Class": "kept as a target"},
    stratify="deposit",
)

_ACS_COLUMNS = ("AGEP", "COW", "SCHL", "MAR", "OCCP", "POBP", "RELP", "WKHP", "SEX", "RAC1P", "PINCP")

ACS = TableSpec(
    name="acs_income",
    title="ACS Income 2018 (folktables)",
    source="Ding, Hardt, Miller, Schmidt (2021), Retiring Adult; US Census ACS PUMS 2018; OpenML 43141, fetched by fairlearn",
    licence="US Census public use microdata terms",
    tasks={
        "income": TaskSpec(kind="binary", expression="PINCP > 50000", definition="personal income above 50,000 US$"),
        "college": TaskSpec(
            kind="binary", column="SCHL", threshold=21, definition="SCHL of 21 or more (bachelor's degree)"
        ),
        "hours": TaskSpec(kind="regression", column="WKHP", definition="usual hours worked a week"),
        "long_hours": TaskSpec(kind="binary", expression="WKHP > 40", definition="more than 40 hours a week"),
        "log_income": TaskSpec(
            kind="regression", column="PINCP", transform="log", definition="natural log of personal income"
        ),
    },
    sensitive={
        "sex": SensitiveSpec(column="SEX", merge={"1": "Male", "2": "Female"}),
        "race": SensitiveSpec(column="RAC1P"),
        "age": SensitiveSpec(column="AGEP", bins=(25, 60), labels=("under 25", "25–59", "60 and over")),
    },
    candidates=("AGEP", "COW", "SCHL", "MAR", "POBP", "RELP", "WKHP", "SEX", "RAC1P"),
    default_tasks=("income", "college", "hours"),
    default_sensitive=("sex", "race"),
    excluded={"OCCP": "530 detailed occupation codes", "PINCP": "kept as a target"},
    kinds=dict.fromkeys(("COW", "MAR", "POBP", "RELP", "SEX", "RAC1P"), "categorical"),
    stratify="income",
    notes=(
        "Groups of race are the codes of RAC1P: 1 White, 2 Black, 3-5 American Indian or Alaska Native, 6 Asian, 7 Pacific "
        "Islander, 8 other, 9 two or more.",
        "1.66 million rows: use subset= for a trial, min_frequency= for the 219 birth places (POBP).",
    ),
)

_CREDIT_COLUMNS = (
    *("LIMIT_BAL", "SEX", "EDUCATION", "MARRIAGE", "AGE", "PAY_0", "PAY_2", "PAY_3", "PAY_4", "PAY_5", "PAY_6"),
    *(f"BILL_AMT{i}" for i in range(1, 7)),
    *(f"PAY_AMT{i}" for i in range(1, 7)),
    "y",
)

CREDIT = TableSpec(
    name="credit_card",
    title="UCI Default of Credit Card Clients (Taiwan 2005)",
    source="Yeh, I-C. & Lien, C. (2009), Expert Systems with Applications 36(2):2473-2480; UCI Machine Learning Repository, "
    "doi:10.24432/C55S3H; OpenML 42477, fetched by fairlearn",
    licence="CC BY 4.0 (UCI record)",
    tasks={
        "default": TaskSpec(kind="binary", column="y", positive="1", definition="defaults on the next payment"),
        "late_now": TaskSpec(
            kind="binary", column="PAY_0", threshold=1, definition="a payment is late in the last month (PAY_0 >= 1)"
        ),
        "log_limit": TaskSpec(
            kind="regression", column="LIMIT_BAL", transform="log", definition="natural log of the limit"
        ),
        "graduate": TaskSpec(
            kind="binary", column="EDUCATION", positive="1", definition="graduate school (EDUCATION 1)"
        ),
    },
    sensitive={
        "sex": SensitiveSpec(column="SEX", merge={"1": "Male", "2": "Female"}),
        "marriage": SensitiveSpec(column="MARRIAGE"),
        "age": SensitiveSpec(column="AGE", bins=(30, 45), labels=("under 30", "30–44", "45 and over")),
    },
    candidates=tuple(name for name in _CREDIT_COLUMNS if name != "y"),
    default_tasks=("default", "late_now", "log_limit"),
    default_sensitive=("sex", "age"),
    excluded={"y": "kept as a target"},
    kinds={
        **dict.fromkeys(_CREDIT_COLUMNS[:-1], "numeric"),
        **dict.fromkeys(("SEX", "EDUCATION", "MARRIAGE"), "categorical"),
    },
    stratify="default",
    notes=(
        "Groups of marriage are codes: 1 married, 2 single, 3 other, 0 undocumented.",
        "default is about the month after PAY_0; late_now takes PAY_0 out of the inputs of all tasks.",
    ),
)

_DIABETES_COLUMNS = (
    *("race", "gender", "age", "discharge_disposition_id", "admission_source_id", "time_in_hospital"),
    *("medical_specialty", "num_lab_procedures", "num_procedures", "num_medications", "primary_diagnosis"),
    *("number_diagnoses", "max_glu_serum", "A1Cresult", "insulin", "change", "diabetesMed", "medicare", "medicaid"),
    *("had_emergency", "had_inpatient_days", "had_outpatient_days", "readmitted", "readmit_binary", "readmit_30_days"),
)
_AFTER_DISCHARGE = ("readmitted", "readmit_binary", "readmit_30_days")

DIABETES = TableSpec(
    name="diabetes_hospital",
    title="Diabetes 130-US hospitals 1999-2008",
    source="Strack et al. (2014), doi:10.24432/C5230J, as prepared by the fairlearn team (2021); OpenML 43874, "
    "fetched by fairlearn",
    licence="CC BY 4.0 (UCI record)",
    tasks={
        "readmit_30_days": TaskSpec(
            kind="binary", column="readmit_30_days", positive="1", definition="readmitted within 30 days of release"
        ),
        "readmit_any": TaskSpec(
            kind="binary", column="readmit_binary", positive="1", definition="readmitted at any time in the data"
        ),
        "long_stay": TaskSpec(
            kind="binary", expression="time_in_hospital >= 7", definition="stayed for 7 days or more (1 to 14)"
        ),
        "medications": TaskSpec(kind="regression", column="num_medications", definition="distinct medications given"),
        "insulin": TaskSpec(
            kind="multiclass",
            column="insulin",
            forbids=("diabetesMed", "change"),
            definition="insulin: no, steady, up, down",
        ),
    },
    sensitive={
        "race": SensitiveSpec(column="race"),
        "gender": SensitiveSpec(column="gender"),
        "age": SensitiveSpec(column="age"),
    },
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

FETCHED: Mapping[str, Fetched] = {
    "bank_marketing": Fetched(BANK, "fetch_bank_marketing", _BANK_COLUMNS, (*(f"V{i}" for i in range(1, 17)), "Class")),
    "acs_income": Fetched(ACS, "fetch_acs_income", _ACS_COLUMNS),
    "credit_card": Fetched(CREDIT, "fetch_credit_card", _CREDIT_COLUMNS, (*(f"x{i}" for i in range(1, 24)), "y")),
    "diabetes_hospital": Fetched(DIABETES, "fetch_diabetes_hospital", _DIABETES_COLUMNS),
}
"""Datasets by name that are fetched, not shipped."""


def fetch_frame(item: Fetched) -> pd.DataFrame:
    """Return the table through fairlearn's fetcher, which keeps a copy on disk.

    Raises
    ------
    DataError : it cannot be fetched: no network, or the record has changed.
    """
    import fairlearn.datasets

    fetcher = getattr(fairlearn.datasets, item.fetcher)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scikit-learn warns of every retry
            frame: pd.DataFrame = fetcher(as_frame=True).frame
    except (OSError, ValueError, HTTPException) as error:
        raise DataError(
            f"dataset {item.spec.name!r} is not shipped and could not be fetched with fairlearn.datasets.{item.fetcher} "
            f"({type(error).__name__}: {error}). Run once with a network, or give the table: "
            f"load_dataset({item.spec.name!r}, frame=DataFrame or path of a .csv or .parquet file with the columns "
            f"{', '.join(item.columns)})"
        ) from error
    return item.named(frame)
