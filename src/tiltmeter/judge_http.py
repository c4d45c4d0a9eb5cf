"""A judge model behind an OpenAI-compatible URL: OpenAI, vLLM, llama.cpp, OpenRouter and the like.

`HttpChat` asks one prompt at a time for the judges in `judge_model`, with bounded concurrency, timeouts, and
retries that honour Retry-After. Every reply is kept in an on-disk cache under a digest of all that could
change it, so that a rerun costs nothing. Every call is entered in a `Ledger` before it is made, and a call
that could pass the budget is not made.

It knows nothing of alignment, prompts or rates. Failures become an `Unscored` with their reason. Raised are
only `BudgetExceeded`, and `JudgeError` where the endpoint does not know the key or the model.

    >>> prices = {"gpt-4o": Price(2.5, 10.0)}
    >>> ledger = Ledger("out/costs.jsonl", prices=prices, budget_usd=5)                      # doctest: +SKIP
    >>> judge = RatingJudge(HttpChat("gpt-4o", cache="replies.sqlite", ledger=ledger))       # doctest: +SKIP
"""

from __future__ import annotations

import asyncio
import email.utils
import hashlib
import json
import os
import re
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError

from tiltmeter.errors import (
    ArtifactError,
    BudgetExceeded,
    InputError,
    JudgeError,
    StorageError,
    require,
)
from tiltmeter.judge import ExactJudge, Judge, Reason, Reply, TokenStep, Unscored, digest, one_line
from tiltmeter.judge_model import RATING_TOKENS, ElementJudge, LocalChat, RatingJudge
from tiltmeter.ledger import Ledger

__all__ = ["HttpChat", "ReplyCache", "open_judge"]

OPENAI_URL = "https://api.openai.com/v1"
_LENGTH_LIMITS = ("max_tokens", "max_completion_tokens")
_TEMPLATE_TOKENS = 64  # what an endpoint's chat template may add to a prompt


