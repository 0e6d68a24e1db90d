"""Champion, challenger and rollback, after any end of the process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlflow
import pytest

from pipelines.errors import UserError
from pipelines.registry.aliases import champion, champions, promote, rollback, set_challenger
from pipelines.registry.tracking import connect
from pipelines.registry.versions import show_model
from tests.pipelines.registry.versions import THREE, TWO, add_version, aliases

WRITES = (
    "set_registered_model_tag", "set_registered_model_alias", "delete_registered_model_alias",
)  # fmt: skip


def test_the_aliases_of_the_groups_are_set_with_those_of_the_composite(section) -> None:
    assert champion(section, "a") is None
    assert add_version(section, "a", THREE) == 1
    assert champion(section, "a") is None
    set_challenger(section, "a", 1)
    groups = {"group_0": ["sick"], "group_1": ["cost"], "group_2": ["days"]}
    outcome = {"name": "a", "version": 1, "before": None, "grouping": "x", "groups": groups}
    assert promote(section, "a") == outcome
    all_of_1 = {"": 1, ".group_0": 1, ".group_1": 1, ".group_2": 1}
    assert aliases(section, "a") == {"champion": all_of_1, "challenger": all_of_1}
    add_version(section, "a", TWO)
    set_challenger(section, "a", 2)
    all_of_2 = {"": 2, ".group_0": 2, ".group_1": 2}
    assert aliases(section, "a") == {"champion": all_of_1, "challenger": all_of_2}
    assert promote(section, "a") == promote(section, "a")
    assert aliases(section, "a") == {"champion": all_of_2, "challenger": all_of_2}
    assert champion(section, "a") == show_model(section, "a/2") == show_model(section, "models:/a@champion")
    assert rollback(section, "a") == outcome | {"before": 2}
    assert aliases(section, "a") == {"champion": all_of_1, "challenger": all_of_2}
    with pytest.raises(UserError, match="no champion before this one"):
        rollback(section, "a")


def test_rollbacks_visit_all_previous_champions_that_still_exist(section) -> None:
    for _ in range(4):
        add_version(section, "b", TWO)
    for version in (1, 2, 1, 3, 4):
        promote(section, "b", version)
    assert champions(section, "b") == [1, 2, 1, 3, 4]
    connect(section).delete_model_version("b", "3")
    assert [rollback(section, "b")["version"] for _ in range(3)] == [1, 2, 1]
    with pytest.raises(UserError, match="no champion before this one"):
        rollback(section, "b")
    promote(section, "b", 2)
    assert champions(section, "b") == [1, 2]


class KilledError(BaseException):
    """The process ends."""


@pytest.fixture
def killer() -> Iterator[Any]:
    """`killer(n)`: the process ends after n writes to the registry; `killer(None)`: it does not end."""
    left: list[int | None] = [None]

    def counted(write: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if left[0] is not None:
                if left[0] == 0:
                    raise KilledError
                left[0] -= 1
            return write(*args, **kwargs)

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        for name in WRITES:
            patch.setattr(mlflow.MlflowClient, name, counted(getattr(mlflow.MlflowClient, name)))
        yield lambda writes: left.__setitem__(0, writes)


def ends_after(killer: Any, writes: int, body: Any) -> bool:
    """Whether the process ended before `body` returned."""
    killer(writes)
    try:
        body()
    except KilledError:
        return True
    finally:
        killer(None)
    return False


def test_a_promotion_that_is_killed_at_any_point_is_completed_by_the_same_command(section, killer) -> None:
    def served(version: int) -> dict[str, int]:
        return {"": version, ".group_0": version, ".group_1": version} | ({".group_2": 1} if version == 1 else {})

    points, moved = 0, []
    while True:
        name = f"kill{points}"
        add_version(section, name, THREE)
        add_version(section, name, TWO)
        promote(section, name, 1)
        killed = ends_after(killer, points, lambda: promote(section, name, 2))  # noqa: B023 - called at once
        serving = champion(section, name)["version"]
        moved.append(serving)
        assert champions(section, name) == ([1] if serving == 1 else [1, 2])
        if not killed:
            break
        if serving == 1 and points:  # another one may be promoted instead
            assert promote(section, name, 1)["version"] == 1
            assert aliases(section, name)["champion"] == served(1)
        assert promote(section, name, 2)["before"] == 1
        assert aliases(section, name)["champion"] == served(2)
        assert rollback(section, name)["version"] == 1
        assert aliases(section, name)["champion"] == served(1)
        assert champions(section, name) == [1]
        points += 1
    assert moved == [1, 1, 2, 2, 2, 2]  # list, alias, two groups, and the third one's alias


def test_a_rollback_that_is_killed_at_any_point_loses_no_champion(section, killer) -> None:
    points, moved = 0, []
    while True:
        name = f"back{points}"
        for groups in (TWO, THREE):
            add_version(section, name, groups)
        for version in (1, 2, 1, 2):
            promote(section, name, version)
        killed = ends_after(killer, points, lambda: rollback(section, name))  # noqa: B023 - called at once
        serving = champion(section, name)["version"]
        moved.append(serving)
        assert champions(section, name) == ([1, 2, 1, 2] if serving == 2 else [1, 2, 1])
        if not killed:
            break
        promote(section, name, serving)
        third = {".group_2": 1} if serving == 2 else {}
        assert (
            aliases(section, name)["champion"] == {"": serving, ".group_0": serving, ".group_1": serving} | third
        )
        left = [rollback(section, name)["version"] for _ in champions(section, name)[1:]]
        assert left == ([1, 2, 1] if serving == 2 else [2, 1])
        points += 1
    assert moved == [2, 2, 1, 1, 1, 1]
