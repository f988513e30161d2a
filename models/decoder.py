"""What surrounds a family's layers: one body per kind of layer, and embed -> layers -> norm -> head."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from deltaloom.graph.builder import GraphBuilder
from deltaloom.graph.errors import CheckpointError
from deltaloom.graph.ir import Graph, Value
from deltaloom.graph.naming import free_name
from deltaloom.graph.types import DType
from deltaloom.models.config import ModelConfig
from deltaloom.models.families import FULL, LayerKind
from deltaloom.models.layers import Stored, output_head, rotary, token_inputs

Norm = Callable[[GraphBuilder, ModelConfig, Value, str], Value]


@dataclass(frozen=True)
class LayerForm:
    """What tells one layer's body from another's."""

    mixer: LayerKind
    moe: bool
    stored: Stored

    @property
    def name(self) -> str:
        """``linear_layer``, ``attention_layer_dense``, ``attention_layer_stacked_fp8``, ..."""
        mixer = "attention_layer" if self.mixer == FULL else "linear_layer"
        experts = "_dense" if not self.moe else "_stacked" if self.stored.stacked_experts else ""
        return mixer + experts + ("_fp8" if self.stored.quantization else "")


LayerBuilder = Callable[[ModelConfig, LayerForm, DType, str], Graph]
"""Builds the body of a layer form under a name. Its inputs are among ``x``, ``cos``, ``sin`` and ``valid``."""


def layer_form(config: ModelConfig, prefix: str, mixer: LayerKind, *, moe: bool, names: Collection[str] | None) -> LayerForm:
    """The form of the layer at ``prefix`` (``model.layers.3``). ``names`` (of the checkpoint's tensors; None: as
    published) decide whether experts are stacked. Raises CheckpointError for stacked experts in block FP8."""
    stored = Stored(config.quantization).within(prefix)
    experts = f"{prefix}.mlp.experts"
    if moe and names and f"{experts}.gate_up_proj" in names and f"{experts}.0.gate_proj.weight" not in names:
        if stored.within("mlp").quantises("experts"):
            raise CheckpointError(
                f"{experts}.gate_up_proj holds stacked experts, which the config declares as block FP8; experts in "
                "block FP8 are read one by one only. Use the published checkpoint, which stores each by itself."
            )
        stored = replace(stored, stacked_experts=True)
    return LayerForm(mixer, moe, stored)


def layer_forms(config: ModelConfig, names: Collection[str] | None) -> list[LayerForm]:
    """The form of every layer of the main model."""
    return [
        layer_form(config, f"model.layers.{i}", mixer, moe=config.is_moe_layer(i), names=names)
        for i, mixer in enumerate(config.layer_types)
    ]


def layer_bodies(config: ModelConfig, forms: Sequence[LayerForm], dtype: DType, layer: LayerBuilder) -> list[Graph]:
    """One graph a form, in the order given; forms that give the same graph share it, a taken name gets a number."""
    by_form: dict[LayerForm, Graph] = {}
    distinct: dict[str, Graph] = {}
    for form in forms:
        if form in by_form:
            continue
        body = layer(config, form, dtype, free_name(form.name, distinct))
        same = (known for known in distinct.values() if replace(body, name=known.name) == known)
        by_form[form] = body = next(same, body)
        distinct[body.name] = body
    return [by_form[form] for form in forms]


def decoder(config: ModelConfig, bodies: Sequence[Graph], dtype: DType, norm: Norm) -> Graph:
    """The whole model. Inputs: ``token_ids``, ``positions`` [b, s], ``valid`` [b, past + s]. Outputs: ``logits`` and,
    of the last position only, ``last_logits``; ``final_norm``; ``hidden.0`` (the embedding), ``hidden.1`` (the raw
    output of layer 0) and so on."""
    g = GraphBuilder(config.model_type, dtype=dtype)
    token_ids, positions, valid = token_inputs(g, "token_ids")
    cos, sin = rotary(g, config, positions)
    given = {"cos": cos, "sin": sin, "valid": valid}

    x = g.embedding(token_ids, g.param("model.embed_tokens.weight", [config.vocab_size, config.hidden_size]), name="embed")
    hidden = [x]
    for number, body in enumerate(bodies):
        x = call_layer(g, body, x, given, f"model.layers.{number}.")
        hidden.append(x)

    head = output_head(g, config, Stored(config.quantization))
    final = norm(g, config, x, "model.norm")
    last = norm(g, config, g.take_last(x, name="last"), "model.norm")
    g.output("logits", g.linear(final, head, name="logits"))
    g.output("last_logits", g.linear(last, head, name="last_logits"))
    g.output("final_norm", final)
    for number, value in enumerate(hidden):
        g.output(f"hidden.{number}", value)
    return g.build()


def call_layer(g: GraphBuilder, body: Graph, x: Value, given: dict[str, Value], prefix: str) -> Value:
    """Run ``body`` with ``x`` and those of the ``given`` values that it takes."""
    values = {"x": x, **given}
    y: Value = g.call(body, *(values[value.name] for value in body.inputs), prefix=prefix)
    return y
