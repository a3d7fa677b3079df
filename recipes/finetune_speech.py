"""Fine-tune an audio classifier: by default wav2vec 2.0 on the intents of MInDS-14; any audio encoder, any sounds.

    accelerate launch recipes/finetune_speech.py
    python recipes/finetune_speech.py --model path/to/audio/model --dataset ../shared/data/spoken_digits \
        --label_column label
    python recipes/finetune_speech.py --dataset path/to/train_and_test_parquet --label_column label --max_length 3

Sounds are resampled to the model's rate; --max_length is in seconds. Needs the extra: pip install
"hf-transfer-learning[audio]". As in every recipe, what no flag and no YAML file (--config) says takes a recommended
value, the model of the last step is kept, and the run folder holds model, card and results.json.
"""

from hf_transfer import finetune
from hf_transfer.cli import results_table
from hf_transfer.config import parse_given
from hf_transfer.console import is_first_process, run

DEFAULTS = {
    "model": "facebook/wav2vec2-base",
    "dataset": "PolyAI/minds14:en-US",
    "label_column": "intent_class",
    "input_column": "audio",
    "max_length": 10,
    "num_train_epochs": 10,
}


def main() -> None:
    options, training = parse_given(defaults=DEFAULTS, description=__doc__)
    result = finetune(**vars(options), **training)
    if is_first_process():
        print(f"{result.plan}\n\n{results_table(result.folder)}\n\nSaved to {result.folder}")


if __name__ == "__main__":
    run(main)
