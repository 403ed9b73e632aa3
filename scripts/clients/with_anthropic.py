"""anthropic: Anthropic's own library: text, its stream, a call and its result, tokens counted, refusals."""

import sys

import anthropic

URL, MODEL = sys.argv[1:3]
client = anthropic.Anthropic(base_url=URL, api_key="none", max_retries=0)
said = [{"role": "user", "content": "To create an index, use the"}]
asked = {"model": MODEL, "messages": said, "max_tokens": 12}

answer = client.messages.create(**asked)
text = answer.content[0].text
print("answer:  ", repr(text))
print("ends by: ", answer.stop_reason)
print("tokens:  ", answer.usage.input_tokens, "and", answer.usage.output_tokens)
print("counted: ", client.messages.count_tokens(model=MODEL, messages=said).input_tokens)
with client.messages.stream(**asked) as stream:
    streamed = "".join(stream.text_stream)
print("streamed:", "the same" if streamed == text else repr(streamed))

schema = {"type": "object", "properties": {"kind": {"enum": ["index", "table"]}}, "required": ["kind"]}
tools = [{"name": "find", "description": "Find some.", "input_schema": {**schema, "additionalProperties": False}}]
choice = {"type": "tool", "name": "find"}
first = client.messages.create(**{**asked, "max_tokens": 60}, tools=tools, tool_choice=choice)
(call,) = first.content
print("a call:  ", f"{call.name}({call.input})", first.stop_reason)
result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "index_1"}]}
then = [*said, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
last = client.messages.create(**{**asked, "messages": then}, tools=tools, tool_choice={"type": "none"})
print("then:    ", repr(last.content[0].text))
image = {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}
for wrong in (
    {"messages": [{"role": "user", "content": [image]}]},
    {"messages": [*said, {"role": "assistant", "content": "CREATE"}]},
    {"messages": [{"role": "user", "content": [{**result, "tool_use_id": "call_0"}]}]},
):
    try:
        client.messages.create(**{**asked, **wrong})
    except anthropic.BadRequestError as error:
        print("refused: ", error.body["error"]["message"])
assert streamed == text
