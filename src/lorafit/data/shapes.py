"""Rows of any known format -> messages as chat templates expect them, or text.

A row's format is told by its keys; columns that no format knows are ignored. What is wrong with a row is said by the
path inside it: `messages[2].content is null`.
"""

from __future__ import annotations

import json
from typing import Any

from lorafit.data.strict_json import JsonError, parse

FORMATS = (
    ("chat", ("messages",), ()),
    ("sharegpt", ("conversations",), ()),
    ("prompt/completion", ("prompt",), ("completion",)),
    ("alpaca", ("instruction",), ("output",)),
    ("text", ("text",), ()),
)
"""(name, keys that every row has, keys that hold the answer and may be missing when one is to be generated)."""

MEDIA = ("images", "image", "videos", "video", "audios", "audio")  # keys of what is no text
KNOWN = "messages | conversations | prompt and completion | instruction and output | text"
ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bing", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    **dict.fromkeys(("system", "developer"), "system"),
}

Message = dict[str, Any]


class ShapeError(ValueError):
    """A row that is not what its format asks for: (what is wrong, what to do)."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what, remedy)
        self.what, self.remedy = what, remedy


class FormatError(ShapeError):
    """A row whose keys are no known format's."""


def format_of(row: Any, for_training: bool) -> str:
    """The name of the row's format. Raises FormatError for a row that has none, ShapeError for one with images."""
    if not isinstance(row, dict):
        raise FormatError(f"the row is {_kind(row)}, not an object", f"give objects with the keys {KNOWN}")
    for key in MEDIA:
        if row.get(key):
            raise ShapeError(
                f"the row has {key}, which no model is trained on yet", "remove the row, or give text only"
            )
    if "chosen" in row and "rejected" in row:
        raise FormatError("preference rows are not supported yet", f"give rows with the keys {KNOWN}")
    for name, given, answer in FORMATS:
        if all(key in row for key in (given + answer if for_training else given)):
            return name
    for _, given, answer in FORMATS:
        if any(key in row for key in given + answer):
            missing = next(key for key in given + answer if key not in row)
            raise FormatError(f"{missing} is missing; the row has {_keys(row)}", f"give {' and '.join(given + answer)}")
    raise FormatError(f"no known format: the row has {_keys(row)}", f"known formats have {KNOWN}")


def messages_of(row: dict[str, Any], form: str, for_training: bool) -> tuple[list[Message], int]:
    """The row's messages in OpenAI's form, and how many of them at the start are the prompt, never trained.

    for_training=False leaves the answer out: the completion, the output, or an assistant turn at the end.
    Raises ShapeError.
    """
    if form == "prompt/completion":
        messages, prompt = _prompt_completion(row, for_training)
    elif form == "alpaca":
        messages, prompt = _alpaca(row, for_training), 0
    else:
        key = "messages" if form == "chat" else "conversations"
        turns = _list(row[key], key)
        if not for_training and turns and _is_answer(turns[-1]):
            turns = turns[:-1]
        messages, prompt = [_turn(turn, f"{key}[{n}]", form) for n, turn in enumerate(turns)], 0
    if row.get("system") not in (None, ""):
        if messages and messages[0]["role"] == "system":
            raise ShapeError("the system prompt is given twice, as `system` and as a message", "remove one of them")
        messages.insert(0, {"role": "system", "content": _text(row["system"], "system")})
        prompt += prompt > 0
    if not messages:
        raise ShapeError("there is no message", "give at least one")
    if for_training and all(message["role"] != "assistant" for message in messages[prompt:]):
        raise ShapeError("no assistant turn", "give at least one: it is what is trained")
    return messages, prompt


def text_of(row: dict[str, Any]) -> str:
    """The text of a `text` row. Raises ShapeError when it is no text or holds nothing."""
    text = _text(row["text"], "text")
    if not text.strip():
        raise ShapeError("text is empty", "remove the row")
    return text


def tools_of(row: dict[str, Any], form: str) -> tuple[dict[str, Any], ...] | None:
    """The row's tools, from a list or from JSON in a string; None where there are none. Raises ShapeError.

    ShareGPT rows describe functions without OpenAI's wrapping, which templates expect; they get it.
    """
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = _json(tools, "tools") if tools.strip() else None
    if tools is None:
        return None
    for place, tool in enumerate(_list(tools, "tools")):
        if not isinstance(tool, dict):
            raise ShapeError(f"tools[{place}] is {_kind(tool)}, not an object", "describe each tool by an object")
    if form == "sharegpt":
        tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    return tuple(tools) or None


def _prompt_completion(row: dict[str, Any], for_training: bool) -> tuple[list[Message], int]:
    prompt, completion = row["prompt"], row.get("completion")
    if isinstance(prompt, list):
        messages = [_turn(turn, f"prompt[{n}]", "chat") for n, turn in enumerate(prompt)]
        if not for_training:
            return messages, 0
        turns = _list(completion, "completion")
        return messages + [_turn(turn, f"completion[{n}]", "chat") for n, turn in enumerate(turns)], len(messages)
    messages = [{"role": "user", "content": _text(prompt, "prompt")}]
    if for_training:
        messages.append({"role": "assistant", "content": _text(completion, "completion")})
    return messages, 0


