"""The step `prepare_data`: from a user's rows to a tokenized data set with its card."""

from kfp.dsl import HTML, Dataset, Output

from components.decorator import component


@component
def prepare_data(config: str, content: str, dataset: Output[Dataset], card: Output[HTML]) -> None:
    """Prepare the data. `content`, a hash of what the config does not show, is for the cache."""
    from pathlib import Path

    from canvastune.config import parse_config
    from components.prepare_data.step import prepare_data
    from components.runtime import exit_on_user_error

    with exit_on_user_error():
        dataset.metadata.update(
            prepare_data(parse_config(config), Path(dataset.path), Path(card.path))
        )
