"""Text of many kinds, over 5 MB, the same on every run: what tokenizers are compared on.

Made from the sources of the standard library, from the tables of `unicodedata` and from sentences
written for it, with a seeded generator. Nothing is fetched.
"""

import random
import sysconfig
import unicodedata
from collections.abc import Callable
from functools import cache
from pathlib import Path

SENTENCES = {
    "English": [
        "I'm sure they'll say it's fine, don't you think? WE'VE SEEN IT, HE'D KNOW!",
        "The quick brown fox, 42 years old, jumped over the lazy dog's kennel at 7:30 p.m.",
        "Attention layers read every earlier position, so the cache grows with the conversation.",
    ],
    "German": [
        "Größere Übungen heißen «Prüfungen»; die Straßenbahn fährt um Viertel nach zwölf.",
        "Der Donaudampfschifffahrtskapitän aß süße Äpfel und trank dazu kühles Weißbier.",
        "Können Sie mir bitte sagen, wo der nächste Bahnhof ist?",
    ],
    "French": [
        "L'été dernier, j'ai mangé des crêpes à l'ombre d'un vieux chêne ; c'était délicieux !",
        "Où est-ce que tu as trouvé ce « cœur » d'ambre ? Là-bas, près de l'hôtel.",
        "Les élèves révisent leur leçon de français avant l'examen de vendredi.",
    ],
    "Italian": [
        "Perché non andiamo al mare? L'acqua è così limpida che si vedono i pesci.",
        "La nonna preparò gli gnocchi con l'olio d'oliva e un po' di basilico.",
        "Domani pioverà, ma dopodomani tornerà il sole su tutta la città.",
    ],
    "Portuguese": [
        "Amanhã não haverá aula; os alunos irão à praça ouvir a canção do João.",
        "A avó fez pão de açúcar com maçãs e três colheres de mel.",
        "Você já leu o artigo sobre a evolução das línguas românicas?",
    ],
    "Spanish": [
        "¿Dónde está el pingüino? ¡Mañana llegará un camión con cien mil ñandúes!",
        "El niño comió arroz, judías y una piña entera en el jardín de su abuela.",
        "Según el médico, caminar treinta minutos al día mejora el corazón.",
    ],
    "Hindi": [
        "मुझे यह किताब बहुत पसंद है क्योंकि इसमें हर शब्द का अर्थ समझाया गया है।",
        "कल सुबह आठ बजे हम दिल्ली से आगरा के लिए रेलगाड़ी पकड़ेंगे।",
        "क्या आप मुझे एक गिलास ठंडा पानी दे सकते हैं? धन्यवाद!",
    ],
    "Thai": [
        "วันนี้อากาศดีมาก เราไปเดินเล่นที่สวนสาธารณะกันเถอะ",
        "ผมอยากสั่งข้าวผัดกุ้งหนึ่งจานกับน้ำมะพร้าวเย็น ๆ",
        "ภาษาไทยไม่มีช่องว่างระหว่างคำ จึงตัดคำได้ยาก",
    ],
}
EMOJI = [
    "🙂",
    "☺",
    "👍🏽",
    "🇩🇪",
    "❤\ufe0f",
    "1\ufe0f\u20e3",
    "👩\u200d👩\u200d👧\u200d👦",
    "🏳\ufe0f\u200d🌈",
    "🧑🏿\u200d🚀",
    "\u200d",
    "\ufe0f",
]
SPACES = [
    *(" ", "  ", " " * 7, "\n", "\n\n", "\n" * 5, "\r\n", "\t", "\r", "\x0b", "\x0c"),
    *("\x1c", "\x1f", "\x85", "\xa0", "\u1680", "\u2003", "\u2028", "\u3000", "\u200b"),
]
SPECIAL = ["<|begin_of_text|>", "<|eot_id|>", "<|python_tag|>", "<|im_start|>", "<|image|>", "<|"]
LONG_RUNS = [
    *("a" * n for n in (24_999, 25_000, 25_001, 30_000, 75_000)),
    *(" " * n for n in (25_000, 25_001, 60_000)),
    "\n" * 26_000 + "é" * 25_001 + "\u3000" * 50_001,
    "0" * 25_003 + "-" * 25_003 + "!\n" * 13_000,
    ("x" * 25_010 + " " * 3) * 20,
]
Make = Callable[[random.Random], str]


@cache
def documents() -> dict[str, list[str]]:
    """Texts by kind; together over 5 million characters."""
    rng = random.Random(31)
    made = {
        "code": _sources(1_600_000),
        **{language: _many(rng, _speech(language), 140) for language in SENTENCES},
        "numbers": _many(rng, _numbers, 200),
        "whitespace": _many(rng, _whitespace, 200),
        "emoji": _many(rng, _mixed(EMOJI), 60),
        "contractions": _many(rng, _contractions, 60),
        "special": _many(rng, _mixed(SPECIAL), 60),
        "combining": _many(rng, _combining, 60),
        "random bytes": _many(rng, _random_bytes, 150),
        "code points": _many(rng, _code_points, 150),
        "every code point": _every_code_point(),
        "control characters": _many(rng, _control, 40),
        "long runs": LONG_RUNS,
    }
    total = sum(len(text) for texts in made.values() for text in texts)
    assert total > 5_000_000, total
    return made


