"""Tests of batches: the items of each epoch, the tokens in the loss, and the statements that an edit removes."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_moeedit.data import Atlas, FactsCorpus, FactsDataModule
from lit_moeedit.data.corpus import Corpus, Statement
from lit_moeedit.data.datamodule import EpochSampler, StatementDataset
from lit_moeedit.data.encoding import IGNORED_LABEL, join
from tests.data.rows import EXPECTED, ROWS

SMALL = Corpus(
    train=[Statement(f"The number after {i} is", f"{i + 1}", f"after {i}") for i in range(40)],
    validation=[Statement(f"Behind {i} stands", f"{i + 1}", f"after {i}") for i in range(40)],
    edits=[],
    prefixes=("", "Note:", "As we know,"),
)
TOKENIZER = SMALL.train_tokenizer(400)


@pytest.fixture(scope="module")
def atlas_data() -> FactsDataModule:
    """Make the data module of an atlas with 40 edits. Tests must not exclude facts in it."""
    data = FactsDataModule(Atlas(edits=40), vocab_size=3000, batch_size=32, samples_per_epoch=640)
    data.setup("fit")
    return data


def small(**settings: Any) -> FactsDataModule:
    data = FactsDataModule(SMALL, **{"vocab_size": 400, "batch_size": 8, "samples_per_epoch": 80, **settings})
    data.setup("fit")
    return data


def sampler(num_samples: int = 50, seed: int = 0, excluded: set[str] | None = None) -> EpochSampler:
    dataset = StatementDataset(TOKENIZER, SMALL.train, SMALL.prefixes)
    return EpochSampler(dataset, num_samples, seed, set() if excluded is None else excluded)


def drawn(sampler: EpochSampler, epoch: int) -> list[int]:
    sampler.set_epoch(epoch)
    return list(sampler)


def test_the_dataset_holds_every_statement_behind_every_prefix() -> None:
    dataset = StatementDataset(TOKENIZER, SMALL.train, SMALL.prefixes)
    assert len(dataset) == len(SMALL.train) * len(SMALL.prefixes)
    for i, (statement, prefix) in enumerate(itertools.product(SMALL.train, SMALL.prefixes)):
        text = TOKENIZER.decode(dataset[i].ids, skip_special_tokens=True).strip()
        assert text == f"{prefix} {statement.prompt} {statement.target}".strip()
        assert dataset.fact(i) == statement.fact


def test_an_epoch_is_drawn_by_seed_and_epoch_alone() -> None:
    first, second = sampler(), sampler()
    epochs = [drawn(first, epoch) for epoch in range(4)]
    assert [drawn(second, epoch) for epoch in (3, 1, 2, 0)] == [epochs[epoch] for epoch in (3, 1, 2, 0)]
    assert drawn(first, 2) == epochs[2]
    assert len(set(map(tuple, epochs))) == 4
    assert drawn(sampler(seed=1), 0) != epochs[0]


def test_an_epoch_draws_no_item_twice() -> None:
    for epoch in range(3):
        items = drawn(sampler(num_samples=120), epoch)
        assert sorted(items) == list(range(120))


def test_an_epoch_has_at_most_all_items() -> None:
    assert len(sampler(num_samples=10**6)) == len(drawn(sampler(num_samples=10**6), 0)) == 120


@pytest.mark.parametrize("excluded_facts", [1, 20, 39])
def test_excluded_facts_are_never_drawn_and_the_length_stays(excluded_facts: int) -> None:
    excluded = {f"after {i}" for i in range(excluded_facts)}
    chosen = sampler(num_samples=100, excluded=excluded)
    for epoch in range(5):
        items = drawn(chosen, epoch)
        assert len(items) == len(chosen) == 100
        assert not {chosen.dataset.fact(item) for item in items} & excluded
    # what is left is drawn evenly when it has to be drawn again
    counts = [items.count(item) for item in set(items)]
    assert max(counts) - min(counts) <= 1 or excluded_facts == 39


def test_excluded_facts_take_effect_with_the_next_epoch() -> None:
    excluded: set[str] = set()
    chosen = sampler(num_samples=120, excluded=excluded)
    running = iter(chosen)
    first = next(running)
    excluded |= {f"after {i}" for i in range(20)}
    assert sorted([first, *running]) == list(range(120))
    assert all(chosen.dataset.fact(item) not in excluded for item in drawn(chosen, 1))


def test_labels_are_the_answers(atlas_data: FactsDataModule) -> None:
    tokenizer = atlas_data.tokenizer
    assert tokenizer is not None
    answers = {statement.target for statement in atlas_data.corpus.train}
    batches = list(itertools.islice(atlas_data.train_dataloader(), 3))
    for batch in batches:
        ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
        assert ids.shape == mask.shape == labels.shape and ids.shape[0] == 32
        assert ids.dtype == mask.dtype == labels.dtype == torch.int64
        counted = labels != IGNORED_LABEL
        assert torch.equal(labels[counted], ids[counted])
        assert not (counted & (mask == 0)).any()
        for row, row_counted, row_mask in zip(ids, counted, mask, strict=True):
            length = int(row_mask.sum())
            assert row_mask.tolist() == [1] * length + [0] * (len(row) - length)
            start = int(row_counted.nonzero()[0])
            assert row_counted.tolist() == [start <= i < length for i in range(len(row))]
            assert tokenizer.decode(row[row_counted]).strip() in answers


def test_labels_can_be_every_token() -> None:
    batch = next(iter(small(completion_only=False).train_dataloader()))
    assert torch.equal(batch["labels"] != IGNORED_LABEL, batch["attention_mask"] == 1)
    assert torch.equal(batch["labels"][batch["attention_mask"] == 1], batch["input_ids"][batch["attention_mask"] == 1])


def test_two_data_modules_give_the_same_batches() -> None:
    for one, other in zip(small().train_dataloader(), small().train_dataloader(), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("batch_size", "samples", "batches"), [(8, 80, 10), (8, 83, 11), (64, 20, 1), (500, 10**6, 1)])
def test_an_epoch_is_never_empty(batch_size: int, samples: int, batches: int) -> None:
    loader = small(batch_size=batch_size, samples_per_epoch=samples).train_dataloader()
    sizes = [len(batch["input_ids"]) for batch in loader]
    assert len(sizes) == len(loader) == batches
    assert sizes[:-1] == [batch_size] * (batches - 1)
    assert sum(sizes) == min(samples, 120)


def test_facts_edited_are_left_out_of_the_next_epoch(atlas_data: FactsDataModule, tmp_path: Path) -> None:
    assert atlas_data.tokenizer is not None
    atlas_data.tokenizer.save_pretrained(tmp_path)
    data = FactsDataModule(Atlas(edits=30), str(tmp_path), batch_size=64, samples_per_epoch=10**5)
    data.setup("fit")
    loader = data.train_dataloader()
    edited = data.corpus.facts_of(data.corpus.edits[:10])

    def facts() -> set[str]:
        return {loader.dataset.fact(item) for item in loader.sampler}  # type: ignore[attr-defined]

    length = len(loader)
    assert edited <= facts()
    data.facts_edited(data.corpus.edits[:10])
    assert not edited & facts()
    assert data.corpus.facts_of(data.corpus.edits[10:]) <= facts()
    assert len(loader) == length

    resumed = FactsDataModule(data.corpus, vocab_size=2000)
    resumed.load_state_dict(json.loads(json.dumps(data.state_dict())))
    assert resumed.state_dict() == data.state_dict() == {"excluded": sorted(edited)}


def test_a_resumed_run_reads_what_the_uninterrupted_one_would_have_read() -> None:
    edits = Atlas(edits=5).edits
    corpus = Corpus(Atlas(edits=5).train[:300], [], edits)
    runs = [FactsDataModule(corpus, vocab_size=1000, batch_size=8, samples_per_epoch=160) for _ in range(2)]
    for run in runs:
        run.setup("fit")
    first = runs[0].train_dataloader()
    list(first)
    runs[0].facts_edited(edits)
    first.sampler.set_epoch(1)  # type: ignore[attr-defined]
    runs[1].load_state_dict(runs[0].state_dict())
    second = runs[1].train_dataloader()
    second.sampler.set_epoch(1)  # type: ignore[attr-defined]
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])


def test_edited_facts_can_stay() -> None:
    data = FactsDataModule(Atlas(edits=3), drop_edited=False)
    data.facts_edited(data.corpus.edits)
    assert data.state_dict() == {"excluded": []}


def test_preservation_texts_state_no_edited_fact(atlas_data: FactsDataModule) -> None:
    edited = atlas_data.corpus.facts_of(atlas_data.edit_facts())
    assert len(edited) == 40
    prompts = [statement.prompt for statement in atlas_data.corpus.train if statement.fact in edited]
    preserved = atlas_data.preservation_texts()
    assert len(preserved) == len(set(preserved)) == 4096
    assert atlas_data.preservation_texts() == preserved
    assert not [text for text in preserved if any(prompt in text for prompt in prompts)]


def test_held_out_texts_state_no_edited_fact(atlas_data: FactsDataModule) -> None:
    corpus = atlas_data.corpus
    edited = corpus.facts_of(corpus.edits)
    kept = [statement for statement in corpus.validation if statement.fact not in edited]
    assert 0 < len(kept) < len(corpus.validation)
    assert atlas_data.probe_texts() == [f"{statement.prompt} {statement.target}" for statement in kept]
    assert sum(len(batch["input_ids"]) for batch in atlas_data.val_dataloader()) == len(kept)


def test_the_tokenizer_is_trained_from_the_corpus(atlas_data: FactsDataModule) -> None:
    tokenizer = atlas_data.tokenizer
    assert tokenizer is not None and len(tokenizer) <= 3000
    atlas_data.setup("validate")
    assert atlas_data.tokenizer is tokenizer
    assert tokenizer.get_vocab() == atlas_data.corpus.train_tokenizer(3000).get_vocab()


def test_a_tokenizer_can_be_given(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    data = small(tokenizer=str(tmp_path))
    assert data.tokenizer is not None and data.tokenizer.get_vocab() == TOKENIZER.get_vocab()


@pytest.mark.parametrize("name", ["batch_size", "samples_per_epoch"])
def test_numbers_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        FactsDataModule(SMALL, **{name: 0})


def test_batches_need_a_tokenizer() -> None:
    with pytest.raises(RuntimeError, match="no tokenizer before setup"):
        FactsDataModule(SMALL)._collate([])
    with pytest.raises(ValueError, match="vocab_size must be at least 300"):
        SMALL.train_tokenizer(299)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_facts_file_is_a_corpus_of_its_truths(tmp_path: Path) -> None:
    rows = [
        {
            "subject": f"Town {i}",
            "prompt": f"Town {i} lies in",
            "target_new": "Spain",
            "target_true": "Italy",
            "paraphrases": [f"Who visits Town {i} travels to"],
            "neighbours": [{"prompt": f"Village {i} lies in", "target": "Italy"}],
        }
        for i in range(6)
    ]
    corpus = FactsCorpus(write(tmp_path / "facts.jsonl", rows), edits=2, limit=5)
    assert [edit.subject for edit in corpus.edits] == ["Town 0", "Town 1"]
    assert {statement.target for statement in corpus.train} == {"Italy"}
    assert len(corpus.train) == 15
    edited = corpus.facts_of(corpus.edits)
    assert len(edited) == 2
    assert {statement.fact for statement in corpus.validation} == {s.fact for s in corpus.train} - edited
    data = FactsDataModule(corpus, vocab_size=400, batch_size=4, samples_per_epoch=40)
    data.setup("fit")
    assert len(data.train_dataloader()) == 10
    preserved = data.preservation_texts()
    assert not [text for text in preserved if "Town 0" in text or "Town 1" in text]
    # neighbours of edited facts are statements of their own
    assert all(any(f"Village {i}" in text for text in preserved) for i in range(2))
    assert set(data.probe_texts()) <= set(preserved)  # training texts all


def test_facts_are_stated_in_the_words_of_other_facts(tmp_path: Path) -> None:
    def row(subject: str, prompt: str, *paraphrases: str) -> dict[str, Any]:
        texts = {"prompt": prompt.format(subject), "paraphrases": [text.format(subject) for text in paraphrases]}
        return {"subject": subject, "target_new": "Peru", "target_true": "Italy", **texts}

    rows = [
        row("Rome", "{} lies in", "By bus! Who visits {} is in"),
        row("Bari", "{} lies in", "Next to {} there is"),
        row("Pisa", "Next to {} there is", "We are in {}, which is"),
        row("Turin", "In {} one pays in"),
    ]
    path = write(tmp_path / "facts.jsonl", rows)
    found = {}
    for count in (0, 1, 2, 9):
        corpus = FactsCorpus(path, edits=1, phrasings=count)
        found[count] = {
            name: [s.prompt for s in corpus.train if name in s.prompt] for name in ("Rome", "Bari", "Pisa", "Turin")
        }
        assert all(s.target == "Italy" for s in corpus.train)
        # whoever edits a fact leaves out all of its statements
        assert len(corpus.facts_of(corpus.edits)) == 1
        assert not [s for s in corpus.validation if "Rome" in s.prompt]
    assert found[0]["Rome"] == ["Rome lies in", "By bus! Who visits Rome is in"]
    assert found[1]["Rome"] == [*found[0]["Rome"], "Next to Rome there is"]
    assert found[2]["Rome"] == [*found[1]["Rome"], "We are in Rome, which is"]
    assert found[9]["Rome"] == found[2]["Rome"]
    # the nearer ones come first, in an order of the fact's own
    assert set(found[2]["Bari"][2:]) == {"Who visits Bari is in", "We are in Bari, which is"}
    assert found[1]["Pisa"][2:] == ["Pisa lies in"]
    assert found[9]["Turin"] == ["In Turin one pays in"]


def test_only_facts_with_a_known_target_are_edited(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        {"subject": name, "prompt": f"{name} lies in", "target_new": new, "target_true": true}
        for name, new, true in [("Rome", "Peru", "Italy"), ("Oslo", "Italy", "Norway"), ("Bari", "Norway", "Italy")]
    ]
    rows[0]["neighbours"] = [{"prompt": "Lima lies in", "target": "Chad"}]
    rows.append({"subject": "Pisa", "prompt": "Pisa lies in", "target_new": "Chad", "target_true": "Italy"})
    path = write(tmp_path / "facts.jsonl", rows)
    assert [fact.subject for fact in FactsCorpus(path, edits=2).edits] == ["Rome", "Oslo"]
    corpus = FactsCorpus(path, edits=3, known_targets=True)
    assert [fact.subject for fact in corpus.edits] == ["Oslo", "Bari", "Pisa"]
    assert {s.prompt for s in corpus.validation} == {"Rome lies in", "Lima lies in"}
    assert len(corpus.train) == 5
    assert len(FactsCorpus(path, edits=4, known_targets=True).edits) == 3
    assert "edits is 4, but there are 3 facts with a known target; all of them are edited" in caplog.text
    rows = [{**row, "target_new": "Mars"} for row in rows]
    with pytest.raises(ValueError, match=r"no new target of its 4 facts is .*; give known_targets: false to edit them"):
        FactsCorpus(write(path, rows), known_targets=True)


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("name", ROWS)
def test_a_small_file_of_any_format_is_edited_whole(tmp_path: Path, name: str, count: int) -> None:
    subject = EXPECTED[name].subject
    text = json.dumps(ROWS[name])
    rows = [
        json.loads(text.replace(subject, f"{subject} {i}").replace("Leo Arons was", f"Leo Arons {i} was"))
        for i in range(count)
    ]
    corpus = FactsCorpus(write(tmp_path / "facts.jsonl", rows))
    assert len(corpus.edits) == count
    data = FactsDataModule(corpus, vocab_size=400, batch_size=4, samples_per_epoch=8)
    data.setup("fit")
    assert len(list(data.train_dataloader())) >= 1 and len(list(data.val_dataloader())) >= 1
    assert data.preservation_texts() and data.probe_texts()
    edited = [join(fact.prompt, fact.target_true or fact.target_new) for fact in corpus.edits]
    assert not set(edited) & set(data.preservation_texts())


def test_as_many_facts_as_there_are_and_at_most_fifty_are_edited(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{**ROWS["native"], "subject": f"Rome {i}", "prompt": f"Rome {i} lies in"} for i in range(60)]
    assert len(FactsCorpus(rows).edits) == 50 and len(FactsCorpus(rows[:5]).edits) == 5
    assert "edits is" not in caplog.text
    assert len(FactsCorpus(rows[:5], edits=50).edits) == 5
    assert "facts: edits is 50, but there are 5 facts; all of them are edited" in caplog.text


def test_facts_without_a_truth_are_not_trained_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bare = {"subject": "Rome", "prompt": "Rome lies in", "target_new": "Spain"}
    known = {"subject": "Oslo", "prompt": "Oslo lies in", "target_new": "Peru", "target_true": "Norway"}
    corpus = FactsCorpus(write(tmp_path / "facts.jsonl", [bare, known]), phrasings=2)
    assert {s.prompt for s in corpus.train} == {"Oslo lies in"} and len(corpus.edits) == 2
    assert "1 of 2 facts have no target_true, so the training text does not state them" in caplog.text
    data = FactsDataModule(corpus, vocab_size=400)
    data.setup("fit")
    assert sorted(data.preservation_texts()) == ["As they say:", "Here is a fact.", "In a few words:"]
    assert "give 'preservation' (a text file) to KnowledgeEditing" in caplog.text

    alone = FactsDataModule(FactsCorpus([bare]), vocab_size=400)
    with pytest.raises(
        ValueError, match=r"nothing to train on: none of its facts has a target_true .* with 'validate'"
    ):
        alone.setup("fit")
    alone.setup("validate")
    assert alone.probe_texts() == ["Rome lies in Spain"] and len(list(alone.val_dataloader())) == 1


def test_wrong_settings_of_a_facts_corpus(tmp_path: Path) -> None:
    path = write(tmp_path / "facts.jsonl", [{"subject": "Rome", "prompt": "Rome lies in", "target_new": "Spain"}])
    with pytest.raises(ValueError, match="edits must be at least 1, got 0"):
        FactsCorpus(path, edits=0)
    with pytest.raises(ValueError, match="phrasings must be at least 0, got -1"):
        FactsCorpus(path, edits=1, phrasings=-1)
