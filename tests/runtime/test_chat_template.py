"""Chat templates: the published template's golden texts, the tiny model's own, limits, message checks, typed tokens."""

import json
import re
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaloom.graph.errors import RequestError
from deltaloom.runtime.chat_template import encode_chat, plain_messages, render
from deltaloom.runtime.template_limits import TemplateLimits
from deltaloom.runtime.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
TOKENIZER = Tokenizer.from_folder(ROOT / "models" / "tiny_next", 4096)
CASES = json.loads((ROOT / "tests/golden/chat/cases.json").read_text())
TOOL = {"type": "function", "function": {"name": "add", "description": "météo <b> & 'x'", "parameters": {}}}
CONTROL = list(TOKENIZER.added_tokens)
HI = [{"role": "user", "content": "Hi"}]


def user(text: str) -> list[dict[str, object]]:
    return [{"role": "user", "content": text}]


def text_of(template: str, limits: TemplateLimits | None = None, **variables: object) -> str:
    kwargs = {} if limits is None else {"limits": limits}
    return render(HI, None, template, add_generation_prompt=False, template_kwargs=variables, **kwargs)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_default_template_reproduces_the_published_one(case: dict[str, object]) -> None:
    text = render(case["messages"], case["tools"], None, add_generation_prompt=case["add_generation_prompt"])
    assert text == case["text"]


def test_default_template_treats_other_content_as_empty() -> None:
    messages = [
        *user("a"),
        {"role": "assistant", "content": None},
        {"role": "user", "content": [{"type": "text", "text": "b"}]},
    ]
    want = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n<|im_start|>user\n<|im_end|>\n"
    assert render(messages, [], None, add_generation_prompt=False) == want


def test_template_of_the_tiny_model() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        *user("2+3?"),
        {"role": "assistant", "content": "", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}},
            {"name": "add", "arguments": '{"a": 4}'},
        ]},
        {"role": "tool", "content": "5"},
        {"role": "tool", "content": "4"},
    ]  # fmt: skip
    want = (
        "<|im_start|>system\nBe brief.\n\n"
        "# Tools\n\nYou can call the functions listed here. Their signatures are given "
        "as JSON inside <tools></tools>:\n<tools>\n"
        '{"type": "function", "function": {"name": "add", "description": "météo <b> & \'x\'", "parameters": {}}}\n'
        "</tools>\n\nTo call a function, reply with its name and arguments as a JSON object inside "
        "<tool_call></tool_call>:\n<tool_call>\n"
        '{"name": <function name>, "arguments": <arguments object>}\n</tool_call>'
        "<|im_end|>\n<|im_start|>user\n2+3?<|im_end|>\n<|im_start|>assistant\n"
        '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>\n'
        '<tool_call>\n{"name": "add", "arguments": {"a": 4}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n5\n</tool_response>\n<tool_response>\n4\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert render(messages, [TOOL], TOKENIZER.chat_template, add_generation_prompt=True) == want
    assert encode_chat(TOKENIZER, messages, [TOOL]) == TOKENIZER.encode(want)


def test_encode_chat_gives_the_reference_prompts() -> None:
    items = json.loads((ROOT / "tests/golden/tiny_next/reference_generations.json").read_text())["items"]
    chats = [item["prompt_ids"] for item in items if item["skill"].startswith("chat/")]
    assert len(chats) > 10
    for prompt_ids in chats:
        text = TOKENIZER.decode(prompt_ids, skip_special_tokens=False)
        turns = re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>\n", text, re.DOTALL)
        messages = [{"role": role, "content": content} for role, content in turns]
        assert encode_chat(TOKENIZER, messages) == prompt_ids


# Text in messages never becomes a control token.


def control_ids(ids: list[int]) -> list[int]:
    return [token for token in ids if token >= 4087]


@pytest.mark.parametrize("token", CONTROL)
def test_typed_control_tokens_stay_text(token: str) -> None:
    messages = user(f"what is {token}?\n{token}{token}")
    ids = encode_chat(TOKENIZER, messages)
    assert control_ids(ids) == [4088, 4089, 4088]
    text = render(messages, None, TOKENIZER.chat_template, add_generation_prompt=True)
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text
    start, end, newline = 4088, 4089, TOKENIZER.encode("\n")
    body = TOKENIZER.encode(f"user\nwhat is {token}?\n{token}{token}", allow_special=False)
    assert ids == [start, *body, end, *newline, start, *TOKENIZER.encode("assistant\n")]


@pytest.mark.parametrize("token", CONTROL)
def test_reference_behaviour_parses_typed_control_tokens(token: str) -> None:
    messages = user(f"what is {token}?")
    text = render(messages, None, TOKENIZER.chat_template, add_generation_prompt=True)
    ids = encode_chat(TOKENIZER, messages, reference_behaviour=True)
    assert ids == TOKENIZER.encode(text)
    assert control_ids(ids) == [4088, TOKENIZER.added_tokens[token], 4089, 4088]


@pytest.mark.parametrize("token", ["<|im_end|>", "<tool_call>", "</tool_response>"])
def test_every_place_of_a_request_is_covered(token: str) -> None:
    def conversation(word: str) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
        call = {"name": f"f{word}", "arguments": {f"k{word}": [word]}}
        return [
            {"role": "system", "content": f"s{word}"},
            *user(word),
            {"role": "assistant", "content": f"{word}x", "tool_calls": [call, {"name": "g", "arguments": f'"{word}"'}]},
            {"role": "tool", "content": f"{word}{word}"},
        ], [{"type": "function", "function": {"name": "g", "description": word, "parameters": {word: word}}, word: 1}]

    messages, tools = conversation(token)
    ids = encode_chat(TOKENIZER, messages, tools)
    text = render(messages, tools, TOKENIZER.chat_template, add_generation_prompt=True)
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text
    harmless = encode_chat(TOKENIZER, *conversation("harmless"))
    assert control_ids(ids) == control_ids(harmless)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.sampled_from([*CONTROL, "a", "\n", "<|im_", "end|>", "<", ">", "é", "\U000f0000", "e\u0301"])).map("".join))
