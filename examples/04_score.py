"""How likely a continuation is: multiple choice by log-probability."""

import deltaloom

llm = deltaloom.LLM("tiny-next")
template = "<|im_start|>user\nWhat is the capital of {}?<|im_end|>\n<|im_start|>assistant\n"
choices = ["Paris", "Rome", "Madrid"]

for country in ("France", "Italy", "Spain"):
    scores = {city: llm.score(template.format(country), f"The capital of {country} is {city}.") for city in choices}
    best = max(scores, key=lambda city: scores[city].logprob)
    listed = ", ".join(f"{city} {score.logprob:.2f}" for city, score in scores.items())
    print(f"{country}: {best}  ({listed}; greedy: {scores[best].greedy})")
