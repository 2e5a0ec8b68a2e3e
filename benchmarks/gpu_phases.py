"""The cost of an edit on a card: seconds, peak memory and kernel launches by phase, beside a bare forward pass."""

from __future__ import annotations

import contextlib
import gc
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from benchmarks import gpu_models
from benchmarks.gpu_checks import check
from lit_moeedit.data.encoding import pad_id, position_ids, token_ids
from lit_moeedit.editing import Editor, EditResult, SecondMoments, TargetOptimizer, second_moments
from lit_moeedit.models.experts import expert_layers
from lit_moeedit.models.partial_forward import inference, layer_output
from lit_moeedit.solvers import BlockCoordinateDescent, EditProblem, ExpertDeltas, Solver, Woodbury

STEPS, PASSES = 25, 4
SHORT, SOME_TEXTS = 64, 256
"""Number of texts where launches are counted, and of those whose moments are made for an edit without statistics."""
IMPLEMENTATIONS = ("grouped_mm", "eager")
"""Of the experts in transformers, those that can run batches of thousands of tokens."""
Moments = dict[int, SecondMoments]


class Deadline:
    """A moment at which to stop."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()

    def progress(self, phase: str, done: int, total: int) -> None:
        """Break off the edit that tells its progress here, if it is too late."""
        if self.left() < 0:
            raise gpu_models.LeftOutError(f"broken off in {phase}, with {done} of {total} done")


def synchronize(device: torch.device) -> None:
    """Wait until a card has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free() -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Meter:
    """Peak memory by phase; an argument ``phase`` of :meth:`~lit_moeedit.editing.Editor.edit`.

    Waiting for the card at both ends makes the seconds that the edit itself counts those of its phases, too.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.peaks, self.phase = device, dict[str, int](), ""
        # of all phases, with what the allocator holds for later
        self.reserved = 0

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self.phase = phase
        synchronize(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        yield
        synchronize(self.device)
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
            self.peaks[phase] = max(peak, self.peaks.get(phase, 0))
            self.reserved = max(self.reserved, torch.cuda.max_memory_reserved(self.device))


class _Operations(TorchDispatchMode):
    """Counts what reaches the kernels of a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


class Launches:
    """Kernel launches by phase, on a CPU dispatched operations; an argument ``phase`` of ``Editor.edit``.

    Args:
        device: where they are.
        skipped: a phase in which they are not counted.
    """

    def __init__(self, device: torch.device, skipped: str = "") -> None:
        self.device, self.skipped, self.counts = device, skipped, dict[str, int]()

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        if phase == self.skipped:
            yield
            return
        if self.device.type == "cuda":
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                yield
                synchronize(self.device)
            # cudaLaunchKernel, cudaLaunchKernelExC, cuLaunchKernel, cuLaunchKernelEx, cudaGraphLaunch
            launching = re.compile("LaunchKernel|GraphLaunch")
            count = sum(event.count for event in profile.key_averages() if launching.search(event.key))
        else:
            with _Operations() as operations:
                yield
            count = operations.count
        # a phase has several parts, some of which launch nothing
        self.counts[phase] = self.counts.get(phase, 0) + count

    def check(self) -> None:
        """Raise ``RuntimeError`` if no launch was seen in a whole phase, as where the profiler cannot record them."""
        silent = [phase for phase, count in self.counts.items() if not count]
        if silent:
            raise RuntimeError(f"the profiler saw no launch in {', '.join(silent)}")


class _Recording(Solver):
    """A solver that remembers its problems."""

    def __init__(self) -> None:
        self.problems: list[tuple[EditProblem, ExpertDeltas]] = []

    def solve(self, problem: EditProblem) -> ExpertDeltas:
        deltas = Woodbury().solve(problem)
        self.problems.append((problem, deltas))
        return deltas


