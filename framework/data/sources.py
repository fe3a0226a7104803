"""From what a config names to stretches of records: files, directories, data sets of the Hugging Face hub.

- A file is read by its suffix: JSON lines (`.jsonl`, `.ndjson`) and JSON (`.json`), perhaps compressed (`.gz`, `.bz2`,
  `.xz`, `.zst`); `.parquet`, `.arrow`, `.csv`, `.tsv`, `.txt` (a text a line).
- A directory is read as `datasets` does: one that `save_to_disk` wrote, or files in the layout of a data set on the
  hub, with its splits and subsets.
- Anything else is a name on the hub, for `datasets.load_dataset`.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from framework.config import SourceConfig
from framework.data.readers import READERS, Row, first_line, kind_of, read_rows
from framework.errors import UserError

if TYPE_CHECKING:
    import datasets

Paths = str | Path | SourceConfig | Sequence[str | Path | SourceConfig]

DESCRIPTIONS = frozenset({"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})
"""Files that describe a data set and hold no record."""

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Part:
    """A stretch of records of one format: a file, or a split of a data set."""

    name: str
    """What messages call it."""
    source: SourceConfig
    """What named it."""
    rows: Callable[[], Iterator[Row]]
    """Reads it from the start."""
    path: Path | None = None
    """The file; None for a split of a data set."""
    fingerprint: str | None = None
    """`datasets`' own of a split, by which it knows its content again; None for a file."""

    def __str__(self) -> str:
        return self.name


class _SourceError(Exception):
    """A source that cannot be opened; the message says why and what to do."""


def list_parts(sources: Paths, *, option: str) -> list[Part]:
    """Files and splits behind `sources`, in the given order.

    Args:
        sources: Paths, names or sources of a config, or a list of them.
        option: The config key that they come from, `data.train` or `data.eval`, for error messages; without a split
            that is asked for, training takes `train`, and evaluation needs one to be the only one.

    Raises:
        UserError: There is no source, or some cannot be opened; all of these are named.
    """
    parts: list[Part] = []
    problems = []
    for named in [sources] if isinstance(sources, str | Path | SourceConfig) else sources:
        source = named if isinstance(named, SourceConfig) else SourceConfig(path=str(named))
        try:
            parts += _parts_of(source, default_split=None if option == "data.eval" else "train")
        except _SourceError as error:
            problems.append(f"{option}: {error}")
        except OSError as error:
            problems.append(f"{option}: {source.path}: cannot be read: {first_line(error)}")
    if problems:
        raise UserError("\n".join(problems))
    if not parts:
        raise UserError(f"{option}: no data is named; give a file, a directory, a hub name, or a list of them")
    return parts


def _parts_of(source: SourceConfig, *, default_split: str | None) -> list[Part]:
    path = Path(source.path).expanduser()
    if path.exists():
        if source.revision is not None:
            raise _SourceError(f"revision {source.revision!r} is of a hub name, but {path} is here: leave it out")
        return [_file(source, path)] if path.is_file() else _directory(source, path, default_split)
    if path.suffix in READERS or kind_of(path) or not _HUB_NAME.fullmatch(source.path):
        raise _SourceError(f"no such file or directory: {path}")
    return [_split(source, _load(source, source.path), default_split)]


def _file(source: SourceConfig, path: Path) -> Part:
    for key in ("subset", "split"):
        if value := getattr(source, key):
            raise _SourceError(f"{key} {value!r} is of a data set with several, but {path} is one file: leave it out")
    kind = kind_of(path)
    if kind is None:
        raise _SourceError(
            f"{path} is no kind of file that is read here: {', '.join(READERS)}, or JSON compressed (.jsonl.gz)"
        )
    return Part(str(path), source, partial(READERS[kind], path), path=path)


