"""UCI Adult (census income 1994): Becker and Kohavi 1996, doi:10.24432/C5XW20, CC BY 4.0."""

from __future__ import annotations

from libmtl_fair.data.spec import SensitiveSpec, TableSpec, TaskSpec

OCCUPATIONS = (
    "Adm-clerical",
    "Craft-repair",
    "Exec-managerial",
    "Farming-fishing",
    "Handlers-cleaners",
    "Machine-op-inspct",
    "Other-service",
    "Priv-house-serv",
    "Prof-specialty",
    "Protective-serv",
    "Sales",
    "Tech-support",
    "Transport-moving",
)
"""Classes of the task ``occupation``; the 15 rows of Armed-Forces count as unlabelled."""

ADULT = TableSpec(
    name="adult",
    title="UCI Adult (census income 1994)",
    source="Becker, B. & Kohavi, R. (1996), Adult, UCI Machine Learning Repository, doi:10.24432/C5XW20",
    licence="CC BY 4.0",
    tasks={
        "income": TaskSpec(kind="binary", column="income", positive=">50K", definition="income above 50K US$"),
        "college": TaskSpec(
            kind="binary",
            column="education-num",
            threshold=13,
            forbids=("education",),
            definition="education-num of 13 or more (Bachelors)",
        ),
        "hours": TaskSpec(kind="regression", column="hours-per-week", definition="hours worked a week"),
        "occupation": TaskSpec(
            kind="multiclass",
            column="occupation",
            classes=OCCUPATIONS,
            definition="occupation, 13 classes; Armed-Forces (15 rows) unlabelled",
        ),
        "never_married": TaskSpec(
            kind="binary",
            column="marital-status",
            positive="Never-married",
            forbids=("relationship",),
            definition="marital-status is Never-married",
        ),
        "long_hours": TaskSpec(kind="binary", expression="hours-per-week > 40", definition="more than 40 hours a week"),
    },
    sensitive={
        "sex": SensitiveSpec(column="sex"),
        "race": SensitiveSpec(column="race"),
        "age": SensitiveSpec(column="age", bins=(25, 60), labels=("under 25", "25–59", "60 and over")),
    },
    candidates=(
        "age",
        "workclass",
        "race",
        "sex",
        "capital-gain",
        "capital-loss",
        "native-country",
        "marital-status",
        "relationship",
        "education",
    ),
    default_tasks=("income", "college", "hours", "occupation"),
    default_sensitive=("sex", "race"),
    excluded={
        "fnlwgt": "survey weight made from demographics",
        "education-num": "the same as education",
        "occupation": "kept as a target",
        "hours-per-week": "kept as a target",
        "income": "kept as a target",
    },
    stratify="income",
    notes=(
        "The column relationship (Husband, Wife) tells the sex of 45.1 % of the rows.",
        "Old data: few women of the sample reach 50K in 1994; capital-gain is capped at 99,999, hours-per-week at 99; "
        "labels are survey answers. See Ding et al. (2021), Retiring Adult.",
        "52 exact duplicate rows are kept.",
    ),
)
