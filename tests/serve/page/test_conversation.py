"""A conversation in the page, as somebody has it who types and clicks."""

from __future__ import annotations

import json
import threading
from pathlib import Path

from playwright.sync_api import Page, expect

from tests.hang import HANG_S
from tests.serve.page.conftest import Open
from tests.serve.page.fake_server import KEY, FakeServer, finish, reasoning, refusal, usage


def say(page: Page, text: str) -> None:
    page.fill("#message", text)
    page.press("#message", "Enter")


def texts(page: Page) -> list[str]:
    """What the turns show, without their reasoning."""
    return page.locator("article > .text").all_inner_texts()


def answered(page: Page, count: int = 1) -> None:
    expect(page.locator(".assistant:not(.busy)")).to_have_count(count)


def test_an_answer_appears_as_it_comes(open_page: Open, fake: FakeServer) -> None:
    """The prompt's progress, then each piece before the next is there, then figures; a screen reader is told."""
    first, second = threading.Event(), threading.Event()
    progress = {"comment": "prompt 128/512"}
    fake.answers = [[progress, first, "Hello", second, " **you**", finish(), usage(512, 2, 384)]]
    page = open_page()
    say(page, "Hi")
    answer = page.locator(".assistant")
    expect(answer.locator(".progress")).to_have_text("Reading the prompt: 128 of 512 tokens")
    first.set()
    expect(answer.locator("> .text")).to_have_text("Hello")
    expect(answer).to_have_attribute("aria-busy", "true")
    expect(page.locator("#send")).to_be_hidden()
    second.set()
    expect(answer.locator("strong")).to_have_text("you")
    expect(answer.locator(".figures")).to_contain_text("2 tokens")
    expect(answer.locator(".figures")).to_contain_text("384 of 512 prompt tokens reused")
    expect(answer.locator(".figures")).to_contain_text("tokens/s")
    expect(page.locator("#said")).to_have_text("Answer: Hello **you**")
    expect(page.locator("#message")).to_be_focused()
    (path, body) = fake.asked[0]
    assert path == "/v1/chat/completions"
    assert body["stream"] is True
    assert body["model"] == "tiny"
    assert body["messages"] == [{"role": "user", "content": "Hi"}]


def test_stop_ends_the_work_and_keeps_what_there_is(open_page: Open, fake: FakeServer) -> None:
    """By Escape: the server sees the client leave, the text stays, and the conversation goes on from it."""
    fake.answers = [["Once", threading.Event()], ["again", finish()]]
    page = open_page()
    say(page, "Tell")
    expect(page.locator(".assistant > .text")).to_have_text("Once")
    page.keyboard.press("Escape")
    answered(page)
    assert fake.left.wait(HANG_S)
    expect(page.locator(".assistant .figures")).to_contain_text("stopped")
    say(page, "more")
    answered(page, 2)
    assert [message["content"] for message in fake.asked[1][1]["messages"]] == ["Tell", "Once", "more"]


def test_a_turn_can_be_changed_and_an_answer_asked_anew(open_page: Open, fake: FakeServer) -> None:
    """Retry asks with what stood before the answer, Edit with the new words; what followed is gone."""
    fake.answers = [[text, finish()] for text in ("one", "two", "three", "four", "five")]
    page = open_page()
    say(page, "A")
    answered(page)
    say(page, "B")
    answered(page, 2)
    page.get_by_role("button", name="Retry this answer").last.click()
    expect(page.locator(".assistant > .text").last).to_have_text("three")
    assert texts(page) == ["A", "one", "B", "three"]
    assert [message["content"] for message in fake.asked[2][1]["messages"]] == ["A", "one", "B"]
    page.get_by_role("button", name="Edit what you said").first.click()
    field = page.get_by_label("What you said", exact=True)
    expect(field).to_be_focused()
    field.fill("changed")
    field.press("Escape")
    assert texts(page) == ["A", "one", "B", "three"]
    page.get_by_role("button", name="Edit what you said").first.click()
    field.fill("A2")
    field.press("Enter")
    expect(page.locator(".assistant > .text")).to_have_text("four")
    assert texts(page) == ["A2", "four"]
    assert [message["content"] for message in fake.asked[3][1]["messages"]] == ["A2"]
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator("article")).to_have_count(0)
    say(page, "C")
    answered(page)
    assert [message["content"] for message in fake.asked[4][1]["messages"]] == ["C"]


