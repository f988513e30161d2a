"""A conversation to the prompt that the model was trained on: checked messages, the chat template, token ids.

Text in messages never becomes a control token: ``<|im_end|>`` typed by a user is encoded as ordinary text. To know
which characters come from the request, texts in which a control token could begin or end are rendered with private-use
characters in its place; the control tokens that are found around these are the template's own.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from deltaloom.graph.errors import RequestError
from deltaloom.runtime.default_template import DEFAULT_CHAT_TEMPLATE
from deltaloom.runtime.template_limits import TemplateLimits
from deltaloom.runtime.template_sandbox import render_template
from deltaloom.runtime.tokenizer import Tokenizer

Message = Mapping[str, object]
Tool = Mapping[str, object]

ROLES = ("system", "developer", "user", "assistant", "tool")
PRIVATE_USE = range(0xF0000, 0xFFFFE)
MAX_NESTING = 200
NO_KWARGS: Mapping[str, object] = {}
DEFAULT_LIMITS = TemplateLimits()


def render(
    messages: Sequence[Message],
    tools: Sequence[Tool] | None,
    template: str | None,
    *,
    add_generation_prompt: bool,
    template_kwargs: Mapping[str, object] = NO_KWARGS,
    limits: TemplateLimits = DEFAULT_LIMITS,
) -> str:
    """The prompt text of a conversation, exactly as the reference renders it.

    ``template`` None: the default template. ``template_kwargs``: further variables of the template. Raises RequestError
    for messages that are not well formed and for whatever goes wrong in the template.
    """
    check_messages(messages, tools)
    reserved = {"messages", "tools", "add_generation_prompt"} & set(template_kwargs)
    if reserved:
        raise RequestError(f"chat_template_kwargs must not set {sorted(reserved)[0]!r}; it has its own field")
    variables = {
        "documents": None,
        **template_kwargs,
        "messages": list(messages),
        "tools": list(tools) if tools else None,
        "add_generation_prompt": add_generation_prompt,
    }
    return render_template(DEFAULT_CHAT_TEMPLATE if template is None else template, variables, limits)


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Tool] | None = None,
    *,
    add_generation_prompt: bool = True,
    template: str | None = None,
    template_kwargs: Mapping[str, object] = NO_KWARGS,
    reference_behaviour: bool = False,
    limits: TemplateLimits = DEFAULT_LIMITS,
) -> list[int]:
    """Token ids of a conversation's prompt; ``template`` None: the tokenizer's, else the default one.

    Text parts are joined by line feeds and the role developer becomes system. Control tokens spelled in messages, tools
    or ``template_kwargs`` are encoded as ordinary text; all other ids are those of the reference. With
    ``reference_behaviour`` the conversation is rendered as given and the text is encoded as a whole, so that typed
    control tokens become control tokens. Raises RequestError.
    """
    template = tokenizer.chat_template if template is None else template
    check_messages(messages, tools)
    if not isinstance(template_kwargs, Mapping):
        raise RequestError(f"chat_template_kwargs is {template_kwargs!r}; it must be an object of names and values")
    protection = None
    if not reference_behaviour:
        messages = plain_messages(messages)
        protection = _Protection.of(tokenizer, messages, tools or (), template_kwargs)
    if protection is not None:
        messages = [protection.hide_in_object(message) for message in messages]
        tools = [protection.hide_in_object(tool) for tool in tools or ()]
        template_kwargs = protection.hide_in_object(template_kwargs)
    text = render(
        messages,
        tools,
        template,
        add_generation_prompt=add_generation_prompt,
        template_kwargs={**tokenizer.named_tokens, **template_kwargs},
        limits=limits,
    )
    return tokenizer.encode(text) if protection is None else protection.encode(tokenizer, text)


def plain_messages(messages: Sequence[Message]) -> list[Message]:
    """Messages with text parts joined by line feeds, and developer messages as system messages: what templates know."""
    plain: list[Message] = []
    for message in messages:
        changed = dict(message)
        if message["role"] == "developer":
            changed["role"] = "system"
        content = message.get("content")
        if isinstance(content, list | tuple):
            changed["content"] = "\n".join(str(part["text"]) for part in content)
        plain.append(changed)
    return plain


def check_messages(messages: Sequence[Message], tools: Sequence[Tool] | None) -> None:
    """Raise RequestError, naming the message and the field, unless the conversation has the form of a chat request."""
    if not isinstance(messages, list | tuple) or not messages:
        raise RequestError(f"messages is {_shown(messages)}; it must be a list of at least one message")
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise RequestError(f"{where} is {_shown(message)}; it must be an object with role and content")
        role = message.get("role")
        if role not in ROLES:
            raise RequestError(f"{where}.role is {_shown(role)}; it must be one of {', '.join(ROLES)}")
        _check_content(f"{where}.content", message.get("content"))
        _check_tool_calls(where, message)
    if tools is not None and not isinstance(tools, list | tuple):
        raise RequestError(f"tools is {_shown(tools)}; it must be a list of tool definitions")
    for index, tool in enumerate(tools or ()):
        if not isinstance(tool, Mapping):
            raise RequestError(f"tools[{index}] is {_shown(tool)}; it must be an object that describes a function")
    for _ in _strings((messages, tools), MAX_NESTING):
        pass


def _check_content(where: str, content: object) -> None:
    if content is None or isinstance(content, str):
        return
    if not isinstance(content, list | tuple):
        raise RequestError(f"{where} is {_shown(content)}; it must be text, null or a list of text parts")
    for index, part in enumerate(content):
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise RequestError(
                f'{where}[{index}] is {_shown(part)}; only text parts {{"type": "text", "text": ...}} can be read'
            )


def _check_tool_calls(where: str, message: Message) -> None:
    calls = message.get("tool_calls")
    if calls is None:
        return
    if message["role"] != "assistant":
        raise RequestError(f"{where} has tool_calls but the role {message['role']!r}; only the assistant calls tools")
    if not isinstance(calls, list | tuple):
        raise RequestError(f"{where}.tool_calls is {_shown(calls)}; it must be a list")
    for index, call in enumerate(calls):
        place = f"{where}.tool_calls[{index}]"
        function = call.get("function") or call if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            raise RequestError(f"{place} is {_shown(call)}; it must be an object with a function's name and arguments")
        if not isinstance(function.get("name"), str) or not function["name"]:
            raise RequestError(f"{place} has the name {_shown(function.get('name'))}; it must be the function's name")
        if not isinstance(function.get("arguments"), str | Mapping):
            raise RequestError(
                f"{place} has the arguments {_shown(function.get('arguments'))}; they must be an object or JSON text"
            )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


class _Protection:
    """Stand-ins for the parts of a request's texts that could make up control tokens."""

    def __init__(self, patterns: "_SuspiciousText", stand_ins: Mapping[str, str]) -> None:
        self._patterns = patterns
        self._stand_ins = stand_ins

    @classmethod
    def of(cls, tokenizer: Tokenizer, *values: object) -> "_Protection | None":
        """Protection for all strings in ``values``, None where none of them could make up a control token."""
        patterns = _SuspiciousText.of(tuple(sorted(tokenizer.added_tokens)))
        texts = list(_strings(values, MAX_NESTING))
        fragments = sorted({text[start:stop] for text in texts for start, stop in patterns.spans(text)})
        if not fragments:
            return None
        used = {char for text in texts for char in text if ord(char) >= PRIVATE_USE.start}
        free: Iterator[str] = (chr(code) for code in PRIVATE_USE if chr(code) not in used)
        return cls(patterns, dict(zip(fragments, free)))

    def hide(self, text: str) -> str:
        """``text`` with stand-ins."""
        hidden, end = [], 0
        for start, stop in self._patterns.spans(text):
            hidden += [text[end:start], self._stand_ins[text[start:stop]]]
            end = stop
        return "".join([*hidden, text[end:]])

    def hide_in_object(self, value: Mapping[str, object]) -> dict[str, object]:
        """``value`` with stand-ins in all its strings."""
        return {self.hide(key): _mapped(entry, self.hide) for key, entry in value.items()}

    def encode(self, tokenizer: Tokenizer, text: str) -> list[int]:
        """Ids of a rendered ``text`` with stand-ins: the template's control tokens, and everything else as plain text.

        Plain text between two control tokens is encoded as a whole, so that tokens at the stand-ins' borders are the
        ones that ordinary text has there.
        """
        originals = {stand_in: fragment for fragment, stand_in in self._stand_ins.items()}
        escaped = {_json_escape(stand_in): fragment for stand_in, fragment in originals.items()}
        splitter = "|".join(map(re.escape, [*originals, *escaped]))
        ids: list[int] = []
        plain: list[str] = []
        for piece in re.split(f"({splitter})", text):
            fragment = originals.get(piece) or escaped.get(piece)
            if fragment is not None:
                plain.append(fragment)
                continue
            end = 0
            for start, stop, token in tokenizer.added_token_spans(piece):
                plain.append(piece[end:start])
                ids += [*tokenizer.encode("".join(plain), allow_special=False), token]
                plain, end = [], stop
            plain.append(piece[end:])
        return ids + tokenizer.encode("".join(plain), allow_special=False)


