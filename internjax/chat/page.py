"""The web page: a chat with any OpenAI-compatible server, and two models side by side.

Built with Gradio (extra `ui`). What an answer looks like is `log`'s; what has been said lives in
the visitor's own session. Nothing is loaded from anywhere but this server. No `gr.HTML`: it
evaluates text as JavaScript, which `page_server.POLICY` forbids.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import gradio as gr

from internjax.agents.tools import TOOLS
from internjax.chat.log import Log, reply, undone
from internjax.chat.source import Params, Source
from internjax.errors import UserError

CSS = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
THEME = gr.themes.Base(
    primary_hue="blue",
    neutral_hue="slate",
    radius_size="lg",
    font=["system-ui", "Segoe UI", "Noto Sans", "sans-serif"],
    font_mono=["ui-monospace", "DejaVu Sans Mono", "monospace"],
)


@dataclass(frozen=True)
class Column:
    """One conversation on the page: who answers, what is shown, what was said."""

    model: gr.Dropdown
    chat: gr.Chatbot
    cost: gr.Markdown
    log: gr.State


@dataclass(frozen=True)
class Settings:
    """The controls that every answer obeys, in the order in which `reply` takes them."""

    system: gr.Textbox
    temperature: gr.Slider
    top_p: gr.Slider
    max_tokens: gr.Textbox
    seed: gr.Textbox
    tools: gr.CheckboxGroup

    def inputs(self) -> list:
        return list(vars(self).values())


def make_page(sources: list[Source], *, policy: str = "react") -> gr.Blocks:
    """Builds the page over one server or several.

    Args:
      policy: how agents use tools, a key of `agents.policies.POLICIES`.
    """
    addresses = "\n".join(f"`{source.endpoint()}`  " for source in sources)
    with gr.Blocks(title="InternJAX", analytics_enabled=False, fill_width=True) as page:
        with gr.Sidebar(width=290):
            gr.Markdown(f"# **Intern**JAX\n{addresses}", elem_classes="brand")
            settings = _settings()
        with gr.Tabs(elem_classes="pages"):
            with gr.Tab("Chat"), gr.Column(elem_classes="one"):
                one = [_column("one")]
                _conversation(sources, settings, one, policy)
            with gr.Tab("Side by side"):
                with gr.Row(equal_height=True):
                    two = [_column("left"), _column("right")]
                _conversation(sources, settings, two, policy)
        menus = [column.model for column in (*one, *two)]
        page.load(lambda: _menus(sources, len(menus)), None, menus, **_QUIET)
    return page


_QUIET = {"show_progress": "hidden", "api_visibility": "private"}


def _settings() -> Settings:
    drawn = Params()
    return Settings(
        gr.Textbox(label="System text", placeholder="the model's own", lines=2, max_lines=8),
        gr.Slider(0, 2, drawn.temperature, step=0.05, label="Temperature", info="0: likeliest"),
        gr.Slider(0.05, 1, drawn.top_p, step=0.05, label="Top-p"),
        gr.Textbox(label="Max tokens", placeholder="what fits", max_lines=1),
        gr.Textbox(label="Seed", placeholder="drawn anew", max_lines=1),
        gr.CheckboxGroup(list(TOOLS), label="Tools", info="the model may call them"),
    )


def _column(name: str) -> Column:
    with gr.Column(elem_classes="talk", min_width=280):
        model = gr.Dropdown(
            [], show_label=False, container=False, elem_id=f"model-{name}", elem_classes="model"
        )
        chat = gr.Chatbot(
            show_label=False,
            elem_id=f"chat-{name}",
            elem_classes="chat",
            buttons=["copy"],
            layout="bubble",
            feedback_options=None,
            placeholder="Ask something below.",
            height="100%",
        )
        cost = gr.Markdown("", elem_id=f"cost-{name}", elem_classes="cost")
    return Column(model, chat, cost, gr.State([]))


def _conversation(
    sources: list[Source], settings: Settings, columns: list[Column], policy: str
) -> None:
    """One box to ask in, and what happens when something is asked in it: every column answers."""
    box = gr.Textbox(
        placeholder="Ask something…",
        show_label=False,
        container=False,
        lines=1,
        max_lines=8,
        submit_btn=True,
        elem_classes="ask",
    )
    question = gr.State("")
    busy = [gr.State(False) for _ in columns]

    def replying(asked: str, *values) -> Iterator[tuple]:
        if not asked:  # nothing was written, or an answer still grows
            yield (gr.skip(),) * 4
            return
        picture = ()
        for picture in reply(sources, policy, asked, *values):
            yield *picture, gr.skip()  # a picture may come late: it must not undo a stop
        yield *picture, False

    def begin(text: str, *still: bool) -> list:
        if any(still) or not text.strip():
            return [gr.skip(), "", *still]
        return [_box(busy=True, value=""), text.strip(), *[True] * len(columns)]

    def again(log: Log) -> tuple:
        before, asked = undone(log)
        return before, asked, bool(asked), _box(busy=bool(asked))

    def rest(*still: bool) -> gr.Textbox:
        return _box(busy=any(still))

    begun = box.submit(begin, [box, *busy], [box, question, *busy], **_QUIET)
    running = []
    for column, at_work in zip(columns, busy, strict=True):
        column.chat.clear(lambda: ([], ""), None, [column.log, column.cost], **_QUIET)
        retried = [column.log, question, at_work, box]
        for before in (begun, column.chat.retry(again, column.log, retried, **_QUIET)):
            told = before.then(
                # Gradio looks for a generator function; behind checked types it sees none.
                lambda *values: (yield from replying(*values)),
                [question, column.model, column.log, *settings.inputs()],
                [column.chat, column.cost, column.log, at_work],
                concurrency_limit=None,
                **_QUIET,
            )
            told.then(rest, busy, box, **_QUIET)
            running.append(told)
    idle = lambda: ["", *[False] * len(columns)]  # noqa: E731
    halted = box.stop(idle, None, [question, *busy], cancels=running, **_QUIET)
    halted.then(rest, busy, box, **_QUIET)


def _box(*, busy: bool, **more: str) -> gr.Textbox:
    """What the box shows: the button that sends, or the one that stops."""
    return gr.Textbox(submit_btn=not busy, stop_btn=busy, **more)


def _menus(sources: list[Source], count: int) -> list[gr.Dropdown]:
    """The models of all servers, asked for when the page opens; the second column takes another."""
    choices = []
    for index, source in enumerate(sources):
        where = f" · {urlsplit(source.endpoint()).netloc}" if len(sources) > 1 else ""
        try:
            choices += [(f"{name}{where}", f"{index} {name}") for name in source.models()]
        except UserError as error:
            gr.Warning(str(error), duration=None)
    first = choices[0][1] if choices else None
    values = [first] * (count - 1) + [choices[-1][1] if choices else None]
    return [gr.Dropdown(choices, value=value) for value in values]
