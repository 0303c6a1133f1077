"""BERT with its two pre-training losses: transformers' BertForPreTraining from a configuration; nothing is fetched."""

# ruff: noqa: ARG002 - Lightning calls its hooks with all arguments

from __future__ import annotations

import os
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy
from transformers import BertConfig, BertForPreTraining

from bert_samples import IGNORED
from lightning_lamb import report_count

Batch = dict[str, Tensor]


class Predictions(NamedTuple):
    """What the two heads say about one micro-batch.

    Attributes:
        word_logits: (masked tokens, vocabulary).
        words: (masked tokens,) what was there.
        next_logits: (samples, 2).
        random_next: (samples,) 1 where the second segment is from elsewhere.
    """

    word_logits: Tensor
    words: Tensor
    next_logits: Tensor
    random_next: Tensor

    def losses(self) -> tuple[Tensor, Tensor]:
        """Masked-word loss, the mean over masked tokens, and next-sentence loss, the mean over samples; in nats."""
        return F.cross_entropy(self.word_logits.float(), self.words), F.cross_entropy(
            self.next_logits.float(), self.random_next
        )


class MaskedBert(BertForPreTraining):
    """BertForPreTraining whose word head sees masked positions only: a seventh of its work and memory."""

    def forward(self, batch: Batch) -> Predictions:  # type: ignore[override]
        """Runs both heads.

        Args:
            batch: ``input_ids``, ``token_type_ids``, ``attention_mask`` and ``labels``, (samples, sequence length)
                each, and ``next_sentence_label``, (samples,).
        """
        asked = batch["labels"] != IGNORED
        hidden, pooled = self.bert(
            input_ids=batch["input_ids"],
            token_type_ids=batch["token_type_ids"],
            attention_mask=batch["attention_mask"],
            return_dict=False,
        )[:2]
        word_logits, next_logits = self.cls(hidden[asked], pooled)
        return Predictions(word_logits, batch["labels"][asked], next_logits, batch["next_sentence_label"])


class BertPretraining(LightningModule):
    """Masked words and next sentences.

    The gradient of a window is the mean over its masked tokens (`lightning_lamb.report_count`); next-sentence losses
    are weighted the same way, by the masked tokens of their micro-batch.

    Args:
        vocabulary_size: Word pieces; at least those of the data.
        hidden_size: Width.
        layers: Transformer layers.
        heads: Attention heads per layer.
        intermediate_size: Width inside the feed-forward layers.
        max_sequence_length: Position embeddings; at least the data's sequence length.
        dropout: On hidden states and attention.
        checkpoint_activations: Recompute activations in the backward pass to save memory.
    """

    def __init__(
        self,
        vocabulary_size: int = 4096,
        hidden_size: int = 128,
        layers: int = 2,
        heads: int = 2,
        intermediate_size: int = 512,
        max_sequence_length: int = 128,
        dropout: float = 0.1,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.config = BertConfig(
            vocab_size=vocabulary_size,
            hidden_size=hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=intermediate_size,
            max_position_embeddings=max_sequence_length,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
        self.net: Any = None
        self.checkpoint_activations = checkpoint_activations
        self.val_losses = torch.nn.ModuleDict({"mlm": MeanMetric(), "nsp": MeanMetric()})
        self.train_mlm_accuracy = MulticlassAccuracy(vocabulary_size, average="micro")
        self.val_mlm_accuracy = MulticlassAccuracy(vocabulary_size, average="micro")

    def configure_model(self) -> None:
        """Builds the network once, and shards it if the strategy has a device mesh (FSDP2)."""
        if self.net is not None:
            return
        self.net = MaskedBert(self.config)
        self.net.train()  # transformers hands out models in evaluation mode
        if self.checkpoint_activations:
            self.net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if self.device_mesh is not None:
            mesh = self.device_mesh["data_parallel"]
            for layer in self.net.bert.encoder.layer:
                fully_shard(layer, mesh=mesh)
            fully_shard(self.net, mesh=mesh)

    def on_fit_start(self) -> None:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        check_fits(self.config, data)

    def forward(self, batch: Batch) -> Predictions:
        return self.net(batch)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        predictions = self(batch)
        mlm_loss, nsp_loss = predictions.losses()
        report_count(self, len(predictions.words))
        self.train_mlm_accuracy(predictions.word_logits, predictions.words)
        self.log("train_mlm_loss", mlm_loss, prog_bar=True)
        self.log("train_nsp_loss", nsp_loss)
        self.log("train_mlm_accuracy", self.train_mlm_accuracy)
        self.log("sequence_length", float(batch["input_ids"].shape[1]))
        return mlm_loss + nsp_loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        predictions = self(batch)
        counts = {"mlm": len(predictions.words), "nsp": len(predictions.random_next)}
        for (name, count), loss in zip(counts.items(), predictions.losses(), strict=True):
            self.val_losses[name].update(loss, weight=count)
            self.log(f"val_{name}_loss", self.val_losses[name], prog_bar=name == "mlm", on_epoch=True)
        self.val_mlm_accuracy.update(predictions.word_logits, predictions.words)
        self.log("val_mlm_accuracy", self.val_mlm_accuracy, on_epoch=True)

    def on_validation_epoch_end(self) -> None:
        # What the held-out loss must be below, beside it in the log.
        self.log("unigram_entropy", self.trainer.datamodule.unigram_entropy)  # type: ignore[attr-defined]


def check_fits(config: BertConfig, data: Any) -> None:
    """Refuses data that the model cannot take, before the first step.

    Raises:
        ValueError: more word pieces than embeddings, or a longer sequence than positions.
    """
    if data.pieces.size > config.vocab_size:
        raise ValueError(
            f"model.vocabulary_size={config.vocab_size}, but the data has {data.pieces.size} word pieces: give the "
            "model at least as many, or lower data.vocabulary_size."
        )
    if data.sequence_length > config.max_position_embeddings:
        raise ValueError(
            f"sequence_length={data.sequence_length} is more than model.max_sequence_length="
            f"{config.max_position_embeddings}: raise the latter, or shorten the sequences of the stage."
        )
