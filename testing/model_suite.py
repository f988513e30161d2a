"""What every model family is held to: its config.json, its graph, its weights, and how its programs run them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from deltaloom.graph.errors import CheckpointError, ConfigError, DeltaloomError
from deltaloom.graph.ir import Call, Graph, Value
from deltaloom.graph.op import Array, Draw
from deltaloom.graph.parse import parse_graph
from deltaloom.graph.text import print_graph
from deltaloom.graph.types import f32, f64
from deltaloom.graph.verify import verify
from deltaloom.models.build import build_graph
from deltaloom.models.checkpoint import Checkpoint
from deltaloom.models.config import read_config
from deltaloom.models.families import Family, family_named
from deltaloom.runtime.load import check_coverage, load
from deltaloom.runtime.model import Model
from deltaloom.testing.measure import assert_close
from deltaloom.testing.suite import Check, Suite
from deltaloom.testing.toy_models import HYBRID, Oracle, random_weights

OUTPUTS = ("logits", "last_logits", "final_norm", "hidden.0")
NEAR = 2.0**-12
"""Logits that differ less, relative to the largest, may change places in float32."""
INPUTS = ("token_ids", "positions", "valid")


class ModelSuite(Suite):
    """The checks of one model family.

    ``model``: its ``model_type``. ``config``: fields of a small config.json of it; None: its own fields, small where the kit knows
    how. ``checkpoint``: a folder with a published checkpoint (config.json and safetensors), whose tensors the graph must read, all
    and no others. ``backends``: where the small model is run; None: NumPy, and torch if it is installed."""

    model: str
    config: Mapping[str, object] | None = None
    checkpoint: Path | None = None
    backends: Sequence[str] | None = None

    def subject(self) -> str:
        return f"model {self.model}"

    def checks(self) -> Iterator[Check]:
        subject = self.subject()
        yield Check(subject, "defaults", partial(_defaults, self.model), drawn=False)
        yield Check(subject, "unknown fields", partial(_unknown_fields, self.small), drawn=False)
        yield Check(subject, "bad values", partial(_bad_values, self.small), drawn=False)
        yield Check(subject, "graph", self._graph_is_whole, drawn=False)
        yield Check(subject, "weights are used", self._weights_are_used, drawn=False)
        yield Check(subject, "inventory", self._inventory, "inventory", self.checkpoint is not None, drawn=False)
        yield Check(subject, "a missing tensor", self._missing_tensor)
        yield Check(subject, "a tensor too many", self._strange_tensor, drawn=False)
        installed = ["numpy", "torch"] if find_spec("torch") is not None else ["numpy"]
        for name in installed if self.backends is None else self.backends:
            yield Check(subject, f"prefill on {name}", partial(self._prefill, name))
            yield Check(subject, f"decode on {name}", partial(self._decode, name))
            yield Check(subject, f"chunks on {name}", partial(self._chunks, name))
            yield Check(subject, f"batch on {name}", partial(self._batch, name))
            yield Check(subject, f"generation on {name}", partial(self._generation, name))

    @cached_property
    def small(self) -> Mapping[str, object]:
        """A small config.json of the family."""
        return self.config or small_config(family_named(self.model))

    @cached_property
    def _graph(self) -> Graph:
        return build_graph(read_config(self.small), dtype=f32).main

    @cached_property
    def _exact(self) -> Graph:
        return build_graph(read_config(self.small), dtype=f64).main

    @cached_property
    def _weights(self) -> dict[str, Array]:
        graphs = build_graph(read_config(self.small), dtype=f32)
        return {**random_weights(graphs.main), **(random_weights(graphs.mtp, seed=1) if graphs.mtp else {})}

    @cached_property
    def _folder(self) -> tempfile.TemporaryDirectory[str]:
        """The small model as a checkpoint."""
        folder = tempfile.TemporaryDirectory(prefix="deltaloom-")
        write_checkpoint(Path(folder.name), self.small, self._weights)
        return folder

    @cached_property
    def _models(self) -> dict[str, Model]:
        return {}

    def _model(self, backend: str) -> Model:
        if backend not in self._models:
            self._models[backend] = load(self._folder.name, backend=backend, dtype="float32")
        return self._models[backend]

    def _pair(self, batch: int) -> tuple[Oracle, Oracle]:
        """The truth in float64, and what the definition gives in float32."""
        weights = {name: self._weights[name] for name in self._graph.all_params()}
        return Oracle(self._exact, weights, batch), Oracle(self._graph, weights, batch)

    def _close(self, what: str, found: Array | None, pair: tuple[Oracle, Oracle], ids: Array) -> None:
        assert found is not None
        truth, rounded = (oracle.run(ids)["logits"] for oracle in pair)
        layers = read_config(self.small).num_hidden_layers
        assert_close(f"logits of {self.model}, {what}", found, truth, rounded, depth=layers)

    def _tokens(self, draw: Draw, batch: int, count: int) -> Array:
        return draw.integers(0, read_config(self.small).vocab_size - 1, batch, count)

    def _graph_is_whole(self, draw: Draw) -> None:
        """The small graph is legal, survives its text form, and has the inputs and outputs that a model is run by."""
        graph = self._graph
        verify(graph)
        assert parse_graph(print_graph(graph)) == graph, f"the graph of {self.model} is another one when read from its text"
        missing = [name for name in OUTPUTS if name not in dict(graph.outputs)]
        assert not missing, f"the graph of {self.model} has no output {', '.join(missing)}; build it with deltaloom.models.decoder"
        strange = [value.name for value in graph.inputs if value.name not in INPUTS]
        assert not strange, f"the graph of {self.model} has the input {', '.join(strange)}, which no runtime gives it"

    def _weights_are_used(self, draw: Draw) -> None:
        """Every weight that the graph reads has to do with what it computes."""
        unused = unused_parameters(self._graph)
        assert not unused, f"the graph of {self.model} reads {', '.join(unused[:4])} and computes nothing with it"

    def _inventory(self, draw: Draw) -> None:
        """The tensors that the graph reads are those of the published checkpoint."""
        assert self.checkpoint is not None
        config, stored = read_config(self.checkpoint), Checkpoint.open(self.checkpoint)
        report = check_coverage(config, build_graph(config, names=stored.names()), stored)
        assert report.complete, f"the graph of {self.model} does not fit {self.checkpoint.name}: {report.summary()}"

    def _missing_tensor(self, draw: Draw) -> None:
        """A checkpoint that lacks a tensor is refused by its name."""
        lost = draw.choice(*sorted(self._weights))
        self._refused({name: array for name, array in self._weights.items() if name != lost}, lost, f"without {lost}")

    def _strange_tensor(self, draw: Draw) -> None:
        """A checkpoint with a tensor that nothing reads is refused by its name."""
        strange = "model.layers.0.no_such_module.weight"
        self._refused({**self._weights, strange: np.zeros((2, 2), np.float32)}, strange, f"with {strange}")

    def _refused(self, weights: Mapping[str, Array], name: str, what: str) -> None:
        with tempfile.TemporaryDirectory(prefix="deltaloom-") as folder:
            write_checkpoint(Path(folder), self.small, weights)
            try:
                load(folder, backend="numpy", dtype="float32")
            except CheckpointError as error:
                assert name in str(error), f"a checkpoint of {self.model} {what} is refused without its name: {error}"
                return
        raise AssertionError(f"a checkpoint of {self.model} {what} is loaded; the graph must read exactly what is stored")

    def _prefill(self, backend: str, draw: Draw) -> None:
        """All logits of a prompt are those of the graph in float64."""
        batch, count = draw.integer(1, 2), draw.choice(1, 3, 8)
        ids = self._tokens(draw, batch, count)
        self._close(f"prefill on {backend}", self._model(backend).forward(ids).logits, self._pair(batch), ids)

    def _decode(self, backend: str, draw: Draw) -> None:
        """After a prompt, token by token, the logits are those of the whole text."""
        self._in_calls(backend, draw, [draw.choice(1, 4), 1, 1, 1], "decode")

    def _chunks(self, backend: str, draw: Draw) -> None:
        """A prompt in pieces gives the logits of the whole prompt."""
        self._in_calls(backend, draw, [draw.integer(1, 4) for _ in range(draw.integer(2, 3))], "chunks")

    def _in_calls(self, backend: str, draw: Draw, counts: Sequence[int], what: str) -> None:
        model, ids = self._model(backend), self._tokens(draw, 1, sum(counts))
        state, parts, start = model.new_state(1), [], 0
        for count in counts:
            parts.append(model.forward(ids[:, start : start + count], state=state).logits)
            start += count
        found = np.concatenate([part for part in parts if part is not None], axis=1)
        self._close(f"{what} of {counts} tokens on {backend}", found, self._pair(1), ids)

    def _batch(self, backend: str, draw: Draw) -> None:
        """A row of a padded batch gives what it gives alone."""
        model, width = self._model(backend), 6
        short = draw.integer(1, width - 1)
        ids = self._tokens(draw, 2, width)
        mask = np.ones((2, width), np.int64)
        mask[1, : width - short] = 0
        found = model.forward(ids, attention_mask=mask).logits
        assert found is not None
        self._close(f"the full row of a batch on {backend}", found[:1], self._pair(1), ids[:1])
        kept = ids[1:, width - short :]
        self._close(f"a padded row of a batch on {backend}", found[1:, width - short :], self._pair(1), kept)

    def _generation(self, backend: str, draw: Draw) -> None:
        """Each token that is generated is the likeliest one, as near as float32 can tell."""
        model, ids = self._model(backend), self._tokens(draw, 1, 3)
        state, exact = model.new_state(1), Oracle(self._exact, {n: self._weights[n] for n in self._exact.all_params()}, 1)
        for number in range(4):
            logits = model.forward(ids, state=state, logits="last").logits
            assert logits is not None and np.isfinite(logits).all(), f"the logits of {self.model} on {backend} are not finite"
            truth = exact.run(ids)["last_logits"][0, -1]
            token = int(logits[0, -1].argmax())
            behind = float(truth.max() - truth[token]) / float(np.abs(truth).max())
            assert behind < NEAR, f"token {number} on {backend} is {token}, and {int(truth.argmax())} is likelier by {behind:.3g}"
            ids = np.array([[token]])


def small_config(family: Family) -> dict[str, object]:
    """A small config.json of a family: its sizes as in the kit's own small model, where that has them."""
    fields: dict[str, object] = {"model_type": family.model_type}
    fields |= {name: HYBRID[name] for name in family.sizes if name in HYBRID}
    if family.knows("full_attention_interval"):
        fields |= {"full_attention_interval": 2}
    if "num_nextn_predict_layers" in family.sizes:
        fields |= {"num_nextn_predict_layers": 0}
    return {**fields, "num_hidden_layers": 4}


