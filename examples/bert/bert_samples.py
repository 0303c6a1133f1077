"""Sentence pairs and masked words: BERT's two tasks, every sample a function of (seed, pass, index)."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from bert_wordpiece import CLS, MASK, PAD, SEP, SPECIAL, Tokens, WordPieces

IGNORED = -100
MASKED_SHARE = 0.15
SHORT_SHARE = 0.1

Key = tuple[int, int]
"""Which pass over the data, and which sample in it."""


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Two runs of sentences per sample, packed as [CLS] first [SEP] second [SEP].

    Attributes:
        tokens: (samples, sequence length), padded at the end.
        first_lengths: (samples,) tokens of the first segment with its [CLS] and [SEP].
        lengths: (samples,) tokens without padding.
        random_next: (samples,) 1 where the second segment is from another document, else 0.
    """

    tokens: Tokens
    first_lengths: Tokens
    lengths: Tokens
    random_next: Tokens


def make_pairs(documents: list[list[Tokens]], sequence_length: int, seed: int) -> Pairs:
    """Cuts documents into sentence pairs as BERT's create_pretraining_data.py does.

    Half of the second segments are what follows the first, the other half is from a random document. One sample in ten
    is shorter than it could be. Sentences of more than half a sequence are cut instead of losing their ends.

    Args:
        documents: tokens of their sentences.
        sequence_length: tokens per sample, at least 8.
        seed: of all choices.
    """
    random = np.random.default_rng((seed, sequence_length))
    room = sequence_length - 3
    cut = [[part for sentence in document for part in _parts(sentence, room // 2)] for document in documents]
    pairs = []
    for index in range(len(cut)):
        pairs += _pairs_of_document(cut, index, room, random)
    tokens = np.full((len(pairs), sequence_length), PAD, np.int32)
    first_lengths, lengths, random_next = (np.empty(len(pairs), np.int32) for _ in range(3))
    for row, (first, second, is_random) in enumerate(pairs):
        packed = np.concatenate([[CLS], first, [SEP], second, [SEP]])
        tokens[row, : len(packed)] = packed
        first_lengths[row], lengths[row], random_next[row] = len(first) + 2, len(packed), is_random
    return Pairs(tokens, first_lengths, lengths, random_next)


def _parts(sentence: Tokens, longest: int) -> list[Tokens]:
    return [sentence[start : start + longest] for start in range(0, len(sentence), longest)]


def _pairs_of_document(
    documents: list[list[Tokens]], index: int, room: int, random: np.random.Generator
) -> list[tuple[Tokens, Tokens, bool]]:
    """The pairs whose first segment is from one document; each at most ``room`` tokens."""
    document, pairs, start = documents[index], [], 0
    while start < len(document):
        wanted = room if random.random() >= SHORT_SHARE else int(random.integers(4, room + 1))
        end, size = start, 0
        while end < len(document) and (size == 0 or size + len(document[end]) <= wanted):
            size += len(document[end])
            end += 1
        sentences = document[start:end]
        split = int(random.integers(1, len(sentences))) if len(sentences) > 1 else 1
        first = np.concatenate(sentences[:split])
        is_random = len(documents) > 1 and (len(sentences) == 1 or random.random() < 0.5)
        if is_random:
            other = (index + 1 + int(random.integers(len(documents) - 1))) % len(documents)
            second = _from_elsewhere(documents[other], room - len(first), random)
            start += split  # the rest begins the next pair, as in BERT
        elif len(sentences) > 1:
            second = np.concatenate(sentences[split:])
            start = end
        else:
            break  # a single sentence in a single document has nothing that could follow it
        pairs.append((first, second, is_random))
    return pairs


def _from_elsewhere(document: list[Tokens], room: int, random: np.random.Generator) -> Tokens:
    begin = int(random.integers(len(document)))
    return np.concatenate(document[begin : begin + room])[:room]  # a sentence has at least one token


class MaskedPairs(Dataset[dict[str, Tensor]]):
    """Samples with masked words, addressed by (pass, index).

    Args:
        pairs: what to mask.
        pieces: the vocabulary.
        seed: of the masks.
        whole_word: mask all pieces of a word together.
        static_masks: how many masks a sample has, used in turn from pass to pass (BERT: 10). None: a new one each pass.
    """

    def __init__(
        self, pairs: Pairs, pieces: WordPieces, seed: int, whole_word: bool = False, static_masks: int | None = None
    ) -> None:
        self.pairs = pairs
        self.pieces = pieces
        self.seed = seed
        self.whole_word = whole_word
        self.static_masks = static_masks

    def __len__(self) -> int:
        return len(self.pairs.tokens)

    def __getitem__(self, key: Key) -> dict[str, Tensor]:
        """One sample.

        Returns:
            ``input_ids``, ``token_type_ids``, ``attention_mask`` and ``labels`` (-100 where nothing is asked), each
            (sequence length,), and ``next_sentence_label``, a number.
        """
        pass_index, index = key
        tokens = self.pairs.tokens[index].astype(np.int64)
        mask = pass_index if self.static_masks is None else pass_index % self.static_masks
        labels = self._mask(tokens, np.random.default_rng((self.seed, mask, index)))
        positions = np.arange(len(tokens))
        length, first = self.pairs.lengths[index], self.pairs.first_lengths[index]
        return {
            "input_ids": torch.from_numpy(tokens),
            "token_type_ids": torch.from_numpy(((positions >= first) & (positions < length)).astype(np.int64)),
            "attention_mask": torch.from_numpy((positions < length).astype(np.int64)),
            "labels": torch.from_numpy(labels),
            "next_sentence_label": torch.tensor(int(self.pairs.random_next[index])),
        }

    def _mask(self, tokens: NDArray[np.int64], random: np.random.Generator) -> NDArray[np.int64]:
        """Hides 15 % of the tokens, in place: 80 % as [MASK], 10 % as a random token, 10 % as they are.

        Returns:
            The labels.
        """
        candidates = np.flatnonzero(tokens >= len(SPECIAL))
        wanted = max(1, round(MASKED_SHARE * len(candidates)))
        if self.whole_word:
            begins = ~self.pieces.continues_word[tokens[candidates]]
            words = np.cumsum(begins)
            order = random.permutation(np.unique(words))
            sizes = np.bincount(words)[order]
            # Words in random order as long as they fit; the first always, also if it alone is too long.
            fitting = np.cumsum(sizes) <= wanted
            fitting[0] = True
            chosen = candidates[np.isin(words, order[fitting])]
        else:
            chosen = random.permutation(candidates)[:wanted]
        labels = np.full_like(tokens, IGNORED)
        labels[chosen] = tokens[chosen]
        fate = random.random(len(chosen))
        tokens[chosen[fate < 0.8]] = MASK
        swapped = chosen[fate >= 0.9]
        tokens[swapped] = random.integers(len(SPECIAL), self.pieces.size, len(swapped))
        return labels
