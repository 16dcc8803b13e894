"""A language model as a judge, behind an OpenAI-compatible address."""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from canvastune.config.schema import JudgeModelConfig
from canvastune.errors import UserError, one_line
from canvastune.evaluation.base_results import BaseResults

API_KEY = "OPENAI_API_KEY"  # the variable that OpenAI's own clients read
_KEPT = "judge-model"  # name of the file with scores
_SCALE = 10
_SCORE = re.compile(r"score[^\w-]{0,4}(\d+(?:\.\d+)?)", re.IGNORECASE)
_MAX_TOKENS = 1024  # of a verdict
_TRIES = 4
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0  # seconds between tries; they double
_RETRIED = (408, 409, 425, 429, *range(500, 600))
_DENIED = (401, 403)
_SAVE_EVERY = 50  # scores
_PROBE = ("The answer is 5.", "The answer is 5.", "What is 2 + 3?")  # answer, reference, prompt
_SAME_AT_LEAST = 0.5  # score of a reference as its own answer
INSTRUCTIONS = """\
You compare an answer with a reference. Judge only whether the answer says what the reference says, \
as a reply to the prompt: not its length, style or politeness. First give your reason in one \
sentence, then end with a line "Score: N", where N is a whole number from 0 (wrong or missing) to \
10 (says the same)."""

logger = logging.getLogger(__name__)

Asked = tuple[str, str, str]  # answer, reference, prompt


class CallFailed(Exception):
    """A call without a score.

    Attributes:
        status: of HTTP, if the server has answered.
        final: whether the same call would fail again, as would any other.
        wait: seconds after which the server wants to be asked again, if it says so.
    """

    def __init__(self, reason: str, *, status: int | None = None, wait: float | None = None):
        super().__init__(reason)
        self.status, self.wait = status, wait
        self.final = status is not None and status not in _RETRIED


@dataclass(frozen=True)
class Pauses:
    """Seconds between the tries of a call."""

    first: float = _FIRST_PAUSE
    longest: float = _LONGEST_PAUSE


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """The key is not for another address."""

    def redirect_request(self, *_: Any) -> None:
        return None


