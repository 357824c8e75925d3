"""Training a tokenizer on the corpus: which text it learns from."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from gpt.config import DataConfig
from gpt.data.cache import PlannedSource
from gpt.data.sources.document import OnRead
from gpt.data.split import size_of, split_documents
from gpt.data.tokenizer import TOKENIZERS, Encoding, pieces

# The trainer needs about 100 bytes of memory for each byte of the distinct words that it has seen,
# so the bytes of distinct long words, which are rarely repeated, are limited.
MAX_DISTINCT_BYTES = 2**23
LONG_WORD = 16  # characters between white space
PART = 2**12  # characters passed to the trainer at a time; larger parts take more memory (measured)


def train_tokenizer(
    config: DataConfig,
    sources: list[PlannedSource],
    on_read: OnRead = lambda count: None,
    check: Callable[[], object] = lambda: None,
) -> Encoding:
    """The tokenizer that `config` describes.

    Its entry in `TOKENIZERS` says which text it learns from: all of it for `chars`, since every
    character needs a token.

    Args:
        check: called for each piece of text; an exception that it raises ends the work.
    """
    kind = TOKENIZERS[config.tokenizer]
    position = 0  # bytes read of all files

    def count_read(count: int) -> None:
        nonlocal position
        position += count
        on_read(count)

    def texts() -> Iterator[str]:
        for target, piece, _ in split_documents(config, sources, count_read, end_of_text=-1):
            check()
            if isinstance(piece, str) and (target != "val" or kind.trained_on == "everything"):
                yield piece

    def sample() -> Iterator[str]:
        """At most `learn_bytes`, spread evenly over the files; for a hub dataset, the first ones.

        Less is read where there are many distinct long words, as in DNA or scripts without spaces.
        """
        taken, distinct = 0, 0
        words = set[str]()
        size = sum(source.size() for source in sources if source.target != "val")
        for text in texts():
            for part in pieces([text], PART):
                if taken >= config.learn_bytes or distinct >= MAX_DISTINCT_BYTES:
                    return
                if taken * size <= config.learn_bytes * position:
                    taken += size_of(part)
                    new = {word for word in part.split() if len(word) > LONG_WORD} - words
                    distinct += sum(map(size_of, new))
                    words |= new
                    yield part

    return kind.make(config, sample() if kind.trained_on == "sample" else texts())