def _directory(source: SourceConfig, path: Path, default_split: str | None) -> list[Part]:
    import datasets

    if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        if source.subset is not None:
            raise _SourceError(f"subset {source.subset!r} has no effect: {path} was saved whole by save_to_disk")
        return [_split(source, _guarded(source, lambda: datasets.load_from_disk(str(path))), default_split)]
    if glob.has_magic(str(path.resolve())):
        raise _SourceError(
            f"the path {path.resolve()} has one of the characters * ? [, by which other directories could be read as "
            "well: rename it, or name its files in a list"
        )
    # Resolved, since a relative "csv" would be taken for the builder of this name.
    builder = _guarded(source, lambda: datasets.load_dataset_builder(str(path.resolve()), source.subset))
    files = {
        str(split): [path / os.path.relpath(file, path.resolve()) for file in listed]
        for split, listed in builder.config.data_files.items()
    }
    _check_placed(path, [file for listed in files.values() for file in listed])
    if _is_slice(source.split) or not all(kind_of(file) for listed in files.values() for file in listed):
        return [_split(source, _load(source, str(path.resolve())), default_split)]
    chosen = files[_choose(source, list(files), default_split)]
    return [Part(str(file), source, partial(READERS[kind_of(file)], file), path=file) for file in chosen]


def _check_placed(path: Path, placed: list[Path]) -> None:
    """Refuse files that `datasets` passes over: of another kind than most, or outside the splits that names tell."""
    card = path / "README.md"
    if card.is_file() and re.search(r"^configs:", card.read_text(encoding="utf-8"), flags=re.MULTILINE):
        return  # which files belong to it is written there
    forgotten = sorted(
        file
        for file in set(path.rglob("*")) - set(placed)
        if kind_of(file)
        and file.name not in DESCRIPTIONS
        and not any(part.startswith((".", "__")) for part in file.relative_to(path).parts)
    )
    if forgotten:
        raise _SourceError(
            f"the directory {path} is read as the hub reads it, by the kind of most files and the splits that their "
            f"names tell, which passes over {', '.join(map(str, forgotten[:3]))}{' …' if len(forgotten) > 3 else ''}: "
            "name the files you mean in a list"
        )


def _split(source: SourceConfig, loaded: datasets.Dataset | datasets.DatasetDict, default_split: str | None) -> Part:
    """The part for a split of a loaded data set."""
    name, split = source.path, source.split
    if isinstance(loaded, dict):
        split = _choose(source, list(loaded), default_split)
        loaded = loaded[split]
    elif split is not None and not _is_slice(split):
        raise _SourceError(f"split {split!r} has no effect: {name} has none, leave it out")
    inner = ", ".join(each for each in (source.subset, split) if each)
    name = f"{name} ({inner})" if inner else name
    return Part(name, source, partial(read_rows, name, loaded), fingerprint=loaded._fingerprint)


def _choose(source: SourceConfig, splits: list[str], default_split: str | None) -> str:
    if source.split in splits:
        return source.split
    listed = ", ".join(splits)
    if source.split is not None:
        raise _SourceError(f"{source.path} has no split {source.split!r}; it has {listed}")
    if len(splits) == 1:
        return splits[0]
    if default_split in splits:
        return default_split
    raise _SourceError(
        f'{source.path} has the splits {listed}: say which, as {{"path": "{source.path}", "split": "{splits[-1]}"}}'
    )


def _is_slice(split: str | None) -> bool:
    """Whether a split is more than a name: "train[:5%]", "train+test"."""
    return split is not None and re.search(r"[\[+]", split) is not None


def _load(source: SourceConfig, path: str) -> datasets.Dataset | datasets.DatasetDict:
    """A data set on the disk of `datasets`' cache, mapped into memory."""
    import datasets

    split = source.split if _is_slice(source.split) else None
    return _guarded(source, lambda: datasets.load_dataset(path, source.subset, split=split, revision=source.revision))


def _guarded(source: SourceConfig, call: Callable[[], object]):
    """Call into `datasets`, its failures told in one line with what to do."""
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    try:
        return call()
    except ConnectionError as error:
        raise _SourceError(
            f"there is no file or directory {source.path!r} here, and the Hugging Face hub, where a data set could "
            f"have this name, cannot be reached ({first_line(error)}): give a path; or, where there is a network, run "
            f"`hf download --repo-type dataset {source.path} --local-dir DIR`, and name DIR"
        ) from error
    except DatasetNotFoundError as error:
        raise _SourceError(
            f"there is neither a file or directory {source.path!r} here nor a data set of this name on the Hugging "
            f"Face hub that you may read: {first_line(error)}"
        ) from error
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise _SourceError(f"{source.path}: {first_line(error)}") from error
