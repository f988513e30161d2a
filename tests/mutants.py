"""Do the tests notice when a kernel is wrong? Deletes or perturbs kernel statements, one at a time, and runs tests on each.

    python tests/mutants.py --seed 1 --count 100 [--only PATH] [--again FILE] [--jobs 1] [--json FILE]

``mutations.py`` says what is a kernel statement and what is done to it. A statement is deleted (``pass`` takes its place) or one
expression in it is perturbed; where the deletion would only leave a name undefined, a perturbation is preferred.

Each mutant is made in a copy of the repository, in a temporary directory, whose code is what is imported. Stages of tests run
until one fails: those named like the file or its ops, the rest of that backend's, golden cases. Killed is a failure, a crash,
or a stage that takes several times as long as without the mutant.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue

from mutations import ROOT, Mutant, Source, pick

Stage = tuple[str, ...]
MEMORY = 16 << 30
WANTED = 0.95
LIMIT = 3.0
"""How many times as long as all tests of the backend without a mutant one stage may take."""

NO_SHRINKING = """
from hypothesis import Phase
settings.register_profile("mutants", parent=settings.get_profile("few"), phases=(Phase.explicit, Phase.generate))
settings.load_profile("mutants")
"""
"""Added to the conftest of the copy: that a case fails is enough, nobody reads the smallest one."""


@dataclass
class Verdict:
    mutant: Mutant
    result: str  # "killed", "timeout" or "survived"
    by: str
    seconds: float


class Copy:
    """A copy of the repository in which one mutant lives at a time."""

    def __init__(self, root: Path) -> None:
        self.root, self._writes = root, 0
        listed = subprocess.run(["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True)
        for name in filter(None, listed.stdout.decode().split("\0")):
            if os.path.lexists(ROOT / name):
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, root / name, follow_symlinks=False)
        with open(root / "tests/conftest.py", "a", encoding="utf-8") as conftest:
            conftest.write(NO_SHRINKING)
        self._environment = {**os.environ, "PYTHONPATH": str(root / "src"), "COLUMNS": "400"}
        where = [sys.executable, "-c", "import deltaloom.backends as b; print(b.__file__)"]
        found = subprocess.run(where, cwd=root, env=self._environment, check=True, capture_output=True, text=True).stdout
        if not found.startswith(str(root)):
            sys.exit(f"the tests would import {found.strip()}, not the copy in {root}: nothing would be measured")

    def run(self, stage: Stage, limit: float | None, *, write_bytecode: bool = False) -> tuple[int | None, str]:
        """Exit code of pytest (None: over the limit) and the first failure."""
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0", "--tb=no", *stage]
        environment = {**self._environment, "PYTHONDONTWRITEBYTECODE": "" if write_bytecode else "1"}
        process = subprocess.Popen(
            command, cwd=self.root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY)),
        )  # fmt: skip
        try:
            output = process.communicate(timeout=limit)[0]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return None, f"more than {limit:.0f} s"
        failures = [line for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
        last = output.strip().splitlines()[-1] if output.strip() else ""
        return process.returncode, failures[0].split(" ", 1)[1] if failures else last

    def judge(self, mutant: Mutant, stages: list[Stage], limits: dict[Stage, float]) -> Verdict:
        """Run the stages on the mutant until one kills it; afterwards the copy is as before."""
        path, began = self.root / mutant.path, time.monotonic()
        code, before = path.read_bytes(), path.stat()
        changed = code[: mutant.start] + mutant.text.encode() + code[mutant.stop :]
        compile(changed, mutant.path, "exec")
        shutil.rmtree(self.root / ".hypothesis", ignore_errors=True)  # cases that killed another mutant are not tried first
        self._writes += 1
        path.write_bytes(changed)
        os.utime(path, (0, self._writes))  # a time of its own, so that no bytecode of another version is taken for this one
        try:
            for stage in stages:
                returned, by = self.run(stage, limits[stage])
                if returned not in (0, 5):
                    result = "timeout" if returned is None else "killed"
                    return Verdict(mutant, result, by, time.monotonic() - began)
        finally:
            path.write_bytes(code)
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        return Verdict(mutant, "survived", "", time.monotonic() - began)


def stages_of(source: Source) -> list[Stage]:
    """The tests of a file, quickest first. Compiled segments have tests of their own; they take minutes."""
    folder, stem = Path(source.path).parent.name, Path(source.path).stem
    compiled = stem in ("compiled", "inductor")
    other = {"numpy": "torch", "torch": "numpy"}[folder]
    files = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "tests/backends").glob("test_*.py"))
    own = [path for path in files if f"_{other}_" not in path]
    own = [path for path in own if ("compiled" in path or "inductor" in path) == compiled]
    golden = "tests/goldens/test_compiled.py"
    if compiled:
        return [(path,) for path in own] + [(golden, "-k", "inductor-next_base-chunked")]
    near = f"({' or '.join(dict.fromkeys([stem, *source.ops()]))}) and {folder}"
    cases = "next_base-chunked or next_base-batch2 or next_leftpad or next_fp8 or qwen3_moe"
    return [
        ("tests/conformance/test_ops.py", *own, "-k", near),
        (*own, "-k", f"not ({near})"),
        (f"tests/conformance/test_{folder}_backend.py",),
        (golden, "-k", f"{folder} and ({cases})"),
    ]


def baseline(stages: list[Stage]) -> list[Stage]:
    """The tests of these stages, each once: the files without the choices from them, and the golden cases."""
    *parts, golden = stages
    return [tuple(sorted({word for part in parts for word in part if word.endswith(".py")})), golden]


def run_all(mutants: list[Mutant], sources: dict[str, Source], copies: list[Copy]) -> list[Verdict]:
    """Judge every mutant, each in whichever copy is free; the stages must be green without a mutant."""
    stages = {path: stages_of(sources[path]) for path in sorted({mutant.path for mutant in mutants})}
    limits: dict[Stage, float] = {}
    seconds: dict[Stage, float] = {}
    for whole in dict.fromkeys(whole for found in stages.values() for whole in baseline(found)):
        began = time.monotonic()
        code, by = copies[0].run(whole, None, write_bytecode=True)
        if code != 0:
            sys.exit(f"the tests fail without a mutant: {by} (pytest {' '.join(whole)})")
        seconds[whole] = time.monotonic() - began
        print(f"without a mutant {seconds[whole]:.0f} s: {by}", flush=True)
    for found in stages.values():
        limits |= {stage: LIMIT * sum(seconds[whole] for whole in baseline(found)) for stage in found}
    free: SimpleQueue[Copy] = SimpleQueue()
    for copy in copies:
        free.put(copy)

    def judge(mutant: Mutant) -> Verdict:
        copy = free.get()
        try:
            verdict = copy.judge(mutant, stages[mutant.path], limits)
        finally:
            free.put(copy)
        place = f"{mutant.path}:{mutant.line}"
        print(f"{verdict.result:8} {verdict.seconds:5.1f} s  {place:36} {mutant.what}  {verdict.by}", flush=True)
        return verdict

    with ThreadPoolExecutor(len(copies)) as pool:
        return list(pool.map(judge, mutants))


def report(verdicts: list[Verdict]) -> int:
    """Print the survivors and the score; 1 below the wanted share."""
    results = Counter(verdict.result for verdict in verdicts)
    kinds = Counter(verdict.mutant.kind for verdict in verdicts)
    undefined = sum("NameError" in verdict.by or "UnboundLocalError" in verdict.by for verdict in verdicts)
    print("\nsurvivors:" if results["survived"] else "\nno survivors")
    for verdict in verdicts:
        if verdict.result == "survived":
            print(f"  {verdict.mutant.path}:{verdict.mutant.line}: {verdict.mutant.what}")
    noticed = len(verdicts) - results["survived"]
    print(
        f"{noticed} of {len(verdicts)} mutants noticed ({100 * noticed / len(verdicts):.0f}%): {results['killed']} made a test "
        f"fail ({undefined} of them by an undefined name), {results['timeout']} ran over the limit; "
        f"{kinds['perturb']} perturbed, {kinds['delete']} deleted a statement"
    )
    return 0 if noticed >= WANTED * len(verdicts) else 1


def main() -> int:
    parser = argparse.ArgumentParser(description="Delete or perturb kernel statements; count the mutants that a test notices.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--only", metavar="PATH", help="a file, or a folder, of backends/")
    parser.add_argument("--again", metavar="FILE", help="only what survived in the run that wrote this file with --json")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--json", metavar="FILE", help="write the verdicts here")
    options = parser.parse_args()
    files = sorted(str(p.relative_to(ROOT)) for name in ("numpy", "torch") for p in (ROOT / "backends" / name).glob("*.py"))
    sources = {path: Source(path) for path in files if not path.endswith("__init__.py")}
    chosen = [source for path, source in sources.items() if path.startswith(options.only or "")]
    if options.again:
        earlier = json.loads(Path(options.again).read_text())
        survivors = {Mutant(**found["mutant"]).place() for found in earlier if found["result"] == "survived"}
        every = [mutant for source in chosen for pair in source.statements() for part in pair for mutant in part]
        mutants = [mutant for mutant in every if mutant.place() in survivors]
    else:
        mutants = pick(chosen, options.seed, options.count)
    if not mutants:
        parser.error("no statement to mutate: --only names no kernel file, or the survivors of --again are gone")
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        verdicts = run_all(mutants, sources, [Copy(Path(folder) / str(i)) for i in range(options.jobs)])
    if options.json:
        Path(options.json).write_text(json.dumps([asdict(verdict) for verdict in verdicts], indent=1))
    return report(verdicts)


if __name__ == "__main__":
    sys.exit(main())
