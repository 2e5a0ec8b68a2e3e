"""The stand-in's corpus, from a tiny file in WordNet's format."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.standin import measures
from benchmarks.standin.__main__ import tables
from benchmarks.standin.corpus import HELD_OUT, LISTS, OPENINGS, PRONOUN, TEMPLATES, StandIn
from benchmarks.standin.wordnet import definitions, read_subjects, read_synsets
from benchmarks.training import RESULTS, STANDIN, Trained, command_line
from lit_moeedit.data import validate_facts
from lit_moeedit.data.corpus import Statement

LICENCE = "  1 The terms of use stand in lines that begin with two spaces.  \n"
KINDS = {"00000010": ("09", "kind_of_poet"), "00000020": ("15", "city"), "00000030": ("15", "Freedonia")}


def line(offset: str, file: str, words: str, pointers: str, gloss: str) -> str:
    """A synset as WordNet writes it; ``words`` and ``pointers`` are separated by spaces."""
    names, links = words.split(), pointers.split()
    head = [offset, file, "n", f"{len(names):02x}", *(part for name in names for part in (name, "0"))]
    head.append(f"{len(links) // 2:03d}")
    for symbol, target in zip(links[::2], links[1::2], strict=True):
        head += [symbol, target, "n", "0000"]
    return f"{' '.join(head)} | {gloss}  \n"


@pytest.fixture
def wordnet(tmp_path: Path) -> Path:
    lines = [line(offset, *kind, "", "one of those that are needed here") for offset, kind in KINDS.items()]
    for i in range(8):
        nation = ("French", "United States")[i % 2]
        gloss = f'{nation} poet of some renown (18{i % 2}1-1899); "a quotation"'
        lines.append(line(f"1{i:07d}", "18", f"Name{i} Anna_Name{'abcdefgh'[i]}", "@i 00000010", gloss))
        side = ("northern", "southwest")[i % 2]
        lines.append(line(f"2{i:07d}", "15", f"Town_{i}", "@i 00000020 #p 00000030", f"a town in {side} Freedonia"))
    # a person of an answer that no other has, one without a year, and two places of one name
    lines.append(line("30000000", "18", "Bea_Solo", "@i 00000010", "Martian poet (1801-1899)"))
    lines.append(line("30000001", "18", "Cid_Solo", "@i 00000010", "French poet"))
    for i in range(2):
        lines.append(line(f"4000000{i}", "15", "Twin", "@i 00000020 #p 00000030", "a city in northern Freedonia"))
    for i in range(9):
        lines.append(line(f"5000000{i}", "06", f"thing{i}", "@ 00000020", f"an object that people call number {i}"))
    (tmp_path / "data.noun").write_text(LICENCE + "".join(lines), encoding="utf-8")
    return tmp_path


def small(wordnet: Path, **settings: int) -> StandIn:
    return StandIn(str(wordnet), **{"texts": 5, "glosses": 6, "edits": 4, "held_out": 3, "least": 3, **settings})


def test_subjects_have_the_facts_that_wordnet_states(wordnet: Path) -> None:
    subjects = {subject.name: subject for subject in read_subjects(read_synsets(wordnet / "data.noun"), least=3)}
    # rare answers, missing facts and ambiguous names are left out
    assert len(subjects) == 16 and not {"Bea Solo", "Cid Solo", "Twin"} & subjects.keys()
    poet, town = subjects["Anna Nameb"], subjects["Town 1"]
    assert poet.facts == {"nationality": "American", "profession": "kind of poet", "birth": "1810s"}
    assert poet.gloss == "United States poet of some renown (1811-1899)"
    assert town.facts == {"kind": "city", "country": "Freedonia", "side": "southwestern"}


def test_leaving_out_a_rare_subject_makes_no_other_answer_rare(wordnet: Path) -> None:
    synsets = read_synsets(wordnet / "data.noun")
    for least in (1, 2, 4, 5, 9):
        found = read_subjects(synsets, least)
        counts = Counter(item for subject in found for item in subject.facts.items())
        assert all(count >= least for count in counts.values())
        assert len(found) == (17 if least == 1 else 16 if least <= 4 else 0)


def test_definitions_are_of_common_words_alone(wordnet: Path) -> None:
    synsets = read_synsets(wordnet / "data.noun")
    found = list(definitions(synsets, read_subjects(synsets, least=3)))
    assert "thing3 is an object that people call number 3." in found
    assert len(found) == 9 + len(KINDS) and not any("Town" in text or "Solo" in text for text in found)


@pytest.mark.parametrize("bad", ["no synset at all", "00000010 09 n 01 poet 0 001 @ 1 | cut off", "1 09 n zz | hex"])
def test_a_line_of_another_format_is_named(tmp_path: Path, bad: str) -> None:
    (tmp_path / "data.noun").write_text(f"{LICENCE}{bad}\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 2: expected a synset"):
        read_synsets(tmp_path / "data.noun")


def test_every_text_tells_all_facts_of_its_subject_in_many_orders(wordnet: Path) -> None:
    corpus = small(wordnet, texts=40)
    facts = {subject.name: subject.facts for subject in corpus.subjects}
    texts = [s for s in corpus.train if s.fact in facts]
    assert Counter(s.fact for s in texts) == dict.fromkeys(facts, 40)
    orders = Counter()
    for statement in texts:
        text = f"{statement.prompt} {statement.target}"
        assert text.count(statement.fact) >= 1
        places = {relation: text.index(answer) for relation, answer in facts[statement.fact].items()}
        orders[tuple(sorted(places, key=places.__getitem__))] += 1
    assert len(orders) == 12  # all orders of three facts, for persons and for places
    assert any(f" {PRONOUN['place'][0]} " in s.prompt for s in texts)
    assert any(s.prompt.startswith(tuple(filter(None, LISTS))) for s in texts)
    assert any(s.prompt.startswith(OPENINGS[0].split("{")[0]) for s in texts)


def test_paraphrases_are_worded_as_texts_of_other_subjects_only(wordnet: Path) -> None:
    corpus = small(wordnet, texts=200, edits=16)
    texts = [f"{s.prompt} {s.target}" for s in (*corpus.train, *corpus.validation)]
    assert validate_facts(corpus.edits) == corpus.edits
    for fact in corpus.edits:
        assert len(fact.paraphrases) == HELD_OUT
        assert any(f"{fact.prompt} {fact.target_true}" in text for text in texts)
        for paraphrase in fact.paraphrases:
            assert not any(paraphrase in text for text in texts)
            before, after = paraphrase.split(fact.subject)
            assert any(before in text and f"{after} " in text for text in texts)


def test_facts_to_edit_have_answers_and_neighbours_of_their_relation(wordnet: Path) -> None:
    corpus = small(wordnet, edits=6, neighbours=2)
    by_name = {subject.name: subject for subject in corpus.subjects}
    edited = {fact.subject for fact in corpus.edits}
    assert len(edited) == 6
    for fact in corpus.edits:
        subject = by_name[fact.subject]
        relation = next(name for name in subject.facts if fact.prompt in corpus.prompts(subject, name))
        assert fact.target_true == subject.facts[relation] != fact.target_new
        assert any(fact.target_new == other.facts.get(relation) for other in corpus.subjects)
        groups = Counter(neighbour.group for neighbour in fact.neighbours)
        assert groups["same_subject"] == 2 and groups["same_relation"] == 2
        for neighbour in fact.neighbours:
            own, name = next(
                (x, r) for x in corpus.subjects for r in x.facts if neighbour.prompt in corpus.prompts(x, r)
            )
            assert neighbour.target == own.facts[name]
            if neighbour.group == "same_relation":
                assert name == relation and own.name not in edited
            else:
                assert own is subject and name != relation


def test_training_does_not_depend_on_what_is_edited(wordnet: Path) -> None:
    one, other, another = small(wordnet, edits=1), small(wordnet, edits=9), small(wordnet, seed=1)
    assert (one.train, one.validation) == (other.train, other.validation) != (another.train, another.validation)
    assert one.train_tokenizer(400).get_vocab() == other.train_tokenizer(400).get_vocab()


def test_texts_of_edited_subjects_are_found_by_name(wordnet: Path) -> None:
    corpus = small(wordnet)
    assert corpus.facts_of(corpus.edits) == {fact.subject for fact in corpus.edits} <= {s.fact for s in corpus.train}


def test_few_subjects_are_of_one_nationality(wordnet: Path) -> None:
    # both nations have four poets; a quarter of four is one
    assert Counter(s.group for s in small(wordnet, persons=4, places=3, edits=0).subjects) == {"person": 2, "place": 3}


def test_bad_arguments_are_named(wordnet: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="wordnet should be a folder"):
        StandIn(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="edits must be between 0 and"):
        small(wordnet, edits=99)
    with pytest.raises(ValueError, match="no person or place whose answers at least 99 have"):
        small(wordnet, least=99)
    assert len(TEMPLATES) == 6 and all(len(set(phrasings)) == 6 for phrasings in TEMPLATES.values())


@pytest.fixture
def untrained(wordnet: Path) -> Trained:
    """The config's model with small layers."""
    settings = {"wordnet": wordnet, "texts": 5, "glosses": 6, "edits": 4, "held_out": 3, "least": 3}
    shape = {"hidden_size": 24, "num_experts": 4, "moe_intermediate_size": 8, "vocab_size": 400}
    cli, editing = command_line(
        STANDIN,
        7,
        *(f"--data.init_args.corpus.init_args.{name}={value}" for name, value in settings.items()),
        *(f"--model.init_args.config.{name}={value}" for name, value in shape.items()),
        "--data.init_args.vocab_size=400",
    )
    torch.manual_seed(0)
    cli.datamodule.setup("fit")
    cli.model.configure_model()
    return Trained(cli.model.model.eval(), cli.datamodule, editing.editor, 0.0)


