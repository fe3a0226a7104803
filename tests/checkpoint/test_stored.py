"""What ranks wrote comes back to the bit, any range of it, and only if it is all there once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from framework.checkpoint.stored import StoredFragments, rank_file
from framework.checkpoint.tensor_files import write_assembled, write_fragments, write_tensors
from framework.errors import UserError
from framework.sharding.fragments import Fragment, whole


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "embedding.weight": torch.randn(7, 5, generator=generator),
        "half@odd.name": torch.randn(3, 2, 2, generator=generator).bfloat16(),
        "step": torch.tensor(3.0),
        "codes": torch.arange(11, dtype=torch.uint8),
        "empty": torch.empty(0, 3),
    }


def write(directory: Path, parts: Callable[..., list[Fragment]], world_size: int) -> None:
    for rank in range(world_size):
        write_fragments(directory / rank_file("model", rank, world_size), parts(tensors(), rank, world_size))


@pytest.mark.parametrize("world_size", [1, 2, 3, 16])
def test_every_range_comes_back_from_any_number_of_ranks(
    tmp_path: Path, parts: Callable[..., list[Fragment]], world_size: int
) -> None:
    write(tmp_path, parts, world_size)
    stored = StoredFragments(tmp_path, "model")
    assert set(stored.names()) == set(tensors())
    for name, tensor in tensors().items():
        assert (stored.shape(name), stored.dtype(name)) == (tuple(tensor.shape), tensor.dtype)
        flat = tensor.view(-1)
        assert torch.equal(stored.read(name), flat)
        for start in range(flat.numel() + 1):
            for end in range(start, flat.numel() + 1):
                assert torch.equal(stored.read(name, start, end - start), flat[start:end]), (name, start, end)
    with pytest.raises(KeyError):
        stored.read("stranger")


def test_one_rank_writes_the_file_that_the_library_writes(tmp_path: Path) -> None:
    held = {name: tensor for name, tensor in tensors().items()}
    write_fragments(tmp_path / "model.safetensors", [whole(name, tensor) for name, tensor in held.items()])
    save_file(held, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_files_of_ranks_are_named_and_filled_as_documented(
    tmp_path: Path, parts: Callable[..., list[Fragment]]
) -> None:
    write(tmp_path, parts, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model-00000-of-00002.safetensors",
        "model-00001-of-00002.safetensors",
    ]
    second = load_file(tmp_path / "model-00001-of-00002.safetensors")
    # A scalar is not cut, and belongs to the last rank here.
    assert {key: list(value.shape) for key, value in second.items()} == {
        "embedding.weight@17": [18],
        "half@odd.name@6": [6],
        "step": [],
        "codes@5": [6],
        "empty": [0, 3],
    }
    raw = (tmp_path / "model-00001-of-00002.safetensors").read_bytes()
    metadata = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    assert metadata == {
        "format": "pt",
        "embedding.weight@17": "[7, 5]",
        "half@odd.name@6": "[3, 2, 2]",
        "codes@5": "[11]",
    }


def test_assembled_it_is_the_file_of_one_rank(tmp_path: Path, parts: Callable[..., list[Fragment]]) -> None:
    write(tmp_path, parts, 3)
    write_assembled(tmp_path / "assembled", StoredFragments(tmp_path, "model"))
    write_tensors(tmp_path / "whole", tensors())
    assert (tmp_path / "assembled").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_range_is_mapped_and_the_rest_of_a_file_is_not_read(tmp_path: Path) -> None:
    def resident() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith(("RssFile", "RssAnon")))

    values = torch.arange(16 * 2**20, dtype=torch.int32)
    write_fragments(tmp_path / "model.safetensors", [whole("large", values.view(4096, -1))])
    del values
    stored = StoredFragments(tmp_path, "model")
    before = resident()
    assert stored.read("large", 12345678, 3).tolist() == [12345678, 12345679, 12345680]
    assert resident() - before < 8 * 1024  # of 64 MiB
    mapped = stored.read("large")
    (tmp_path / "model.safetensors").unlink()
    assert mapped[-1].item() == 16 * 2**20 - 1


def fragment(name: str, shape: tuple[int, ...], start: int, count: int, dtype: torch.dtype = torch.float32) -> Fragment:
    return Fragment(name, shape, start, torch.zeros(count, dtype=dtype))


W = ("w", (2, 4))
DAMAGES = {
    "gap": ([fragment(*W, 0, 3)], [fragment(*W, 5, 3)], r"00001.*: w: the range of elements 3 to 4 is in no file"),
    "begin": ([fragment(*W, 2, 2)], [fragment(*W, 4, 4)], r"00000.*: w: the range of elements 0 to 1 is in no file"),
    "end": ([fragment(*W, 0, 4)], [fragment(*W, 4, 2)], r"00001.*: w: the range of elements 6 to 7 is in no file"),
    "overlap": (
        [fragment(*W, 0, 5)],
        [fragment(*W, 4, 4)],
        r"00001.*: w: the range of elements 4 to 4 is in model-00000-of-00002\.safetensors too",
    ),
    "twice": (
        [fragment(*W, 0, 8)],
        [fragment(*W, 0, 8)],
        r"w: the range of elements 0 to 7 is in model-0000\d-of-00002",
    ),
    "shape": (
        [fragment(*W, 0, 4)],
        [fragment("w", (4, 2), 4, 4)],
        r"00001.*: w is \[4, 2\] torch.float32 here, \[2, 4\] torch.float32 in model-00000-of-00002\.safetensors",
    ),
    "dtype": (
        [fragment(*W, 0, 4)],
        [fragment(*W, 4, 4, torch.bfloat16)],
        r"00001.*: w is \[2, 4\] torch.bfloat16 here, \[2, 4\] torch.float32 in model-00000",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_not_there_exactly_once_is_named_with_its_file(tmp_path: Path, damage: str) -> None:
    first, second, message = DAMAGES[damage]
    for rank, fragments in enumerate((first, second)):
        write_fragments(tmp_path / rank_file("model", rank, 2), fragments)
    with pytest.raises(UserError, match=message):
        StoredFragments(tmp_path, "model")


def test_a_missing_or_broken_file_is_named(tmp_path: Path, parts: Callable[..., list[Fragment]]) -> None:
    write(tmp_path, parts, 3)
    second = tmp_path / "model-00001-of-00003.safetensors"
    content = second.read_bytes()
    second.write_bytes(content[:-4])
    with pytest.raises(UserError, match=r"model-00001-of-00003\.safetensors: cannot be read as weights"):
        StoredFragments(tmp_path, "model")
    second.unlink()
    with pytest.raises(UserError, match=r"model-00001-of-00003\.safetensors: .*there is no such file"):
        StoredFragments(tmp_path, "model")
    with pytest.raises(UserError, match=r"optimizer\.safetensors: .*there is no such file"):
        StoredFragments(tmp_path, "optimizer")
