"""The section `data` of a recipe: which data sets are read, and what is learned of them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import AliasChoices, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from canvastune.config.places import is_path
from canvastune.config.strict import ChangeableOnResume, InvalidSetting, StrictModel

DataFormat = Literal[
    "auto", "messages", "sharegpt", "prompt_completion", "alpaca", "gsm8k", "columns"
]


class ColumnsConfig(StrictModel):
    """Which columns hold what. None: the column's usual name, if the row has it."""

    messages: str | None = Field(
        None, description="column with the list of messages; default: messages or conversations"
    )
    prompt: str = Field("prompt", description="column with the user's turn")
    response: str = Field("response", description="column with the assistant's turn")
    system: str | None = Field(
        None, description="column with the system turn; default: system, if the row has it"
    )
    context: str | None = Field(
        None, description="column with text that is put before the user's turn; default: none"
    )
    thinking: str | None = Field(
        None,
        description="column with the thinking before the answer; default: reasoning, "
        "reasoning_content or thinking, if the row has it",
    )
    tools: str | None = Field(
        None, description="column with the tool declarations; default: tools, if the row has it"
    )


class SourceFields(StrictModel):
    """A data set, and what its rows look like."""

    source: str | None = Field(
        None,
        description="Hub dataset ID, or a local file or folder: .jsonl, .json, .csv, .tsv or .parquet "
        "(each also with .gz), .arrow, or the output of `Dataset.save_to_disk`; set either "
        "this or `data.mixture`",
    )
    config: str | None = Field(
        None, description="configuration of a Hub dataset, such as `main` of openai/gsm8k"
    )
    revision: str | None = Field(None, description="Hub commit, tag or branch")
    split: str = Field("train", description="split of a Hub dataset or of a saved `DatasetDict`")
    format: DataFormat = Field(
        "auto", description="format of the rows; auto detects it from the first row's keys"
    )
    columns: ColumnsConfig = Field(default_factory=ColumnsConfig)


class MixtureSource(SourceFields):
    """One of several data sets that are trained on together."""

    source: str = Field(description="like `data.source`")
    weight: float = Field(
        1.0,
        gt=0,
        description="share of the training examples that come from this source, relative to the other "
        "weights: sources with weights 3 and 1 give 75% and 25%, regardless of how many rows "
        "they have",
    )


