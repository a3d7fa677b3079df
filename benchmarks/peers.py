"""The same jobs by other libraries: distillation by timm.task and torchdistill, embeddings by sentence-transformers.

    OMP_NUM_THREADS=1 python benchmarks/peers.py                # some minutes of one core; pip install -e ".[bench]"

A peer that is not installed is left out. What is compared is equal work: the students end with the same weights, the
embeddings are the same numbers, the classifiers tell the same classes.

- distillation: one epoch of soft targets and cross-entropy of lcnet_050 beside a live mobilenetv2_100, at 96 px, from
  random weights on noise that lies in memory, by plain SGD. DistillationTrainer's epoch holds what a Trainer does
  besides (logging, checks, callbacks); timm.task and torchdistill give the loss to a loop of three lines.
- embeddings: SentenceTransformer.encode beside extract(), of the pooled output of MiniLM for texts of SST-2.
- text classifier: SetFitModel.fit with its head alone (logistic regression on embeddings), beside extract() and the
  same regression.
"""

import tempfile
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hf_transfer._torchvision import make_torchvision_importable

make_torchvision_importable()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from command import main  # noqa: E402
from frozen_arms import fresh_maps  # noqa: E402
from paired import SEED, Arm, Clock, Outcome, Same, interleave, largest_difference, ratio, timed  # noqa: E402
from results import Cases, markdown, measured_on, section, shared  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from watch import Watch  # noqa: E402

from hf_transfer import DistillationConfig, DistillationTrainer, load_backbone, load_data  # noqa: E402
from hf_transfer.data.collate import collator_for  # noqa: E402
from hf_transfer.data.transforms import prepare  # noqa: E402
from hf_transfer.distillation.live import LiveTeacher  # noqa: E402
from hf_transfer.frozen.features import extract  # noqa: E402
from hf_transfer.objectives import SoftTargets  # noqa: E402

RESULTS = Path(__file__).with_suffix(".json")
TEMPERATURE, SOFT, HARD, RATE = 4.0, 0.9, 0.1, 1e-3


@dataclass(frozen=True)
class Case:
    """Ours and its peers.

    Attributes:
        label: The job, for the table.
        arms: By library; "ours" is one of them.
        tolerance: By how much their results may differ.
        distance: Between results; the largest difference by default.
    """

    label: str
    arms: Mapping[str, Arm]
    tolerance: float
    distance: Callable[[Any, Any], float] = largest_difference

    @property
    def peers(self) -> list[str]:
        """The names of the libraries beside ours, as they are installed by."""
        return [name for name in self.arms if name != "ours"]


# ---- distillation -------------------------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    """Images of noise in memory, as a collator takes them."""

    def __init__(self, count: int, size: int, classes: int) -> None:
        self.images = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(SEED))
        self.classes = classes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"pixel_values": self.images[row], "labels": row % self.classes, "example_id": row}


