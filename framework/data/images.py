"""Images in directories, one directory a class, and what a model's image processor makes of them.

Needs Pillow and no more: transformers' processors are asked for in their Pillow form, which gives the same pixels
whether or not torchvision is installed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from framework.data.batch import Batch, drawn
from framework.data.classes import ClassLabels, digest
from framework.data.classification import Pooling
from framework.data.dataset import Dataset
from framework.data.formats import REPORTED_PROBLEMS
from framework.data.readers import first_line
from framework.data.report import DataReport
from framework.errors import RunError, UserError
from framework.hub import PUBLIC_MAIN, HubOptions, loading, source_name

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedConfig
    from transformers.image_processing_utils import BaseImageProcessor

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"})
"""Those of `torchvision.datasets.ImageFolder`."""

UNBOUNDED_MODES = ("I", "F")
"""Pillow's modes of integers and floats of 32 bits, whose conversion to RGB cuts off what is outside 0 … 255."""

STREAM = 2
"""Tells these draws from the selection's and the masking's, which have the same seed and draw index."""

# torchvision's RandomResizedCrop: share of the area, aspect ratio, and tries before the whole image is taken.
CROP_AREA = (0.08, 1.0)
CROP_ASPECT = (3 / 4, 4 / 3)
CROP_TRIES = 10


class ClassifiedImage(NamedTuple):
    """One image file."""

    path: Path
    """The file."""
    label: int
    """Number of the class."""


class ImageDataset(Dataset):
    """Image files with their classes; they are read when a batch is made."""

    def __init__(self, paths: Sequence[Path], codes: Sequence[int], labels: ClassLabels, *, name: str) -> None:
        """Take the files of a source.

        Args:
            paths: The files.
            codes: Code of each label.
            labels: Those of the whole data set; samples can be taken when they are settled.
            name: What messages call the data set.
        """
        self.paths = list(paths)
        self.name = name
        count = len(paths)
        self.report = DataReport(records=count, samples=count, supervised_tokens=count, one_class_each=True)
        self._codes = np.asarray(codes, np.int64)
        self._labels = labels

    @cached_property
    def classes(self) -> np.ndarray:
        """Class number of each sample, int64 `[samples]`."""
        return self._labels.numbers(self._codes)

    @property
    def lengths(self) -> np.ndarray:
        """Ones `[samples]`: all images have the same number of tokens, which the model sets."""
        return np.ones(len(self), np.int64)

    @property
    def supervised_lengths(self) -> np.ndarray:
        """Ones: an image has one label. int64 `[samples]`."""
        return np.ones(len(self), np.int64)

    @cached_property
    def digests(self) -> np.ndarray:
        """A hash of each file's class, name and size, uint64 `[samples]`; of its bytes it would cost reading all."""
        described = (f"{label} {path.name} {path.stat().st_size}" for path, label in self)
        return np.fromiter((digest(each.encode()) for each in described), np.uint64, len(self))

    @cached_property
    def contents(self) -> np.ndarray:
        """A hash of the bytes of each file, uint64 `[samples]`; read when a split asks for it."""
        return np.fromiter((digest(path.read_bytes()) for path in self.paths), np.uint64, len(self))

    def __len__(self) -> int:
        """Images."""
        return len(self.paths)

    def __getitem__(self, index: int) -> ClassifiedImage:
        """The image file at `index`, counted from 0."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return ClassifiedImage(self.paths[index], int(self.classes[index]))


def load_image_folder(path: str | Path, *, labels: ClassLabels, option: str = "data.train") -> ImageDataset:
    """Find the images of `DIRECTORY/CLASS/…/name.png`, as torchvision's `ImageFolder` does, and check their headers.

    Args:
        path: The directory; images come in the order of classes and names.
        labels: Takes the names of the sub-directories; to be settled when all sources are read.
        option: The config key that `path` comes from, for error messages.

    Raises:
        UserError: There is no such directory, it has no sub-directory, or one that is no known class or has no image;
            or files are no readable images (up to ten together).
    """
    root = Path(path).expanduser()
    try:
        if not root.is_dir():
            raise UserError(f"{option}: no such directory: {root}; images are given as DIRECTORY/CLASS/name.png")
        names = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    except OSError as error:
        raise UserError(f"{option}: {root}: cannot be read: {first_line(error)}") from error
    if not names:
        raise UserError(f"{option}: {root} has no sub-directory: each class has one of its own, such as {root / 'cat'}")
    if problem := next(filter(None, map(labels.problem, names)), None):
        raise UserError(f"{option}: {root}: {problem}")
    files: list[Path] = []
    codes: list[int] = []
    for name in names:
        images = [file for file in _files_below(root / name) if file.suffix.lower() in EXTENSIONS]
        if not images:
            raise UserError(
                f"{option}: no image in {root / name}; known by their names: {', '.join(sorted(EXTENSIONS))}"
            )
        files += images
        codes += [labels.code(name)] * len(images)
    _check_headers(files, option)
    return ImageDataset(files, codes, labels, name=str(root))


def _files_below(directory: Path) -> list[Path]:
    """All files below a directory, sorted; links are followed."""
    walked = os.walk(directory, followlinks=True)
    return sorted(Path(folder) / name for folder, _, names in walked for name in names)


def _check_headers(paths: Sequence[Path], option: str) -> None:
    problems = []
    for path in paths:
        try:
            with _pillow().open(path) as image:
                if image.mode in UNBOUNDED_MODES:
                    raise ValueError(
                        f"Pillow reads it with 32 bits a pixel (mode {image.mode}), which do not say what is black and "
                        "what is white; save it with 8 bits a channel"
                    )
        except (OSError, ValueError, SyntaxError, _pillow().DecompressionBombError) as error:
            problems.append(f"  {path}: {_reason(error)}")
            if len(problems) == REPORTED_PROBLEMS:
                problems.append("  (there may be more: reading stopped here)")
                break
    if problems:
        raise UserError("\n".join([f"{option}: broken images", *problems]))


def _reason(error: Exception) -> str:
    """What Pillow says, without the name of the file."""
    return "not an image that Pillow can read" if type(error).__name__ == "UnidentifiedImageError" else str(error)


def _pillow() -> Any:
    """Pillow's image module, which only images need."""
    from PIL import Image

    return Image


