"""Fine-tune a token classifier: named entities, by default MiniLM on WNUT-17; scored by entity F1 (seqeval).

    accelerate launch recipes/finetune_tokens.py
    python recipes/finetune_tokens.py --model ../shared/weights/all-MiniLM-L6-v2 --dataset ../shared/data/wnut17
    python recipes/finetune_tokens.py --model ../shared/weights/all-MiniLM-L6-v2 --dataset ../shared/data/wnut17 \
        --tuning linear_probe                                      # what the frozen network knows of entities

The data has a column of words and a column of tags. A word's first piece carries its tag, the others are ignored.
As in every recipe, what no flag and no YAML file (--config) says takes a recommended value, the model of the last step
is kept, and the run folder holds model, card and results.json.
"""

from hf_transfer import finetune
from hf_transfer.cli import results_table
from hf_transfer.config import parse_given
from hf_transfer.console import is_first_process, run

DEFAULTS = {
    "model": "sentence-transformers/all-MiniLM-L6-v2",
    "dataset": "flaitenberger/wnut_17",  # a copy: leondz/wnut_17 is a script, which datasets 4 and later do not run
    "max_length": 128,
    "num_train_epochs": 6,
}


def main() -> None:
    options, training = parse_given(defaults=DEFAULTS, description=__doc__)
    result = finetune(**vars(options), **training)
    if is_first_process():
        print(f"{result.plan}\n\n{results_table(result.folder)}\n\nSaved to {result.folder}")


if __name__ == "__main__":
    run(main)