def test_any_typed_text_keeps_the_frame(text: str) -> None:
    ids = encode_chat(TOKENIZER, [*user(text), {"role": "assistant", "content": text}])
    assert control_ids(ids) == [4088, 4089, 4088, 4089, 4088]
    if not any(token in text for token in CONTROL):
        assert ids == encode_chat(TOKENIZER, [*user(text), {"role": "assistant", "content": text}], reference_behaviour=True)


def test_halves_of_a_control_token_do_not_join() -> None:
    template = "{% for message in messages %}{{ message.content }}{% endfor %}<|im_end|>"
    messages = [*user("a<|im_"), *user("end|>b")]
    assert TOKENIZER.encode("a<|im_end|>b") != (ids := encode_chat(TOKENIZER, messages, template=template))
    assert control_ids(ids) == [4089] and TOKENIZER.decode(ids, skip_special_tokens=False) == "a<|im_end|>b<|im_end|>"


@pytest.mark.parametrize(("typed", "template"), [("a<|im_", "{{ x }}end|>"), ("end|>b", "<|im_{{ x }}"), ("<", "{{ x }}think>")])
def test_halves_do_not_join_with_the_template(typed: str, template: str) -> None:
    template = template.replace("x", "messages[0].content")
    text = template.replace("{{ messages[0].content }}", typed)
    assert control_ids(TOKENIZER.encode(text))
    ids = encode_chat(TOKENIZER, user(typed), template=template)
    assert not control_ids(ids) and TOKENIZER.decode(ids) == text


def test_template_that_writes_ascii_json() -> None:
    template = "{{ messages[0].content | tojson(ensure_ascii=true) }}<|im_end|>"
    ids = encode_chat(TOKENIZER, user("<|im_end|>"), template=template)
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == '"<|im_end|>"<|im_end|>'
    assert control_ids(ids) == [4089]


def test_template_kwargs_are_protected_and_named_tokens_are_known() -> None:
    ids = encode_chat(TOKENIZER, HI, template="{{ word }}{{ eos_token }}", template_kwargs={"word": "<|im_end|>"})
    assert control_ids(ids) == [4089] and len(ids) > 2


def test_text_parts_and_developer_messages() -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    assert [(message["role"], message["content"]) for message in plain_messages(messages)] == [
        ("system", "Be brief."),
        ("user", "a\nb"),
    ]
    want = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na\nb<|im_end|>\n<|im_start|>assistant\n"
    assert encode_chat(TOKENIZER, messages) == TOKENIZER.encode(want)


# Jinja as transformers sets it up.


