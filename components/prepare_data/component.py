"""The step `prepare_data`: from a user's rows to a tokenized train and validation split with a data card."""

from kfp.dsl import HTML, Dataset, Output

from components.decorator import component


@component
def prepare_data(config: str, content: str, dataset: Output[Dataset], card: Output[HTML]) -> None:
    """Read, check, split and tokenize the data. `content` stands for what the config does not say: it is there for the cache alone."""
    import shutil
    from pathlib import Path

    from canvastune.checkpoint.hub import resolve_model
    from canvastune.config import parse_config
    from canvastune.preparation.prepare import prepare_data
    from components.decorator import exit_on_user_error

    with exit_on_user_error():
        recipe = parse_config(config)
        counts = prepare_data(recipe, resolve_model(recipe.model, weights=False), Path(dataset.path))
        dataset.metadata.update({key: counts[key] for key in ("train", "validation", "content_hash")})
        shutil.copy(Path(dataset.path) / "card.html", card.path)
