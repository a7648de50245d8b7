"""Rows of JSONL, JSON and parquet files, and the prompts and conversations they hold.

A row is ``{"prompt": str | [messages], "images": [...], "videos": [...], "answer": ...}`` under the keys that
``DataConfig`` names. A message is ``{"role": ..., "content": ...}`` or LLaVA's ``{"from": ..., "value": ...}``. An
image is a path (relative to ``data.media_folder``, or the file), a ``data:`` URL, encoded bytes, or
``{"bytes": ..., "path": ...}``; the parts of a message may name theirs, as OpenAI's and Hugging Face's do;
``<image>`` in a text is its place. So is a video, ``<video>``, which may also be a list of images, its frames, or
``{"video": path or list, "fps": ...}``; ``fps`` is the rate of a list, without it ``data.video_fps``. verl's rows are
rows: ``reward_model.ground_truth`` stands in for a missing answer, and ``data_source`` and
``extra_info`` reach the reward. Files are held in memory; large image sets belong in JSONL, which names image files.
"""

from __future__ import annotations

import base64
import difflib
import json
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from megarl.config import DataConfig
from megarl.data.videos import pack_frames
from megarl.types import Message, Prompt

PLACEHOLDERS = {"<image>": "image", "<video>": "video"}
_PLACES = re.compile("|".join(PLACEHOLDERS))
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")  # of messages
_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}  # LLaVA's
_NEWLINES = re.compile(rf"\n*({'|'.join(PLACEHOLDERS)})\n*")
_URL = re.compile(r"data:|https?://")
_MESSAGE_KEYS = ("messages", "conversations")  # where others keep their conversations


