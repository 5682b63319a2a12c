"""Chats in the terminal: over a URL and here, with commands, tools and adapters; kept in files."""

import contextlib
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from rich.console import Console

from internjax.adapt.lora import LoraConfig, attach, init_adapter
from internjax.agents.loop import Row
from internjax.agents.tools import make_tools
from internjax.chat.acting import act
from internjax.chat.commands import COMMANDS, Session, obey
from internjax.chat.local import Local
from internjax.chat.log import _block, pick, reply, shown, turns, undone, whole
from internjax.chat.source import End, Params, Remote, Text
from internjax.chat.talk import Talk, load_talk, save_talk
from internjax.chat.terminal import _join, _plain, _remembering, converse
from internjax.errors import Corrupt, Missing, UserError
from internjax.serve.server import serving
from tests.scripted_openai import scripted, tool_call
from tests.test_serve_engine import CONFIG, make_model

QUESTION = [{"role": "user", "content": "hi"}]
CALL = 'Thought: I add.\nAction: calculator\nAction Input: {"expression":"20 + 22"}'


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def remote(model):
    with serving(model, name="tiny", engine=CONFIG) as url, contextlib.closing(Remote(url)) as it:
        yield it


@pytest.fixture(scope="module")
def here(model):
    return Local(model, attach_none, CONFIG)


def collect(events):
    """The text of an answer, and all else that came."""
    events = list(events)
    rest = [e for e in events if not isinstance(e, Text)]
    return "".join(e.text for e in events if isinstance(e, Text)), rest


def said(script) -> list[list[str]]:
    """What each request's messages were."""
    return [[m["content"] for m in request["messages"]] for request in script.requests]


