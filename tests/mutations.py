"""The ways in which ``mutants.py`` makes kernels wrong: which statements there are, and what can be done to each.

The population: statements in function bodies of a file, and the ``when=`` guards of kernels. Left out by rule: the classes
``...Backend`` (devices, dtypes and names: no kernels); imports, docstrings, asserts (``zip(strict=True)`` is
one) and raise statements; f-strings; signs of literals (-1 becomes -2, not the equal axis 1 of a matrix); the use of
module-level constants that are numbers (uppercase: block sizes and thread cut-offs, which change the speed and not the result) in
a quotient or a comparison, with the whole condition that this is part of, and so an ``if`` that chooses a faster way (what
is inside it is not left out). An ``if`` that returns from the case of one (one token, one row, one divisor) is such a faster way
too: neither it nor its ``return`` is deleted, as the rest computes the same; its condition and what is inside it are perturbed.
"""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
TRANSPOSITIONS = {"transpose", "swapaxes", "permute", "t", "T", "mT"}
COMMUTATIVE = {"maximum", "minimum", "max", "min", "add", "multiply", "vecdot", "addcmul_", "cast"}
"""Functions whose arguments are not swapped: nothing would change (or, for ``cast``, nothing that is computed)."""


@dataclass(frozen=True)
class Mutant:
    """``path`` with its bytes ``start:stop`` replaced by ``text``."""

    path: str
    line: int
    source: str  # the line as it is now
    kind: str  # "delete" or "perturb"
    what: str
    start: int
    stop: int
    text: str

    def place(self) -> tuple[str, str, str]:
        """What stays the same when lines above are added or removed."""
        return self.path, self.source, self.what


class Source:
    """One file: finds its statements and their mutants."""

    def __init__(self, path: str) -> None:
        self.path, self.code = path, (ROOT / path).read_bytes()
        self.tree = ast.parse(self.code)
        self._starts = [0, *(match.end() for match in re.finditer(b"\n", self.code))]
        assigned = [s for s in self.tree.body if isinstance(s, ast.Assign)]
        numbers = [s for s in assigned if not _mentions(s.value, (ast.Name, ast.Dict, ast.Tuple))]
        tuning = {t.id for s in numbers for t in s.targets if isinstance(t, ast.Name)}
        imports = [s for s in self.tree.body if isinstance(s, ast.ImportFrom)]
        shared = {a.name for s in imports if (s.module or "").startswith("deltaloom.backends") for a in s.names}
        self._tuning = {name for name in tuning | shared if name.isupper()}

    def ops(self) -> list[str]:
        """The ops that the file has kernels for."""
        calls = [n for n in ast.walk(self.tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "table.kernel"]
        return sorted({str(c.args[0].value) for c in calls if isinstance(c.args[0], ast.Constant)})

    def statements(self) -> Iterator[tuple[list[Mutant], list[Mutant]]]:
        """Perturbations and deletions of each statement, the preferred kind only where one is preferred."""
        for outer in self.tree.body:
            if isinstance(outer, ast.ClassDef) and outer.name.endswith("Backend"):
                continue
            for function in ast.walk(outer):
                if isinstance(function, ast.FunctionDef):
                    yield from self._of_function(function)

    def _of_function(self, function: ast.FunctionDef) -> Iterator[tuple[list[Mutant], list[Mutant]]]:
        for decorator in function.decorator_list:
            if isinstance(decorator, ast.Call) and (guards := list(self._guards(decorator))):
                yield guards, []
        bound: set[str] = set()
        faster = [s for s in ast.walk(function) if isinstance(s, ast.If) and (self._is_tuning(s.test) or _is_case_of_one(s))]
        last = [s.body[-1] for s in faster if isinstance(s.body[-1], ast.Return)]
        for statement in _statements(function.body):
            if isinstance(statement, ast.Assign | ast.AugAssign | ast.AnnAssign | ast.Expr | ast.Return):
                part: ast.AST | None = statement
            else:
                part = {ast.If: "test", ast.While: "test", ast.For: "iter"}.get(type(statement), "")  # type: ignore[assignment]
                part = getattr(statement, str(part), None)
            perturbed = list(self._perturbed(part)) if part is not None else []
            if isinstance(statement, ast.If | ast.While) and not perturbed and not _mentions(statement.test, (ast.Compare,)):
                perturbed = [self._mutant(statement.test, "perturb", f"not ({ast.unparse(statement.test)})")]
            names = {n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            targets = statement.targets if isinstance(statement, ast.Assign) else []
            needed = bool(targets) and all(isinstance(t, ast.Name | ast.Tuple) for t in targets) and not names <= bound
            bound |= names
            deleted = []
            cut_off = statement in faster or statement in last
            if not cut_off and not isinstance(statement, ast.With | ast.Try) and not self._text(statement).startswith("elif"):
                deleted = [self._mutant(statement, "delete", "pass")]
            if perturbed or deleted:
                yield perturbed, [] if perturbed and (needed or isinstance(statement, ast.Return)) else deleted

    def _guards(self, decorator: ast.Call) -> Iterator[Mutant]:
        for keyword in decorator.keywords:
            if keyword.arg == "when" and isinstance(keyword.value, ast.Tuple):
                guards = [ast.unparse(guard) for guard in keyword.value.elts]
                for i in range(len(guards)):
                    rest = "".join(f"{guard}, " for guard in guards[:i] + guards[i + 1 :])
                    yield self._mutant(keyword.value, "perturb", f"({rest})")
                yield from self._perturbed(keyword.value)

    def _perturbed(self, node: ast.AST) -> Iterator[Mutant]:
        """Every perturbation in an expression or simple statement."""
        strict = isinstance(node, ast.keyword) and node.arg == "strict"
        if strict or isinstance(node, ast.JoinedStr | ast.FunctionDef) or self._is_tuning(node):
            return
        found: list[ast.expr | str] = []
        if isinstance(node, ast.AugAssign) and type(node.op) in SWAPS:
            opposite = ast.AugAssign(node.target, SWAPS[type(node.op)](), node.value)  # type: ignore[arg-type]
            found.append(ast.unparse(opposite))
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
            found.append(ast.BinOp(node.right, node.op, node.left))
        elif isinstance(node, ast.BinOp) and type(node.op) in SWAPS:
            found.append(ast.BinOp(node.left, SWAPS[type(node.op)](), node.right))  # type: ignore[arg-type]
        elif isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
            found.append(ast.Compare(node.left, [SWAPS[type(node.ops[0])](), *node.ops[1:]], node.comparators))  # type: ignore[list-item]
        elif isinstance(node, ast.BoolOp):
            found.append(ast.BoolOp(SWAPS[type(node.op)](), node.values))  # type: ignore[arg-type]
        elif isinstance(node, ast.UnaryOp) and not isinstance(node.operand, ast.Constant):
            found.append(node.operand)
        elif isinstance(node, ast.IfExp):
            found.append(ast.IfExp(node.test, node.orelse, node.body))
        elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            found.append(str(not node.value if isinstance(node.value, bool) else node.value + 1))
        elif isinstance(node, ast.Attribute) and node.attr in ("T", "mT"):
            found.append(node.value)
        elif isinstance(node, ast.Call):
            found += _calls(node)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            kept = [keyword for keyword in node.value.keywords if keyword.arg != "out"]
            if len(kept) < len(node.value.keywords):
                found.append(ast.unparse(ast.Call(node.value.func, node.value.args, kept)))
        for new in found:
            yield self._mutant(node, "perturb", new if isinstance(new, str) else f"({ast.unparse(new)})")
        for field, value in ast.iter_fields(node):
            if field != "annotation":
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST):
                        yield from self._perturbed(child)

    def _is_tuning(self, node: ast.AST) -> bool:
        def tuned(part: ast.AST) -> bool:
            return any(isinstance(n, ast.Name) and n.id in self._tuning for n in ast.walk(part))

        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("min", "max"):
            return any(isinstance(n, ast.BinOp) and self._is_tuning(n) for n in ast.walk(node))
        if isinstance(node, ast.BoolOp):
            return any(self._is_tuning(value) for value in node.values)
        quotient = isinstance(node, ast.BinOp) and isinstance(node.op, ast.FloorDiv) and tuned(node.left)
        return quotient and "//" not in ast.unparse(node.left) or isinstance(node, ast.Compare) and tuned(node)  # type: ignore[attr-defined]

    def _span(self, node: ast.AST) -> tuple[int, int]:
        start = self._starts[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]
        return start, self._starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]

    def _text(self, node: ast.AST) -> str:
        start, stop = self._span(node)
        return self.code[start:stop].decode()

    def _mutant(self, node: ast.AST, kind: str, text: str) -> Mutant:
        old = " ".join(self._text(node).split())
        what = f"delete `{old[:80]}`" if kind == "delete" else f"`{old[:70]}` -> `{text[:70]}`"
        start, stop = self._span(node)
        line = self.code.count(b"\n", 0, start) + 1
        return Mutant(self.path, line, self.code.split(b"\n")[line - 1].decode().strip(), kind, what, start, stop, text)


