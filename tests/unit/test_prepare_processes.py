"""Claims about preparation with several processes: the same result, the same refusals, and nothing
left behind.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from canvastune.errors import UserError
from canvastune.io.hashing import hash_path
from canvastune.preparation.chat_template import ChatEncoder
from canvastune.preparation.conversation import Conversation
from canvastune.preparation.prepare import Throughput, prepare_data
from canvastune.preparation.readers import Row
from canvastune.preparation.tokenize_pool import EncoderPool, EncoderProcess, encode_newest
from tests.support.data_fixtures import (
    THOUGHT,
    encoder_of,
    make_model,
    make_tokenizer,
    problems,
    run_config,
    write_lines,
)
from tests.support.warm import Popen

ROWS: list[Any] = [
    *problems(400),
    *problems(20),
    "not json",
    {"question": "q<turn|>", "answer": "a"},
    {"question": "x" * 300, "answer": "a"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), THOUGHT)


# Few rows for many batches, most of them for the processes.
SMALL = Throughput(batch_rows=8, local_batches=1)


def own_processes() -> list[psutil.Process]:
    return [
        process
        for process in psutil.Process().children()
        if any("serve_encoder" in word for word in process.cmdline())
    ]


def test_the_result_does_not_depend_on_the_number_of_processes(tmp_path: Path, model: Path) -> None:
    source = write_lines(tmp_path / "gsm.jsonl", ROWS)
    config = run_config(source, max_bad_row_fraction=0.1, validation_rows=30)
    sent = []

    class CountingPool(EncoderPool):
        def encode(self, conversations: list[Conversation]) -> Future[Any]:
            sent.append(len(conversations))
            answer = super().encode(conversations)
            answer.cancel = lambda: False  # type: ignore[method-assign]  # else this process encodes most of them
            return answer

    throughput = replace(SMALL, pool=CountingPool)
    cards = [
        prepare_data(config, model, tmp_path / str(count), count, throughput) for count in (1, 3)
    ]
    assert sum(sent) > 350, "the processes did not do most of the work"
    for card in cards:
        card.pop("seconds")
    assert cards[0] == cards[1]
    for name in ("train", "validation"):
        assert hash_path(tmp_path / "1" / name) == hash_path(tmp_path / "3" / name), (
            f"{name}: other bytes"
        )
    assert not own_processes(), "a process is left"


def test_rows_that_are_refused_are_named_in_the_order_of_the_file(
    tmp_path: Path, model: Path
) -> None:
    rows = [
        {"question": f"{n}<turn|>", "answer": "a"} if n in (100, 200, 201, 399) else row
        for n, row in enumerate(problems(400))
    ]
    source = write_lines(tmp_path / "gsm.jsonl", rows)
    messages = []
    for processes in (1, 2):
        with pytest.raises(UserError) as raised:
            prepare_data(
                run_config(source, max_bad_row_fraction=0),
                model,
                tmp_path / "out",
                processes,
                SMALL,
            )
        messages.append(str(raised.value))
    assert messages[0] == messages[1]
    assert [messages[1].index(f"row {n + 1}:") for n in (100, 200, 201, 399)] == sorted(
        messages[1].index(f"row {n}:") for n in (101, 201, 202, 400)
    )
    assert [path.name for path in tmp_path.iterdir()] == ["gsm.jsonl"], (
        "a refused preparation left files behind"
    )
    assert not own_processes()


def talk(row: dict[str, str]) -> Conversation:
    return Conversation(
        (
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": row["answer"]},
        )
    )


def test_what_waits_is_encoded_here_from_the_end_and_what_a_process_has_begun_with_is_not() -> None:
    encoder = encoder_of(make_tokenizer(THOUGHT))
    conversations = [talk(row) for row in problems(4)]
    waiting: deque[Any] = deque(
        ([(Row("f", "f", n, None), each)], Future()) for n, each in enumerate(conversations)
    )
    answers = [answer for _, answer in waiting]
    for begun in answers[:2]:
        begun.set_running_or_notify_cancel()
    assert [encode_newest(waiting, encoder) for _ in range(3)] == [True, True, False]
    assert [answer.cancelled() for answer in answers] == [False, False, True, True]
    assert [waiting[at][1].result() for at in (2, 3)] == [
        encoder.encode([conversation]) for conversation in conversations[2:]
    ]


def test_a_process_that_is_asked_twice_at_once_gives_each_its_own_answer() -> None:
    encoder = encoder_of(make_tokenizer(THOUGHT))
    conversations = [talk(row) for row in problems(200)]
    with EncoderPool(encoder, 1) as workers:
        answers = [workers.encode([conversation]) for conversation in conversations]
        assert [answer.result(timeout=60) for answer in answers] == [
            encoder.encode([conversation]) for conversation in conversations
        ]
    assert not own_processes()


def test_a_process_that_is_killed_ends_the_preparation_with_a_reason(
    tmp_path: Path, model: Path
) -> None:
    class KilledProcess(EncoderProcess):
        def request(self, request: bytes) -> Any:
            with contextlib.suppress(ProcessLookupError):  # killed before a second thread's request
                os.kill(self.pid, signal.SIGKILL)
            return super().request(request)

    def pool(encoder: ChatEncoder, count: int) -> EncoderPool:
        return EncoderPool(encoder, count, process=KilledProcess)

    source = write_lines(tmp_path / "gsm.jsonl", problems(4000))
    with pytest.raises(UserError, match=r"encoder process .*killed"):
        prepare_data(run_config(source), model, tmp_path / "out", 2, replace(SMALL, pool=pool))
    assert [path.name for path in tmp_path.iterdir()] == ["gsm.jsonl"]
    assert not own_processes()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_the_processes_end_with_the_preparation(
    how: signal.Signals, tmp_path: Path, model: Path
) -> None:
    """A preparation that would take minutes, and the end from outside: by Ctrl-C nothing is left,
    and even a kill leaves no process.
    """
    source = write_lines(tmp_path / "gsm.jsonl", problems(4000))
    (tmp_path / "config.json").write_text(run_config(source).model_dump_json())
    code = (
        "import signal, sys, time; from pathlib import Path\n"
        "from canvastune.config import RunConfig\n"
        "from canvastune.preparation.prepare import Throughput, prepare_data\n"
        "from canvastune.preparation.tokenize_pool import EncoderPool\n"
        "class SlowPool(EncoderPool):\n"
        "    def encode(self, conversations):\n"
        "        time.sleep(0.5)\n"
        "        return super().encode(conversations)\n"
        "signal.signal(signal.SIGINT, "
        "signal.default_int_handler)\n"  # a shell's background jobs begin with it ignored
        "throughput = Throughput(batch_rows=8, local_batches=1, pool=SlowPool)\n"
        "config = RunConfig.model_validate_json(Path(sys.argv[1]).read_text())\n"
        "prepare_data(config, Path(sys.argv[2]), Path(sys.argv[3]), 3, throughput)\n"
    )
    command = [
        sys.executable,
        "-c",
        code,
        str(tmp_path / "config.json"),
        str(model),
        str(tmp_path / "out"),
    ]
    with Popen(command, stderr=subprocess.PIPE, text=True) as process:
        family = psutil.Process(process.pid)
        until = time.monotonic() + 180  # a loaded machine needs a minute for the imports
        while len(children := family.children()) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        assert len(children) == 2, "no process was started"
        # Python loses a Ctrl-C that falls into a destructor or a callback: not while the second
        # process is being made
        time.sleep(1)
        process.send_signal(how)
        said = process.communicate(timeout=30)[1]
    gone, alive = psutil.wait_procs(children, timeout=20)
    assert len(gone) == 2, f"left: {alive}"
    if how == signal.SIGINT:
        assert "KeyboardInterrupt" in said
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "config.json",
            "gsm.jsonl",
        ], "half a data set was left"


def test_tokens_are_those_of_the_tokenizers_own_call() -> None:
    tokenizer = make_tokenizer(THOUGHT)
    tokenizer.backend_tokenizer.enable_truncation(5)  # as a tokenizer.json may ask for
    tokenizer.backend_tokenizer.enable_padding()
    encoder = encoder_of(tokenizer)
    texts = ["<bos><|turn>user\nHi the<turn|>\n", "é 漢字 🙂\u200d end and ####  ", " ", "a" * 3000]
    assert (
        encoder._tokenizer.encode(texts) == tokenizer(texts, add_special_tokens=False)["input_ids"]
    )
    assert encoder._tokenizer.encode([]) == []
