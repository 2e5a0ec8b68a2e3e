"""DeepSpeed on machines without GPUs."""

from __future__ import annotations

import copy
import importlib.util
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DeepSpeedStrategy, StrategyRegistry
from typing_extensions import override

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

NAME = "deepspeed_cpu_stage_{}"


class DeepSpeedCPUStrategy(DeepSpeedStrategy):
    """Lightning's ``DeepSpeedStrategy`` for CPUs: every process is a rank, and ranks communicate through gloo.

    The Trainer knows its stages by the names ``deepspeed_cpu_stage_0`` to ``deepspeed_cpu_stage_3``.

    Args:
        stage: 0 replicates everything; 1 shards the optimizer's state, 2 the gradients, too, 3 the parameters, too.
        param_persistence_threshold: parameters with fewer elements than this stay whole on every rank in stage 3;
            DeepSpeed's own default is 100,000.
        allgather_bucket_size: number of elements that are gathered at once.
        reduce_bucket_size: number of elements whose gradients are averaged at once.
        overlap_comm: whether to average gradients during the backward pass, for which a CPU has no second stream.
        load_universal: whether the checkpoint to resume from was converted by DeepSpeed's ``ds_to_universal``, which a
            run that is sharded over another number of ranks needs. The same as ``checkpoint: {load_universal: true}``
            in a DeepSpeed config.
        config: a DeepSpeed config or the path of one. It replaces all settings except
            ``param_persistence_threshold`` and ``load_universal``.
        kwargs: further arguments of ``lightning.pytorch.strategies.DeepSpeedStrategy``.

    Raises:
        ModuleNotFoundError: if deepspeed or accelerate is not installed.
        RuntimeError: if DeepSpeed was set to another type of device, or the Trainer uses another accelerator.

    Example:
        >>> from lightning.pytorch.strategies import StrategyRegistry
        >>> [name for name in StrategyRegistry.available_strategies() if name.startswith("deepspeed_cpu")]
        ['deepspeed_cpu_stage_0', 'deepspeed_cpu_stage_1', 'deepspeed_cpu_stage_2', 'deepspeed_cpu_stage_3']
    """

    strategy_name = "deepspeed_cpu"

    def __init__(
        self,
        stage: int = 2,
        param_persistence_threshold: int | None = None,
        allgather_bucket_size: int = 10_000_000,
        reduce_bucket_size: int = 10_000_000,
        overlap_comm: bool = False,
        load_universal: bool = False,
        config: str | Path | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        missing = [name for name in ("deepspeed", "accelerate") if importlib.util.find_spec(name) is None]
        if missing:
            raise ModuleNotFoundError(
                f"{type(self).__name__} needs {' and '.join(missing)}: pip install 'lit-moeedit[deepspeed]'"
            )
        # DeepSpeed reads this once, when it is imported, and would otherwise choose by the machine's devices
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        super().__init__(
            stage=stage,
            allgather_bucket_size=allgather_bucket_size,
            reduce_bucket_size=reduce_bucket_size,
            overlap_comm=overlap_comm,
            # Lightning writes into it: the same dict could not be given to a second Trainer
            config=copy.deepcopy(config),
            **kwargs,
        )
        assert isinstance(self.config, dict)
        # validation and testing read it even if the user's config lacks it
        self.config.setdefault("zero_allow_untested_optimizer", True)
        if load_universal:
            self.config.setdefault("checkpoint", {})["load_universal"] = True
        if param_persistence_threshold is not None:
            zero = self.config.setdefault("zero_optimization", {"stage": 0})
            zero["stage3_param_persistence_threshold"] = param_persistence_threshold

    @property
    @override
    def root_device(self) -> torch.device:
        # DeepSpeed asks for an index
        return torch.device("cpu", 0)

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        # Lightning has divided the loss by the number of accumulated batches; DeepSpeed would divide it again
        return super().backward(closure_loss, optimizer, *args, **{"scale_wrt_gas": False, **kwargs})

    @override
    def setup_environment(self) -> None:
        if not isinstance(self.accelerator, CPUAccelerator):
            raise RuntimeError(
                f"{type(self).__name__} runs on CPUs, but the Trainer uses {type(self.accelerator).__name__}: set "
                "accelerator='cpu', or use Lightning's own strategy='deepspeed_stage_3' (or _1, _2)"
            )
        import deepspeed

        device = deepspeed.accelerator.get_accelerator().device_name()
        if device != "cpu":
            raise RuntimeError(
                f"DeepSpeed is set up for {device!r}: unset DS_ACCELERATOR or set it to 'cpu', and do not import "
                "deepspeed before the strategy is made"
            )
        # DeepSpeed would compile this operation for inference at the first start, under a file lock that outlives a
        # killed process
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # DeepSpeed calls these, and users cannot change that
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
        # the parent's check is for GPUs
        super(DeepSpeedStrategy, self).setup_environment()

    @override
    def setup_distributed(self) -> None:
        # the parent's, without the check of the GPUs' indices
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()


for _stage in range(4):
    StrategyRegistry.register(
        NAME.format(_stage),
        DeepSpeedCPUStrategy,
        description=f"DeepSpeed ZeRO Stage {_stage} on CPUs",
        override=True,
        stage=_stage,
    )
