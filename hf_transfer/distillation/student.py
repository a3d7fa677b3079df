"""Students made from their teacher: some of its blocks, its twin with fresh weights, a BiLSTM that reads its tokens.

student = carve(teacher, layers=3)              # text, audio, vision: 3 blocks, evenly spaced, first and last kept
student = carve(teacher, layers=[0, 2, 5])      # these
student = born_again(teacher)
student = bilstm_student(teacher, hidden_size=300)

Any other network is a student too: `load_backbone(name, labels=teacher.labels)`. For a LoRA student whose teacher is
its own base, no second network is needed: `distillation.teacher.AdapterOffTeacher`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .._torchvision import make_torchvision_importable
from ..adapters import is_adapted
from ..anatomy import plain_model
from ..backbones import Backbone
from ..errors import TransferError

logger = logging.getLogger(__name__)


def carve(teacher: Backbone | nn.Module, layers: int | Sequence[int]) -> Backbone:
    """A smaller student out of its teacher's own layers, as DistilBERT begins (Sanh et al. 2019, arXiv:1910.01108).

    Takes encoders and decoders of transformers for text, audio and images, those with stages or two sides included,
    and timm's networks whose depth is an argument (ViT and its kin, ResNet, ConvNeXt, ...). Embeddings, norms, head,
    processor and labels come along. The student saves and loads like any other network of its architecture.

    Args:
        teacher: A Backbone, or a network of transformers or timm. It stays as it is and shares no memory.
        layers: How many blocks to keep, evenly spaced with the first and the last among them, in proportion by stages
            (nearby ones where a network gives blocks their kind by place, as Swin its shifted windows); or which,
            ascending, by their index in `teacher.anatomy.blocks` (negative from the end).

    Returns:
        The student in eval mode, with the teacher's weights; every parameter trains.

    Raises:
        TransferError: The choice is out of range, the teacher has adapters, or its network cannot be cut so, and why:
            each carved network is checked to be the chosen blocks, by names, shapes and settings of every module.
    """
    from . import carving

    backbone = _backbone(teacher, "carve")
    model: Any = plain_model(backbone.model)
    student, cut = carving.carved(model, layers)
    sizes = [sum(p.numel() for p in each.parameters()) / 1e6 for each in (student, model)]
    kept = ", ".join(f"{chain.lists[0]} {list(each)}" for chain, each in zip(cut.chains, cut.kept, strict=True))
    logger.info("The student has the teacher's blocks %s: %.1f M of %.1f M parameters.", kept, *sizes)
    return _student(backbone, student)


def born_again(teacher: Backbone | nn.Module) -> Backbone:
    """The teacher's twin with fresh weights, which learns from it. Furlanello et al. 2018, arXiv:1805.04770.

    Args:
        teacher: A Backbone, or a network of transformers or timm. It stays as it is.

    Returns:
        A network of the same architecture, image size and labels in eval mode, its weights drawn from torch's global
        generator: `transformers.set_seed` before makes them repeatable.

    Raises:
        TransferError: The teacher has adapters, or is not of transformers or timm.
    """
    from . import carving

    backbone = _backbone(teacher, "born_again")
    model: Any = plain_model(backbone.model)
    if model.config.model_type == "timm_wrapper":
        arguments = model.config.model_args or {}
        student = carving.wrapped_timm(model, carving.timm_network(model, arguments), arguments)
    else:
        student = carving.rebuilt(model, type(model.config).from_dict(model.config.to_dict()))
    return _student(backbone, student.to(model.device).eval())


def bilstm_student(
    teacher: Backbone | nn.Module,
    *,
    hidden_size: int = 300,
    layers: int = 1,
    embedding_size: int | None = None,
    dropout: float = 0.3,
    teacher_embeddings: bool = True,
) -> Backbone:
    """A bidirectional LSTM over the teacher's tokenizer. Tang et al. 2019, arXiv:1903.12136; see `hf_transfer.bilstm`.

    Word vectors begin as the teacher's input embeddings, centred and turned onto their first `embedding_size`
    principal components, which keeps distances between words as well as so few dimensions can; one factor brings them
    to the spread that random ones would have. Tang et al. begin with word2vec. They train on like all else.

    Args:
        teacher: A text classifier or regressor with its tokenizer.
        hidden_size: Width of each layer's output, both directions together: even, at least 2.
        layers: Number of layers, at least 1.
        embedding_size: Width of a word's vector; at most that of the teacher's where they come from it. By default
            300, or the teacher's if that is less.
        dropout: In [0, 1).
        teacher_embeddings: Whether word vectors begin as the teacher's; else at random.

    Returns:
        The student in eval mode, with the teacher's tokenizer, labels and dtype float32.

    Raises:
        TransferError: The teacher is not for texts, has no tokenizer, or a size is out of range.
    """
    backbone = _backbone(teacher, "bilstm_student")
    from transformers import AutoConfig

    from ..bilstm import BiLstmConfig, BiLstmForSequenceClassification

    model: Any = plain_model(backbone.model)
    if backbone.modality != "text" or backbone.task not in ("text-classification", "regression"):
        raise TransferError(
            f"bilstm_student makes classifiers and regressors of texts; the teacher is for {backbone.task} of "
            f"{backbone.modality}. carve() makes smaller students of any task."
        )
    if backbone.processor is None:
        raise TransferError(
            f"The teacher {backbone.name!r} has no tokenizer, which the student reads by: give it one."
        )
    words: Tensor = model.get_input_embeddings().weight.detach()  # (V, D)
    widest = words.shape[1] if teacher_embeddings else None
    embedding_size = min(300, words.shape[1]) if embedding_size is None else embedding_size
    _check_sizes(hidden_size, layers, embedding_size, dropout, widest)
    config: Any = AutoConfig.for_model(
        BiLstmConfig.model_type,
        vocab_size=words.shape[0],
        embedding_size=embedding_size,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        dropout=dropout,
        pad_token_id=backbone.processor.pad_token_id,
        num_labels=model.config.num_labels,
        problem_type=model.config.problem_type,
    )
    config.id2label, config.label2id = dict(model.config.id2label), dict(model.config.label2id)
    student: Any = BiLstmForSequenceClassification(config)
    if teacher_embeddings:
        with torch.no_grad():
            student.bilstm.embeddings.weight.copy_(principal(words, embedding_size) * config.initializer_range)
    return _student(backbone, student.to(model.device).eval())


def principal(words: Tensor, size: int) -> Tensor:
    """Word vectors on their first principal components, centred, with a mean square of 1.

    Args:
        words: (V, D).
        size: Components, in [1, D].

    Returns:
        (V, size), float32. Signs of components are fixed: the largest loading of each is positive.
    """
    x = words.double()
    x = x - x.mean(dim=0)
    _, axes = torch.linalg.eigh(x.T @ x)  # (D, D), columns by rising variance
    axes = axes.flip(1)[:, :size]  # (D, size)
    largest = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True))  # (1, size)
    x = x @ (axes * largest.sign())
    return (x / x.square().mean().sqrt()).float()


def _check_sizes(hidden_size: int, layers: int, embedding_size: int, dropout: float, widest: int | None) -> None:
    for name, value in (("hidden_size", hidden_size), ("layers", layers), ("embedding_size", embedding_size)):
        if not isinstance(value, int) or value < 1:
            raise TransferError(f"{name}={value!r} must be a whole number, at least 1.")
    if hidden_size % 2:
        raise TransferError(f"hidden_size={hidden_size} must be even: each direction gives half of it.")
    if not 0 <= dropout < 1:
        raise TransferError(f"dropout={dropout!r} must be in [0, 1).")
    if widest is not None and embedding_size > widest:
        raise TransferError(
            f"embedding_size={embedding_size} is more than the {widest} of the teacher's input embeddings. Take at "
            "most that, or teacher_embeddings=False for random word vectors."
        )


def _backbone(teacher: Backbone | nn.Module, who: str) -> Backbone:
    """A Backbone of a network of transformers or timm, without adapters."""
    make_torchvision_importable()
    from transformers import PreTrainedModel

    if not isinstance(teacher, Backbone):
        from .teacher import backbone_of

        teacher = backbone_of(teacher, None)
    if is_adapted(teacher.model):
        raise TransferError(
            f"{who}() takes no adapters: fold them into the network first, by "
            "`teacher.model = hf_transfer.tuning.merge(teacher.model)`."
        )
    if not isinstance(plain_model(teacher.model), PreTrainedModel):
        raise TransferError(
            f"{who}() takes networks of transformers and timm as load_backbone() gives them, not a "
            f"{type(teacher.model).__name__}."
        )
    return teacher


def _student(teacher: Backbone, model: Any) -> Backbone:
    """The student with everything that is the teacher's."""
    labels = None if teacher.labels is None else list(teacher.labels)
    data_config = None if teacher.data_config is None else dict(teacher.data_config)
    return replace(teacher, model=model, labels=labels, data_config=data_config)
