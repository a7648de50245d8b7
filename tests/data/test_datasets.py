import base64
import json
from io import BytesIO

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from megarl.config import DataConfig
from megarl.data.datasets import read_rows
from megarl.data.videos import Header, Limits, read_header

IMAGE = {"type": "image"}


def write(path, *rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def prompt_of(path, index=0, **data):
    return read_rows([path])[index].prompt("set/train/0", "set", DataConfig(**data))


def test_jsonl_row_with_images_beside_the_file(tmp_path):
    (tmp_path / "img").mkdir()
    (tmp_path / "img" / "a.png").write_bytes(b"A")
    (tmp_path / "img" / "b.png").write_bytes(b"B")
    row = {
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<image>or<image>?"}],
        "images": ["img/a.png", "img/b.png"],
        "answer": [1, 2],
        "target": "first",
        "level": 3,
    }
    prompt = prompt_of(write(tmp_path / "train.jsonl", row))
    assert (prompt.id, prompt.task, prompt.answer, prompt.target) == ("set/train/0", "set", [1, 2], "first")
    assert prompt.images == [b"A", b"B"]
    assert prompt.messages == [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [IMAGE, {"type": "text", "text": "or"}, IMAGE, {"type": "text", "text": "?"}]},
    ]
    assert prompt.metadata == {"level": 3}


def test_targets_are_answers_or_messages_of_the_assistants(tmp_path):
    messages = [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"prompt": "?", "target": target} for target in ("a", ["a", "b"], messages, messages[:1])]
    path = write(tmp_path / "t.jsonl", *rows, {"prompt": "?", "target": [messages[0], "b"]})
    assert [prompt_of(path, index).targets for index in range(4)] == [["a"], ["a", "b"], ["a", "b"], ["a"]]
    assert prompt_of(path, 3).target == "a"  # as supervised training takes it
    with pytest.raises(ValueError, match=r"t\.jsonl:5: target\[1\] is not a message"):
        prompt_of(path, 4)


def test_without_placeholders_images_come_first(tmp_path):
    (tmp_path / "a.png").write_bytes(b"A")
    prompt = prompt_of(write(tmp_path / "t.jsonl", {"prompt": "What?", "images": "a.png"}))
    assert prompt.messages == [{"role": "user", "content": [IMAGE, {"type": "text", "text": "What?"}]}]
    assert (prompt.images, prompt.answer, prompt.target) == ([b"A"], None, None)


VIDEO = {"type": "video"}


def test_videos_are_files_or_lists_of_frames(tmp_path):
    (tmp_path / "a.gif").write_bytes(b"GIF")
    frame = BytesIO()
    Image.new("RGB", (30, 20)).save(frame, "PNG")
    (tmp_path / "f.png").write_bytes(frame.getvalue())
    frames = ["f.png", "f.png", "f.png"]
    row = {
        "prompt": "<video>or<image><video>or<video>or<video>?",
        "images": ["f.png"],
        "videos": ["a.gif", frames, {"video": frames, "fps": 5}, {"video": "a.gif"}],
    }
    prompt = prompt_of(write(tmp_path / "t.jsonl", row), video_fps=4.0)
    kinds = [part["type"] for part in prompt.messages[0]["content"]]
    assert kinds == ["video", "text", "image", "video", "text", "video", "text", "video", "text"]
    assert (prompt.videos[0], prompt.videos[3], prompt.images) == (b"GIF", b"GIF", [frame.getvalue()])
    limits = Limits(10**6, 10**6)
    assert [read_header(video, limits) for video in prompt.videos[1:3]] == [
        Header(3, 20, 30, 4.0),
        Header(3, 20, 30, 5.0),
    ]
    assert prompt.metadata == {}


def test_without_placeholders_images_and_then_videos_come_first(tmp_path):
    (tmp_path / "a.png").write_bytes(b"A")
    row = {"prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "What?"}]}
    path = write(tmp_path / "t.jsonl", row | {"images": ["a.png"], "clips": ["a.png", "a.png"]})
    messages = prompt_of(path, video_key="clips").messages
    assert messages[1]["content"] == [IMAGE, VIDEO, VIDEO, {"type": "text", "text": "What?"}]


def test_large_files_are_not_read(tmp_path):
    (tmp_path / "a.png").write_bytes(b"A" * 10)
    path = write(tmp_path / "t.jsonl", {"prompt": "?", "images": ["a.png"]})
    with pytest.raises(ValueError, match=r"t.jsonl:1: images\[0\]: .*a.png is larger than data.max_media_bytes=9"):
        prompt_of(path, max_media_bytes=9)


def test_keys_are_named_in_the_configuration(tmp_path):
    path = write(tmp_path / "t.jsonl", {"problem": "1+1?", "solution": "2", "response": "2"})
    prompt = prompt_of(path, prompt_key="problem", answer_key="solution")
    assert (prompt.messages[0]["content"][0]["text"], prompt.answer) == ("1+1?", "2")
    assert prompt.metadata == {"response": "2"}


def test_parquet_in_verls_layout(tmp_path):
    row = {
        "data_source": "hiyouga/geometry3k",
        "prompt": [{"role": "user", "content": "<image>Find x."}],
        "images": [{"bytes": b"PNG", "path": None}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "3"},
        "extra_info": {"split": "train", "index": 0},
    }
    path = tmp_path / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row, row]), path)
    prompt = prompt_of(path, 1)
    assert (prompt.images, prompt.answer) == ([b"PNG"], "3")
    assert prompt.messages == [{"role": "user", "content": [IMAGE, {"type": "text", "text": "Find x."}]}]
    assert prompt.metadata["data_source"] == "hiyouga/geometry3k"
    assert prompt.metadata["extra_info"] == {"split": "train", "index": 0}


