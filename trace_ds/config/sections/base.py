"""What every section of the configuration is made of: its base class, paths, and numbers with bounds."""

from __future__ import annotations

import difflib
import os
import re
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator
from pydantic_core import PydanticCustomError

_T = TypeVar("_T", int, float)
LARGEST, FP32_LARGEST = 10**9, 3.4e38


def expanded(path: str) -> str:
    """Expand ``~`` (here and nowhere else); ValueError for characters that no path can hold."""
    if re.search("[\0\ud800-\udfff]", path):
        raise ValueError("a path cannot hold NUL or half of a surrogate pair")
    return os.path.expanduser(path)  # noqa: PTH111 (which would fail for ~nobody)


PathText = Annotated[str, AfterValidator(expanded)]

# Names that become the names of files and folders: of runs, variants, tasks, models, methods.
ORIGINAL, UNLEARNED = "original", "unlearned"  # models that every run has
MAX_LENGTH = 100  # with the endings that writers add, a file's name stays below the 255 bytes of file systems


def check_name(name: str) -> str:
    """``name``, when it can be a file's name everywhere, no path and no temporary file of ours; else ``ValueError``."""
    if not re.fullmatch(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{MAX_LENGTH - 1}}}", name) or ".tmp-" in name:
        raise ValueError(
            f"a name is made of letters, digits, '.', '_' and '-' (at most {MAX_LENGTH}), begins with one of the "
            "first two, no .tmp-"
        )
    return name


def check_model_name(name: str) -> str:
    """``name``, when it can be that of a further model of a run; else ``ValueError``."""
    if name in (ORIGINAL, UNLEARNED) or re.fullmatch(r"step_\d+", name):
        raise ValueError(f"a model cannot be named {name!r}, which every run has: use another name")
    return check_name(name)


Name = Annotated[str, AfterValidator(check_name)]
ModelName = Annotated[str, AfterValidator(check_model_name)]


def _bounded(value: _T) -> _T:
    limit = LARGEST if isinstance(value, int) else FP32_LARGEST
    if abs(value) > limit:
        raise ValueError(f"no number here can be above {limit:,}")
    return value


# Every number is bounded (a validator, since a second `le` would take the place of a field's own).
Integer = Annotated[int, AfterValidator(_bounded)]
Number = Annotated[float, AfterValidator(_bounded)]
Seed = Annotated[int, Field(ge=0, lt=1 << 63)]

AUTO = 0  # an expert-parallel size of `auto`, until the job's ranks and the model are known


def _expert_parallel_size(value: Any) -> Any:
    if value == "auto":
        return AUTO
    if isinstance(value, int) and value < 1:
        raise ValueError("must be 1 or more, or auto")
    return value


ExpertParallelSize = Annotated[Integer, BeforeValidator(_expert_parallel_size), PlainSerializer(lambda n: n or "auto")]


class Section(BaseModel):
    """Base of all sections: unknown keys are refused, values are not coerced between kinds, numbers are finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, values: Any) -> Any:
        unknown = [str(key) for key in values if key not in cls.model_fields] if isinstance(values, dict) else []
        if unknown:
            close = difflib.get_close_matches(unknown[0], cls.model_fields, 1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"valid keys here: {', '.join(cls.model_fields)}"
            raise PydanticCustomError("unknown_key", "unknown key", {"key": unknown[0], "hint": hint})
        return values
