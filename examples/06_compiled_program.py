"""From a model's config.json to its layer graph, its compiled programs and their source; no weight is read."""

import deltaloom
from deltaloom.runtime.compile import KINDS

graphs = deltaloom.build_graph("tiny-next")
print(str(graphs.main).splitlines()[0])

model = deltaloom.compile(graphs.main, deltaloom.CompileConfig(backends=("numpy",)))

for row in model.ledger["shared"]:
    print(f"{row.name}: {row.before['linear_layer']} nodes in a linear layer, then {row.after['linear_layer']}")

for kind in KINDS:
    for group in model.explain(kind):
        if group.body == "linear_layer" and "delta" in group.op:
            refused = "; ".join(map(str, group.refusals))
            print(f"{kind}: {group.op} runs on {group.kernel}" + (f" (refused {refused})" if refused else ""))

lines = model.source("decode").splitlines()
start = next(number for number, line in enumerate(lines) if line.startswith("def linear_layer"))
print(f"the decode program has {len(lines)} lines; its linear layer begins:")
print("\n".join(lines[start : start + 8]))
