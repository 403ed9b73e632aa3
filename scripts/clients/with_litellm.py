"""litellm: the library that many tools call models through."""

import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the network for prices

import litellm

URL, MODEL = sys.argv[1:3]
litellm.suppress_debug_info = True
asked = {
    "model": f"openai/{MODEL}",
    "api_base": f"{URL}/v1",
    "api_key": "none",
    "messages": [{"role": "user", "content": "To create an index, use the"}],
    "temperature": 0,
    "max_tokens": 12,
}

answer = litellm.completion(**asked)
text = answer.choices[0].message.content
print("answer:   ", repr(text))
print("finish:   ", answer.choices[0].finish_reason)
print("tokens:   ", answer.usage.prompt_tokens, "and", answer.usage.completion_tokens)
streamed = "".join(piece.choices[0].delta.content or "" for piece in litellm.completion(**asked, stream=True))
print("streamed: ", "the same" if streamed == text else repr(streamed))
base = {"model": f"text-completion-openai/{MODEL}", "api_base": f"{URL}/v1", "api_key": "none"}
two = litellm.text_completion(**base, prompt="The table", max_tokens=6, n=2, temperature=0)
print("completed:", [choice.text for choice in two.choices])
try:
    litellm.completion(**{**asked, "model": "openai/no-such-model"})
except litellm.NotFoundError as error:
    print("refused:  ", type(error).__name__)
assert streamed == text
