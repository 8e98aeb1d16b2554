"""Broken images, videos, records, tokenizers, templates: one line, no hang, nothing started, nothing fetched."""

from __future__ import annotations

import base64
import gzip
import io
import json
import logging
import os
import struct
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image, ImageOps

from mindspeed_mm.config.data_config import Attributes
from mindspeed_mm.data.encoder import load_tokenizer
from mindspeed_mm.data.images import image_grid, load_pixels, upright_size
from mindspeed_mm.data.record_files import RecordError, RecordFile, read_rows
from mindspeed_mm.data.records import RecordReader
from mindspeed_mm.data.template_check import compare_with_checkpoint
from mindspeed_mm.data.videos import clip_shape
from mindspeed_mm.errors import UserError
from mindspeed_mm.interfaces.conversation import ChatTemplateOptions, Message
from mindspeed_mm.models.qwen3_vl.spec import SPEC
from tests.fuzz.data import SETTINGS, VIDEOS, good_videos, picture
from tests.fuzz.kinds import KINDS, run_kinds
from tests.helpers.tiny_data import make_config, write_checkpoint

OPTIONS = ChatTemplateOptions(name="qwen3_vl_nothink")
SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A dog."}]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("broken") / "checkpoint")


def complaint_about(path: Path, function=load_pixels) -> str:
    with pytest.raises(UserError) as raised:
        function(str(path))
    return str(raised.value)


def read(root: Path, rows: list, **attr) -> list:
    """The records of a data file with these rows, which must all be usable."""
    path = root / "data.json"
    path.write_text(json.dumps(rows))
    reader = RecordReader(make_config(root, dataset=str(path), attr=attr), SPEC, [str(path)], limit=None)
    records = list(reader.read())
    reader.skipped.check()
    return records


# images and videos


def test_postscript_in_a_jpg_starts_no_program(tmp_path, monkeypatch):
    (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n")
    monkeypatch.setattr("subprocess.check_call", lambda *a, **k: pytest.fail("a program was started"))
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: pytest.fail("a program was started"))
    for function in (load_pixels, lambda path: image_grid(path, SETTINGS)):
        assert "not an image in a supported format" in complaint_about(tmp_path / "a.jpg", function)


@pytest.mark.parametrize("function", [load_pixels, lambda path: image_grid(path, SETTINGS)], ids=["load", "measure"])
def test_what_is_no_file_of_a_sane_size(tmp_path, function):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(12 << 30)
    for name in ("fifo", "/dev/zero", "sparse", "loop", "x" * 300, "gone"):
        assert "cannot be used" in complaint_about(tmp_path / name, function)


