"""A model folder, or an adapter with its base, that answers chats as the evaluation does."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from canvastune.checkpoint.hf_inference import load_stock, load_stock_with_adapter
from canvastune.checkpoint.load import read_model_config
from canvastune.config.schema import EvaluateConfig
from canvastune.evaluation.generation import Question, answering, generate_answers, plain_text
from canvastune.preparation.chat_template import ChatEncoder
from canvastune.preparation.chat_tokenizer import ChatTokenizer
from canvastune.preparation.tokenizer import load_transformers_tokenizer

logger = logging.getLogger(__name__)


class ChatModel:
    """A model in memory, with its tokenizer and the settings of its sampler."""

    def __init__(
        self, folder: Path, settings: EvaluateConfig, *, adapter: Path | None = None
    ) -> None:
        """Load the model, on the accelerator if there is one.

        Args:
            folder: a complete model, or the base of `adapter`.
            settings: sampler, tokens per answer and batch size; nothing else of it is used.

        Raises:
            UserError: a folder that is no model, or has no usable chat template.
        """
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._tokenizer = load_transformers_tokenizer(folder)
        config = read_model_config(folder)
        self._positions = config.text_config.max_position_embeddings
        encoder = ChatEncoder(ChatTokenizer.of(self._tokenizer), str(folder))
        ends = {encoder.closing_ids[-1]}  # of a turn, and of a call of a tool
        if encoder.call_closing_id is not None:
            ends.add(encoder.call_closing_id)
        self._how = answering(folder, config, settings, ends)
        self._rows = settings.batch_size
        self._model: Any = (
            load_stock(folder, device)
            if adapter is None
            else load_stock_with_adapter(folder, adapter, device)
        )

    def answer(
        self, chats: Sequence[Sequence[Mapping[str, Any]]], *, seed: int, max_new_tokens: int
    ) -> list[str]:
        """Return the texts of `generate`."""
        answers = self.generate(chats, seed=seed, max_new_tokens=max_new_tokens)
        return [answer["text"] for answer in answers]

    def generate(
        self, chats: Sequence[Sequence[Mapping[str, Any]]], *, seed: int, max_new_tokens: int
    ) -> list[dict[str, Any]]:
        """Answer the last message of each chat; return the answers as `generate_answers` has them.

        An answer depends on its chat and the seed, not on what is asked with it.

        Args:
            chats: messages with `role` and `content`, the last one the user's.

        Raises:
            UserError: the device has too little memory.
        """
        questions = {question.id: question for question in map(self._question, chats)}
        longest = max((len(question.tokens) for question in questions.values()), default=0)
        if longest + max_new_tokens > self._positions:
            logger.warning(
                f"the longest prompt ({longest} tokens) and {max_new_tokens} tokens of an answer "
                f"exceed the model's {self._positions} positions: the answer is unreliable"
            )
        how = replace(self._how, max_new_tokens=max_new_tokens)
        given = (list(questions.values()), self._tokenizer, how, seed, self._rows, ())
        answers = dict(generate_answers(self._model, *given))
        return [answers[self._question(chat).id] for chat in chats]

    def _question(self, chat: Sequence[Mapping[str, Any]]) -> Question:
        prompt = self._tokenizer.apply_chat_template(
            [dict(message) for message in chat], tokenize=False, add_generation_prompt=True
        )
        tokens = self._tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        name = hashlib.sha256(str(prompt).encode()).hexdigest()
        return Question(name, plain_text(chat), list(tokens), reference="")
