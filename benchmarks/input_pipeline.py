"""How fast images reach the model: stored rows, and rows decoded anew, against a plain `datasets.with_transform`.

    python benchmarks/input_pipeline.py --cifar ../shared/data/cifar10 --json benchmarks/input_pipeline.json

Three loaders in one process without workers, in turn and in shuffled order; each goes through the same rows:
plain    datasets.with_transform: Pillow, torchvision's RandomResizedCrop, flip, ToTensor, Normalize; default collate
live     hf_transfer's prepare() and collator, decoded anew
stored   the same rows from a PixelStore

At 32 px the rows are CIFAR-10's; at 224 px they are JPEGs of 500 x 375 cut from scikit-learn's two photographs.
Then both ways of resizing a crop, image by image and by matrices (data/resampling.py), at several sizes.
"""

from __future__ import annotations

import argparse
import cProfile
import io
import json
import pstats
import random
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader

from hf_transfer._torchvision import make_torchvision_importable

make_torchvision_importable()

from torchvision import transforms as tv  # noqa: E402

from hf_transfer.data import resampling  # noqa: E402
from hf_transfer.data.collate import collator_for  # noqa: E402
from hf_transfer.data.columns import Columns  # noqa: E402
from hf_transfer.data.draws import Draws  # noqa: E402
from hf_transfer.data.random_boxes import random_crops  # noqa: E402
from hf_transfer.data.stored_rows import store_images  # noqa: E402
from hf_transfer.data.transforms import prepare  # noqa: E402

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH = 64


@dataclass
class Backbone:
    """What prepare() and collator_for() ask of a backbone: an image size and how pixels are scaled."""

    data_config: dict[str, Any]
    modality: str = "image"
    processor: Any = None
    labels: Any = None
    task: str = "image-classification"
    name: str = "none"
    outputs: int = 10
    model: Any = field(default=None, repr=False)


@dataclass
class Figure:
    """CPU microseconds a row, and ratios of the first way to each: median, and the middle half of the rounds."""

    job: str
    rows: int
    microseconds: dict[str, float]
    ratios: dict[str, tuple[float, float, float]]


def cifar(folder: Path, rows: int) -> datasets.Dataset:
    """CIFAR-10 test images as `image` (PNG) and `label`."""
    found = datasets.Dataset.from_parquet(str(folder / "test.parquet"), keep_in_memory=True).select(range(rows))
    return found.rename_columns({found.column_names[0]: "image"})


def photographs(rows: int) -> datasets.Dataset:
    """JPEGs of 500 x 375 at quality 90, cut at random from scikit-learn's photographs."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    generator, photos, files = np.random.default_rng(0), load_sample_images().images, []
    for row in range(rows):
        photo = photos[row % len(photos)]
        top, left = generator.integers(photo.shape[0] - 375 + 1), generator.integers(photo.shape[1] - 500 + 1)
        file = io.BytesIO()
        Image.fromarray(photo[top : top + 375, left : left + 500]).save(file, "JPEG", quality=90)
        files.append({"bytes": file.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict({"image": files, "label": [row % 2 for row in range(rows)]}, features=features)


def plain_loader(rows: datasets.Dataset, side: int) -> DataLoader:
    """As the examples of datasets and torchvision have it."""
    transform = tv.Compose(
        [
            tv.RandomResizedCrop(side, scale=(0.5, 1.0)),
            tv.RandomHorizontalFlip(),
            tv.ToTensor(),
            tv.Normalize(MEAN, STD),
        ]
    )

    def transformed(batch: dict[str, Any]) -> dict[str, Any]:
        images = [transform(image.convert("RGB")) for image in batch["image"]]
        return {"pixel_values": images, "labels": batch["label"]}

    return DataLoader(rows.with_transform(transformed), batch_size=BATCH)


def loaders(rows: datasets.Dataset, side: int, folder: Path) -> dict[str, DataLoader]:
    """The three loaders of the same rows."""
    config = {"input_size": (3, side, side), "mean": MEAN, "std": STD, "interpolation": "bilinear", "crop_pct": 1.0}
    backbone: Any = Backbone(config)
    columns = Columns("image", "label", "image", "image-classification")
    live = prepare(rows, backbone, columns, train=True, augment="light")
    collate = collator_for(backbone)
    return {
        "plain": plain_loader(rows, side),
        "live": DataLoader(live, batch_size=BATCH, collate_fn=collate),
        "stored": DataLoader(store_images(live, folder), batch_size=BATCH, collate_fn=collate),
    }


def check(found: Mapping[str, DataLoader]) -> None:
    """The same work: as many batches of the same shape, and from the store the very pixels of the live rows."""
    for plain, live, stored in zip(*found.values(), strict=True):
        assert plain["pixel_values"].shape == live["pixel_values"].shape
        assert torch.equal(plain["labels"], live["labels"])
        assert torch.equal(live["pixel_values"], stored["pixel_values"])


def measured(jobs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each job in each round, in shuffled order; a first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    order = random.Random(0)
    for number in range(rounds + 1):
        for name in order.sample(list(jobs), len(jobs)):
            began = time.process_time()
            jobs[name]()
            if number:
                seconds[name].append(time.process_time() - began)
    return seconds


def figure(job: str, rows: datasets.Dataset, side: int, rounds: int, *, profiled: bool = False) -> Figure:
    """One job's measurement."""
    with tempfile.TemporaryDirectory() as folder:
        found = loaders(rows, side, Path(folder) / "store")
        check(found)
        jobs = {name: (lambda loader=loader: _run(loader)) for name, loader in found.items()}
        seconds = measured(jobs, rounds)
        if profiled:
            profile = cProfile.Profile()
            profile.runcall(jobs["stored"])
            pstats.Stats(profile).sort_stats("tottime").print_stats(12)
    return _figure(job, len(rows), seconds, "plain")


