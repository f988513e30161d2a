"""A conversation in which the model calls functions, gets their results and answers from them."""

import json
import re

import deltaloom

FUNCTIONS = {"add": lambda a, b: a + b, "multiply": lambda a, b: a * b}


def tool(name: str, description: str) -> dict[str, object]:
    number = {"type": "number"}
    parameters = {"type": "object", "properties": {"a": number, "b": number}, "required": ["a", "b"]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


llm = deltaloom.LLM("tiny-next")
tools = [tool("add", "Add two numbers"), tool("multiply", "Multiply two numbers")]
greedy = deltaloom.SamplingParams(max_tokens=64, temperature=0)
messages: list[dict[str, object]] = [{"role": "user", "content": "Use tools: add 96 and 82, then multiply the result by 2."}]

for _ in range(4):
    reply = llm.chat(messages, tools=tools, params=greedy).outputs[0].text
    found = re.search(r"<tool_call>\s*(\{.*\})\s*</tool_call>", reply, re.DOTALL)
    if found is None:
        print("model:", reply)
        break
    call = json.loads(found[1])
    result = FUNCTIONS[call["name"]](**call["arguments"])
    print("call: ", call["name"], call["arguments"], "->", result)
    messages.append({"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]})
    messages.append({"role": "tool", "content": json.dumps({"result": result})})
