"""Evidence: whether 95 % intervals hold 95 % of the time, tests do not cry wolf, and metrics are those of others.

    python -m benchmarks.evidence                        # about a quarter of an hour on a quiet core
    python -m benchmarks.evidence --only "A mean" --draws 0.1

Coverage that is summed exactly needs no draws. Every setting is kept in --out as it is done, so a run that was stopped
goes on where it was; after a change of what is measured, begin with another folder or an empty one.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.claims import Claim, word
from benchmarks.coverage import calibration, means, proportions
from benchmarks.coverage.alarms import LEVEL, Alarm, alarms
from benchmarks.coverage.references import INPUTS, Reference, references
from benchmarks.coverage.settings import DRAWS, Coverage, Family, Setting, measure
from benchmarks.tables import table, write
from tersor.tensor.calibration import FEWEST_IN_BIN

OUT = Path("runs/bench-evidence")
LEAST, AVERAGE = 0.93, (0.94, 0.96)
EQUAL = 1e-9
MANY = 0.06  # false alarms that chance explains at 5 % lie within


@dataclass(frozen=True)
class Tried:
    """A family's settings with what was found."""

    family: Family
    found: tuple[tuple[Setting, Coverage], ...]

    @property
    def inside(self) -> list[float]:
        """The coverage of each setting."""
        return [coverage.inside for _, coverage in self.found]

    @property
    def worst(self) -> tuple[Setting, Coverage]:
        """The setting that holds least often."""
        return min(self.found, key=lambda one: one[1].inside)


def main() -> None:
    """Simulate, compare, write docs/benchmarks/evidence.md, and say which claims hold."""
    args = _arguments()
    families = [*proportions.families(), *means.families(), *calibration.families()]
    chosen = [family for family in families if not args.only or family.name in args.only]
    if not chosen:
        raise SystemExit(f"--only: choose from {', '.join(family.name for family in families)}")
    tried = [Tried(family, tuple(_tried(family, args.draws, args.out))) for family in chosen]
    for one in tried:
        setting, coverage = one.worst
        print(f"{one.family.name}: {np.mean(one.inside):.3f} on average, {coverage.inside:.3f} for {setting.said}")
    if args.only:
        return  # a part is no page
    wolf, equal = alarms(), references()
    made = claims(tried, wolf, equal)
    write("evidence", "Evidence: do the intervals hold?", page(tried, wolf, equal, made), by="make bench-evidence")
    missed = [claim for claim in made if not claim.holds]
    print(f"{len(made) - len(missed)} of {len(made)} claims hold", flush=True)
    raise SystemExit(1 if missed else 0)


def _tried(family: Family, share: float, out: Path) -> Iterator[tuple[Setting, Coverage]]:
    kept = out / "coverage.jsonl"
    known = {}
    if kept.is_file():
        known = {line["key"]: Coverage(**line["found"]) for line in map(json.loads, kept.read_text().splitlines())}
    for number, setting in enumerate(family.settings):
        draws = max(1, round(share * family.draws))
        key = f"{family.name}: {setting.said}, {draws} draws"
        if setting.exact is not None:
            known[key] = measure(setting, draws, number)
        elif key not in known:
            found = measure(setting, draws, number)
            out.mkdir(parents=True, exist_ok=True)
            with kept.open("a") as file:
                file.write(json.dumps({"key": key, "found": asdict(found)}) + "\n")
            known[key] = found
        yield setting, known[key]


def claims(tried: Sequence[Tried], wolf: Sequence[Alarm], equal: Sequence[Reference]) -> list[Claim]:
    """What is claimed of the statistics, and whether it was found."""
    inside = [coverage for one in tried for coverage in one.inside]
    least = min(tried, key=lambda one: one.worst[1].inside)
    average = float(np.mean(inside))
    alarm, apart = max(wolf, key=lambda one: one.rate), max(equal, key=lambda one: one.apart)
    return [
        Claim(
            f"Every interval holds at least {LEAST:.0%} of the time at every setting",
            f"least {least.worst[1].inside:.1%}: {least.family.name}, {least.worst[0].said}",
            least.worst[1].inside >= LEAST,
        ),
        Claim(
            f"{AVERAGE[0]:.0%} to {AVERAGE[1]:.0%} of the time on average",
            f"{average:.1%} over {len(inside)} settings; over {len(tried)} intervals, each its own average, "
            f"{np.mean([np.mean(one.inside) for one in tried]):.1%}", AVERAGE[0] <= average <= AVERAGE[1],
        ),
        Claim(
            f"Tests cry wolf no more often than {LEVEL:.0%}, within what chance explains",
            f"most {alarm.rate:.1%}: {alarm.test}", alarm.rate <= MANY,
        ),
        Claim(
            f"Metrics are those of scikit-learn, scipy or a loop, to {EQUAL:g}",
            f"farthest apart {apart.apart:.1g}: {apart.what}", apart.apart <= EQUAL,
        ),
    ]  # fmt: skip


