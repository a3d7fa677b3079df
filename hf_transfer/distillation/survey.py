"""What one network's layers put out for one small batch: names, shapes, stages, embeddings, attention."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ..anatomy import Taps, plain_model
from ..dissection.tree import ModuleTree, is_under
from ..errors import TransferError
from ..objective import logits_of, match_rows, model_inputs
from ..objectives._layers import FEATURES
from .attention_modules import FUSED, SEPARATE, Attention, attentions
from .bridge import MAIN_INPUTS

if TYPE_CHECKING:
    from ..backbones import Backbone

LAST = "last"
ROWS = 4  # of the batch that is looked at


class Survey:
    """The layers of one of the two networks.

    Args:
        who: For messages.
        backbone: Its model and anatomy.

    Attributes:
        blocks: Module paths of the blocks, input to output.
        inputs: What the network was given; empty before `run`.
        logits: What it said of that.
        values: Layer -> what it put out, in the order in which the layers finish.
    """

    def __init__(self, who: Literal["student", "teacher"], backbone: Backbone) -> None:
        self.who, self.backbone = who, backbone
        self.anatomy = backbone.anatomy
        self.blocks = [block.name for block in self.anatomy.blocks]
        self.modules = ModuleTree(plain_model(backbone.model)).modules
        self.inputs: dict[str, Any] = {}
        self.logits = torch.empty(0)
        self.values: dict[str, Tensor] = {}
        self._embedding: str | None = None

    # ---- words ------------------------------------------------------------------------------------------------------

    def layer(self, word: Any) -> str:
        """The layer that a word names.

        Args:
            word: "last", "features", a module's path, a block's index, or a depth in [0, 1].

        Returns:
            A module path, or "features".

        Raises:
            TransferError: If there is none.
        """
        if word == FEATURES:
            return FEATURES
        if isinstance(word, str) and word != LAST:
            if word in self.modules and word:
                return word
            close = get_close_matches(word, self.modules, n=3, cutoff=0.4)
            raise self._unknown(word, f" Close to it: {close}." if close else "")
        depth = len(self.blocks)
        if not depth:
            raise TransferError(f"The {self.who} has no blocks to take layers={word!r} from; name a module's path.")
        if word == LAST:
            return self.blocks[-1]
        if isinstance(word, int) and not isinstance(word, bool) and -depth <= word < depth:
            return self.blocks[word]
        if isinstance(word, float) and 0 <= word <= 1:
            return self.at_depth(word)
        raise self._unknown(word)

    def at_depth(self, depth: float) -> str:
        """The block that ends at a share of the network's depth; the first one where none does."""
        return self.blocks[max(1, math.floor(depth * len(self.blocks) + 0.5)) - 1]

    def _unknown(self, word: object, close: str = "") -> TransferError:
        depth = len(self.blocks)
        return TransferError(
            f"The {self.who} has no layer {word!r}.{close} Valid: the path of a module, as of its {depth} blocks "
            f"{_shortened(self.blocks)}; a block's index, an integer in [{-depth}, {depth - 1}]; a depth, a float in "
            "[0.0, 1.0]; 'last' or 'features'. For the whole network: 'uniform' or 'stages'."
        )

    def attention(self, layer: str) -> Attention:
        """The self-attention in a layer.

        Raises:
            TransferError: If there is none whose queries, keys and values can be read, or several.
        """
        found = attentions(self.modules, self._places(layer))
        if len(found) == 1:
            return found[0]
        if found:
            raise TransferError(
                f"The {self.who}'s '{layer}' has {len(found)} self-attentions, at {[each.query for each in found]}: "
                "name the path of one of them."
            )
        linears = [path for path in self.modules if self._is_linear(path) and self._within(path, layer)]
        raise TransferError(
            f"No queries, keys and values can be read in the {self.who}'s '{layer}'. They are the outputs of linear "
            f"layers named as in {[*map('/'.join, SEPARATE)]}, or of one named in {[*FUSED]} that puts out all "
            f"queries, then all keys, then all values; it has {_shortened(linears)}. Use a term on hidden states."
        )

    def projections(self, layer: str) -> list[str]:
        """Paths of the projections in a layer, none where they cannot be told."""
        found = attentions(self.modules, self._places(layer))
        return [path for each in found for path in (each.query, each.key, each.value)]

    def _places(self, layer: str) -> tuple[str, ...]:
        """The module paths of a block, or the layer itself."""
        return next((block.prefixes for block in self.anatomy.blocks if block.name == layer), (layer,))

    def _within(self, path: str, layer: str) -> bool:
        return any(is_under(path, place) for place in self._places(layer))

    def _is_linear(self, path: str) -> bool:
        weight = getattr(self.modules[path], "weight", None)
        return isinstance(weight, Tensor) and weight.ndim == 2

    # ---- values -----------------------------------------------------------------------------------------------------

    def run(self, batch: Mapping[str, Any], layers: Sequence[str], *, embedding: bool = False) -> None:
        """Runs the network once on the batch's first rows and keeps what these layers put out.

        It runs in eval mode and without gradients; every module's mode is as before afterwards.

        Args:
            batch: Collated, for this network.
            layers: Module paths, besides the blocks.
            embedding: Whether `embedding` will be asked for.
        """
        model: Any = self.backbone.model
        stem = [path for path in self.modules if path and self.anatomy.group(path) == 0] if embedding else []
        names = dict.fromkeys([*self.blocks, *layers, *stem])
        with (
            _at_rest(model),
            Taps(model, list(names)) as outputs,
            Taps(model, self.blocks[:1] if embedding else [], inputs=True) as first,
            Taps(model, self.anatomy.classifiers[:1], inputs=True) as features,
        ):
            self.inputs = self._first_rows(batch)
            self.logits = logits_of(self._call(self.inputs)).float()
        self.values = dict(outputs.values)
        for value in features.values.values():
            self.values[FEATURES] = match_rows(value, self.logits, self.inputs.get("attention_mask"))
        for value in first.values.values():
            self._embedding = next((path for path in stem if _equal(self.values.get(path), value)), None)

    def _first_rows(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The first rows of what the network takes, on its device and in its dtype."""
        parameter = next(p for p in self.backbone.model.parameters() if p.is_floating_point())
        inputs = model_inputs(batch)
        rows = next(len(value) for value in inputs.values() if torch.is_tensor(value) and value.dim())
        for name, value in inputs.items():
            if torch.is_tensor(value):
                cut = value[:ROWS] if value.dim() and len(value) == rows else value
                inputs[name] = cut.to(parameter.device, parameter.dtype if cut.is_floating_point() else None)
        return inputs

    def _call(self, inputs: dict[str, Any]) -> Any:
        model: Any = self.backbone.model
        takes = inspect.signature(plain_model(model).forward).parameters
        main = MAIN_INPUTS[self.backbone.modality]
        if not any(name in takes for name in main):  # a plain network
            return model(next(inputs[name] for name in main if name in inputs))
        return model(**inputs)

    def value(self, layer: str) -> Tensor:
        """What a layer put out.

        Raises:
            TransferError: If nothing that belongs to the batch's rows.
        """
        if layer not in self.values:
            raise TransferError(
                f"The {self.who}'s '{layer}' puts out nothing that could be read: the network does not call it as a "
                "module, or it returns no tensor. Name another layer."
            )
        value = self.values[layer]
        if value.dim() not in (2, 3, 4) or len(value) != len(self.logits):
            raise TransferError(
                f"The {self.who}'s '{layer}' puts out {tuple(value.shape)} for {len(self.logits)} examples; terms "
                "compare (N, C, H, W), (N, T, D) or (N, D), a row for each example (not one for each window of an "
                "image). Name another layer."
            )
        return value

    def stages(self) -> list[str]:
        """The blocks after which the number of positions changes, and the last one; of blocks that have positions."""
        sizes = {name: self.values[name].shape for name in self.blocks if name in self.values}
        places = {name: math.prod(_positions(shape)) for name, shape in sizes.items() if len(shape) > 2}
        names = list(places)
        if not names:
            raise TransferError(f"The {self.who}'s blocks put out vectors: it has no stages. Use 'last' or 'uniform'.")
        changes = [a for a, b in pairwise(names) if places[a] != places[b]]
        return [*changes, names[-1]]

    @property
    def embedding(self) -> str:
        """The module before the blocks whose output the first block takes.

        Raises:
            TransferError: If there is none.
        """
        if self._embedding is None:
            raise TransferError(
                f"The {self.who} has no module whose output is what its first block takes, so its embeddings cannot "
                "be read. Use a term on hidden states."
            )
        return self._embedding


@contextmanager
def _at_rest(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients; on exit every module's mode is as before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _positions(shape: Sequence[int]) -> Sequence[int]:
    """(H, W) of (N, C, H, W); (T,) of (N, T, D)."""
    return shape[2:] if len(shape) == 4 else shape[1:2]


def _equal(a: Tensor | None, b: Tensor) -> bool:
    return a is not None and a.shape == b.shape and torch.equal(a, b)


def _shortened(names: Sequence[str]) -> list[str]:
    return [*names[:2], "...", *names[-1:]] if len(names) > 4 else list(names)
