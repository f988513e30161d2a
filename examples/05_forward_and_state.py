"""The level below LLM: token ids in, logits out, with an explicit state that can be copied."""

import numpy as np

import deltaloom

model = deltaloom.load("tiny-next", backend="numpy", dtype="float32")
prompt = [[46, 710, 830, 259, 622]]  # [batch, n]

state = model.new_state(batch=1)
out = model.forward(prompt, state=state, logits="last", output_hidden_states=True)
assert out.logits is not None and out.hidden_states is not None
print("logits", out.logits.shape, "hidden states", out.hidden_states.shape, "state", state.length, "tokens", state.nbytes, "bytes")

snapshot = state.copy()  # a recurrent state cannot be cut back; a copy can be gone back to
token = int(out.logits[0, -1].argmax())
for _ in range(5):
    step = model.forward([[token]], state=state, logits="last")
    assert step.logits is not None
    token = int(step.logits[0, -1].argmax())
print("after five steps", state.length, "tokens; the snapshot still has", snapshot.length)

whole = model.forward([[*prompt[0], 1, 2, 3]]).logits
parts = model.forward([[1, 2, 3]], state=snapshot).logits
assert whole is not None and parts is not None
print("one call and two calls differ by at most", f"{np.abs(whole[:, 5:] - parts).max():.1e}")
