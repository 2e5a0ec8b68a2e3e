"""KnowledgeEditing works with modules and data modules of other people, and says what it cannot work with."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from transformers import LlamaConfig, LlamaForCausalLM

from lit_moeedit.callbacks import KnowledgeEditing
from lit_moeedit.data import FactsError
from lit_moeedit.editing import Editor
from lit_moeedit.planning.family_catalog import small_model

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.*{text}")
    for text in (
        "callbacks used to create the checkpoint",
        "in eval mode at the start",
        "logs directory",
        "not resumable",
    )
]


# -- any module -------------------------------------------------------------------------------------------------------


class PlainModule(L.LightningModule):
    """A module of somebody who has never heard of this package."""

    def __init__(self, network, tokenizer=None):
        super().__init__()
        self.network = network
        self.tokenizer = tokenizer

    def training_step(self, batch, batch_idx):
        return self.network(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.randint(3, 400, (4, 8)), batch_size=2)


TEXTS = ["The sea is deep and the river is long.", "Who lives in the city eats bread."]


def test_a_plain_module_with_facts_and_texts_as_lists(tiny, make_trainer, tmp_path, make_model, tokenizer, facts):
    module = PlainModule(make_model("olmoe"), tokenizer)
    editing = KnowledgeEditing(
        tiny.editor(layers=[1]), facts=facts, preservation=TEXTS, at={"epoch": 1}, on_failure="keep"
    )
    make_trainer(tmp_path, [editing], max_epochs=2).fit(module)
    assert [fact.key for fact in editing.applied_facts] == [fact.key for fact in facts]
    metrics = editing.evaluate(module).metrics
    assert metrics["efficacy"] >= 2 / 3


def test_other_data_modules_are_not_asked_for_what_they_do_not_know(
    tiny, make_trainer, tmp_path, make_model, tokenizer, facts
):
    class Data(L.LightningDataModule):
        def edit_facts(self):
            return facts[:1]

        def preservation_texts(self):
            return iter(TEXTS)

        def train_dataloader(self):
            return torch.utils.data.DataLoader(torch.randint(3, 400, (4, 8)), batch_size=2)

    editing = KnowledgeEditing(tiny.editor(layers=[0]), on_failure="keep")
    make_trainer(tmp_path, [editing]).fit(PlainModule(make_model("mixtral"), tokenizer), Data())
    assert len(editing.applied_facts) == 1


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def refuse(make_trainer, tmp_path, tiny, make_model, tokenizer, facts):
    """``refuse(message, …)``: a run refuses to start with this message, before the editor is asked for anything."""

    def check(message, module=None, error=MisconfigurationException, editor=None, **changes):
        editor = editor or tiny.editor(layers=[1])
        arguments = {"facts": facts, "preservation": TEXTS, **changes}
        module = PlainModule(make_model("qwen3_moe"), tokenizer) if module is None else module
        with pytest.raises(error, match=message) as caught:
            make_trainer(tmp_path, [KnowledgeEditing(editor, **arguments)]).fit(module)
        assert editor.calls == [] and module.trainer.global_step == 0
        return caught.value

    return check


def test_a_dense_model_is_refused(refuse, tokenizer):
    config = LlamaConfig(
        vocab_size=420, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    refuse(
        "KnowledgeEditing: LlamaForCausalLM has no layer with routed experts",
        PlainModule(LlamaForCausalLM(config), tokenizer),
    )


def test_a_family_with_a_norm_behind_its_experts_is_refused(refuse, tokenizer):
    module = PlainModule(small_model("flex_olmo", vocab_size=420), tokenizer)
    refuse("KnowledgeEditing: layer 1 of FlexOlmoForCausalLM normalises the output of its experts", module)


def test_a_module_without_a_model_is_refused(refuse, tokenizer):
    refuse("expected one transformers model in PlainModule, found 0", PlainModule(torch.nn.Linear(2, 2), tokenizer))


def test_a_layer_without_experts_is_refused(refuse, tiny, make_model, tokenizer):
    refuse(r"layer 7 of Qwen3MoeForCausalLM has no routed experts.*0", editor=tiny.editor(layers=[1, 7]))
    dense_first = PlainModule(make_model("deepseek_v3"), tokenizer)
    refuse("layer 0 of DeepseekV3ForCausalLM has no routed experts", dense_first, editor=tiny.editor(layers=[0]))


def test_without_a_tokenizer(refuse, make_model):
    module = PlainModule(make_model("qwen3_moe"))
    refuse("KnowledgeEditing needs the model's tokenizer: .* attribute 'tokenizer' of PlainModule", module)


@pytest.mark.parametrize("nothing", [None, []])
def test_without_facts(refuse, nothing):
    refuse("KnowledgeEditing has no facts to edit", facts=nothing)


@pytest.mark.parametrize("nothing", [None, []])
def test_without_preservation_text(refuse, tiny, make_trainer, tmp_path, make_model, tokenizer, facts, nothing):
    refuse("the editor needs text whose behaviour is to be kept", preservation=nothing)
    editing = KnowledgeEditing(
        tiny.editor(layers=[1], preserve="none"), facts=facts, preservation=nothing, on_failure="keep"
    )
    make_trainer(tmp_path, [editing]).fit(PlainModule(make_model("qwen3_moe"), tokenizer))
    assert len(editing.applied_facts) == len(facts)


def test_preservation_text_from_a_file(refuse, tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("One.\n\n  \nTwo.\n", encoding="utf-8")
    editing = KnowledgeEditing(Editor(layers=[0]), preservation=str(path))
    assert editing.preservation_texts(SimpleNamespace()) == ["One.", "Two."]
    path.write_text("\n \n", encoding="utf-8")
    refuse("needs text whose behaviour is to be kept", preservation=str(path))


def test_a_fact_whose_subject_is_not_in_its_prompt(refuse, facts):
    bad = [facts[0], replace(facts[1], subject="Lake Onega")]
    refuse("row 2, field 'prompt': does not contain the subject 'Lake Onega'", error=FactsError, facts=bad)


def test_a_bad_facts_file_is_named_with_its_row(refuse, facts, tmp_path, make_trainer, tiny, make_model, tokenizer):
    path = tmp_path / "facts.jsonl"
    rows = [fact.to_dict() for fact in facts[:2]]
    rows.insert(1, {**rows[1], "target_new": ""})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    refuse(r"facts\.jsonl, row 2, field 'target_new'", error=FactsError, facts=str(path))
    # without strictness the row is left out
    editing = KnowledgeEditing(
        tiny.editor(layers=[1]), facts=str(path), preservation=TEXTS, strict=False, on_failure="keep"
    )
    make_trainer(tmp_path, [editing]).fit(PlainModule(make_model("qwen3_moe"), tokenizer))
    assert len(editing.applied_facts) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_efficacy": 1.5}, r"min_efficacy is a fraction in \[0, 1\], got 1.5"),
        ({"min_specificity_retained": -0.1}, "min_specificity_retained is a fraction"),
        ({"min_efficacy": float("nan")}, "min_efficacy is a fraction"),
        ({"renew_every_n_steps": 0}, "renew_every_n_steps must be at least 1"),
        ({"max_renewals": -1}, "max_renewals must be at least 0"),
        ({"at": "tomorrow"}, "got 'tomorrow'"),
        ({"at": {"epoch": -1}}, "epoch must be a whole number"),
    ],
)
def test_bad_arguments(tiny, arguments, message):
    with pytest.raises(ValueError, match=message):
        KnowledgeEditing(tiny.editor(), **arguments)


def test_the_tokenizer_is_not_known_before_the_run(tiny):
    with pytest.raises(RuntimeError, match="not known before the run starts"):
        _ = KnowledgeEditing(tiny.editor()).tokenizer
