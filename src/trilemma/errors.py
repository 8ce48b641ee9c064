"""The two ways in which a command may end badly, each one clear message and an exit code."""


class TrilemmaError(Exception):
    """An end with a message for the user: where it is, what is wrong, what to do.

    Args:
        where: The file, field or record, as the user knows it: `study.toml: base.local.batch_size`.
        problem: What is wrong with it, in one sentence without a full stop.
        remedy: What to do, in one sentence without a full stop.
    """

    exit_code = 1

    def __init__(self, where: str, problem: str, remedy: str):
        super().__init__(where, problem, remedy)  # all three, so that it survives the way back from a worker
        self.where = where
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}. {self.remedy}."


class UserError(TrilemmaError):
    """The user asked for something that cannot be: exit code 2."""

    exit_code = 2


class Failure(TrilemmaError):
    """The request was right but could not be carried out (a full disk, a broken store): exit code 1."""

    exit_code = 1
