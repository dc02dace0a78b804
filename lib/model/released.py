"""Which models there are to be had, without loading one: those made from scratch, and those released to this machine.

It imports no jax, so that a run is refused, or begun, at once.
"""

from contextlib import suppress
from pathlib import Path

from lib.errors import RequestError

FROM_SCRATCH = ("tiny",)


def is_from_scratch(name: str) -> bool:
    return name in FROM_SCRATCH


def find_released(name: str) -> Path:
    """The folder of a released model on this machine. Raises RequestError: where it looked, what would fetch it."""
    with suppress(OSError, RuntimeError):  # a name too long for a folder, or the home of nobody
        if Path(name).expanduser().is_dir():
            return Path(name).expanduser()
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        raise RequestError(
            f"model {name}: not on this machine; looked for a folder {name} and in the Hugging Face cache "
            f"{constants.HF_HUB_CACHE}. Accept its licence on huggingface.co, then fetch it with: hf download {name}. "
            f"Made from scratch, with nothing to fetch: {', '.join(FROM_SCRATCH)}"
        ) from None
