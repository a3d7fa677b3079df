"""Fine-tune a text classifier: by default MiniLM on SST-2 from the Hub; any encoder or decoder, any texts.

    accelerate launch recipes/finetune_text.py
    python recipes/finetune_text.py --model ../shared/weights/all-MiniLM-L6-v2 --dataset ../shared/data/sst2 \
        --tuning lora
    python recipes/finetune_text.py --model ../shared/weights/all-MiniLM-L6-v2 --dataset ../shared/data/banking77 \
        --num_train_epochs 8
    python recipes/finetune_text.py --model distilbert/distilbert-base-uncased --dataset reviews.csv --max_length 128

A column of numbers as the label makes it a regression. Texts of like length share a batch. As in every recipe, what no
flag and no YAML file (--config) says takes a recommended value, the model of the last step is kept, and the run folder
holds model, card and results.json.
"""

from hf_transfer import finetune
from hf_transfer.cli import results_table
from hf_transfer.config import parse_given
from hf_transfer.console import is_first_process, run

DEFAULTS = {
    "model": "sentence-transformers/all-MiniLM-L6-v2",
    "dataset": "stanfordnlp/sst2",
    "max_length": 64,
    "num_train_epochs": 3,
}


def main() -> None:
    options, training = parse_given(defaults=DEFAULTS, description=__doc__)
    result = finetune(**vars(options), **training)
    if is_first_process():
        print(f"{result.plan}\n\n{results_table(result.folder)}\n\nSaved to {result.folder}")


if __name__ == "__main__":
    run(main)