def read_image(path: Path) -> Image:
    """An image in RGB, the way up that its EXIF data says, as `transformers.image_utils.load_image` does.

    Grey values of 16 bits are scaled to 8, which `load_image` leaves out.

    Raises:
        RunError: The file cannot be decoded, although its header was read before.
    """
    from PIL import ImageOps

    try:
        with _pillow().open(path) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I;16"):  # whose conversion would make white of all but the darkest pixels
                upright = _pillow().fromarray(np.rint(np.asarray(upright) / 257).astype(np.uint8))
            return upright.convert("RGB")
    except (OSError, ValueError, SyntaxError, _pillow().DecompressionBombError) as error:
        raise RunError(f"{path}: the image cannot be decoded: {_reason(error)}; replace or remove it") from error


def load_image_processor(
    path: str | None, config: PreTrainedConfig, *, hub: HubOptions = PUBLIC_MAIN
) -> BaseImageProcessor:
    """The image processor of a model.

    Args:
        path: The model's directory or hub name; None for ViT's processor: bilinear resize to the config's
            `image_size`, rescale to 0 … 1, normalise with mean and deviation .5.
        config: The model's config.
        hub: Revision, network and code, for `path`.

    Raises:
        UserError: There is none at `path`, it has no Pillow form, or the model does not take three channels.
    """
    # Not from the package: without torchvision, transformers 5.17 hands out a placeholder there that only raises.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    config = getattr(config, "vision_config", config)  # of a family with a text model beside it
    channels = getattr(config, "num_channels", 3)
    if channels != 3:
        raise UserError(f"model.from_config: {channels} channels (num_channels): images are read as RGB, in 3")
    if path is None:
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return ViTImageProcessorPil(size={"height": height, "width": width})
    what, failures = f"an image processor from {path}", (OSError, ValueError, ImportError)
    advice = "Put the preprocessor_config.json that belongs to the model beside its weights."
    with loading("model.path", what, path, hub, failures=failures, advice=advice):
        return AutoImageProcessor.from_pretrained(source_name(path), backend="pil", **hub.keywords())


