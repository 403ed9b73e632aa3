"""openai-agents: OpenAI's own agents, by responses: a tool is called, its result goes back, an object is the answer.

The first step has to call (`tool_choice` required); once there is something the tool is gone, and the form is left.
"""

import asyncio
import sys
from typing import Literal

from agents import (
    Agent,
    ModelSettings,
    OpenAIResponsesModel,
    RunContextWrapper,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from agents.items import ToolCallItem, ToolCallOutputItem
from openai import AsyncOpenAI
from pydantic import BaseModel


class Found(BaseModel):
    """An answer."""

    kind: Literal["index", "table"]
    count: Literal[0, 1, 2]


URL, MODEL = sys.argv[1:3]
set_tracing_disabled(True)  # else it would tell OpenAI


@function_tool(is_enabled=lambda context, _: not context.context)
def find(context: RunContextWrapper[list[str]], kind: Literal["index", "table"]) -> str:
    """Names in the database."""
    context.context.append(f"{kind}_1")
    return context.context[-1]


def told(items: list) -> list[str]:
    called = [f"find({item.raw_item.arguments})" for item in items if isinstance(item, ToolCallItem)]
    given = [f"-> {item.output}" for item in items if isinstance(item, ToolCallOutputItem)]
    return [*called, *given]


async def main() -> None:
    client = AsyncOpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)
    settings = ModelSettings(tool_choice="required", parallel_tool_calls=False, temperature=0, max_tokens=60)
    model = OpenAIResponsesModel(model=MODEL, openai_client=client)
    agent = Agent(
        name="clerk", instructions="Look it up.", model=model, tools=[find], output_type=Found, model_settings=settings
    )
    whole = await Runner.run(agent, "Which index is there?", context=[])
    print(*told(whole.new_items))
    print("answer:  ", repr(whole.final_output))
    print("steps:   ", len(whole.raw_responses))
    streamed = Runner.run_streamed(agent, "Which index is there?", context=[])
    deltas = [event.data.delta async for event in streamed.stream_events()
              if event.type == "raw_response_event" and event.data.type == "response.output_text.delta"]  # fmt: skip
    same = streamed.final_output == whole.final_output and told(streamed.new_items) == told(whole.new_items)
    print("streamed:", "the same" if same else repr(streamed.final_output))
    assert same
    assert Found.model_validate_json("".join(deltas)) == whole.final_output


asyncio.run(main())