def resampling_figures(rounds: int) -> list[Figure]:
    """Crop and resize of 64 RGB images from one side to another: by the kernel, and by matrices in its place."""
    found, generator = [], np.random.default_rng(0)
    for side, size in ((28, 32), (32, 32), (48, 48), (96, 96), (256, 224)):
        stack = generator.integers(0, 256, (BATCH, side, side, 3), dtype=np.uint8)
        draws = Draws(0, 0, torch.arange(BATCH))
        boxes, flipped = random_crops(np.full(BATCH, side), np.full(BATCH, side), draws, 1, area=(0.5, 1.0))
        arguments = (boxes, flipped, (size, size), False)
        jobs = {
            "kernel": lambda s=stack, a=arguments: resampling._one_by_one(s, *a),
            "matrices": lambda s=stack, a=arguments: resampling._by_matrices(s, *resampling._matrices(s, *a)),
        }
        assert torch.equal(jobs["kernel"](), jobs["matrices"]())
        seconds = measured(jobs, rounds)
        found.append(_figure(f"crop of {side} px to {size} px", BATCH, seconds, "kernel"))
    return found


def _figure(job: str, rows: int, seconds: Mapping[str, list[float]], base: str) -> Figure:
    ratios = {}
    for name in seconds.keys() - {base}:
        each = [a / b for a, b in zip(seconds[base], seconds[name], strict=True)]
        low, middle, high = np.percentile(each, [25, 50, 75])
        ratios[name] = (round(float(middle), 2), round(float(low), 2), round(float(high), 2))
    micro = {name: round(median(times) / rows * 1e6, 1) for name, times in seconds.items()}
    return Figure(job, rows, micro, ratios)


def _run(loader: DataLoader) -> None:
    for _ in loader:
        pass


def main() -> None:
    """Measures both sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=Path, help="Folder with CIFAR-10's test.parquet; without it, 224 px only.")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rows", type=int, nargs=2, default=(1024, 192), help="Rows at 32 px and at 224 px.")
    parser.add_argument("--json", type=Path, help="Also write the figures there.")
    parser.add_argument("--profile", action="store_true", help="Also show where the time of stored rows goes.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    figures = []
    if options.cifar is not None:
        small = cifar(options.cifar, options.rows[0])
        figures.append(figure("CIFAR-10 at 32 px", small, 32, options.rounds, profiled=options.profile))
    large = photographs(options.rows[1])
    figures.append(figure("JPEGs of 500 x 375 at 224 px", large, 224, options.rounds, profiled=options.profile))
    figures += resampling_figures(options.rounds)
    for found in figures:
        print(found)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(found) for found in figures], indent=1))


if __name__ == "__main__":
    main()