class DataConfig(SourceFields):
    """Where the examples come from, and what is rejected."""

    mixture: tuple[MixtureSource, ...] = Field(
        (),
        description="several sources instead of `data.source`; each one's share of the training examples "
        "is proportional to its weight, and a source is repeated only after all of its rows "
        "have been used",
    )
    validation: str | None = Field(
        None,
        description="held-out examples: a split of the source (or of each source in a mixture), or a "
        "local file or folder, written as a path (`./held_out`, `test.jsonl`) and read with "
        "`data.format` and `data.columns`; training rows that repeat one of them are left "
        "out, and `data.validation_fraction` does not apply; default: a fraction of the "
        "source",
    )
    ignore: tuple[str, ...] = Field(
        (),
        description="columns or message keys that are not needed; they are neither counted nor refused",
    )
    learn: Literal["last", "all"] = Field(
        "last",
        description="which assistant turns of a conversation are learned: only the last one, or all of "
        "them, each as a separate example",
    )
    thinking: Literal["keep", "drop"] = Field(
        "keep",
        description="whether thinking in the data is kept, to be learned before the answer, or dropped",
    )
    seq_length: int = Field(
        1024, ge=8, description="maximum number of tokens of prefix and response per example"
    )
    validation_fraction: float = Field(
        0.02,
        gt=0,
        lt=1,
        description="fraction of the examples that is held out, chosen by a hash of their content; has no "
        "effect if `data.validation` is set",
    )
    validation_rows: int | None = Field(
        None,
        ge=1,
        description="maximum number of held-out examples; examples beyond this number are not trained on either",
    )
    # The old names of the next two sound like counts. Files keep them, so that a run that was
    # started before the change still compares equal.
    max_bad_row_fraction: ChangeableOnResume[float] = Field(
        0.01,
        ge=0,
        lt=1,
        validation_alias=AliasChoices("max_bad_row_fraction", "max_bad_rows"),
        serialization_alias="max_bad_rows",
        description="fraction of the rows of a source, such as 0.05 for 5%, that may be invalid "
        "before the step fails",
    )
    max_duplicate_fraction: ChangeableOnResume[float] = Field(
        0.1,
        ge=0,
        le=1,
        validation_alias=AliasChoices("max_duplicate_fraction", "max_duplicates"),
        serialization_alias="max_duplicates",
        description="fraction of the rows of a source that may repeat an earlier one before the "
        "step fails; duplicates are always dropped",
    )
    max_too_long_fraction: ChangeableOnResume[float] = Field(
        0.1,
        ge=0,
        le=1,
        description="fraction of the examples of a source whose prefix may fill `data.seq_length` "
        "before the step fails; such examples are always dropped",
    )
    max_rows: int | None = Field(
        None,
        ge=1,
        description="maximum number of rows to read from each source; `data.validation` is always read "
        "completely",
    )

    @property
    def sources(self) -> tuple[MixtureSource, ...]:
        """The data sets that training examples come from: those of the mixture, or the one."""
        if self.source is None:
            return self.mixture
        return (MixtureSource(**{"source": self.source, **self._own_fields()}),)

    @property
    def validation_sources(self) -> tuple[MixtureSource, ...]:
        """The data sets of all held-out examples; none: they are a fraction of `sources`."""
        if self.validation is None:
            return ()
        if is_path(self.validation):
            rows = {"format": self.format, "columns": self.columns}
            return (MixtureSource(source=self.validation, **rows),)
        return tuple(
            source.model_copy(update={"split": self.validation}) for source in self.sources
        )

    @property
    def source_keys(self) -> dict[str, MixtureSource]:
        """Every data set that is read, by the key of the recipe that names it."""
        keys = (
            ["data.source"]
            if self.source is not None
            else [f"data.mixture.{index}" for index in range(len(self.mixture))]
        )
        named = dict(zip(keys, self.sources, strict=True))
        if self.validation is not None and is_path(self.validation):
            named["data.validation"] = self.validation_sources[0]
        return named

    @property
    def label(self) -> str:
        """The sources' names, for people."""
        return " + ".join(source.source for source in self.sources)

    def only(self, source: SourceFields) -> DataConfig:
        """Return these settings with one of the data sets as the only source."""
        fields = {name: getattr(source, name) for name in SourceFields.model_fields}
        return self.model_copy(update={**fields, "mixture": (), "validation": None})

    def _own_fields(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in SourceFields.model_fields if name != "source"}

    @model_validator(mode="after")
    def _one_way_to_name_sources(self) -> DataConfig:
        if self.source is None and not self.mixture:
            meaning = SourceFields.model_fields["source"].description
            raise InvalidSetting(
                f"key 'data.source' is missing ({meaning})",
                hint="Set data.source in the recipe, or with --set data.source=VALUE.",
            )
        if self.validation is not None:
            self._check_validation(self.validation)
        if not self.mixture:
            return self
        if self.source is not None:
            raise InvalidSetting(
                f"data.source: found {self.source!r} next to data.mixture, expected one of the two",
                hint="Make it an entry of data.mixture, or set data.mixture=[].",
            )
        from_file = self.validation is not None and is_path(self.validation)
        for name, value in self._own_fields().items():
            if value != SourceFields.model_fields[name].get_default(call_default_factory=True) and (
                not from_file or name not in ("format", "columns")
            ):
                raise InvalidSetting(
                    f"data.{name}: found a value next to data.mixture, whose entries have their own",
                    hint=f"Set {name} in each entry of data.mixture that needs it.",
                )
        return self

    def _check_validation(self, validation: str) -> None:
        path = is_path(validation)
        if not path and "/" in validation and "://" not in validation:
            raise InvalidSetting(
                f"data.validation: found {validation!r}, expected a split of the source, or the "
                "path of a file or folder",
                hint=f"Write a path as ./{validation}; a Hub dataset has to be downloaded first.",
            )
        for source in self.sources:
            if validation == (source.source if path else source.split):
                raise InvalidSetting(
                    f"data.validation: found {validation!r}, which is also what "
                    f"{source.source} trains on",
                    hint="Name other rows, or leave data.validation out: a fraction of the rows is "
                    "then held out.",
                )

    @field_validator(
        "max_bad_row_fraction", "max_duplicate_fraction", "max_too_long_fraction", mode="before"
    )
    @classmethod
    def _refuse_count(cls, value: Any) -> Any:
        if isinstance(value, int | float) and value > 1:
            raise PydanticCustomError(
                "fraction", "a fraction of the rows, such as 0.05 for 5%, not a count"
            )
        return value
