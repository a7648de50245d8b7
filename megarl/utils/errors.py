"""The base of failures that megarl names itself: their message says in one line what died and why."""


class RunFailure(RuntimeError):
    """A part of a run failed in a way that is understood."""