def talk_on_a_pipe(source, lines: str, monkeypatch, capsys, talk=None) -> tuple[str, str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    console = Console(file=sys.stdout, highlight=False)
    converse(source, talk or Talk("scripted"), console, policy="react", history=None)
    return capsys.readouterr()


def attach_none(model, folder):
    raise AssertionError("nobody asked for an adapter")


# Sources ------------------------------------------------------------------------------------


def test_here_and_over_a_url_the_same_answer(here, remote):
    for params in (Params(max_tokens=8), Params(0.9, 0.8, 8, 7)):
        ours, (end,) = collect(here.answer("tiny", QUESTION, params))
        theirs, (other,) = collect(remote.answer("tiny", QUESTION, params))
        assert ours == theirs
        assert (end.prompt_tokens, end.completion_tokens) == (
            other.prompt_tokens,
            other.completion_tokens,
        )
        assert end.reason == other.reason
    assert remote.models() == ["tiny"] and here.models() == ["tiny"]


def test_a_length_that_does_not_fit_is_refused_and_none_takes_what_fits(here, remote):
    with pytest.raises(UserError, match=str(CONFIG.context)):
        collect(here.answer("tiny", QUESTION, Params(max_tokens=CONFIG.context)))
    with pytest.raises(UserError, match=r"refused \(400\)"):
        collect(remote.answer("tiny", QUESTION, Params(max_tokens=4000)))
    _, (end,) = collect(here.answer("tiny", QUESTION, Params(temperature=1.0, seed=1)))
    assert end.prompt_tokens + end.completion_tokens <= CONFIG.context


def test_leaving_an_answer_ends_it_on_the_server(remote):
    events = remote.answer("tiny", QUESTION, Params(temperature=1.0, max_tokens=90, seed=1))
    next(events)
    events.close()
    assert collect(remote.answer("tiny", QUESTION, Params(max_tokens=2)))[1][0].reason == "length"


def test_servers_that_fail_are_told_in_one_line():
    with pytest.raises(Missing, match="does not answer: is the server running"):
        Remote("http://127.0.0.1:9/v1").models()
    with pytest.raises(UserError, match="give it whole"):
        Remote("127.0.0.1:8000")
    with scripted({"content": "one two three", "break": 2}) as script:
        events = Remote(script.url).answer("scripted", QUESTION, Params())
        assert next(events) == Text("one")
        with pytest.raises(UserError, match="does not answer"):
            collect(events)
    with scripted() as script, pytest.raises(UserError, match="the script has ended"):
        collect(Remote(script.url).answer("scripted", QUESTION, Params()))


def test_an_adapter_changes_the_answer_and_can_be_taken_off(model, here, tmp_path):
    def adapt(base, folder):
        if not folder.is_dir():
            raise Missing(f"{folder}: no adapter")
        lora = LoraConfig(rank=2)
        adapter = jax.tree.map(lambda x: x + 0.3, init_adapter(base.cfg, lora, jax.random.key(1)))
        return type(base)(
            base.cfg, attach(base.params, adapter, lora), base.tokenizer, base.template, base.path
        )

    def ask(source, name):
        return collect(source.answer(name, QUESTION, Params(max_tokens=6)))[0]

    source, folder = Local(model, adapt, CONFIG), str(tmp_path)
    assert source.choose(folder) == folder and source.models() == ["tiny", folder]
    adapted = ask(source, folder)
    assert adapted != ask(here, "tiny")
    source.endpoint()  # from here on a server of its own answers, with the same weights
    assert ask(source, folder) == adapted
    with pytest.raises(Missing, match="no adapter"):
        source.choose("/nowhere")
    assert ask(source, folder) == adapted
    assert source.choose("tiny") == "tiny" and source.models() == ["tiny"]
    source.close()


# Tools --------------------------------------------------------------------------------------


def test_tools_are_used_in_the_chat_and_shown():
    talk = Talk("scripted", "Be brief.", params=Params(0.5, seed=3)).answered("hi", "hello")
    with scripted(CALL, "Final Answer: 42") as script:
        messages = talk.asking("What is 20 + 22?")
        tools = make_tools(["calculator"])
        events = act(Remote(script.url), "scripted", messages, talk.params, tools)
        text, rows = collect(events)
    assert text == "42"
    assert [(r.kind, r.name, r.text) for r in rows[:-1]] == [
        ("thought", "", "I add."),
        ("call", "calculator", '{"expression":"20 + 22"}'),
        ("result", "calculator", "42"),
    ]
    assert (rows[-1].reason, rows[-1].prompt_tokens, rows[-1].completion_tokens) == ("stop", 20, 10)
    system, *_, question, answer, asked = said(script)[0]
    assert system.startswith("Be brief.\n\n") and "calculator" in system
    assert (question, answer) == ("Question: hi", "Final Answer: hello")
    assert asked == "Question: What is 20 + 22?"
    assert said(script)[1][-1] == "Observation: 42"
    assert all((r["temperature"], r["seed"]) == (0.5, 3) for r in script.requests)


def test_function_calls_are_put_together_from_a_stream():
    call = tool_call("calculator", {"expression": "6 * 7"})
    with scripted(call, "It is 42.") as script:
        tools = make_tools(["calculator"])
        messages = [*QUESTION, {"role": "assistant", "content": "hello"}, *QUESTION]
        events = act(Remote(script.url), "scripted", messages, Params(), tools, policy="function")
        text, rows = collect(events)
    assert text == "It is 42."
    assert [r.text for r in rows[:-1]] == ['{"expression": "6 * 7"}', "42"]
    assert script.requests[1]["messages"][-1]["content"] == "42"


def test_a_run_with_tools_stops_when_its_reader_leaves():
    with scripted({"content": "Thought: " + "on " * 200, "pause": 0.02}) as script:
        events = act(Remote(script.url), "scripted", QUESTION, Params(), make_tools(["calculator"]))
        assert next(events) == Text("")  # silence: nothing has been decided yet
        events.close()
        deadline = time.monotonic() + 5
        while not script.left and time.monotonic() < deadline:
            time.sleep(0.02)
        assert script.left == 1


def test_out_of_steps_is_no_answer():
    with scripted(*[CALL] * 4) as script:
        events = act(Remote(script.url), "scripted", QUESTION, Params(), make_tools(["calculator"]))
        text, rows = collect(events)
    assert text == "" and rows[-2] == Row("error", "no answer: out of steps")
    assert rows[-1].reason == "steps"


# Commands and lines -------------------------------------------------------------------------


def test_a_chat_on_a_pipe(monkeypatch, capsys):
    lines = 'hi\n/params seed=5 max_tokens=7\nand \\\nmore\n"""\n/not\na command"""\n\n/exit\nnever'
    with scripted("Hello you.", "More.", "Quoted.") as script:
        out, err = talk_on_a_pipe(Remote(script.url), lines, monkeypatch, capsys)
    assert out == "Hello you.\nMore.\nQuoted.\n"
    assert err == "temperature=0.0 top_p=1.0 max_tokens=7 seed=5\n"
    assert said(script) == [
        ["hi"],
        ["hi", "Hello you.", "and \nmore"],
        ["hi", "Hello you.", "and \nmore", "More.", "/not\na command"],
    ]
    assert script.requests[1]["seed"] == 5 and script.requests[1]["max_tokens"] == 7
    assert "seed" not in script.requests[0] and "max_tokens" not in script.requests[0]


def test_a_pipe_ends_at_the_first_error(monkeypatch, capsys):
    with scripted("Hello.") as script, pytest.raises(UserError, match="no command /nosuch"):
        talk_on_a_pipe(Remote(script.url), "hi\n/nosuch\nhi", monkeypatch, capsys)
    assert len(script.requests) == 1


def test_bytes_that_are_no_text_are_refused_and_a_closed_input_ends(monkeypatch, capsys):
    with scripted() as script:
        with pytest.raises(UserError, match="character 2 is half of a surrogate pair"):
            talk_on_a_pipe(Remote(script.url), "ab\udcffcd\n", monkeypatch, capsys)
        monkeypatch.setattr(sys, "stdin", None)
        talk = Talk("scripted")
        converse(Remote(script.url), talk, Console(), policy="react", history=None)
        assert script.requests == []


def test_a_history_that_cannot_be_kept_is_told_and_no_reason_not_to_talk(tmp_path):
    pytest.importorskip("readline")
    said = []
    (tmp_path / "file").touch()
    with _remembering(tmp_path / "file" / "history", said.append):
        pass
    assert said and said[0].startswith("your lines are not kept: ")


def test_retry_asks_the_same_again_and_clear_forgets(monkeypatch, capsys):
    lines = "/system Be kind.\none\ntwo\n/retry\n/clear\nthree\n/system none\nfour"
    with scripted("1", "2", "2b", "3", "4") as script:
        talk_on_a_pipe(Remote(script.url), lines, monkeypatch, capsys)
    kind = "Be kind."
    assert said(script) == [
        [kind, "one"],
        [kind, "one", "1", "two"],
        [kind, "one", "1", "two"],
        [kind, "three"],
        ["three", "3", "four"],
    ]


def test_models_of_a_server_are_its_adapters():
    with scripted() as script:
        lines = []
        session = Session(Remote(script.url), Talk("scripted"), lines.append)
        obey(session, "/adapters scripted-adapter")
        assert session.talk.model == "scripted-adapter"
        assert lines == ["  scripted", "* scripted-adapter"]
        with pytest.raises(UserError, match="serves no 'other'; it has scripted"):
            obey(session, "/adapters other")


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("/params top_p=2", "top_p=2.0 is not legal"),
        ("/params max_tokens=0", "max_tokens=0 is not legal"),
        ("/params heat=2", "heat=2: give KEY=VALUE"),
        ("/params seed=x", "seed takes a number"),
        ("/tools hammer", "no tool 'hammer'"),
        ("/retry", "nothing was asked yet"),
        ("/clear all", "nothing stands behind"),
        ("/save", "give the name of a file"),
    ],
)
def test_commands_refuse_what_they_cannot_do(line, wrong):
    talk = Talk("scripted")
    session = Session(Remote("http://127.0.0.1:9/v1"), talk, print)
    with pytest.raises(UserError, match=re.escape(wrong)):
        obey(session, line)
    assert session.talk == talk and not session.over


