"""DistillationConfig: TransferConfig, and what a teacher adds to it."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..errors import TransferError
from ..transfer_config import TransferConfig

CACHE_MODES = ("auto", "always", "never")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class DistillationConfig(TransferConfig):
    """TransferConfig, and what a teacher adds to it.

    Args:
        hard_weight: Weight of the task's own loss against the labels, from 0; 0 leaves it out, and needs no labels.
        teacher_cache: Whether the teacher's answers are computed once and read from disk: "always", "never", or
            "auto", which measures both and says what it chose.
        teacher_cache_dir: Where caches lie; by default beside those of the Hub, where later runs find them.
        teacher_cache_views: With random augmentation, how many augmented versions of each row are cached, from 1. The
            student sees version `epoch % views`.
        teacher_cache_top_k: Keep the k largest logits and the mass of the others; None keeps all.
        teacher_dtype: What the teacher computes in: "auto" (as its weights are), "float32", "bfloat16", "float16".
        teacher_compile: Whether to compile the teacher.
        teacher_quantize: Whether to run the teacher's linear layers in 8 bits; on CPUs.
        teacher_sharded: Whether each process holds a part of the teacher only; under FSDP.
        chunk_tokens: Causal language models: how many tokens have their logits at a time, from 1, so that those of a
            whole batch are never in memory; None takes all at once.
        baseline_score: Accuracy, in [0, 1], of the same student trained without a teacher: evaluations then say which
            share of the teacher's gain over it was recovered.

    Raises:
        TransferError: If a value is outside its range.
    """

    hard_weight: float = field(default=0.1, metadata={"help": "Weight of the loss against the labels; 0: none."})
    teacher_cache: str = field(default="auto", metadata={"help": f"One of {', '.join(CACHE_MODES)}."})
    teacher_cache_dir: str | None = field(default=None, metadata={"help": "Folder of the teachers' caches."})
    teacher_cache_views: int = field(default=4, metadata={"help": "Augmented versions of a row in the cache."})
    teacher_cache_top_k: int | None = field(default=None, metadata={"help": "Cache the k largest logits only."})
    teacher_dtype: str = field(default="auto", metadata={"help": f"One of {', '.join(DTYPES)}."})
    teacher_compile: bool = field(default=False, metadata={"help": "Compile the teacher."})
    teacher_quantize: bool = field(default=False, metadata={"help": "The teacher's linear layers in 8 bits (CPU)."})
    teacher_sharded: bool = field(default=False, metadata={"help": "Processes hold parts of the teacher (FSDP)."})
    chunk_tokens: int | None = field(default=None, metadata={"help": "Tokens whose logits are made at a time."})
    baseline_score: float | None = field(default=None, metadata={"help": "Accuracy of the student without a teacher."})

    def __post_init__(self) -> None:
        def check(name: str, fits: bool, valid: str) -> None:
            if getattr(self, name) is not None and not fits:
                raise TransferError(f"{name}={getattr(self, name)!r} is not valid: it must be {valid}.")

        check("hard_weight", 0 <= self.hard_weight < float("inf"), "a number from 0")
        check("teacher_cache", self.teacher_cache in CACHE_MODES, f"one of {', '.join(CACHE_MODES)}")
        check("teacher_dtype", self.teacher_dtype in DTYPES, f"one of {', '.join(DTYPES)}")
        for name in ("teacher_cache_views", "teacher_cache_top_k", "chunk_tokens"):
            check(name, (getattr(self, name) or 0) >= 1, "a whole number from 1")
        check("baseline_score", 0 <= (self.baseline_score or 0) <= 1, "in [0, 1]")
        super().__post_init__()