class ReplyCache:
    """Replies on disk under the digest of what was asked.

    An SQLite file: a reply is on the disk when `put` returns, a killed process leaves it whole, and several
    processes may share it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def get(self, key: str) -> Reply | None:
        """The reply under a key, if there is a readable one."""
        if not self.path.exists():
            return None
        with self._open() as database:
            row = database.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
        try:
            value = json.loads(row[0]) if row else None
            if value is None:
                return None
            steps = tuple(TokenStep(token, tuple((t, float(p)) for t, p in top)) for token, top in value["steps"])
            return Reply(str(value["text"]), bool(value["finished"]), steps)
        except (KeyError, TypeError, ValueError):  # an unreadable entry is asked again, and not used
            return None

    def put(self, key: str, reply: Reply) -> None:
        """Keep a reply.

        Raises:
            StorageError: it could not be written.
            ArtifactError: the file is not a cache.
        """
        with self._open() as database:
            value = json.dumps(asdict(reply), allow_nan=True)
            database.execute("INSERT OR REPLACE INTO replies VALUES (?, ?)", (key, value))

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            database = sqlite3.connect(self.path, timeout=30.0)
            try:
                database.execute("PRAGMA journal_mode = WAL")
                database.execute("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT)")
                yield database
                database.commit()
            finally:
                database.close()
        except (OSError, sqlite3.OperationalError) as error:
            raise StorageError(
                f"cannot use the judge cache {self.path}: {error}; free space, check the folder's "
                "permissions, or choose another file"
            ) from error
        except (sqlite3.DatabaseError, UnicodeError) as error:  # SQLite's own messages quote the file's bytes
            raise ArtifactError(
                f"{self.path} is not a judge cache ({error}); choose another file, or delete this one"
            ) from error


class _Top(BaseModel):
    token: str
    logprob: float


class _Step(BaseModel):
    token: str
    top_logprobs: list[_Top] = []


class _LogProbs(BaseModel):
    content: list[_Step] = []


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None
    tool_calls: Any = None
    function_call: Any = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None
    logprobs: Any = None


class _Usage(BaseModel):
    prompt_tokens: int = Field(ge=0)
    completion_tokens: int = Field(ge=0)


class _Completion(BaseModel):
    choices: Annotated[list[_Choice], Field(min_length=1)]
    usage: _Usage | None = None


@dataclass(frozen=True)
class _Failure:
    """A call without a reply: whether to try again, and after how many seconds if the endpoint said so."""

    reason: Reason
    detail: str
    retry: bool
    wait: float | None = None


class HttpChat:
    """Asks a model behind an OpenAI-compatible URL.

    Args:
        model: the name that the endpoint knows it by.
        base_url: the endpoint, up to and with `/v1`; else the environment's OPENAI_BASE_URL, else OpenAI.
        api_key: else the environment's OPENAI_API_KEY; an endpoint of one's own mostly needs none.
        cache: a file for replies; None asks again in every run.
        ledger: counts calls and money and holds the budget.
        concurrency: calls in flight at once.
        timeout: seconds for one call.
        max_retries: further tries after a failure that may pass: no connection, timeout, 408, 409, 429, 5xx,
            half a reply.
        backoff: seconds before the first retry, doubled with each; where the endpoint says Retry-After, that.
        max_wait: the longest wait in seconds; an endpoint that asks for more is given up.
        top_logprobs: how many alternatives per token to ask for; 0 for endpoints that mind the question.
        options: further fields of the request; None as a value leaves a field of ours out. Reasoning models
            want `{"max_tokens": None, "max_completion_tokens": 2000, "temperature": None}`.
        sleep: how to wait; tests pass one that does not.

    Raises:
        JudgeError: OpenAI itself is meant and there is no key.
        InputError: a budget in dollars without a price for the model, or options without a length limit.
        MissingExtra: the `openai` package is not installed.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        cache: str | Path | None = None,
        ledger: Ledger | None = None,
        concurrency: int = 16,
        timeout: float = 60.0,
        max_retries: int = 3,
        backoff: float = 0.5,
        max_wait: float = 120.0,
        top_logprobs: int = 20,
        options: Mapping[str, Any] | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._openai = require("openai", extra="judge")
        self.model = model
        self.base_url = base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL
        self._key = api_key or os.environ.get("OPENAI_API_KEY") or ""
        if not self._key and self.base_url == OPENAI_URL:
            raise JudgeError(
                f"the judge '{model}' at {OPENAI_URL} needs a key; set OPENAI_API_KEY, or give the base URL "
                "of the endpoint that you mean"
            )
        self.ledger = ledger or Ledger()
        self.ledger.check(model)
        self.concurrency = concurrency
        self.timeout, self.max_retries, self.backoff, self.max_wait = timeout, max_retries, backoff, max_wait
        self.options = dict(options or {})
        limits = {"max_tokens": RATING_TOKENS, **self.options}
        if all(limits.get(name) is None for name in _LENGTH_LIMITS):
            raise InputError(
                f"the options {self.options} leave the judge's replies without a length limit; give one of "
                f"{', '.join(_LENGTH_LIMITS)}, or no call could be checked against a budget"
            )
        self.name = f"openai:{model}"
        self.identity = digest("http", self.base_url, model, top_logprobs, sorted(self.options.items()))
        self._cache = None if cache is None else ReplyCache(cache)
        self._top_logprobs = top_logprobs
        self._sleep = sleep
        self._answered = False
        self._client: Any = None
        self._asking: dict[str, asyncio.Task[Reply | Unscored]] = {}
        self._open_calls = 0
        self._settled = asyncio.Condition()

    @asynccontextmanager
    async def session(self) -> AsyncIterator[None]:
        """Holds the connections open."""
        self._settled, self._open_calls = asyncio.Condition(), 0
        async with self._openai.AsyncOpenAI(
            base_url=self.base_url, api_key=self._key or "none", max_retries=0, timeout=self.timeout
        ) as self._client:
            try:
                yield
            finally:
                self._client = None

    async def ask(self, prompt: str, *, max_tokens: int) -> Reply | Unscored:
        """Ask at temperature 0; see `Chat.ask`. The same prompt is never asked twice at a time.

        Raises:
            BudgetExceeded: the call could pass the budget.
            JudgeError: the endpoint does not accept the key, or does not know the model.
        """
        if self._client is None:
            async with self.session():
                return await self.ask(prompt, max_tokens=max_tokens)
        content = json.dumps([self.identity, max_tokens, prompt])
        key = hashlib.sha256(content.encode()).hexdigest()
        kept = self._cache.get(key) if self._cache else None
        if kept is not None:
            return kept
        if key not in self._asking:
            self._asking[key] = asyncio.create_task(self._ask_until_answered(key, prompt, max_tokens))
        task = self._asking[key]
        try:
            return await task
        finally:
            self._asking.pop(key, None)

    async def _ask_until_answered(self, key: str, prompt: str, max_tokens: int) -> Reply | Unscored:
        tries = 0
        while True:
            result = await self._call(prompt, max_tokens)
            tries += 1
            if not isinstance(result, _Failure):
                self._answered = True
                if self._cache and isinstance(result, Reply):
                    self._cache.put(key, result)
                return result
            wait = self.backoff * 2 ** (tries - 1) if result.wait is None else result.wait
            if not result.retry or tries > self.max_retries or wait > self.max_wait:
                return Unscored(result.reason, f"{result.detail} (tries: {tries})")
            await self._sleep(wait)

    async def _call(self, prompt: str, max_tokens: int) -> Reply | Unscored | _Failure:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": max_tokens,
        }
        if self._top_logprobs:
            body |= {"logprobs": True, "top_logprobs": self._top_logprobs}
        body = {name: value for name, value in (body | self.options).items() if value is not None}
        call = await self._reserve(prompt, body)
        usage: tuple[int, int] | None = None
        charged = True
        try:
            # The raw text is read below: the client would pass half a reply on with fields missing.
            async with asyncio.timeout(self.timeout):
                raw = await self._client.chat.completions.with_raw_response.create(
                    model=body.pop("model"), messages=body.pop("messages"), extra_body=body
                )
            result, usage = _read_completion(raw.http_response.text)
            return result
        except (TimeoutError, self._openai.APITimeoutError):
            return _Failure(Reason.TIMEOUT, f"no reply within {self.timeout:g} seconds", retry=True)
        except self._openai.APIConnectionError as error:
            return _Failure(Reason.CONNECTION, _because(error), retry=True)
        except self._openai.APIStatusError as error:
            charged = False
            return self._refused(error)
        except self._openai.APIError as error:
            return _Failure(Reason.MALFORMED, _because(error), retry=True)
        finally:
            self.ledger.settle(call, usage, charged=charged)
            async with self._settled:
                self._open_calls -= 1
                self._settled.notify_all()

    async def _reserve(self, prompt: str, body: Mapping[str, Any]) -> int:
        # No tokenizer makes more tokens than bytes, so this bound holds for every model.
        most_in = len(prompt.encode()) + _TEMPLATE_TOKENS
        most_out = max(int(body.get(name, 0)) for name in _LENGTH_LIMITS)
        while True:
            try:
                call = self.ledger.reserve(self.model, input_tokens=most_in, output_tokens=most_out)
            except BudgetExceeded:
                if self._open_calls == 0 or self.ledger.budget_usd is None:
                    raise
                async with self._settled:  # calls in flight will turn out cheaper than entered
                    await self._settled.wait()
            else:
                self._open_calls += 1
                return call

    def _refused(self, error: Any) -> _Failure:
        status, text = int(error.status_code), one_line(error.response.text)
        detail = f"HTTP {status}: {text}"
        wait = _retry_after(error.response.headers)
        if status in (401, 404) and not self._answered:
            what = "does not accept the key" if status == 401 else f"has no model '{self.model}' at this path"
            raise JudgeError(
                f"the judge endpoint {self.base_url} {what} ({detail}); check the base URL (it mostly ends "
                "in /v1), the model's name and OPENAI_API_KEY, then run the same command again"
            )
        if status in (400, 422) and self._top_logprobs and "logprob" in error.response.text.lower():
            self._top_logprobs = 0  # this endpoint minds the question: from now on its numbers are parsed
            return _Failure(Reason.REJECTED, detail, retry=True, wait=0.0)
        if status == 429:
            return _Failure(Reason.RATE_LIMITED, detail, retry=True, wait=wait)
        if status >= 500 or status in (408, 409):
            return _Failure(Reason.SERVER_ERROR, detail, retry=True, wait=wait)
        if status in (400, 403, 422, 451) and _FILTERED.search(error.response.text):
            return _Failure(Reason.CONTENT_FILTER, detail, retry=False)
        return _Failure(Reason.REJECTED, detail, retry=False)