def test_help_names_every_command():
    lines = []
    obey(Session(Remote("http://127.0.0.1:9/v1"), Talk("x"), lines.append), "/help")
    assert {line.split()[0] for line in lines} >= set(COMMANDS)


def test_lines_are_joined():
    assert _join(iter(["a\\", "b\\", "c", "d"])) == "a\nb\nc"
    assert _join(iter(['"""a', "b", 'c"""', "d"])) == " a\nb\nc"
    assert _join(iter(['"""a"""'])) == " a"
    assert _join(iter(['"""', "a"])) == " a"  # the input ended
    assert _join(iter(["a\\"])) == "a\n"


def test_an_answer_cannot_steer_the_terminal():
    evil = "a\x1b]0;title\x07\x9b2Jb\n\tc\u200d\U0001f600é"
    assert _plain(evil, Console(force_terminal=True)) == "a]0;title2Jb\n\tc\u200d\U0001f600é"
    assert _plain(evil, Console(file=io.StringIO())) == evil


# Files --------------------------------------------------------------------------------------


def test_a_chat_is_kept_and_read_back(tmp_path):
    talk = Talk("m", "Be brief.").answered("hi", "hello").answered("书", "生")
    path = tmp_path / "chat.json"
    save_talk(talk, path)
    save_talk(talk, path)  # a chat may be written over
    assert load_talk(path) == (talk.system, talk.turns)
    roles = [m["role"] for m in json.loads(path.read_text(encoding="utf-8"))["messages"]]
    assert roles == ["system", *["user", "assistant"] * 2]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "text",
    [
        "no json",
        "[]",
        '{"messages": 1}',
        '{"messages": [{"role": "user", "content": "a"}]}',
        '{"messages": [{"role": "user", "content": 1}, {"role": "assistant", "content": "a"}]}',
    ],
)
def test_what_is_no_chat_is_neither_read_nor_written_over(tmp_path, text):
    path = tmp_path / "notes"
    path.write_text(text)
    with pytest.raises(Corrupt):
        load_talk(path)
    with pytest.raises(UserError, match="is no chat and is kept"):
        save_talk(Talk("m"), path)
    assert path.read_text() == text
    with pytest.raises(Missing):
        load_talk(tmp_path / "absent")
    with pytest.raises(Missing, match="no such folder"):
        save_talk(Talk("m"), tmp_path / "absent" / "chat.json")


