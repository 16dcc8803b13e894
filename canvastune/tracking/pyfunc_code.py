"""What `mlflow.pyfunc.load_model` runs: MLflow keeps this file in the model, in place of a pickle.

The settings are the model's `config` in MLmodel. Pass `load_model(uri, model_config={"folder": DIR})`
where the weights have moved.
"""

from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel


class TunedModel(PythonModel):
    """Answers questions, each the user's turn of a new chat."""

    def load_context(self, context: Any) -> None:
        """Load the weights, which are in the model, or in the folder that it names."""
        # Here: MLflow runs this file to log a model as well, which needs no torch.
        from canvastune.checkpoint.hub import resolve_model
        from canvastune.config.schema import EvaluateConfig, ModelConfig
        from canvastune.errors import UserError
        from canvastune.evaluation.chat_model import ChatModel

        settings = context.model_config
        folder = Path((context.artifacts or {}).get("model") or settings["folder"])
        if not folder.is_dir():
            raise UserError(
                f"{folder}: not found: the model is larger than what is uploaded to MLflow, and "
                "stays in the workspace of its run",
                hint="Mount the workspace there, or pass the folder's path here: "
                'mlflow.pyfunc.load_model(uri, model_config={"folder": "DIR"}).',
            )
        self._defaults = settings["defaults"]
        how = EvaluateConfig(**settings["sampling"])
        base = settings["base"]
        if base is None:
            self._model = ChatModel(folder, how)
        else:  # an adapter
            self._model = ChatModel(resolve_model(ModelConfig(**base)), how, adapter=folder)

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[str]:
        """Return an answer to each question, in their order.

        Args:
            model_input: the first column has the questions.
            params: `system`: a system message before each question, "" for none; `seed`;
                `max_new_tokens`: of an answer, a longer one is cut.
        """
        given = self._defaults | (params or {})
        before = [{"role": "system", "content": given["system"]}] if given["system"] else []
        questions = model_input.iloc[:, 0].tolist()
        chats = [[*before, {"role": "user", "content": question}] for question in questions]
        return self._model.answer(
            chats, seed=int(given["seed"]), max_new_tokens=int(given["max_new_tokens"])
        )


set_model(TunedModel())
