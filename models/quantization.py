"""Quantised checkpoints: block FP8 is read, others are refused by name (Qwen3-Next specification, section 11)."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from deltaloom.graph.errors import ConfigError
from deltaloom.graph.types import QuantType, f8_e4m3, f32
from deltaloom.models.json_fields import Fields, describe

_FP8_FIELDS = ("quant_method", "fmt", "activation_scheme", "weight_block_size", "modules_to_not_convert", "dequantize")
_REFUSED_METHODS = {
    "awq": "AWQ",
    "gptq": "GPTQ",
    "auto-round": "AutoRound",
    "autoround": "AutoRound",
    "bitsandbytes": "bitsandbytes",
    "mxfp4": "MXFP4",
    "fbgemm_fp8": "FBGEMM FP8",
    "torchao": "torchao",
    "hqq": "HQQ",
    "eetq": "EETQ",
    "quanto": "Quanto",
    "aqlm": "AQLM",
    "vptq": "VPTQ",
    "higgs": "HIGGS",
    "spqr": "SpQR",
    "fp_quant": "FP-Quant",
    "quark": "Quark",
    "bitnet": "BitNet",
}
_INSTEAD = "Use the bfloat16 checkpoint or the block-FP8 one."


@dataclass(frozen=True)
class QuantizationConfig:
    """Block FP8: ``X.weight`` is float8_e4m3fn; float32 ``X.weight_scale_inv`` has one multiplier a ``block``."""

    block: tuple[int, int]
    modules_to_not_convert: tuple[str, ...]

    @property
    def type(self) -> QuantType:
        """What a stored matrix is."""
        return QuantType(f8_e4m3, self.block, f32)

    def keeps(self, module: str) -> bool:
        """True if the module of this full dotted name stays as it is: it, or a module around it, is on the list."""
        parts = module.split(".")
        return any(".".join(parts[:length]) in self._kept for length in range(1, len(parts) + 1))

    @cached_property
    def _kept(self) -> frozenset[str]:
        return frozenset(self.modules_to_not_convert)


def read_quantization(values: Mapping[str, object]) -> QuantizationConfig:
    """QuantizationConfig from config.json's object ``quantization_config``; ConfigError if it is not block FP8."""
    fields = Fields(values, "quantization_config.")
    method = _method(fields)
    if method != "fp8":
        raise ConfigError(unsupported(refused_method(values, method)))
    for key in values:
        if key not in _FP8_FIELDS:
            raise ConfigError(
                f"quantization_config.{key} is not a field of block FP8; known are {', '.join(_FP8_FIELDS)}."
            )
    form = fields.text("fmt", "e4m3")
    if form not in ("e4m3", "float8_e4m3fn"):
        raise ConfigError(f"quantization_config.fmt is {form!r}; only e4m3 is supported. {_INSTEAD}")
    scheme = fields.text("activation_scheme", "dynamic")
    if scheme != "dynamic":
        raise ConfigError(
            f"quantization_config.activation_scheme is {scheme!r}; only 'dynamic' is supported. {_INSTEAD}"
        )
    block = fields.integers("weight_block_size", minimum=1)
    if block is None:
        raise ConfigError(unsupported("FP8 without weight_block_size (one scale a tensor or row)"))
    if len(block) != 2:
        raise ConfigError(
            f"quantization_config.weight_block_size is {describe(values['weight_block_size'])}; "
            "expected two integers, rows and columns."
        )
    return QuantizationConfig((block[0], block[1]), fields.texts("modules_to_not_convert") or ())


def unsupported(method: str) -> str:
    """The sentence for a method that is recognised but not read."""
    return f"the checkpoint is quantised with {method}, which is not supported. {_INSTEAD}"


def _method(fields: Fields) -> str:
    """The method's name; bitsandbytes and ModelOpt files of some versions spell it in other fields."""
    if "quant_method" in fields.values:
        return fields.text("quant_method", "").lower()
    if any(key in fields.values for key in ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type")):
        return "bitsandbytes"
    if "quant_algo" in fields.values or isinstance(fields.values.get("quantization"), Mapping):
        return "modelopt"
    raise ConfigError(
        "quantization_config has no quant_method, so nobody can tell how the weights are stored; expected 'fp8'."
    )


def refused_method(values: Mapping[str, object], method: str) -> str:
    """The name by which a person knows the method: ``ModelOpt NVFP4``, ``compressed-tensors INT4``, ``AWQ``, ..."""
    if method.startswith("modelopt"):
        nested = values.get("quantization")
        algorithm = (nested if isinstance(nested, Mapping) else values).get("quant_algo", "")
        named = isinstance(algorithm, str) and algorithm
        return f"ModelOpt {algorithm if named else method.removeprefix('modelopt').strip('_').upper()}".strip()
    if method in ("compressed-tensors", "compressed_tensors"):
        return f"compressed-tensors {_compressed_form(values)}"
    return _REFUSED_METHODS.get(method, f"the method {method!r}")


def _compressed_form(values: Mapping[str, object]) -> str:
    form = values.get("format")
    if form == "nvfp4-pack-quantized":
        return "NVFP4"
    if form == "pack-quantized":
        return f"INT{_bits(values) or 4}"
    return f"(format {form!r})"


def _bits(values: Mapping[str, object]) -> int | None:
    """``num_bits`` of the weights in the first config group, if it is there."""
    groups = values.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        bits = weights.get("num_bits") if isinstance(weights, Mapping) else None
        if isinstance(bits, int):
            return bits
    return None
