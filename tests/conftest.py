"""Fixtures that several rooms share."""

from __future__ import annotations

import gc
import os
import string
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

# Tests run side by side; one thread each is faster than many that wait for each other.
torch.set_num_threads(1)
# Until tests are collected, which imports everything.
gc.disable()

# Triton reads it when it is first imported, which must not be before: then kernels run on the CPU as well.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files first whose tests take long: a worker that takes one of them last would be waited for."""
    places: dict[Path, int] = {}
    for item in items:
        found = [place for place, marker in enumerate(LONGEST_FIRST) if item.get_closest_marker(marker)]
        places[item.path] = min([*found, places.get(item.path, len(LONGEST_FIRST))])
    items.sort(key=lambda item: places[item.path])


def pytest_collection_finish() -> None:
    """Let garbage be looked for in what tests make alone, not again and again in all that was imported."""
    gc.collect()
    gc.freeze()
    gc.enable()


# Markers of tests, by how long they take.
LONGEST_FIRST = ("slurm", "slow", "multiprocess")

# What launchers set. Ranks are processes of their own, or undo it.
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

TINY_SPECIAL_TOKENS = ["<pad>", "<bos>", "<end>", "<user>", "<assistant>", "<unk>"]

TINY_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'assistant' %}<assistant>{% generation %}{{ message.content }}<end>{% endgeneration %}"
    "{% else %}<user>{{ message.content }}<end>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character (106 in all), so that expected ids can be written down by hand."""
    vocabulary = [*TINY_SPECIAL_TOKENS, *string.printable]
    model = models.WordLevel({token: index for index, token in enumerate(vocabulary)}, unk_token="<unk>")
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<end>",
        unk_token="<unk>",
        extra_special_tokens=["<user>", "<assistant>"],
    )
    tokenizer.chat_template = TINY_CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep caches and machines' profiles out of the home directory, those of commands too.

    Workers that test side by side share the cache: what one has recorded of a step the others need not record.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        path = tmp_path_factory.getbasetemp().parent / "cache"
        path.mkdir(exist_ok=True)
    else:
        path = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(path))
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("profiles")))
        yield path


@pytest.fixture(autouse=True)
def no_rank_left() -> Iterator[None]:
    """Fail a test that leaves its process a rank of something, which libraries would believe in later tests."""
    yield
    left = [name for name in RANK_VARIABLES if os.environ.pop(name, None) is not None]
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        left.append("a process group")
    assert not left, f"left behind: {', '.join(left)}"


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of single characters with a chat template that marks assistant turns; free to be changed."""
    return make_tiny_tokenizer()


@pytest.fixture(scope="session")
def tiny_tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the tiny tokenizer, as `load_tokenizer` and `AutoTokenizer` take it."""
    path = tmp_path_factory.mktemp("tiny-tokenizer")
    make_tiny_tokenizer().save_pretrained(path)
    return path


def make_encoder_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character (106 in all) with BERT's special tokens around a text and between two."""
    special = ["<pad>", "<cls>", "<sep>", "<mask>", "<unk>", "<spare>"]
    vocabulary = [*special, *string.printable]
    model = models.WordLevel({token: index for index, token in enumerate(vocabulary)}, unk_token="<unk>")
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(
        single="<cls> $A <sep>", pair="<cls> $A <sep> $B:1 <sep>:1", special_tokens=[("<cls>", 1), ("<sep>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        cls_token="<cls>",
        sep_token="<sep>",
        mask_token="<mask>",
        unk_token="<unk>",
    )


@pytest.fixture(scope="session")
def encoder_tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tokenizer of single characters as encoders have them."""
    path = tmp_path_factory.mktemp("encoder-tokenizer")
    make_encoder_tokenizer().save_pretrained(path)
    return path