class Distillation:
    """One epoch from the same weights over the same batches, by each library.

    Args:
        rows: Of the epoch.
        size: Side of the images in pixels.
        batch_size: Rows a step.
        networks: Student and teacher, by timm's names.
    """

    def __init__(
        self,
        rows: int = 160,
        size: int = 96,
        batch_size: int = 32,
        networks: tuple[str, str] = ("lcnet_050", "mobilenetv2_100"),
    ) -> None:
        torch.manual_seed(SEED)
        labels = [str(number) for number in range(10)]
        self.student, self.teacher = (
            load_backbone(name, labels=labels, pretrained=False, image_size=size) for name in networks
        )
        self.rows, self.batch_size = Rows(rows, size, len(labels)), batch_size
        with tempfile.TemporaryDirectory() as folder:
            self.batches = list(self._trainer(folder).get_train_dataloader())
        self.start = flat(self.student.model)

    def ours(self) -> Outcome:
        """By DistillationTrainer."""
        with tempfile.TemporaryDirectory() as folder:
            trainer, watch = self._trainer(folder), Watch()
            trainer.add_callback(watch)
            trainer.train()
            return Outcome(flat(trainer.model), {"": watch.epochs})

    def _trainer(self, folder: str) -> DistillationTrainer:
        student = replace(self.student, model=deepcopy(self.student.model))
        args = DistillationConfig(
            output_dir=folder, per_device_train_batch_size=self.batch_size, num_train_epochs=1, learning_rate=RATE,
            optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0, save_strategy="no", use_cpu=True, seed=SEED,
            data_seed=SEED, report_to="none", disable_tqdm=True, dataloader_pin_memory=False, hard_weight=HARD,
            teacher_cache="never",
        )  # fmt: skip
        return DistillationTrainer(
            model=student, teacher=LiveTeacher(self.teacher, student), args=args, train_dataset=self.rows,
            objectives=[SoftTargets(TEMPERATURE, weight=SOFT)], data_collator=collator_for(student),
        )  # fmt: skip

    def _networks(self) -> tuple[nn.Module, nn.Module]:
        """Student and teacher as timm has them."""
        student: Any = deepcopy(self.student.model).train()
        teacher: Any = self.teacher.model.eval()
        return student.timm_model, teacher.timm_model

    def timm(self) -> Outcome:
        """By timm.task in a loop."""
        from timm.task import LogitDistillationTask

        student, teacher = self._networks()
        task = LogitDistillationTask(
            student, teacher, criterion=nn.CrossEntropyLoss(), distill_loss_weight=SOFT, task_loss_weight=HARD,
            temperature=TEMPERATURE, device=torch.device("cpu"), verbose=False,
        ).train()  # fmt: skip
        optimizer = torch.optim.SGD(student.parameters(), RATE)
        start = Clock.now()
        for batch in self.batches:
            task(batch["pixel_values"], batch["labels"])["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
        return Outcome(flat(student), {"": Clock.now().since(start)})

    def torchdistill(self) -> Outcome:
        """By torchdistill's DistillationBox in its own loop."""
        from torchdistill.core.distillation import get_distillation_box

        student, teacher = self._networks()
        head = next(name for name, module in reversed(list(student.named_modules())) if isinstance(module, nn.Linear))
        other = next(name for name, module in reversed(list(teacher.named_modules())) if isinstance(module, nn.Linear))
        loss = {
            "student_module_path": head, "student_module_io": "output", "teacher_module_path": other,
            "teacher_module_io": "output", "temperature": TEMPERATURE, "alpha": HARD,
        }  # fmt: skip
        own = {"forward_proc": "forward_batch_only", "wrapper": None}
        config = {
            "num_epochs": 1,
            "train_data_loader": {},  # the batches are there
            "val_data_loader": {},
            "teacher": {**own, "requires_grad": False, "forward_hook": {"input": [], "output": [other]}},
            "student": {**own, "requires_grad": True, "forward_hook": {"input": [], "output": [head]}},
            "optimizer": {"key": "SGD", "kwargs": {"lr": RATE}},
            "criterion": {
                "key": "WeightedSumLoss",
                "kwargs": {"sub_terms": {"kd": {"criterion": {"key": "KDLoss", "kwargs": loss}, "weight": 1.0}}},
            },
        }
        pairs = [(batch["pixel_values"], batch["labels"]) for batch in self.batches]
        box = get_distillation_box(teacher, student, {}, config, torch.device("cpu"), [], False, 1)
        start = Clock.now()
        box.pre_epoch_process(epoch=0)
        for images, targets in pairs:
            box.post_forward_process(loss=box.forward_process(images, targets, None))
        outcome = Outcome(flat(student), {"": Clock.now().since(start)})
        box.clean_modules()
        return outcome

    def distance(self, one: Tensor, other: Tensor) -> float:
        """In units of how far training moved the weights."""
        return float((one - other).norm() / (one - self.start).norm())


def flat(model: nn.Module) -> Tensor:
    """All weights as one vector."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).clone()


def distillation(**options: Any) -> Case:
    """DistillationTrainer, timm.task and torchdistill."""
    job = Distillation(**options)
    arms: dict[str, Arm] = {"ours": job.ours, "timm": job.timm}
    if find_spec("torchdistill"):
        arms["torchdistill"] = job.torchdistill
    return Case("distillation epoch, live teacher", arms, 1e-3, job.distance)


# ---- text ---------------------------------------------------------------------------------------------------------


class Texts:
    """Texts, and both ways to their embeddings: what MiniLM's pooler says.

    Args:
        rows: How many texts.
    """

    def __init__(self, rows: int) -> None:
        folder = shared("weights/all-MiniLM-L6-v2")
        self.data = load_data(shared("data/sst2"), max_train_samples=rows)
        self.backbone = load_backbone(folder, labels=self.data.labels)
        split = self.data.splits["train"]
        self.texts, self.labels = list(split[self.data.columns.input]), np.array(split[self.data.columns.label])
        self.sentence_transformer = self._sentence_transformer(folder)

    def _sentence_transformer(self, folder: str) -> Any:
        from sentence_transformers import SentenceTransformer, models

        body: Any = self.backbone.model
        words = models.Transformer(folder, max_seq_length=256)
        width = body.config.hidden_size
        dense = models.Dense(width, width, activation_function=nn.Tanh())
        dense.linear.load_state_dict(body.bert.pooler.dense.state_dict())
        return SentenceTransformer(modules=[words, models.Pooling(width, "cls"), dense], device="cpu")

    def extracted(self) -> np.ndarray:
        """(N, D) by extract(), tokenising included."""
        rows = prepare(self.data.splits["train"], self.backbone, self.data.columns, train=False)
        return extract(self.backbone, rows).x.numpy()

    def encoded(self) -> np.ndarray:
        """(N, D) by sentence-transformers."""
        return self.sentence_transformer.encode(self.texts, batch_size=64, show_progress_bar=False)

    def classified(self) -> np.ndarray:
        """(1, D) weights of a regression on extracted features."""
        return LogisticRegression(max_iter=1000).fit(self.extracted(), self.labels).coef_

    def by_setfit(self) -> np.ndarray:
        """The same by SetFit, without training of its body."""
        from setfit import SetFitModel

        head = LogisticRegression(max_iter=1000)
        SetFitModel(model_body=self.sentence_transformer, model_head=head).fit(self.texts, self.labels, num_epochs=1)
        return head.coef_


def embeddings(rows: int = 256) -> Case:
    """extract() and SentenceTransformer.encode."""
    import sentence_transformers  # noqa: F401  # a peer that is not installed is left out before any work

    job = Texts(rows)
    arms = {"ours": timed(job.extracted), "sentence-transformers": timed(job.encoded)}
    return Case(f"embeddings of {rows} texts", arms, 1e-4)


def classifier(rows: int = 256) -> Case:
    """A regression on extract(), and SetFit's head alone."""
    import setfit  # noqa: F401

    job = Texts(rows)
    arms = {"ours": timed(job.classified), "setfit": timed(job.by_setfit)}
    return Case(f"text classifier on embeddings of {rows} texts", arms, 1e-3)


# ---- rounds and figures -------------------------------------------------------------------------------------------


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Times the arms of a case."""
    same = [Same(name, "ours", case.tolerance) for name in case.arms if name != "ours"]
    with fresh_maps():
        found = interleave(
            case.arms, label=case.label, rounds=rounds, repeats=case.tolerance, same=same, distance=case.distance
        )
    return {"label": case.label, "peers": {name: version(name) for name in case.peers}, **found.facts()}


@section(RESULTS)
def table(cases: Cases) -> list[str]:
    """The section of docs/benchmarks.md."""
    rows = [
        (found["label"], f"{name} {number}", *(ratio(found, "ours", name, kind) for kind in ("cpu", "wall")))
        for found in cases.values()
        for name, number in found["peers"].items()
    ]
    return [
        "## Other libraries",
        "",
        "Our time over theirs, for equal work: below 1 ours is faster. benchmarks/peers.py says what is done.",
        "",
        *markdown(["job", "against", "CPU time", "wall time"], rows),
        "",
        f"`python benchmarks/peers.py` on {measured_on(cases.values())}.",
    ]


CASES: dict[str, Callable[[], Case]] = {
    "distillation": distillation,
    "embeddings": embeddings,
    "classifier": classifier,
}


if __name__ == "__main__":
    main(__doc__, CASES, measure, table, RESULTS)
