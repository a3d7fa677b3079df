"""Sounds through the model's own extractor, at its sampling rate, padded by batch as it pads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from data_fakes import FakeBackbone, wav

from hf_transfer.data.collate import collator_for
from hf_transfer.data.columns import Columns, infer
from hf_transfer.data.transforms import prepare
from hf_transfer.errors import TransferError

AUDIO = Columns("audio", "label", "audio", "audio-classification")


def backbone(extractor=None) -> FakeBackbone:
    from transformers import Wav2Vec2FeatureExtractor

    extractor = extractor or Wav2Vec2FeatureExtractor(sampling_rate=16000, do_normalize=True)
    return FakeBackbone("audio", extractor, None, None, "audio-classification")


def tone(seconds: float, rate: int = 16000, pitch: float = 440.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * pitch * np.arange(round(seconds * rate)) / rate)


def test_sounds_are_what_the_extractor_makes_of_the_waveform(sounds):
    waveform = tone(0.1)
    rows = prepare(sounds([wav(waveform, 16000)]), backbone(), AUDIO, train=True)
    stored = np.round(waveform * 32767) / 32768  # 16-bit wav
    expected = backbone().processor(stored.astype(np.float32), sampling_rate=16000)["input_values"][0]
    assert np.allclose(rows[0]["input_values"], expected, atol=1e-5)
    assert rows[0].keys() == {"input_values", "labels", "example_id"}


def test_sounds_are_resampled(sounds):
    from transformers import Wav2Vec2FeatureExtractor

    plain = backbone(Wav2Vec2FeatureExtractor(sampling_rate=16000, do_normalize=False))
    row = prepare(sounds([wav(tone(0.2, 8000), 8000)]), plain, AUDIO, train=False)[0]["input_values"]
    assert row.shape == (3200,)
    assert np.abs(row - tone(0.2))[320:-320].max() < 0.01


def test_sounds_are_cut_to_seconds(sounds):
    rows = prepare(sounds([wav(tone(0.5, 8000), 8000)]), backbone(), AUDIO, train=True, max_length=0.25)
    assert rows[0]["input_values"].shape == (4000,)
    with pytest.raises(TransferError, match="max_length=-1: for audio it is seconds"):
        prepare(sounds([wav([0.1])]), backbone(), AUDIO, train=True, max_length=-1)


@pytest.mark.parametrize("mask", [True, False])
def test_batches_are_padded_as_the_extractor_pads(sounds, mask):
    from transformers import Wav2Vec2FeatureExtractor

    extractor = Wav2Vec2FeatureExtractor(sampling_rate=16000, return_attention_mask=mask)
    files = [tone(0.05), tone(0.1)]
    rows = prepare(sounds([wav(file, 16000) for file in files]), backbone(extractor), AUDIO, train=False)
    batch = collator_for(backbone(extractor))([rows[0], rows[1]])
    stored = [(np.round(file * 32767) / 32768).astype(np.float32) for file in files]
    expected = extractor(stored, sampling_rate=16000, padding=True, return_tensors="pt")
    assert set(batch) == {*expected, "labels", "example_id"}
    if not mask:  # then the extractor normalises each sound together with its padding; alone is what a sound is
        alone = [extractor(one, sampling_rate=16000)["input_values"][0] for one in stored]
        expected["input_values"] = torch.stack([torch.tensor(np.pad(one, (0, 1600 - len(one)))) for one in alone])
    for name in expected:
        assert torch.allclose(batch[name].float(), expected[name].float(), atol=1e-5), name
    assert batch["labels"].tolist() == [0, 1]


def test_spectrogram_extractors(sounds):
    from transformers import ASTFeatureExtractor, WhisperFeatureExtractor

    files = sounds([wav(tone(0.2), 16000), wav(tone(0.1, pitch=880), 16000)])
    for extractor, name, shape in (
        (ASTFeatureExtractor(max_length=64, num_mel_bins=16), "input_values", (2, 64, 16)),
        (WhisperFeatureExtractor(feature_size=16, chunk_length=1), "input_features", (2, 16, 100)),
    ):
        rows = prepare(files, backbone(extractor), AUDIO, train=False)
        batch = collator_for(backbone(extractor))([rows[0], rows[1]])
        assert batch[name].shape == shape
        assert batch[name].dtype == torch.float32
        assert not torch.equal(batch[name][0], batch[name][1])


def test_unreadable_sounds_are_named_or_left_out(sounds):
    rows = sounds([wav([0.1] * 50), b"nothing", None])
    with pytest.raises(TransferError, match="Unreadable audio in train row 1 "):
        prepare(rows, backbone(), AUDIO, train=True)
    kept = prepare(rows, backbone(), AUDIO, train=True, on_bad_example="skip")
    assert [row["example_id"] for row in kept] == [0]


def test_plain_files_are_audio(sounds):
    assert infer(sounds([wav([0.1])])) == AUDIO


def test_a_processor_of_another_kind_is_refused(sounds, tokenizer):
    with pytest.raises(TransferError, match="is no audio feature extractor"):
        prepare(sounds([wav([0.1])]), backbone(tokenizer), AUDIO, train=True)


@pytest.mark.slow
def test_real_sounds(shared):
    from hf_transfer.data.sources import load_data

    data = load_data(shared("data/spoken_digits"), max_eval_samples=20)
    rows = prepare(data.splits["test"], backbone(), data.columns, train=False)
    batch = collator_for(backbone())([rows[i] for i in range(20)])
    assert batch["input_values"].shape[0] == 20
    assert batch["input_values"].shape[1] > 4000
    assert torch.isfinite(batch["input_values"]).all()
