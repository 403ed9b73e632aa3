"""The APIs that are served: what requests mean, and how answers are told.

chat.py             OpenAI's chat completions
completions.py      OpenAI's completions, and scores of a text
decoding.py         bytes as a typed request, or an error that names the field
errors.py           what goes wrong, as each API says it
messages.py         Anthropic's messages, and how many tokens they have
openapi.py          the APIs as an OpenAPI description, made from the types of requests
responses.py        OpenAI's responses, and how many tokens they have
responses_reply.py  how an answer is told as one: a list of items
sampling.py         how to choose tokens, as OpenAI's APIs have it; JSON and events as bytes
tokens.py           text to token ids and back
speech.py           tools, forms of answers, and the text of their parts
work.py             what an API asks of a model, and what happens meanwhile: where all APIs meet
"""
