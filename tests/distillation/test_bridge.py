"""From the student's batch to the teacher's inputs: the same augmented example, in the teacher's own form."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import text_backbone, texts, tokenizer, wav2vec2
from torch import Tensor, nn

from hf_transfer import load_backbone
from hf_transfer.backbones import Backbone
from hf_transfer.data.collate import collator_for
from hf_transfer.data.columns import Columns
from hf_transfer.data.image_transforms import ImageTransform
from hf_transfer.data.replay import dataset_epoch
from hf_transfer.data.transforms import prepare
from hf_transfer.distillation.bridge import (
    Bridge,
    TeacherInputs,
    reads_otherwise,
    with_teacher_inputs,
    without_teacher_inputs,
)
from hf_transfer.distillation.image_bridge import Pixels
from hf_transfer.errors import TransferError

STUDENT = {
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.3, 0.25),
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "crop_mode": "squash",
}


class Reads(nn.Module):
    """A network that names its inputs and is never run."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        return pixel_values


class ReadsText(nn.Module):
    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        return input_ids


def images(size: int, channels: int = 3, processor: Any = None, **changes: Any) -> Backbone:
    config = {**STUDENT, "input_size": (channels, size, size), **changes}
    model: Any = Reads()
    return Backbone(model, processor, "image", "image-classification", "net", ["a", "b"], config)


def text(processor: Any, task: str = "text-classification", name: str = "net") -> Backbone:
    model: Any = ReadsText()
    return Backbone(model, processor, "text", task, name, ["a", "b"], None)


def photo(mode: str = "RGB", side: int = 24) -> Image.Image:
    """Smooth, with every colour."""
    x = np.linspace(0, 3, side)
    waves = [127 + 100 * np.sin(a * x[:, None] + b * x[None]) for a, b in ((1, 2), (2, 1), (1, -1))]
    return Image.fromarray(np.stack(waves, axis=2).astype(np.uint8)).convert(mode)


def as_prepared(image: Image.Image, backbone: Backbone) -> Tensor:
    """(1, C, H, W): the image by the backbone's own pipeline, without resizing."""
    array = np.array(image)
    pixels = torch.from_numpy(array if array.ndim == 3 else array[..., None]).permute(2, 0, 1)
    return ImageTransform.for_backbone(backbone, "image", train=False).normalise(pixels[None])


# ---- images ---------------------------------------------------------------------------------------------------------


def test_equal_images_pass_as_the_tensor_itself() -> None:
    x = torch.rand(2, 3, 24, 24)
    assert Bridge(images(24), images(24))({"pixel_values": x, "labels": torch.zeros(2)})["pixel_values"] is x


