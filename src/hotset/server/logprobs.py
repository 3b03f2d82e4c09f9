"""Log-probabilities as the OpenAI API and vLLM write them."""

from collections.abc import Container, Sequence

from hotset.request import TokenLogprob
from hotset.server.body import Json
from hotset.text.token_text import TokenBytes

# JSON has no -Infinity.
_LEAST = -9999.0


def chat_logprobs(
    entries: Sequence[TokenLogprob], tokens: TokenBytes, left_out: Container[int]
) -> Json:
    """As chat completions have them.

    Args:
        entries: of the tokens of an output.
        tokens: what they are.
        left_out: ids that add nothing to the text, whatever their bytes are.
    """

    def entry(token_id: int, logprob: float) -> Json:
        return {
            "token": tokens.name_of(token_id),
            "logprob": max(logprob, _LEAST),
            "bytes": [] if token_id in left_out else list(tokens.bytes_of(token_id)),
        }

    return {
        "content": [
            {**entry(one.token_id, one.logprob), "top_logprobs": [entry(*top) for top in one.top]}
            for one in entries
        ],
        "refusal": None,
    }


def text_logprobs(
    entries: Sequence[TokenLogprob], tokens: TokenBytes, offsets: Sequence[int]
) -> Json:
    """As text completions have them; `offsets` are indices in the text."""
    return {
        "tokens": [tokens.name_of(one.token_id) for one in entries],
        "token_logprobs": [max(one.logprob, _LEAST) for one in entries],
        "top_logprobs": [_by_name(one, tokens) for one in entries],
        "text_offset": list(offsets),
    }


def echoed_logprobs(
    prompt: Sequence[int],
    entries: Sequence[TokenLogprob],
    tokens: TokenBytes,
    offsets: Sequence[int],
    num_top: int,
) -> Json:
    """`text_logprobs` of a prompt; its first token has nothing before it, and so none.

    Args:
        prompt: token ids.
        entries: of all of them but the first.
        tokens: what they are.
        offsets: of all of them, in the text.
        num_top: how many of the likeliest are wanted at each place.
    """
    return {
        "tokens": [tokens.name_of(token_id) for token_id in prompt],
        "token_logprobs": [None, *(max(one.logprob, _LEAST) for one in entries)],
        "top_logprobs": [None, *(_by_name(one, tokens, num_top) for one in entries)],
        "text_offset": list(offsets),
    }


def prompt_logprobs(
    entries: Sequence[TokenLogprob], tokens: TokenBytes, num_top: int
) -> list[Json | None]:
    """As vLLM has them: for each token of a prompt but the first, entries by token id.

    They are of the token itself and of the `num_top` likeliest.
    """

    def entry(token_id: int, logprob: float, rank: int | None) -> Json:
        name = tokens.name_of(token_id)
        return {"logprob": max(logprob, _LEAST), "rank": rank, "decoded_token": name}

    found: list[Json | None] = [None]
    for one in entries:
        places = {str(one.token_id): entry(one.token_id, one.logprob, one.rank)}
        for rank, (token_id, logprob) in enumerate(one.top[:num_top], 1):
            places.setdefault(str(token_id), entry(token_id, logprob, rank))
        found.append(places)
    return found


def _by_name(one: TokenLogprob, tokens: TokenBytes, num_top: int | None = None) -> dict[str, float]:
    """The likeliest tokens by name, and the chosen one, as OpenAI has it.

    Of tokens with the same name the likeliest counts.
    """
    found: dict[str, float] = {}
    for token_id, logprob in (*one.top[:num_top], (one.token_id, one.logprob)):
        found.setdefault(tokens.name_of(token_id), max(logprob, _LEAST))
    return found
