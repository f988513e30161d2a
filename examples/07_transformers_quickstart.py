"""The Quickstart of a Qwen3-Next model card with its imports changed; it needs torch for return_tensors="pt"."""

from deltaloom import AutoModelForCausalLM, AutoTokenizer

model_name = "tiny-next"

tokenizer = AutoTokenizer.from_pretrained(model_name)
model = AutoModelForCausalLM.from_pretrained(model_name, dtype="auto", device_map="auto")

messages = [{"role": "user", "content": "What is the capital of France?"}]
text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
model_inputs = tokenizer([text], return_tensors="pt").to(model.device)

generated_ids = model.generate(**model_inputs, max_new_tokens=16384)
output_ids = generated_ids[0][len(model_inputs.input_ids[0]) :].tolist()

print("content:", tokenizer.decode(output_ids, skip_special_tokens=True))
