"""The prompt that a constraint reads with a completion: text, or the messages of a chat."""

from typing import Any, Literal

Messages = list[dict[str, Any]]
"""A chat of {"role": ..., "content": ...}."""

Given = str | Messages | None
"""A prompt: text, the messages before the completion, or none."""

Reads = Literal["completion", "prompt+completion", "chat"]


def turns_of(prompt: Given) -> Messages:
    """Returns a prompt as messages; text becomes the user's."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}] if prompt else []
    return without_nulls(prompt or [])


def without_nulls(messages: Messages) -> Messages:
    """Returns a chat without the keys that Arrow adds to turns that lack them; a content stays, even a null one."""
    return [{key: value for key, value in turn.items() if value is not None or key == "content"} for turn in messages]


def conversation(prompt: Given, completion: str) -> Messages:
    """Returns a chat that ends with the completion, as the assistant's message or appended to the prompt's last one."""
    turns = turns_of(prompt)
    begun = turns[-1] if turns and turns[-1]["role"] == "assistant" else {}
    if isinstance(begun.get("content"), str):
        return [*turns[:-1], {**begun, "content": begun["content"] + completion}]
    return [*turns, {"role": "assistant", "content": completion}]


def as_lines(messages: Messages) -> str:
    """Returns a chat as lines "role: content", with the text of content in parts."""
    return "\n".join(f"{message['role']}: {text_of(message.get('content'))}" for message in messages)


def text_of(content: Any) -> str:
    """Returns the text of a message's content: itself, that of its parts, or none."""
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content if isinstance(part, dict))
    return content or ""