def test_environment() -> None:
    assert text_of("{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "012"
    assert text_of("a\n  {% if true %}\nb\n  {% endif %}\nc") == "a\nb\nc"
    assert text_of("{{ x | tojson }}", x={"é": "<b>&'"}) == '{"é": "<b>&\'"}'
    assert text_of("{{ x | tojson(indent=2) }}", x={"a": [1]}) == json.dumps({"a": [1]}, indent=2)
    assert text_of("{{ x | tojson(separators=(',', ':'), sort_keys=true) }}", x={"b": 1, "a": 2}) == '{"a":2,"b":1}'
    assert text_of("{{ strftime_now('%Y') }}") == time.strftime("%Y")
    assert text_of("{{ 1 ~ 'a' ~ none ~ missing }}") == "1aNone"
    assert text_of("{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(1) }}{{ f(2) }}") == "[1][2]"
    assert text_of("{% for i in range(6) if i % 2 %}{{ i }}{{ loop.last }} {% endfor %}") == "1False 3False 5True "
    counting = "{% set ns = namespace(n=0) %}{% for i in [2, 3] %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}"
    assert text_of(counting) == "5"
    assert text_of("{{ messages | map(attribute='role') | join(', ') | upper }}{{ '%s!' | format('x') }}") == "USERx!"
    assert text_of("{{ 'abab'.replace('a', 'c') | replace('b', 'd') }}{{ '{}-{}'.format(1, 2) }}{{ '%d' % 3 }}") == "cdcd1-23"
    assert text_of("{{ 'a b c d' | truncate(6) }}|{{ 'ab' | center(4) }}|{{ [1, 2] | sum }}") == "a..." + "| ab |3"
    assert text_of("{{ 'x\ny' | indent(2, true) }}") == "  x\n  y"


NESTED = "{% set ns = namespace(l=[1]) %}{% for i in range(90) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}"
BOMBS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% set r = range(9999) | list %}{% for a in range(99999) if r | sum < 0 %}{% endfor %}",
    "{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{% macro f(n) %}{% if n %}{% set x = f(n - 1) ~ f(n - 1) %}{% endif %}{% endmacro %}{{ f(60) }}",
    "{{ 'a' * 10000000000 }}",
    "{{ [1] * 10000000000 }}",
    "{{ range(1000000000) | list }}",
    "{{ 9 ** 999999999999 }}",
    "{% set ns = namespace(n=3) %}{% for i in range(90) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "{% set ns = namespace(s='aa') %}{% for i in range(90) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "{% set ns = namespace(s='aa') %}{% for i in range(90) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "{% set ns = namespace(s='aa') %}{% for i in range(90) %}{% set ns.s = ns.s.replace('a', 'aaaa') %}{% endfor %}",
    "{% set ns = namespace(s='aa') %}{% for i in range(90) %}{% set ns.s = ns.s | replace('a', 'aaaa') %}{% endfor %}",
    "{% set ns = namespace(s='aa') %}{% for i in range(90) %}{% set ns.s = ns.s.join([ns.s, ns.s]) %}{% endfor %}",
    "{% set ns = namespace(s='aa') %}{% for i in range(90) %}{% set ns.s = '%s%s' % (ns.s, ns.s) %}{% endfor %}",
    "{% set ns = namespace(s='aa') %}{% for i in range(90) %}{% set ns.s = '{0}{0}'.format(ns.s) %}{% endfor %}",
    NESTED + "{{ ns.l }}",
    NESTED + "{{ ns.l | tojson }}",
    NESTED + "{{ ns.l | string }}",
    NESTED + "{{ [ns.l] | join }}",
    "{% set ns = namespace(l=[]) %}{% for i in range(9999) %}{% set ns.l = ns.l + [[1] * 99999] %}{% endfor %}",
    "{{ 'x'.center(10000000000) }}", "{{ 'x' | center(10000000000) }}", "{{ 'x'.zfill(10000000000) }}",
    "{{ '%10000000000d' % 1 }}", "{{ '%*d' % (10000000000, 1) }}", "{{ '%10000000000d' | format(1) }}",
    "{{ '{:10000000000}'.format(1) }}", "{{ '{:{}}'.format(1, 10000000000) }}", "{{ 'x' | indent(10000000000, true) }}",
    "{{ [1] | tojson(indent=10000000000) }}", "{{ [1] | batch(10000000000, 0) | list }}",
    "{{ 1.5 | round(10000000000, 'ceil') }}",
    "{{ strftime_now('%1000000000d') }}", "{{ lipsum(1000000) }}", "{{ 'a'.translate({97: 'b' * 100000}) }}",
    "{{ ([range(9999) | list] * 99999) | sum(start=[]) }}",
    "{{ ([range(99999)] * 99999) | map('sum') | list }}",
]  # fmt: skip


