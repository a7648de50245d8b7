"""Rows of JSONL and parquet files, and the prompts they hold.

A row is ``{"prompt": str | [messages], "images": [...], "videos": [...], "answer": ...}`` under the keys that
``DataConfig`` names. An image is a path (relative to the file), encoded bytes, or ``{"bytes": ..., "path": ...}``;
``<image>`` in a text is its place. So is a video, ``<video>``, which may also be a list of images, its frames, or
``{"video": path or list, "fps": ...}``; ``fps`` is the rate of a list, without it ``data.video_fps``. verl's rows are
rows: ``reward_model.ground_truth`` stands in for a missing answer, and ``data_source`` and
``extra_info`` reach the reward. Files are held in memory; large image sets belong in JSONL, which names image files.
"""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megarl.config import DataConfig
from megarl.data.videos import pack_frames
from megarl.types import Message, Prompt

PLACEHOLDERS = {"<image>": "image", "<video>": "video"}
_PLACES = re.compile("|".join(PLACEHOLDERS))


@dataclass(frozen=True)
class Row:
    """One row of a file."""

    values: dict[str, Any]
    where: str  # "file:line", for errors
    folder: Path  # that relative paths of images start from

    def get(self, key: str, option: str) -> Any:
        """``values[key]``; ``option`` is the configuration's name for it, or the key itself. Raises ``ValueError``."""
        if key not in self.values:
            near = difflib.get_close_matches(key, self.values, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f" among {', '.join(self.values)}"
            raise ValueError(f"{self.where}: no key {key!r} ({option}){hint}")
        return self.values[key]

    def prompt(self, id: str, task: str, data: DataConfig) -> Prompt:
        """The row as a prompt; columns that ``data`` does not name go to ``metadata``. Errors name file:line."""
        self._check_keys(data)
        images = [self._image(image, name, data) for image, name in self._list(data.image_key)]
        videos = [self._video(video, name, data) for video, name in self._list(data.video_key)]
        media = {"image": (len(images), data.image_key), "video": (len(videos), data.video_key)}
        messages = _place(self._messages(data.prompt_key), media, self.where)
        taken = (data.prompt_key, data.image_key, data.video_key, data.answer_key, data.target_key)
        return Prompt(
            id=id,
            task=task,
            messages=messages,
            images=images,
            videos=videos,
            answer=self._answer(data.answer_key),
            target=self._target(data.target_key),
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
        for key in self.values:
            for near in difflib.get_close_matches(key, [k for k in options if k not in self.values], n=1, cutoff=0.8):
                raise ValueError(f"{self.where}: unknown key {key!r}; did you mean {near!r} ({options[near]})?")

    def _answer(self, key: str) -> Any:
        if key in self.values:
            return self.values[key]
        reward_model = self.values.get("reward_model")
        return reward_model.get("ground_truth") if isinstance(reward_model, dict) else None

    def _target(self, key: str) -> Any:
        """An answer or a list of answers; a message of the assistant's stands for its content."""
        target = self.values.get(key)
        if not isinstance(target, list) or not any(isinstance(answer, dict) for answer in target):
            return target
        for number, answer in enumerate(target):
            if not isinstance(answer, dict) or not isinstance(answer.get("content"), str):
                raise ValueError(f"{self.where}: {key}[{number}] is not a message with content, as others there are")
        return [answer["content"] for answer in target]

    def _messages(self, key: str) -> list[Message]:
        prompt = self.get(key, "data.prompt_key")
        if isinstance(prompt, str):
            return [{"role": "user", "content": prompt}]
        if not isinstance(prompt, list) or not prompt:
            raise ValueError(f"{self.where}: {key!r} is neither a text nor a list of messages")
        for number, message in enumerate(prompt):
            if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
                raise ValueError(f"{self.where}: {key}[{number}] is not a message with role and content")
            if not isinstance(message["content"], str | list):
                raise ValueError(f"{self.where}: {key}[{number}].content is neither a text nor a list of parts")
            for place, part in enumerate(message["content"] if isinstance(message["content"], list) else []):
                kind = part.get("type") if isinstance(part, dict) else None
                known = kind in PLACEHOLDERS.values() or (kind == "text" and isinstance(part.get("text"), str))
                if not known:
                    raise ValueError(
                        f"{self.where}: {key}[{number}].content[{place}] is neither "
                        '{"type": "text", "text": ...} nor {"type": "image"} nor {"type": "video"}'
                    )
        return prompt

    def _list(self, key: str) -> list[tuple[Any, str]]:
        """The entries under ``key``, none where it is missing, with their names for errors."""
        values = self.values.get(key)
        values = [] if values is None else values if isinstance(values, list) else [values]
        return [(value, f"{key}[{index}]") for index, value in enumerate(values)]

    def _image(self, image: Any, name: str, data: DataConfig) -> bytes:
        if isinstance(image, dict) and image.get("bytes") is not None:
            image = image["bytes"]
        elif isinstance(image, dict) and "path" in image:
            image = image["path"]
        if isinstance(image, bytes):
            return image
        if not isinstance(image, str):
            raise ValueError(f"{self.where}: {name} is {type(image).__name__}, neither a path nor bytes")
        path = self.folder / image
        try:
            if path.stat().st_size > data.max_media_bytes:
                raise ValueError(
                    f"{self.where}: {name}: {path} is larger than data.max_media_bytes={data.max_media_bytes}"
                )
            return path.read_bytes()
        except OSError as error:
            raise ValueError(f"{self.where}: {name}: cannot read {path}: {error.strerror}") from error

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
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    rows: list[Row] = []
    for path in map(Path, paths):
        if path.suffix not in readers:
            raise ValueError(f"{path}: data files end in {' or '.join(readers)}")
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
            if not isinstance(values, dict):
                raise ValueError(f"{path}:{number}: a row is an object, not {type(values).__name__}")
            rows.append(Row(values, f"{path}:{number}", path.parent))
    return rows


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow  # optional: only parquet files need it
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a parquet file: {error}") from error
    return [Row(values, f"{path}:{number}", path.parent) for number, values in enumerate(table.to_pylist(), start=1)]
