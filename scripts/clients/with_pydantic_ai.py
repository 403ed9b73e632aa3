"""pydantic-ai: an agent that uses a tool, by three APIs, streamed and not, and answers by text or with an object.

This model does not call tools by itself, so its first step has to (`tool_choice` required, held by a grammar), as has
the last where the answer is a call too. In the middle it may: with a form an answer is either a call or an object.
"""

import asyncio
import sys
from dataclasses import dataclass
from typing import Literal

from anthropic import AsyncAnthropic
from openai import AsyncOpenAI
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, RunContext, ToolOutput
from pydantic_ai.capabilities import AbstractCapability
from pydantic_ai.messages import ModelMessage, ToolCallPart, ToolReturnPart
from pydantic_ai.models import Model
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings

URL, MODEL = sys.argv[1:3]
ASKED = "Which index does the table have?"


class Found(BaseModel, extra="forbid"):
    """An answer."""

    kind: Literal["index", "table"]
    count: Literal[0, 1, 2]


@dataclass
class Steps(AbstractCapability[None]):
    """What each step of a run may choose; the last goes for all that follow."""

    choices: tuple[object, ...]

    def get_model_settings(self):
        def settings(context: RunContext[None]) -> ModelSettings:
            choice = self.choices[min(context.run_step, len(self.choices)) - 1]
            return ModelSettings(tool_choice=choice, temperature=0, max_tokens=160, parallel_tool_calls=False)

        return settings


def models() -> dict[str, Model]:
    openai = OpenAIProvider(openai_client=AsyncOpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0))
    anthropic = AnthropicProvider(anthropic_client=AsyncAnthropic(base_url=URL, api_key="none", max_retries=0))
    return {
        "chat completions": OpenAIChatModel(MODEL, provider=openai),
        "responses": OpenAIResponsesModel(MODEL, provider=openai),
        "messages": AnthropicModel(MODEL, provider=anthropic),
    }


def agent(model: Model, output: object, *choices: object) -> Agent:
    made = Agent(model, output_type=output, capabilities=[Steps(choices)])

    @made.tool_plain
    def find(kind: Literal["index", "table"], most: Literal[1, 2, 3]) -> list[str]:
        """Names in the database."""
        return [f"{kind}_{number}" for number in range(most)]

    return made


def told(messages: list[ModelMessage]) -> str:
    """The calls of a run and what they came to."""
    parts = [part for message in messages for part in message.parts]
    calls = {part.tool_call_id: part for part in parts if isinstance(part, ToolCallPart)}
    results = [part for part in parts if isinstance(part, ToolReturnPart) and part.tool_name == "find"]
    assert all(part.tool_call_id in calls for part in results)
    found = [(calls[part.tool_call_id].args_as_dict(), part.content) for part in results]
    return "; ".join(f"find({', '.join(f'{key}={args[key]!r}' for key in args)}) -> {gave}" for args, gave in found)


async def ask(name: str, how: str, made: Agent) -> None:
    whole = await made.run(ASKED)
    async with made.run_stream(ASKED) as stream:
        streamed = await stream.get_output()
    print(f"{name}, {how}:")
    print("   ", told(whole.all_messages()))
    print("   ", repr(whole.output[:40] if isinstance(whole.output, str) else whole.output))
    assert streamed == whole.output
    assert told(stream.all_messages()) == told(whole.all_messages()) != ""


async def main() -> None:
    for name, model in models().items():
        await ask(name, "text", agent(model, str, "required", "none"))
        await ask(name, "an object by a last call", agent(model, ToolOutput(Found), ["find"], ["final_result"]))
        if name != "messages":  # whose form of answers is beta
            await ask(name, "an object by a form", agent(model, NativeOutput(Found), "required", "auto", "none"))


asyncio.run(main())
