"""From text files to batches: formats, chat templates, labels, padding and packing, the resumable loader."""

from framework.data.batch import Batch
from framework.data.dataset import Dataset, JoinedDataset, Sample, Subset, TokenizedDataset, load_dataset
from framework.data.inspect import show_samples
from framework.data.loader import Loader, evaluation_batches
from framework.data.report import DataReport
from framework.data.tokenizer import load_tokenizer

__all__ = [
    "Batch",
    "DataReport",
    "Dataset",
    "JoinedDataset",
    "Loader",
    "Sample",
    "Subset",
    "TokenizedDataset",
    "evaluation_batches",
    "load_dataset",
    "load_tokenizer",
    "show_samples",
]
