"""Where models and tokenizers come from: a local directory or the Hugging Face hub, and what may be asked of it.

Importing this must not import torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from framework.errors import UserError


@dataclass(frozen=True)
class HubOptions:
    """How `from_pretrained` is called for the model and its tokenizer.

    Attributes:
        revision: branch, tag or commit on the hub; None for the main branch.
        offline: never ask the network; what is not a local directory must be in the hub's cache.
        trust_remote_code: run the Python files that come with a model.
    """

    revision: str | None = None
    offline: bool = False
    trust_remote_code: bool = False

    def keywords(self) -> dict[str, Any]:
        """The keywords of transformers' `from_pretrained` that these options set."""
        return {
            "revision": self.revision or "main",
            "local_files_only": self.offline,
            "trust_remote_code": self.trust_remote_code,
        }

    @contextmanager
    def access(self) -> Iterator[None]:
        """Within this context nothing asks the network if `offline` is set, as with HF_HUB_OFFLINE=1.

        `local_files_only` alone leaves out the questions that transformers asks the hub about a model's other files.
        """
        from huggingface_hub import constants

        before = constants.HF_HUB_OFFLINE
        constants.HF_HUB_OFFLINE = before or self.offline
        try:
            yield
        finally:
            constants.HF_HUB_OFFLINE = before


PUBLIC_MAIN = HubOptions()
"""The main branch, from the network if it must be, without code."""


def local_directory(path: str) -> Path | None:
    """The directory that `path` names, or None if it is a hub name."""
    directory = Path(path).expanduser()
    return directory if directory.is_dir() else None


def source_name(path: str) -> str:
    """What `from_pretrained` takes: a directory with `~` resolved, or the hub name as it is."""
    directory = local_directory(path)
    return path if directory is None else str(directory)


def check_source(path: str, hub: HubOptions) -> None:
    """Refuse a revision of a local directory, which has none.

    Raises:
        UserError: as said.
    """
    if hub.revision is not None and local_directory(path) is not None:
        raise UserError(f"model.revision: {path} is a local directory, which has no revisions; leave it out")


def how_to_get(path: str, hub: HubOptions) -> str:
    """What to do about a model or tokenizer that could not be had from the hub."""
    wanted = path if hub.revision is None else f"{path} --revision {hub.revision}"
    if hub.offline:
        from huggingface_hub import constants

        return (
            f"model.offline is true, and the cache in {constants.HF_HUB_CACHE} does not have all of it; fill it where "
            f"there is a network (`hf download {wanted}`), or set model.offline to false"
        )
    return (
        "Give an existing directory, or a hub name that this machine can reach; without a "
        "network, download it elsewhere (`hf download NAME --local-dir DIR`) and give that directory."
    )


@contextmanager
def loading(
    option: str, what: str, path: str, hub: HubOptions, *, failures: tuple[type[Exception], ...], advice: str
) -> Iterator[None]:
    """Within this context transformers loads something from a source; its failures become messages for people.

    Args:
        option: The config key that names the source.
        what: What is loaded and where from, such as "a tokenizer from models/base".
        path: A local directory, or a name on the hub.
        hub: Revision, network and code.
        failures: What the loading class raises.
        advice: What to do, unless what is missing is missing from the cache.

    Raises:
        UserError: One of `failures`, with its cause and what to do.
    """
    try:
        with hub.access():
            yield
    except failures as error:
        if needs_its_own_code(error):
            raise UserError(own_code_message(option, path)) from error
        # transformers explains over many lines; the first says what happened.
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        not_cached = hub.offline and local_directory(path) is None
        remedy = how_to_get(path, hub) if not_cached else advice
        raise UserError(f"{option}: cannot load {what}: {reason}\n{remedy}") from error


def needs_its_own_code(error: Exception) -> bool:
    """Whether transformers refused to run the Python files that come with a model."""
    return "trust_remote_code" in str(error)


def own_code_message(option: str, path: str) -> str:
    """The message for a model or tokenizer that needs its own Python files."""
    return (
        f"{option}: {path} comes with Python files of its own (auto_map in its config), which are run only if "
        "model.trust_remote_code is true; read them first"
    )