def _alpaca(row: dict[str, Any], for_training: bool) -> list[Message]:
    instruction, more = _text(row["instruction"], "instruction"), row.get("input")
    if more not in (None, ""):
        instruction += "\n\n" + _text(more, "input")
    messages = [{"role": "user", "content": instruction}]
    if for_training:
        messages.append({"role": "assistant", "content": _text(row["output"], "output")})
    return messages


def _is_answer(turn: Any) -> bool:
    role = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
    return isinstance(role, str) and SHAREGPT_ROLES.get(role) == "assistant"


def _turn(turn: Any, path: str, form: str) -> Message:
    """One message. Keys beside role and content pass through to the template; null is the same as left out."""
    if not isinstance(turn, dict):
        raise ShapeError(f"{path} is {_kind(turn)}, not an object", "give each message a role and content")
    if form == "sharegpt" and "role" not in turn:
        return _sharegpt_turn(turn, path)
    role = _role(turn, path, "role", ROLES)
    message = {key: value for key, value in turn.items() if value is not None}
    message["role"] = role
    calls = message.pop("tool_calls", None)
    if calls:
        message["tool_calls"] = _tool_calls(calls, f"{path}.tool_calls")
    if message.get("content") is None:
        if not calls or role != "assistant":
            raise ShapeError(f"{path}.content is {'null' if 'content' in turn else 'missing'}", "give it text")
    else:
        message["content"] = _content(message["content"], f"{path}.content")
    return message


def _sharegpt_turn(turn: dict[str, Any], path: str) -> Message:
    speaker = _role(turn, path, "from", tuple(SHAREGPT_ROLES))
    if turn.get("value") is None:
        raise ShapeError(f"{path}.value is {'null' if 'value' in turn else 'missing'}", "give it text")
    value = turn["value"]
    if speaker == "function_call":
        calls = _json(value, f"{path}.value") if isinstance(value, str) else value
        calls = calls if isinstance(calls, list) else [calls]
        return {"role": "assistant", "tool_calls": _tool_calls(calls, f"{path}.value")}
    return {"role": SHAREGPT_ROLES[speaker], "content": _content(value, f"{path}.value")}


def _role(turn: dict[str, Any], path: str, key: str, known: tuple[str, ...]) -> str:
    role = turn.get(key)
    if role is None:
        what = "null" if key in turn else f"missing; the message has {_keys(turn)}"
        raise ShapeError(f"{path}.{key} is {what}", f"give one of {', '.join(known)}")
    if not isinstance(role, str):
        raise ShapeError(f"{path}.{key} is {_kind(role)}, not text", f"give one of {', '.join(known)}")
    if role not in known:
        raise ShapeError(f"unknown role {_short(role)} at {path}.{key}", f"give one of {', '.join(known)}")
    return role


def _content(content: Any, path: str) -> str:
    """Text, also when it comes as a list of OpenAI's text parts."""
    if not isinstance(content, list):
        return _text(content, path)
    texts = []
    for place, part in enumerate(content):
        kind = part.get("type", "text") if isinstance(part, dict) else None
        if kind is None:
            raise ShapeError(f"{path}[{place}] is {_kind(part)}, not an object", 'give {"type": "text", "text": ...}')
        if kind != "text":
            raise ShapeError(f"{path}[{place}] is of type {_short(kind)}: not supported yet", "give text only")
        texts.append(_text(part.get("text"), f"{path}[{place}].text"))
    return "".join(texts)


def _tool_calls(calls: Any, path: str) -> list[dict[str, Any]]:
    """Tool calls with their arguments as objects, which templates write out themselves."""
    done = []
    for place, call in enumerate(_list(calls, path)):
        here = f"{path}[{place}]"
        if not isinstance(call, dict):
            raise ShapeError(f"{here} is {_kind(call)}, not an object", "give each call a name and arguments")
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ShapeError(f"{here} has no function name", "give each call a name and arguments")
        function = {**function, "arguments": _arguments(function.get("arguments"), f"{here}.arguments")}
        done.append({"type": "function", **{k: v for k, v in call.items() if k not in function}, "function": function})
    return done


def _arguments(arguments: Any, path: str) -> dict[str, Any]:
    if isinstance(arguments, str):
        arguments = _json(arguments, path) if arguments.strip() else {}
    if not isinstance(arguments, dict | None):
        raise ShapeError(f"{path} is {_kind(arguments)}, not an object", "give the arguments by name")
    return arguments or {}


def _json(text: str, path: str) -> Any:
    try:
        return parse(text)
    except JsonError as fault:
        raise ShapeError(f"{path} holds {fault}", "mend the JSON in that string") from None


def _text(value: Any, path: str) -> str:
    if not isinstance(value, str):
        what = f"{path} is {_kind(value)}"
        raise ShapeError(what if value is None else f"{what}, not text", "give it text")
    return value


def _list(value: Any, path: str) -> list[Any]:
    if not isinstance(value, list):
        raise ShapeError(f"{path} is {_kind(value)}, not a list", "give a list of objects")
    return value


def _kind(value: Any) -> str:
    """What a value is, in words, with the value where it is short."""
    if value is None:
        return "null"
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    return ("text " if isinstance(value, str) else "") + _short(value)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."


def _keys(row: dict[str, Any]) -> str:
    return "the keys " + ", ".join(_short(key) for key in list(row)[:12]) if row else "no keys"
