"""Champion, challenger and rollback, after any end of the process."""

from __future__ import annotations

import pytest

from pipelines.config.sections import TrackSection
from pipelines.errors import UserError
from pipelines.registry.aliases import acknowledge, champion, champions, promote, rollback, set_challenger
from pipelines.registry.changes import JOURNAL, UNANSWERED
from pipelines.registry.records import registered
from pipelines.registry.tracking import connect
from pipelines.registry.versions import diff_models, list_models, show_model
from tests.pipelines.kill_points import kill_points
from tests.pipelines.registry.versions import THREE, TWO, add_version, aliases
from tests.soak import others_in_soak


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


def served(version: int) -> dict[str, int]:
    """The aliases of one version: the first has three groups, the others have two."""
    return {"": version, ".group_0": version, ".group_1": version} | ({".group_2": 1} if version == 1 else {})


def before_the_kill(section: TrackSection, name: str, *promoted: int) -> None:
    for groups in (THREE, TWO, TWO):
        add_version(section, name, groups)
    for version in promoted:
        promote(section, name, version)


promote_2, promote_1 = (
    (lambda section, name: promote(section, name, 2)),
    (lambda section, name: promote(section, name, 1)),
)


# the first write is lost, one in the middle, the last one
SOME = pytest.param(lambda writes: (0, writes // 2, writes - 1), id="some")
ALL = pytest.param(range, id="all", marks=pytest.mark.soak)


@pytest.mark.parametrize("points", [SOME, ALL])
@pytest.mark.parametrize(
    ("command", "again", "promoted", "serving", "history"),
    [
        pytest.param(promote_2, rollback, (1,), 2, [1, 2], id="promote"),
        pytest.param(rollback, promote_2, (1, 2), 1, [1], id="rollback"),
        pytest.param(promote_1, rollback, (1, 2), 1, [1, 2, 1], id="promote_back", marks=pytest.mark.soak),
        pytest.param(
            rollback, promote_1, (2, 1, 3, 1), 3, [2, 1, 3], id="rollback_of_many", marks=pytest.mark.soak
        ),
    ],
)
def test_a_command_that_is_killed_at_any_write_is_finished_by_the_same_command(
    section, request, command, again, promoted, serving, history, points
) -> None:
    name = request.node.callspec.id
    before_the_kill(section, name, *promoted)
    with kill_points() as kills:
        assert not kills.ended(lambda: command(section, name), None)
        writes = kills.calls
        assert writes[0] == "set_registered_model_tag"
        assert writes[-1] == "delete_registered_model_tag"
        assert len(writes) >= 6
        for at in points(len(writes)):
            again(section, name)
            assert kills.ended(lambda: command(section, name), at)
            assert kills.calls == writes[:at]
            assert command(section, name)["version"] == serving
            assert aliases(section, name)["champion"] == served(serving)
            assert champions(section, name) == history
            assert JOURNAL not in registered(connect(section), name).tags


@pytest.mark.parametrize("points", [SOME, ALL])
@pytest.mark.parametrize("between", ["nothing", "a reader"])
def test_a_rollback_that_is_killed_before_its_answer_is_not_done_twice(section, request, between, points) -> None:
    name = f"answer_{request.node.callspec.id}"
    before_the_kill(section, name, 1, 2, 3)
    with kill_points() as kills:
        assert not kills.ended(lambda: rollback(section, name, acknowledged=False), None)
        steps = len(kills.calls)
    promote(section, name, 3)
    for at in points(steps + 1):  # the last one is not reached: the process ends after its last write
        with kill_points() as kills:
            assert kills.ended(lambda: rollback(section, name, acknowledged=False), at) == (at < steps)
        if between == "a reader" and at:
            assert champion(section, name)["version"] == 2
        outcome = rollback(section, name, acknowledged=False)
        assert (outcome["version"], outcome["before"]) == (2, 3), at
        acknowledge(section, name)
        assert champions(section, name) == [1, 2]
        assert not {JOURNAL, UNANSWERED} & set(registered(connect(section), name).tags)
        promote(section, name, 3)


def test_a_promotion_ends_the_wait_for_the_answer_of_a_rollback(section) -> None:
    before_the_kill(section, "later", 1, 2, 3)
    rollback(section, "later", acknowledged=False)
    promote(section, "later", 3)
    promote(section, "later", 2)
    assert rollback(section, "later")["version"] == 3


READERS = {
    "list": list_models,
    "champion": champion,
    "show": lambda section, name: show_model(section, f"{name}.group_0@champion"),
    "diff": lambda section, name: diff_models(section, f"{name}/1", f"{name}@champion"),
}


@pytest.fixture(scope="module")
def read(section) -> str:
    """A model with two champions."""
    before_the_kill(section, "read", 1)
    return "read"


@pytest.mark.parametrize("reader", others_in_soak(READERS, "list", "show"))  # `champion` is a reader above
def test_a_rollback_that_is_killed_is_finished_by_the_next_reader(section, reader, read) -> None:
    name = read
    promote(section, name, 2)
    with kill_points() as points:
        assert points.ended(lambda: rollback(section, name), 4)
    READERS[reader](section, name)
    assert aliases(section, name)["champion"] == served(1)
    assert champions(section, name) == [1]


def test_readers_of_a_group_get_the_member_of_the_composite_also_during_a_change(section, monkeypatch) -> None:
    before_the_kill(section, "during", 1)
    client = connect(section)
    client.set_registered_model_alias("during", "champion", "2")  # its groups still have the alias of version 1
    assert [show_model(section, f"during.group_{k}@champion")["version"] for k in range(2)] == [2, 2]
    with pytest.raises(UserError, match="no alias 'champion'"):
        show_model(section, "during.group_2@champion")


def test_a_change_to_a_version_that_was_deleted_is_undone(section) -> None:
    before_the_kill(section, "gone", 1)
    with kill_points() as points:
        assert points.ended(lambda: promote(section, "gone", 3), 1)
    connect(section).delete_model_version("gone", "3")
    assert champion(section, "gone")["version"] == 1
    assert aliases(section, "gone")["champion"] == served(1)
    assert champions(section, "gone") == [1]


def test_models_with_similar_names_keep_their_aliases(section) -> None:
    client = connect(section)
    for name in ("near.group_theory", "near.group_7"):  # neither is a group of the composite `near`
        client.create_registered_model(name)
        client.create_model_version(name, "file:///nowhere")
        client.set_registered_model_alias(name, "champion", "1")
    before_the_kill(section, "near", 1, 2)
    held = {".group_theory": 1, ".group_7": 1}
    assert aliases(section, "near")["champion"] == served(2) | held


def test_after_a_promotion_the_difference_is_that_to_the_champion_before(section) -> None:
    before_the_kill(section, "seen", 1)
    set_challenger(section, "seen", 1)
    with pytest.raises(UserError, match="seen/1 is champion and challenger, and there was no champion before it"):
        diff_models(section, "seen")
    set_challenger(section, "seen", 2)
    found = diff_models(section, "seen")
    assert (found["before"]["version"], found["after"]["version"]) == (1, 2)
    promote(section, "seen")
    found = diff_models(section, "seen")
    assert (found["before"]["version"], found["after"]["version"]) == (1, 2)