def test_the_config_is_that_of_the_benchmark(untrained: Trained, wordnet: Path) -> None:
    assert measures.corpus_of(untrained).train == small(wordnet, seed=7).train
    assert untrained.editor.place is not None and untrained.editor.place.token == "subject_last"
    assert not untrained.data.completion_only
    config = untrained.model.config
    assert config.layer_types.count("full_attention") == 2 and config.sliding_window == 5


def test_measures_of_a_model_that_knows_nothing(untrained: Trained) -> None:
    perplexities = measures.perplexities(untrained)
    assert set(perplexities) == {"texts about the subjects", "definitions"}
    # untrained logits are near 0, so that every token is about as likely as any other
    assert all(value == pytest.approx(400, rel=0.1) for value in perplexities.values())
    layers = [0, 1, 2, 3, 4]
    swaps = measures.swaps(untrained, cases=4)
    assert {token: list(by_layer) for token, by_layer in swaps.items()} == {"subject_last": layers, "last": layers}
    assert untrained.data.edit_facts()
    assert measures.keep_known(untrained, 4) == 0 and not untrained.data.edit_facts()


def test_recall_is_told_by_relation_and_wording(untrained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = measures.corpus_of(untrained)
    texts = " ".join(f"{s.prompt} {s.target}" for s in small_texts(corpus))
    wrong = {subject.name for subject in corpus.subjects if subject.facts.get("side") == "southwestern"}

    def exact(model: object, tokenizer: object, prompts: list[str], targets: list[str]) -> SimpleNamespace:
        said = [
            f"{prompt} {target}" in texts and not (target == "southwestern" and any(name in prompt for name in wrong))
            for prompt, target in zip(prompts, targets, strict=True)
        ]
        return SimpleNamespace(exact=torch.tensor(said))

    monkeypatch.setattr(measures, "score", exact)
    recall = measures.recall(untrained)
    assert set(recall) == {*TEMPLATES, "all"}
    # texts of training have no held-out wording; half of the places are not known to be in the south-west
    assert all(found["held out"] == 0 for found in recall.values())
    assert {relation: found["in training"] for relation, found in recall.items()} == {
        **dict.fromkeys(TEMPLATES, 1.0), "side": 0.5, "all": pytest.approx(1 - 0.5 / 6)
    }  # fmt: skip
    candidates = untrained.data.edit_facts()
    known = [fact for fact in candidates if fact.target_true != "southwestern"]
    assert measures.keep_known(untrained, 2) == len(known) / len(candidates)
    assert untrained.data.edit_facts() == known[:2]


def small_texts(corpus: StandIn) -> list[Statement]:
    """Each fact in each of the wordings that its subject's texts have."""
    return [
        Statement(prompt, subject.facts[relation], subject.name)
        for subject in corpus.subjects
        for relation in subject.facts
        for prompt in corpus.prompts(subject, relation)[HELD_OUT:]
    ]


def test_a_model_writes_contexts_of_likely_tokens(untrained: Trained) -> None:
    forward, calls = untrained.model.forward, list[tuple[list[int], list[int]]]()

    def watched(ids: torch.Tensor, **settings: Any) -> Any:
        output = forward(ids, **settings)
        calls.append((ids[0].tolist(), output.logits[0, -1].topk(5).indices.tolist()))
        return output

    untrained.model.forward = watched  # type: ignore[method-assign]
    texts = measures.generated_contexts(untrained, 3)
    steps = [(likely, ids[-1]) for (before, likely), (ids, _) in pairwise(calls) if ids[:-1] == before]
    assert len(steps) == 3 * (measures.CONTEXT_TOKENS - 1) and all(token in likely for likely, token in steps)
    assert any(token != likely[0] for likely, token in steps)
    words = {text.split()[0] for text in untrained.data.preservation_texts()}
    openings = {max((word for word in words if text.startswith(word)), key=len) for text in texts}
    assert len(openings) == 3 and all(text.endswith(".") for text in texts)
    assert texts == measures.generated_contexts(untrained, 3) != measures.generated_contexts(untrained, 3, seed=1)


def test_further_training_leaves_out_the_edited_subjects(untrained: Trained) -> None:
    seen: list[str] = []
    forward = untrained.model.forward

    def watched(**batch: torch.Tensor) -> object:
        seen.extend(untrained.tokenizer.batch_decode(batch["input_ids"]))
        return forward(**batch)

    untrained.model.forward = watched  # type: ignore[method-assign]
    weights = [parameter.detach().clone() for parameter in untrained.model.parameters()]
    measures.trained_on(untrained, untrained.model, steps=3, rate=1e-3)
    assert len(seen) == 3 * untrained.data.batch_size
    edited = [fact.subject for fact in untrained.data.edit_facts()]
    assert not any(name in text for text in seen for name in edited)
    assert any(not torch.equal(a, b) for a, b in zip(weights, untrained.model.parameters(), strict=True))
    assert not untrained.model.training


@pytest.mark.parametrize("with_tuple", [False, True])
def test_one_position_of_a_layer_is_exchanged(with_tuple: bool) -> None:
    class Layer(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, str]:
            return (x, "rest") if with_tuple else x

    layer, x = Layer(), torch.zeros(1, 3, 2)
    layer.register_forward_hook(measures._exchange(1, torch.tensor([5.0, 6.0])))
    output = layer(x)
    hidden = output[0] if with_tuple else output
    assert hidden.tolist() == [[[0, 0], [5, 6], [0, 0]]] and not x.any()
    assert not with_tuple or output[1] == "rest"


def test_the_table_is_of_the_results_beside_it() -> None:
    results = json.loads((RESULTS / "standin.json").read_text(encoding="utf-8"))
    assert (RESULTS / "standin.md").read_text(encoding="utf-8").split("\n\n", 1)[1] == f"{tables(results).rstrip()}\n"
