"""A LightningModule around a Mixture-of-Experts causal language model of transformers."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.nn import functional as F
from torchmetrics.text import Perplexity
from transformers import PreTrainedModel
from typing_extensions import override

from lit_moeedit.adapters import add_lora, lora_settings, refuse_adapter_alone, resolved
from lit_moeedit.data.encoding import IGNORED_LABEL
from lit_moeedit.losses import balancing_loss, next_token_loss
from lit_moeedit.models.adapted import refuse_adapters
from lit_moeedit.models.experts import UnsupportedModelError, find_model
from lit_moeedit.module_state import StateOfModule
from lit_moeedit.optimizers import (
    adam_epsilon,
    allow_torch_optimizer_on_cpu,
    cosine_with_warmup,
    decay_groups,
    may_be_fused,
)
from lit_moeedit.pretrained import build_config, check_vocabulary, pretrained_tokenizer
from lit_moeedit.sharding.backends import refuse_parallelism
from lit_moeedit.sharding.clipping import clip_over_meshes
from lit_moeedit.sharding.loading import (
    constructed_whole,
    expert_parallel_model,
    fresh_model,
    pretrained_model,
    read_shards,
    shard_fully,
    stand_ins,
)
from lit_moeedit.sharding.shards import UnsupportedShardingError
from lit_moeedit.sharding.trained_weights import check_before_loading, load_what_is_there
from lit_moeedit.sharding.universal_checkpoint import mend_optimizer
from lit_moeedit.sharding.zero3_passes import regathering

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy
    from lightning.pytorch.utilities.types import OptimizerLRScheduler
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


class LitMoE(StateOfModule):
    """A LightningModule for any transformers MoE causal language model, with AdamW and a router loss.

    The learning rate has a warm-up and a cosine decay. Give exactly one of ``pretrained`` and ``config``. The model is
    made in :meth:`configure_model`, so that a strategy can shard it during its construction. Under
    ``ModelParallelStrategy`` the module shards each decoder layer, and then the model, by ``fully_shard``; a subclass
    with its own :meth:`configure_model` shards as it likes.

    Args:
        pretrained: a local path or hub id, read with ``from_pretrained`` (safetensors only).
        config: keys of a transformers config, which include ``model_type``; the weights are initialised.
        dtype: dtype of the weights, e.g. ``"float32"`` or ``"bfloat16"``.
        learning_rate: peak learning rate.
        weight_decay: weight decay of matrices; vectors (norms, biases) have none.
        warmup: share of the optimizer steps in which the learning rate rises to its peak.
        final_learning_rate: learning rate after the cosine, as a share of the peak.
        cosine_until: share of the optimizer steps at which the cosine ends.
        betas: coefficients of AdamW.
        router_loss: weight of the load-balancing loss of the routers; 0 leaves it out.
        label_smoothing: smoothing of the cross entropy.
        adapter: a ``peft.LoraConfig``, or a dict of its settings. The model gets these LoRA adapters, which alone are
            trained; its own weights are frozen. Needs the extra ``peft``.
        adapter_only_checkpoints: whether checkpoints hold only the weights that are trained. The others come from
            ``pretrained`` again. Under DeepSpeed this sets ``exclude_frozen_parameters`` of the strategy.
        expert_parallel_size: number of ranks that share the experts of a layer, each with whole experts, by
            transformers' expert parallelism. Needs ``pretrained``, and ``ModelParallelStrategy``, whose FSDP2 shards
            the rest; not with ``adapter``.

    Batches are dicts of ``input_ids``, ``attention_mask`` and ``labels``, each int64 ``[batch, length]``; positions
    with label -100 are ignored. The losses are those of the batches of all ranks together, so that training does not
    depend on how a batch is split. Validation logs ``val/perplexity``, ``val/loss`` and ``val/accuracy``, and testing
    the same with ``test/``.

    Raises:
        ValueError: not exactly one of ``pretrained`` and ``config`` is given, or a value is out of range.
        ModuleNotFoundError: ``adapter`` is given, and peft is not installed.
        MisconfigurationException: when the run starts, under ``FSDPStrategy``, or ``ModelParallelStrategy`` with tensor
            parallelism. Also under ZeRO stage 3 or FSDP2 with LoRA on experts, and with ``adapter_only_checkpoints``
            beside ``WeightAveraging``.

    Example:
        >>> module = LitMoE(config={"model_type": "qwen3_moe", "hidden_size": 32, "num_hidden_layers": 1,
        ...     "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "moe_intermediate_size": 16,
        ...     "num_experts": 4, "num_experts_per_tok": 2, "vocab_size": 50})
        >>> module.configure_model()
        >>> module(input_ids=torch.tensor([[1, 2, 3]])).logits.shape
        torch.Size([1, 3, 50])
    """

    def __init__(
        self,
        pretrained: str | None = None,
        config: dict[str, Any] | None = None,
        dtype: str = "float32",
        learning_rate: float = 1e-3,
        weight_decay: float = 0.1,
        warmup: float = 0.05,
        final_learning_rate: float = 0.1,
        cosine_until: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.95),
        router_loss: float = 0.01,
        label_smoothing: float = 0.0,
        adapter: Any = None,
        adapter_only_checkpoints: bool = False,
        expert_parallel_size: int = 1,
    ) -> None:
        super().__init__()
        if (pretrained is None) == (config is None):
            raise ValueError(
                "give exactly one of 'pretrained' (a path or hub id) and 'config' (for fresh weights); a config like "
                "recipe:lora, which overlays another, has neither: give that one before it"
            )
        if config is not None and "model_type" not in config:
            raise ValueError(f"config needs 'model_type' (for example qwen3_moe), got the keys {sorted(config)}")
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"dtype must name a torch dtype such as 'float32' or 'bfloat16', got {dtype!r}")
        if not 0.0 <= warmup < 1.0:
            raise ValueError(f"warmup is a share of all steps, in [0, 1), got {warmup}")
        if not warmup < cosine_until <= 1.0:
            raise ValueError(
                f"cosine_until is a share of all steps after the warm-up, in (warmup, 1], got {cosine_until}"
            )
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
        if adapter_only_checkpoints and (adapter is None or pretrained is None):
            raise ValueError(
                "adapter_only_checkpoints needs 'adapter', and 'pretrained', from which the other weights come again"
            )
        if expert_parallel_size < 1 or (expert_parallel_size > 1 and (pretrained is None or adapter is not None)):
            raise ValueError(
                "expert_parallel_size must be at least 1, and above 1 it needs 'pretrained', from which each rank "
                f"reads its experts, and no 'adapter'; got {expert_parallel_size}"
            )
        adapter = None if adapter is None else lora_settings(adapter)
        self.save_hyperparameters()
        # a config's class path would have to be imported when a checkpoint is read
        self.hparams["adapter"] = adapter
        self.model: PreTrainedModel | PeftModel | None = None
        self.perplexity = Perplexity(ignore_index=IGNORED_LABEL)
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._weight_decays: list[float] = []
        self._eps: float | None = None
        self._is_sharded = False  # by this module, with FSDP2

    @override
    def configure_model(self) -> None:
        if self.model is not None:
            return
        dtype = getattr(torch, self.hparams["dtype"])
        strategy = self._trainer.strategy if self._trainer is not None else None
        is_own = not is_overridden("configure_model", self, LitMoE)
        if is_own:
            _refuse_strategy(strategy)
        size: int = self.hparams["expert_parallel_size"]
        if size > 1 and strategy is not None:
            self.model = expert_parallel_model(self.hparams["pretrained"], dtype, strategy, size).train()
            return
        is_fully_sharded = is_own and isinstance(strategy, ModelParallelStrategy)
        mesh = self.device_mesh["data_parallel"] if is_fully_sharded and self.device_mesh is not None else None
        # which are made of whole weights of the base
        needs_whole = {"use_dora", "modules_to_save"} & (self.hparams["adapter"] or {}).keys()
        if self.hparams["pretrained"] is not None and mesh is not None and not needs_whole:
            self.model = read_shards(self.hparams["pretrained"], dtype, mesh)
        elif self.hparams["pretrained"] is not None:
            self.model = pretrained_model(self.hparams["pretrained"], dtype, strategy)
        else:
            self.model = fresh_model(build_config(self.hparams["config"]), dtype, strategy)
        if self.hparams["adapter"] is not None:
            self._add_adapter(strategy)
        self.model.train()
        if mesh is not None:
            shard_fully(find_model(self), mesh)
            self._is_sharded = True

    def _add_adapter(self, strategy: Strategy | None) -> None:
        with constructed_whole(strategy), stand_ins(find_model(self)):
            in_float32 = not isinstance(strategy, DeepSpeedStrategy)
            self.model = add_lora(find_model(self), self.hparams["adapter"], in_float32)
        self.hparams["adapter"] = resolved(self.hparams["adapter"], self.model)
        try:
            refuse_adapters(self.model, strategy)
        except UnsupportedModelError as error:
            raise MisconfigurationException(f"LitMoE: {error}") from error
        if self.hparams["adapter_only_checkpoints"] and isinstance(strategy, ModelParallelStrategy):
            load_what_is_there(strategy, self, self.state_dict)
            self.hides_frozen = True
        elif isinstance(strategy, ModelParallelStrategy):
            check_before_loading(strategy, self, functools.partial(refuse_adapter_alone, self, adapts=True))
        if self.hparams["adapter_only_checkpoints"] and isinstance(strategy, DeepSpeedStrategy):
            strategy.exclude_frozen_parameters = True

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer of ``pretrained``; without one, that of the data module, if it has one."""
        if self._tokenizer is None and self.hparams["pretrained"] is not None:
            self._tokenizer = pretrained_tokenizer(self.hparams["pretrained"])
        if self._tokenizer is None and self._trainer is not None:
            return getattr(getattr(self._trainer, "datamodule", None), "tokenizer", None)
        return self._tokenizer

    @override
    def on_fit_start(self) -> None:
        assert self.model is not None
        _refuse_strategy(self.trainer.strategy, self)
        callbacks: list[L.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        if self.hparams["adapter_only_checkpoints"] and any(isinstance(one, WeightAveraging) for one in callbacks):
            raise MisconfigurationException(
                "LitMoE: WeightAveraging cannot load its average from checkpoints without the base, so the run could "
                "not be resumed; set adapter_only_checkpoints to False, or remove the callback"
            )
        if self.tokenizer is not None:
            check_vocabulary(self.tokenizer, find_model(self))

    @override
    def on_train_start(self) -> None:
        for optimizer in self.trainer.optimizers:
            mend_optimizer(optimizer, self._weight_decays)
            # a checkpoint of a run in another precision has the epsilon of that run
            for group in optimizer.param_groups if self._eps is not None else ():
                group["eps"] = self._eps
        self._use_changed_settings()

    def _use_changed_settings(self) -> None:
        """Give optimizer and scheduler, which have the state of the checkpoint, the settings that differ from it."""
        for optimizer in self.trainer.optimizers:
            for group, decay in zip(optimizer.param_groups, self._weight_decays, strict=False):
                own = {"weight_decay": decay, "betas": tuple(self.hparams["betas"])}
                group |= {name: value for name, value in own.items() if name in self.changed}
        if self.changed.isdisjoint(("learning_rate", "warmup", "final_learning_rate", "cosine_until")):
            return
        for config in self.trainer.lr_scheduler_configs:
            scheduler: Any = config.scheduler
            scheduler.base_lrs = [self.hparams["learning_rate"]] * len(scheduler.base_lrs)
            rates = [
                base * factor(scheduler.last_epoch)
                for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
            ]
            for group, rate, base in zip(scheduler.optimizer.param_groups, rates, scheduler.base_lrs, strict=True):
                group |= {"lr": rate, "initial_lr": base}
            scheduler._last_lr = rates

    @override
    def forward(self, **inputs: Tensor) -> Any:
        assert self.model is not None, "configure_model() makes the model; the Trainer calls it"
        # peft calls the method of the model inside of it, which gathers no weights of FSDP2
        is_inside = self._is_sharded and self.hparams["adapter"] is not None
        model = find_model(self) if is_inside else self.model
        return model(**inputs)

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        router_loss: float = self.hparams["router_loss"]
        with regathering(self):
            outputs = self._run(batch, **({"output_router_logits": True} if router_loss else {}))
        ranks = 1 if self._trainer is None else self._trainer.world_size
        smoothing = self.hparams["label_smoothing"]
        loss = next_token_loss(outputs.logits, batch["labels"], smoothing, ranks, self._all_reduce)
        self.log("train/loss", loss.value, prog_bar=True)
        auxiliary = getattr(outputs, "aux_loss", None)
        if not router_loss or auxiliary is None:
            return loss.local
        k = getattr(self.model, "num_experts_per_tok", None)
        mask, router_logits = batch["attention_mask"], outputs.router_logits
        balance = balancing_loss(auxiliary, router_logits, mask, k, ranks, self._all_reduce)
        self.log("train/router_loss", balance.value)
        return loss.local + router_loss * balance.local

    def replay_loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Compute the loss of statements that :class:`~lit_moeedit.callbacks.EditReplay` adds to a batch.

        It is that of the batch, without the router loss.
        """
        with regathering(self):
            logits = self._run(batch).logits
        ranks = 1 if self._trainer is None else self._trainer.world_size
        return next_token_loss(logits, batch["labels"], self.hparams["label_smoothing"], ranks, self._all_reduce).local

    def _run(self, batch: dict[str, Tensor], **settings: Any) -> Any:
        # Not self.model(...): a call of this module resets the order of modules that DeepSpeed records under ZeRO-3.
        # DeepSpeed fails if ranks differ in this order, as they do if each expert calls its activation separately.
        return self(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False, **settings)

    def _all_reduce(self, tensor: Tensor) -> Tensor:
        total = self.trainer.strategy.reduce(tensor, reduce_op="sum")
        assert isinstance(total, torch.Tensor)
        return total

    @override
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    @override
    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    @override
    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Predict the most likely next token at every position, int64 ``[batch, length]``."""
        logits: Tensor = self._run(batch).logits
        return logits.argmax(-1)

    def _evaluate(self, batch: dict[str, Tensor], stage: str) -> None:
        logits, labels = self._run(batch).logits[:, :-1].float(), batch["labels"][:, 1:]
        self._perplexity_on(logits.device)(logits, labels)
        counted = labels != IGNORED_LABEL
        size = int(counted.sum())
        accuracy = (logits.argmax(-1) == labels)[counted].float().mean()
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED_LABEL)
        self.log(f"{stage}/loss", loss, batch_size=size, sync_dist=True)
        self.log(f"{stage}/accuracy", accuracy, prog_bar=True, batch_size=size, sync_dist=True)
        self.log(f"{stage}/perplexity", self.perplexity, prog_bar=True)

    def _perplexity_on(self, device: torch.device) -> Perplexity:
        """Move the metric to the device of the logits, with its sums in float32.

        Its state follows the module. DeepSpeed does not move a module that it shards during construction, and
        ``bf16-true`` or ``16-true`` would count tokens in 8 or 11 bits.
        """
        self.perplexity.to(device).set_dtype(torch.float32)
        return self.perplexity

    @override
    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip gradients, also under expert parallelism, where torch and Lightning cannot.

        Args:
            optimizer: the optimizer.
            gradient_clip_val: largest norm of all gradients together, or largest absolute value of an element.
            gradient_clip_algorithm: ``"norm"`` (the default) or ``"value"``.
        """
        if not clip_over_meshes(optimizer, gradient_clip_val, gradient_clip_algorithm):
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        parameters = [p for p in self.parameters() if p.requires_grad]
        groups = decay_groups(parameters, self.hparams["weight_decay"])
        self._weight_decays = [group["weight_decay"] for group in groups]
        self._eps = adam_epsilon(self.trainer.strategy, parameters)
        optimizer = torch.optim.AdamW(
            groups,
            lr=self.hparams["learning_rate"],
            betas=self.hparams["betas"],
            eps=self._eps,
            fused=True if may_be_fused(self) else None,
        )
        allow_torch_optimizer_on_cpu(self.trainer.strategy)
        warmup, final, end = (self.hparams[name] for name in ("warmup", "final_learning_rate", "cosine_until"))
        factor = cosine_with_warmup(self.trainer.estimated_stepping_batches, warmup, final, end)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


# Lightning must not take it for an override that the user made, of which it warns under DeepSpeed
functools.update_wrapper(
    LitMoE.configure_gradient_clipping, L.LightningModule.configure_gradient_clipping, assigned=(), updated=()
)


def _refuse_strategy(strategy: Strategy | None, module: LitMoE | None = None) -> None:
    """Refuse a strategy that the module does not shard for: each rank would train a replica of its own."""
    try:
        refuse_parallelism(module, strategy)
    except UnsupportedShardingError as error:
        raise MisconfigurationException(f"LitMoE: {error}") from error
