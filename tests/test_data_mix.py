"""The split is stable, keeps groups whole, and never leaves a side empty; chats are checked."""

import json
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from internjax.data.chat_samples import read_chats
from internjax.data.mix import draw, split_heldout
from internjax.errors import Corrupt, Missing, UserError

NAMES = [f"doc{i}" for i in range(200)]


@given(
    st.lists(st.integers(0, 8), min_size=2, max_size=40), st.floats(0.01, 0.99), st.integers(0, 9)
)
def test_groups_stay_whole_and_both_sides_have_some(groups: list[int], fraction: float, seed: int):
    if len(set(groups)) < 2:
        return
    names = NAMES[: len(groups)]
    heldout = split_heldout(names, groups, fraction, seed)
    assert 0 < len(heldout) < len(names)
    for group in set(groups):
        assert len({n in heldout for n, g in zip(names, groups, strict=True) if g == group}) == 1
    backwards = split_heldout(names[::-1], groups[::-1], fraction, seed)
    assert backwards == heldout, "the order of documents does not matter"


def test_new_documents_do_not_move_old_ones():
    few = split_heldout(NAMES[:100], range(100), 0.2, 0)
    many = split_heldout(NAMES, range(200), 0.2, 0)
    assert few == many & set(NAMES[:100])
    assert split_heldout(NAMES, range(200), 0.2, 1) != many
    # binomial(200, .2): sd 5.7; 4 sd
    assert 17 <= len(many) <= 63


def test_draws_are_known():
    """A split is part of a result: the same name and seed give the same side for ever."""
    assert draw("doc0", 0) == pytest.approx(0.8383944368664158, abs=1e-12)


def test_what_cannot_be_split_is_said():
    with pytest.raises(UserError, match="cannot be divided"):
        split_heldout(["a", "b"], [0, 0], 0.1, 0)
    with pytest.raises(UserError, match="fraction 1"):
        split_heldout(["a", "b"], [0, 1], 1, 0)
    assert split_heldout(["a"], [0], 0, 0) == set()


# --- chat samples ---------------------------------------------------------------------------------

TURN = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SYSTEM = {"role": "system", "content": "Be kind"}


def read(tmp_path: Path, *rows, name: str = "c.jsonl", **options) -> list:
    (tmp_path / name).write_text("\n".join(json.dumps(row) for row in rows))
    return read_chats(tmp_path / name, **options)


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"instruction": "Hi", "output": "Hello"}, TURN),
        (
            {"instruction": "Hi", "input": "", "output": "Hello", "system": "Be kind"},
            [SYSTEM, *TURN],
        ),
        (
            {"instruction": "Add", "input": "1 2", "output": "3", "history": [["Hi", "Hello"]]},
            [*TURN, {"role": "user", "content": "Add\n1 2"}, {"role": "assistant", "content": "3"}],
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "Hi"},
                    {"from": "gpt", "value": "Hello"},
                ]
            },
            TURN,
        ),
        ({"messages": TURN}, TURN),
        (TURN, TURN),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, TURN[1]]},
            TURN,
        ),
    ],
)
def test_every_form_becomes_messages(tmp_path: Path, row, messages: list):
    assert read(tmp_path, row) == [messages]
    (tmp_path / "c.json").write_text(json.dumps([row, row]))
    assert read_chats(tmp_path / "c.json") == [messages, messages]


def test_sharegpt_tool_turns_become_tool_calls(tmp_path: Path):
    (chat,) = read(
        tmp_path,
        {
            "conversations": [
                {"from": "human", "value": "Weather in Rome?"},
                {"from": "function_call", "value": '{"name": "w", "arguments": {"c": "Rome"}}'},
                {"from": "observation", "value": "sun"},
                {"from": "gpt", "value": "It is sunny."},
            ],
            "tools": "[]",
        },
    )
    assert [m["role"] for m in chat] == ["user", "assistant", "tool", "assistant"]
    assert chat[1]["tool_calls"][0]["function"] == {"name": "w", "arguments": '{"c": "Rome"}'}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "Hi"}, "output: is missing"),
        ({"instruction": "Hi", "output": 7}, "output: is int, not a string"),
        ({"instruction": "Hi", "output": " "}, r"messages\[1\].content: is empty"),
        ({"instruction": "Hi", "outputs": ""}, "outputs: is no field of this form"),
        ({"instruction": "a", "output": "b", "history": [["x"]]}, r"history\[0\]: is not"),
        ({"text": "x"}, "-: has none of the keys messages, conversations, instruction"),
        (7, "-: has none of the keys"),
        ({"conversations": {}}, "conversations: is not a list"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, r"conversations\[0\].from: 'bot'"),
        ({"conversations": [{"from": "human"}]}, r"conversations\[0\].value: is missing"),
        (
            {"conversations": [{"from": "function_call", "value": "w()"}]},
            r"conversations\[0\].value: is not a JSON function call",
        ),
        ({"messages": []}, "messages: is empty"),
        ({"messages": [TURN[1]]}, "messages: do not start with a user message"),
        ({"messages": [TURN[0]]}, "messages: hold no assistant message"),
        ({"messages": [TURN[0], SYSTEM]}, r"messages\[1\].role: system may only be the first"),
        ({"messages": [{"role": "owner", "content": "x"}]}, r"messages\[0\].role: 'owner'"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\].content: is missing"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            r"messages\[0\].content\[0\]: is not a text part",
        ),
    ],
)
def test_faults_name_file_line_and_field(tmp_path: Path, row, message: str):
    with pytest.raises(Corrupt, match=r"^c\.jsonl:2:" + message):
        read(tmp_path, {"messages": TURN}, row)


def test_broken_lines_forms_and_files(tmp_path: Path):
    (tmp_path / "c.jsonl").write_bytes(b'{"messages": [}\n')
    with pytest.raises(Corrupt, match=r"c\.jsonl:1:-: is not JSON"):
        read_chats(tmp_path / "c.jsonl")
    (tmp_path / "c.jsonl").write_bytes(b"\n\xff\n")
    with pytest.raises(Corrupt, match=r"c\.jsonl:2:-: is not UTF-8 at byte 0"):
        read_chats(tmp_path / "c.jsonl")
    (tmp_path / "c.jsonl").write_bytes(b"\n")
    with pytest.raises(Corrupt, match="holds no conversation"):
        read_chats(tmp_path / "c.jsonl")
    with pytest.raises(Missing, match="is not there"):
        read_chats(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="'chatml'"):
        read(tmp_path, {"messages": TURN}, form="chatml")
    with pytest.raises(Corrupt, match="conversations: is missing"):
        read(tmp_path, {"messages": TURN}, form="sharegpt")


@pytest.mark.needs_mirror
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("sft-llamafactory/alpaca_en_demo.json.gz", 999),
        ("sft-llamafactory/alpaca_zh_demo.json.gz", 1000),
        ("sft-llamafactory/glaive_toolcall_en_demo.json.gz", 300),
        ("sft-llamafactory/identity.json", 91),
        ("sft-xtuner/openai_sft.jsonl", 128),
    ],
)
def test_real_chat_files_read_whole(mirror: Path, tmp_path: Path, name: str, count: int):
    import gzip

    data = (mirror / name).read_bytes()
    path = tmp_path / Path(name).name.removesuffix(".gz")
    path.write_bytes(gzip.decompress(data) if name.endswith(".gz") else data)
    assert len(read_chats(path)) == count
