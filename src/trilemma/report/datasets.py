"""Which data set a number comes from, and whether its images are synthetic."""

import json
from typing import NamedTuple

from pydantic import TypeAdapter

from trilemma.data.specs import DataSpec
from trilemma.results import Results, Run

_DATA: TypeAdapter[DataSpec] = TypeAdapter(DataSpec)


class DataUsed(NamedTuple):
    """A data set as the exports name it.

    Attributes:
        name: Such as "pneumoniamnist 28".
        synthetic: True for generated images.
        positive_class: Of two classes the one whose images sensitivity is about; "" for more classes.
    """

    name: str
    synthetic: bool
    positive_class: str = ""


def data_of(run: Run, results: Results) -> DataUsed:
    """Returns the data set of a training.

    Where all or none of the study's data are synthetic, so are a training's; in a mixed study the phantoms are.
    """
    spec = run.spec["data"]
    kinds = {facts.synthetic for facts in results.data}
    synthetic = kinds.pop() if len(kinds) == 1 else spec["kind"] == "phantom"
    label = _DATA.validate_json(json.dumps(spec)).label
    # Facts are named "data set, partition, seed"; where that name is not the label, all facts must agree.
    facts = [facts for facts in results.data if f"{facts.name}, ".startswith(f"{label}, ")] or results.data
    positive = {each.positive_class for each in facts}
    return DataUsed(label, synthetic, positive.pop() if len(positive) == 1 else "")


def data_in_words(results: Results) -> str:
    """Returns the names of all data sets of the trainings, with what is synthetic said to be so."""
    used = dict.fromkeys(data_of(run, results) for run in results.runs)
    used |= dict.fromkeys(DataUsed(facts.name, facts.synthetic) for facts in results.public)
    names = [f"{data.name} (SYNTHETIC images, not taken of patients)" if data.synthetic else data.name for data in used]
    return f"Data: {'; '.join(names) or 'none yet'}."
