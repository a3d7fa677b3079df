"""How fast images reach the model: stored rows, and rows decoded anew, against a plain `datasets.with_transform`.

    OMP_NUM_THREADS=1 python benchmarks/input_pipeline.py

Three loaders in one process without workers; each goes through the same rows:
plain    datasets.with_transform: Pillow, torchvision's RandomResizedCrop, flip, ToTensor, Normalize; default collate
live     hf_transfer's prepare() and collator, decoded anew
stored   the same rows from a PixelStore

At 32 px the rows are CIFAR-10's; at 224 px they are JPEGs of 500 x 375 cut from scikit-learn's two photographs.
Then both ways of resizing a crop, image by image and by matrices (data/resampling.py), at several sizes.
"""

import io
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import datasets
import numpy as np
import torch
from command import main
from paired import Arm, Same, interleave, ratio, timed
from results import Cases, Judged, load, markdown, measured_on, section, shared
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
RESULTS = Path(__file__).with_suffix(".json")
ROUNDS = 9


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


@dataclass(frozen=True)
class Case:
    """Ways to the same rows.

    Attributes:
        label: The job, for the table.
        rows: How many.
        arms: By name; the first is what the others are measured against.
        target: How many times as fast `stored` is to be; None where nothing was set.
        same: Arms whose results are equal; `check` compares the pixels of loaders once, before they are timed.
        folder: Where the store lies, which goes with the case.
    """

    label: str
    rows: int
    arms: Mapping[str, Arm]
    target: float | None = None
    same: tuple[Same, ...] = ()
    folder: Any = None


def cifar(rows: int) -> datasets.Dataset:
    """CIFAR-10 test images as `image` (PNG) and `label`."""
    found = datasets.Dataset.from_parquet(shared("data/cifar10/test.parquet"), keep_in_memory=True).select(range(rows))
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


def loading(label: str, rows: datasets.Dataset, side: int, target: float) -> Case:
    """The three loaders of some rows."""
    folder = tempfile.TemporaryDirectory()
    found = loaders(rows, side, Path(folder.name) / "store")
    check(found)
    arms = {
        name: timed(lambda loader=loader: sum(len(batch["labels"]) for batch in loader))
        for name, loader in found.items()
    }
    same = (Same("live", "plain", 0.0), Same("stored", "plain", 0.0))
    return Case(label, len(rows), arms, target, same, folder)


def resizing(side: int, size: int) -> Case:
    """Crop and resize of 64 RGB images from one side to another: by the kernel, and by matrices in its place."""
    stack = np.random.default_rng(0).integers(0, 256, (BATCH, side, side, 3), dtype=np.uint8)
    draws = Draws(0, 0, torch.arange(BATCH))
    boxes, flipped = random_crops(np.full(BATCH, side), np.full(BATCH, side), draws, 1, area=(0.5, 1.0))
    arguments = (boxes, flipped, (size, size), False)
    arms = {
        "kernel": timed(lambda: resampling._one_by_one(stack, *arguments)),
        "matrices": timed(lambda: resampling._by_matrices(stack, *resampling._matrices(stack, *arguments))),
    }
    same = (Same("matrices", "kernel", 0.0),)
    return Case(f"crop of {side} px to {size} px", BATCH, arms, same=same)


# ---- figures ------------------------------------------------------------------------------------------------------


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Times the ways of a case."""
    found = interleave(case.arms, label=case.label, rounds=rounds, same=case.same)
    return {"label": case.label, "rows": case.rows, "target": case.target, **found.facts()}


def judged(path: Path = RESULTS) -> list[Judged]:
    """The lines of the table of targets."""
    return [
        Judged(
            f"input pipeline, {found['label']}", "datasets.with_transform", ">=", found["target"],
            ratio(found, "plain", "stored"),
        )
        for found in load(path).values()
        if found["target"] is not None
    ]  # fmt: skip


@section(RESULTS)
def table(cases: Cases) -> list[str]:
    """The section of docs/benchmarks.md."""
    rows = []
    for found in cases.values():
        base, *others = found["cpu"]
        micro = {name: median(seconds) / found["rows"] * 1e6 for name, seconds in found["cpu"].items()}
        for name in others:
            both = ratio(found, base, name), ratio(found, base, name, "wall")
            rows.append((found["label"], f"{base} / {name}", *both, f"{micro[base]:.0f} / {micro[name]:.0f}"))
    return [
        "## How fast images reach the model",
        "",
        "How many times as long the first way takes. plain: datasets.with_transform; live: prepare(), decoded anew;",
        "stored: prepare() with an image store; kernel, matrices: both ways to resize a crop.",
        "",
        *markdown(["images", "ways", "CPU time", "wall time", "us a row"], rows),
        "",
        f"`python benchmarks/input_pipeline.py` on {measured_on(cases.values())}.",
    ]


CASES: dict[str, Callable[[], Case]] = {
    "32px": lambda: loading("CIFAR-10 at 32 px", cifar(1024), 32, 8.0),
    "224px": lambda: loading("JPEGs of 500 x 375 at 224 px", photographs(192), 224, 4.0),
    **{
        f"crop-{side}-{size}": lambda side=side, size=size: resizing(side, size)
        for side, size in ((28, 32), (32, 32), (48, 48), (96, 96), (256, 224))
    },
}


if __name__ == "__main__":
    datasets.disable_progress_bars()
    main(__doc__, CASES, measure, table, RESULTS, ROUNDS)
