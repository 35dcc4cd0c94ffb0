__version__ = "0.2.0"

# The releases of torch that the tests were run with, the first and the last.
OLDEST_TORCH, NEWEST_TORCH = "2.13", "2.15"


def tested_torch() -> str:
    """The tested range of torch, for messages about what a release of it has or lacks."""
    return f"inductor_vision {__version__} is tested with torch {OLDEST_TORCH} to {NEWEST_TORCH}"
