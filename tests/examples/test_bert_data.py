"""The BERT example's data: what is held out, masked, paired and streamed."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from example_scripts import module

corpus = module("bert", "bert_corpus")
wordpiece = module("bert", "bert_wordpiece")
samples = module("bert", "bert_samples")
stream = module("bert", "bert_stream")

TEXT = "the cat sees a red dog under every old tree while some birds sing loudly over quiet rivers and hills"
WORDS = TEXT.split()


def sentence(random: np.random.Generator) -> str:
    return " ".join(random.choice(WORDS, 9)).capitalize() + "."


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 documents of 3 paragraphs of 4 sentences."""
    random = np.random.default_rng(0)
    paragraphs = [[" ".join(sentence(random) for _ in range(4)) for _ in range(3)] for _ in range(40)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n\n".join("\n\n".join(document) for document in paragraphs), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def pieces(text: Path, tmp_path_factory: pytest.TempPathFactory):
    return wordpiece.train_or_load(corpus.corpus_of(str(text)).train, 200, str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def documents(text: Path, pieces):
    return pieces.sentences(corpus.corpus_of(str(text)).train)


# ---- the text


def test_a_tenth_of_the_documents_is_held_out_and_none_of_its_paragraphs_is_trained_on(text: Path):
    read = corpus.corpus_of(str(text))
    assert (len(read.train), len(read.held_out)) == (36, 4)
    assert all(len(document) == 12 for document in read.train + read.held_out)
    trained = {sentence for document in read.train for sentence in document}
    assert not trained & {sentence for document in read.held_out for sentence in document}


def test_a_paragraph_that_occurs_twice_is_kept_once():
    twice = ["Here is a paragraph that two topics quote.", "And here is another one of some length."]
    kept = list(corpus.without_repetitions([twice, twice[:1]]))
    assert kept == [twice, []]


def test_python_brings_enough_english_along():
    """The default text: over a megabyte on every Python, some of it prose of the language reference."""
    documents = [" ".join(document) for document in corpus.python_documents()]
    assert sum(map(len, documents)) > 1_000_000
    assert any("A class definition defines a class object" in document for document in documents)


def test_a_directory_of_text_files_and_text_without_double_blank_lines_are_read(tmp_path: Path):
    paragraphs = [f"This is paragraph number {index} of a short text." for index in range(120)]
    for part in range(2):
        (tmp_path / f"{part}.txt").write_text("\n\n".join(f"{p} In file {part}." for p in paragraphs), encoding="utf-8")
    read = corpus.corpus_of(str(tmp_path))
    assert len(read.train) + len(read.held_out) == 2 * 10


def test_missing_and_too_short_texts_say_what_to_give(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"is no file\. Give a text file"):
        corpus.corpus_of(str(tmp_path / "none.txt"))
    with pytest.raises(FileNotFoundError, match=r"has no \.txt file in it"):
        corpus.corpus_of(str(tmp_path))
    (tmp_path / "short.txt").write_text("One paragraph is not enough for that.", encoding="utf-8")
    with pytest.raises(ValueError, match="holds 1 documents, too few"):
        corpus.corpus_of(str(tmp_path / "short.txt"))


# ---- the vocabulary


def test_the_vocabulary_is_trained_once_and_found_again(text: Path, tmp_path: Path):
    train = corpus.corpus_of(str(text)).train
    first = wordpiece.train_or_load(train, 90, str(tmp_path))
    (kept,) = tmp_path.iterdir()
    written = kept.stat().st_mtime_ns
    again = wordpiece.train_or_load(train, 90, str(tmp_path))
    assert kept.stat().st_mtime_ns == written
    assert first.tokenizer.get_vocab() == again.tokenizer.get_vocab()
    assert first.size == 90
    assert [first.tokenizer.id_to_token(index) for index in range(5)] == list(wordpiece.SPECIAL)
    assert wordpiece.train_or_load(train[:-1], 90, str(tmp_path)).size == 90
    assert len(list(tmp_path.iterdir())) == 2  # another text, another vocabulary


def test_unigram_entropy_is_that_of_single_tokens():
    even = [[np.arange(8, dtype=np.int32)], [np.arange(8, dtype=np.int32)]]
    assert wordpiece.unigram_entropy(even) == pytest.approx(math.log(8))
    assert wordpiece.unigram_entropy([[np.zeros(5, np.int32)]]) == 0


# ---- pairs and masks


@pytest.mark.parametrize("length", [16, 32, 64])
def test_pairs_are_full_and_half_of_the_second_segments_are_from_elsewhere(documents, length: int):
    pairs = samples.make_pairs(documents, length, seed=0)
    rows = np.arange(len(pairs.tokens))
    assert (pairs.tokens[:, 0] == samples.CLS).all()
    assert (pairs.tokens[rows, pairs.first_lengths - 1] == samples.SEP).all()
    assert (pairs.tokens[rows, pairs.lengths - 1] == samples.SEP).all()
    assert ((pairs.tokens == samples.SEP).sum(1) == 2).all()
    assert ((np.arange(length) < pairs.lengths[:, None]) == (pairs.tokens != samples.PAD)).all()
    assert pairs.lengths.mean() > 0.75 * length
    assert 0.35 < pairs.random_next.mean() < 0.75


def test_what_follows_really_follows(documents):
    """First and second segment of a true pair lie next to each other in one document."""
    pairs = samples.make_pairs(documents, 32, seed=0)
    texts = [" ".join(map(str, np.concatenate(document))) for document in documents]
    for row in np.flatnonzero(pairs.random_next == 0):
        inside = pairs.tokens[row][: pairs.lengths[row]]
        run = " ".join(map(str, inside[inside >= len(wordpiece.SPECIAL)]))
        assert any(run in text for text in texts)


def test_the_pairs_depend_on_the_seed_only(documents):
    first, again, other = (samples.make_pairs(documents, 32, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(first.tokens, again.tokens)
    assert not np.array_equal(first.tokens[:50], other.tokens[:50])


def masked(documents, pieces, **options):
    return samples.MaskedPairs(samples.make_pairs(documents, 64, seed=0), pieces, seed=0, **options)


def test_fifteen_percent_are_masked_and_labels_say_what_was_there(documents, pieces):
    data = masked(documents, pieces)
    asked = shown = hidden = 0
    for index in range(len(data)):
        sample, original = data[0, index], torch.from_numpy(data.pairs.tokens[index]).long()
        chosen = sample["labels"] != samples.IGNORED
        assert torch.equal(sample["labels"][chosen], original[chosen])
        assert torch.equal(sample["input_ids"][~chosen], original[~chosen])
        assert not (original[chosen] < len(wordpiece.SPECIAL)).any()
        asked += int(chosen.sum())
        shown += int((original >= len(wordpiece.SPECIAL)).sum())
        hidden += int((sample["input_ids"][chosen] == samples.MASK).sum())
    assert 0.14 < asked / shown < 0.16
    assert 0.75 < hidden / asked < 0.85


def test_masks_change_from_pass_to_pass_unless_they_are_static(documents, pieces):
    dynamic, static = masked(documents, pieces), masked(documents, pieces, static_masks=2)
    assert not torch.equal(dynamic[0, 3]["labels"], dynamic[2, 3]["labels"])
    assert torch.equal(static[0, 3]["labels"], static[2, 3]["labels"])
    assert not torch.equal(static[0, 3]["labels"], static[1, 3]["labels"])
    assert torch.equal(dynamic[5, 3]["input_ids"], masked(documents, pieces)[5, 3]["input_ids"])


def test_whole_words_are_masked_together(documents, text: Path, tmp_path: Path):
    small = wordpiece.train_or_load(corpus.corpus_of(str(text)).train, 60, str(tmp_path))  # so that words have pieces
    data = masked(small.sentences(corpus.corpus_of(str(text)).train), small, whole_word=True)
    several = 0
    for index in range(40):
        original, chosen = data.pairs.tokens[index], data[0, index]["labels"].numpy() != samples.IGNORED
        for position in np.flatnonzero(small.continues_word[original]):
            if original[position - 1] >= len(wordpiece.SPECIAL):
                assert chosen[position] == chosen[position - 1]
                several += chosen[position]
    assert several > 20


# ---- the stream


def drawn(source, batches: int) -> list[torch.Tensor]:
    iterator = iter(source)
    return [next(iterator)["input_ids"] for _ in range(batches)]


def test_ranks_share_the_samples_that_one_process_would_see(documents, pieces):
    data = masked(documents, pieces)
    alone = torch.cat(drawn(stream.SampleStream(data, 8, 100), 6))
    ranks = [drawn(stream.SampleStream(data, 4, 100, rank=rank, ranks=2), 6) for rank in range(2)]
    assert torch.equal(alone, torch.cat([batch for pair in zip(*ranks) for batch in pair]))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_continues_where_its_state_was_taken_also_over_passes_and_ranks(documents, pieces, workers: int):
    data = masked(documents, pieces)
    batches = 3 * len(data) // 8
    whole = drawn(stream.SampleStream(data, 8, batches), batches)
    for stop in (1, len(data) // 8, batches - 5):
        first = stream.SampleStream(data, 8, batches, num_workers=workers)
        drawn(first, stop)
        resumed = stream.SampleStream(data, 2, 4 * batches, ranks=2, num_workers=workers)
        resumed.load_state_dict(first.state_dict())
        halves = torch.cat(drawn(resumed, 4))
        expected = torch.cat(whole[stop : stop + 2]).view(4, 2, 2, -1)[:, 0].reshape(halves.shape)
        assert torch.equal(halves, expected)


def test_every_pass_shows_every_sample_once_in_another_order(documents, pieces):
    source = stream.SampleStream(masked(documents, pieces), 8, 10)
    size = len(source.samples)
    passes = [[source.key(position) for position in range(p * size, (p + 1) * size)] for p in range(2)]
    assert [sorted(index for _, index in keys) for keys in passes] == [list(range(size))] * 2
    assert [index for _, index in passes[0]] != [index for _, index in passes[1]]


def test_the_state_of_another_sequence_length_is_another_stage(documents, pieces):
    short = stream.SampleStream(masked(documents, pieces), 8, 10)
    short.load_state_dict({"drawn": 40, "sequence_length": 128})
    assert short.drawn == 0
    short.load_state_dict({"drawn": 40, "sequence_length": 64})
    assert short.drawn == 40
