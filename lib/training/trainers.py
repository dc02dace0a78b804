"""Whether another trainer than our own is there; no jax is imported for it, so that a run is refused at once."""

from importlib.metadata import PackageNotFoundError, version

from lib.errors import RequestError

INSTALL = "python -m pip install --no-deps -r requirements-tunix.txt"


def tunix_version() -> str:
    """The installed version of Tunix. Raises RequestError where there is none, with what installs it."""
    try:
        return version("google-tunix")
    except PackageNotFoundError:
        raise RequestError(
            f"training.trainer: tunix needs google-tunix, which is not installed; install it with: {INSTALL}"
        ) from None
