"""Ask a server with OpenAI's API; run by `tools.serving` in the server's own environment.

Reads a request from standard input and writes the answers to standard output, both JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def main() -> None:
    """Answer each prompt, and the first one as a stream."""
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

    found = [ask(prompt, seed) for seed, prompt in enumerate(asked["prompts"])]
    chunks = ask(asked["prompts"][0], 0, stream=True)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    answers = [
        {"text": one.choices[0].message.content or "", "end": one.choices[0].finish_reason}
        for one in found
    ]
    json.dump({"answers": answers, "streamed": streamed}, sys.stdout)


if __name__ == "__main__":
    main()