def editor(layers: Sequence[int], steps: int, solver: Any = None, cuda_graphs: bool = False) -> Editor:
    """The editor that is measured; its targets take all their steps."""
    targets = TargetOptimizer(steps=steps, learning_rate=0.1, clamp=0.75, stop=0.0, cuda_graphs=cuda_graphs)
    return Editor(layers, solver if solver is not None else Woodbury(), targets)


class Subject:
    """A model on a card, its tokenizer, and the text that its edits preserve.

    Args:
        case: the model, and the layers to edit.
        device: where it is.
        words: a tokenizer.
        tokens: number of tokens of text.
        deadline: when to stop.
    """

    def __init__(
        self,
        case: gpu_models.Case,
        device: torch.device,
        words: PreTrainedTokenizerFast,
        tokens: int,
        deadline: Deadline,
    ) -> None:
        self.device, self.words, self.layers, self.deadline = device, words, case.layers, deadline
        wanted, top = case.config["num_hidden_layers"], max(case.layers)
        self.fit = wanted
        if device.type == "cuda":
            room = gpu_models.free_memory(device) - gpu_models.MARGIN
            self.fit = gpu_models.layers_that_fit(case.config, wanted, room, bytes_per_parameter=2)
        if self.fit < top + 2:
            raise gpu_models.LeftOutError(
                f"{self.fit} layers have room on this card; an edit of layer {top} needs {top + 2}"
            )
        config = gpu_models.with_layers(case.config, self.fit)
        start = time.perf_counter()
        self.model: PreTrainedModel = gpu_models.random_model(config, device, torch.bfloat16)
        synchronize(device)
        self.found: dict[str, Any] = {
            "layers": self.fit,
            "layers left out": wanted - self.fit,
            "seconds to make the model": time.perf_counter() - start,
        }
        self.texts = gpu_models.texts(words, tokens)

    def some_moments(self) -> Moments:
        """Second moments of some of the text, for edits whose statistics are not measured."""
        layers = [expert_layers(self.model)[index] for index in self.layers]
        gated = editor(self.layers, 1).gated
        return second_moments(self.model, self.words, layers, self.texts[:SOME_TEXTS], gated=gated)

    def edit(
        self, count: int, moments: Moments | None = None, count_targets: bool = True, cuda_graphs: bool = False
    ) -> dict[str, Any]:
        """Edit so many facts, measured, behind short edits that count launches.

        Args:
            count: number of facts.
            moments: second moments, if they are not to be measured here.
            count_targets: whether launches of the targets are counted; a step of many edits launches so much that a
                profile of it takes longer than all of its steps.
            cuda_graphs: whether steps of the targets are recorded as CUDA graphs.
        """
        facts, found = gpu_models.facts(count), dict[str, Any]()
        # what is slow only the first time is in these runs
        found["launches"] = self._launches(count, moments, count_targets)
        free()
        recording, meter = _Recording(), Meter(self.device)
        batches, handle = self._batches(meter)
        try:
            result = editor(self.layers, STEPS, recording, cuda_graphs).edit(
                self.model,
                self.words,
                facts,
                self.texts,
                moments=moments,
                phase=meter,
                progress=self.deadline.progress,
            )
        finally:
            handle.remove()
        found["edits"], found["seconds"], found["peak"] = count, result.seconds, meter.peaks
        found["reserved"] = meter.reserved
        found["checks"] = self._sound(result)
        steps = int(result.targets.steps.max())
        found["seconds a step"], found["steps"] = result.seconds["targets"] / steps, steps
        if moments is None:
            found["forward"] = self.bare_forward(batches)
        found["bcd"] = self._descend(recording.problems)
        return found

    def _batches(self, meter: Meter) -> tuple[list[Tensor], RemovableHandle]:
        """A list that will hold the token ids of all forwards of the statistics, and what ends that."""
        batches: list[Tensor] = []

        def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if meter.phase == "statistics":
                batches.append(inputs[0].clone())

        return batches, self.model.get_input_embeddings().register_forward_pre_hook(keep)

    def _sound(self, result: EditResult) -> list[dict[str, Any]]:
        change = [result.relative_change[index] for index in self.layers]
        whole = torch.tensor(change)
        passed = bool(torch.isfinite(whole).all() and (whole > 0).all())
        return [check("all edited layers changed, by finite numbers", float(whole.min()), passed=passed)]

    def _launches(self, count: int, moments: Moments | None, count_targets: bool) -> dict[str, Any]:
        """By phase; of the statistics for one batch, of the targets for one step."""
        facts, batches = gpu_models.facts(count), 0

        def progress(phase: str, done: int, total: int) -> None:
            nonlocal batches
            batches += phase == "statistics"

        runs = []
        for steps in (1, 2) if count_targets else (1,):
            launches = Launches(self.device, skipped="" if count_targets else "targets")
            known = {"moments": moments} if moments is not None else {"progress": progress}
            editor(self.layers, steps).edit(self.model, self.words, facts, self.texts[:SHORT], phase=launches, **known)
            launches.check()
            runs.append(launches.counts)
        found: dict[str, Any] = {name: runs[0][name] for name in ("features", "solve", "commit")}
        if count_targets:
            found["targets, a step"] = runs[1]["targets"] - runs[0]["targets"]
        if moments is None:
            # all runs made the same batches
            found["statistics, a batch"] = runs[0]["statistics"] / max(1, batches // len(runs))
        return found

    def bare_forward(self, batches: Sequence[Tensor]) -> dict[str, Any]:
        """Seconds of the layers up to the highest edited one over the same batches of text, and of tokenizing it.

        Args:
            batches: token ids, each ``[texts, length]``.
        """
        start = time.perf_counter()
        token_ids(self.words, self.texts)
        tokenizing = time.perf_counter() - start
        masks = [(ids != pad_id(self.words)).long() for ids in batches]
        pairs = list(zip(batches, masks, strict=True))
        top, configured = expert_layers(self.model)[max(self.layers)], self.model.config._experts_implementation

        def run(some: Sequence[Any]) -> float:
            synchronize(self.device)
            start = time.perf_counter()
            with inference(self.model):
                for ids, mask in some:
                    layer_output(self.model, top, ids, mask, position_ids(mask))
            synchronize(self.device)
            return time.perf_counter() - start

        short: dict[str, float] = {}
        failed: dict[str, str] = {}
        middle = pairs[len(pairs) // 2 :][:1]
        try:
            for kind in IMPLEMENTATIONS:
                try:
                    self.model.set_experts_implementation(kind)
                    run(middle)
                    short[kind] = run(middle)
                except (RuntimeError, ValueError) as error:  # not every card has all of them
                    failed[kind] = str(error).split("\n")[0]
            if not short:
                raise RuntimeError(f"no implementation of the experts runs: {failed}")
            best = min(short, key=short.__getitem__)
            self.model.set_experts_implementation(best)
            seconds = run(pairs)
        finally:
            self.model.set_experts_implementation(configured)
        return {
            "seconds": seconds,
            "experts": best,
            "one batch": short,
            "failed": failed,
            "batches": len(batches),
            "tokens": sum(int(mask.sum()) for mask in masks),
            "seconds of tokenizing": tokenizing,
        }

    def _descend(self, recorded: Sequence[tuple[EditProblem, ExpertDeltas]]) -> dict[str, Any]:
        """Solve the problems of the edit again, by block coordinate descent."""
        solver = BlockCoordinateDescent(passes=PASSES)
        solver.solve(recorded[0][0])
        seconds, excess = 0.0, 0.0
        launches = Launches(self.device)
        with launches("solve"):
            solver.solve(recorded[0][0])
        launches.check()
        for problem, deltas in recorded:
            synchronize(self.device)
            start = time.perf_counter()
            found = solver.solve(problem)
            synchronize(self.device)
            seconds += time.perf_counter() - start
            excess = max(excess, problem.objective(found) / problem.objective(deltas) - 1)
        return {
            "seconds": seconds,
            "layers": len(recorded),
            "objective above Woodbury's": excess,
            "launches, a layer": launches.counts["solve"],
        }
