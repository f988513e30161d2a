"""The least time that a token can take on a machine: bytes that must be read, operations that must be done.

    python benchmarks/floor.py --bandwidth 40 --gflops 180

Decode reads each active weight once, reads and writes the delta-rule state once, and reads the keys and values once.
Prefill of T tokens reads the weights of each expert that it touches once and does every multiplication; its floor is
the larger of the two. Keys, values and state are float32. Both flags describe the machine: bandwidth in 10^9 bytes/s,
speed in 10^9 operations/s.
"""

import argparse
from dataclasses import dataclass, replace

from make_midsize import PRESETS, Geometry

WEIGHT_BITS = {"f32": 32.0, "bf16": 16.0, "8 bit": 8.5, "4 bit": 4.85}
MODELS = {
    "next-0.3b": PRESETS["next-0.3b"],
    "next-80b-l4e128": PRESETS["next-80b-l4e128"],
    "80B, 48 layers": replace(PRESETS["next-80b-l4"], num_hidden_layers=48, vocab_size=151936),
}
CHUNK = 64  # tokens that the chunked delta rule takes at once


@dataclass(frozen=True)
class Cost:
    """What a model of this geometry has to read and to do; weights are counted in numbers, not bytes."""

    geometry: Geometry

    @property
    def attention_layers(self) -> int:
        return self.geometry.num_hidden_layers // self.geometry.full_attention_interval

    @property
    def delta_layers(self) -> int:
        return self.geometry.num_hidden_layers - self.attention_layers

    @property
    def expert(self) -> int:
        return 3 * self.geometry.hidden_size * self.geometry.moe_intermediate_size

    def active(self) -> dict[str, int]:
        """The weights that one token uses, by part."""
        g, layers = self.geometry, self.geometry.num_hidden_layers
        delta = 2 * g.key_dim + 2 * g.value_dim + 2 * g.linear_num_value_heads + g.value_dim
        shared = g.num_experts + 1 + 3 * g.shared_expert_intermediate_size
        return {
            "delta rule": self.delta_layers * g.hidden_size * delta,
            "attention": self.attention_layers * g.hidden_size * (3 * g.query_dim + 2 * g.kv_dim),
            "router and shared expert": layers * g.hidden_size * shared,
            "experts": layers * g.num_experts_per_tok * self.expert,
            "head": g.hidden_size * g.vocab_size,
        }

    @property
    def state_bytes(self) -> int:
        return self.delta_layers * self.geometry.value_dim * self.geometry.linear_key_head_dim * 4

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values that one token of context adds."""
        return self.attention_layers * 2 * self.geometry.kv_dim * 4

    def decode_bytes(self, context: int, bits: float) -> float:
        return sum(self.active().values()) * bits / 8 + 2 * self.state_bytes + context * self.kv_bytes

    def prefill_flops(self, tokens: int) -> int:
        g, active = self.geometry, self.active()
        body = sum(active.values()) - active["head"]
        chunked = 6 * g.linear_key_head_dim * g.linear_value_head_dim
        chunked += 4 * CHUNK * (g.linear_key_head_dim + g.linear_value_head_dim)
        delta = tokens * self.delta_layers * g.linear_num_value_heads * chunked
        attention = 2 * tokens * tokens * g.query_dim * self.attention_layers
        return 2 * body * tokens + delta + attention + 2 * active["head"]

    def experts_hit(self, tokens: int) -> float:
        """How many experts of a layer ``tokens`` tokens are expected to touch when routing is even."""
        g = self.geometry
        return float(g.num_experts * (1 - (1 - g.num_experts_per_tok / g.num_experts) ** tokens))

    def prefill_bytes(self, tokens: int, bits: float) -> float:
        active = self.active()
        experts = self.geometry.num_hidden_layers * self.experts_hit(tokens) * self.expert
        return (sum(active.values()) - active["experts"] + experts) * bits / 8


def report(name: str, cost: Cost, bandwidth: float, gflops: float) -> None:
    active = cost.active()
    parts = ", ".join(f"{part} {count / 1e6:.1f}" for part, count in active.items())
    print(f"\n{name}: {sum(active.values()) / 1e6:.1f} M active weights a token ({parts});")
    print(f"  state {cost.state_bytes / 1e6:.1f} MB, keys and values {cost.kv_bytes} bytes a token of context")
    for context in (128, 2048, 32768):
        cells = []
        for dtype, bits in WEIGHT_BITS.items():
            milliseconds = cost.decode_bytes(context, bits) / bandwidth / 1e6
            cells.append(f"{dtype} {milliseconds:.2f} ms = {1e3 / milliseconds:.1f} tokens/s")
        print(f"  decode at {context}: " + " | ".join(cells))
    for tokens in (128, 512, 2048):
        cells = []
        work = cost.prefill_flops(tokens) / gflops / 1e9
        for dtype, bits in WEIGHT_BITS.items():
            reading = cost.prefill_bytes(tokens, bits) / bandwidth / 1e9
            limit = "operations" if work >= reading else "bytes"
            cells.append(f"{dtype} {tokens / max(work, reading):.0f} tokens/s ({limit})")
        print(f"  prefill of {tokens}: {cost.experts_hit(tokens):.0f} experts a layer, " + " | ".join(cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--bandwidth", type=float, default=40.0, help="memory bandwidth, 10^9 bytes/s")
    parser.add_argument("--gflops", type=float, default=180.0, help="float32 multiply-add speed, 10^9 operations/s")
    arguments = parser.parse_args()
    for name, geometry in MODELS.items():
        report(name, Cost(geometry), arguments.bandwidth, arguments.gflops)


if __name__ == "__main__":
    main()
