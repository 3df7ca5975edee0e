"""How a command ends early: by mistakes the user can mend, by failures."""


class UserError(Exception):
    """A mistake the user can mend; doors print it as one line and exit 2."""


class Checklist(UserError):
    """Several mistakes at once, a line each; doors print the lines as they stand."""


class RunFailure(Exception):
    """Work that could not go on, such as a loss that is not a number; doors exit 1."""


class LostPeer(RunFailure):
    """Another process of the run has died: nothing can be finished together with it."""
