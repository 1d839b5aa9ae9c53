"""Read the data.yaml of a YOLO data set, or what tools write in its place: its splits and the names of its classes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

from headkd_ray.data.class_lists import listed
from headkd_ray.data.image_lists import lines_of
from headkd_ray.errors import DataError
from headkd_ray.storage import Folder

SPLITS = ("train", "val", "test")
OTHER_NAMES = {"valid": "val", "validation": "val"}
"""Keys that some tools write for a split."""
NAME_LISTS = ("classes.txt", "obj.names")
"""Text files with a class name a line, of tools that write no data.yaml: Label Studio and labelImg; CVAT (YOLO 1.1)."""


@dataclass(frozen=True)
class YoloYaml:
    """The content of a data.yaml."""

    path: str
    """Folder that the splits are relative to, as it is written; empty if it is not."""
    splits: dict[str, list[str]]
    """Folders or lists of images, as they are written, by split."""
    names: tuple[str, ...]
    """Class names; the position is the class number."""
    keypoints: int | None
    """Columns that a pose has after its box; None if the file does not say."""


def read_yolo_yaml(uri: str) -> YoloYaml:
    """Read the file at ``uri`` (path or URI). Raises DataError that lists all problems."""
    folder, name = Folder.of_file(uri, DataError)
    try:
        # Every scalar is text: a class may be called no, 07 or null.
        tree = _plain(yaml.compose(folder.read(name).decode("utf-8-sig"), Loader=yaml.BaseLoader), [])
    except FileNotFoundError as error:
        raise DataError(f"{uri}: no such file; check the path of the data.yaml") from error
    except OSError as error:
        raise DataError(f"{uri}: cannot be read ({error})") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise DataError(f"{uri}: not a data.yaml ({' '.join(str(error).split())})") from error
    if not isinstance(tree, dict):
        raise DataError(f"{uri}: not a data.yaml: it has no keys train, val and names")
    problems: list[str] = []
    splits = _splits(tree, problems)
    names = _names(tree, problems)
    path = tree.get("path", "")
    if not isinstance(path, str):
        problems.append("path: must be a folder")
    keypoints = tree.get("kpt_shape")
    columns = None
    if keypoints is not None:
        if isinstance(keypoints, list) and len(keypoints) == 2 and all(str(n).isdecimal() for n in keypoints):
            columns = int(keypoints[0]) * int(keypoints[1])
        else:
            problems.append("kpt_shape: must be two numbers, of key points and of values of each")
    if problems:
        raise DataError([f"{uri}: {problem}" for problem in problems])
    return YoloYaml(str(path), splits, names, columns)


def read_yolo_names(uri: str) -> YoloYaml:
    """Read the list of class names at ``uri`` (path or URI), beside which are the splits' lists of images, or the images.

    Raises DataError that lists all problems.
    """
    folder, name = Folder.of_file(uri, DataError)
    problems: list[str] = []
    names = _names({"names": lines_of(folder, name)}, problems)
    if problems:
        raise DataError([f"{uri}: {problem}" for problem in problems])
    lists = {OTHER_NAMES.get(split, split): [f"{split}.txt"] for split in (*SPLITS, *OTHER_NAMES) if folder.has(f"{split}.txt")}
    return YoloYaml("", lists or {"train": ["images" if (folder / "images").exists else "."]}, names, None)


def _plain(node: yaml.Node | None, above: list[yaml.Node]) -> Any:
    """Return a node as text, list or dictionary. Raises ValueError for keys that are written twice and for circles."""
    if any(node is other for other in above):
        raise ValueError("an alias contains itself")
    if len(above) > 4:  # no key that is read here is as deep
        return None
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, [*above, node]) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        keys = [str(getattr(key, "value", "")) for key, _ in node.value]
        twice = [key for key in keys if keys.count(key) > 1] if len(set(keys)) < len(keys) else []
        if twice:
            raise ValueError(f"the key {twice[0]!r} is written twice")
        return {key: _plain(value, [*above, node]) for key, (_, value) in zip(keys, node.value, strict=True)}
    return None if node is None else node.value


def _splits(tree: dict[str, Any], problems: list[str]) -> dict[str, list[str]]:
    splits = {}
    for key, value in tree.items():
        split = OTHER_NAMES.get(key, key)
        if split not in SPLITS or value in ("", "null", "~", []):
            continue
        places = [value] if isinstance(value, str) else value
        if not isinstance(places, list) or not all(isinstance(place, str) and place for place in places):
            problems.append(f"{key}: must be a folder of images, a text file that lists them, or a list of these")
        elif split in splits:
            problems.append(f"{key}: the split {split} is written twice")
        else:
            splits[split] = [place.replace("\\", "/") for place in places]
    if not splits and not problems:
        problems.append("no split; name the folders of the images under train, val and test")
    return splits


def _names(tree: dict[str, Any], problems: list[str]) -> tuple[str, ...]:
    found, count = tree.get("names"), tree.get("nc")
    if count is not None and not (isinstance(count, str) and re.fullmatch(r"[0-9]{1,6}", count)):
        problems.append("nc: must be the number of classes")
        count = None
    if isinstance(found, dict):
        wanted = [str(number) for number in range(len(found))]
        if set(found) != set(wanted):
            problems.append(
                f"names: {len(found)} classes must be numbered 0 to {len(found) - 1}; found {listed(sorted(found))}"
            )
            return ()
        found = [found[number] for number in wanted]
    if not isinstance(found, list) or not found or not all(isinstance(name, str) and name.strip() for name in found):
        problems.append("names: must list the names of the classes, or map their numbers to them")
        return ()
    if count is not None and int(count) != len(found):
        problems.append(f"nc: {count}, but 'names' has {len(found)} classes; correct one of them")
    twice = sorted({name for name in found if found.count(name) > 1})
    if twice:
        problems.append(f"names: {listed(twice)} stands there twice; merge the classes or rename one")
    return tuple(name.strip() for name in found)
