"""langchain-openai: a chat model within LangChain."""

import sys

from langchain_core.messages import HumanMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI

URL, MODEL = sys.argv[1:3]
model = ChatOpenAI(base_url=f"{URL}/v1", api_key="none", model=MODEL, temperature=0, max_tokens=12)

answer = model.invoke([HumanMessage("To create an index, use the")])
print("answer:   ", repr(answer.content))
print("tokens:   ", answer.usage_metadata["input_tokens"], "and", answer.usage_metadata["output_tokens"])
pieces = [piece.content for piece in model.stream([HumanMessage("To create an index, use the")])]
print("streamed: ", "the same" if "".join(pieces) == answer.content else pieces)
chain = ChatPromptTemplate.from_messages([("human", "To {verb} a table, use the")]) | model
found = chain.batch([{"verb": "create"}, {"verb": "drop"}])
print("a chain:  ", [each.content for each in found])
certain = model.bind(logprobs=True, top_logprobs=2).invoke([HumanMessage("To create an index, use the")])
tokens = certain.response_metadata["logprobs"]["content"]
print("logprobs: ", [(token["token"], round(token["logprob"], 2)) for token in tokens[:3]])
assert "".join(pieces) == answer.content