@pytest.mark.parametrize("template", BOMBS)
def test_templates_that_never_end_or_blow_up_are_stopped(template: str) -> None:
    start = time.perf_counter()
    with pytest.raises(RequestError, match="chat template"):
        text_of(template, TemplateLimits(characters=1_000_000, seconds=0.3))
    assert time.perf_counter() - start < 3


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ self.__init__.__globals__ }}",
        "{{ raise_exception.__globals__.items() }}",
        "{{ (''|attr('__class__')).mro() }}",
        "{% include '/etc/passwd' %}",
        "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    ],
)
def test_templates_cannot_reach_python(template: str) -> None:
    with pytest.raises(RequestError, match="chat template"):
        text_of(template)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% if %}", r"not valid Jinja: .* \(line 1\)"),
        ("a\n{{ x }", r"not valid Jinja: .* \(line 2\)"),
        ("{{ raise_exception('roles must alternate') }}", "refuses this conversation: roles must alternate"),
        ("{{ messages[5].content }}", "refuses this conversation: .*has no element 5"),
        ("{{ 1 / 0 }}", "cannot be applied to this conversation: ZeroDivisionError"),
        ("{{ missing | tojson }}", "cannot be applied to this conversation: TypeError"),
        ("{{ 'x' | nothing }}", "not valid Jinja: No filter named 'nothing'"),
    ],
)
def test_template_errors_are_sentences(template: str, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        text_of(template)


BAD_MESSAGES = [
    ([], r"messages is \[\]; it must be a list of at least one message"),
    ("Hi", "messages is 'Hi'"),
    ([*HI, "Hi"], r"messages\[1\] is 'Hi'; it must be an object"),
    ([{"content": "Hi"}], r"messages\[0\].role is None; it must be one of system, developer, user"),
    ([*HI, {"role": "robot", "content": ""}], r"messages\[1\].role is 'robot'"),
    ([{"role": ["user"], "content": ""}], r"messages\[0\].role is \['user'\]"),
    ([{"role": "user", "content": 5}], r"messages\[0\].content is 5; it must be text, null or a list"),
    ([{"role": "user", "content": [{"type": "image_url"}]}], r"messages\[0\].content\[0\] is .*only text parts"),
    ([{"role": "user", "content": ["Hi"]}], r"messages\[0\].content\[0\] is 'Hi'"),
    ([{"role": "user", "content": "", "tool_calls": []}], r"messages\[0\] has tool_calls but the role 'user'"),
    ([{"role": "assistant", "tool_calls": {}}], r"messages\[0\].tool_calls is \{\}; it must be a list"),
    ([{"role": "assistant", "tool_calls": ["add"]}], r"tool_calls\[0\] is 'add'"),
    ([{"role": "assistant", "tool_calls": [{"function": "add"}]}], r"tool_calls\[0\] is "),
    ([{"role": "assistant", "tool_calls": [{"function": {"arguments": {}}}]}], r"tool_calls\[0\] has the name None"),
    ([{"role": "assistant", "tool_calls": [{"name": "add"}]}], r"tool_calls\[0\] has the arguments None"),
    ([{"role": "assistant", "tool_calls": [{"name": "add", "arguments": [1]}]}], r"has the arguments \[1\]"),
]


@pytest.mark.parametrize(("messages", "said"), BAD_MESSAGES)
def test_bad_messages_are_named(messages: object, said: str) -> None:
    for function in (
        lambda: render(messages, None, None, add_generation_prompt=True),
        lambda: encode_chat(TOKENIZER, messages),
    ):
        with pytest.raises(RequestError, match=said):
            function()


def test_bad_tools_and_kwargs_are_named() -> None:
    with pytest.raises(RequestError, match=r"tools\[1\] is 'add'"):
        encode_chat(TOKENIZER, HI, [TOOL, "add"])
    with pytest.raises(RequestError, match="tools is 3"):
        encode_chat(TOKENIZER, HI, 3)
    with pytest.raises(RequestError, match="chat_template_kwargs must not set 'messages'"):
        render(HI, None, None, add_generation_prompt=True, template_kwargs={"messages": []})


def test_deep_nesting_and_lone_surrogates_are_refused() -> None:
    deep: list[object] = []
    for _ in range(5000):
        deep = [deep]
    for reference in (True, False):
        with pytest.raises(RequestError, match="deep"):
            encode_chat(TOKENIZER, HI, [{"name": deep}], reference_behaviour=reference)
    with pytest.raises(RequestError, match="lone surrogate"):
        encode_chat(TOKENIZER, user("a\ud800<|im_end|>"))


def test_long_conversations_are_quick() -> None:
    messages = user("the <|im_end|> of a long text. " * 40_000)
    start = time.perf_counter()
    ids = encode_chat(TOKENIZER, messages)
    assert time.perf_counter() - start < 15
    assert control_ids(ids) == [4088, 4089, 4088]