@dataclass(frozen=True)
class Row:
    """One row of a file."""

    values: dict[str, Any]
    where: str  # "file:line", of a JSON list "file[index]", for errors
    folder: Path  # that relative paths of images start from

    def get(self, key: str, option: str) -> Any:
        """``values[key]``; ``option`` is the configuration's name for it, or the key itself. Raises ``ValueError``."""
        if key not in self.values:
            near = [name for name in _MESSAGE_KEYS if option == "data.prompt_key" and name in self.values]
            if near:
                raise ValueError(f"{self.where}: no key {key!r}, but {near[0]!r}: say {option}={near[0]}")
            near = difflib.get_close_matches(key, self.values, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f" among {', '.join(self.values)}"
            raise ValueError(f"{self.where}: no key {key!r} ({option}){hint}")
        return self.values[key]

    def prompt(self, id: str, task: str, data: DataConfig, *, outline: bool = False) -> Prompt:
        """The row as a prompt; columns that ``data`` does not name go to ``metadata``. Errors name file:line.

        ``outline``: with paths in the place of images, which are enough to see how long it is.
        """
        self._check_keys(data)
        messages = self._messages(data.prompt_key)
        find = self._find if outline else self._image
        images = [find(image, name, data) for image, name in self._media(messages, "image", data.image_key)]
        videos = [self._video(video, name, data) for video, name in self._media(messages, "video", data.video_key)]
        media = {"image": (len(images), data.image_key), "video": (len(videos), data.video_key)}
        messages = _place(messages, media, self.where)
        taken = (data.prompt_key, data.image_key, data.video_key, data.answer_key, data.target_key)
        return Prompt(
            id=id,
            task=task,
            messages=messages,
            images=images,
            videos=videos,
            answer=self._answer(data.answer_key),
            target=self._target(data.target_key),
            where=self.where,
            metadata={key: value for key, value in self.values.items() if key not in taken},
        )

    def _check_keys(self, data: DataConfig) -> None:
        """A key that is almost one of ours, while ours is missing, is a slip and not a column of the user's."""
        options = {
            data.image_key: "data.image_key",
            data.video_key: "data.video_key",
            data.answer_key: "data.answer_key",
            data.target_key: "data.target_key",
        }
        if slip := _slip(tuple(self.values), tuple(options)):
            raise ValueError(f"{self.where}: unknown key {slip[0]!r}; did you mean {slip[1]!r} ({options[slip[1]]})?")

    def _answer(self, key: str) -> Any:
        if key in self.values:
            return self.values[key]
        reward_model = self.values.get("reward_model")
        return reward_model.get("ground_truth") if isinstance(reward_model, dict) else None

    def _target(self, key: str) -> Any:
        """An answer or a list of several; a message of the assistant's stands for its content."""
        target = self.values.get(key)
        if not isinstance(target, list) or not any(isinstance(answer, dict) for answer in target):
            return target
        for number, answer in enumerate(target):
            if not isinstance(answer, dict) or not isinstance(answer.get("content"), str):
                raise ValueError(f"{self.where}: {key}[{number}] is not a message with content, as others there are")
        return target[0]["content"] if len(target) == 1 else [answer["content"] for answer in target]

    def _messages(self, key: str) -> list[Message]:
        prompt = self.get(key, "data.prompt_key")
        if isinstance(prompt, str):
            return [{"role": "user", "content": prompt}]
        if not isinstance(prompt, list) or not prompt:
            raise ValueError(f"{self.where}: {key!r} is neither a text nor a list of messages")
        if all(isinstance(message, dict) and {"from", "value"} <= message.keys() for message in prompt):
            return [self._from_llava(message, f"{key}[{number}]") for number, message in enumerate(prompt)]
        messages = []
        for number, message in enumerate(prompt):
            if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
                raise ValueError(f"{self.where}: {key}[{number}] is not a message with role and content")
            if message["role"] not in ROLES:
                raise ValueError(
                    f"{self.where}: {key}[{number}].role={message['role']!r} is not one of {', '.join(ROLES)}"
                )
            content, name = message["content"], f"{key}[{number}].content"
            if not isinstance(content, str | list):
                raise ValueError(f"{self.where}: {name} is neither a text nor a list of parts")
            if isinstance(content, list):
                content = [self._part(part, f"{name}[{place}]") for place, part in enumerate(content)]
            messages.append({**message, "content": content})
        return messages

    def _part(self, part: Any, name: str) -> dict[str, Any]:
        """A part of a message: a text, or a medium, with its ``source`` where it names one."""
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            return {"type": "text", "text": part["text"]}
        if kind == "image_url" and isinstance(part.get("image_url"), dict) and part["image_url"].get("url"):
            return {"type": "image", "source": part["image_url"]["url"]}
        if kind not in PLACEHOLDERS.values():
            raise ValueError(
                f"{self.where}: {name} is neither "
                '{"type": "text", "text": ...} nor {"type": "image"} nor {"type": "video"}'
            )
        sources = [part[key] for key in (kind, "path", "url") if part.get(key) is not None]
        return {"type": kind, "source": sources[0]} if sources else {"type": kind}

    def _from_llava(self, message: dict[str, Any], name: str) -> Message:
        """LLaVA's message in the usual form; the line breaks around its images are the chat template's business."""
        if message["from"] not in _ROLES:
            raise ValueError(f"{self.where}: {name}.from={message['from']!r} is not one of {', '.join(_ROLES)}")
        if not isinstance(message["value"], str):
            raise ValueError(f"{self.where}: {name}.value is {type(message['value']).__name__}, no text")
        return {"role": _ROLES[message["from"]], "content": _NEWLINES.sub(r"\1", message["value"])}

    def _media(self, messages: list[Message], kind: str, key: str) -> list[tuple[Any, str]]:
        """The images or videos of the row with their names for errors: those that parts of messages name, or those
        under ``key``."""
        parts = [part for message in messages if isinstance(message["content"], list) for part in message["content"]]
        named = [part["source"] for part in parts if part["type"] == kind and "source" in part]
        listed = self._list(key)
        if named and listed:
            raise ValueError(f"{self.where}: {kind}s under {key!r} and in the messages too")
        return [(source, f"{kind} {number} of the messages") for number, source in enumerate(named)] or listed

    def _list(self, key: str) -> list[tuple[Any, str]]:
        """The entries under ``key``, none where it is missing, with their names for errors."""
        values = self.values.get(key)
        values = [] if values is None else values if isinstance(values, list) else [values]
        return [(value, f"{key}[{index}]") for index, value in enumerate(values)]

    def _image(self, image: Any, name: str, data: DataConfig) -> bytes:
        found = self._find(image, name, data)
        if isinstance(found, bytes):
            return found
        try:
            return found.read_bytes()
        except OSError as error:
            raise ValueError(f"{self.where}: {name}: cannot read {found}: {error.strerror}") from error

    def _find(self, image: Any, name: str, data: DataConfig) -> bytes | Path:
        """An encoded image or video, or the file that holds it."""
        if isinstance(image, dict) and image.get("bytes") is not None:
            image = image["bytes"]
        elif isinstance(image, dict) and "path" in image:
            image = image["path"]
        if isinstance(image, bytes):
            return image
        if not isinstance(image, str):
            raise ValueError(f"{self.where}: {name} is {type(image).__name__}, neither a path nor bytes")
        if _URL.match(image):
            return self._inline(image, name)
        path = Path(data.media_folder or self.folder) / image
        try:
            if path.stat().st_size > data.max_media_bytes:
                raise ValueError(
                    f"{self.where}: {name}: {path} is larger than data.max_media_bytes={data.max_media_bytes}"
                )
            return path
        except OSError as error:
            raise ValueError(f"{self.where}: {name}: cannot read {path}: {error.strerror}") from error

    def _inline(self, url: str, name: str) -> bytes:
        """What a ``data:`` URL holds; nothing is fetched from elsewhere."""
        head, _, data = url.partition(",")
        if not (head.startswith("data:") and head.endswith(";base64")):
            raise ValueError(f"{self.where}: {name}: {url[:60]} is not a file: download it, and name its path")
        try:
            return base64.b64decode(data, validate=True)
        except ValueError as error:
            raise ValueError(f"{self.where}: {name}: {error}") from error

    def _video(self, video: Any, name: str, data: DataConfig) -> bytes:
        fps = data.video_fps
        if isinstance(video, dict) and video.get("video") is not None:
            if video.get("fps") is not None:
                fps = video["fps"]
            video = video["video"]
        if not isinstance(video, list):
            return self._image(video, name, data)
        if not isinstance(fps, int | float) or not fps > 0:
            raise ValueError(f"{self.where}: {name}.fps={fps!r} is not a positive number")
        frames = [self._image(frame, f"{name}[{number}]", data) for number, frame in enumerate(video)]
        if not frames:
            raise ValueError(f"{self.where}: {name} has no frames")
        return pack_frames(frames, float(fps))


@lru_cache(maxsize=64)
def _slip(keys: tuple[str, ...], known: tuple[str, ...]) -> tuple[str, str] | None:
    """A likely slip of the pen: the first of ``keys`` that nearly spells a missing ``known`` key, and that key."""
    missing = [key for key in known if key not in keys]
    for key in keys:
        for near in difflib.get_close_matches(key, missing, n=1, cutoff=0.8):
            return key, near
    return None


def _place(messages: list[Message], media: dict[str, tuple[int, str]], where: str) -> list[Message]:
    """Write every ``<image>`` and ``<video>`` as a part; media without any placeholder of their kind come first in the
    first user message. ``media``: how many there are of each kind, and under which key."""
    placed = [{**message, "content": _parts(message["content"])} for message in messages]
    counts = {kind: sum(p["type"] == kind for m in placed for p in m["content"]) for kind in media}
    first = next((message for message in placed if message["role"] == "user"), None)
    for kind in reversed(media):
        if counts[kind] == 0 and first is not None:
            first["content"] = [{"type": kind}] * media[kind][0] + first["content"]
            counts[kind] = media[kind][0]
    for kind, (number, key) in media.items():
        if counts[kind] != number:
            raise ValueError(f"{where}: {counts[kind]} {kind} placeholders for {number} {kind}s in {key!r}")
    return placed


def _parts(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    if isinstance(content, list):
        for part in content:
            parts += _parts(part["text"]) if part["type"] == "text" else [{"type": part["type"]}]
        return parts
    written = 0
    for place in _PLACES.finditer(content):
        text = content[written : place.start()]
        parts += [{"type": "text", "text": text}] if text else []
        parts.append({"type": PLACEHOLDERS[place.group()]})
        written = place.end()
    text = content[written:]
    return [*parts, {"type": "text", "text": text}] if text else parts


def read_rows(paths: list[str] | list[Path]) -> list[Row]:
    """All rows of ``paths`` in order. Raises ``FileNotFoundError`` or ``ValueError`` naming the file and line."""
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}
    rows: list[Row] = []
    for path in map(Path, paths):
        if path.suffix not in readers:
            raise ValueError(f"{path}: data files end in {', '.join(readers)}")
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such data file")
        rows += readers[path.suffix](path)
    return rows


def _read_jsonl(path: Path) -> list[Row]:
    rows = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:  # also bytes that are not UTF-8
                raise ValueError(f"{path}:{number}: not JSON: {error}") from error
            rows.append(_row(values, f"{path}:{number}", path))
    return rows


def _read_json(path: Path) -> list[Row]:
    """One list of rows, as LLaVA's files are."""
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(values, list):
        raise ValueError(f"{path}: a list of rows was expected, not {type(values).__name__}")
    return [_row(row, f"{path}[{number}]", path) for number, row in enumerate(values)]


def _row(values: Any, where: str, path: Path) -> Row:
    if not isinstance(values, dict):
        raise ValueError(f"{where}: a row is an object, not {type(values).__name__}")
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: a text has half of a character: {error}") from error
    return Row(values, where, path.parent)


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow  # optional: only parquet files need it
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a parquet file: {error}") from error
    return [Row(values, f"{path}:{number}", path.parent) for number, values in enumerate(table.to_pylist(), start=1)]
