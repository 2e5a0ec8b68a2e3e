"""The further measures of a run: their names, and what they are measured on."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import lightning as L
from transformers import PreTrainedTokenizerBase

from lit_moeedit.callbacks.resources import from_datamodule
from lit_moeedit.data.facts import Fact
from lit_moeedit.data.neutral import neutral_texts
from lit_moeedit.data.probes import PROBE_KINDS
from lit_moeedit.editing.further import FurtherMeasures, HeldOut
from lit_moeedit.models.token_budget import Budget
from lit_moeedit.sharding.ranks import Ranks

log = logging.getLogger(__name__)


def find_measures(
    trainer: L.Trainer,
    names: Sequence[str],
    facts: Sequence[Fact],
    tokenizer: PreTrainedTokenizerBase,
    token_budget: Budget,
    heading: str = "",
) -> FurtherMeasures | None:
    """Prepare further measures; every rank calls this.

    General ability is measured on the data module's ``held_out_statements()``, if it has some, and on neutral texts.

    Args:
        trainer: the trainer, for its data module.
        names: names of the measures, checked.
        facts: all facts of the callback, for a warning about probes that none of them has.
        tokenizer: the model's tokenizer.
        token_budget: maximum number of tokens in one forward, or ``auto``.
        heading: beginning of messages.

    Returns:
        The measures; ``None`` without a name.
    """
    if not names:
        return None
    kinds = {probe.kind for fact in facts for probe in fact.probes}
    missing = [name for name in names if name in PROBE_KINDS and name not in kinds]
    if missing:
        log.warning("%sno fact has probes for measure: %s, so nothing is measured there", heading, ", ".join(missing))
    held_out = HeldOut()
    if "general_ability" in names:
        statements = list(from_datamodule(trainer, "held_out_statements") or ())
        Ranks.current().check_same("the held-out statements", [repr(row) for row in statements])
        if not statements:
            log.warning("%sno held_out_statements() of a data module, so no held_out_accuracy is measured", heading)
        held_out = HeldOut(statements, neutral_texts())
    return FurtherMeasures(names, tokenizer, held_out, token_budget)
