"""A text file as windows of characters, for models that predict the next one."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modeconn.data.share import Share
from modeconn.tools.door import check_settings, checked, looked_at
from modeconn.tools.fingerprint import digest


@dataclass(eq=False, repr=False)
class TextLoader:
    """Batches ``(inputs, targets)`` of windows of a text: characters as numbers, and the next one of each.

    It can be read any number of times. With ``shuffle`` each pass cuts the text at another place, drawn from torch's
    *global* CPU generator like the order of the windows; without, nothing is drawn.

    Args:
        tokens: The text, int64 ``(N,)``, one number for each character.
        characters: What each number stands for, ``characters[number]``.
        length: Characters in a window, ``T``; inputs and targets of a batch are int64 ``(B, T)``.
        batch_size: Windows in a batch, ``B``; the last batch may be smaller.
        shuffle: Whether each pass has its own random order.

    Raises:
        ValueError: If the text is shorter than one window and a character, or a setting makes no sense.

    Example:
        >>> loader = TextLoader(torch.arange(9) % 3, "abc", length=4)
        >>> [inputs.tolist() for inputs, targets in loader]
        [[[0, 1, 2, 0], [1, 2, 0, 1]]]
    """

    tokens: Tensor
    characters: str
    length: int = 64
    batch_size: int = 16
    shuffle: bool = False

    def __post_init__(self) -> None:
        check_settings(self)
        for name in ("length", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {name}={getattr(self, name)}.")
        if self.tokens.dim() != 1 or self.tokens.dtype is not torch.int64:
            raise ValueError(
                f"tokens must be int64 of one axis, got {self.tokens.dtype} of shape {tuple(self.tokens.shape)}."
            )
        if len(self.tokens) <= self.length:
            raise ValueError(
                f"the text has {len(self.tokens)} characters, too few for one window of length={self.length} and the "
                f"character after it."
            )
        lowest, highest = (int(value) for value in self.tokens.aminmax())
        if lowest < 0 or highest >= len(self.characters):
            wrong = lowest if lowest < 0 else highest
            raise ValueError(f"tokens must lie in 0..{len(self.characters) - 1}, got a token of {wrong}.")

    @property
    def num_examples(self) -> int:
        """Number of windows in a pass."""
        return (len(self.tokens) - 1) // self.length

    @property
    def num_classes(self) -> int:
        """Number of different characters, ``V``."""
        return len(self.characters)

    @property
    def device(self) -> torch.device:
        """Where the text and its batches live."""
        return self.tokens.device

    def __len__(self) -> int:
        return -(-self.num_examples // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = self.drawn_order()
        for number in range(len(self)):
            yield self.batch_at(order, number)

    def drawn_order(self) -> Tensor:
        """Draw where the windows of a pass begin from torch's global CPU generator, in order; int64 ``(N,)``."""
        count = self.num_examples
        if not self.shuffle:
            return torch.arange(count, device="cpu").to(self.device) * self.length
        spare = len(self.tokens) - 1 - count * self.length
        first = int(torch.randint(spare + 1, (), device="cpu"))
        return first + torch.randperm(count, device="cpu").to(self.device) * self.length

    def batch_at(self, order: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Return one batch of a pass of this order."""
        begins = order[number * self.batch_size : (number + 1) * self.batch_size]
        places = begins[:, None] + torch.arange(self.length, device=self.device)
        return self.tokens[places], self.tokens[places + 1]

    @property
    def draws_each_batch(self) -> bool:
        """Whether making a batch draws random numbers: it does not."""
        return False

    def digest(self) -> str:
        """Return a hash of the data, by which processes see whether they have the same."""
        return digest([self.tokens])

    def share(self, number: int, count: int) -> Share:
        """Return every ``count``-th batch, from batch ``number`` on: what one of several processes reads."""
        return Share(self, number, count)

    def with_(self, **changes: Any) -> TextLoader:
        """Return a loader of the same text with other settings, such as ``with_(batch_size=64)``."""
        return dataclasses.replace(self, **changes)

    def in_order(self) -> TextLoader:
        """Return a loader of the same text, always from its beginning to its end."""
        return self.with_(shuffle=False)

    def shuffled(self) -> TextLoader:
        """Return a loader of the same text, each pass in an order of its own."""
        return self.with_(shuffle=True)

    @looked_at
    def to(self, device: torch.device | str) -> TextLoader:
        """Return the loader with its text on ``device``."""
        return self.with_(tokens=self.tokens.to(device))

    def __repr__(self) -> str:
        return (
            f"TextLoader({self.num_examples} x {self.length} characters, {self.num_classes} different ones, "
            f"batch_size={self.batch_size}, shuffle={self.shuffle})"
        )


@checked
def text(
    path: str | os.PathLike[str],
    *,
    length: int = 64,
    batch_size: int = 16,
    test: float = 0.05,
    device: torch.device | str = "cpu",
) -> tuple[TextLoader, TextLoader]:
    """Read a text file for a model of characters.

    Args:
        path: Any text file in UTF-8.
        length: Characters in a window, ``T``.
        batch_size: Windows in a batch, ``B``, of both loaders.
        test: Which share of the text, from its end, is for testing; more than 0, less than 1.
        device: Where the text lives.

    Returns:
        The training loader, shuffled, and the test loader, which is not. Batches are int64 ``(B, T)``, characters and
        the next ones; the numbers are places in ``loader.characters``, all characters of the file in their order.

    Raises:
        ValueError: If the file is no text in UTF-8, or one of the two parts is shorter than a window.
        FileNotFoundError: If there is no such file.
    """
    if not 0 < test < 1:
        raise ValueError(f"test must be more than 0 and less than 1, got test={test}.")
    try:
        content = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{os.fspath(path)!r} is no text in UTF-8: {error.reason} at byte {error.start}.") from None
    characters = "".join(sorted(set(content)))
    number_of = {character: number for number, character in enumerate(characters)}
    tokens = torch.tensor([number_of[character] for character in content], dtype=torch.int64, device="cpu")
    num_train = len(tokens) - int(test * len(tokens))
    settings = {"characters": characters, "length": length, "batch_size": batch_size}
    train, rest = (TextLoader(part, **settings).to(device) for part in (tokens[:num_train], tokens[num_train:]))
    return train.shuffled(), rest
