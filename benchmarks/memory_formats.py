"""What channels last in memory is worth: training steps with it beside steps without.

    OMP_NUM_THREADS=1 python benchmarks/memory_formats.py          # two minutes of one core

Both networks start from the same weights and take the same steps. What `hf_transfer.recommended` recommends follows
what is found here.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hf_transfer._torchvision import make_torchvision_importable

make_torchvision_importable()

import timm  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from command import main  # noqa: E402
from paired import SEED, Same, interleave, ratio, timed  # noqa: E402
from results import Cases, markdown, measured_on, section  # noqa: E402
from torch import nn  # noqa: E402

from hf_transfer.memory_formats import channels_last_pays, to_channels_last  # noqa: E402

RESULTS = Path(__file__).with_suffix(".json")
NETWORKS = (  # name, pixels, rows
    ("mobilenetv2_100", 96, 16), ("lcnet_050", 96, 32), ("efficientnet_b0", 96, 8), ("regnetx_002", 96, 16),
    ("convnext_atto", 96, 8), ("resnet18", 32, 32), ("resnet18", 224, 4), ("vit_tiny_patch16_224", 224, 4),
    ("swin_tiny_patch4_window7_224", 224, 2),
)  # fmt: skip
STEPS = 2


@dataclass(frozen=True)
class Case:
    """A network and what it is trained on.

    Attributes:
        name: timm's.
        size: Side of the images, in pixels.
        rows: Of a batch.
    """

    name: str
    size: int
    rows: int


def steps(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Some training steps from the weights that it is given; the first one's loss."""
    torch.manual_seed(SEED)  # dropout
    model = deepcopy(model).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    losses = []
    for _ in range(STEPS):
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses[0]


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Times a network in both formats."""
    torch.manual_seed(SEED)
    first = timm.create_model(case.name, num_classes=10, drop_path_rate=0.0)
    last = deepcopy(first)
    to_channels_last(last)
    images, labels = torch.randn(case.rows, 3, case.size, case.size), torch.randint(0, 10, (case.rows,))
    label = f"{case.name}, {case.size} px, batch {case.rows}"
    arms = {name: timed(partial(steps, model, images, labels)) for name, model in (("first", first), ("last", last))}
    measured = interleave(arms, label=label, rounds=rounds, repeats=1e-5, same=[Same("first", "last", 1e-3)])
    return {"label": label, "recommended": channels_last_pays(first), **measured.facts()}


@section(RESULTS)
def table(cases: Cases) -> list[str]:
    """The section of docs/benchmarks.md."""
    rows = [
        (found["label"], "yes" if found["recommended"] else "no", ratio(found, "last", "first"))
        for found in cases.values()
    ]
    return [
        "## Channels last in memory",
        "",
        "CPU time of training steps with `channels_last`, over that of the same steps without.",
        "",
        *markdown(["network", "recommended", "with / without"], rows),
        "",
        f"`python benchmarks/memory_formats.py` on {measured_on(cases.values())}.",
    ]


CASES: dict[str, Callable[[], Case]] = {f"{name}-{size}": partial(Case, name, size, n) for name, size, n in NETWORKS}


if __name__ == "__main__":
    main(__doc__, CASES, measure, table, RESULTS)