def _many(rng: random.Random, make: Make, count: int) -> list[str]:
    return [make(rng) for _ in range(count)]


def _sources(limit: int) -> list[str]:
    texts, total = [], 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        texts.append(path.read_text(encoding="utf-8", errors="replace"))
        total += len(texts[-1])
        if total > limit:
            break
    return texts


def _speech(language: str) -> Make:
    def make(rng: random.Random) -> str:
        sentences = rng.choices(SENTENCES[language], k=12)
        words = " ".join(rng.choices(SENTENCES[language], k=4)).split(" ")
        rng.shuffle(words)
        shuffled = " ".join(words)
        return rng.choice(["\n", "\n\n", " "]).join([*sentences, shuffled, shuffled.upper()])

    return make


def _numbers(rng: random.Random) -> str:
    zeros = [0x30, 0x660, 0x966, 0xE50, 0xFF10, 0x1D7CE]

    def number() -> str:
        zero = rng.choice(zeros) if rng.random() < 0.3 else ord("0")
        digits = "".join(chr(zero + rng.randrange(10)) for _ in range(rng.randint(1, 40)))
        form = rng.choice(["{}", "-{}", "{}.5e-7", "1,{}", "${}%", "0x{}", "{}²", "Ⅻ{}½", "a{}b"])
        return form.format(digits)

    return "".join(number() + rng.choice([" ", "", ", ", "\n", "  "]) for _ in range(60))


def _whitespace(rng: random.Random) -> str:
    words = ["x", "Word", "1", "!", "'s", "\u0301", "日"]
    return "".join(
        "".join(rng.choices(SPACES, k=rng.randint(0, 6))) + rng.choice(words) for _ in range(200)
    ) + rng.choice(SPACES)


def _mixed(parts: list[str]) -> Make:
    def make(rng: random.Random) -> str:
        return "".join(rng.choices([*parts, *parts, "text", " ", "\n", "1", "."], k=500))

    return make


def _contractions(rng: random.Random) -> str:
    ends = ["s", "S", "t", "T", "re", "RE", "Re", "ve", "m", "ll", "lL", "d", "D", "\u017f", "x"]
    marks = ["'", "'", "\u2019", "''"]
    starts = ["it", "IT", "é", "日", "1", " ", "\n", "_"]
    return "".join(rng.choice(starts) + rng.choice(marks) + rng.choice(ends) for _ in range(300))


def _combining(rng: random.Random) -> str:
    marks = [chr(c) for c in range(0x300, 0x370)] + list(
        "\u0901\u093c\u0e31\u0e48\u05b0\u064b\u20dd"
    )
    return "".join(
        rng.choice("aeouAnक ก1!\n") + "".join(rng.choices(marks, k=rng.randint(0, 4)))
        for _ in range(800)
    )


def _random_bytes(rng: random.Random) -> str:
    """Half of it bytes of no kind, half of it UTF-8 with holes."""
    noise = rng.randbytes(1500)
    broken = bytearray("".join(rng.choices(EMOJI + list("ßж日ก\n a"), k=400)).encode())
    for _ in range(len(broken) // 20):
        del broken[rng.randrange(len(broken))]
    return (noise + broken).decode("utf-8", "replace")


@cache
def _assigned() -> dict[str, list[str]]:
    """Characters by the first letter of their category."""
    kinds: dict[str, list[str]] = {}
    for code in range(0x110000):
        kind = unicodedata.category(chr(code))
        if kind not in ("Cs", "Co", "Cn"):
            kinds.setdefault(kind[0], []).append(chr(code))
    return kinds


def _code_points(rng: random.Random) -> str:
    kinds = _assigned()
    return "".join(rng.choice(kinds[rng.choice("LLMNPSZC")]) for _ in range(2000))


def _every_code_point() -> list[str]:
    """Each assigned character, and the unassigned and private ones of some planes, in order and
    behind a letter and a space, which shows whether the pre-tokenizer takes it for a letter."""
    chars = [char for kind in sorted(_assigned()) for char in _assigned()[kind]]
    chars += [chr(code) for code in (*range(0xE000, 0xE100), *range(0x1FF80, 0x20010), 0x10FFFF)]
    return [
        "".join(f"a{char}\n {char}" for char in chars[at : at + 20_000])
        for at in range(0, len(chars), 20_000)
    ]


def _control(rng: random.Random) -> str:
    return "".join(rng.choices([*map(chr, range(32)), "\x7f", "\x80", "\x9f", "a", " "], k=1000))
