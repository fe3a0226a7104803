"""Images from directories: which files, which classes, which pixels."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, ViTConfig
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from framework.data.classes import ClassLabels
from framework.data.images import (
    Augmentation,
    collate_images,
    load_image_folder,
    load_image_processor,
    processed_shape,
    read_image,
)
from framework.errors import RunError, UserError

CONFIG = ViTConfig(image_size=16, patch_size=4)


def load(path: Any, known: Any = None, count: int | None = None, **options: Any) -> Any:
    labels = ClassLabels(known, count)
    data = load_image_folder(path, labels=labels, **options)
    data.class_names = labels.settle("data.train")
    return data


def picture(width: int = 20, height: int = 12, seed: int = 0, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for name in ("dog/b.png", "dog/a.JPG", "cat/deep/c.bmp", "cat/z.webp", "cat/notes.txt"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".txt":
            path.write_text("no image")
        else:
            picture(seed=len(name)).save(path)
    (root / "README").write_text("no class")
    return root


def names(data: Any, root: Path) -> list[tuple[str, int]]:
    return [(str(path.relative_to(root)), label) for path, label in data]


def test_classes_are_sub_directories_in_order(folder: Path) -> None:
    data = load(folder)
    assert data.class_names == ["cat", "dog"]
    assert names(data, folder) == [("cat/deep/c.bmp", 0), ("cat/z.webp", 0), ("dog/a.JPG", 1), ("dog/b.png", 1)]
    assert data.report.summary() == "4 samples of 4 records, one class each"
    given = load(folder, known=["dog", "bird", "cat"])
    assert given.classes.tolist() == [2, 2, 0, 0] and given.class_names == ["dog", "bird", "cat"]


def test_what_is_no_image_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.eval: no such directory: .*nowhere; images are given as"):
        load(tmp_path / "nowhere", option="data.eval")
    with pytest.raises(UserError, match="deep has no sub-directory: each class has one of its own"):
        load(folder / "cat" / "deep")
    with pytest.raises(UserError, match="all labels are 'images': there is nothing to tell apart"):
        load(tmp_path)
    with pytest.raises(UserError, match="unknown label 'dog'; the classes are cat, bird"):
        load(folder, known=["cat", "bird"])
    with pytest.raises(UserError, match=r"has 2 classes \(cat, dog\), but the model's config says 5"):
        load(folder, count=5)
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match=r"no image in .*empty; known by their names: \.bmp, \.jpeg"):
        load(folder)


def test_a_directory_without_permission_to_enter_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = os.stat

    def guarded(path: Any, *args: Any, **options: Any) -> Any:
        if str(path).startswith(f"{folder}/"):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *args, **options)

    monkeypatch.setattr(os, "stat", guarded)
    with pytest.raises(
        UserError, match=rf"data\.train: {folder / 'dog'}: cannot be read: \[Errno 13\] Permission denied"
    ):
        load(folder / "dog")


def test_broken_files_are_named_together(folder: Path) -> None:
    (folder / "cat" / "bad.png").write_bytes(b"no image at all")
    (folder / "dog" / "empty.png").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        load(folder)
    assert str(caught.value).splitlines() == [
        "data.train: broken images",
        f"  {folder / 'cat' / 'bad.png'}: not an image that Pillow can read",
        f"  {folder / 'dog' / 'empty.png'}: not an image that Pillow can read",
    ]


def test_pixels_without_a_known_range_are_refused(folder: Path) -> None:
    Image.new("F", (20, 12), 0.5).save(folder / "cat" / "depth.tif")
    Image.new("I", (20, 12), 70_000).save(folder / "dog" / "count.tif")
    advice = "which do not say what is black and what is white; save it with 8 bits a channel"
    with pytest.raises(UserError) as caught:
        load(folder)
    assert str(caught.value).splitlines() == [
        "data.train: broken images",
        f"  {folder / 'cat' / 'depth.tif'}: Pillow reads it with 32 bits a pixel (mode F), {advice}",
        f"  {folder / 'dog' / 'count.tif'}: Pillow reads it with 32 bits a pixel (mode I), {advice}",
    ]


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_sixteen_bits_are_scaled_to_eight(tmp_path: Path, mode: str) -> None:
    ramp = np.array([0, 128, 129, 257, 32_768, 65_406, 65_407, 65_535])
    image = Image.frombytes(mode, (4, 2), ramp.astype("<u2" if mode == "I;16" else ">u2").tobytes())
    path = tmp_path / "ramp.tif"
    image.save(path, exif={274: 3})  # upside down
    with Image.open(path) as saved:
        assert saved.mode == mode
    expected = np.rint(ramp / 257).astype(np.uint8).reshape(2, 4)[::-1, ::-1]
    assert expected.ravel()[::-1].tolist() == [0, 0, 1, 1, 128, 254, 255, 255]
    read = read_image(path)
    assert read.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(read), np.repeat(expected[..., None], 3, axis=-1))


def test_an_image_over_pillows_limit_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load(folder)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match=r"broken images\n.*c\.bmp: Image size \(240 pixels\) exceeds limit"):
        load(folder)
    with pytest.raises(RunError, match=r"c\.bmp: the image cannot be decoded: Image size \(240 pixels\) exceeds limit"):
        collate(data, [0])


def test_a_truncated_file_is_named_when_it_is_read(folder: Path) -> None:
    path = folder / "cat" / "deep" / "c.bmp"
    path.write_bytes(path.read_bytes()[:200])
    data = load(folder)
    with pytest.raises(RunError, match=r"c\.bmp: the image cannot be decoded: .*truncated.*; replace or remove it"):
        collate(data, [0])


def test_the_fingerprint_is_of_names_sizes_and_classes(folder: Path) -> None:
    plain = load(folder).fingerprint
    assert load(folder.rename(folder.with_name("moved"))).fingerprint == plain
    folder = folder.with_name("moved")
    assert load(folder, known=["dog", "cat"]).fingerprint != plain
    picture(seed=99, width=30).save(folder / "dog" / "b.png")
    assert load(folder).fingerprint != plain


def collate(data: Any, draws: list[int], **options: Any) -> Any:
    options = {"processor": load_image_processor(None, CONFIG), "tokens": 17, "pooling": "first"} | options
    return collate_images(data, draws, **options)


def test_a_batch_has_the_pixels_of_resize_rescale_and_normalise(folder: Path) -> None:
    data = load(folder)
    batch = collate(data, [5, 2])
    assert batch.inputs["labels"].tolist() == [0, 1]
    assert batch.inputs["pixel_values"].shape == (2, 3, 16, 16)
    assert batch.inputs["pixel_values"].dtype == torch.float32
    image = Image.open(data[1].path).convert("RGB").resize((16, 16), Image.Resampling.BILINEAR)
    expected = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 * 2 - 1
    torch.testing.assert_close(batch.inputs["pixel_values"][0], expected, rtol=0, atol=1e-6)
    assert batch.documents.tolist() == [[5] * 17, [2] * 17]
    assert batch.pooled.nonzero().tolist() == [[0, 0], [1, 0]] and batch.supervised_tokens == 2 and batch.tokens == 34
    assert torch.equal(batch.supervised, batch.pooled)
    assert bool(collate(data, [0], pooling="mean").supervised.all())


def test_a_photograph_is_turned_the_way_up_that_it_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation: to be turned by a quarter clockwise.
    picture(20, 12).save(tmp_path / "turned.png", exif=exif)
    got = read_image(tmp_path / "turned.png")
    assert got.size == (12, 20)
    np.testing.assert_array_equal(np.asarray(got), np.rot90(np.asarray(picture(20, 12)), k=-1))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_every_mode_becomes_rgb(folder: Path, mode: str) -> None:
    path = folder / "cat" / ("z.tiff" if mode == "CMYK" else "y.png")
    picture(mode=mode).save(path)
    data = load(folder)
    index = next(number for number, file in enumerate(data) if file.path == path)
    expected = picture(mode=mode).convert("RGB").resize((16, 16), Image.Resampling.BILINEAR)
    got = (collate(data, [index]).inputs["pixel_values"][0].permute(1, 2, 0) + 1) * 127.5
    torch.testing.assert_close(got.round().byte(), torch.from_numpy(np.array(expected)), rtol=0, atol=0)


def test_the_processor_is_the_models_own(tmp_path: Path) -> None:
    for processor in (
        BitImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16}),
        CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
    ):
        processor.save_pretrained(tmp_path)
        loaded = load_image_processor(str(tmp_path), CONFIG)
        assert type(loaded) is type(processor) and processed_shape(loaded) == (3, 16, 16)
        mine, stock = loaded(images=[picture()]), processor(images=[picture()])
        np.testing.assert_array_equal(mine["pixel_values"], stock["pixel_values"])


def test_processors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.path: cannot load an image processor from .*\nPut the preprocessor"):
        load_image_processor(str(tmp_path), CONFIG)
    BitImageProcessorPil(size={"shortest_edge": 20}, do_center_crop=False).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="keeps an image's own proportions"):
        processed_shape(load_image_processor(str(tmp_path), CONFIG))
    with pytest.raises(UserError, match=r"1 channels \(num_channels\): images are read as RGB"):
        load_image_processor(None, ViTConfig(num_channels=1))


def test_the_default_takes_its_size_from_the_config() -> None:
    assert processed_shape(load_image_processor(None, CONFIG)) == (3, 16, 16)
    assert processed_shape(load_image_processor(None, CLIPConfig().vision_config)) == (3, 224, 224)


def test_augmentation_is_a_function_of_seed_and_draw(folder: Path) -> None:
    image, augment = picture(40, 30), Augmentation(seed=1)
    results = [np.asarray(augment.apply(image, draw)) for draw in range(400)]
    again = np.asarray(Augmentation(seed=1).apply(image, 7))
    np.testing.assert_array_equal(results[7], again)
    assert not np.array_equal(results[7], np.asarray(Augmentation(seed=2).apply(image, 7)))
    shares = np.array([result.shape[0] * result.shape[1] / 1200 for result in results])
    aspects = np.array([result.shape[1] / result.shape[0] for result in results])
    assert 0.06 < shares.min() < 0.15 and 0.85 < shares.max() <= 1
    assert 0.6 < aspects.min() < 0.85 and 1.2 < aspects.max() < 1.6
    mirrored = 0
    for result in results:
        windows = [np.lib.stride_tricks.sliding_window_view(np.asarray(image), result.shape)[:, :, 0]]
        found = (windows[0] == result).all(axis=(2, 3, 4)).any()
        flipped = (windows[0] == result[:, ::-1]).all(axis=(2, 3, 4)).any()
        assert found != flipped
        mirrored += flipped
    # Half of 400, give or take three standard deviations.
    assert 170 <= mirrored <= 230


def test_only_the_draw_decides_how_an_image_is_augmented(folder: Path) -> None:
    data = load(folder)
    augmentation = Augmentation(seed=3)
    together = collate(data, [0, 5, 4], augmentation=augmentation).inputs["pixel_values"]
    alone = collate(data, [5], augmentation=augmentation).inputs["pixel_values"]
    assert torch.equal(together[1], alone[0])
    # Draws 0 and 4 are the same file in two epochs.
    assert not torch.equal(together[0], together[2])
    assert not torch.equal(together[0], collate(data, [0]).inputs["pixel_values"][0])
