import pickle

import pytest

from trilemma.errors import Failure, TrilemmaError, UserError


@pytest.mark.parametrize(("kind", "code"), [(UserError, 2), (Failure, 1)])
def test_each_end_has_its_code_and_message(kind, code):
    error = kind("study.toml: base.rounds", "0 is too few", "Give at least 1")
    assert isinstance(error, TrilemmaError)
    assert error.exit_code == code
    assert str(error) == "study.toml: base.rounds: 0 is too few. Give at least 1."


@pytest.mark.parametrize("kind", [UserError, Failure])
def test_an_error_survives_the_way_back_from_a_worker(kind):
    error = pickle.loads(pickle.dumps(kind("where", "problem", "remedy")))
    assert type(error) is kind
    assert (error.where, error.problem, error.remedy) == ("where", "problem", "remedy")
