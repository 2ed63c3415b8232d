"""The exceptions that Pronk raises on purpose.

`UserError` and its children are mistakes of the caller: the command line prints their text as one
line and exits with 2. Every other `PronkError` is ours and exits with 1.
"""


class PronkError(Exception):
    """Base of everything that Pronk raises on purpose."""

    exit_code = 1


class UserError(PronkError):
    """Bad input. The text names the argument, the value and what would work, in one line."""

    exit_code = 2


class CheckpointError(UserError):
    """A model file is missing, malformed, inconsistent or of an unsupported kind."""


class ContextLengthError(UserError):
    """A prompt or a conversation does not fit the context; nothing is ever cut silently."""

    def __init__(self, n_prompt: int, n_context: int) -> None:
        self.n_prompt, self.n_context = n_prompt, n_context
        super().__init__(
            f"prompt: {n_prompt} tokens do not fit the context of {n_context}"
            " (one must stay free for the answer); shorten it or raise --ctx"
        )


class MemoryLimitError(UserError):
    """The model does not fit the memory that is free; raised before anything is loaded."""


class DeadlineError(PronkError, TimeoutError):
    """A request had not ended when its time was up."""
