"""From a model's config.json to its layer graph, its compiled programs and their source; no weight is read."""

import deltaloom
from deltaloom.passes.driver import Variant

graphs = deltaloom.build_graph("tiny-next")
print(str(graphs.main).splitlines()[0])

driver = deltaloom.compile(graphs.main, deltaloom.CompileConfig(backends=("numpy",)))
outputs = ("last_logits",)
prefill = driver.program(Variant(decode=False, padded=False, outputs=outputs))
decode = driver.program(Variant(decode=True, padded=False, outputs=outputs))

for title, program in (("prefill", prefill), ("decode", decode)):
    (node,) = [node for node in program.graph.region("linear_layer").nodes if node.op.name == "gated_delta_rule"]
    assert node.placement
    refused = "; ".join(f"{refusal.kernel}: {refusal.reason}" for refusal in node.placement.refusals)
    print(f"{title}: the delta rule runs on {node.placement.kernel}" + (f" (refused {refused})" if refused else ""))

lines = decode.source.splitlines()
start = next(number for number, line in enumerate(lines) if line.startswith("def linear_layer"))
print(f"the decode program has {len(lines)} lines; its linear layer begins:")
print("\n".join(lines[start : start + 8]))
