"""The least time that a token can take on this machine: bytes that must be read, operations that must be done.

    python benchmarks/floor.py [--profile FILE]

From the ops' cost rules, as `deltaloom roofline` has them, for the models of `make_midsize.py` and the 80B itself with weights in
several forms. Decode reads each weight that a token uses once, the state twice (it is written too), keys and values once. Prefill
reads the experts that its tokens reach if every expert is as likely. Keys, values, states and activations are float32. The machine
is measured, or given as a profile (a TOML or JSON file, h100 or h200).
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

from make_midsize import PRESETS, Geometry, config

import deltaloom
from deltaloom.graph.ir import Graph
from deltaloom.passes.cache import default_folder
from deltaloom.passes.config import CompileConfig
from deltaloom.passes.driver import Driver
from deltaloom.passes.pipeline import Context
from deltaloom.runtime.compile import backends_of
from deltaloom.runtime.device_limits import device_profile
from deltaloom.runtime.device_profile import DeviceProfile, named_profile
from deltaloom.runtime.roofline import Roofline, Step, predict

FORMS = ("float32", "bf16", "int8", "int4")
MODELS = {
    "next-0.3b": PRESETS["next-0.3b"],
    "next-80b-l4e128": PRESETS["next-80b-l4e128"],
    "80B, 48 layers": replace(PRESETS["next-80b-l4"], num_hidden_layers=48, vocab_size=151936),
}
STEPS = [Step("decode", 1, 1, context) for context in (128, 2048, 32768)] + [Step("prefill", 1, n, 0) for n in (128, 512, 2048)]


def compile_config(form: str) -> CompileConfig:
    """Weights in ``form``, the head too."""
    quantise = {} if form == "float32" else {"lm_head*": form, "*": form}
    return CompileConfig(dtype="float32", quantise=quantise)


def layer_graph(geometry: Geometry) -> Graph:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config(geometry, "float32")))
        return deltaloom.build_graph(path).main


def floors(geometry: Geometry, form: str, profile: DeviceProfile) -> list[Roofline]:
    """What every step takes at least."""
    options = compile_config(form)
    ctx = Context(options, backends_of(options))
    decode, prefill = STEPS[0].variant, STEPS[-1].variant
    driver = Driver(layer_graph(geometry), ctx, planned=(decode, prefill))
    return [predict(driver.program(step.variant).graph, step, profile) for step in STEPS]


def report(name: str, geometry: Geometry, profile: DeviceProfile) -> None:
    found = {form: floors(geometry, form, profile) for form in FORMS}
    print(f"\n{name}")
    for number, step in enumerate(STEPS):
        tokens = step.batch * step.tokens
        cells = []
        for form, rows in found.items():
            seconds = rows[number].floor
            cells.append(f"{form} {1e3 * seconds:.2f} ms = {tokens / seconds:.1f} tokens/s")
        after = f"decode after {step.context}" if step.kind == "decode" else f"prefill of {tokens}"
        work = found["float32"][number].work
        print(f"  {after} ({work.flops / tokens / 1e9:.2f} GFLOP a token, {work.bytes / 1e6:.0f} MB): " + " | ".join(cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--profile", help="limits of the machine: a TOML or JSON file, h100 or h200; measured if not given")
    arguments = parser.parse_args()
    plain = compile_config("float32")
    ctx = Context(plain, backends_of(plain))
    profile = named_profile(arguments.profile) if arguments.profile else device_profile(ctx, folder=default_folder())
    print(f"{profile.name}: {profile.bandwidth / 1e9:.1f} GB/s, {profile.flops['float32'] / 1e9:.0f} GFLOP/s ({profile.source})")
    for name, geometry in MODELS.items():
        report(name, geometry, profile)


if __name__ == "__main__":
    main()
