"""The data module of BERT pre-training: one corpus, at whatever sequence length the stage asks for."""

# ruff: noqa: ARG002 - Lightning calls its hooks with all arguments

from __future__ import annotations

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Subset

from bert_corpus import Corpus, corpus_of
from bert_samples import MaskedPairs, make_pairs
from bert_stream import SampleStream
from bert_wordpiece import Tokens, WordPieces, train_or_load, unigram_entropy


class BertData(LightningDataModule):
    """Sentence pairs with masked words, from any text.

    ``sequence_length`` and ``batch_size`` may be set between the stages of a training; loaders made afterwards follow.

    Args:
        text: A text file, or a directory of .txt files; paragraphs are separated by a blank line, documents by two.
            None: the language reference and documentation strings that come with Python.
        batch_size: Samples per micro-batch and rank.
        sequence_length: Tokens per sample.
        vocabulary_size: Word pieces, at most.
        whole_word: Mask all pieces of a word together.
        static_masks: How many masks a sample has, used in turn (BERT: 10). None: a new one in every pass.
        steps_per_epoch: Optimizer steps from one validation to the next; None: a pass over the data. Make the stages'
            steps multiples of it, so that each ends with a validation.
        seed: Of pairs, masks and order.
        num_workers: Processes that prepare samples.
        cache: Folder that keeps the vocabulary.
    """

    def __init__(
        self,
        text: str | None = None,
        batch_size: int = 32,
        sequence_length: int = 128,
        vocabulary_size: int = 4096,
        whole_word: bool = False,
        static_masks: int | None = None,
        steps_per_epoch: int | None = None,
        seed: int = 0,
        num_workers: int = 0,
        cache: str = "runs/bert",
    ) -> None:
        super().__init__()
        self.text = text
        self.batch_size = batch_size
        self.sequence_length = sequence_length
        self.vocabulary_size = vocabulary_size
        self.whole_word = whole_word
        self.static_masks = static_masks
        self.steps_per_epoch = steps_per_epoch
        self.seed = seed
        self.num_workers = num_workers
        self.cache = cache
        self.corpus: Corpus | None = None
        self.unigram_entropy = float("nan")
        """Of the training text, in nats: the loss of a model that looks at no context."""

    def setup(self, stage: str) -> None:
        if self.corpus is None:
            self.corpus = corpus_of(self.text)
            self.pieces: WordPieces = train_or_load(self.corpus.train, self.vocabulary_size, self.cache)
            self.train_sentences = self.pieces.sentences(self.corpus.train)
            self.held_out_sentences = self.pieces.sentences(self.corpus.held_out)
            self.unigram_entropy = unigram_entropy(self.train_sentences)

    def train_dataloader(self) -> SampleStream:
        samples = self._samples(self.train_sentences, self.static_masks)
        ranks = (self.trainer.distributed_sampler_kwargs if self.trainer else None) or {"num_replicas": 1, "rank": 0}
        accumulation = self.trainer.accumulate_grad_batches if self.trainer else 1
        per_step = self.batch_size * ranks["num_replicas"] * accumulation
        steps = self.steps_per_epoch or max(1, len(samples) // per_step)
        return SampleStream(
            samples,
            self.batch_size,
            steps * accumulation,
            rank=ranks["rank"],
            ranks=ranks["num_replicas"],
            seed=self.seed,
            num_workers=self.num_workers,
        )

    def val_dataloader(self) -> DataLoader:
        # Every sample has one mask, the same in every validation.
        samples = self._samples(self.held_out_sentences, static_masks=1)
        first_pass = Subset(samples, [(0, index) for index in range(len(samples))])  # type: ignore[arg-type]
        return DataLoader(first_pass, self.batch_size, num_workers=self.num_workers)

    def _samples(self, sentences: list[list[Tokens]], static_masks: int | None) -> MaskedPairs:
        pairs = make_pairs(sentences, self.sequence_length, self.seed)
        return MaskedPairs(pairs, self.pieces, self.seed, self.whole_word, static_masks)
