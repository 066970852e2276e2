"""Short words for tasks: common nouns, and words made up from letters or syllables."""

from __future__ import annotations

import random

NOUNS = (
    "apple ball bell bird boat book bottle box bridge bucket button cake candle car cat chair clock cloud coat coin "
    "comb cup desk dog door drum egg engine fan farm fish flag flute fork fox garden gate glass glove hammer hat "
    "honey horse house island jar key kite knife ladder lake lamp leaf lemon letter lion map milk mirror moon "
    "mouse nail needle nest onion orange paper park pear pen piano pillow plate pond pot queen rabbit radio rain "
    "ring river road rock roof rope rose salt sand ship shoe shop sock soup spoon star stone sugar sun table tea "
    "tent tiger tower train tree violin wall watch water wheel wind window wolf zebra"
).split()
NAMES = (
    "Ada Ben Cleo Dan Eve Finn Gus Hana Ivo Joy Kai Lea Max Nina Otto Pia Rosa Sam Tara Uma Vic Wim Yara Zoe".split()
)
CITIES = "Bern Cairo Delhi Lima London Madrid Oslo Paris Prague Quito Rome Seoul Tokyo Turin Vienna Warsaw".split()
COLOURS = "red green blue yellow black white brown pink grey purple".split()
_VOWELS, _CONSONANTS = "aeiou", "bcdfghjklmnprstvwz"


def word(rng: random.Random, length: int) -> str:
    """A word of `length` letters: any letters, syllables, or a noun of that length."""
    kind = rng.random()
    if kind < 0.25 and (nouns := [n for n in NOUNS if len(n) == length]):
        return rng.choice(nouns)
    if kind < 0.6:
        return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(length))
    first = rng.randrange(2)
    return "".join(rng.choice(_VOWELS if (i + first) % 2 else _CONSONANTS) for i in range(length))
