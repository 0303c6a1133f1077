"""A WordPiece vocabulary made from the corpus itself, kept beside the run."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from bert_corpus import Document

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PAD, UNKNOWN, CLS, SEP, MASK = range(len(SPECIAL))

Tokens = NDArray[np.int32]


@dataclasses.dataclass(frozen=True)
class WordPieces:
    """A trained vocabulary.

    Attributes:
        tokenizer: turns text into ids; its special tokens are the first five.
        size: of the vocabulary.
        continues_word: (size,) booleans: pieces that do not begin a word.
    """

    tokenizer: Tokenizer
    size: int
    continues_word: NDArray[np.bool_]

    def sentences(self, documents: Iterable[Document]) -> list[list[Tokens]]:
        """The ids of every sentence of every document; sentences without any are left out."""
        encoded = []
        for document in documents:
            batch = self.tokenizer.encode_batch(document, add_special_tokens=False)
            encoded.append([np.array(sentence.ids, np.int32) for sentence in batch if sentence.ids])
        return [document for document in encoded if document]


def train_or_load(documents: list[Document], vocabulary_size: int, folder: str) -> WordPieces:
    """Trains a lower-casing WordPiece vocabulary, or loads the one trained before on the same text.

    Args:
        documents: to train on.
        vocabulary_size: at most this many pieces, special tokens included.
        folder: where it is kept; made if it is not there. Processes that start at once may all write it.
    """
    content = hashlib.sha256()
    for document in documents:
        content.update("\n".join(document).encode())
    path = Path(folder) / f"wordpiece-{vocabulary_size}-{content.hexdigest()[:12]}.json"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        _trained(documents, vocabulary_size).save(str(partial))
        partial.replace(path)
    tokenizer = Tokenizer.from_file(str(path))
    pieces = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return WordPieces(tokenizer, len(pieces), np.array([piece.startswith("##") for piece, _ in pieces]))


def _trained(documents: list[Document], vocabulary_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary_size, special_tokens=list(SPECIAL), continuing_subword_prefix="##", show_progress=False
    )
    tokenizer.train_from_iterator((sentence for document in documents for sentence in document), trainer)
    return tokenizer


def unigram_entropy(documents: list[list[Tokens]]) -> float:
    """Entropy in nats of the distribution of single tokens: what a model reaches that looks at no context."""
    counts = np.bincount(np.concatenate([sentence for document in documents for sentence in document]))
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())
