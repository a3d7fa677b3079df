"""A bidirectional LSTM that classifies texts, as a model of transformers: it saves, loads and pushes like any other.

A saved folder holds a copy of this file, so that it loads without this package:
`AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)`. Nothing here may therefore import
anything of this package at module level. Where `hf_transfer` is imported, no `trust_remote_code` is needed.

The student of Tang et al. 2019, arXiv:1903.12136: one bidirectional layer, a dense layer with ReLU, a classifier. They
read the text off the last states; here it is the maximum and the mean over its tokens (Conneau et al. 2017,
arXiv:1705.02364), and words are the pieces of the teacher's tokenizer. `hf_transfer.distillation.student` makes one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import SequenceClassifierOutput


class BiLstmConfig(PreTrainedConfig):
    """Configuration of a bidirectional LSTM.

    Args:
        vocab_size: Words of the tokenizer, at least 1.
        embedding_size: Width of a word's vector, at least 1.
        hidden_size: Width of each layer's output, both directions together: even, at least 2.
        num_hidden_layers: Layers, at least 1.
        classifier_size: Width of the dense layer before the classifier, at least 1.
        dropout: On word vectors, between layers and before both layers of the head, in [0, 1).
        initializer_range: Standard deviation of new word vectors, > 0.
        pad_token_id: The tokenizer's padding token; the attention mask says what is padding, not this.
    """

    model_type = "bilstm_classifier"

    vocab_size: int = 30522
    embedding_size: int = 300
    hidden_size: int = 300
    num_hidden_layers: int = 1
    classifier_size: int = 200
    dropout: float = 0.3
    initializer_range: float = 0.1
    pad_token_id: int | None = None


class BiLstmLayer(nn.Module):
    """One bidirectional layer: each direction reads a text from its own first token to its own last."""

    def __init__(self, input_size: int, hidden_size: int):
        super().__init__()
        self.lstm = nn.LSTM(input_size, hidden_size // 2, batch_first=True, bidirectional=True)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Runs the layer.

        Args:
            x: (B, T, D), each row's tokens first, then padding.
            lengths: (B,), tokens in each row, at least 1, on the CPU.

        Returns:
            (B, T, H), zero at padding.
        """
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=x.shape[1])[0]


class BiLstmEncoder(nn.Module):
    """Word vectors and layers."""

    def __init__(self, config: BiLstmConfig):
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.embedding_size)
        sizes = [config.embedding_size, *[config.hidden_size] * (config.num_hidden_layers - 1)]
        self.layers = nn.ModuleList(BiLstmLayer(size, config.hidden_size) for size in sizes)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, input_ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """(B, T) tokens, each row's first, to (B, T, H)."""
        x = self.embeddings(input_ids)  # (B, T, E)
        for layer in self.layers:
            x = layer(self.dropout(x), lengths)  # (B, T, H)
        return x


class BiLstmForSequenceClassification(PreTrainedModel):
    """A bidirectional LSTM, maximum and mean over the tokens, a dense layer with ReLU, a classifier."""

    config_class = BiLstmConfig
    base_model_prefix = "bilstm"
    accepts_loss_kwargs = False

    def __init__(self, config: BiLstmConfig):
        super().__init__(config)
        if config.hidden_size % 2:
            raise ValueError(f"hidden_size={config.hidden_size} must be even: each direction gives half of it.")
        self.bilstm = BiLstmEncoder(config)
        self.dropout = nn.Dropout(config.dropout)
        self.dense = nn.Linear(2 * config.hidden_size, config.classifier_size)
        outputs: Any = config.num_labels
        self.classifier = nn.Linear(config.classifier_size, outputs)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The word vectors."""
        return self.bilstm.embeddings

    def set_input_embeddings(self, value: Any) -> None:
        """Replaces the word vectors."""
        self.bilstm.embeddings = value

    def _init_weights(self, module: nn.Module) -> None:
        """New layers start as torch starts them, but for word vectors: torch's N(0, 1) would saturate the gates."""
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, (nn.Linear, nn.LSTM)):
            module.reset_parameters()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput | tuple[torch.Tensor, ...]:
        """Classifies texts.

        Args:
            input_ids: Tokens, (B, T).
            attention_mask: 1 for a token, 0 for padding, which may lie on either side, (B, T); all tokens by default.
            labels: Class indices, (B,), or float targets for regression.
            return_dict: False for a tuple.
            **kwargs: Ignored.

        Returns:
            logits (B, num_labels), and the loss where labels are given.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        first = mask.bool().int().argsort(dim=1, descending=True, stable=True)  # (B, T): tokens in order, then padding
        lengths = mask.bool().sum(dim=1).clamp(min=1)  # (B,): an empty text is read as one padding token
        x = self.bilstm(input_ids.gather(1, first), lengths.cpu())  # (B, T, H)
        logits = self.classifier(self.dropout(torch.relu(self.dense(self.dropout(_pooled(x, lengths))))))
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def _pooled(x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Maximum and mean over the tokens of each row: (B, T, H) to (B, 2 H)."""
    inside = (torch.arange(x.shape[1], device=x.device) < lengths[:, None])[..., None]  # (B, T, 1)
    maximum = x.masked_fill(~inside, -torch.inf).amax(dim=1)  # (B, H)
    return torch.cat([maximum, x.sum(dim=1) / lengths[:, None]], dim=-1)  # padding is zero in the sum


AutoConfig.register(BiLstmConfig.model_type, BiLstmConfig, exist_ok=True)
AutoModelForSequenceClassification.register(BiLstmConfig, BiLstmForSequenceClassification, exist_ok=True)
BiLstmConfig.register_for_auto_class()
BiLstmForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