class ModelJudge:
    """Asks a model for a score from 0 to 10, and keeps what it said."""

    def __init__(
        self, settings: JudgeModelConfig, kept: Path | None, pauses: Pauses = Pauses()
    ) -> None:
        """Begin without a call.

        Args:
            kept: folder where scores are kept, so that judging the same answer again costs nothing;
                None: nowhere.
        """
        assert settings.address is not None  # the recipe was refused without it
        self._settings, self._pauses = settings, pauses
        self._address = f"{settings.address.rstrip('/')}/chat/completions"
        self._instructions = settings.instructions or INSTRUCTIONS
        digest = hashlib.sha256(self._instructions.encode()).hexdigest()[:12]
        self.name = f"model:{settings.model}@{digest}"
        self._kept = BaseResults(kept, _KEPT)
        self._scores: dict[Asked, float] = {}
        self._refused = threading.Event()
        self._opener = urllib.request.build_opener(_NoRedirects())

    def ask(self, all_asked: Iterable[Asked]) -> None:
        """Have these answers judged, several at a time; a failed call is counted and logged."""
        missing = []
        for asked in dict.fromkeys(all_asked):
            score = self._kept.get(self._key(asked))
            if score is None:
                missing.append(asked)
            else:
                self._scores[asked] = score
        if not missing:
            return
        logger.info(f"evaluate: {self.name} judges {len(missing)} answers")
        failed: Counter[str] = Counter()  # calls, by reason
        try:
            with ThreadPoolExecutor(self._settings.concurrency) as pool:
                results = pool.map(self._score, missing)
                for number, (asked, score) in enumerate(zip(missing, results, strict=True), 1):
                    if isinstance(score, CallFailed):
                        failed[str(score)] += 1
                    else:
                        self._scores[asked] = score
                        self._kept.put(self._key(asked), score)
                    if number % _SAVE_EVERY == 0:
                        self._kept.save()
        finally:
            self._kept.save()
        if failed.total():
            reasons = "; ".join(f"{reason} ({n})" for reason, n in failed.most_common(3))
            logger.warning(
                f"evaluate: {self.name} judged {len(missing) - failed.total()} of {len(missing)} "
                f"answers; rows of the others are not scored: {reasons}"
            )

    def score(self, asked: Asked) -> float | None:
        """Return the score of an answer that was asked about, from 0 to 1; None: the call failed."""
        return self._scores.get(asked)

    def probe(self) -> float:
        """Have a reference judged as its own answer, in one call. Raises: CallFailed."""
        return _read_score(self._post(self._body(_PROBE)))

    def _key(self, asked: Asked) -> dict[str, Any]:
        answer, reference, prompt = asked
        about = {"answer": answer, "reference": reference, "prompt": prompt}
        return {"model": self._settings.model, "instructions": self._instructions, **about}

    def _score(self, asked: Asked) -> float | CallFailed:
        body = self._body(asked)
        try:
            return _read_score(self._retried(body))
        except CallFailed as failed:
            if failed.final:
                self._refused.set()
            return failed

    def _body(self, asked: Asked) -> dict[str, Any]:
        answer, reference, prompt = asked
        text = f"Prompt:\n{prompt}\n\nReference:\n{reference}\n\nAnswer:\n{answer}"
        return {
            "model": self._settings.model,
            "messages": [
                {"role": "system", "content": self._instructions},
                {"role": "user", "content": text},
            ],
            "temperature": 0,
            "max_tokens": _MAX_TOKENS,
        }

    def _retried(self, body: Mapping[str, Any]) -> bytes:
        pause = self._pauses.first
        for left in reversed(range(_TRIES)):
            if self._refused.is_set():
                raise CallFailed("not asked, after a refusal")
            try:
                return self._post(body)
            except CallFailed as failed:
                if failed.final or not left:
                    raise
                wait = pause if failed.wait is None else failed.wait
                time.sleep(min(wait, self._pauses.longest))
                pause *= 2
        raise AssertionError("unreachable")

    def _post(self, body: Mapping[str, Any]) -> bytes:
        """Call once. Raises: CallFailed."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(API_KEY):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self._address, json.dumps(body).encode(), headers)
        try:
            with self._opener.open(request, timeout=self._settings.timeout) as response:
                return bytes(response.read())
        except urllib.error.HTTPError as error:
            with error:
                said = one_line(error.read(2000).decode(errors="replace"))
            asked_for = error.headers.get("Retry-After", "")
            raise CallFailed(
                f"HTTP {error.code}: {said}",
                status=error.code,
                wait=float(asked_for) if asked_for.isdecimal() else None,
            ) from None
        except (OSError, http.client.HTTPException) as error:
            raise CallFailed(f"{type(error).__name__}: {one_line(error)}") from None


def check_judge(settings: JudgeModelConfig, *, key_comes_later: bool = False) -> str | None:
    """Ask the judging model once, before a run trains for hours and then has nothing scored.

    Args:
        key_comes_later: the API key is only known where the run is evaluated.

    Returns:
        Why its answers could not be scored now, though they may be later; None: it judges.

    Raises:
        UserError: a refusal, which would be the same later.
    """
    try:
        score = ModelJudge(settings, None).probe()
    except CallFailed as failed:
        found = f"evaluate.judge_model: {settings.model} at {settings.address}: {failed}"
        no_key = failed.status in _DENIED and not os.environ.get(API_KEY)
        if failed.final and not (no_key and key_comes_later):
            if no_key:
                hint = f"Set {API_KEY} in the environment."
            elif failed.status in _DENIED:
                hint = f"Correct {API_KEY} in the environment."
            else:
                hint = "Correct evaluate.judge_model.address (without chat/completions) or .model."
            raise UserError(f"{found}; expected a reply with a score", hint=hint) from None
        return (
            f"{found}; expected a reply with a score: unless it gives one when the run is "
            "evaluated, the rows that it judges are not scored"
        )
    if score < _SAME_AT_LEAST:
        return (
            f"evaluate.judge_model: {settings.model} gives the reference {_PROBE[1]!r} {score:.1f} "
            "of 1 as its own answer, expected nearly 1: look at evaluate.judge_model.instructions"
        )
    return None


def _read_score(response: bytes) -> float:
    try:
        text = json.loads(response)["choices"][0]["message"]["content"]
        found = float(_SCORE.findall(text)[-1])
    except (ValueError, TypeError, LookupError):
        raise CallFailed(f"no score in the response {response[:80]!r}") from None
    if not 0 <= found <= _SCALE:
        raise CallFailed(f"found the score {found:g}, expected 0 to {_SCALE}")
    return found / _SCALE
