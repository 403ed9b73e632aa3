"""Measures any OpenAI-compatible server: the profile's workload, streamed, by one user and by several at once.

Times are taken here, as a user sees them: when the request is sent, and when each piece of text arrives. How many
tokens a piece has is counted by the server where it says so (`stream_options.include_usage`), else a piece counts as
one token, and the record says which. Nothing of the answers is kept, and the key goes nowhere but into the header.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import math
import ssl
import statistics
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import SplitResult, urlsplit

from pocketmoe.bundle.progress import Progress, no_progress
from pocketmoe.errors import BadInput
from pocketmoe.jsonfile import is_array, is_object
from pocketmoe.profiles.compare.deadline import Deadline

FORMAT = 1
_MAX_LINE = 1 << 20
_MAX_PIECES = 1 << 20
_MOST_TIMEOUTS = 10  # that a whole answer may take
_WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
_REMEDY = "Check the address, and that the server is up."

Api = Literal["completions", "chat"]


class EndpointError(BadInput):
    """A server that cannot be measured."""


@dataclass(frozen=True)
class Target:
    """A server and the model on it. `url` is its base, with or without /v1."""

    url: str
    model: str
    api: Api = "completions"
    key: str = field(default="", repr=False)
    timeout_s: float = 120.0


@dataclass(frozen=True)
class LoadTest:
    """How much is asked: `requests` at each number of users, never fewer than the users, after one that is not counted.

    No more than `most_requests` in all.
    """

    prompt_tokens: int
    output_tokens: int
    users: tuple[int, ...] = (1, 8)
    requests: int = 4
    most_requests: int = 200


@dataclass(frozen=True)
class Level:
    """So many users at once. Times in seconds; rates are of output tokens."""

    users: int
    requests: int
    ttft_median_s: float
    ttft_p95_s: float
    tokens_per_s_per_user: float  # between the first piece and the last, median
    step_p95_s: float  # between two pieces
    tokens_per_s: float  # of all users together: tokens over the time that it took
    prompt_tokens: float  # as the server counted them, mean; as asked for where it does not say
    output_tokens: float


@dataclass(frozen=True)
class Measurement:
    """The record of an endpoint, as it is written to a file and read again."""

    format: int
    url: str  # without credentials
    model: str
    api: str
    measured_at: str
    counted_by: Literal["server", "pieces"]
    levels: tuple[Level, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Answer:
    sent: float
    arrivals: tuple[float, ...]
    prompt_tokens: int | None
    output_tokens: int | None

    @property
    def tokens(self) -> int:
        return self.output_tokens or len(self.arrivals)


def measure(target: Target, test: LoadTest, measured_at: str, progress: Progress = no_progress) -> Measurement:
    """Run the test. Raises EndpointError for a server that refuses, breaks off, is silent, or sends no tokens."""
    counts = [max(test.requests, users) for users in test.users]
    total = 1 + sum(counts)
    if total > test.most_requests:
        raise BadInput(
            f"{total} requests would be sent, more than {test.most_requests}", "Ask for fewer users or requests."
        )
    place = _place(target)
    done = 0
    tick = threading.Lock()
    asking: set[Deadline] = set()

    def ask(number: int) -> _Answer:
        nonlocal done
        answer = _ask(target, place, test, number, asking)
        with tick:
            done += 1
            progress("asking the endpoint", done, total)
        return answer

    ask(0)
    levels: list[Level] = []
    by_server, first = True, 1
    for users, count in zip(test.users, counts, strict=True):
        began = time.perf_counter()
        with ThreadPoolExecutor(users) as pool, all_or_none(pool, asking):
            answers = list(pool.map(ask, range(first, first + count)))
        levels.append(_level(users, answers, time.perf_counter() - began, test))
        by_server &= all(answer.output_tokens is not None for answer in answers)
        first += count
    return Measurement(
        format=FORMAT,
        url=f"{place.scheme}://{place.hostname}:{_port(place)}",
        model=target.model,
        api=target.api,
        measured_at=measured_at,
        counted_by="server" if by_server else "pieces",
        levels=tuple(levels),
        notes=_notes(levels, test, by_server),
    )


@contextlib.contextmanager
def all_or_none(pool: ThreadPoolExecutor, asking: set[Deadline]) -> Generator[None]:
    """One request that fails, or a Ctrl-C, ends the others too, which else would be waited for."""
    try:
        yield
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for deadline in tuple(asking):
            deadline.end()
        raise


def _level(users: int, answers: Sequence[_Answer], took_s: float, test: LoadTest) -> Level:
    firsts = [answer.arrivals[0] - answer.sent for answer in answers]
    rates = [
        (answer.tokens - 1) / (answer.arrivals[-1] - answer.arrivals[0])
        for answer in answers
        if answer.tokens > 1 and answer.arrivals[-1] > answer.arrivals[0]
    ]
    gaps = [b - a for answer in answers for a, b in itertools.pairwise(answer.arrivals)]
    if not rates:
        raise EndpointError("the endpoint sent each answer in one piece, so that no rate can be told", _REMEDY)
    return Level(
        users=users,
        requests=len(answers),
        ttft_median_s=statistics.median(firsts),
        ttft_p95_s=_p95(firsts),
        tokens_per_s_per_user=statistics.median(rates),
        step_p95_s=_p95(gaps),
        tokens_per_s=sum(answer.tokens for answer in answers) / took_s,
        prompt_tokens=statistics.mean(answer.prompt_tokens or test.prompt_tokens for answer in answers),
        output_tokens=statistics.mean(answer.tokens for answer in answers),
    )


def _p95(values: Sequence[float]) -> float:
    return sorted(values)[math.ceil(0.95 * len(values)) - 1]


def _notes(levels: Sequence[Level], test: LoadTest, by_server: bool) -> tuple[str, ...]:
    notes: list[str] = []
    if not by_server:
        notes.append("the server does not count tokens: each piece of text was taken as one")
    got = statistics.mean(level.output_tokens for level in levels)
    if abs(got / test.output_tokens - 1) > 0.05:
        notes.append(f"answers had {got:.0f} tokens, {test.output_tokens} were asked for")
    read = statistics.mean(level.prompt_tokens for level in levels)
    if abs(read / test.prompt_tokens - 1) > 0.1:
        notes.append(f"prompts had {read:.0f} tokens, {test.prompt_tokens} were meant")
    return tuple(notes)


def _place(target: Target) -> SplitResult:
    try:
        place = urlsplit(target.url)
        port = _port(place)
    except ValueError:  # a port of 99999, half a bracket
        place, port = SplitResult("", "", "", "", ""), 0
    plain = target.url.isprintable() and " " not in target.url and place.path.isascii()
    if not plain or place.scheme not in ("http", "https") or not place.hostname or not port:
        raise BadInput(f"{_shown(target.url)!r} is not the address of a server", "Write http://HOST:PORT.")
    if place.username or place.password:
        raise BadInput("the address has a password in it", "Put the key into a file: --api-key-file FILE.")
    local = place.hostname in ("localhost", "127.0.0.1", "::1")
    if target.key and place.scheme == "http" and not local:
        raise BadInput(
            f"the key would go to {place.hostname} unencrypted", "Use https, or a tunnel to localhost, or no key."
        )
    return place


def _port(place: SplitResult) -> int:
    return place.port or (443 if place.scheme == "https" else 80)


def _shown(url: str) -> str:
    return url.split("@")[-1][:120]


def _ask(target: Target, place: SplitResult, test: LoadTest, number: int, asking: set[Deadline]) -> _Answer:
    """One request, in `_MOST_TIMEOUTS` times the timeout at most. While it lasts, its deadline is in `asking`."""
    with Deadline(_MOST_TIMEOUTS * target.timeout_s, target.timeout_s) as deadline:
        asking.add(deadline)
        try:
            return _exchange(deadline, target, place, test, number)
        except (EndpointError, OSError, http.client.HTTPException, ValueError) as error:
            where = f"{place.hostname}:{_port(place)}"
            if deadline.passed:
                remedy = "Ask for fewer tokens, or a longer --timeout."
                raise EndpointError(f"{where} takes too long to answer", remedy) from error
            if isinstance(error, EndpointError):
                raise
            what = str(error) or type(error).__name__
            raise EndpointError(f"{where} cannot be measured ({what})", _REMEDY) from error
        finally:
            asking.discard(deadline)


def _exchange(deadline: Deadline, target: Target, place: SplitResult, test: LoadTest, number: int) -> _Answer:
    """Raises EndpointError, OSError, HTTPException, and ValueError for a chunk of length -5."""
    base = place.path.rstrip("/")
    base = base if base.endswith("/v1") else f"{base}/v1"
    route = "/chat/completions" if target.api == "chat" else "/completions"
    headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
    if target.key:
        headers["Authorization"] = f"Bearer {target.key}"
    with contextlib.closing(_connection(place)) as connection:
        sent = time.perf_counter()
        tls = ssl.create_default_context() if place.scheme == "https" else None
        connection.sock = deadline.connect(place.hostname or "", _port(place), tls)
        connection.request("POST", base + route, json.dumps(_body(target, test, number)), headers)
        with connection.getresponse() as response:
            if response.status != 200:
                raise EndpointError(f"{base}{route} answers {response.status} {_said(response, target.key)}", _REMEDY)
            return _listen(response, sent)


def _connection(place: SplitResult) -> http.client.HTTPConnection:
    kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
    return kinds[place.scheme](place.hostname or "", _port(place))


def _body(target: Target, test: LoadTest, number: int) -> dict[str, Any]:
    """A prompt of about so many tokens, another for each request so that no server answers from its cache."""
    words = [f"{number}:", *(_WORDS[(7 * i + number) % len(_WORDS)] for i in range(max(1, test.prompt_tokens - 3)))]
    prompt = " ".join(words)
    body: dict[str, Any] = {
        "model": target.model,
        "max_tokens": test.output_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,  # vLLM's: answers of one length
    }
    return body | ({"messages": [{"role": "user", "content": prompt}]} if target.api == "chat" else {"prompt": prompt})


def _said(response: http.client.HTTPResponse, key: str) -> str:
    text = response.read(300).decode(errors="replace")
    return (text.replace(key, "...") if key else text).strip() or response.reason


def _listen(response: http.client.HTTPResponse, sent: float) -> _Answer:
    arrivals: list[float] = []
    prompt_tokens = output_tokens = None
    for event in _events(response):
        if _text_of(event):
            arrivals.append(time.perf_counter())
            if len(arrivals) > _MAX_PIECES:
                raise EndpointError("the endpoint does not stop", _REMEDY)
        usage = event.get("usage")
        if isinstance(usage, dict):
            prompt_tokens = _count(usage.get("prompt_tokens")) or prompt_tokens
            output_tokens = _count(usage.get("completion_tokens")) or output_tokens
    if not arrivals:
        raise EndpointError("the endpoint's answer has no text", "Check the model's name, or try --api chat.")
    return _Answer(sent, tuple(arrivals), prompt_tokens, output_tokens)


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The JSON objects of a stream of server-sent events, up to [DONE]."""
    while line := response.readline(_MAX_LINE):
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            return
        try:
            event = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise EndpointError(f"the endpoint sends what is not JSON ({data[:60]!r})", _REMEDY) from error
        if is_object(event):
            yield event
    raise EndpointError("the endpoint broke off before the end of its answer", _REMEDY)


def _text_of(event: dict[str, Any]) -> str:
    choices = event.get("choices")
    if not is_array(choices) or not choices or not is_object(choice := choices[0]):
        return ""
    delta = choice.get("delta")
    found = [choice.get("text")]
    found += [delta.get(name) for name in ("content", "reasoning_content", "reasoning")] if is_object(delta) else []
    return "".join(text for text in found if isinstance(text, str))


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and 0 < value < 1 << 31 else None
