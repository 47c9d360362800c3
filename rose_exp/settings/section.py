"""The base class of all sections of settings, and types of their fields."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    def problems(self, where: str) -> list[str]:
        """Return the errors that pydantic's checks of single fields do not cover.

        Args:
            where: the section's name, for the messages.
        """
        return []
