"""Continue a text, then stream one: the shortest programs that generate."""

import deltaloom

llm = deltaloom.LLM("tiny-next")  # a bundled name or the folder of a checkpoint

result = llm.generate("Once upon a time", deltaloom.SamplingParams(max_tokens=24, temperature=0.7, top_p=0.8, seed=1))
print(result.prompt, result.outputs[0].text, sep="")
print(f"({result.outputs[0].finish_reason} after {result.metrics.generated_tokens} tokens, seed {result.seed})")

for piece in llm.stream("The sea was", deltaloom.SamplingParams(max_tokens=24, temperature=0)):
    print(piece.text, end="", flush=True)
print()
