"""Tucker factors of a layer's experts: computed from the weights wherever they are, or found in a cache."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lit_moeedit.models.experts import ExpertLayer
from lit_moeedit.preservation.moments_cache import digest
from lit_moeedit.preservation.second_moments import SecondMoments
from lit_moeedit.preservation.shaping import Preserve
from lit_moeedit.sharding.expert_reader import ExpertReader
from lit_moeedit.sharding.fingerprint import fingerprints
from lit_moeedit.sharding.ranks import Ranks
from lit_moeedit.solvers import Tucker, TuckerFactors
from lit_moeedit.solvers.tucker import whitening_roots

log = logging.getLogger(__name__)


def layer_factors(
    solver: Tucker,
    layer: ExpertLayer,
    moments: SecondMoments | None,
    preserve: Preserve,
    strength: float,
    ranks: Ranks,
    sizes: Sequence[int] | None = None,
) -> TuckerFactors:
    r"""Factors of a layer's experts as the solver wants them, for keys shaped as the preservation shapes them.

    Whitening takes one second moment ``C`` for all experts: the mean over all routed tokens, whichever expert they went
    to; of gated moments, the mean of the experts' ``C_j``. Where the published text is silent: a covariance penalty
    with ``S_j = (I + β C_j)^{-1/2}`` has whitened the keys already, so the metric is its ``I + β C``, and ``U_in`` is
    taken to the coordinates of shaped keys by ``(I + β C)^{1/2}``; whitening twice would no longer minimise the
    objective. (With whole modes the edit is that of the exact solver then.) Keys that a null space shapes are whitened
    by ``C`` itself.

    Args:
        solver: what to compute, and where its cache is.
        layer: the layer.
        moments: its second moments; needed for whitening.
        preserve: how its keys are shaped.
        strength: ``β`` of ``covariance``.
        ranks: the processes that compute together; each gets the same factors, and holds one block of the weights at a
            time besides its shard.
        sizes: ``(r_e, r_out, r_in)``, if they are not for the solver to choose.
    """
    reader = ExpertReader(layer.down_proj, layer.is_transposed, ranks)
    metric = None
    if solver.whiten:
        assert moments is not None
        counted = len(moments.total) * moments.tokens if moments.gated else moments.count.sum()
        metric = moments.total.sum(0) / counted.clamp_min(1)
        if preserve in ("covariance", "output"):
            metric = torch.eye(len(metric)).to(metric) + strength * metric
    sizes = solver.ranks if sizes is None else sizes
    path = None if solver.cache is None else solver.cache / f"layer_{layer.index}.safetensors"
    key = "" if path is None else _key(layer, metric, (sizes and tuple(sizes), solver.energy), ranks)
    factors = None
    if path is not None and path.is_file():
        try:
            factors = TuckerFactors.load(path, key)
            shape = tuple(len(basis) for basis in (factors.expert, factors.output, factors.input))
            if shape != tuple(reader.shape):
                factors = None
                raise ValueError(f"{path} holds factors of {shape}, the layer is {tuple(reader.shape)}")
        except (OSError, ValueError) as error:
            log.info("computing the factors of layer %d anew: %s", layer.index, error)
    if ranks.any(factors is None):
        factors = TuckerFactors.hosvd(reader, metric, sizes, solver.energy)
        if path is not None and ranks.rank == 0:
            try:
                factors.save(path, key)
            except OSError as error:
                log.warning("the factors of layer %d are not kept: %s", layer.index, error)
    assert factors is not None
    log.info("layer %d: ranks %s keep %s of its experts", layer.index, factors.ranks, factors.energy)
    device = layer.down_proj.device
    expert, output, inner = (u.to(device) for u in (factors.expert, factors.output, factors.input))
    ranks.check_errors()
    ranks.broadcast(expert, output, inner)
    if metric is not None and preserve in ("covariance", "output"):
        # the very inverse of what took the factors out of whitened coordinates: they are orthonormal there
        root, _ = whitening_roots(metric)
        inner = (root.to(inner.device) @ inner.double()).to(inner)
    return replace(factors, expert=expert, output=output, input=inner)


def _key(layer: ExpertLayer, metric: Tensor | None, settings: object, ranks: Ranks) -> str:
    """Says what factors are made of: the weights of the layer's experts, the metric, the settings."""
    parts = {"weights": layer.down_proj, **({} if metric is None else {"metric": metric})}
    return digest(fingerprints(parts, ranks), repr(settings))