def test_settings_are_sent_and_wrong_ones_are_not(open_page: Open, fake: FakeServer) -> None:
    """What is filled in goes along, what is empty does not; a number out of range is pointed at."""
    fake.answers = [["x", finish()]]
    page = open_page()
    page.get_by_label("System message").fill("Be brief.")
    page.get_by_label("Top p").fill("1.5")
    say(page, "Hi")
    expect(page.get_by_label("Top p")).to_be_focused()
    assert fake.asked == []
    page.get_by_label("Top p").fill("0.9")
    page.get_by_label("Most tokens").fill("20")
    page.get_by_label("Seed").fill("7")
    page.get_by_label("Stop at text").fill("END")
    page.press("#message", "Enter")
    answered(page)
    (_, body) = fake.asked[0]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert {name: body.get(name) for name in ("top_p", "max_tokens", "seed", "stop", "temperature")} == {
        "top_p": 0.9, "max_tokens": 20, "seed": 7, "stop": "END", "temperature": None,
    }  # fmt: skip


def test_reasoning_is_folded_apart(open_page: Open, fake: FakeServer) -> None:
    """It can be opened, is no part of the answer, and does not go back to the model as one."""
    fake.answers = [[reasoning("Let me"), reasoning(" think."), "42", finish()], ["ok", finish()]]
    page = open_page()
    say(page, "Q")
    answered(page)
    thought = page.locator(".assistant .reasoning .text")
    expect(thought).to_be_hidden()
    page.locator(".assistant summary").click()
    expect(thought).to_have_text("Let me think.")
    assert texts(page) == ["Q", "42"]
    say(page, "R")
    answered(page, 2)
    assert fake.asked[1][1]["messages"][1] == {"role": "assistant", "content": "42"}


def test_a_model_is_chosen_and_one_without_a_template_continues_text(open_page: Open, fake: FakeServer) -> None:
    """Such a one gets the text of all turns, as it is, from the completions route; its text is shown as it is."""
    fake.models += [{"id": "base", "object": "model", "pocketmoe": {"chat": False}}]
    fake.answers = [[" **jumps**", finish()], [" far", finish("length")]]
    page = open_page()
    page.get_by_label("Model").select_option("base")
    say(page, "The fox")
    answered(page)
    say(page, " over")
    answered(page, 2)
    assert [path for path, _ in fake.asked] == ["/v1/completions"] * 2
    assert fake.asked[1][1]["prompt"] == "The fox **jumps** over"
    assert fake.asked[1][1]["model"] == "base"
    assert page.locator("article > .text").nth(1).text_content() == " **jumps**"
    expect(page.locator(".figures").last).to_contain_text("limit of tokens")
    page.reload()
    expect(page.get_by_label("Model")).to_have_value("base")


def test_a_key_is_asked_for_and_kept_in_the_tab(open_page: Open, fake: FakeServer) -> None:
    """A wrong one is refused with words; the right one is sent with every request and survives a reload of the tab."""
    fake.key = KEY
    fake.answers = [["in", finish()]]
    page = open_page(ready=False)
    field = page.get_by_label("API key")
    expect(field).to_be_focused()
    expect(page.locator("#message")).to_be_disabled()
    field.fill("wrong")
    field.press("Enter")
    expect(page.locator("#key-words")).to_have_text("The key was refused: this server wants its key")
    field.fill(KEY)
    field.press("Enter")
    expect(field).to_be_hidden()
    say(page, "Hi")
    answered(page)
    assert texts(page) == ["Hi", "in"]
    page.reload()
    expect(page.locator("#experts-words")).not_to_be_empty()
    expect(field).to_be_hidden()
    assert page.evaluate("Object.keys(localStorage).length + document.cookie.length") == 0


