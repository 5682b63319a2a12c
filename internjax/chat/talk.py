"""A chat as data: who is asked how, what has been said; kept in a file and read back."""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from internjax.chat.source import Message, Params
from internjax.errors import Corrupt, Missing, UserError


@dataclass(frozen=True)
class Talk:
    """A chat between two questions.

    Fields:
      model: the name under which it is asked.
      system: system text; "" leaves the model's own.
      turns: questions and answers in turn, an answer last.
      tools: names of the tools that answers may use.
    """

    model: str
    system: str = ""
    turns: tuple[Message, ...] = ()
    params: Params = field(default_factory=Params)
    tools: tuple[str, ...] = ()

    def asking(self, question: str) -> list[Message]:
        """The messages that ask a question after what was said."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.turns, {"role": "user", "content": question}]

    def answered(self, question: str, answer: str) -> "Talk":
        """The chat with one more question and its answer."""
        said = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
        return replace(self, turns=(*self.turns, *said))

    def undone(self) -> tuple["Talk", str]:
        """The chat without its last question, and that question.

        Raises:
          UserError: nothing was said.
        """
        if not self.turns:
            raise UserError("nothing was asked yet: there is no answer to try again.")
        return replace(self, turns=self.turns[:-2]), self.turns[-2]["content"]


def save_talk(talk: Talk, path: Path) -> None:
    """Writes a chat as JSON, whole or not at all; only a chat is written over.

    Raises:
      UserError: something else has that name, or the folder is not there.
    """
    if not path.parent.is_dir():
        raise Missing(f"{path.parent}: no such folder.")
    if path.exists():
        try:
            load_talk(path)
        except UserError as error:
            raise UserError(f"{path} is no chat and is kept: choose another name.") from error
    kept = {key: value for key, value in asdict(talk).items() if key not in ("turns", "system")}
    part = path.with_name(path.name + ".part")
    written = json.dumps({**kept, "messages": talk.asking("")[:-1]}, indent=1, ensure_ascii=False)
    part.write_text(written + "\n", encoding="utf-8")
    part.replace(path)


def load_talk(path: Path) -> tuple[str, tuple[Message, ...]]:
    """Reads system text and turns of a file that `save_talk` wrote, or of any {"messages": []}.

    Raises:
      Missing: no such file.
      Corrupt: it holds no chat of questions and answers in turn.
    """
    try:
        messages = json.loads(path.read_text(encoding="utf-8"))["messages"]
        said = [(m["role"], m["content"]) for m in messages]
    except (FileNotFoundError, IsADirectoryError) as error:
        raise Missing(f"{path}: no such file.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise Corrupt(f'{path} holds no chat: it must be JSON with "messages".') from error
    system = said.pop(0)[1] if said and said[0][0] == "system" else ""
    roles = [role for role, _ in said]
    texts = all(isinstance(text, str) for text in [system, *(text for _, text in said)])
    if not texts or len(said) % 2 or roles != ["user", "assistant"] * (len(said) // 2):
        raise Corrupt(f"{path}: messages must be texts of user and assistant in turn.")
    return system, tuple({"role": role, "content": text} for role, text in said)
