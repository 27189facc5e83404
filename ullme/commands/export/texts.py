"""The texts on which an export is compared: of many lengths, scripts and endings."""

from __future__ import annotations

from pathlib import Path

TEXTS = (
    "who founded the town?",
    "The town was founded in 1684 by two brothers who had come down the river with a mill stone and a cow.",
    "short",
    "How long does it take to charge a phone battery from 20 to 80 percent",
    'She said: "No!" (and meant it) - then left; 3.14 kg of sugar, 1,024 bytes, 50% off & free.',
    "def mean(xs):\n    return sum(xs) / len(xs)  # of a list\n",
    "  a text that begins and ends with spaces  ",
    "Füße über Straßen, naïve café, œuvre; 東京は日本の首都です。 Привет, мир! 😀",
    "SELECT name FROM users WHERE id = 7;",
    "Photosynthesis turns light into chemical energy. Plants, algae and some bacteria take in carbon dioxide and water "
    "and give off oxygen; the sugars that they build feed almost everything else that lives. The process runs in two "
    "stages: reactions that need light split water and store energy in small molecules, and a cycle that does not need "
    "light spends that energy to bind carbon. Leaves are green because they reflect the middle of the spectrum.",
)


def read_texts(file: str | Path | None) -> list[str]:
    """The texts to compare on: those of a file, one a line, or :data:`TEXTS`.

    Raises:
        ValueError: no such file, or no text in it.
    """
    if file is None:
        return list(TEXTS)
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--texts {file} cannot be read ({error}); give a text file with one text a line") from None
    if not (texts := [line for line in lines if line.strip()]):
        raise ValueError(f"--texts {file} holds no text; write one text a line")
    return texts


def long_text(max_length: int) -> str:
    """A text of more than ``max_length`` tokens under any tokenizer."""
    words = " ".join(TEXTS)
    return (words + " ") * (max_length * 24 // len(words) + 1)
