"""What a constraint may read beside a completion: its prompt, as text or as the turns of a chat."""

from typing import Any, Literal

Messages = list[dict[str, Any]]
"""A chat: {"role": ..., "content": ...} by turns."""

Given = str | Messages | None
"""A prompt: text, the turns before the completion, or none."""

Reads = Literal["completion", "prompt+completion", "chat"]


def turns_of(prompt: Given) -> Messages:
    """Returns the turns of a prompt; one that is text becomes the user's."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}] if prompt else []
    return list(prompt or [])


def conversation(prompt: Given, completion: str) -> Messages:
    """Returns a chat that ends with the completion, the assistant's.

    A prompt that ends with a turn of the assistant is continued there.
    """
    turns = turns_of(prompt)
    begun = turns[-1] if turns and turns[-1]["role"] == "assistant" else {}
    if isinstance(begun.get("content"), str):
        return [*turns[:-1], {**begun, "content": begun["content"] + completion}]
    return [*turns, {"role": "assistant", "content": completion}]


def as_lines(messages: Messages) -> str:
    """Returns a chat as text: "role: content", a turn a line; of content in parts, its text."""
    return "\n".join(f"{message['role']}: {_text(message.get('content'))}" for message in messages)


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content if isinstance(part, dict))
    return content or ""
