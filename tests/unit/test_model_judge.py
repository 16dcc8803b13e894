"""The judge `model`, against a local server: scores, failures, limits, the key, and what is kept."""

from __future__ import annotations

import http.server
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from canvastune.config import parse_config
from canvastune.config.schema import EvaluateConfig, JudgeModelConfig
from canvastune.errors import UserError
from canvastune.evaluation.figures import judge_rows
from canvastune.evaluation.judges import Judging
from canvastune.evaluation.model_judge import API_KEY, ModelJudge, Pauses, check_judge
from canvastune.evaluation.result import EvaluationResult
from components.resolve import step as resolution
from pipelines.cli import main
from pipelines.doctor.later_steps import check_judge as doctor_check
from tests.unit.test_evaluate_again import finished  # noqa: F401  a run, as a fixture

NO_PAUSE = Pauses(first=0.01, longest=0.02)


class Server:
    """Replies with what `reply` makes of a request: a status and a body."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.at_once, self.most_at_once = 0, 0
        self.seconds = 0.0
        self.reply: Callable[[dict[str, Any]], tuple[int, Any]] = lambda _: (200, says("Score: 10"))
        lock, outer = threading.Lock(), self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.bodies.append(body | {"path": self.path})
                    outer.headers.append(dict(self.headers))
                    outer.at_once += 1
                    outer.most_at_once = max(outer.most_at_once, outer.at_once)
                    status, answer = outer.reply(body)
                time.sleep(outer.seconds)
                with lock:
                    outer.at_once -= 1
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", answer)
                self.end_headers()
                self.wfile.write(answer.encode() if isinstance(answer, str) else answer)

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def says(text: str) -> str:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


def user_text(body: dict[str, Any]) -> str:
    return str(body["messages"][-1]["content"])


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def judge(server: Server, kept: Path | None = None, **settings: Any) -> ModelJudge:
    config = JudgeModelConfig(address=server.address, model="m", **settings)
    return ModelJudge(config, kept, NO_PAUSE)


def test_the_score_is_the_last_one_of_the_reply_as_a_share_of_ten(server: Server) -> None:
    replies = {
        "exact": "Same.\nScore: 10",
        "half": "I thought of Score: 9.\n**Score:** 4.5/10",
        "none": "no verdict",
        "beyond": "Score: 11",
        "negative": "Score: -3",
    }
    server.reply = lambda body: (200, says(replies[user_text(body).rpartition("\n")[2]]))
    one = judge(server, concurrency=1)
    asked = [(answer, "the reference", "the prompt") for answer in replies]
    one.ask(asked)
    assert [one.score(each) for each in asked] == [1.0, 0.45, None, None, None]
    body = server.bodies[0]
    assert (body["path"], body["model"], body["temperature"]) == ("/v1/chat/completions", "m", 0)
    for text in ("the reference", "the prompt", "exact"):
        assert text in user_text(body)


def test_a_busy_server_is_asked_again_and_a_broken_one_leaves_rows_unscored(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    tries: dict[str, int] = {}

    def reply(body: dict[str, Any]) -> tuple[int, str]:
        answer = user_text(body).rpartition("\n")[2]
        tries[answer] = tries.get(answer, 0) + 1
        if answer == "busy" and tries[answer] < 3:
            return 429, "slow down"
        return (503, "down") if answer == "broken" else (200, says("Score: 5"))

    server.reply = reply
    settings = EvaluateConfig(
        judge="model", judge_model={"address": server.address, "model": "m", "concurrency": 2}
    )
    one = judge(server)
    one.ask([(answer, "r", "p") for answer in ("fine", "busy", "broken")])
    assert tries == {"fine": 1, "busy": 3, "broken": 4}
    assert [one.score((answer, "r", "p")) for answer in ("fine", "busy", "broken")] == [
        0.5,
        0.5,
        None,
    ]
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert " 2 of 3 " in warning
    assert "HTTP 503: down (1)" in warning

    server.reply = lambda body: (200, says("Score: 8" if "right" in user_text(body) else "?"))
    rows = [
        {"source": None, "prompt": "p", "reference": "r", "before": before, "after": "right"}
        for before in ("right a", "wrong", "right b")
    ]
    judged = judge_rows(Judging(settings, [(None, "r")] * 3), rows)
    assert [row.scored for row in judged] == [True, False, True]
    assert judged[0].mean("after") == 0.8


def test_after_a_refusal_nothing_more_is_asked(server: Server) -> None:
    server.reply = lambda _: (401, "wrong key")
    one = judge(server, concurrency=1)
    asked = [(str(number), "r", "p") for number in range(20)]
    one.ask(asked)
    assert len(server.bodies) == 1
    assert not any(one.score(each) is not None for each in asked)


def test_no_more_calls_at_a_time_than_the_recipe_allows(server: Server) -> None:
    server.seconds = 0.02
    judge(server, concurrency=3).ask([(str(number), "r", "p") for number in range(24)])
    assert len(server.bodies) == 24
    assert server.most_at_once == 3


def test_a_reply_that_takes_too_long_is_a_failed_call(server: Server) -> None:
    server.seconds = 0.3
    one = judge(server, timeout=0.05)
    one.ask([("a", "r", "p")])
    assert one.score(("a", "r", "p")) is None
    assert len(server.bodies) == 4, "a timeout is tried again"


def test_the_key_comes_from_the_environment_and_goes_to_no_other_address(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(API_KEY, raising=False)
    judge(server).ask([("a", "r", "p")])
    assert "Authorization" not in server.headers[0]
    monkeypatch.setenv(API_KEY, "s3cr3t")
    judge(server, tmp_path).ask([("b", "r", "p")])
    assert server.headers[1]["Authorization"] == "Bearer s3cr3t"
    other = Server()
    try:
        server.reply = lambda _: (302, other.address)
        one = judge(server)
        one.ask([("c", "r", "p")])
        assert one.score(("c", "r", "p")) is None
        assert not other.bodies
    finally:
        other.close()
    assert all("s3cr3t" not in file.read_text() for file in tmp_path.iterdir())


def test_scores_are_kept_by_model_instructions_and_texts(server: Server, tmp_path: Path) -> None:
    asked = [("a", "r", "p"), ("b", "r", "p"), ("a", "r", "p")]
    judge(server, tmp_path).ask(asked)
    assert len(server.bodies) == 2, "the same answer is judged twice"
    again = judge(server, tmp_path)
    again.ask(asked)
    assert len(server.bodies) == 2
    assert again.score(asked[1]) == 1
    other = judge(server, tmp_path, instructions="Be strict. End with Score: N.")
    other.ask(asked)
    assert len(server.bodies) == 4
    assert server.bodies[-1]["messages"][0]["content"] == "Be strict. End with Score: N."
    assert other.name != again.name, "two sets of instructions count as the same judge"


def test_failed_calls_are_not_kept(server: Server, tmp_path: Path) -> None:
    server.reply = lambda _: (500, "down")
    judge(server, tmp_path).ask([("a", "r", "p")])
    server.reply = lambda _: (200, says("Score: 3"))
    again = judge(server, tmp_path)
    again.ask([("a", "r", "p")])
    assert again.score(("a", "r", "p")) == pytest.approx(0.3)


def test_the_judge_needs_an_address_without_credentials() -> None:
    tree: dict[str, Any] = {"name": "a", "data": {"source": "x"}, "evaluate": {"judge": "model"}}
    with pytest.raises(UserError, match=r"evaluate\.judge_model"):
        parse_config(tree)
    for address in ("localhost:8000", "http://user:key@host/v1"):
        tree["evaluate"]["judge_model"] = {"address": address, "model": "m"}
        with pytest.raises(UserError, match=r"evaluate\.judge_model\.address"):
            parse_config(tree)


def test_a_judge_that_does_not_judge_is_said_before_training_and_one_that_refuses_ends_the_run(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(API_KEY, raising=False)
    settings = JudgeModelConfig(address=server.address, model="m", timeout=5)
    assert check_judge(settings) is None
    assert len(server.bodies) == 1, "it costs more than one call"
    later: dict[str, tuple[int, str]] = {
        "HTTP 503: loading": (503, "loading"),
        "no score in the response": (200, says("I agree.")),
        "0.2 of 1 as its own answer": (200, says("Score: 2")),
    }
    for said, reply in later.items():
        server.reply = lambda _, reply=reply: reply  # type: ignore[misc]
        remark = check_judge(settings)
        assert remark is not None
        assert said in remark
        assert "evaluate.judge_model" in remark
    final = {404: "evaluate.judge_model.address", 401: f"Set {API_KEY}"}
    for status, cure in final.items():
        server.reply = lambda _, status=status: (status, "no")  # type: ignore[misc]
        with pytest.raises(UserError, match=rf"{server.address}: HTTP {status}: no; exp") as error:
            check_judge(settings)
        assert cure in str(error.value.hint)
    assert "HTTP 401" in str(check_judge(settings, key_comes_later=True))
    monkeypatch.setenv(API_KEY, "s3cr3t")
    with pytest.raises(UserError, match="HTTP 401") as error:
        check_judge(settings, key_comes_later=True)
    assert f"Correct {API_KEY}" in str(error.value.hint)
    server.close()
    remark = check_judge(settings)
    assert remark is not None
    assert f"m at {server.address}: URLError" in remark


def test_doctor_and_the_start_of_a_run_ask_the_judge(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(resolution.tracking, "start", lambda *_: "")
    evaluation = {"judge": "model", "judge_model": {"address": server.address, "model": "m"}}
    config = parse_config({"name": "a", "data": {"source": "x"}, "evaluate": evaluation})

    def resolve(name: str) -> None:
        text = config.model_dump_json()
        resolution.resolve(text, "", "", str(tmp_path), name, name, name)

    (found,) = doctor_check(config, submitted=False)
    assert (found.state, found.found) == ("ok", f"m at {server.address} judges")
    (found,) = doctor_check(config, submitted=True)
    assert found.state == "skipped"
    assert len(server.bodies) == 1
    resolve("well")
    assert not caplog.messages
    server.reply = lambda _: (404, "no such model")
    with pytest.raises(UserError, match="no such model"):
        resolve("refused")
    assert not (tmp_path / "runs" / "refused").exists(), "a refused run has claimed its folder"
    server.close()
    (found,) = doctor_check(config, submitted=False)
    assert found.state == "warning"
    resolve("down")
    (line,) = caplog.messages
    assert re.search(r"\bexpected\b.*\bscore\b", line)
    plain = parse_config({"name": "a", "data": {"source": "x"}})
    assert list(doctor_check(plain, submitted=False)) == []


def test_a_finished_run_is_judged_by_a_model_and_again_at_no_cost(
    finished: Path,  # noqa: F811
    server: Server,
) -> None:
    def reply(body: dict[str, Any]) -> tuple[int, str]:
        _, reference, answer = user_text(body).split(":\n")[1:]
        right = reference.partition("\n\n")[0] == answer
        return 200, says(f"Score: {10 if right else 2}")

    server.reply = reply
    settings = [
        f"evaluate.judge_model.address={server.address}",
        "evaluate.judge_model.model=m",
        "evaluate.judge=model",
    ]
    command = ["evaluate", str(finished), *(part for s in settings for part in ("--set", s))]
    assert main(command) == 0
    result = EvaluationResult.read(finished / "evaluation-2")
    assert (result.measure, result.scored) == ("score", result.rows)
    assert result.judges[0].startswith("model:m@")
    assert result.after.score == pytest.approx((5 + 0.2) / 6)
    calls = len(server.bodies)
    assert calls > 0
    assert main(command) == 0
    assert len(server.bodies) == calls
    assert EvaluationResult.read(finished / "evaluation-3").after.score == result.after.score
