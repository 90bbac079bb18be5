"""How a chat becomes one text: the template that a model was trained with, in Jinja as Hugging Face has it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
import jinja2.sandbox

# For models that were trained on text and on no template.
PLAIN = """\
{%- for message in messages %}{{ message.role }}: {{ message.content }}
{% endfor %}assistant:"""


class ChatTemplate:
    """Renders messages, up to where the assistant's answer begins.

    Attributes:
      source: the template.
    """

    def __init__(self, source: str = PLAIN, **tokens: str):
        """Compiles a template; `tokens` are the special tokens that it may name, such as `bos_token`.

        Raises:
          ValueError: for a template that is not valid Jinja.
        """
        self.source = source
        # A template comes with a checkpoint, so it is not trusted.
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _refuse
        try:
            self._template = environment.from_string(source, globals=tokens)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"chat_template, line {error.lineno}: {error.message}") from error

    @classmethod
    def of_folder(cls, folder: str | Path) -> "ChatTemplate":
        """The template of a Hugging Face folder: a file, or a field of `tokenizer_config.json`; else `PLAIN`."""
        folder = Path(folder)
        config, file = folder / "tokenizer_config.json", folder / "chat_template.jinja"
        fields = json.loads(config.read_text()) if config.is_file() else {}
        tokens = {
            name: _content(fields.get(name))
            for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        }
        source = file.read_text() if file.is_file() else fields.get("chat_template", PLAIN)
        return cls(source, **tokens)

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The text of messages, each with `role` and `content`.

        Raises:
          ValueError: if the template refuses them, or fails.
        """
        try:
            return self._template.render(messages=messages, add_generation_prompt=True)
        except jinja2.TemplateError as error:
            raise ValueError(
                f"messages do not fit the model's chat template: {error.message}"
            ) from error


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _content(token: str | Mapping[str, str] | None) -> str:
    """A special token's text, which `tokenizer_config.json` writes in one of two ways."""
    return token["content"] if isinstance(token, Mapping) else token or ""
