"""What every section of params.yaml is checked by."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Frozen; unknown and missing keys are errors, so are values of another type, NaN and infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