@dataclass(frozen=True)
class _SuspiciousText:
    """Finds whole control tokens anywhere in a string, their ends at its start and their beginnings at its end.

    The latter two could become whole by what the template puts beside the string.
    """

    whole: re.Pattern[str]
    tail: re.Pattern[str]
    head: re.Pattern[str]
    longest: int

    @classmethod
    @lru_cache(maxsize=8)
    def of(cls, tokens: tuple[str, ...]) -> "_SuspiciousText":
        """The patterns for the control tokens ``tokens``."""
        tails = {token[cut:] for token in tokens for cut in range(1, len(token))}
        heads = {token[:cut] for token in tokens for cut in range(1, len(token))}
        return cls(
            whole=re.compile(_any_of(tokens)),
            tail=re.compile(_any_of(tails)),
            head=re.compile(f"(?:{_any_of(heads)})\\Z"),
            longest=max(map(len, tokens), default=0),
        )

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Where the suspicious parts of ``text`` are: (first character, character after the last), in order."""
        found = [match.span() for match in self.whole.finditer(text)]
        tail = self.tail.match(text)
        if tail and (not found or tail.end() <= found[0][0]):
            found.insert(0, tail.span())
        head = self.head.search(text, max(len(text) - self.longest, found[-1][1] if found else 0))
        return [*found, head.span()] if head else found


def _any_of(texts: Iterable[str]) -> str:
    """A pattern for one of ``texts``, the longest that fits; nothing fits where there are none."""
    ordered = sorted(texts, key=lambda text: (-len(text), text))
    return "|".join(map(re.escape, ordered)) if ordered else r"(?!)"


def _json_escape(char: str) -> str:
    """How JSON restricted to ASCII writes a character beyond the basic plane: as two surrogates."""
    offset = ord(char) - 0x10000
    return f"\\u{0xD800 + (offset >> 10):04x}\\u{0xDC00 + (offset & 0x3FF):04x}"


def _strings(value: object, depth: int) -> Iterator[str]:
    if depth == 0:
        raise RequestError(f"messages or tools are nested more than {MAX_NESTING} levels deep")
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _strings(key, depth - 1)
            yield from _strings(entry, depth - 1)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _strings(entry, depth - 1)


def _mapped(value: object, change: Callable[[str], str]) -> object:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key) if isinstance(key, str) else key: _mapped(entry, change) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(entry, change) for entry in value]
    return value
