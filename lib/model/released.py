"""Which models there are to be had, without loading one: those made from scratch, and those released by Google.

    find_released("google/gemma-3-270m-it")     # a folder of that name, or the Hugging Face cache, or its hub

It imports no jax, so that a run is refused, or begun, at once.
"""

import json
import os
from contextlib import suppress
from pathlib import Path

from lib.errors import RequestError
from lib.files import places_of

FROM_SCRATCH = ("tiny",)

# What is fetched of a release; others hold the same weights once more, as .gguf or as a pickle.
FILES = [
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template*",
    "*.safetensors", "*.safetensors.index.json",
]  # fmt: skip
WEIGHTS = "*.safetensors"
INDEX = "model.safetensors.index.json"  # which of several files each part of the weights is in
NEEDED = ("config.json", "tokenizer.json", WEIGHTS)


def is_from_scratch(name: str) -> bool:
    return name in FROM_SCRATCH


def find_released(name: str, fetch: bool = True, files: list[str] = FILES) -> Path:
    """The folder of a released model; what is not on this machine is fetched from the hub, unless told not to.

    Where not all `files` are wanted, only those are looked for and fetched.

    What is there once is used ever after, and the hub is not asked again. HF_HUB_OFFLINE, HF_TOKEN, HF_HOME and
    HF_ENDPOINT mean what they mean elsewhere. Raises RequestError: where it looked, why it was not fetched, what to do.
    """
    with suppress(OSError, RuntimeError):  # a name too long for a folder, or the home of nobody
        if folder := next((place for place in places_of(os.path.expanduser(name)) if place.is_dir()), None):
            return folder
    from huggingface_hub import constants, snapshot_download

    try:
        if found := _cached(name, files):
            return found
        if fetch:
            return Path(snapshot_download(name, allow_patterns=files))
        why = f"fetch it with: hf download {name}"
    except Exception as error:  # whatever the network, the disk and the libraries between them raise
        why = _what_to_do(name, error)
    raise RequestError(
        f"model {name}: not on this machine; looked for a folder {name} and in the Hugging Face cache "
        f"{constants.HF_HUB_CACHE}. {why}. Made from scratch, with nothing to fetch: {', '.join(FROM_SCRATCH)}"
    ) from None


def _cached(name: str, files: list[str]) -> Path | None:
    """The folder in the local cache, where it holds all that is needed of these files."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, allow_patterns=files, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    needed = {pattern for pattern in NEEDED if pattern in files}
    if WEIGHTS in needed:
        needed |= _parts(folder)
    return folder if all(any(folder.glob(pattern)) for pattern in needed) else None


def _parts(folder: Path) -> set[str]:
    """The files that the weights are divided among, where they are."""
    with suppress(OSError, ValueError, KeyError, AttributeError):
        return set(json.loads((folder / INDEX).read_bytes())["weight_map"].values())
    return set()


def _what_to_do(name: str, error: Exception) -> str:
    """Why it could not be fetched, and what would help; of two errors that fit, the narrower one comes first."""
    from huggingface_hub import constants, errors

    hub, login = constants.ENDPOINT, "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__:  # says only that it is not here
        error = error.__cause__
    match error:
        case errors.HFValidationError():
            return "Nor is it a name that a hub could have; expected OWNER/NAME, or a folder that is there"
        case errors.OfflineModeIsEnabled():
            return f"HF_HUB_OFFLINE is set, so nothing is fetched; unset it, or fetch it elsewhere: hf download {name}"
        case errors.GatedRepoError():
            return f"It is gated: accept its licence on {hub}/{name}, then {login}"
        case errors.RepositoryNotFoundError():
            return f"{hub} has no such model, or does not show it to everybody: check the name, or {login}"
        case errors.HfHubHTTPError() if error.response.status_code in (401, 403):
            return f"{hub} does not accept the token that it was given ({error.response.status_code}): {login}"
        case errors.HfHubHTTPError():
            return f"{hub} answered {error.response.status_code}: try again later, or elsewhere: hf download {name}"
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return f"Fetching it from {hub} failed ({reason}): try again with a network, or elsewhere: hf download {name}"
