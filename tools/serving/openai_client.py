"""Ask a server with OpenAI's API; run by `tools.serving` in the server's own environment.

Reads a request from standard input and writes the answers to standard output, both JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def main() -> None:
    """Answer each prompt, all as streams or only the first one."""
    from openai import OpenAI

    asked = json.load(sys.stdin)
    client = OpenAI(base_url=asked["address"], api_key="none", timeout=120, max_retries=0)

    def ask(prompt: str, seed: int, **how: Any) -> Any:
        return client.chat.completions.create(
            model=asked["model"],
            messages=[{"role": "user", "content": prompt}],
            max_tokens=asked["max_tokens"],
            seed=seed,
            extra_body=asked["body"],
            **how,
        )

    def whole(prompt: str, seed: int) -> dict[str, Any]:
        (choice,) = ask(prompt, seed).choices
        return {"text": choice.message.content or "", "end": choice.finish_reason}

    def streamed(prompt: str, seed: int) -> dict[str, Any]:
        choices = [chunk.choices[0] for chunk in ask(prompt, seed, stream=True) if chunk.choices]
        text = "".join(choice.delta.content or "" for choice in choices)
        return {"text": text, "end": choices[-1].finish_reason}

    answer = streamed if asked["streams"] else whole
    answers = [answer(prompt, seed) for seed, prompt in enumerate(asked["prompts"])]
    json.dump(
        {"answers": answers, "streamed": streamed(asked["prompts"][0], 0)["text"]}, sys.stdout
    )


if __name__ == "__main__":
    main()
