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
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from canvastune.config.schema import JudgeModelConfig
from canvastune.errors import one_line
from canvastune.evaluation.base_results import BaseResults

API_KEY = "OPENAI_API_KEY"  # the variable that OpenAI's own clients read
_KEPT = "judge-model"  # name of the file with scores
_SCALE = 10
_SCORE = re.compile(r"score[^\w-]{0,4}(\d+(?:\.\d+)?)", re.IGNORECASE)
_MAX_TOKENS = 1024  # of a verdict
_TRIES = 4
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0  # seconds between tries; they double
_RETRIED = (408, 409, 425, 429, *range(500, 600))
_SAVE_EVERY = 50  # scores
INSTRUCTIONS = """\
You compare an answer with a reference. Judge only whether the answer says what the reference says, \
as a reply to the prompt: not its length, style or politeness. First give your reason in one \
sentence, then end with a line "Score: N", where N is a whole number from 0 (wrong or missing) to \
10 (says the same)."""

logger = logging.getLogger(__name__)

Asked = tuple[str, str, str]  # answer, reference, prompt


class _Failed(Exception):
    """A call without a score; `final` if the same call would fail again, as would any other."""

    def __init__(self, reason: str, *, final: bool = False) -> None:
        super().__init__(reason)
        self.final = final


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
                    if isinstance(score, _Failed):
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

    def _key(self, asked: Asked) -> dict[str, Any]:
        answer, reference, prompt = asked
        about = {"answer": answer, "reference": reference, "prompt": prompt}
        return {"model": self._settings.model, "instructions": self._instructions, **about}

    def _score(self, asked: Asked) -> float | _Failed:
        answer, reference, prompt = asked
        text = f"Prompt:\n{prompt}\n\nReference:\n{reference}\n\nAnswer:\n{answer}"
        body = {
            "model": self._settings.model,
            "messages": [
                {"role": "system", "content": self._instructions},
                {"role": "user", "content": text},
            ],
            "temperature": 0,
            "max_tokens": _MAX_TOKENS,
        }
        try:
            return _read_score(self._retried(lambda: self._post(body)))
        except _Failed as failed:
            if failed.final:
                self._refused.set()
            return failed

    def _retried(self, call: Callable[[], Any]) -> Any:
        pause = self._pauses.first
        for left in reversed(range(_TRIES)):
            if self._refused.is_set():
                raise _Failed("not asked, after a refusal")
            try:
                return call()
            except urllib.error.HTTPError as error:
                with error:
                    said = one_line(Exception(error.read(2000).decode(errors="replace")))
                reason = f"HTTP {error.code}: {said}"
                if error.code not in _RETRIED:
                    raise _Failed(reason, final=True) from None
                asked_for = error.headers.get("Retry-After", "")
            except (OSError, http.client.HTTPException) as error:
                reason, asked_for = f"{type(error).__name__}: {one_line(error)}", ""
            if not left:
                raise _Failed(reason)
            wait = float(asked_for) if asked_for.isdecimal() else pause
            time.sleep(min(wait, self._pauses.longest))
            pause *= 2
        raise AssertionError("unreachable")

    def _post(self, body: Mapping[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(API_KEY):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self._address, json.dumps(body).encode(), headers)
        with self._opener.open(request, timeout=self._settings.timeout) as response:
            return response.read()


def _read_score(response: bytes) -> float:
    try:
        text = json.loads(response)["choices"][0]["message"]["content"]
        found = float(_SCORE.findall(text)[-1])
    except (ValueError, TypeError, LookupError):
        raise _Failed(f"no score in the response {response[:80]!r}") from None
    if not 0 <= found <= _SCALE:
        raise _Failed(f"found the score {found:g}, expected 0 to {_SCALE}")
    return found / _SCALE
