"""Work that is text: conversations about Python's own documentation, and plain questions.

A turn is the whole conversation so far, with the answers that the model gave, and one more
question. The model ends its answers itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import TYPE_CHECKING

from hotset.bench.workload import Session, Spec, Turn, Work
from hotset.errors import ConfigError
from hotset.text.prompt import PromptEncoder

if TYPE_CHECKING:
    from hotset.model.loaded import LoadedModel

# Short answers to short questions: what a model of 135 million parameters does well.
DOCUMENT_QUESTIONS = (
    "What is it used for? Answer in one short sentence.",
    "What is the most important rule in this text? Answer in one short sentence.",
    "Explain it to a beginner in one short sentence.",
    "When would a programmer need it? Answer in one short sentence.",
    "Which word in this text is the most important?",
    "What should one be careful about? Answer in one short sentence.",
)
PLAIN_QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue? Answer in one sentence.",
    "Write one sentence about the sea.",
    "What is 2 + 3?",
    "Name three fruits.",
    "What do bees make?",
    "How many days has a week?",
    "Describe a cat in one sentence.",
)
SYSTEM_PROMPT = "You answer questions about Python in one short sentence."


@dataclass(frozen=True, slots=True)
class _Chat:
    """One user's conversation: what is said before the first question, and before each answer."""

    encoder: PromptEncoder
    system: str
    opening: str
    questions: tuple[str, ...]

    def prompt(self, answers: Sequence[str]) -> list[int]:
        """The conversation with these answers, and the next question."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        content = self.opening
        for question, answer in zip(self.questions, [*answers, None], strict=False):
            messages.append({"role": "user", "content": content + question})
            if answer is not None:
                messages.append({"role": "assistant", "content": answer})
            content = ""
        return self.encoder.encode_chat(messages)


def text_work(spec: Spec, model: "LoadedModel | None") -> Work:
    """The conversations of a spec; `first_tokens` of each text at most, cut at the end of a line.

    Raises:
        ConfigError: there is no tokenizer to read text with.
    """
    if model is None or model.tokenizer is None:
        raise ConfigError(
            f"the workload `{spec.workload}` is text, which needs a model with a tokenizer; leave "
            "out dummy_weights, or give another workload"
        )
    encoder = PromptEncoder(model)
    if spec.workload == "questions":
        # Little that is asked is asked again: all of it fits, with room for whole blocks.
        contexts_per_hot = 0.5
        title = f"questions: {spec.users} users at once, one question each"
        chats = [
            ("", _Chat(encoder, "", "", (PLAIN_QUESTIONS[user % len(PLAIN_QUESTIONS)],)))
            for user in range(spec.users)
        ]
    else:
        contexts_per_hot = 5.0
        title = (
            f"documents: {spec.users} users, {spec.turns} turns on a text of {spec.first_tokens} "
            f"tokens, {spec.output_tokens} out at most"
        )
        chats = [
            (name, _about(name, text, user, spec, encoder, model))
            for user, (name, text) in enumerate(pick_documents(spec.users))
        ]
    sessions = tuple(_session(chat, name, spec.output_tokens) for name, chat in chats)
    kv_tokens = sum(session.longest_context for session in sessions)
    return Work(title, sessions, kv_tokens, contexts_per_hot, is_text=True)


def pick_documents(users: int) -> list[tuple[str, str]]:
    """Titles and texts of Python's documentation: the longest topics, a different one per user."""
    by_length = sorted(topics, key=lambda title: (-len(topics[title]), title))
    return [(title, topics[title]) for title in (by_length * -(-users // len(by_length)))[:users]]


def _about(
    title: str, text: str, user: int, spec: Spec, encoder: PromptEncoder, model: "LoadedModel"
) -> _Chat:
    ids = encoder.encode_text(text)[: spec.first_tokens]
    cut: str = model.require_tokenizer().decode(ids)
    whole_lines = cut.rpartition("\n")[0] or cut
    opening = f'From the Python documentation, "{title}":\n\n{whole_lines}\n\n'
    questions = [
        DOCUMENT_QUESTIONS[(user + turn) % len(DOCUMENT_QUESTIONS)] for turn in range(spec.turns)
    ]
    return _Chat(encoder, SYSTEM_PROMPT, opening, tuple(questions))


def _session(chat: _Chat, title: str, answer_tokens: int) -> Session:
    turns, known = [], 0
    for number, question in enumerate(chat.questions):
        longest = len(chat.prompt([""] * number)) + number * answer_tokens
        turns.append(
            Turn(chat.prompt, longest, answer_tokens, known_tokens=known, question=question)
        )
        known = longest + answer_tokens
    return Session(tuple(turns), title=title)
