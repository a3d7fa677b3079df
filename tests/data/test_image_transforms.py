"""Evaluation sees exactly what the backbone's own preprocessing gives; every augmentation runs on every image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from data_fakes import COLOUR, GREY, FakeBackbone
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Pillow
from timm.data import create_transform

from hf_transfer.data.augmentations import AUGMENTATIONS, parse
from hf_transfer.data.columns import Columns
from hf_transfer.data.replay import dataset_epoch
from hf_transfer.data.transforms import prepare
from hf_transfer.errors import TransferError

IMAGES = Columns("image", "label", "image", "image-classification")


def timm_backbone(**config) -> FakeBackbone:
    return FakeBackbone(data_config={**COLOUR, **config})


def expected_by_timm(rows, config, mode="RGB") -> torch.Tensor:
    names = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    transform = create_transform(**{name: config[name] for name in names if name in config})
    return torch.stack([transform(image.convert(mode)) for image in rows["image"]])


def pixels(dataset) -> torch.Tensor:
    return torch.stack([row["pixel_values"] for row in dataset])


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("side", [32, 224])
def test_evaluation_is_timms_bit_for_bit(image_rows, crop_mode, interpolation, side):
    backbone = timm_backbone(crop_mode=crop_mode, interpolation=interpolation, input_size=(3, side, side))
    rows = image_rows(3)
    found = prepare(rows, backbone, IMAGES, train=False)
    assert torch.equal(pixels(found), expected_by_timm(rows, backbone.data_config))
    assert found[0].keys() == {"pixel_values", "labels", "example_id"}


def test_training_without_augmentation_is_evaluation(image_rows):
    rows, backbone = image_rows(3), timm_backbone()
    assert torch.equal(
        pixels(prepare(rows, backbone, IMAGES, train=True, augment="none")),
        pixels(prepare(rows, backbone, IMAGES, train=False, augment="light")),
    )


def test_size_can_be_overridden(image_rows):
    rows, backbone = image_rows(2), timm_backbone()
    found = pixels(prepare(rows, backbone, IMAGES, train=False, image_size=48))
    assert torch.equal(found, expected_by_timm(rows, {**backbone.data_config, "input_size": (3, 48, 48)}))


def test_small_grey_images_are_enlarged_and_coloured(image_rows):
    rows = image_rows(2, size=(28, 28))
    backbone = timm_backbone(input_size=(3, 224, 224))
    found = pixels(prepare(rows, backbone, IMAGES, train=False))
    assert found.shape == (2, 3, 224, 224)
    assert torch.equal(found, expected_by_timm(rows, backbone.data_config))


def test_one_channel_backbones_see_grey(image_rows):
    rows = image_rows(2)
    found = pixels(prepare(rows, FakeBackbone(data_config=dict(GREY)), IMAGES, train=False))
    assert found.shape == (2, 1, 24, 24)
    assert torch.equal(found, expected_by_timm(rows, GREY, "L"))


def test_three_colours_mean_and_std_average_for_one_channel(image_rows):
    rows = image_rows(1)
    grey = {**COLOUR, "input_size": (1, 32, 32)}
    found = pixels(prepare(rows, FakeBackbone(data_config=grey), IMAGES, train=False))
    average = {**grey, "mean": (np.mean(COLOUR["mean"]),), "std": (np.mean(COLOUR["std"]),)}
    assert torch.allclose(found, expected_by_timm(rows, average, "L"), atol=1e-6)


def test_other_channel_counts_are_refused(image_rows):
    with pytest.raises(TransferError, match="takes 4 channels"):
        prepare(image_rows(1), timm_backbone(input_size=(4, 32, 32)), IMAGES, train=False)


def processors():
    import transformers as t

    return {
        "vit": (t.ViTImageProcessor(size={"height": 32, "width": 32}), "squash", 1.0),
        "clip": (
            t.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}), "center", 1.0,
        ),
        "dinov2": (
            t.BitImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}), "center", 32 / 36,
        ),
        "convnext": (t.ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.875), "center", 0.875),
        "deit": (
            t.DeiTImageProcessor(size={"height": 36, "width": 36}, crop_size={"height": 32, "width": 32}), "squash",
            32 / 36,
        ),
        "efficientnet": (t.EfficientNetImageProcessor(size={"height": 32, "width": 32}), "squash", 1.0),
        "mobilenet_v2": (
            t.MobileNetV2ImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}),
            "center", 32 / 36,
        ),
        "mobilevit": (
            t.MobileViTImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}),
            "center", 32 / 36,
        ),
        "levit": (
            t.LevitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}), "center", 1.0,
        ),
    }  # fmt: skip


NAMES = ["vit", "clip", "dinov2", "convnext", "deit", "efficientnet", "mobilenet_v2", "mobilevit", "levit"]


def transformers_backbone(name: str) -> FakeBackbone:
    from hf_transfer.data.image_transforms import Normalise  # noqa: F401  (torchvision is importable from here on)

    processor, crop_mode, crop_pct = processors()[name]
    config = {
        "input_size": (3, 32, 32), "mean": tuple(processor.image_mean), "std": tuple(processor.image_std),
        "interpolation": "bilinear", "crop_pct": crop_pct, "crop_mode": crop_mode,
    }  # fmt: skip
    return FakeBackbone(processor=processor, data_config=config)


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_is_the_image_processors(image_rows, name):
    backbone, rows = transformers_backbone(name), image_rows(3)
    expected = backbone.processor(images=list(rows["image"]), return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels(prepare(rows, backbone, IMAGES, train=False)), expected)
    assert torch.equal(pixels(prepare(rows, backbone, IMAGES, train=True, augment="none")), expected)


@pytest.mark.parametrize("name", NAMES)
def test_training_is_normalised_as_the_image_processor_does(image_rows, name):
    backbone = transformers_backbone(name)
    found = pixels(prepare(image_rows(3), backbone, IMAGES, train=True, augment="light"))
    assert found.shape == (3, 3, 32, 32)
    white = Dataset.from_dict(
        {"image": [np.full((40, 40, 3), 255, np.uint8)], "label": [0]},
        features=Features({"image": Image(), "label": ClassLabel(names=["a"])}),
    )
    expected = backbone.processor(images=list(white["image"]), return_tensors="pt")["pixel_values"]
    assert torch.allclose(pixels(prepare(white, backbone, IMAGES, train=True, augment="light")), expected, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_an_image_processors_size_can_be_overridden(image_rows, name):
    backbone, rows = transformers_backbone(name), image_rows(2)
    before = backbone.processor.to_dict()
    assert pixels(prepare(rows, backbone, IMAGES, train=False, image_size=48)).shape == (2, 3, 48, 48)
    assert pixels(prepare(rows, backbone, IMAGES, train=True, image_size=48)).shape == (2, 3, 48, 48)
    assert backbone.processor.to_dict() == before


def test_the_wrapped_timm_processor_is_not_asked(image_rows):
    """It has no size and takes no arguments; timm's config is the reference."""
    from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

    processor = TimmWrapperImageProcessor(pretrained_cfg={**COLOUR, "num_classes": 3}, architecture="resnet18")
    backbone, rows = FakeBackbone(processor=processor), image_rows(2)
    found = pixels(prepare(rows, backbone, IMAGES, train=False))
    assert torch.equal(found, expected_by_timm(rows, COLOUR))
    assert torch.equal(found, processor([i.convert("RGB") for i in rows["image"]])["pixel_values"])


