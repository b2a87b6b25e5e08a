"""The life cycle of a registered model: which moves are allowed, and where each version stands after them.

| stage (also the alias in the registry) | in the source documents | holds |
|---|---|---|
| candidate | Experimental | every version that was released |
| staging | Staging | one version |
| challenger | A/B test | one version |
| champion | Production | one version |
| archived | Archived | what has been champion, or was put away |

The truth is the trail: entries that are only ever appended, each with who, when, why, and the moves. Aliases, tags and
descriptions are made from it, so two people who promote at once can leave neither two champions nor a lost entry.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from ml.errors import UserError

Stage = Literal["candidate", "staging", "challenger", "champion", "archived"]
STAGES: tuple[Stage, ...] = ("candidate", "staging", "challenger", "champion", "archived")
SEATS: tuple[Stage, ...] = ("staging", "challenger", "champion")  # one version each
UP: dict[Stage, tuple[Stage, ...]] = {
    "candidate": ("staging",),
    "staging": ("challenger", "champion"),
    "challenger": ("champion",),
    "champion": (),
    "archived": ("staging",),
}
DOWN: dict[Stage, tuple[Stage, ...]] = {  # the first is what `demote` does when no stage is named
    "candidate": ("archived",),
    "staging": ("candidate", "archived"),
    "challenger": ("staging", "candidate", "archived"),
    "champion": ("archived", "staging", "candidate"),
    "archived": (),
}
Action = Literal["register", "promote", "demote", "rollback"]
WHY_LIMIT = 1000  # characters: an entry has to fit a parameter of MLflow and a tag of GitLab


class Move(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    version: str
    tag: str  # of the release
    origin: Annotated[Stage | None, Field(alias="from")]  # None: it was not in the registry
    to: Stage


class Entry(BaseModel):
    """One change. Its number is the place in the trail, from 1 on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: Annotated[int, Field(ge=1)]
    when: str  # UTC, ISO 8601, by the clock of who made the change
    who: str
    why: Annotated[str, Field(min_length=1, max_length=WHY_LIMIT)]
    action: Action
    moves: Annotated[tuple[Move, ...], Field(min_length=1)]
    accepted: str | None = None  # why a model that is worse than the champion may take this step

    def to_json(self) -> str:
        return self.model_dump_json(by_alias=True, exclude_none=False)

    def describe(self, move: Move) -> str:
        accepted = f" (regression accepted: {self.accepted})" if self.accepted else ""
        step = f"{move.origin or '(new)'} → {move.to}"
        return f"{self.when[:19]}Z  {move.version} ({move.tag})  {step}  {self.action} by {self.who}: {self.why}{accepted}"


@dataclass
class State:
    """Where every version stands: `stages` and `tags` by version, in the order of their last move."""

    entries: list[Entry] = field(default_factory=list)
    stages: dict[str, Stage] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    champions: list[str] = field(
        default_factory=list
    )  # what rollback goes back through; the last is the latest

    def holder(self, stage: Stage) -> str | None:
        """The version that came to `stage` last and is still there."""
        return next((version for version in reversed(self.stages) if self.stages[version] == stage), None)

    @property
    def aliases(self) -> dict[Stage, str]:
        holders = {stage: self.holder(stage) for stage in STAGES}
        return {stage: version for stage, version in holders.items() if version is not None}

    def version_of(self, tag: str) -> str | None:
        return next((version for version, its in self.tags.items() if its == tag), None)

    def resolve(self, name: str) -> str:
        """The version that a version, a release tag, or a stage with one holder names. Raises UserError."""
        found = name if name in self.stages else self.version_of(name)
        if found is None and name in STAGES:
            found = self.holder(name)
        if found is None:
            known = ", ".join(f"{version} ({tag})" for version, tag in self.tags.items()) or "none"
            raise UserError(
                f"{name!r} is no version, release tag or filled stage in the registry's trail (versions: {known}).\n"
                "Only what the release job has registered has a trace: let `python -m ml.release.publish` register it."
            )
        return found


def replay(entries: Iterable[Entry]) -> State:
    """Raises UserError when the trail has a gap: an entry is missing, or its number is not its place."""
    state = State()
    for place, entry in enumerate(entries, start=1):
        if entry.number != place:
            raise UserError(
                f"The registry's trail has a gap: entry {place} is missing (found {entry.number})."
            )
        state.entries.append(entry)
        for move in entry.moves:
            state.stages.pop(move.version, None)  # to the end: the order is that of the last move
            state.stages[move.version] = move.to
            state.tags[move.version] = move.tag
            if move.to == "champion":
                if move.version in state.champions:  # rolled back: those after it are no way back any more
                    del state.champions[state.champions.index(move.version) :]
                state.champions.append(move.version)
            elif move.origin == "champion" and entry.action == "demote" and move.version in state.champions:
                state.champions.remove(move.version)
    return state


def moves_to(state: State, version: str, to: Stage) -> tuple[Move, ...]:
    """The move, after that of the version which has to leave the place: a champion is archived, others step back."""
    moves = []
    holder = state.holder(to) if to in SEATS else None
    if holder is not None and holder != version:
        away: Stage = "archived" if to == "champion" else "candidate"
        moves.append(Move(version=holder, tag=state.tags[holder], origin=to, to=away))
    moves.append(Move(version=version, tag=state.tags[version], origin=state.stages[version], to=to))
    return tuple(moves)


def check_promotion(state: State, version: str, to: Stage) -> None:
    at = state.stages[version]
    if to not in UP[at]:
        ways = ", ".join(UP[at]) or "none"
        hint = {
            "champion": "It is in production already.",
            "archived": "Take it back to production by `python -m ml.promote rollback`.",
        }.get(at, "Go step by step.")
        if to in DOWN[at]:
            hint = f"Use `python -m ml.promote demote {version} --to {to}`."
        raise UserError(
            f"Version {version} is {at}; from there it can be promoted to: {ways}, not to {to}. {hint}"
        )


def demotion(state: State, version: str, to: Stage | None) -> Stage:
    """Where a demotion leads. Raises UserError when it is none."""
    at = state.stages[version]
    if not DOWN[at] or (to is not None and to not in DOWN[at]):
        ways = ", ".join(DOWN[at]) or "nowhere"
        raise UserError(f"Version {version} is {at}; from there it can be demoted to: {ways}.")
    return to or DOWN[at][0]


def rollback_target(state: State, version: str | None) -> str:
    """The champion before the present one, or `version`, if it has been champion."""
    current = state.holder("champion")
    past = [each for each in state.champions if each != current]
    if version is None and past:
        return past[-1]
    if version in past:
        return version
    ways = ", ".join(f"{each} ({state.tags[each]})" for each in past) or "none"
    raise UserError(
        f"There is no way back to {version or 'an earlier champion'} (earlier champions: {ways}). "
        "Another version goes there by `python -m ml.promote VERSION --to …`."
    )
