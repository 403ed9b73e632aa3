"""openai (responses): OpenAI's own library on its newer API: text, an object, a call and its result, refusals."""

import sys
from typing import Literal

import openai
from openai import OpenAI
from pydantic import BaseModel

URL, MODEL = sys.argv[1:3]
client = OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)
asked = {"model": MODEL, "input": "To create an index, use the", "temperature": 0, "max_output_tokens": 12}

answer = client.responses.create(**asked)
print("answer:  ", repr(answer.output_text))
print("status:  ", answer.status, "by", answer.incomplete_details.reason)
print("tokens:  ", answer.usage.input_tokens, "and", answer.usage.output_tokens)
with client.responses.stream(**asked) as stream:
    streamed = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
print("streamed:", "the same" if streamed == answer.output_text else repr(streamed))


class Kind(BaseModel):
    kind: Literal["index", "table"]


held = client.responses.parse(**{**asked, "max_output_tokens": 60}, text_format=Kind)
print("an object:", repr(held.output_parsed))

find = openai.pydantic_function_tool(Kind, name="find")["function"]
tools = [{"type": "function", **find}]
forced = {"tool_choice": {"type": "function", "name": "find"}, "parallel_tool_calls": False, "max_output_tokens": 60}
first = client.responses.create(**{**asked, **forced}, tools=tools)
(call,) = first.output
print("a call:  ", f"{call.name}({call.arguments})")
result = {"type": "function_call_output", "call_id": call.call_id, "output": "index_1"}
items = [{"role": "user", "content": asked["input"]}, *first.output, result]
last = client.responses.create(**{**asked, "input": items}, tools=tools, tool_choice="none")
print("then:    ", repr(last.output_text))
for wrong in ({"previous_response_id": first.id}, {"input": [result]}, {"tools": [{"type": "web_search"}]}):
    try:
        client.responses.create(**{**asked, **wrong})
    except openai.BadRequestError as error:
        print("refused: ", error.param, "-", error.code)
assert streamed == answer.output_text
