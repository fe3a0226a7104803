"""From text files to batches: formats, chat templates, labels, padding and packing, the resumable loader."""

from framework.data.assembly import epochs_line, hold_out, load_sources, source_lines
from framework.data.batch import Batch
from framework.data.cache import TokenCache, default_cache_directory
from framework.data.dataset import Dataset, JoinedDataset, Sample, Subset, TokenizedDataset
from framework.data.inspect import show_images, show_samples
from framework.data.loader import Collate, Loader, evaluation_batches, language_collate
from framework.data.loading import load_dataset
from framework.data.mixture import shares_of
from framework.data.report import DataReport
from framework.data.tokenizer import load_tokenizer

__all__ = [
    "Batch",
    "Collate",
    "DataReport",
    "Dataset",
    "JoinedDataset",
    "Loader",
    "Sample",
    "Subset",
    "TokenCache",
    "TokenizedDataset",
    "default_cache_directory",
    "epochs_line",
    "evaluation_batches",
    "hold_out",
    "language_collate",
    "load_dataset",
    "load_sources",
    "load_tokenizer",
    "shares_of",
    "show_images",
    "show_samples",
    "source_lines",
]