def test_a_photo_whose_exif_cannot_be_written_again_is_turned(tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.0
    file = io.BytesIO()
    picture().save(file, "JPEG", exif=exif)
    rational = b"\x01\x1a\x00\x05" if b"MM\x00*" in file.getvalue() else b"\x1a\x01\x05\x00"
    assert file.getvalue().count(rational) == 1
    wrong_type = rational.replace(b"\x05", b"\x02")  # ASCII instead of RATIONAL
    (tmp_path / "a.jpg").write_bytes(file.getvalue().replace(rational, wrong_type))
    assert load_pixels(str(tmp_path / "a.jpg")).shape == (80, 48, 3)
    assert upright_size(str(tmp_path / "a.jpg")) == (80, 48)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_as_pillow_turns_it(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture().save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    assert np.array_equal(load_pixels(str(tmp_path / "a.png")), expected)


@pytest.mark.parametrize("error", [SyntaxError("broken"), struct.error("unpack"), IndexError("x"), TypeError("y")])
def test_whatever_pillow_raises_is_one_line(tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    picture().save(tmp_path / "a.png")
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "getexif", fail)  # the pixels are fine
        assert np.array_equal(load_pixels(str(tmp_path / "a.png")), np.asarray(picture()))
    monkeypatch.setattr(Image, "open", fail)
    assert "a.png cannot be used" in complaint_about(tmp_path / "a.png")


def test_frames_with_quarter_turns_are_a_video(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 8
    picture().save(tmp_path / "a.jpg", exif=exif)
    shape = clip_shape([str(tmp_path / "a.jpg")] * 4, VIDEOS)
    assert (shape.height, shape.width) == (80, 48)


def test_playlists_and_lists_of_files_are_no_videos(tmp_path):
    av = pytest.importorskip("av")
    secret = tmp_path / "secret.mp4"
    with av.open(str(secret), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 80, 48, "yuv420p"
        for _ in range(12):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(picture()), format="rgb24")))
        container.mux(stream.encode(None))
    assert clip_shape(str(secret), VIDEOS).frames == 12
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{secret}\n#EXT-X-ENDLIST\n"
    (tmp_path / "a.mp4").write_text(playlist)
    (tmp_path / "b.m3u8").write_text(playlist)
    (tmp_path / "c.mp4").write_text(f"ffconcat version 1.0\nfile {secret.name}\n")
    os.mkfifo(tmp_path / "d.mp4")
    for name in ("a.mp4", "b.m3u8", "c.mp4", "d.mp4", f"concat:{secret}", "http://127.0.0.1:9/a.mp4"):
        path = name if ":" in name else str(tmp_path / name)
        assert "cannot be used" in complaint_about(path, lambda path: clip_shape(path, VIDEOS))


@pytest.mark.parametrize("read", [load_pixels, upright_size])
def test_an_image_of_fractions_is_refused(tmp_path, read):
    Image.fromarray(np.random.default_rng(0).random((40, 40), np.float32)).save(tmp_path / "f.tiff")
    assert "its pixels are fractions" in complaint_about(tmp_path / "f.tiff", read)


def test_what_conversion_to_rgb_loses_is_said_once(tmp_path, caplog):
    from mindspeed_mm.data.images import _warned

    _warned.clear()
    Image.fromarray(np.full((40, 40), 60_000, np.uint16)).save(tmp_path / "grey.png")
    Image.new("RGBA", (40, 40), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    picture().save(tmp_path / "two.gif", save_all=True, append_images=[picture().rotate(90)])
    with caplog.at_level(logging.WARNING, "mindspeed_mm"):
        for _ in range(2):
            for name in ("grey.png", "clear.png", "two.gif"):
                load_pixels(str(tmp_path / name))
    words = ("more than 8 bits", "transparent", "several frames")
    assert [[word in one for word in words] for one in caplog.messages] == np.eye(3, dtype=bool).tolist()
    remedy = 'set preprocess_parameters.transparent_background to "white" (logged once per process)'
    assert remedy in caplog.messages[1]
    _warned.clear()
    with caplog.at_level(logging.WARNING, "mindspeed_mm"):
        load_pixels(str(tmp_path / "clear.png"), background="white")
    assert len(caplog.messages) == 3


def test_a_video_that_is_cut_off_is_said_once(tmp_path, caplog):
    """Of a container without a number of frames; one that has it is refused when frames are missing."""
    from mindspeed_mm.data.images import _warned

    av = pytest.importorskip("av")
    content, rng = good_videos(tmp_path), np.random.default_rng(0)
    with av.open(str(tmp_path / "long.mkv"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for _ in range(40):
            frame = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    whole = (tmp_path / "long.mkv").read_bytes()
    _warned.clear()
    with caplog.at_level(logging.WARNING, "mindspeed_mm"):
        for suffix in content:
            clip_shape(str(tmp_path / f"good.{suffix}"), VIDEOS)
        assert not caplog.messages
        (tmp_path / "cut.mkv").write_bytes(whole[: len(whole) // 2])
        for _ in range(2):
            assert 10 < clip_shape(str(tmp_path / "cut.mkv"), VIDEOS).frames < 25
    (message,) = caplog.messages
    assert f"video {tmp_path}/cut.mkv ends after" in message and "of 4.0 seconds" in message


# records


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"reasoning": "hm"}, "key 'reasoning' of message 1 is hm"), ({"objects": {"ref": ["a"]}}, "key 'objects' of"),
        ({"weight": 0.3}, "'weight' of message 1 is 0.3; it must"), ({"tool_calls": [{"name": "f"}]}, "a tool call"),
    ],
)
def test_keys_of_a_message_that_change_the_target_are_refused(tmp_path, change, complaint):
    row = {"messages": [TURNS[0], {**TURNS[1], **change}]}
    with pytest.raises(UserError, match=complaint):
        read(tmp_path, [row])
    harmless = {"loss": True, "weight": 1, "tool_calls": None, "reasoning_content": ""}
    assert len(read(tmp_path, [{"messages": [TURNS[0], {**TURNS[1], **harmless}]}])) == 1


@pytest.mark.parametrize("column", ["system", "tools", "objects"])
def test_columns_that_change_the_prompt_are_refused_or_named(tmp_path, column):
    with pytest.raises(UserError, match=f"its column '{column}'"):
        read(tmp_path, [{"messages": TURNS, column: "Be brief."}], user_tag="user", videos="films")
    if column == "system":
        assert read(tmp_path, [{"messages": TURNS, column: "Be brief."}], system="system")[0].messages[0].role == column


def test_the_recipes_attr_is_as_none(tmp_path):
    """Fields at their defaults, which the recipe's data file spells out: the records decide."""
    spelled_out = dict(Attributes()) | {"formatting": None}
    row = {"system": "Be brief.", "messages": TURNS}
    assert read(tmp_path, [row], **spelled_out) == read(tmp_path, [{"messages": [SYSTEM, *TURNS]}], **spelled_out)
    both = {"messages": TURNS, "conversations": TURNS[:1], "images": []}  # the column that it names is read
    assert len(read(tmp_path, [both], **spelled_out)) == 1


@pytest.mark.parametrize("value", [False, True, 0, "no"])
def test_a_rejected_answer_is_refused(tmp_path, value):
    rows = [{"messages": TURNS, "label": True}, {"messages": TURNS, "label": value}]
    if value is not False:
        assert len(read(tmp_path, rows)) == 2
        return
    with pytest.raises(UserError, match="record 1: its column 'label' is false, .* remove the records with false, or"):
        read(tmp_path, rows)


def test_columns_that_are_not_read_are_counted(tmp_path):
    rows = [{"messages": TURNS, "source": "web", "id": place} for place in range(3)]
    rows[0] = {"messages": [{**TURNS[0], "name": "Ann"}, TURNS[1]], "id": None}
    (tmp_path / "data.json").write_text(json.dumps(rows))
    config = make_config(tmp_path, dataset=str(tmp_path / "data.json"))
    reader = RecordReader(config, SPEC, [str(tmp_path / "data.json")], limit=None)
    assert len(list(reader.read())) == 3
    assert dict(reader.unread) == {"source": 2, "id": 2, "messages.name": 1}
    assert "source (2)" in reader.unread_note


@pytest.mark.parametrize(
    ("image", "complaint"),
    [
        ("http://host/a.png", "nothing is fetched unless basic_parameters.download_images"),
        ("x" * 5000, r"\(5000 characters\)"),
        ("a\0b", "does not exist"), ("\ud800.png", "does not exist"), ("", "the path of an image is empty"),
    ],
)
def test_paths_of_images(tmp_path, image, complaint):
    row = {"messages": [{"role": "user", "content": "<image>"}, TURNS[1]], "images": [image]}
    with pytest.raises(UserError, match=complaint) as raised:
        read(tmp_path, [row])
    assert len(str(raised.value)) < 1000


def test_directories_that_cannot_be_listed_and_loops_beside_the_images(tmp_path):
    picture().save(tmp_path / "a.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    question = {"role": "user", "content": "<image>"}
    assert read(tmp_path, [{"messages": [question, TURNS[1]], "images": ["a.png"]}])
    with pytest.raises(UserError, match="does not exist"):
        read(tmp_path, [{"messages": [question, TURNS[1]], "images": ["loop.png/b.png"]}])


def test_file_and_data_uris_are_images(tmp_path):
    picture().save(tmp_path / "a b.png")
    content = base64.b64encode((tmp_path / "a b.png").read_bytes()).decode()
    question = {"role": "user", "content": "<image>"}
    path = f"{tmp_path}/a%20b.png"
    for image in (f"file://{path}", f"file://localhost{path}", f"data:image/png;base64,{content}"):
        (record,) = read(tmp_path, [{"messages": [question, TURNS[1]], "images": [image]}])
        assert np.array_equal(load_pixels(record.images[0]), np.asarray(picture()))
    with pytest.raises(UserError) as raised:
        load_pixels("data:image/png;base64," + "A" * 100_000)
    assert len(str(raised.value)) < 600


TEXTS = {
    '[{"a": 1}]'.encode("utf-16"): "is UTF-16.* save it as UTF-8", '{"a": 1}'.encode("utf-16-be"): "no UTF-8 text",
    gzip.compress(b'{"a": 1}'): "is compressed.*gunzip", b"PAR1 and more": "is a Parquet file.*ends in .parquet",
}
TWICE = {
    b'{"a": 1, "a": 1}': "a", b'{"a": 1, "b": [{"c": "\\"", "c" : 2}]}': "c", b'{"\\u0061": "x", "a": "y"}': "a",
    b'{"a\\\\": "a\\\\", "b": 1, "a\\\\": "\\u0022"}': "a", b'{"a": "\\ud83d", "a": 1}': "a", b'{"": 1, "": 2}': "",
}
ONCE = (
    b'{"a": "a", "b": {"a": "\\"a\\":", "c\\u005c": "\\\\"}}', b'{"a":"\\u0022\\\\\\"","b\\"": [], "" : "\\\\\\\\"}',
    b'{"a": 12345678901234567890123, "b": 1e999, "c": "\\ud83d\\ude00"}',
)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_key_that_occurs_twice_is_refused(tmp_path, streamed):
    """Where a parser would keep the last value. ``ONCE``: no key does, whatever quotes the texts have."""
    path = tmp_path / "data.jsonl"

    def row(content: bytes) -> dict:
        path.write_bytes(b'{"first": 1}\n' + content)
        return RecordFile(str(path))[1] if streamed else read_rows(path)[1]

    for content, key in TWICE.items():
        with pytest.raises(UserError, match=rf"data.jsonl, record 1.*: {key}.* occurs twice in one object; remove one"):
            row(content)
    for content in ONCE:
        assert row(content) == json.loads(content)
    path = path.with_suffix(".json")
    path.write_bytes(b'[{"a": 1}, {"a": 1, "a": 2}, {"a": 3}]')
    rows = RecordFile(str(path)) if streamed else read_rows(path)
    assert [rows[0], rows[2]] == [{"a": 1}, {"a": 3}]
    with pytest.raises(RecordError, match="data.json, record 1 .*: a occurs twice"):
        rows[1]
    with pytest.raises(UserError, match="message 0 is not a tool call: name occurs twice"):
        call = {"role": "call", "content": '{"name": "f", "arguments": {}, "name": "g"}'}
        read(tmp_path, [{"messages": [call]}], function_tag="call")
    with pytest.raises(UserError, match="is not valid JSON: name occurs twice"):
        read(tmp_path, [{"messages": TURNS, "tools": '[{"name": "f", "name": "g"}]'}], tools="tools")


@pytest.mark.parametrize("streamed", [False, True])
def test_a_column_that_occurs_twice_is_refused(tmp_path, streamed):
    path = tmp_path / "data.parquet"
    fields = [pyarrow.array(["x"]), pyarrow.array(["y"])]
    turns = pyarrow.StructArray.from_arrays(fields, names=["content", "content"])
    for table in (
        pyarrow.Table.from_arrays(fields, names=["content", "content"]),
        pyarrow.Table.from_arrays([pyarrow.ListArray.from_arrays([0, 1], turns)], names=["messages"]),
    ):
        pyarrow.parquet.write_table(table, path)
        with pytest.raises(UserError, match="data.parquet: content occurs twice"):
            RecordFile(str(path)) if streamed else read_rows(path)


def test_empty_answers_are_counted(tmp_path):
    turns = [*TURNS, TURNS[0], {"role": "assistant", "content": " \n"}, TURNS[0], {"role": "assistant", "content": ""}]
    (tmp_path / "data.json").write_text(json.dumps([{"messages": TURNS}, {"messages": turns}, {"messages": turns[:4]}]))
    config = make_config(tmp_path, dataset=str(tmp_path / "data.json"))
    reader = RecordReader(config, SPEC, [str(tmp_path / "data.json")], limit=None)
    assert len(list(reader.read())) == 3
    assert reader.notes["answer"] == (
        "3 answers of 2 records without text, which teach at most the end of a turn; "
        f"the first: {tmp_path}/data.json, record 1"
    )


@pytest.mark.parametrize(("call", "complaint"), [
    ({"name": "f", "arguments": {}, "thought": "x"}, "remove thought"),
    ({"name": "f", "arguments": "{}", "id": 1}, None),
])
def test_keys_of_a_tool_call(tmp_path, call, complaint):
    rows = [{"messages": [TURNS[0], {"role": "call", "content": json.dumps(call)}]}]
    if complaint is None:
        assert read(tmp_path, rows, function_tag="call")
        return
    with pytest.raises(UserError, match=f"message 1 is not a tool call: .*{complaint}"):
        read(tmp_path, rows, function_tag="call")


@pytest.mark.parametrize("streamed", [False, True])
def test_texts_of_data_files(tmp_path, streamed):
    def rows(name: str, content: bytes) -> list:
        (tmp_path / name).write_bytes(content)
        file = RecordFile(str(tmp_path / name)) if streamed else read_rows(tmp_path / name)
        return [file[place] for place in range(len(file))]

    assert rows("bom.json", b'\xef\xbb\xbf[{"a": 1}]') == rows("bom.jsonl", b'\xef\xbb\xbf{"a": 1}\n') == [{"a": 1}]
    assert rows("emoji.json", b'[{"a": "\\ud83d"}]') == [{"a": "\ud83d"}]
    with pytest.raises(UserError, match="ends in .jsonl" if not streamed else "holds an object"):
        rows("lines.json", b'{"a": 1}\n{"a": 2}\n')
    for content, complaint in TEXTS.items():
        for name in ("text.json", "text.jsonl"):
            with pytest.raises(UserError, match=complaint) as raised:
                rows(name, content)
            assert str(tmp_path / name) in str(raised.value) and "\n" not in str(raised.value)
    with pytest.raises(UserError, match="carriage returns alone"):
        rows("mac.jsonl", b'{"a": 1}\r{"a": 2}\r')
    assert rows("dos.jsonl", b'{"a": 1}\r\n{"a": 2}\r\n') == [{"a": 1}, {"a": 2}]
    with pytest.raises(UserError):  # not dropped in silence
        rows("number.json", b'[{"a": 1}, 3, {"a": 2}]') if streamed else rows("number.json", b'3')
    with pytest.raises(UserError):
        rows("deep.jsonl", b'{"a": ' + b"[" * 100_000)


def test_half_a_character_refuses_its_record_only(tmp_path):
    rows = [{"messages": TURNS}, {"messages": [TURNS[0], {"role": "assistant", "content": "\ud83d"}]}]
    with pytest.raises(UserError, match="record 1: message 1 holds half of a character"):
        read(tmp_path, rows)


def test_a_missing_role_names_its_field(tmp_path):
    with pytest.raises(UserError, match="set attr.system_tag to 'system'"):
        read(tmp_path, [{"messages": [SYSTEM, *TURNS]}], videos="videos")


def test_tools_as_objects_in_parquet_are_refused(tmp_path):
    tools = [[{"name": "f", "only_f": 1}], [{"name": "g"}]]
    table = pyarrow.table({"messages": [TURNS, TURNS], "tools": tools})
    pyarrow.parquet.write_table(table, tmp_path / "data.parquet")
    config = make_config(tmp_path, dataset=str(tmp_path / "data.parquet"), attr={"tools": "tools"})
    with pytest.raises(UserError, match="store the tools of a record as one JSON text"):
        list(RecordReader(config, SPEC, [str(tmp_path / "data.parquet")], limit=None).read())


# tokenizer and templates


def test_a_directory_without_a_vocabulary_is_refused(tmp_path):
    write_checkpoint(tmp_path / "a")
    (tmp_path / "a/tokenizer.json").unlink()
    with pytest.raises(UserError, match="has neither tokenizer.json nor vocab.json"):
        load_tokenizer(tmp_path / "a")


def test_a_prefix_for_which_tokenizers_ends_the_process_is_refused(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "a")
    path = tmp_path / "a/tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["continuing_subword_prefix"] = ""  # as in Qwen's
    path.write_text(json.dumps(content))
    load_tokenizer(tmp_path / "a")
    content["model"]["continuing_subword_prefix"] = "x"
    path.write_text(json.dumps(content))
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(UserError, match='tokenizer.json: model.continuing_subword_prefix is "x"; it must be empty'):
        load_tokenizer(tmp_path / "a")


def test_a_panic_of_tokenizers_is_one_line(tmp_path, monkeypatch):
    """Its exception is not an Exception, and neither is Ctrl-C, which must pass."""
    write_checkpoint(tmp_path / "a")
    panic = type("PanicException", (BaseException,), {})("range end index 11 out of range")
    for error, expected in ((panic, UserError), (KeyboardInterrupt(), KeyboardInterrupt)):
        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", fail)
        with pytest.raises(expected) as raised:
            load_tokenizer(tmp_path / "a")
        assert expected is KeyboardInterrupt or "no tokenizer can be loaded from" in str(raised.value)


def test_special_tokens_that_are_no_longer_special(tmp_path):
    write_checkpoint(tmp_path / "a")
    content = json.loads((tmp_path / "a/tokenizer.json").read_text())
    (token,) = (one for one in content["added_tokens"] if one["content"] == "<|im_start|>")
    content["added_tokens"].remove(token)
    content["model"]["vocab"]["<|im_start|>"] = token["id"]
    (tmp_path / "a/tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "a/tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match="splits <|im_start|> into letters"):
        SPEC.build_chat_template(load_tokenizer(tmp_path / "a"), OPTIONS)


def test_only_structural_tokens_of_a_message_become_letters(checkpoint):
    tokenizer = load_tokenizer(checkpoint)
    template = SPEC.build_chat_template(tokenizer, OPTIONS)
    plain, ended = (
        template.encode(
            [Message("user", "?"), Message("assistant", f"<|box_start|>1<|box_end|>{end}")], [], max_length=99
        )
        for end in ("", "<|im_end|>")
    )
    box = tokenizer.convert_tokens_to_ids("<|box_start|>")
    assert list(plain.input_ids).count(box) == list(ended.input_ids).count(box) == 1
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert list(ended.input_ids).count(end) == list(plain.input_ids).count(end)
    assert tokenizer.decode(ended.input_ids).count("<|im_end|>") == 1 + list(ended.input_ids).count(end)


def test_a_thousand_turns_and_megabytes_of_text_are_shortened_in_linear_time(checkpoint):
    template = SPEC.build_chat_template(load_tokenizer(checkpoint), OPTIONS)
    turns = [Message("user", "What is it? " * 5), Message("assistant", "It is a dog. " * 5)] * 2000
    started = time.monotonic()
    encoded = template.encode(turns, [], max_length=1024)
    assert encoded is not None and len(encoded.input_ids) <= 1024
    one_more = template.encode(turns[: len(turns) - encoded.dropped_messages + 2], [], max_length=1 << 20)
    assert len(one_more.input_ids) > 1024
    assert template.encode([Message("user", "x" * (30 << 20)), Message("assistant", "y")], [], max_length=1024) is None
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "template",
    ["{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "{{ 'x' * 100000000 }}"],
)
def test_a_published_template_that_does_not_end_is_given_up(tmp_path, monkeypatch, template):
    monkeypatch.setattr("mindspeed_mm.data.chat_rendering._SECONDS", 1)
    write_checkpoint(tmp_path / "a")
    (tmp_path / "a/chat_template.jinja").write_text(template)
    warning = compare_with_checkpoint(load_tokenizer(tmp_path / "a"), tmp_path / "a", SPEC, OPTIONS)
    assert "is not compared" in warning and ("does not end" in warning or "more than" in warning)


def test_token_ids_beyond_the_embeddings_are_found_before_training(tmp_path, checkpoint):
    from mindspeed_mm.data import build_datasets

    (tmp_path / "data.json").write_text(json.dumps([{"messages": TURNS}] * 4))
    for basic in ({}, {"preprocess_on_fly": True}):
        config = make_config(tmp_path, dataset=str(tmp_path / "data.json"), basic=basic,
                             preprocess={"model_name_or_path": str(checkpoint)})
        with pytest.raises(UserError, match=r"the tokenizer gives token \d+, and the model has 300 embeddings"):
            build_datasets(config, spec=SPEC, media=SETTINGS, seq_length=64, seed=0, vocab_size=300)[0][0]
        train, _ = build_datasets(config, spec=SPEC, media=SETTINGS, seq_length=64, seed=0, vocab_size=512)
        assert len(train) == 4 and train[0].loss_mask.any()


# everything at random


def test_random_damages(tmp_path):
    for kind, outcomes in run_kinds(tmp_path, KINDS, 240, seed=7):
        assert not outcomes.faults, (kind, outcomes.faults[:3])
        assert outcomes.counts["refused"] > sum(outcomes.counts.values()) / 8, (kind, str(outcomes))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_random_damages(tmp_path, kind):
    seed = int(os.environ.get("FUZZ_SEED", "0"))
    ((_, outcomes),) = run_kinds(tmp_path, [kind], int(os.environ.get("FUZZ_COUNT", "5000")), seed)
    assert not outcomes.faults, (kind, len(outcomes.faults), outcomes.faults[:3])