def test_parquet_with_parts_drops_the_absent_fields_of_a_struct(tmp_path):
    content = [{"type": "image"}, {"type": "text", "text": "Why?"}]
    path = tmp_path / "t.parquet"
    row = {"prompt": [{"role": "user", "content": content}], "images": [b"X"], "answer": "a"}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    assert prompt_of(path).messages == [{"role": "user", "content": content}]


def test_llavas_rows(tmp_path):
    """A JSON list; a folder of images beside; line breaks around images are the template's."""
    (tmp_path / "img").mkdir()
    (tmp_path / "img" / "a.png").write_bytes(b"A")
    turns = [
        ("system", "S"),
        ("human", "<image>\nWhat?"),
        ("gpt", "A\ndog."),
        ("human", "Why?\n<image>"),
        ("gpt", "So."),
    ]
    row = {"id": "7", "image": ["a.png", "a.png"], "conversations": [{"from": a, "value": b} for a, b in turns]}
    (tmp_path / "t.json").write_text(json.dumps([{"conversations": []}, row]))
    data = {"prompt_key": "conversations", "image_key": "image", "media_folder": str(tmp_path / "img")}
    prompt = prompt_of(tmp_path / "t.json", 1, **data)
    assert [message["role"] for message in prompt.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert prompt.messages[1]["content"] == [IMAGE, {"type": "text", "text": "What?"}]
    assert prompt.messages[2]["content"] == [{"type": "text", "text": "A\ndog."}]
    assert prompt.messages[3]["content"] == [{"type": "text", "text": "Why?"}, IMAGE]
    assert (prompt.images, prompt.where, prompt.metadata) == ([b"A"] * 2, f"{tmp_path}/t.json[1]", {"id": "7"})


def test_messages_may_name_their_images(tmp_path):
    """OpenAI's and Hugging Face's."""
    (tmp_path / "a.png").write_bytes(b"A")
    url = "data:image/png;base64," + base64.b64encode(b"B").decode()
    parts = [{"type": "image", "image": "a.png"}, {"type": "image_url", "image_url": {"url": url}}]
    parts += [{"type": "text", "text": "?"}, {"type": "image", "path": "a.png"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "So."}]
    prompt = prompt_of(write(tmp_path / "t.jsonl", {"messages": messages}), prompt_key="messages")
    assert prompt.messages[0]["content"] == [IMAGE, IMAGE, {"type": "text", "text": "?"}, IMAGE]
    assert prompt.images == [b"A", b"B", b"A"]


def test_a_placeholder_inside_a_part_is_a_place(tmp_path):
    (tmp_path / "x.png").write_bytes(b"X")
    content = [{"type": "text", "text": "left <image> right"}]
    path = write(tmp_path / "t.jsonl", {"prompt": [{"role": "user", "content": content}], "images": ["x.png"]})
    (message,) = prompt_of(path).messages
    assert [part["type"] for part in message["content"]] == ["text", "image", "text"]


def test_files_are_read_in_order_and_blank_lines_skipped(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "1"}\n\n{"prompt": "2"}\n')
    write(tmp_path / "b.jsonl", {"prompt": "3"})
    rows = read_rows([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])
    assert [row.values["prompt"] for row in rows] == ["1", "2", "3"]
    assert [row.where for row in rows] == [f"{tmp_path}/a.jsonl:1", f"{tmp_path}/a.jsonl:3", f"{tmp_path}/b.jsonl:1"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": [{"role": "asistant", "content": "a"}]},
            r"t.jsonl:1: prompt\[0\].role='asistant' is not one of system, developer, user, assistant",
        ),
        ({"prompt": "half \ud800"}, r"t.jsonl:1: a text has half of a character"),
        ({"question": "?"}, r"t.jsonl:1: no key 'prompt' \(data.prompt_key\) among question"),
        ({"promt": "?"}, r"t.jsonl:1: no key 'prompt' \(data.prompt_key\); did you mean 'promt'\?"),
        ({"prompt": "?", "image": "a.png"}, r"unknown key 'image'; did you mean 'images' \(data.image_key\)\?"),
        ({"prompt": "?", "anwser": "1"}, r"unknown key 'anwser'; did you mean 'answer' \(data.answer_key\)\?"),
        ({"prompt": "?", "images": ["no.png"]}, r"t.jsonl:1: images\[0\]: cannot read .*no.png: No such file"),
        ({"prompt": "?", "images": [3]}, r"t.jsonl:1: images\[0\] is int, neither a path nor bytes"),
        ({"prompt": "<image><image>?", "images": ["t.jsonl"]}, "2 image placeholders for 1 images in 'images'"),
        ({"prompt": "<image>?"}, "1 image placeholders for 0 images"),
        ({"messages": []}, r"t.jsonl:1: no key 'prompt', but 'messages': say data.prompt_key=messages"),
        ({"prompt": [{"from": "bot", "value": "?"}]}, r"prompt\[0\].from='bot' is not one of system, human, user, gpt"),
        ({"prompt": [{"from": "gpt", "value": 3}]}, r"prompt\[0\].value is int, no text"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image", "image": "a"}]}], "images": ["b"]},
            "images under 'images' and in the messages too",
        ),
        (
            {"prompt": "?", "images": ["https://a.b/c.png"]},
            r"images\[0\]: https://a.b/c.png is not a file: download it",
        ),
        ({"prompt": "?", "images": ["data:image/png;base64,?"]}, r"images\[0\]: "),
        ({"prompt": []}, "'prompt' is neither a text nor a list of messages"),
        ({"prompt": ["hello"]}, r"prompt\[0\] is not a message with role and content"),
        ({"prompt": [{"role": "user"}]}, r"prompt\[0\] is not a message with role and content"),
        ({"prompt": [{"role": "user", "content": None}]}, r"prompt\[0\].content is neither a text nor a list"),
        ({"prompt": [{"role": "user", "content": ["hello"]}]}, r"prompt\[0\].content\[0\] is neither"),
        ({"prompt": [{"role": "user", "content": [{"text": "?"}]}]}, r"prompt\[0\].content\[0\] is neither"),
        ({"prompt": [{"role": "user", "content": [{"type": "sound"}]}]}, r"prompt\[0\].content\[0\] is neither"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "video"}]}]},
            "1 video placeholders for 0 videos in 'videos'",
        ),
        ({"prompt": "?", "video": "a.mp4"}, r"unknown key 'video'; did you mean 'videos' \(data.video_key\)\?"),
        ({"prompt": "?", "videos": [[]]}, r"videos\[0\] has no frames"),
        ({"prompt": "?", "videos": [["no.png"]]}, r"videos\[0\]\[0\]: cannot read .*no.png: No such file"),
        ({"prompt": "?", "videos": [{"video": ["t.jsonl"], "fps": 0}]}, r"videos\[0\].fps=0 is not a positive number"),
    ],
)
def test_bad_rows_name_file_line_and_key(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        prompt_of(write(tmp_path / "t.jsonl", row))


def test_bad_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.jsonl: no such data file"):
        read_rows([tmp_path / "none.jsonl"])
    with pytest.raises(ValueError, match=r"data.csv: data files end in .jsonl, .json, .parquet"):
        read_rows([tmp_path / "data.csv"])
    (tmp_path / "bad.jsonl").write_text('{"prompt": "1"}\n{"prompt": \n')
    with pytest.raises(ValueError, match=r"bad.jsonl:2: not JSON"):
        read_rows([tmp_path / "bad.jsonl"])
    (tmp_path / "bytes.jsonl").write_bytes(b'{"prompt": "\xff\xfe"}\n')
    with pytest.raises(ValueError, match=r"bytes.jsonl:1: not JSON"):
        read_rows([tmp_path / "bytes.jsonl"])
    (tmp_path / "list.jsonl").write_text("[1]\n")
    with pytest.raises(ValueError, match=r"list.jsonl:1: a row is an object, not list"):
        read_rows([tmp_path / "list.jsonl"])
    (tmp_path / "one.json").write_text("{}")
    with pytest.raises(ValueError, match=r"one.json: a list of rows was expected, not dict"):
        read_rows([tmp_path / "one.json"])
    (tmp_path / "words.json").write_text('["a"]')
    with pytest.raises(ValueError, match=r"words.json\[0\]: a row is an object, not str"):
        read_rows([tmp_path / "words.json"])
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=r"bad.parquet: not a parquet file"):
        read_rows([tmp_path / "bad.parquet"])