def page(tried: Sequence[Tried], wolf: Sequence[Alarm], equal: Sequence[Reference], made: Sequence[Claim]) -> str:
    """The page's body."""
    return "\n\n".join([
        table(["claim", "found", ""], [[claim.text, claim.found, word(claim.holds)] for claim in made]),
        "## Coverage of 95 % intervals",
        _how(),
        _coverage_table(tried),
        _limits(),
        "## Tests without a difference",
        table(["test", "function", "below 5 %", "draws"],
              [[one.test, f"`{one.source}`", f"{one.rate:.1%}", str(one.draws or "exact")] for one in wolf]),
        "## The same numbers elsewhere",
        f"Largest difference over {INPUTS} random inputs.",
        table(["what", "by", "apart"], [[one.what, one.by, f"{one.apart:.1g}"] for one in equal]),
    ])  # fmt: skip


def _coverage_table(tried: Sequence[Tried]) -> str:
    rows = []
    for one in tried:
        setting, worst = one.worst
        rows.append([
            one.family.name, f"`{one.family.source}`", str(len(one.found)), str(worst.draws or "exact"),
            f"{np.mean(one.inside):.1%}", f"{worst.inside:.1%}", setting.said,
            f"{worst.below:.1%}", f"{worst.above:.1%}",
        ])  # fmt: skip
    header = ["interval of", "function", "settings", "draws", "average", "least", "where", "below", "above"]
    return table(header, rows)


def _how() -> str:
    noise = 196 * math.sqrt(0.95 * 0.05 / DRAWS)
    return (
        "How often the interval holds the truth, at settings that users meet: test sets of 50 to 10,000 "
        "samples, groups of 50 to 5000, accuracies from 50 % to 99.5 %, two models 0 to 5 points apart, 10 and "
        "20 sittings for times. They are listed in `benchmarks/coverage/`. Coverage of a proportion is summed "
        f"exactly; the others are drawn, as often at each setting as *draws* says: {DRAWS} times tell coverage to "
        f"±{noise:.1f} points, so that the least of many settings looks worse than it is. *Below* and *above*: how "
        "often the truth lies on that side, at the worst setting."
    )


def _limits() -> str:
    worst = ", ".join(f"{proportions.worst_proportion(n):.1%} at n {n}" for n in (50, 100, 200, 1000))
    return (
        "Where they do not hold, or hold more often than they need: a proportion's coverage jumps with the "
        f"true value, as counts are whole numbers, and the least of 1000 true values from 0.5 on is {worst}. A "
        "mean of fewer than 50 skewed values, or of values of which fewer than ten differ from the commonest, "
        "and a bootstrap of fewer than 100 rows hold less often. Where the truth lies at an end of what is "
        "possible (no calibration error at all, groups that are all alike) an interval can miss on one side "
        "only, and holds 97.5 %. With few flips between two models the paired difference holds more often at "
        "any width that is honest, and so does the gap between several groups of different sizes. Of the "
        f"largest calibration error of any bin nothing is said where a bin has fewer than {FEWEST_IN_BIN} "
        "samples, which is so for most models that are mostly sure; its settings are those where none has."
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="INTERVAL", help="only this interval, and no page")
    parser.add_argument("--draws", type=float, default=1.0, help="times as many draws of each setting")
    parser.add_argument("--out", type=Path, default=OUT, help="where finished settings are kept")
    return parser.parse_args()


if __name__ == "__main__":
    main()