def test_what_goes_wrong_is_told_and_can_be_tried_again(open_page: Open, fake: FakeServer) -> None:
    """A full queue, an error within an answer, and a broken connection; what had come stays, and Retry asks anew."""
    fake.answers = [
        refusal(429, "All places are taken.", **{"Retry-After": "3"}),
        ["half", {"error": {"message": "an expert cannot be read"}}],
        ["half"],
        refusal(413, "<b>too long</b>"),
        ["whole", finish()],
    ]
    told = [
        "All places are taken. Try again in 3 s.",
        "an expert cannot be read",
        "The connection broke before the answer had ended.",
        "<b>too long</b>",
    ]
    page = open_page()
    say(page, "Hi")
    for words, text in zip(told, ("", "half", "half", ""), strict=True):
        expect(page.get_by_role("alert")).to_have_text(words)
        assert page.locator(".assistant > .text").text_content() == text
        page.get_by_role("button", name="Retry this answer").click()
    expect(page.locator(".assistant > .text")).to_have_text("whole")
    expect(page.get_by_role("alert")).to_have_count(0)


def test_a_conversation_is_saved_as_chat_reads_it(open_page: Open, fake: FakeServer, tmp_path: Path) -> None:
    """The file is one that `pocketmoe chat --load` takes."""
    from pocketmoe.runtime.conversation import read_conversation

    fake.answers = [[reasoning("hm"), "yes \U0001f98a", finish()]]
    page = open_page()
    page.get_by_label("System message").fill("Be brief.")
    say(page, "Q")
    answered(page)
    with page.expect_download() as download:
        page.get_by_role("button", name="Save").click()
    download.value.save_as(tmp_path / "saved.json")
    assert json.loads((tmp_path / "saved.json").read_text())
    assert read_conversation(tmp_path / "saved.json") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "yes \U0001f98a", "reasoning_content": "hm"},
    ]


def test_everything_works_by_keyboard_alone(open_page: Open, fake: FakeServer) -> None:
    """From the first Tab to an answer, its retry and a new conversation; a line break is Shift+Enter."""
    fake.answers = [["one", finish()], ["two", finish()]]
    page = open_page()
    page.keyboard.type("first")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("second")
    page.keyboard.press("Enter")
    answered(page)
    assert fake.asked[0][1]["messages"][0]["content"] == "first\nsecond"
    for _ in range(3):  # the send button is no stop while there is nothing to send: Copy, Retry of the answer before
        page.keyboard.press("Shift+Tab")
        if page.evaluate("document.activeElement.textContent") == "Retry":
            break
    page.keyboard.press("Enter")
    expect(page.locator(".assistant > .text")).to_have_text("two")
    page.evaluate("document.activeElement.blur()")
    page.reload()
    expect(page.locator("#message")).to_be_focused()


def test_who_reads_above_is_left_there(open_page: Open, fake: FakeServer) -> None:
    """The end is followed as it grows, but not away from somebody who has scrolled up."""
    more, end = threading.Event(), threading.Event()
    fake.answers = [["line\n\n" * 60, more, "line\n\n" * 60, end, finish()]]
    page = open_page()
    say(page, "long")
    expect(page.locator(".assistant p:not([class])")).to_have_count(60)
    place = "document.getElementById('turns').scrollTop"
    assert page.evaluate(place) > 200
    page.evaluate(f"{place} = 100")
    more.set()
    expect(page.locator(".assistant p:not([class])")).to_have_count(120)
    assert page.evaluate(place) == 100
    end.set()
    answered(page)
    assert page.evaluate(place) == 100
