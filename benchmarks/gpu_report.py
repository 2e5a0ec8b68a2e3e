"""Tables and a picture of measurements on a card."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt

from benchmarks.training import header, row
from lit_moeedit.editing import PHASES

FEW, MANY = "edit of 50", "edit of 1,000"
"""Names of the parts that have goals."""
GIGA = 1e9
Found = dict[str, Any]


class Goal(NamedTuple):
    """A figure that is wanted.

    Attributes:
        name: what it is.
        part: of which part.
        value: of what that part found; ``None`` if it was not measured.
        most: the goal.
        unit: of both.
        phase: the phase whose seconds it bounds, for the picture.
    """

    name: str
    part: str
    value: Callable[[Found], float | None]
    most: float
    unit: str
    phase: str = ""


def ratio(found: Found) -> float:
    """Seconds of the statistics over those of the bare forward."""
    return found["seconds"]["statistics"] / found["forward"]["seconds"]


def reserved(found: Found) -> float | None:
    """Peak of what the allocator held in any phase, in GB."""
    return found["reserved"] / GIGA if found["reserved"] else None


GOALS = (
    Goal("statistics over the bare forward", FEW, ratio, 1.3, "×"),
    Goal("a step of the targets of 50 edits", FEW, lambda x: x["seconds a step"], 0.08, "s"),
    Goal("targets of 1,000 edits", MANY, lambda x: x["seconds"]["targets"], 15.0, "s", "targets"),
    Goal("memory of 50 edits with their statistics", FEW, reserved, 80.0, "GB"),
    Goal("memory of 1,000 edits", MANY, reserved, 80.0, "GB"),
    Goal("commit of 5 layers", MANY, lambda x: x["seconds"]["commit"], 0.3, "s", "commit"),
    Goal("block coordinate descent, 1,000 edits, 5 layers", MANY, lambda x: x["bcd"]["seconds"], 1.0, "s", "BCD"),
)


def checks(results: Found) -> Iterator[tuple[str, Found]]:
    """All checks that were made, each with the name of its part."""
    for name, part in results["parts"].items():
        for one in part.get("found", {}).get("checks", ()):
            yield name, one


def sound(results: Found) -> bool:
    """Check that no part failed and every check passed."""
    failed = any(part["status"] == "failed" for part in results["parts"].values())
    return not failed and all(one["passed"] for _, one in checks(results))


def report(results: Found) -> str:
    """All tables."""
    tiny = ", tiny models: no figure means anything but that it is measured" if results["tiny"] else ""
    lines = [f"# {on_what(results['machine'])}{tiny}", "", ", ".join(versions(results["machine"])) + "."]
    for table in (goals, phases, fits, parts, proofs):
        lines += ["", *table(results)]
    return "\n".join(lines) + "\n"


def on_what(machine: Found) -> str:
    """The card, or that there is none."""
    if machine["card"] is None:
        return f"CPU, {machine['threads']} threads"
    return f"{machine['card']}, {machine['memory'] / GIGA:.0f} GB"


def versions(machine: Found) -> list[str]:
    """Packages and the driver, with their versions."""
    named = {name: machine[name] for name in machine if name not in ("card", "memory", "threads")}
    return [f"{name} {number}" if number else f"no {name}" for name, number in named.items()]


def goals(results: Found) -> list[str]:
    """The goals beside what was measured."""
    lines = ["## Goals", "", *header(["", "measured", "goal", ""])]
    for goal in GOALS:
        value, reason = measured(results, goal)
        if value is None:
            said, verdict = "–", f"not measured ({reason})"
        else:
            said, verdict = f"{value:.3g} {goal.unit}", "met" if value <= goal.most else "not met"
            if reason:
                verdict = f"{verdict}, but {reason}"
        lines.append(row([goal.name, said, f"≤ {goal.most:g} {goal.unit}", verdict]))
    return lines


def measured(results: Found, goal: Goal) -> tuple[float | None, str]:
    """The figure, and what there is to say against it."""
    part = results["parts"].get(goal.part, {"status": "left out", "reason": "not asked for"})
    if part["status"] != "done":
        return None, f"{part['status']}: {part['reason']}"
    found = part["found"]
    value = goal.value(found)
    if value is None:
        return None, "no card"
    against = []
    if results["tiny"]:
        against.append(f"of a tiny model and {found['edits']} edits")
    if found["layers left out"]:
        against.append(f"of {found['layers']} layers of {found['layers'] + found['layers left out']}")
    return value, ", ".join(against)


def edits(results: Found) -> dict[str, Found]:
    """Findings of the parts that are measured edits."""
    done = {name: part["found"] for name, part in results["parts"].items() if part["status"] == "done"}
    return {name: found for name, found in done.items() if "seconds a step" in found}


def phases(results: Found) -> list[str]:
    """Seconds, memory and launches of the measured edits, by phase."""
    lines = ["## Edits by phase", "", *header(["", "phase", "seconds", "peak, GB", "launches"])]
    counted = {"statistics": "statistics, a batch", "targets": "targets, a step"}
    for name, found in edits(results).items():
        for phase in (*PHASES, "edit"):
            launches = found["launches"].get(counted.get(phase, phase))
            of = counted.get(phase, "").partition(", ")[2]
            highest = found["peak"].get(phase) if phase != "edit" else max(found["peak"].values(), default=None)
            lines.append(
                row(
                    [
                        name,
                        "in all" if phase == "edit" else phase,
                        f"{found['seconds'][phase]:.3g}" if found["seconds"][phase] else "–",
                        "–" if highest is None else f"{highest / GIGA:.1f}",
                        "–" if not launches else f"{launches:,.0f} {of}".strip(),
                    ]
                )
            )
    return [*lines, *(line for name, found in edits(results).items() for line in ("", described(name, found)))]


def described(name: str, found: Found) -> str:
    """A sentence with all that the table has no column for."""
    said = [
        f"{found['edits']} facts in a model of {found['layers']} layers",
        f"{found['steps']} steps of the targets of {found['seconds a step']:.3g} s on average",
    ]
    if found["layers left out"]:
        said.append(f"{found['layers left out']} layers left out, for which the card has no room")
    if "forward" in found:
        bare = found["forward"]
        said.append(
            f"the bare forward over the same {bare['tokens']:,} tokens in {bare['batches']} batches takes "
            f"{bare['seconds']:.3g} s (experts: {bare['experts']}), statistics {ratio(found):.2f} times "
            f"that, of which tokenizing the text is {bare['seconds of tokenizing'] / bare['seconds']:.2f}"
        )
    else:
        said.append("second moments known before, of a part of the text")
    said.append(descent(found["bcd"]))
    return f"*{name}*: {'; '.join(said)}."


def descent(bcd: Found) -> str:
    """Block coordinate descent on the problems of an edit."""
    above = bcd["objective above Woodbury's"]
    return (
        f"block coordinate descent solves the {bcd['layers']} problems in {bcd['seconds']:.3g} s "
        f"({bcd['launches, a layer'] or 'not counted'} launches for the first), with objectives up to "
        f"{above:.2g} of Woodbury's above these"
    )


def fits(results: Found) -> list[str]:
    """The runs of fit."""
    lines = ["## Edits in the middle of fit", ""]
    columns = ["", "layers", "seconds", "of these for the edit", "peak, GB", "resumed run", "seconds whole, resumed"]
    lines += header(columns)
    for name, part in results["parts"].items():
        if not name.startswith("fit"):
            continue
        if part["status"] != "done":
            lines.append(row([name, f"{part['status']}: {part['reason']}", *["–"] * 5]))
            continue
        found = part["found"]
        again = found.get("resume")
        layers = f"{found['layers']}" + (f" ({found['layers left out']} left out)" if found["layers left out"] else "")
        cells = [name, layers, f"{found['seconds']:.1f}", f"{found['edit']['edit']:.2f}"]
        cells.append(f"{found['peak'] / GIGA:.1f}" if found["peak"] else "–")
        if again is None:
            cells += [f"left out: {found['resume left out']}", "–"]
        else:
            away = next(one["value"] for one in found["checks"] if one["name"].startswith("distance"))
            same = "the same bits" if again["bit for bit"] else f"weights {away:.1g} away"
            cells += [f"{same} ({again['layers']} layers)", ", ".join(f"{s:.1f}" for s in again["seconds"])]
        lines.append(row(cells))
    return lines


def parts(results: Found) -> list[str]:
    """The outcome of every part, and its seconds."""
    lines = ["## Parts", "", *header(["", "", "seconds", "checks passed"])]
    for name, part in results["parts"].items():
        said = part["status"] + (f": {part['reason']}" if "reason" in part else "")
        own = part.get("found", {}).get("checks", [])
        passed = f"{sum(one['passed'] for one in own)} of {len(own)}" if own else "–"
        lines.append(row([name, said, f"{part.get('took', 0):.1f}", passed]))
    return lines


def proofs(results: Found) -> list[str]:
    """Every check."""
    lines = ["## Checks", "", *header(["part", "check", "value", "bound", ""])]
    for name, one in checks(results):
        bound = "–" if one["bound"] is None else f"{one['bound']:g}"
        lines.append(row([name, one["name"], f"{one['value']:.2g}", bound, "passed" if one["passed"] else "FAILED"]))
    return lines


def draw(results: Found, path: Path) -> None:
    """Seconds by phase of every measured edit, with the goals that bound them."""
    measured_edits = edits(results)
    shown = [*PHASES, "BCD"]
    figure, axes = plt.subplots(figsize=(10, 5), layout="constrained")
    width = 0.8 / max(1, len(measured_edits))
    for number, (name, found) in enumerate(measured_edits.items()):
        seconds = {**found["seconds"], "BCD": found["bcd"]["seconds"]}
        places = [place + (number - (len(measured_edits) - 1) / 2) * width for place in range(len(shown))]
        axes.bar(places, [seconds[phase] for phase in shown], width, label=name)
        for goal in GOALS:
            if goal.part == name and goal.phase:
                center = places[shown.index(goal.phase)]
                axes.hlines(goal.most, center - width / 2, center + width / 2, color="black", linewidth=2)
    tiny = ", tiny models" if results["tiny"] else ""
    axes.set(title=f"{on_what(results['machine'])}{tiny}; black: goals", ylabel="seconds", yscale="log")
    axes.set_xticks(range(len(shown)), shown)
    if measured_edits:
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=100)
    plt.close(figure)
