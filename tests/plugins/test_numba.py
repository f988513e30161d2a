"""The numba backend as an installed plugin: asked for by name, it runs, tells who runs what, and passes its own tests."""

import json

import pytest
from plugins.environment import Environment, example, installed

pytest.importorskip("numba")
GREEDY = ("--temperature", "0", "--max-tokens", "12", "--json")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return installed(tmp_path_factory.mktemp("numba"), ["deltaloom-numba"])


def test_it_generates_what_numpy_does(environment: Environment) -> None:
    tokens = []
    for how in (("numpy",), ("numba",), ("numba", "--quantise", "bf16")):
        done = environment.deltaloom("generate", "Once upon a time", *GREEDY, "--backend", *how)
        assert done.returncode == 0, done.stderr
        tokens.append(json.loads(done.stdout)["outputs"][0]["token_ids"])
    assert tokens[0] == tokens[1] == tokens[2]


def test_explain_tells_which_kernels_are_its_own(environment: Environment) -> None:
    code = "import deltaloom as d; config = d.CompileConfig(backends=('numba',), quantise='bf16')\n"
    code += "for row in d.compile(d.build_graph('tiny-next').main, config).explain('decode'): print(row.op, row.kernel)"
    said = environment.check("-c", code).splitlines()
    own = {"linear numba.linear", "shared_moe numba.shared_moe", "gated_delta_net numba.delta_net_step"}
    assert {*own, "embedding numba.numpy.embedding"} <= set(said)


def test_numba_is_not_imported_for_other_backends(environment: Environment) -> None:
    code = "import sys, deltaloom; deltaloom.LLM('tiny-next', backend='numpy'); print('numba' in sys.modules)"
    assert environment.check("-c", code).strip() == "False"


@pytest.mark.slow
def test_its_own_tests_pass_as_installed(environment: Environment) -> None:
    said = environment.check("-m", "pytest", "-q", "-p", "no:cacheprovider", str(example("deltaloom-numba") / "tests"))
    assert "passed" in said and "failed" not in said
