"""What channels last in memory is worth: a training step with it beside one without.

    OMP_NUM_THREADS=1 python benchmarks/memory_formats.py          # a minute of one core

Both networks start from the same weights and take the same steps in turn, in an order drawn anew each round; figures
are medians of the rounds' ratios of CPU time. `hf_transfer.recommended` follows what is found here.
"""

import argparse
import json
import platform
import random
import time
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from statistics import median

from hf_transfer._torchvision import make_torchvision_importable

make_torchvision_importable()

import timm  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from hf_transfer.memory_formats import channels_last_pays, to_channels_last  # noqa: E402

RESULTS = Path(__file__).with_suffix(".json")
ROUNDS, WARM_UP, SEED = 7, 2, 0
CASES = (  # name, pixels, rows
    ("mobilenetv2_100", 96, 16), ("lcnet_050", 96, 32), ("efficientnet_b0", 96, 8), ("regnetx_002", 96, 16),
    ("convnext_atto", 96, 8), ("resnet18", 32, 32), ("resnet18", 224, 4), ("vit_tiny_patch16_224", 224, 4),
    ("swin_tiny_patch4_window7_224", 224, 2),
)  # fmt: skip


def step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """One step of training; its seconds and its loss."""
    start = time.process_time()
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.process_time() - start, loss.item()


def measure(name: str, size: int, rows: int, rounds: int) -> list[float]:
    """Each round's seconds with channels first over those with channels last.

    Raises:
        SystemExit: If the first losses differ.
    """
    torch.manual_seed(SEED)
    first = timm.create_model(name, num_classes=10, drop_path_rate=0.0)
    last = deepcopy(first)
    to_channels_last(last)
    models = {"first": first, "last": last}
    optimizers = {kind: torch.optim.AdamW(model.parameters(), fused=True) for kind, model in models.items()}
    images, labels = torch.randn(rows, 3, size, size), torch.randint(0, 10, (rows,))
    order, found = random.Random(SEED), []
    for i in range(-WARM_UP, rounds):
        taken, losses = {}, {}
        for kind in order.sample(list(models), 2):
            torch.manual_seed(i + WARM_UP)  # dropout
            taken[kind], losses[kind] = step(models[kind], optimizers[kind], images, labels)
        if i == -WARM_UP and abs(losses["first"] - losses["last"]) > 1e-3:
            raise SystemExit(f"{name}: losses {losses} of the same network.")
        if i >= 0:
            found.append(round(taken["first"] / taken["last"], 4))
    return found


def table(path: Path = RESULTS) -> list[str]:
    """The section of docs/benchmarks.md; empty without a file."""
    if not path.is_file():
        return []
    measured = json.loads(path.read_text())
    lines = [
        "## Channels last in memory: a training step without it over one with it",
        "",
        "| network | recommended | times as fast |",
        "|---|---|---|",
    ]
    for label, found in measured["cases"].items():
        ranked = sorted(found["ratios"])
        told = f"{median(ranked):.2f} [{ranked[0]:.2f}, {ranked[-1]:.2f}]"
        lines.append(f"| {label} | {'yes' if found['recommended'] else 'no'} | {told} |")
    return [*lines, "", f"`python benchmarks/memory_formats.py` on {measured['machine']}."]


def main(argv: Sequence[str] | None = None) -> None:
    """Measures all cases, writes the file, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    given = parser.parse_args(argv)
    cases = {
        f"{name}, {size} px, batch {rows}": {
            "recommended": channels_last_pays(timm.create_model(name)),
            "ratios": measure(name, size, rows, given.rounds),
        }
        for name, size, rows in CASES
    }
    machine = f"{torch.get_num_threads()} thread(s) of a shared {platform.machine()} CPU, torch {torch.__version__}"
    RESULTS.write_text(json.dumps({"machine": machine, "cases": cases}, indent=1) + "\n")
    print("\n".join(table()))


if __name__ == "__main__":
    main()
