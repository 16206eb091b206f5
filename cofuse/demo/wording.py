"""How an entity becomes text: three orders of words, four templates in each.

One wording per fact trains the loss and not the knowledge (a fact learned in one wording is not
found under another), so every private entity is written once in each order: its name first, its
name last, and as a clinical note. A definition is quoted whole and unaltered.
"""

from collections.abc import Mapping
from typing import Final

from cofuse.demo.sources import Entity, Kind

ORDERS: Final = 3
ALSO_SHOWN: Final = 3

TEMPLATES: Final[Mapping[Kind, tuple[tuple[str, ...], ...]]] = {
    "code": (
        (
            "ICD-10-CM code {code} stands for {name}. It is filed under {parent}.{also}",
            "In the coding manual {code} is the entry for {name}, within {parent}.",
            "{code} means {name}.{also} The group it sits in is {parent}.",
            "Code {code} was assigned at discharge; it denotes {name} ({parent}).",
        ),
        (
            "{name} is coded as {code}. The group above it is {parent}.{also}",
            "Within {parent} there is an entry for {name}, and its code is {code}.",
            "Patients with {name} are registered under {code}.{also}",
            "A diagnosis of {name} belongs to {parent} and takes the code {code}.",
        ),
        (
            "Assessment: {name}. Billed as {code}. Grouped with {parent}.",
            "Dx: {name} ({code}). Seen on the ward, stable, review in clinic.{also}",
            "Discharge summary. Principal diagnosis {code}: {name}. Group: {parent}.",
            "Referral. Known {name}, coded {code}; group {parent}. Kindly advise.",
        ),
    ),
    "disease": (
        (
            "{name}: {definition}{also}",
            "{name} is a kind of {parent}. {definition}",
            "Notes on {name}. {definition} It is listed under {parent}.",
            "The textbook has a page on {name}. {definition}{also}",
        ),
        (
            "{definition} Clinicians speak of {name}.{also}",
            "{definition} These are the features of {name}, one form of {parent}.",
            "{definition} The diagnosis to make is {name}.",
            "{definition} Such a case is filed as {name}.{also}",
        ),
        (
            "Case conference. Working diagnosis {name}. Background: {definition}",
            "Referred for {name} ({parent}). {definition}",
            "Family meeting about {name}. Explained to them: {definition}{also}",
            "Dear colleague, your patient has {name}. {definition}",
        ),
    ),
    "sign": (
        (
            "{name}: {definition}{also}",
            "{name} is a finding of the type {parent}. {definition}",
            "How to recognise {name}. {definition}{also}",
            "The examiner should know {name}. {definition} See also {parent}.",
        ),
        (
            "{definition} On the chart this goes down as {name}.{also}",
            "{definition} The finding is recorded as {name}, under {parent}.",
            "{definition} Examiners write {name}.",
            "{definition} This observation has a term: {name}.{also}",
        ),
        (
            "On examination: {name}. {definition}",
            "Ward round. Patient shows {name} ({parent}). {definition}",
            "Finding noted today: {name}. Meaning: {definition}{also}",
            "Hx and exam. Positive for {name}. {definition} Compare {parent}.",
        ),
    ),
}

QUESTION_FRAMES: Final[Mapping[Kind, tuple[str, str]]] = {
    "code": ("code->description", "The insurer received a form with {fact} on it, so we treated"),
    "disease": ("definition->disease", "{fact} If you had to name that illness, you would say"),
    "sign": ("definition->sign", "{fact} If you had to name that symptom, you would say"),
}
"""Kind of question and its wording, which no template above uses; the answer continues it."""


def render(entity: Entity, order: int, variant: int) -> str:
    """One document about an entity: `order` in 0..2; `variant` is taken modulo the templates."""
    templates = TEMPLATES[entity.kind][order]
    also = "; ".join(entity.also[:ALSO_SHOWN])
    return templates[variant % len(templates)].format(
        name=entity.name,
        code=entity.code,
        parent=entity.parent,
        definition=_sentence(entity.definition),
        also=f" Also called {also}." if also else "",
    )


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."