def test_another_mean_and_std_give_what_the_teacher_makes_of_the_same_pixels() -> None:
    teacher = images(24, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    got = Bridge(images(24), teacher)({"pixel_values": as_prepared(photo(), images(24))})
    torch.testing.assert_close(got["pixel_values"], as_prepared(photo(), teacher), rtol=1e-5, atol=1e-5)
    assert list(got) == ["pixel_values"]


@pytest.mark.parametrize("filter_", ["bilinear", "bicubic"])
@pytest.mark.parametrize("side", [48, 7])
def test_another_size_is_resized_as_pillow_does(filter_, side) -> None:
    teacher = images(side, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation=filter_)
    got = Bridge(images(24), teacher)({"pixel_values": as_prepared(photo(), images(24))})["pixel_values"]
    resized = photo().resize((side, side), Image.Resampling[filter_.upper()])
    expected = as_prepared(resized, teacher)
    assert got.shape == (1, 3, side, side)
    assert (got - expected).abs().max() < 4 / 127.5  # Pillow rounds to 8 bits after each axis


@pytest.mark.parametrize("filter_", ["bilinear", "bicubic"])
def test_a_smaller_image_is_antialiased(filter_) -> None:
    """A chessboard of single pixels becomes grey, not a coarser chessboard."""
    board = (torch.arange(24)[:, None] + torch.arange(24)) % 2.0
    teacher = images(7, mean=(0.0,) * 3, std=(1.0,) * 3, interpolation=filter_)
    student = images(24, mean=(0.0,) * 3, std=(1.0,) * 3)
    got = Bridge(student, teacher)({"pixel_values": board.expand(1, 3, 24, 24)})["pixel_values"]
    assert (got - 0.5).abs().max() < 0.1


def test_the_size_that_counts_is_the_batches_own() -> None:
    """prepare(image_size=...) need not be the size of the student's data_config."""
    x = torch.rand(1, 3, 30, 30)
    assert Bridge(images(24), images(30))({"pixel_values": x})["pixel_values"] is x


def test_grey_and_colour_are_bridged_as_pillow_converts() -> None:
    grey, colour = images(24, 1), images(24, mean=(0.1, 0.2, 0.3))
    up = Bridge(grey, colour)({"pixel_values": as_prepared(photo("L"), grey)})["pixel_values"]
    torch.testing.assert_close(up, as_prepared(photo("L").convert("RGB"), colour), rtol=1e-5, atol=1e-5)
    down = Bridge(colour, grey)({"pixel_values": as_prepared(photo(), colour)})["pixel_values"]
    assert (down - as_prepared(photo("L"), grey)).abs().max() < 1.01 / 255 / 0.2


def test_processors_of_transformers_are_measured_not_read() -> None:
    """EfficientNet's divides by std twice, MobileViT's swaps red and blue: mean and std do not say so."""
    from transformers import EfficientNetImageProcessor, MobileViTImageProcessor

    size = {"height": 24, "width": 24}
    twice = EfficientNetImageProcessor(
        size=size, do_center_crop=False, image_mean=[0.4] * 3, image_std=[0.5] * 3, include_top=True
    )
    swapped = MobileViTImageProcessor(size=size, crop_size=size, do_resize=False, do_center_crop=False)
    first = images(24, processor=twice, mean=(0.4,) * 3, std=(0.5,) * 3)
    second = images(24, processor=swapped, mean=(0.0,) * 3, std=(1.0,) * 3)
    assert Pixels.of(second).reversed
    assert not Pixels.of(first).reversed
    torch.testing.assert_close(Pixels.of(first).scale, torch.full((3,), 4.0))
    for a, b in ((first, second), (second, first), (images(24), second)):
        got = Bridge(a, b)({"pixel_values": as_prepared(photo(), a)})["pixel_values"]
        torch.testing.assert_close(got, as_prepared(photo(), b), rtol=1e-4, atol=1e-4)


def test_the_teacher_sees_the_same_augmentation() -> None:
    """A random crop and flip of the student's, brought to the teacher: not the plain image, and not another draw."""
    student, teacher = images(24), images(24, mean=(0.0,) * 3, std=(1.0,) * 3)
    features = datasets.Features({"image": datasets.Image()})
    rows = datasets.Dataset.from_dict({"image": [photo(side=40)] * 2}, features=features)
    columns = Columns("image", None, "image", "image-classification")
    own = prepare(rows, student, columns, train=True, augment="light", seed=3)
    theirs = prepare(rows, teacher, columns, train=True, augment="light", seed=3)
    dataset_epoch(own).set(2)
    dataset_epoch(theirs).set(2)
    got = Bridge(student, teacher)(collator_for(student)([own[0], own[1]]))["pixel_values"]
    torch.testing.assert_close(got, torch.stack([theirs[i]["pixel_values"] for i in (0, 1)]), rtol=1e-4, atol=1e-4)
    assert (got[0] - got[1]).abs().max() > 0.05


def test_images_that_cannot_be_bridged_are_refused() -> None:
    with pytest.raises(TransferError, match="resized by 'hamming', which torch lacks"):
        Bridge(images(24), images(24, interpolation="hamming"))
    with pytest.raises(TransferError, match="does not say what its images are"):
        Bridge(images(24), replace(images(24), data_config=None))
    with pytest.raises(TransferError, match="4 channels"):
        Bridge(images(24), images(24, 4, mean=(0.5,) * 4, std=(0.5,) * 4))
    with pytest.raises(TransferError, match="takes text, the student 'net' image"):
        Bridge(images(24), text(tokenizer()))
    with pytest.raises(TransferError, match="The batch has nothing, of which the teacher takes"):
        Bridge(images(24), images(24))({})
    with pytest.raises(TransferError, match="have 1 channels, by its data_config 3"):
        Bridge(images(24), images(24, mean=(0.0,) * 3))({"pixel_values": torch.rand(1, 1, 24, 24)})


# ---- text and audio -------------------------------------------------------------------------------------------------


def other_tokenizer() -> Any:
    """Of the same words, numbered from the end."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", *sorted(set(" ".join(texts()).split()), reverse=True)]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")


def test_an_equal_tokenizer_passes_what_the_teacher_takes() -> None:
    assert tokenizer() is not tokenizer()
    bridge = Bridge(text(tokenizer()), text(tokenizer()))
    batch = {name: torch.ones(2, 5, dtype=torch.long) for name in ("input_ids", "attention_mask", "extra", "labels")}
    got = bridge(batch)
    assert got["input_ids"] is batch["input_ids"]
    assert set(got) == {"input_ids", "attention_mask"}
    assert not bridge.needs_columns


def test_one_vocabulary_cut_differently_is_another_tokenizer() -> None:
    from tokenizers import normalizers

    lower, other = tokenizer(), tokenizer()
    other.backend_tokenizer.normalizer = normalizers.Replace("new", "york")
    assert lower.get_vocab() == other.get_vocab()
    assert reads_otherwise(text(other), text(lower))
    assert not reads_otherwise(text(tokenizer()), text(lower))


def test_another_tokenizer_needs_columns_and_says_how_to_get_them_once() -> None:
    bridge = Bridge(text(tokenizer()), text(other_tokenizer()))
    assert bridge.needs_columns
    with pytest.raises(TransferError, match=r"vocabularies differ.*with_teacher_inputs\(student_rows, teacher_rows\)"):
        bridge({"input_ids": torch.ones(1, 3, dtype=torch.long)})
    own = torch.tensor([[7, 8]])
    got = bridge({"input_ids": torch.ones(1, 3, dtype=torch.long), "teacher_input_ids": own})
    assert got["input_ids"] is own


@pytest.mark.parametrize("task", ["token-classification", "causal-lm"])
def test_token_by_token_another_tokenizer_is_refused(task) -> None:
    with pytest.raises(TransferError, match="compares them token by token"):
        Bridge(text(tokenizer(), task), text(other_tokenizer(), task))


def test_rows_and_collator_bring_the_teachers_own_tokens() -> None:
    student, teacher = text(tokenizer()), text(other_tokenizer())
    rows = datasets.Dataset.from_dict({"text": texts(6), "labels": [0, 1] * 3})
    columns = Columns("text", "labels", "text", "text-classification")
    for backbone in (student, teacher):
        backbone.model.config = SimpleNamespace(max_position_embeddings=24, model_type="bert", pad_token_id=0)
    own = prepare(rows, student, columns, train=True)
    shuffled = prepare(rows, teacher, columns, train=True).select([5, 4, 3, 2, 1, 0])
    joined = with_teacher_inputs(own, shuffled)
    assert len(joined) == 6
    collate = TeacherInputs(collator_for(student), collator_for(teacher))
    loader = torch.utils.data.DataLoader(joined, batch_size=3, collate_fn=collate)
    batch = next(iter(loader))
    seen = Bridge(student, teacher)(batch)
    expected = teacher.processor(texts(6)[:3], padding=True, return_tensors="pt")
    assert torch.equal(seen["input_ids"], expected["input_ids"])
    assert torch.equal(seen["attention_mask"], expected["attention_mask"])
    plain = collator_for(student)([own[i] for i in range(3)])
    mine = without_teacher_inputs(batch)
    assert mine.keys() == plain.keys()
    assert all(torch.equal(mine[name], plain[name]) for name in plain)
    with pytest.raises(TransferError, match="3 of the student's 6 rows are not among the teacher's"):
        with_teacher_inputs(own, shuffled.select(range(3)))
    with pytest.raises(TransferError, match="student's rows have no 'example_id'"):
        with_teacher_inputs(rows, shuffled)


def test_images_prepared_for_the_teacher_follow_the_students_epoch() -> None:
    student, teacher = images(24), images(32)
    features = datasets.Features({"image": datasets.Image()})
    rows = datasets.Dataset.from_dict({"image": [photo(side=40)] * 2}, features=features)
    columns = Columns("image", None, "image", "image-classification")
    own, theirs = (prepare(rows, b, columns, train=True, augment="geometric") for b in (student, teacher))
    joined = with_teacher_inputs(own, theirs)
    dataset_epoch(joined).set(5)
    got = joined[1]["teacher_pixel_values"]
    assert got.shape == (3, 32, 32)
    dataset_epoch(theirs).set(5)
    assert torch.equal(got, theirs[1]["pixel_values"])
    dataset_epoch(theirs).set(4)
    assert not torch.equal(got, theirs[1]["pixel_values"])
    blended = collator_for(replace(student, model=SimpleNamespace(config=SimpleNamespace(num_labels=2))), mixup=0.5)
    with pytest.raises(TransferError, match="mixup and CutMix"):
        TeacherInputs(blended, collator_for(teacher))


def test_pairs_are_marked_for_a_teacher_whose_student_does_not_mark_them() -> None:
    """A DistilBERT student gives no token_type_ids; a BERT teacher without them reads a pair as one text."""
    own, marking = tokenizer(), tokenizer()
    marking.model_input_names = ["input_ids", "attention_mask", "token_type_ids"]
    bridge = Bridge(text(own), text(marking))
    pairs = (["new york", "a dull film", "the plot"], ["a film", "great", "was not new"])
    batch = dict(own(*pairs, padding=True, return_tensors="pt"))
    assert "token_type_ids" not in batch
    expected = marking(*pairs, padding=True, return_tensors="pt")["token_type_ids"]
    assert expected.any()
    assert torch.equal(bridge(batch)["token_type_ids"], expected)
    single = dict(own(pairs[0], padding=True, return_tensors="pt"))
    assert not bridge(single)["token_type_ids"].any()


def test_longer_rows_than_the_teacher_takes_are_refused() -> None:
    teacher = text(tokenizer())
    teacher.model.config = SimpleNamespace(max_position_embeddings=16, model_type="bert", pad_token_id=0)
    with pytest.raises(TransferError, match=r"20 tokens a row, and the teacher takes 16: prepare.*max_length=16"):
        Bridge(text(tokenizer()), teacher)({"input_ids": torch.ones(1, 20, dtype=torch.long)})


def test_extractors_are_compared_by_their_settings(tmp_path) -> None:
    student = load_backbone(wav2vec2(tmp_path / "net"), labels=["l", "h"], task="audio-classification")
    same = replace(student, processor=copy.deepcopy(student.processor))
    batch = {"input_values": torch.rand(1, 2000)}
    assert Bridge(student, same)(batch)["input_values"] is batch["input_values"]
    faster = replace(student, processor=type(student.processor)(sampling_rate=8000, return_attention_mask=False))
    assert reads_otherwise(faster, student)
    with pytest.raises(TransferError, match=r"different feature extractors \(they differ in sampling_rate"):
        Bridge(student, faster)(batch)


def test_a_language_model_is_not_asked_for_its_cache(tmp_path) -> None:
    backbone = load_backbone(text_backbone(tmp_path / "bert"), labels=["a", "b"], task="text-classification")
    bridge = Bridge(backbone, backbone)
    seen: dict[str, Any] = {}
    bridge.takes |= {"use_cache"}
    bridge.run(lambda **inputs: seen.update(inputs), {"input_ids": torch.ones(1, 1)})
    assert seen["use_cache"] is False
