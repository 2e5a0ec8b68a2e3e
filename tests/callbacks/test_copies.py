"""Copies of the weights that callbacks, modules and optimizers hold get every edit, or the run is refused."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.optim.swa_utils import AveragedModel

from lit_moeedit.callbacks import KnowledgeEditing
from lit_moeedit.module import LitMoE
from tests.callbacks.conftest import CONFIG

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.*{text}")
    for text in ("callbacks used to create the checkpoint", "model that overrides the configure_model", "not resumable")
]

WEIGHT = "model.layers.1.mlp.experts.down_proj"


class OwnAverage(L.Callback):
    """Somebody's own average, in one of its forms."""

    def __init__(self, form: str) -> None:
        self.form = form
        self.held: Any = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        model = copy.deepcopy(pl_module.model)
        self.held = {
            "module": lambda: model,
            "average": lambda: AveragedModel(model),
            "state": lambda: model.state_dict(),
            "list": lambda: [parameter.detach() for parameter in model.parameters()],
            "object": lambda: SimpleNamespace(shadow=tuple(model.parameters())),
        }[self.form]()

    def find(self) -> torch.Tensor:
        held = self.held
        if isinstance(held, AveragedModel):
            held = held.module
        if isinstance(held, torch.nn.Module):
            return held.get_parameter(WEIGHT)
        tensors = held.values() if isinstance(held, dict) else held if isinstance(held, list) else held.shadow
        return [tensor for tensor in tensors if tensor.ndim == 3 and tensor.shape[-1] == 16][-1]


@pytest.fixture
def edit(tiny: Any, make_trainer: Any, tmp_path: Path) -> Any:
    def fit(*callbacks: L.Callback, module: Any = None, **settings: Any) -> Any:
        settings = {"at": {"step": 1}, **settings}
        editing = KnowledgeEditing(tiny.editor(layers=[1]), **settings)
        trainer = make_trainer(tmp_path, [*callbacks, editing], limit_train_batches=1, limit_val_batches=0)
        module = tiny.module() if module is None else module
        trainer.fit(module, tiny.data(samples_per_epoch=16))
        assert editing.editor.calls
        return module

    return fit


FORMS = {
    "module": r"OwnAverage\.held\.model\.layers\.1\.mlp\.experts\.down_proj",
    "state": r"OwnAverage\.held\['model\.layers\.1\.mlp\.experts\.down_proj'\]",
    "list": r"OwnAverage\.held\[\d+\]",
    "object": r"OwnAverage\.held\.shadow\[\d+\]",
}


@pytest.mark.parametrize("form", FORMS)
def test_a_copy_in_a_callback_is_named_edited_or_ignored(edit: Any, form: str, tiny: Any, caplog: Any) -> None:
    message = f"{FORMS[form]} is a copy of the weight {WEIGHT}"
    if form == "module":
        with pytest.raises(MisconfigurationException, match=message):
            edit(OwnAverage(form))
    else:  # it may be a snapshot
        edit(OwnAverage(form))
        assert [bool(re.search(message, record.getMessage())) for record in caplog.records].count(True) == 1
    fresh = tiny.module()
    fresh.configure_model()
    start = fresh.model.get_parameter(WEIGHT).detach()
    for choice in ("edit", "ignore"):
        own = OwnAverage(form)
        edit(own, other_copies=choice)
        assert bool((own.find() != start).any()) is (choice == "edit")


def test_an_averaged_model_of_a_callback_gets_the_edit(edit: Any) -> None:
    own = OwnAverage("average")
    before = []
    setup = own.on_fit_start
    own.on_fit_start = lambda *args: (setup(*args), before.append(own.find().detach().clone()))  # type: ignore
    edit(own)
    assert (own.find() - before[0]).norm() > 0.1


class Teaching(LitMoE):
    """Holds another copy of its model."""

    def __init__(self, form: str, **settings: Any) -> None:
        super().__init__(**settings)
        self.configure_model()
        other = copy.deepcopy(self.model)
        kinds = {"list": lambda: [other], "average": lambda: AveragedModel(other), "submodule": lambda: other}
        self.held = kinds[form]()


def test_copies_in_the_module(edit: Any) -> None:
    def made(form: str) -> Teaching:
        L.seed_everything(0, verbose=False)
        return Teaching(form, config=dict(CONFIG))

    with pytest.raises(MisconfigurationException, match=r"Teaching\.held\[0\]\.model\..* is a copy of the weight"):
        edit(module=made("list"))
    module = made("list")
    teacher = module.held[0].get_parameter(WEIGHT).detach().clone()
    edit(module=module, other_copies="ignore")
    assert torch.equal(module.held[0].get_parameter(WEIGHT), teacher)
    module = made("average")
    edit(module=module)
    assert not torch.equal(module.held.module.get_parameter(WEIGHT), teacher)
    # two models as submodules: which of them trains is not known
    with pytest.raises(MisconfigurationException, match="expected one transformers model in Teaching, found 2"):
        edit(module=made("submodule"))


def test_slow_weights_of_an_optimizer_are_refused_by_name(edit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    step = torch.optim.AdamW.step

    def slow(self: Any, closure: Any = None) -> Any:
        found = step(self, closure)
        for group in self.param_groups:
            for weight in group["params"]:
                self.state[weight]["z"] = weight.detach().clone()
        return found

    edit()  # moments are no copies
    monkeypatch.setattr(torch.optim.AdamW, "step", slow)
    with pytest.raises(MisconfigurationException, match=r"AdamW\.state\[Parameter\]\['z'\] is a copy of the weight"):
        edit()


def test_slow_weights_beside_the_state_of_an_optimizer_are_refused_by_name(edit: Any) -> None:
    class Lookahead(torch.optim.AdamW):
        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **settings)
            self.slow = [weight.detach().clone() for group in self.param_groups for weight in group["params"]]

    class Slow(LitMoE):
        def configure_optimizers(self) -> Any:
            return Lookahead(self.parameters(), lr=1e-3)

    with pytest.raises(MisconfigurationException, match=r"Lookahead\.slow\[\d+\] is a copy of the weight"):
        edit(module=Slow(config=dict(CONFIG)))


def test_the_setting_is_checked(tiny: Any) -> None:
    with pytest.raises(ValueError, match="other_copies must be one of refuse, edit, ignore; got 'keep'"):
        KnowledgeEditing(tiny.editor(), other_copies="keep")  # type: ignore[arg-type]
