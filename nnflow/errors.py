"""What can go wrong at nnflow's public edge, and warnings for answers that are less than asked.

Every message is one line: what came, what was wanted, the likely fix. The command line prints it
and exits with 2; a traceback there is a bug of ours.
"""


class NNFlowError(Exception):
    """Something the user can mend; the message says how."""


class InputError(NNFlowError, ValueError):
    """An argument outside its range, shape, type or device."""


class BudgetError(InputError):
    """A memory budget in which not one row of a block has room.

    Attributes:
        least: bytes that would do, were there nothing else.
    """

    def __init__(self, message: str, *, least: int) -> None:
        super().__init__(message)
        self.least = least


class SourceError(NNFlowError, ValueError):
    """A source of images that is empty, unreadable or not what it was."""


class StoreError(NNFlowError, RuntimeError):
    """A folder or file that is truncated, foreign, of another version, or belongs to other data."""


class BusyError(NNFlowError, RuntimeError):
    """Another process is building in the same folder."""


class CheckpointError(NNFlowError, RuntimeError):
    """A training run that cannot be continued or opened as asked."""


class MissingExtraError(NNFlowError, ImportError):
    """An optional part of nnflow is needed and not installed, or two exclude each other."""


class DegradedWarning(UserWarning):
    """The answer is right but less than asked for, e.g. fewer neighbours than k."""
