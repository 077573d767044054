"""SUPPORT2, seriously ill hospitalised adults: Vanderbilt Biostatistics; Knaus et al. 1995."""

from __future__ import annotations

from libmtl_fair.data.spec import SensitiveSpec, TableSpec, TaskSpec

_OUTCOME = "an outcome: every outcome leaks the others"

SUPPORT2 = TableSpec(
    name="support2",
    title="SUPPORT2, seriously ill hospitalised adults",
    source="obtained from hbiostat.org/data courtesy of the Vanderbilt University Department of Biostatistics; UCI Machine "
    "Learning Repository dataset 880, doi:10.3886/ICPSR02957.v2; study: Knaus et al. (1995), Ann Intern Med 122:191-203",
    licence="CC BY 4.0 by the UCI record, disputed; Vanderbilt permits use and asks for citation and acknowledgement",
    tasks={
        "hospdead": TaskSpec(kind="binary", column="hospdead", definition="died in hospital"),
        "death180": TaskSpec(
            kind="binary", expression="death == 1 and d.time <= 180", definition="died within 180 days of study entry"
        ),
        "func2m": TaskSpec(
            kind="multiclass",
            column="sfdm2",
            classes={
                "no(M2 and SIP pres)": "no disability",
                "adl>=4 (>=5 if sur)": "disability",
                "SIP>=30": "disability",
                "Coma or Intub": "disability",
                "<2 mo. follow-up": "dead",
            },
            definition="functional state after 2 months, from sfdm2",
        ),
        "log_slos": TaskSpec(
            kind="regression",
            column="slos",
            transform="log",
            definition="natural log of days from study entry to discharge",
        ),
        "log_charges": TaskSpec(
            kind="regression", column="charges", transform="log", definition="natural log of hospital charges in US$"
        ),
    },
    sensitive={
        "sex": SensitiveSpec(column="sex"),
        "race": SensitiveSpec(column="race"),
        "age": SensitiveSpec(column="age", bins=(65,), labels=("under 65", "65 and over")),
    },
    candidates=(
        *("age", "sex", "race", "dzgroup", "num.co", "scoma", "hday", "diabetes", "dementia", "ca", "meanbp", "wblc"),
        *("hrt", "resp", "temp", "pafi", "alb", "bili", "crea", "sod", "ph", "glucose", "bun", "urine", "adlsc"),
    ),
    default_tasks=("hospdead", "death180", "func2m", "log_slos", "log_charges"),
    default_sensitive=("sex", "race"),
    excluded={
        **dict.fromkeys(("hospdead", "death", "d.time", "slos", "sfdm2", "charges", "totcst", "totmcst"), _OUTCOME),
        **dict.fromkeys(
            ("surv2m", "surv6m", "prg2m", "prg6m"), "a prediction of the outcome by a model or a physician"
        ),
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