def _calls(node: ast.Call) -> list[ast.expr | str]:
    """A call without its transposition, or with two neighbouring arguments swapped."""
    name = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
    if name in TRANSPOSITIONS and isinstance(node.func, ast.Attribute):
        return [node.func.value]
    found: list[ast.expr | str] = []
    for i, (a, b) in enumerate(zip(node.args, node.args[1:])):
        starred = isinstance(a, ast.Starred) or isinstance(b, ast.Starred)
        if name not in COMMUTATIVE and not starred and ast.unparse(a) != ast.unparse(b):
            found.append(ast.unparse(ast.Call(node.func, [*node.args[:i], b, a, *node.args[i + 2 :]], node.keywords)))
    return found


def _is_case_of_one(branch: ast.If) -> bool:
    """Whether a branch without an ``else`` returns from the case in which a size is 1, or equals the size of one row."""
    test = branch.test
    if branch.orelse or not isinstance(branch.body[-1], ast.Return) or not isinstance(test, ast.Compare):
        return False
    right = ast.unparse(test.comparators[0])
    one_row = ast.unparse(test.left).endswith(".size") and right.endswith(".shape[-1]")
    return isinstance(test.ops[0], ast.Eq) and (right == "1" or one_row)


def _mentions(node: ast.AST, kinds: tuple[type[ast.AST], ...]) -> bool:
    return any(isinstance(n, kinds) for n in ast.walk(node))


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements in order, those of blocks too, those of nested functions not."""
    skipped = (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Raise, ast.Assert, ast.Pass, ast.Global, ast.Nonlocal)
    for statement in body:
        docstring = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        if not isinstance(statement, skipped) and not docstring:
            yield statement
            blocks = [getattr(statement, field, []) for field in ("body", "orelse", "finalbody")]
            blocks += [handler.body for handler in getattr(statement, "handlers", [])]
            for block in blocks:
                yield from _statements(block)


def pick(sources: list[Source], seed: int, count: int) -> list[Mutant]:
    """``count`` different statements of all, and one mutant of each."""
    rng = random.Random(seed)
    population = [pair for source in sources for pair in source.statements()]
    picked = []
    for perturbed, deleted in rng.sample(population, min(count, len(population))):
        picked.append(rng.choice(perturbed if perturbed and (not deleted or rng.random() < 0.6) else deleted))
    return picked
