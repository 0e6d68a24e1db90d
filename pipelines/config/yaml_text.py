"""YAML of users, read with the safe loader; a text is refused if its values would take long or fill the memory."""

from __future__ import annotations

from typing import Any, TypeGuard

import yaml

LARGEST_TEXT = 2 * 2**20  # characters
MOST_VALUES = 200_000  # with every alias replaced by what it stands for
DEEPEST = 40
TEXT = "tag:yaml.org,2002:str"


class _Loader(yaml.SafeLoader):
    """The safe loader, with a limit of the nesting: a deeper text would end in the limit of Python's recursion."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose a node and those in it."""
        self.depth += 1
        if self.depth > DEEPEST:
            raise _refused(f"values are nested more than {DEEPEST} levels deep", self.peek_event().start_mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
        """Compose a mapping. In braces, YAML ends a text at a comma; the arguments of a call are joined again."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        if node.flow_style:
            node.value = _with_whole_calls(node.value)
        return node


def load_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        yaml.YAMLError: If it is not valid, too large or nested too deeply, or has impossible values.
    """
    if len(text) > LARGEST_TEXT:
        raise yaml.YAMLError(f"it has {len(text)} characters, at most {LARGEST_TEXT} are read")
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _size(node, {})
        return loader.construct_document(node)
    except (ValueError, OverflowError) as error:  # a date without such a day, a number of thousands of digits
        raise yaml.YAMLError(f"a value cannot be read: {error}") from error
    finally:
        loader.dispose()


def in_line(value: Any, width: int = 10_000) -> str:
    """A value as YAML that `load_yaml` reads, on one line unless it is longer than `width`."""
    shown: str = yaml.safe_dump(value, default_flow_style=True, width=width, allow_unicode=True, sort_keys=False)
    return shown.removesuffix("...\n").rstrip()


def _with_whole_calls(pairs: list[tuple[yaml.Node, yaml.Node]]) -> list[tuple[yaml.Node, yaml.Node]]:
    """The pairs of a mapping in braces: `{a: uniform(0, 1)}` is read as the keys `a` and `1)`."""
    found: list[tuple[yaml.Node, yaml.Node]] = []
    for key, value in pairs:
        before = found[-1][1] if found else None
        bare = _is_plain(key) and _is_plain(value) and value.value == ""
        if bare and _is_plain(before) and before.value.count("(") > before.value.count(")"):
            before.value += f", {key.value}"
            before.tag = TEXT
        else:
            found.append((key, value))
    return found


def _is_plain(node: yaml.Node | None) -> TypeGuard[yaml.ScalarNode]:
    """Whether a node is a scalar without quotes."""
    return isinstance(node, yaml.ScalarNode) and node.style is None


def _size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Number of values in a node; an alias counts as often as it is used.

    Args:
        sizes: The sizes of the nodes so far, 0 for a node that is being counted.
    """
    if id(node) in sizes:
        if not sizes[id(node)]:
            raise _refused("an alias stands for a value that contains it", node.start_mark)
        return sizes[id(node)]
    sizes[id(node)] = 0
    inner = [one for pair in node.value for one in pair] if isinstance(node, yaml.MappingNode) else node.value
    count = 1 if isinstance(node, yaml.ScalarNode) else 1 + sum(_size(one, sizes) for one in inner)
    if count > MOST_VALUES:
        raise _refused(f"it stands for more than {MOST_VALUES} values", node.start_mark)
    sizes[id(node)] = count
    return count


def _refused(problem: str, mark: yaml.Mark) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
