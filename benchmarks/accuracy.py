"""How well the recipes do on real data beside the project (../shared): runs them, keeps their results.

    python benchmarks/accuracy.py cifar_full cifar_lora        # some jobs; those whose run folder is there are kept
    python benchmarks/accuracy.py                              # all: some hours on 2 CPU cores

A job is a recipe with its flags and seeds, run as a user would run it. The score is that of the last step on the test
split, which nothing was selected on; hyper-parameters were settled on rows held out of train.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from results import markdown

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_suffix(".json")
RUNS = ROOT / "runs" / "benchmarks"
SHARED = "../shared"
MOBILENET = f"{SHARED}/weights/mobilenetv2_100.coral_tf2_in1k"
MINILM = f"{SHARED}/weights/all-MiniLM-L6-v2"


@dataclass(frozen=True)
class Job:
    """One line of a table: a recipe, its flags, its seeds."""

    table: str
    label: str
    recipe: str
    flags: str
    metric: str = "accuracy"
    split: str = "test"
    seeds: tuple[int, ...] = (42,)


SEEDS = (42, 0, 1)
XRAY_SEEDS = (42, 0)
CIFAR = "CIFAR-10 (lossy JPEG copy), mobilenetv2 at 96 px, 10,000 rows of train, first 2,000 of test, 3 epochs"
SST2 = "SST-2, MiniLM, 3 epochs, validation split (872 rows)"
BANKING = "banking77, MiniLM, 10,003 rows less 10 % held out"
WNUT = "WNUT-17 named entities, MiniLM, 6 epochs"
XRAY = "Pneumonia in chest X-rays (28 px copies, shown at 96), mobilenetv2, 5 epochs, best validation AUROC"
SPEECH = "Spoken digits, a small audio spectrogram transformer from random weights, 30 epochs"
KD_CIFAR = (
    "Distillation, CIFAR-10: mobilenetv2 into lcnet_050 (15 % of its MACs) from scratch, the same rows, 12 epochs; "
    "the terms were chosen as below"
)
KD_CHOICE = "Distillation, CIFAR-10: how the terms were chosen: 8 epochs, 2,000 rows held out of train"
KD_SST2 = "Distillation, SST-2: the full fine-tune above into three of its layers, and into a BiLSTM; validation split"

_CIFAR = (
    f"--model {MOBILENET} --dataset {SHARED}/data/cifar10 --image_size 96 --max_train_samples 10000 "
    "--max_eval_samples 2000"
)
_SST2 = f"--model {MINILM} --dataset {SHARED}/data/sst2"
_BANKING = f"--model {MINILM} --dataset {SHARED}/data/banking77"
_BANKING_RATES = "--num_train_epochs 5 --learning_rate 3e-4 --head_learning_rate 3e-3"
_WNUT = f"--model {MINILM} --dataset {SHARED}/data/wnut17"
_XRAY = f"--model {MOBILENET} --dataset {SHARED}/data/pneumonia"
_SPEECH = f"--model runs/benchmarks/tiny_ast --dataset {SHARED}/data/spoken_digits --label_column label"
_STUDENT = (
    f"--dataset {SHARED}/data/cifar10 --image_size 96 --max_train_samples 10000 --max_eval_samples 2000 "
    "--num_train_epochs 12 --learning_rate 3e-3 --per_device_train_batch_size 64 --save_strategy no --eval_strategy no"
)
_KD_CIFAR = (
    f"--teacher runs/benchmarks/kd_cifar_teacher-seed42 {_STUDENT} --teacher_cache always --teacher_cache_views 6"
)
_SOFT = "SoftTargets(temperature=4.0,weight=0.9)"
_CHOICE = {
    "mse": ("squared error of logits", "LogitMSE(weight=0.1)"),
    "dkd": ("DKD", "DKD(weight=0.9)"),
    "soft": ("soft targets", _SOFT),
    "standardised": (
        "soft targets of standardised logits",
        "LogitStandardization(SoftTargets(temperature=2.0,weight=0.9))",
    ),
    "hint": ("soft targets and a hint on the features", f"{_SOFT} Hint(layers='features',weight=10.0)"),
}
_KD_SST2 = f"--teacher runs/benchmarks/sst2_full-seed42 --dataset {SHARED}/data/sst2 --save_strategy no"
_BILSTM = f"{_KD_SST2} --model bilstm --learning_rate 2e-3 --num_train_epochs 6"


def _choice(label: str, recipe: str, flags: str) -> Job:
    return Job(
        KD_CHOICE, label, recipe, flags.replace("--num_train_epochs 12", "--num_train_epochs 8"), split="validation"
    )


JOBS = {
    "cifar_scratch": Job(CIFAR, "from scratch", "finetune_cifar", f"{_CIFAR} --pretrained false"),
    "cifar_probe": Job(CIFAR, "linear probe", "finetune_cifar", f"{_CIFAR} --tuning linear_probe"),
    "cifar_partial": Job(CIFAR, "partial freeze", "finetune_cifar", f"{_CIFAR} --tuning partial --train_blocks 6"),
    "cifar_lora": Job(CIFAR, "LoRA", "finetune_cifar", f"{_CIFAR} --tuning lora"),
    "cifar_full": Job(CIFAR, "full", "finetune_cifar", f"{_CIFAR} --tuning full"),
    "sst2_probe": Job(SST2, "linear probe", "finetune_text", f"{_SST2} --tuning linear_probe", split="validation"),
    "sst2_lora": Job(SST2, "LoRA, r = 8", "finetune_text", f"{_SST2} --tuning lora --lora_r 8", split="validation"),
    "sst2_full": Job(SST2, "full", "finetune_text", f"{_SST2} --tuning full", split="validation"),
    "banking_full": Job(BANKING, "full", "finetune_text", f"{_BANKING} {_BANKING_RATES}"),
    "wnut_probe": Job(WNUT, "linear probe", "finetune_tokens", f"{_WNUT} --tuning linear_probe", "entity_f1"),
    "wnut_full": Job(WNUT, "full", "finetune_tokens", _WNUT, "entity_f1"),
    "xray_probe": Job(
        XRAY, "linear probe", "finetune_xray", f"{_XRAY} --tuning linear_probe", "auroc", seeds=XRAY_SEEDS
    ),
    "xray_full": Job(XRAY, "full", "finetune_xray", _XRAY, "auroc", seeds=XRAY_SEEDS),
    "speech_probe": Job(SPEECH, "linear probe", "finetune_speech", f"{_SPEECH} --tuning linear_probe", seeds=SEEDS),
    "speech_full": Job(SPEECH, "full", "finetune_speech", _SPEECH, seeds=SEEDS),
    "kd_cifar_teacher": Job(
        KD_CIFAR, "the teacher: full, 3 epochs", "finetune_cifar", f"{_CIFAR} --tuning full --learning_rate 1e-3"
    ),
    "kd_cifar_labels": Job(
        KD_CIFAR,
        "labels alone",
        "finetune_cifar",
        f"--model lcnet_050 --pretrained false --label_smoothing_factor 0 {_STUDENT}",
        seeds=SEEDS,
    ),
    "kd_cifar_soft": Job(KD_CIFAR, "soft targets", "distill_cifar", _KD_CIFAR, seeds=SEEDS),
    "kd_cifar_hint": Job(
        KD_CIFAR,
        "soft targets and a hint on the features",
        "distill_cifar",
        f"{_KD_CIFAR} --objectives {_SOFT} Hint(layers='features',weight=10.0)",
        seeds=SEEDS,
    ),
    "kd_choice_labels": _choice(
        "labels alone", "finetune_cifar", f"--model lcnet_050 --pretrained false --label_smoothing_factor 0 {_STUDENT}"
    ),
    **{
        f"kd_choice_{name}": _choice(label, "distill_cifar", f"{_KD_CIFAR} --objectives {terms}")
        for name, (label, terms) in _CHOICE.items()
    },
    "kd_sst2_carve": Job(KD_SST2, "3 of 6 layers, soft targets", "distill_sst2", _KD_SST2, split="validation"),
    "kd_sst2_bilstm_labels": Job(
        KD_SST2,
        "BiLSTM, labels alone",
        "distill_sst2",
        f"{_BILSTM} --hard_weight 1 --objectives SoftTargets(weight=0.0)",
        split="validation",
    ),
    "kd_sst2_bilstm": Job(KD_SST2, "BiLSTM, soft targets", "distill_sst2", _BILSTM, split="validation"),
}
ADAPT = f"recipes/adapt_digits.py --source {SHARED}/data/mnist --target {SHARED}/data/usps --seeds 0 1 2"


def run(names: list[str]) -> None:
    """Runs the jobs that have no run folder yet, and keeps what each found beside what is in the file."""
    for name in names or [*JOBS, "adapt"]:
        if name == "adapt":
            if not (RUNS / "adapt" / "results.json").exists():
                _call([*ADAPT.split(), "--output_dir", str(RUNS / "adapt")])
            _keep(name, json.loads((RUNS / "adapt" / "results.json").read_text()))
            continue
        job = JOBS[name]
        if job.table == SPEECH and not (RUNS / "tiny_ast").exists():
            make_audio_model(RUNS / "tiny_ast")
        folders = [RUNS / f"{name}-seed{seed}" for seed in job.seeds]
        for seed, folder in zip(job.seeds, folders, strict=True):
            if not (folder / "results.json").exists():
                own = f"--seed {seed} --output_dir {folder} --disable_tqdm true"
                _call([f"recipes/{job.recipe}.py", *job.flags.split(), *own.split()])
        found = [json.loads((folder / "results.json").read_text()) for folder in folders]
        scores = [facts["metrics"][job.split][job.metric] for facts in found]
        command = f"python recipes/{job.recipe}.py {job.flags}"
        _keep(name, {"scores": scores, "command": command, "runs": found})


def measured() -> dict[str, Any]:
    """What jobs found, by name; nothing where there is no file."""
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}


def _keep(name: str, found: dict[str, Any]) -> None:
    RESULTS.write_text(json.dumps({**measured(), name: found}, indent=1, sort_keys=True) + "\n")


def _call(arguments: list[str]) -> None:
    print("python", *arguments, flush=True)
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True)


def make_audio_model(folder: Path) -> None:
    """A small AST with random weights: no pretrained audio network lies beside the project."""
    import torch
    from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification

    torch.manual_seed(0)
    config = ASTConfig(
        hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256, max_length=96,
        num_mel_bins=64, patch_size=16, frequency_stride=16, time_stride=8, num_labels=10,
    )  # fmt: skip
    ASTForAudioClassification(config).save_pretrained(folder)
    ASTFeatureExtractor(max_length=96, num_mel_bins=64, sampling_rate=16000).save_pretrained(folder)


def table() -> list[str]:
    """The sections of docs/benchmarks.md, one a table."""
    found = measured()
    lines: list[str] = []
    for title in dict.fromkeys(job.table for job in JOBS.values()):
        rows = {name: found[name]["runs"] for name, job in JOBS.items() if job.table == title and name in found}
        if not rows:
            continue
        job = JOBS[next(iter(rows))]
        head = ["tuning", job.metric, "trained", "of", "learning rate", "seconds", "seeds"]
        lines += ["", f"## {title}", "", *markdown(head, [_row(name, runs) for name, runs in rows.items()]), ""]
        selection = list(rows.values())[-1][0]["selection"]
        lines.append(f"`python recipes/{job.recipe}.py {job.flags}` and the like. Selection: {selection}")
    if "adapt" in found:
        lines += _adaptation(found["adapt"])
    runs = [run for facts in found.values() for run in facts.get("runs", [])]
    told = dict.fromkeys(", ".join(f"{name} {number}" for name, number in run["versions"].items()) for run in runs)
    return [*lines[1:], "", "Versions, of earlier runs first: " + "; ".join(told) + "."]


def _row(name: str, found: list[dict]) -> list[str]:
    job, first = JOBS[name], found[0]
    scores = [100 * facts["metrics"][job.split][job.metric] for facts in found]
    spread = f" ± {stdev(scores):.1f}" if len(scores) > 1 else ""
    return [
        job.label,
        f"{mean(scores):.1f}{spread}",
        f"{first['trainable_parameters']:,}",
        f"{first['total_parameters']:,}",
        f"{first['training_arguments']['learning_rate']:g}",
        f"{mean(facts['seconds']['train'] for facts in found):.0f}",
        ", ".join(str(facts["seed"]) for facts in found),
    ]


def _adaptation(found: dict) -> list[str]:
    lines = [
        "",
        f"## MNIST to USPS, a small CNN, {found['max_steps']} steps of 64 + 64 rows, last step, USPS test split",
        "",
    ]
    rows = [
        (method, f"{mean(scores):.1f} ± {stdev(scores):.1f}", ", ".join(f"{score:.1f}" for score in scores))
        for method, scores in found["scores"].items()
    ]
    lines += markdown(["method", "accuracy", "each seed"], rows)
    return [*lines, "", f"`python {ADAPT}`; no target label was used, in training or to choose anything."]


if __name__ == "__main__":
    run(sys.argv[1:])
