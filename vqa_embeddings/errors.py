"""The ways in which this program says no: to a whole launch, before or during it, and to a single row."""

SAME_COMMAND = (
    "the same command continues"  # what a StorageError ends with; `messages.fail` says more where that is needed
)
LONGEST_SHOWN = 300  # characters of what a sentence quotes


class InputError(Exception):
    """The input, the arguments or the output folder are refused before any work: exit status 2.

    The message is one sentence for the user: what was found, what was expected, what to do.
    """


class StorageError(Exception):
    """A disk, a folder or the machine itself fails in the middle of the work: exit status 1.

    The message is one sentence for the user, as that of `InputError`.
    """


class NothingFiniteError(Exception):
    """The first rows have all failed by NonFiniteValues, as every other would: exit status 1.

    The message is one sentence for the user, as that of `InputError`.
    """


class SelfCheckError(Exception):
    """The vectors or answers differ from the reference's by more than they may: exit status 1.

    The message is one sentence for the user, as that of `InputError`.
    """


class RowError(Exception):
    """One row cannot be extracted. It is recorded as data, and the others go on.

    The name of the subclass is what `failed.csv` shows as `error`; the text is its `message`. It may be raised while a
    picture is prepared (`app.extract`), and while a prompt is made (`engine.core`); `engine.outcome` checks what is
    to be stored. An error of another kind, or in another place, ends the run.
    """

    def __init__(self, message: str, errno: int | None = None) -> None:
        super().__init__(message)
        self.errno = errno  # what the operating system has said, where it has said something


class PictureNotFound(RowError):
    """No file lies where the row's picture should be. From `data.picture_paths`."""


class PictureOutsideFolder(RowError):
    """The row's picture is named by an absolute path that leads elsewhere, or by one that climbs.

    From `data.picture_paths`.
    """


class PictureUnreadable(RowError):
    """The file is there, but no picture can be made of it.

    From `data.decode`, by its `unreadable_picture` and `damaged_picture`, from `data.decode_pool`, and the families.
    """


class QuestionEmpty(RowError):
    """The row's question has no text, or nothing but white space. From `app.extract`."""


class PromptTooLong(RowError):
    """The prompt has more tokens than the model's context. From the families."""


class NonFiniteValues(RowError):
    """A vector of the row, or the logits of a token of its answer, hold a NaN or an infinity. From `engine.outcome`."""


def quoted(text: str) -> str:
    """A text as a sentence shows it: between quotation marks, on one line, and not too long."""
    return repr(text) if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]!r}…"


def one_line(error: object) -> str:
    """An error's message without line breaks, and not too long for a sentence."""
    return " ".join(str(error).split())[:LONGEST_SHOWN] or type(error).__name__
