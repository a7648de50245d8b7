"""The base of failures that megarl names itself: their message says in one line what died and why."""


class RunFailure(RuntimeError):
    """A part of a run failed in a way that is understood."""


class EngineRefused(RunFailure):
    """A living engine refused the weights that it was sent, and now holds some of them."""


def death_of(error: Exception) -> str:
    """What Ray says of an actor's death, in one line and without its page of guesses."""
    return " ".join(str(error).split()).partition(" Some common causes")[0]
