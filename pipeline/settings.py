"""What all settings are made of: the base model and the types of their fields."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StrictInt


def _no_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("should be a number, not true or false")
    return value


def _zero_or_warm_enough(value: float) -> float:
    if 0.0 < value < 0.01:
        raise ValueError(f"should be 0 or at least 0.01, not {value}")
    return value


Number = Annotated[float, BeforeValidator(_no_boolean)]
Positive = Annotated[StrictInt, Field(gt=0)]
Seed = Annotated[StrictInt, Field(ge=0, lt=2**32)]
Fraction = Annotated[Number, Field(ge=0.0, le=1.0)]
Decay = Annotated[Number, Field(ge=0.0, lt=1.0)]
Rate = Annotated[Number, Field(gt=0.0)]
NonNegative = Annotated[Number, Field(ge=0.0)]
Temperature = Annotated[Number, Field(ge=0.01, le=100.0)]
ZeroOrTemperature = Annotated[Number, AfterValidator(_zero_or_warm_enough), Field(ge=0.0, le=100.0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


class Settings(BaseModel):
    """Base of all configuration: unknown keys refused, values immutable, NaN and infinity refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False, protected_namespaces=()
    )