@pytest.mark.parametrize("augment", [*AUGMENTATIONS, "light+colour+noise+occlusion", "geometric+randaugment"])
@pytest.mark.parametrize("config", [COLOUR, GREY], ids=["colour", "grey"])
def test_every_augmentation_runs_on_many_seeds(image_rows, augment, config):
    backbone = FakeBackbone(data_config=dict(config))
    prepared = prepare(image_rows(4), backbone, IMAGES, train=True, augment=augment)
    counter = dataset_epoch(prepared)
    for epoch in range(40):
        counter.set(epoch)
        found = pixels(prepared)
        assert found.shape == (4, *config["input_size"])
        assert torch.isfinite(found).all()


@pytest.mark.slow
@pytest.mark.parametrize("augment", AUGMENTATIONS)
@pytest.mark.parametrize("size", [(8, 8), (64, 48, 3)])
def test_every_augmentation_runs_on_very_many_seeds(image_rows, augment, size):
    prepared = prepare(image_rows(4, size=size), timm_backbone(), IMAGES, train=True, augment=augment)
    counter = dataset_epoch(prepared)
    for epoch in range(1000):
        counter.set(epoch)
        assert torch.isfinite(pixels(prepared)).all()


@pytest.mark.parametrize("augment", [name for name in AUGMENTATIONS if name != "none"])
def test_every_augmentation_changes_images(image_rows, augment):
    rows, backbone = image_rows(20), timm_backbone()
    plain = pixels(prepare(rows, backbone, IMAGES, train=False))
    changed = pixels(prepare(rows, backbone, IMAGES, train=True, augment=augment))
    assert (plain != changed).flatten(1).any(dim=1).sum() >= 3


