"""Read the XML of one image in Pascal VOC's format."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from typing import Any
from xml.parsers import expat

from headkd_ray.data.records import is_text

LARGEST = 2**26
"""Bytes of the largest file that is read."""
DEEPEST = 50
"""Levels of elements; VOC's has five."""
CVAT = "attributes/attribute"
"""Where CVAT writes its attributes, each with a name and a value."""
SIDES = ("xmin", "ymin", "xmax", "ymax")


class XmlError(ValueError):
    """The XML cannot be used; the argument is a problem's kind, which says why and how to mend it."""


@dataclass(frozen=True)
class VocObject:
    """An object of an image."""

    name: str
    corners: tuple[float, float, float, float]
    """xmin, ymin, xmax, ymax as they are written."""
    flags: dict[str, Any]
    """The values of the flags: difficult, truncated, occluded, ..., as they are written."""


@dataclass(frozen=True)
class VocImage:
    """The annotation of an image."""

    file_name: str
    """The photo's name as it is written; empty if it is not."""
    size: tuple[int, int]
    """Width and height in pixels; 0 x 0 if they are not written."""
    objects: list[VocObject | XmlError]
    """The objects; an error for each that cannot be used."""


def parse_voc(content: bytes) -> VocImage:
    """Parse a file. Raises XmlError if it is not an annotation in Pascal VOC's format, or is made to exhaust the memory."""
    root = _parse(content)
    if root.tag != "annotation":
        raise XmlError(f"not Pascal VOC: the outermost element is <{root.tag[:40]}>, not <annotation>")
    size = _size(root.find("size"))
    return VocImage((root.findtext("filename") or "").strip(), size, [_object(each) for each in root.findall("object")])


def _parse(content: bytes) -> ET.Element:
    """Return the outermost element. Entities cannot be declared, and nothing outside the file is read."""
    if len(content) > LARGEST:
        raise XmlError(f"larger than {LARGEST >> 20} MiB; an image's annotations are a few kilobytes")
    parser, builder, depth = expat.ParserCreate(), ET.TreeBuilder(), 0

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > DEEPEST:
            raise XmlError(f"elements are nested more than {DEEPEST} deep")
        builder.start(name, attributes)

    def end(name: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(name)

    def refuse(*_: object) -> None:
        raise XmlError("declares XML entities, which can exhaust the memory; write the annotations without them")

    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, builder.data
    parser.EntityDeclHandler = refuse
    try:
        parser.Parse(content, True)
        return builder.close()
    except (expat.ExpatError, ValueError, LookupError, AssertionError) as error:  # LookupError: an unknown encoding
        if isinstance(error, XmlError):
            raise
        raise XmlError(f"not XML ({error}); write it again") from error


def _size(element: ET.Element | None) -> tuple[int, int]:
    texts = ["" if element is None else (element.findtext(name) or "").strip() for name in ("width", "height")]
    if all(text in ("", "0", "None", "null") for text in texts):
        return 0, 0
    sides = [_number(text) for text in texts]
    width, height = (int(side) if side is not None and side.is_integer() and 0 < side < 2**31 else 0 for side in sides)
    if not width or not height:
        raise XmlError("<width> and <height> must be the photo's pixels; correct them, or remove <size>")
    return width, height


def _object(element: ET.Element) -> VocObject | XmlError:
    name = (element.findtext("name") or "").strip()
    if not is_text(name):
        return XmlError("<object> without a <name>; give its class")
    box = element.find("bndbox")
    if box is None:
        return XmlError("<object> without a <bndbox>; remove it, or draw its box")
    corners = tuple(_number(box.findtext(side) or "") for side in SIDES)
    if None in corners:
        return XmlError("<bndbox> must have finite numbers xmin, ymin, xmax and ymax")
    flags: dict[str, Any] = {
        each.tag: (each.text or "").strip() for each in element if not len(each) and each.tag not in ("name", "pose")
    }
    flags["attributes"] = {each.findtext("name", ""): each.findtext("value", "") for each in element.iterfind(CVAT)}
    return VocObject(name, corners, flags)  # type: ignore[arg-type]


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