def processed_shape(processor: BaseImageProcessor) -> tuple[int, ...]:
    """`(channels, height, width)` of what a processor makes of an image.

    Raises:
        UserError: it depends on the image's own size.
    """
    shapes = {_pixels(processor, [_pillow().new("RGB", size)]).shape[1:] for size in ((48, 64), (64, 32))}
    if len(shapes) > 1:
        raise UserError(
            "model.path: the image processor keeps an image's own proportions, so images do not fit into a batch; set "
            "size to a height and a width in preprocessor_config.json, or do_center_crop with a crop_size"
        )
    return tuple(shapes.pop())


def _pixels(processor: BaseImageProcessor, images: list[Image]) -> np.ndarray:
    """float32 `[images, channels, height, width]`."""
    return np.stack([np.asarray(each, np.float32) for each in processor(images=images)["pixel_values"]])


@dataclass(frozen=True)
class Augmentation:
    """A random crop and mirroring of training images, a pure function of the seed and the draw index."""

    seed: int

    def apply(self, image: Image, draw: int) -> Image:
        """A crop of the image, of another size than it, perhaps mirrored."""
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, draw], spawn_key=(STREAM,))))
        image = image.crop(_crop_box(image.width, image.height, random))
        return image.transpose(_pillow().Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else image


def _crop_box(width: int, height: int, random: np.random.Generator) -> tuple[int, int, int, int]:
    """Left, upper, right and lower edge, drawn as torchvision's `RandomResizedCrop` does; the whole image at last."""
    for _ in range(CROP_TRIES):
        area = width * height * random.uniform(*CROP_AREA)
        aspect = math.exp(random.uniform(*map(math.log, CROP_ASPECT)))
        wide, high = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < wide <= width and 0 < high <= height:
            left, upper = int(random.integers(width - wide + 1)), int(random.integers(height - high + 1))
            return left, upper, left + wide, upper + high
    return 0, 0, width, height


def collate_images(
    dataset: Dataset,
    draws: Sequence[int],
    *,
    processor: BaseImageProcessor,
    tokens: int,
    pooling: Pooling,
    augmentation: Augmentation | None = None,
) -> Batch:
    """One image a row.

    Args:
        dataset: Where the images are.
        draws: Draw index of each row.
        processor: The model's.
        tokens: Tokens that the model's blocks see of an image, patches and others.
        pooling: Which of them the model's head reads.
        augmentation: What images go through before the processor.

    Raises:
        RunError: A file cannot be decoded.
    """
    files = [drawn(dataset, draw) for draw in draws]
    images = [read_image(path) for path, _ in files]
    if augmentation is not None:
        images = [augmentation.apply(image, int(draw)) for image, draw in zip(images, draws, strict=True)]
    documents = torch.tensor([int(draw) for draw in draws])[:, None].expand(-1, tokens).contiguous()
    pooled = torch.zeros(documents.shape, dtype=torch.bool)
    pooled[:, 0] = True
    labels = torch.tensor([label for _, label in files])
    return Batch(
        inputs={"pixel_values": torch.from_numpy(_pixels(processor, images)), "labels": labels},
        documents=documents,
        supervised=torch.ones_like(pooled) if pooling == "mean" else pooled,
        supervised_tokens=len(files),
        pooled=pooled,
    )
