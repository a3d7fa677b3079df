"""Where a transformer's block computes queries, keys and values, so that terms can read them from its projections.

What is read is the projections' output, before rotary positions and before heads are split.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from ..dissection.tree import is_under, join

SEPARATE = (
    ("query", "key", "value"),  # BERT, RoBERTa, ELECTRA, ALBERT
    ("q_proj", "k_proj", "v_proj"),  # ViT, DINOv2, BART, wav2vec2, Whisper, Llama
    ("q_lin", "k_lin", "v_lin"),  # DistilBERT, XLM
    ("query_proj", "key_proj", "value_proj"),  # DeBERTa-v2 and v3
    ("q", "k", "v"),  # MPNet, T5
)
FUSED = ("qkv", "Wqkv", "c_attn")  # timm, ModernBERT, GPT-2: all queries, then all keys, then all values
# Their fused output has query, key and value of one head side by side, which looks the same and is not.
_BY_HEAD = ("tiny_vit", "levit", "efficientformer", "maxxvit", "gpt_bigcode")
_CROSS = re.compile(r"cross|encoder_attn|EncDecAttention", re.IGNORECASE)
_HEADS = ("num_attention_heads", "num_heads", "n_heads")


@dataclass(frozen=True)
class Attention:
    """Module paths of one self-attention's projections; three times the same where one computes all.

    Attributes:
        heads: Attention heads, where the module says how many it has.
    """

    query: str
    key: str
    value: str
    heads: int | None

    @property
    def fused(self) -> bool:
        """Whether one module puts out all three."""
        return self.query == self.key


def attentions(modules: Mapping[str, nn.Module], within: Iterable[str]) -> list[Attention]:
    """The self-attentions whose projections can be told apart.

    Args:
        modules: By plain name.
        within: Module paths in which to look: those of a block.

    Returns:
        One entry a self-attention, in the order of registration; none of attention between sequences.
    """
    found = []
    places = tuple(within)
    for path, module in modules.items():
        if _CROSS.search(path) or not any(is_under(path, place) for place in places):
            continue
        kinds = [names for names in SEPARATE if all(join(path, name) in modules for name in names)]
        kinds += [(name, name, name) for name in FUSED if _in_thirds(module, modules.get(join(path, name)))]
        found += [Attention(join(path, q), join(path, k), join(path, v), _heads(module)) for q, k, v in kinds]
    return found


def _in_thirds(attention: nn.Module, projection: nn.Module | None) -> bool:
    """Whether a projection puts out queries, keys and values of equal width, one after another."""
    weight = getattr(projection, "weight", None)
    if weight is None or weight.ndim != 2 or max(weight.shape) != 3 * min(weight.shape):
        return False
    return type(attention).__module__.rpartition(".")[2].removeprefix("modeling_") not in _BY_HEAD


def _heads(attention: nn.Module) -> int | None:
    stated = (getattr(attention, name, None) for name in _HEADS)
    return next((heads for heads in stated if isinstance(heads, int)), None)