def test_light_flips_and_geometric_does_not():
    """An image whose left half is black and right half white."""
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, 32:] = 255
    rows = Dataset.from_dict(
        {"image": [image] * 30, "label": [0] * 30},
        features=Features({"image": Image(), "label": ClassLabel(names=["a"])}),
    )
    brighter_right = {}
    for augment in ("light", "geometric"):
        found = pixels(prepare(rows, timm_backbone(), IMAGES, train=True, augment=augment))
        brighter_right[augment] = (found[..., 16:].mean((1, 2, 3)) > found[..., :16].mean((1, 2, 3))).tolist()
    assert all(brighter_right["geometric"])
    assert 5 <= sum(brighter_right["light"]) <= 25


def test_occlusion_erases_to_the_mean_colour(image_rows):
    rows, backbone = image_rows(20), timm_backbone()
    plain = pixels(prepare(rows, backbone, IMAGES, train=False))
    found = pixels(prepare(rows, backbone, IMAGES, train=True, augment="occlusion"))
    erased = (found != plain).all(dim=1)  # (N, H, W)
    assert (found.permute(0, 2, 3, 1)[erased] == 0).all()
    share = erased.float().mean((1, 2))
    assert 4 <= (share > 0).sum() <= 16
    assert share.max() <= 0.36  # sides are whole pixels


def test_noise_is_measured_in_the_pixels_range(image_rows):
    rows, backbone = image_rows(40), timm_backbone()
    plain = pixels(prepare(rows, backbone, IMAGES, train=False))
    found = pixels(prepare(rows, backbone, IMAGES, train=True, augment="noise"))
    std = ((found - plain) * torch.tensor(COLOUR["std"]).view(3, 1, 1)).std(dim=(1, 2, 3))  # in [0, 1] of the range
    assert 0.03 < std.mean() < 0.07
    assert std.max() < 0.105
    assert std.min() < 0.02


def test_names_combine_in_a_fixed_order():
    assert parse("occlusion+light") == parse("light + occlusion") == ["light", "occlusion"]
    assert parse("none") == parse(None) == []


def test_an_unknown_augmentation_lists_the_valid_ones(image_rows):
    with pytest.raises(TransferError, match=r"(?s)'autoaugment' is unknown.*randaugment: .*trivialaugment: "):
        prepare(image_rows(1), timm_backbone(), IMAGES, train=True, augment="light+autoaugment")


def test_timms_own_randaugment_is_still_broken_on_pillow_13():
    """When this fails, posterising to 0 bits is repaired upstream, and timm's policies can be offered."""
    from PIL import ImageOps

    with pytest.raises(ValueError):
        ImageOps.posterize(Pillow.new("RGB", (4, 4)), 0)


def test_other_columns_are_dropped_and_domain_is_kept(image_rows):
    rows = image_rows(2).add_column("domain", [0, 1]).add_column("photographer", ["x", "y"])
    row = prepare(rows, timm_backbone(), IMAGES, train=False)[1]
    assert row.keys() == {"pixel_values", "labels", "example_id", "domain"}
    assert row["domain"] == 1


def test_rows_without_labels_can_be_predicted(image_rows):
    rows = image_rows(2).remove_columns("label")
    assert prepare(rows, timm_backbone(), IMAGES, train=False)[0].keys() == {"pixel_values", "example_id"}


def test_labels_take_the_models_numbering(image_rows):
    backbone = timm_backbone()
    backbone.labels = ["class 2", "class 1", "class 0"]
    found = prepare(image_rows(3), backbone, IMAGES, train=False)
    assert [row["labels"] for row in found] == [2, 1, 0]


def test_bad_requests(image_rows, text_backbone):
    with pytest.raises(TransferError, match="backbone reads text, and column 'image' holds image"):
        prepare(image_rows(1), text_backbone, IMAGES, train=False)
    with pytest.raises(TransferError, match="image_size=0"):
        prepare(image_rows(1), timm_backbone(), IMAGES, train=False, image_size=0)
    with pytest.raises(TransferError, match="without rows"):
        prepare(image_rows(1).select([]), timm_backbone(), IMAGES, train=False)


@pytest.mark.slow
def test_real_images(shared):
    from hf_transfer.data.sources import load_data

    for name, side in (("cifar10", 32), ("usps", 16)):
        data = load_data(shared(f"data/{name}"), max_eval_samples=50)
        found = prepare(data.splits["test"], timm_backbone(), data.columns, train=False)
        rows = data.splits["test"].rename_columns({data.columns.input: "image"} if name == "cifar10" else {})
        assert rows[0]["image"].size == (side, side)
        assert torch.equal(pixels(found), expected_by_timm(rows, COLOUR))