# What the page shows ------------------------------------------------------------------------


def test_the_page_shows_steps_and_keeps_turns():
    with scripted(CALL, "Final Answer: 42", "Hello.") as script:
        sources = [Remote(script.url)]
        settings = ("", 0.0, 1.0, "", "")
        *_, (log, cost, _) = reply(
            sources, "react", "Sum?", "0 scripted", [], *settings, ["calculator"]
        )
        assert [m.get("metadata", {}).get("title") for m in log] == [
            None, "thought", "calculator", None,
        ]  # fmt: skip
        assert log[2]["metadata"]["log"] == "result: 42" and "20 + 22" in log[2]["content"]
        assert cost.startswith("`scripted` 20 + 10 tokens")
        assert turns(log) == [log[0], log[-1]]
        *_, (log, cost, _) = reply(sources, "react", "Hi", "0 scripted", log, *settings, [])
        assert said(script)[-1] == ["Sum?", "42", "Hi"]
        assert undone(log) == (log[:4], "Hi")
        *_, (failed, cost, _) = reply(sources, "react", "More", "0 scripted", log, *settings, [])
        assert "the script has ended" in failed[-1]["content"] and cost == ""
        assert turns(failed) == turns(log)


def test_the_page_believes_no_browser():
    sources = [Remote("http://127.0.0.1:9/v1")]
    for chosen in (None, "", "0", "1 m", "-1 m", "x m", "http://other/v1 m"):
        with pytest.raises(UserError, match="choose a model"):
            pick(sources, chosen)
    assert pick(sources, "0 a b") == (sources[0], "a b")
    with pytest.raises(UserError, match="no whole number"):
        whole("1.5")
    assert whole(" ") is None and whole("7") == 7
    assert _block("a\n```\nb") == "````\na\n```\nb\n````"
    log = [{"role": "user", "content": "q"}]
    assert shown(log, Text("")) == log == shown(log, End("stop", 1, 1, 0.1))


# The whole program at a terminal ------------------------------------------------------------


def test_at_a_terminal_ctrl_c_stops_the_answer_and_not_the_program(tmp_path):
    """Through a pseudo-terminal: prompts, an answer cut short by Ctrl-C, the next one whole."""
    history = tmp_path / "typed"
    with scripted({"content": "on " * 500, "pause": 0.02}, "Second.") as script:
        leader, follower = pty.openpty()
        argv = [f"url={script.url}", f"history={history}"]
        program = subprocess.Popen(
            [sys.executable, "-m", "internjax.cli", "chat", *argv],
            stdin=follower, stdout=follower, stderr=follower, start_new_session=True,
            cwd=Path(__file__).parent.parent, env={**os.environ, "TERM": "xterm"},
        )  # fmt: skip
        os.close(follower)
        screen = Screen(leader)
        screen.until("you>")
        screen.type("first\n")
        screen.until("on on on")
        program.send_signal(signal.SIGINT)
        screen.until("stopped.")
        screen.until("you>")
        screen.type("second\n")
        screen.until("Second.")
        screen.until("10 + 5 tokens")
        screen.type("/exit\n")
        assert program.wait(timeout=20) == 0
        os.close(leader)
        assert script.left == 1
    second = said(script)[1]
    assert second[0] == "first" and second[1].startswith("on on on") and second[2] == "second"
    assert history.read_text().splitlines() == ["first", "second", "/exit"]
    assert history.stat().st_mode & 0o777 == 0o600


class Screen:
    """What a program wrote to its terminal."""

    def __init__(self, leader: int):
        self.leader, self.text = leader, ""

    def type(self, text: str) -> None:
        os.write(self.leader, text.encode())

    def until(self, words: str, seconds: float = 30) -> None:
        """Reads up to and with these words."""
        deadline = time.monotonic() + seconds
        while words not in self.text:
            assert time.monotonic() < deadline, f"no {words!r} in {self.text!r}"
            if select.select([self.leader], [], [], 0.1)[0]:
                self.text += os.read(self.leader, 4096).decode(errors="replace")
        self.text = self.text.partition(words)[2]
