"""Hidden states at edit tokens, with gradients: that edits have put somewhere, and that training moves away."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_moeedit.data.encoding import EditToken, pad, position_ids, token_batches
from lit_moeedit.data.facts import Fact
from lit_moeedit.editing.target_rows import EncodedFacts
from lit_moeedit.models.experts import ExpertLayer
from lit_moeedit.models.partial_forward import evaluating, inference, layer_output


def edit_prompts(
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[Fact],
    contexts: Sequence[str],
    token: EditToken,
    every: bool = False,
) -> dict[str, list[list[int]]]:
    """Encode the prompts of facts up to their edit tokens.

    Args:
        tokenizer: the tokenizer.
        facts: the facts.
        contexts: texts put before the prompts.
        token: the edit token.
        every: see :meth:`EncodedFacts.of`.

    Returns:
        By fact key, the token ids of its prompt after each context, up to each edit token.

    Raises:
        ValueError: if a fact cannot be encoded.
    """
    encoded = EncodedFacts.of(tokenizer, facts, contexts, "", token, every)
    ids = (encoding.ids[: edit_token + 1] for encoding in encoded.prompts for edit_token in encoding.edit_tokens)
    found: dict[str, list[list[int]]] = {fact.key: [] for fact in facts}
    for fact, up_to_token in zip(encoded.fact_index, ids, strict=True):
        found[facts[fact].key].append(up_to_token)
    return found


def edit_states(model: PreTrainedModel, layer: ExpertLayer, prompts: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """Compute the output of a layer at the last token of each prompt, ``[n, d_model]``, in evaluation mode.

    Gradients reach the parameters up to the layer if they are enabled.

    Args:
        model: the model.
        layer: the layer; those above it are not computed.
        prompts: token ids of ``n`` prompts.
        pad_id: token id of the padding.
    """
    ids, mask = (tensor.to(model.device) for tensor in pad(prompts, pad_id))
    with evaluating(model):
        hidden = layer_output(model, layer, ids, mask, position_ids(mask)).hidden
    return hidden[torch.arange(len(prompts), device=hidden.device), mask.sum(-1) - 1]


def measure_states(
    model: PreTrainedModel, layer: ExpertLayer, prompts: Sequence[Sequence[int]], pad_id: int, token_budget: int
) -> Tensor:
    """Compute :func:`edit_states` without gradients, float32 ``[n, d_model]`` on the CPU.

    Args:
        model: the model.
        layer: the layer.
        prompts: token ids of ``n`` prompts.
        pad_id: token id of the padding.
        token_budget: maximum number of tokens of a batch, padding included.
    """
    found = torch.empty(len(prompts), model.config.get_text_config().hidden_size)
    with inference(model):
        for batch in token_batches([len(prompt) for prompt in prompts], token_budget):
            found[batch] = edit_states(model, layer, [prompts[i] for i in batch], pad_id).float().cpu()
    return found


def relative_distance(states: Tensor, held: Tensor) -> Tensor:
    """Compute the squared distance of hidden states from where they are held, over the squared norm of the latter.

    Args:
        states: ``[n, d_model]``.
        held: likewise.

    Returns:
        The mean over the rows, a scalar, in float32.

    Example:
        >>> float(relative_distance(torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0]])))
        1.0
    """
    held = held.to(states.device).float()
    return ((states.float() - held).square().sum(-1) / held.square().sum(-1)).mean()