def write_checkpoint(folder: Path, config: Mapping[str, object], weights: Mapping[str, Array]) -> None:
    """config.json and model.safetensors with these weights. Needs the package safetensors."""
    from safetensors.numpy import save_file

    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}), encoding="utf-8")
    save_file({name: np.ascontiguousarray(array) for name, array in weights.items()}, folder / "model.safetensors")


def unused_parameters(graph: Graph) -> list[str]:
    """Parameters from which no output and no new state can be reached; those of regions as ``region.name``."""
    found = []
    for body in (graph, *graph.regions.values()):
        live: set[Value] = set(body.results)
        for node in reversed(body.nodes):
            if live.intersection(node.outputs) or isinstance(node.op, Call):
                live.update(node.inputs)
        found += [value.name if body is graph else f"{body.name}.{value.name}" for value in body.params if value not in live]
    return found


def _defaults(model: str, draw: Draw) -> None:
    """A config.json that says nothing but the model's type is that of some model, whose graph is legal."""
    config = read_config({"model_type": model})
    assert config.model_type == model, f"a config.json of {model} is read as one of {config.model_type}"
    verify(build_graph(config).main)


def _unknown_fields(small: Mapping[str, object], draw: Draw) -> None:
    """A field that the family does not know is refused by its name."""
    _refuses({**small, "no_such_field": 1}, "no_such_field")


def _bad_values(small: Mapping[str, object], draw: Draw) -> None:
    """A size that is no size is refused by its name."""
    for name, value in small.items():
        if isinstance(value, int) and not isinstance(value, bool):
            for bad in (-1, 1.5, "many", True, [value]):
                _refuses({**small, name: bad}, name)


def _refuses(fields: Mapping[str, object], name: str) -> None:
    value = fields[name]
    try:
        read_config(fields)
    except ConfigError as error:
        assert name in str(error), f"config.json with {name} = {value!r} is refused without a word of {name}: {error}"
    except DeltaloomError as error:
        raise AssertionError(f"config.json with {name} = {value!r} gives {type(error).__name__}, expected ConfigError") from error
    else:
        raise AssertionError(f"config.json with {name} = {value!r} is read; expected a ConfigError that names the field")
