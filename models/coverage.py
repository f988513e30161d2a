"""Which tensors a model expects and a checkpoint has; differing names are folded to patterns."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from deltaloom.graph.errors import CheckpointError

_MOST_LINES = 40  # of each kind in a summary


@dataclass(frozen=True)
class WrongShape:
    """A tensor that both sides name but do not agree on."""

    name: str
    expected: tuple[int, ...]
    found: tuple[int, ...]


@dataclass(frozen=True)
class CoverageReport:
    """The comparison of expected with found names and shapes, each part sorted by name."""

    expected: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    wrong_shape: tuple[WrongShape, ...]

    @property
    def complete(self) -> bool:
        """Every expected tensor is there in its shape, and nothing else."""
        return not (self.missing or self.unexpected or self.wrong_shape)

    def summary(self) -> str:
        """One line of counts, then folded names of each kind: ``model.layers.{0-47}.mlp.gate.weight (48)``."""
        if self.complete:
            return f"all {self.expected:,} expected tensors are there, and no others"
        counts = (
            f"of {self.expected:,} expected tensors {len(self.missing):,} are missing and {len(self.wrong_shape):,} "
            f"have a wrong shape; {len(self.unexpected):,} others are unexpected"
        )
        lines = [counts, *_section("missing", fold(self.missing)), *_section("unexpected", fold(self.unexpected))]
        by_shapes: dict[tuple[tuple[int, ...], tuple[int, ...]], list[str]] = {}
        for wrong in self.wrong_shape:
            by_shapes.setdefault((wrong.expected, wrong.found), []).append(wrong.name)
        shapes = [
            f"{pattern}: expected {list(expected)}, found {list(found)}"
            for (expected, found), names in by_shapes.items()
            for pattern in fold(names)
        ]
        return "\n".join([*lines, *_section("wrong shape", shapes)])

    def require_complete(self, where: str) -> None:
        """CheckpointError with the summary unless complete; ``where`` names the checkpoint."""
        if not self.complete:
            raise CheckpointError(f"{where} does not fit the model: {self.summary()}")


def coverage(
    expected: Mapping[str, Sequence[int]],
    found: Mapping[str, Sequence[int]],
    ignore: Callable[[str], bool] | None = None,
) -> CoverageReport:
    """Compare names and shapes; unexpected names for which ``ignore`` is true are left out of the report."""
    wrong = (
        WrongShape(name, tuple(shape), tuple(found[name]))
        for name, shape in sorted(expected.items())
        if name in found and tuple(found[name]) != tuple(shape)
    )
    unexpected = sorted(name for name in found if name not in expected and not (ignore and ignore(name)))
    return CoverageReport(
        len(expected), tuple(sorted(name for name in expected if name not in found)), tuple(unexpected), tuple(wrong)
    )


def fold(names: Iterable[str]) -> list[str]:
    """Names that differ in numbered parts only become exact patterns: ``a.{0-2,5}.b (4)``; a lone name stays."""
    groups: dict[str, list[tuple[int, ...]]] = {}
    for name in names:
        numbers = tuple(int(part) for part in re.findall(r"(?<=\.)\d+(?=\.)", name))
        groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "{}", name), []).append(numbers)
    patterns = []
    for template, rows in sorted(groups.items()):
        for ranges, count in _fold_numbers(sorted(rows)):
            text = template.replace("{}", "\0")
            for part in ranges:
                text = text.replace("\0", part, 1)
            patterns.append(f"{text} ({count:,})" if count > 1 else text)
    return patterns


def _fold_numbers(rows: Sequence[tuple[int, ...]]) -> list[tuple[tuple[str, ...], int]]:
    """Rows of numbers as products of ranges with their counts: first numbers whose rests are alike share one line."""
    if not rows[0]:
        return [((), len(rows))]
    rests: dict[int, list[tuple[int, ...]]] = {}
    for first, *rest in rows:
        rests.setdefault(first, []).append(tuple(rest))
    alike: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for first, rest_rows in rests.items():
        alike.setdefault(tuple(rest_rows), []).append(first)
    return [
        ((_ranges(firsts), *ranges), len(firsts) * count)
        for rest_rows, firsts in alike.items()
        for ranges, count in _fold_numbers(rest_rows)
    ]


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as ``{0-2,4}``, an even stride as ``{3,7..47}``, one alone without braces."""
    if len(numbers) == 1:
        return str(numbers[0])
    stride = numbers[1] - numbers[0]
    if len(numbers) > 3 and stride > 1 and all(b - a == stride for a, b in zip(numbers, numbers[1:])):
        return f"{{{numbers[0]},{numbers[1]}..{numbers[-1]}}}"
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return "{" + ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) + "}"


def _section(title: str, patterns: Sequence[str]) -> list[str]:
    lines = [f"  {title}: {pattern}" for pattern in patterns[:_MOST_LINES]]
    if len(patterns) > _MOST_LINES:
        lines.append(f"  {title}: and {len(patterns) - _MOST_LINES} more patterns")
    return lines