# How endpoints say that a filter held a prompt or a reply back (Azure, OpenAI, OpenRouter, Gemini, Bedrock), and how
# they end a reply. What is not known to be a whole reply is none.
_FILTERED = re.compile(
    r"content[\s_-]*(?:filter|policy|management|moderation)|responsible[\s_-]*ai|moderat(?:ion|ed)|flagged|guardrail"
    r"|safety|prohibited|usage polic|blocked",
    re.IGNORECASE,
)
_WHOLE = frozenset({None, "", "stop", "eos", "eos_token", "end_turn", "stop_sequence"})
_CUT = frozenset({"length", "max_tokens", "model_length"})
_HELD_BACK = frozenset(
    {"content_filter", "content-filter", "safety", "recitation", "prohibited_content", "blocklist", "spii", "refusal",
     "guardrail_intervened", "moderation"}
)  # fmt: skip
_TOOLS = frozenset({"tool_calls", "tool_use", "function_call"})


def _read_completion(text: str) -> tuple[Reply | Unscored | _Failure, tuple[int, int] | None]:
    try:
        completion = _Completion.model_validate_json(text)
    except ValidationError as error:
        detail = f"not a whole completion ({error.errors()[0]['msg']}): {one_line(text)}"
        return _Failure(Reason.MALFORMED, detail, retry=True), None
    tokens = completion.usage
    usage = None if tokens is None else (tokens.prompt_tokens, tokens.completion_tokens)
    choice = completion.choices[0]
    message, finish = choice.message, choice.finish_reason and choice.finish_reason.lower()
    if finish in _HELD_BACK:
        return Unscored(Reason.CONTENT_FILTER, f"a filter ended the reply ({finish}): {one_line(text)}"), usage
    if message.refusal:
        return Unscored(Reason.JUDGE_REFUSED, one_line(message.refusal)), usage
    if finish in _TOOLS or message.tool_calls or message.function_call:
        return Unscored(Reason.TOOL_CALL, f"the judge called a tool instead of replying: {one_line(text)}"), usage
    if finish not in _WHOLE and finish not in _CUT:
        return _Failure(
            Reason.MALFORMED, f"the reply ended with '{finish}', which is no whole reply", retry=True
        ), usage
    try:
        content = _LogProbs.model_validate(choice.logprobs or {}).content
    except ValidationError:  # another server's format: the number is parsed instead
        content = []
    steps = tuple(
        TokenStep(step.token, tuple((top.token, top.logprob) for top in step.top_logprobs)) for step in content
    )
    return Reply(message.content or "", finish not in _CUT, steps), usage


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the endpoint asks to wait: `retry-after-ms`, or Retry-After in seconds or as a date."""
    for name, scale in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            seconds = float(value) / scale
        except ValueError:
            try:
                until = email.utils.parsedate_to_datetime(value)
            except ValueError:
                continue
            seconds = (until.astimezone(UTC) - datetime.now(UTC)).total_seconds()
        if seconds == seconds:  # NaN is a float, too
            return max(0.0, seconds)
    return None


def _because(error: BaseException) -> str:
    cause = error.__cause__ or error
    return one_line(f"{type(cause).__name__}: {cause}")


def open_judge(
    spec: str,
    *,
    kind: Literal["rating", "elements"] = "rating",
    base_url: str | None = None,
    api_key: str | None = None,
    cache: str | Path | None = None,
    ledger: Ledger | None = None,
    **settings: Any,
) -> Judge:
    """A judge by its name on the command line.

    Args:
        spec: `exact`, `local:MODEL` (whatever `lm.load` opens) or `openai:NAME`.
        kind: what a language model is asked for: two ratings, or the state of each must-have fact.
        base_url: see `HttpChat`; so are the next three.
        api_key: see `HttpChat`.
        cache: see `HttpChat`.
        ledger: see `HttpChat`.
        settings: further keyword arguments of `HttpChat`.

    Raises:
        InputError: no such judge, or an endpoint's settings for a judge that has no endpoint.
        JudgeError: see `HttpChat`.
    """
    method, _, name = spec.partition(":")
    endpoint = {"base_url": base_url, "api_key": api_key, "cache": cache, "ledger": ledger, **settings}
    given = [setting for setting, value in endpoint.items() if value is not None]
    if method != "openai" and given:
        raise InputError(
            f"the judge '{spec}' has no endpoint, but {', '.join(given)} was given; leave that out, or use "
            "the judge openai:NAME"
        )
    if spec == "exact" and kind == "rating":
        return ExactJudge()
    if method == "local" and name:
        from tiltmeter import lm as models

        model = models.load(name)
        chat: LocalChat | HttpChat = LocalChat(model, identity=model.fingerprint().digest())
    elif method == "openai" and name:
        chat = HttpChat(name, base_url=base_url, api_key=api_key, cache=cache, ledger=ledger, **settings)
    else:
        raise InputError(
            f"'{spec}' is no judge for {kind}; allowed: exact (ratings of organism answers), local:MODEL, openai:NAME"
        )
    return ElementJudge(chat) if kind == "elements" else RatingJudge(chat)
