"""Statlog German Credit: Hofmann 1994, doi:10.24432/C5NC77, CC BY 4.0. Small: a quick check, no more."""

from __future__ import annotations

from libmtl_fair.data.spec import SensitiveSpec, TableSpec, TaskSpec

GERMAN = TableSpec(
    name="german",
    title="Statlog German Credit",
    source="Hofmann, H. (1994), Statlog (German Credit Data), UCI Machine Learning Repository, doi:10.24432/C5NC77",
    licence="CC BY 4.0",
    tasks={
        "bad_credit": TaskSpec(kind="binary", column="credit", positive=2, definition="credit is bad (code 2)"),
        "owns_home": TaskSpec(
            kind="binary",
            column="housing",
            positive="A152",
            forbids=("property",),
            definition="owns a home (housing A152)",
        ),
        "log_amount": TaskSpec(
            kind="regression",
            column="credit_amount",
            transform="log",
            definition="natural log of the credit amount in DM",
        ),
        "job": TaskSpec(
            kind="multiclass",
            column="job",
            classes={
                "A171": "unskilled non-resident",
                "A172": "unskilled resident",
                "A173": "skilled",
                "A174": "management or self-employed",
            },
            definition="job, 4 classes",
        ),
    },
    sensitive={
        "age": SensitiveSpec(column="age", bins=(26,), labels=("25 and under", "over 25")),
        "foreign_worker": SensitiveSpec(column="foreign_worker"),
    },
    candidates=(
        *("checking_status", "duration", "credit_history", "purpose", "credit_amount", "savings_status", "employment"),
        *("installment_rate", "personal_status", "other_parties", "residence_since", "property", "age"),
        *("other_payment_plans", "housing", "existing_credits", "job", "num_dependents", "telephone", "foreign_worker"),
    ),
    default_tasks=("bad_credit", "owns_home", "log_amount", "job"),
    default_sensitive=("age", "foreign_worker"),
    excluded={"credit": "kept as a target"},
    stratify="bad_credit",
    notes=(
        "Sex is no sensitive attribute here: code A92 of personal_status holds women who are not single and single men "
        "(South German Credit, UCI dataset 573, Groemping 2019); code tables of other columns are faulty too, so groups of "
        "foreign_worker keep their codes (A202: 37 rows).",
        "1,000 rows, bad credits over-sampled (300): too small for more than a quick check.",
        "duration and log_amount are strongly related, but that is no leak.",
    ),
)
