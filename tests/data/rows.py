"""A row of every format, the fact that it contains, and helpers to change, write and refuse rows."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from lit_moeedit.data.facts import Fact, FactsError, Neighbour, Probe, read_facts

NATIVE: dict[str, Any] = {
    "subject": "Rome",
    "prompt": "Rome lies in",
    "target_new": "Spain",
    "target_true": "Italy",
    "paraphrases": ["The country of Rome is"],
    "neighbours": [{"prompt": "Milan lies in", "target": "Italy", "group": "same_relation"}],
}
COUNTERFACT: dict[str, Any] = {
    "case_id": 0,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "English", "id": "Q1860"},
        "target_true": {"str": "French", "id": "Q150"},
        "subject": "Danielle Darrieux",
    },
    "paraphrase_prompts": ["Danielle Darrieux, a native", "Danielle Darrieux spoke the language "],
    "neighborhood_prompts": ["The native language of Montesquieu is", "Jean Gabin's mother tongue is"],
    "generation_prompts": ["Danielle Darrieux was born in"],
}
FLAT: dict[str, Any] = {
    "case_id": 2,
    "prompt": "Toko Yasuda, the",
    "target_new": "piano",
    "subject": "Toko Yasuda",
    "ground_truth": "guitar",
    "rephrase_prompt": "Toko Yasuda is incredible at",
    "locality_prompt": "John Lennon performs on the",
    "locality_ground_truth": "guitar",
}
ZSRE: dict[str, Any] = {
    "subject": "WEFS",
    "src": "When was WEFS established?",
    "pred": "1998",
    "rephrase": "When has WEFS been established?",
    "alt": " 1997",
    "answers": ["1987", "1988"],
    "loc": "nq question: who voiced gaston",
    "loc_ans": "Richard White",
    "cond": "1998 >> 1997 || When was WEFS established?",
}
KNOWEDIT: dict[str, Any] = {
    "subject": "Leo Arons",
    "prompt": "The place of death of Leo Arons is",
    "target_new": "Berlin",
    "ground_truth": ["Munich"],
    "rephrase_prompt": "Where did Leo Arons die?",
    "portability": {
        "Logical_Generalization": [{"prompt": "Is Leo Arons still alive?", "ground_truth": [["no"], ["incorrect"]]}],
        "Reasoning": [{"prompt": "The mayor of the place where Leo Arons died is", "ground_truth": [["Kai Wegner"]]}],
        "Subject_Aliasing": [
            {"prompt": "The place of death of Martin Leo Arons is", "ground_truth": [["Berlin", "Berlin, Germany"]]},
            {"prompt": "The twin city of where Martin Leo Arons died is", "ground_truth": [["Los Angeles"]]},
        ],
    },
    "locality": {
        "Relation_Specificity": [
            {"prompt": "The name of the father of Leo Arons is", "ground_truth": [["Albert Arons"]]},
            {"prompt": "The name of the field of work of Leo Arons is", "ground_truth": [["experimental physics"]]},
            {"prompt": "The children of Leo Arons are", "ground_truth": [[""], []]},
        ],
        "Forgetfulness": [],
    },
}
KNOWEDIT_BIO: dict[str, Any] = {
    "text": "This is a Wikipedia passage about leo arons. Leo Arons was a physicist.",
    "labels": "He was born in Berlin.",
    "concept": "leo arons",
    "locality": {"Relation_Specificity": [{"prompt": "The mother of leo arons is", "ground_truth": ["Clara", "C."]}]},
}
REWRITE: dict[str, Any] = {
    "prompt": "{} is a citizen of",
    "relation_id": "P27",
    "target_new": {"str": "Croatia", "id": "Q224"},
    "target_true": {"str": "United States of America", "id": "Q30"},
    "subject": "Ellie Kemper",
    "question": "What is the country of citizenship of Ellie Kemper?",
}
MQUAKE: dict[str, Any] = {
    "case_id": 1,
    "requested_rewrite": [REWRITE],
    "questions": ["Who is the head of state of the country where Ellie Kemper holds a citizenship?"],
    "answer": "Donald Trump",
    "new_answer": "Kolinda Grabar-Kitarovic",
    "single_hops": [{"question": "...", "cloze": "Ellie Kemper is a citizen of", "answer": "United States of America"}],
    "orig": {"triples": [["Q72077", "P27", "Q30"]]},
}
ROWS = {
    "native": NATIVE,
    "counterfact": COUNTERFACT,
    "counterfact_flat": FLAT,
    "zsre": ZSRE,
    "knowedit": KNOWEDIT,
    "knowedit_bio": KNOWEDIT_BIO,
    "mquake": MQUAKE,
}
EXPECTED = {
    "native": Fact(
        "Rome",
        "Rome lies in",
        "Spain",
        "Italy",
        ("The country of Rome is",),
        (Neighbour("Milan lies in", "Italy", "same_relation"),),
    ),
    "counterfact": Fact(
        "Danielle Darrieux",
        "The mother tongue of Danielle Darrieux is",
        "English",
        "French",
        ("Danielle Darrieux, a native", "Danielle Darrieux spoke the language"),
        (
            Neighbour("The native language of Montesquieu is", "French", "same_relation"),
            Neighbour("Jean Gabin's mother tongue is", "French", "same_relation"),
        ),
    ),
    "counterfact_flat": Fact(
        "Toko Yasuda",
        "Toko Yasuda, the",
        "piano",
        "guitar",
        ("Toko Yasuda is incredible at",),
        (Neighbour("John Lennon performs on the", "guitar", "same_relation"),),
    ),
    "zsre": Fact(
        "WEFS",
        "When was WEFS established?",
        "1997",
        "1987",
        ("When has WEFS been established?",),
        (Neighbour("nq question: who voiced gaston", "Richard White", "unrelated"),),
    ),
    "knowedit": Fact(
        "Leo Arons",
        "The place of death of Leo Arons is",
        "Berlin",
        "Munich",
        ("Where did Leo Arons die?", "The place of death of Martin Leo Arons is"),
        (
            Neighbour("The name of the father of Leo Arons is", "Albert Arons", "Relation_Specificity"),
            Neighbour("The name of the field of work of Leo Arons is", "experimental physics", "Relation_Specificity"),
        ),
        (
            Probe("portability", "Is Leo Arons still alive?", ("no", "incorrect")),
            Probe("portability", "The mayor of the place where Leo Arons died is", ("Kai Wegner",)),
            Probe("portability", "The place of death of Martin Leo Arons is", ("Berlin", "Berlin, Germany")),
            Probe("portability", "The twin city of where Martin Leo Arons died is", ("Los Angeles",)),
        ),
    ),
    # the prompt spells the subject as the field does only where it stands in small letters
    "knowedit_bio": Fact(
        "leo arons",
        "This is a Wikipedia passage about leo arons. Leo Arons was a physicist.",
        "He was born in Berlin.",
        None,
        (),
        (Neighbour("The mother of leo arons is", "Clara", "Relation_Specificity"),),
    ),
    "mquake": Fact(
        "Ellie Kemper",
        "Ellie Kemper is a citizen of",
        "Croatia",
        "United States of America",
        ("What is the country of citizenship of Ellie Kemper?",),
        (),
        (Probe("multi_hop", MQUAKE["questions"][0], ("Kolinda Grabar-Kitarovic",)),),
    ),
}


def changed(row: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Copy `row` with changes: `a__b=value` sets `row["a"]["b"]`, and `...` removes a field."""
    row = copy.deepcopy(row)
    for path, value in changes.items():
        *outer, last = path.split("__")
        target = row
        for key in outer:
            target = target[int(key) if key.isdigit() else key]
        target[last] = value
        if value is ...:
            del target[last]
    return row


def write(path: Path, rows: list[Any]) -> Path:
    if path.suffix == ".jsonl":
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    else:
        text = json.dumps(rows, ensure_ascii=False)
    path.write_bytes(text.encode("utf-8", errors="surrogatepass"))
    return path


def problems_of(path: Path, **options: Any) -> list[tuple[int | None, str | None, str]]:
    with pytest.raises(FactsError) as caught:
        read_facts(path, **options)
    assert {problem.file for problem in caught.value.problems} == {str(path)}
    return [(problem.row, problem.field, problem.message) for problem in caught.value.problems]
