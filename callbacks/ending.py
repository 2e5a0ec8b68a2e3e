"""The callback that ends a run on all ranks when one of them is told to end or fails."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

from lit_moeedit.callbacks.named import callbacks_of, insert_callback
from lit_moeedit.sharding.ranks import Ranks, RankTerminated
from lit_moeedit.sharding.told_to_end import DeferredSignal
from lit_moeedit.sharding.watch import Watch

log = logging.getLogger(__name__)


class EndTogether(L.Callback):
    """End a run on all ranks when one of them gets SIGTERM or SIGINT or fails, within a bounded time.

    :class:`~lit_moeedit.callbacks.KnowledgeEditing` and the command add it to the trainer by themselves.

    SIGTERM ends the run after the current training batch, or at the next check within an edit, which is undone; the
    exit code is 143. With several ranks it does not matter which of them got the signal. SIGINT (Ctrl-C) does the same
    with several ranks, with a ``KeyboardInterrupt``; the second one interrupts at once, as it does in one process.

    Any other exception on one rank alone is told to the others, see :class:`~lit_moeedit.sharding.watch.Watch`: those
    that wait for it end within some seconds, too.

    Example:
        >>> from lightning import Trainer
        >>> trainer = Trainer(callbacks=[EndTogether()], logger=False, accelerator="cpu")
    """

    def __init__(self) -> None:
        self._ranks: Ranks | None = None
        self._watching = ExitStack()
        self._told = False

    @classmethod
    def add_to(cls, trainer: L.Trainer) -> None:
        """Add this callback to a trainer that has none, before those that save checkpoints."""
        if not callbacks_of(trainer, cls):
            insert_callback(trainer, cls())
        # no hook of callbacks comes before the data is prepared, for which ranks wait for each other;
        # it is a partial, because some launchers pickle it
        strategy = trainer.strategy
        if not isinstance(strategy.setup_environment, partial):
            start = partial(_set_up_and_watch, callbacks_of(trainer, cls)[0], strategy.setup_environment)
            strategy.setup_environment = start  # type: ignore[method-assign]

    def watch_ranks(self) -> None:
        """Let this process be told of the failures of others from now on, as soon as they can talk to each other."""
        self._watching.close()
        self._ranks = None
        if (watch := Watch.of()) is not None:
            self._watching.enter_context(watch.watching())

    # -- signals ------------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.watch_ranks()
        self._ranks = ranks = Ranks.current()
        self._told = False
        if ranks.size > 1:

            def forward(number: int, frame: FrameType | None) -> None:
                self._told = True
                if trainer.strategy.launcher is not None:
                    trainer.strategy.launcher.kill(number)

            # Lightning's own broadcasts wherever the main thread may be, among other collective operations
            trainer._signal_connector._sigterm_notifier_fn = forward  # type: ignore[method-assign, assignment]

    def _defer_signals(self, trainer: L.Trainer) -> None:
        """Take over the handlers that Lightning has registered; it puts back those before them."""
        if threading.current_thread() is not threading.main_thread():
            return
        term: Any = signal.getsignal(signal.SIGTERM)
        if not isinstance(term, DeferredSignal) and trainer._signal_connector._original_handlers:
            before = term if callable(term) else None
            deferred = DeferredSignal(lambda: SIGTERMException(128 + signal.SIGTERM), before)
            deferred.received = self._told  # while Lightning's own was there
            signal.signal(signal.SIGTERM, deferred)
        # in one process an interrupt may come anywhere
        if trainer.world_size > 1 and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, DeferredSignal(lambda: KeyboardInterrupt("SIGINT"), twice=True))

    @override
    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._defer_signals(trainer)

    on_train_start = on_validation_start = on_test_start = on_predict_start = on_sanity_check_start

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._check(trainer)

    @override
    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._check(trainer)

    on_test_epoch_start = on_predict_epoch_start = on_validation_epoch_start

    @override
    def on_predict_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        # the only loop in which Lightning does not look; the loaders of several ranks may differ in length
        if self._ranks is not None and self._ranks.size == 1:
            self._ranks.check_errors()

    def _check(self, trainer: L.Trainer) -> None:
        # in one process Lightning looks for itself, after each batch
        if self._ranks is not None and self._ranks.size > 1:
            self._ranks.check_errors()

    # -- failures -----------------------------------------------------------------------------------------------------

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        DeferredSignal.take()  # it ends anyway
        if isinstance(exception, SIGTERMException):
            exception.code = 128 + signal.SIGTERM  # otherwise 0, as if the run had finished
        if isinstance(exception, SIGTERMException | RankTerminated):
            log.warning("the run was told to end by SIGTERM; it has not finished")
        watch = Watch.of()
        if watch is None:
            return
        if self._ranks is not None:
            self._ranks.leave(exception)
        else:  # while the ranks were starting
            watch.leave(exception)
        # Lightning's observer would kill this process as soon as another rank has ended, in the middle of its own end
        processes = getattr(trainer.strategy.launcher, "procs", None)
        if isinstance(processes, list):
            processes.clear()

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._watching.close()


def _set_up_and_watch(callback: EndTogether, set_up: Callable[[], None]) -> None:
    """Set up a strategy's processes; they watch each other from then on."""
    set_up()
    callback.watch_ranks()
