"""Get a model from the Hugging Face hub, or only its headers, and say plainly why not."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from qtool.checkpoint.header import (
    DTYPE_BYTES,
    INDEX_FILE,
    SINGLE_FILE,
    TensorRef,
    checkpoint_refs,
)
from qtool.checkpoint.untrusted import printable
from qtool.errors import CapacityError, DamagedError, HubError, UnsupportedError, UsageError

TEXT_PATTERNS = [
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
]
WEIGHT_PATTERNS = ["*.safetensors"]
# Second copies of the weights in other layouts, which some repositories carry.
SKIPPED_PATTERNS = ["original/*", "onnx/*", "gguf/*", "consolidated*"]


def fetch(hub_id: str, revision: str | None, *, offline: bool, headers_only: bool) -> Path:
    """Download a model, or find it in the cache, and return its directory.

    The directory's name is the commit hash.

    Raises:
        HubError: no such model or revision, no access, no network, or offline and not cached.
        UnsupportedError: the model has no safetensors weights.
        CapacityError: the disk is full.
    """
    from huggingface_hub import snapshot_download

    patterns = TEXT_PATTERNS if headers_only else TEXT_PATTERNS + WEIGHT_PATTERNS
    with _explained(hub_id, revision):
        found = snapshot_download(
            hub_id,
            revision=revision,
            local_files_only=offline,
            allow_patterns=patterns,
            ignore_patterns=SKIPPED_PATTERNS,
        )
    directory = Path(str(found))
    if not headers_only and not _has_weights(directory):
        raise _no_safetensors(hub_id)
    return directory


def remote_refs(hub_id: str, directory: Path, *, offline: bool) -> Mapping[str, TensorRef]:
    """Read the headers of a model by range requests, or from the cache if its weights are there.

    Offsets of tensors that are not on this machine count from the end of the header.

    Raises:
        HubError: no access, no network, or offline and not cached.
        UnsupportedError: the model has no safetensors weights, or a dtype qtool cannot read.
        DamagedError: a header is malformed.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    if (directory / SINGLE_FILE).exists():
        return checkpoint_refs(directory)
    if offline:
        raise HubError(
            f"the weights of {printable(hub_id)} are not on this machine, and it is offline",
            "run once without --offline, or give a directory",
        )
    try:
        with _explained(hub_id, directory.name):
            metadata = HfApi().get_safetensors_metadata(hub_id, revision=directory.name)
    except NotASafetensorsRepoError as error:
        raise _no_safetensors(hub_id) from error
    except SafetensorsParsingError as error:
        raise DamagedError(
            f"{printable(hub_id)} has a malformed header: {printable(error)}", "tell its author"
        ) from error
    refs: dict[str, TensorRef] = {}
    for file, header in metadata.files_metadata.items():
        for name, tensor in header.tensors.items():
            if tensor.dtype not in DTYPE_BYTES:
                raise UnsupportedError(
                    f"{printable(hub_id)}: tensor '{printable(name)}' has dtype "
                    f"{printable(tensor.dtype)}, which qtool cannot read",
                    "use a BF16 or F16 copy",
                )
            start, stop = tensor.data_offsets
            shape = tuple(tensor.shape)
            refs[name] = TensorRef(name, tensor.dtype, shape, directory / file, start, stop)
    return refs


def _has_weights(directory: Path) -> bool:
    return any((directory / name).exists() for name in (SINGLE_FILE, INDEX_FILE))


def _no_safetensors(hub_id: str) -> UnsupportedError:
    return UnsupportedError(
        f"{printable(hub_id)} has no safetensors weights; qtool never opens pickle files",
        "look for a safetensors copy of the model, or convert it with save_pretrained()",
    )


@contextmanager
def _explained(hub_id: str, revision: str | None) -> Iterator[None]:
    """Turn what huggingface_hub raises into one line and a piece of advice."""
    from huggingface_hub import errors

    # The library has changed its HTTP client before; whichever it is, this is its base error.
    transport: type[Exception] = vars(errors)["HTTPError"]
    shown = printable(f"{hub_id}@{revision}" if revision else hub_id)
    try:
        yield
    except errors.HFValidationError as error:
        raise UsageError(
            f"'{shown}' is neither a path nor a hub id", "give a directory or org/name"
        ) from error
    except errors.GatedRepoError as error:
        raise HubError(
            f"{shown} is gated: its owner has to let you in",
            f"ask for access at https://huggingface.co/{printable(hub_id)}, then set HF_TOKEN",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"the hub has no revision {shown}", "check --revision") from error
    except (errors.RepositoryNotFoundError, errors.DisabledRepoError) as error:
        raise HubError(
            f"the hub has no model {shown}, or you may not see it",
            "check the spelling; a private model needs HF_TOKEN; a directory must exist",
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise HubError(
            f"{shown} is not a directory here, not in the hub's cache, and the hub was not asked "
            "or did not answer",
            "check the path, the network, --offline and HF_HUB_OFFLINE",
        ) from error
    except (transport, errors.XetDownloadError, errors.CachedRepoTreeNotFoundError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in {401, 403}:
            raise HubError(
                f"the hub refused access to {shown} ({status})", "set HF_TOKEN"
            ) from error
        raise HubError(
            f"the hub did not answer for {shown}: {printable(error)}",
            "check the network and try again",
            resumable=True,
        ) from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise CapacityError(
                f"no space on the disk for {shown}", "free some, or set HF_HOME to another disk"
            ) from error
        raise HubError(
            f"could not get {shown}: {printable(error)}", "check the network and try again"
        ) from error
