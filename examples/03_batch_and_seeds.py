"""Many prompts at once, several samples of each, alternatives beside each token; a seed gives the same text in any company."""

from deltaloom import LLM, SamplingParams

llm = LLM("tiny-next", max_batch=4)
prompts = ["Once upon a time", "The", "It was a dark and stormy night, and", "She said", "In the beginning"]
params = SamplingParams(max_tokens=12, temperature=0.9, top_p=0.9, seed=11, n=2, stop=["\n\n"])

results = llm.generate(prompts, params)  # five prompts in groups of at most four, results in the order asked
for result in results:
    for output in result.outputs:
        print(f"{result.prompt}[{output.index}]{output.text!r}")

alone = llm.generate(prompts[2], params)
assert [output.text for output in alone.outputs] == [output.text for output in results[2].outputs]

question = [{"role": "user", "content": "What is the opposite of hot?"}]
(answer,) = llm.chat(question, params=SamplingParams(temperature=0, logprobs=2)).outputs
for token, entry in zip(answer.token_ids, answer.logprobs or [], strict=True):
    others = ", ".join(f"{llm.tokenizer.decode([i])!r} {p:.2f}" for i, p in zip(entry.top_ids, entry.top_logprobs))
    print(f"{llm.tokenizer.decode([token], skip_special_tokens=False)!r:>14}  {entry.logprob:6.2f}  likeliest: {others}")
